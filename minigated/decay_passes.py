"""The fast forms of RMT's attention: passes along one axis, in segments, and the full form through SDPA (chapter 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated import kernels
from minigated.decay import as_map, as_tokens
from minigated.errors import InputError, one_of

FORMS = ("auto", "matmul", "pointwise")


def axis_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    axis: int,
    window: int | None = None,
    form: str = "auto",
) -> Tensor:
    """Softmax attention along one axis of a map, in segments of `window` cells that do not see each other.

    Args:
        q, k, v: [B, h, w, H, D].
        mask: added to the logits, [H, W, W] or one a segment, [segments, H, W, W]; no row may be all -inf.
        axis: 1 for the height, 2 for the width.
        window: W; the whole side by default.
        form: "matmul", batched products; "pointwise", products and sums that a compiler fuses into one kernel, where
            matrices of a few cells waste most of a tile; "auto", pointwise in a graph compiled for a GPU, else matmul.

    Returns:
        [B, h, w, H, D] in the dtype of v; the softmax is float32 at least.

    Raises:
        InputError: an axis, window or mask that does not fit the map.
    """
    one_of("form", form, FORMS)
    if axis not in (1, 2):
        raise InputError(f"axis {axis}; accepted: 1 (height), 2 (width)")
    side = v.shape[axis]
    window = side if window is None else window
    if window < 1 or side % window:
        raise InputError(f"a side of {side} cells cannot be cut into windows of {window}")
    sizes = (v.shape[3], window, window)
    if mask.shape[-3:] != sizes or mask.ndim > 4 or (mask.ndim == 4 and len(mask) not in (1, side // window)):
        raise InputError(
            f"a mask of shape {list(mask.shape)}; accepted: {list(sizes)}, or one of these for each of the "
            f"{side // window} segments"
        )
    if form == "auto":
        form = "pointwise" if torch.compiler.is_compiling() and v.is_cuda else "matmul"
    # [before, segments, W, after, H, D]: the cells of a segment stand in axis 2, all else is batch
    shape = (math.prod(v.shape[:axis]), side // window, window, math.prod(v.shape[axis + 1 : 3]), *v.shape[3:])
    core = _pointwise if form == "pointwise" else _matmul
    return core(q.reshape(shape), k.reshape(shape), v.reshape(shape), mask).reshape(v.shape)


def _matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    before, segments, cells, after, heads, _ = q.shape
    rows = before * segments * after  # a -1 would have no size in a batch of no images
    fold = lambda x: x.permute(0, 1, 3, 4, 2, 5).reshape(rows, heads, cells, x.shape[-1])
    scores = (fold(q) * q.shape[-1] ** -0.5) @ fold(k).transpose(-2, -1)
    if mask.ndim == 4 and len(mask) > 1:  # as many copies as the segments have neighbours; small next to the scores
        mask = mask[:, None].expand(-1, after, -1, -1, -1).flatten(0, 1).repeat(before, 1, 1, 1)
    weights = torch.softmax(scores + mask, -1).to(v.dtype)  # [rows, H, W, W]
    out = (weights @ fold(v)).view(before, segments, after, heads, cells, v.shape[-1])
    return out.permute(0, 1, 4, 2, 3, 5)  # [before, segments, W, after, H, D]


def _pointwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    table = mask.view(-1, *mask.shape[-3:]).permute(0, 2, 1, 3).unsqueeze(2)  # [segments | 1, W, 1, H, W]
    keys = k.movedim(2, -2).unsqueeze(2).to(wide)  # [before, segments, 1, after, H, W, D]
    scores = (q.unsqueeze(-2).to(wide) * keys).sum(-1) * q.shape[-1] ** -0.5  # [before, segments, W, after, H, W]
    weights = torch.softmax(scores + table, -1).to(v.dtype).to(wide)
    values = v.movedim(2, -2).unsqueeze(2)  # [before, segments, 1, after, H, W, D]
    return (weights.unsqueeze(-1) * values).sum(-2).to(v.dtype)  # [before, segments, W, after, H, D]


def decomposed_fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_mask: Tensor,
    column_mask: Tensor,
    row_window: int | None = None,
    column_window: int | None = None,
    form: str = "auto",
) -> Tensor:
    """`manhattan_decomposed` by two calls of `axis_pass`: width first, then height with the same queries and keys.

    With form="auto" one kernel does both where it can, on a GPU, in windows of at most 64 cells. It wants q, k and v in
    one tensor: where they lie so already, `minigated.retention.decomposed` saves the copy.
    """
    sides = row_window or v.shape[1], column_window or v.shape[2]
    if form == "auto" and kernels.fits(v, *sides, (row_mask,), (column_mask,)):
        packed = torch.stack((q.to(v.dtype), k.to(v.dtype), v), 3)  # [B, h, w, 3, H, D]
        return kernels.windowed_softmax(packed, None, None, row_mask, column_mask, sides)
    v = axis_pass(q, k, v, column_mask, 2, column_window, form)
    return axis_pass(q, k, v, row_mask, 1, row_window, form)


def full_fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`manhattan_full` through torch's fused kernel, which wants the mask in the dtype of q; shapes as there.

    Raises:
        InputError: a mask that does not fit the map.
    """
    cells = q.shape[1] * q.shape[2]
    if mask.shape != (q.shape[3], cells, cells):
        raise InputError(f"a mask of shape {list(mask.shape)}; accepted: {[q.shape[3], cells, cells]}")
    tokens = (as_tokens(x) for x in (q, k, v))  # [B, H, N, D] each
    return as_map(F.scaled_dot_product_attention(*tokens, attn_mask=mask.to(q.dtype).unsqueeze(0)), q.shape[1])
