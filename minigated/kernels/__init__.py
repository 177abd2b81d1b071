"""Fused kernels for small maps and for single tokens on a GPU, and when to use them (chapter 9).

Each has a plain form elsewhere that it must equal: `DepthwiseConv` through torch's convolution, `decomposed_fast` and
`swat_decomposed` through two passes of `axis_pass` and `swat_pass`, which `torch.compile` takes as parts of its graphs;
`minigated.fused_step.decode_fused` through `minigated.static_cache.decode`.
"""

import contextlib

import torch
from torch import Tensor

from minigated.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS, WIDTH = 64, 128  # of a window, sides rounded up to powers of two, and of a head
BYTES = 16 << 10  # of one map of a window, sides and width rounded up; a backward program holds six on the chip at once
OLDEST = (3, 5)  # of Triton: tuples in kernels, kernels that start early; torch 2.9 brings it along
WANTED = f"Triton {OLDEST[0]}.{OLDEST[1]}, a GPU and float32, bfloat16 or float16"  # for a refusal
_allowed = True


@torch.compiler.assume_constant_result
def _loaded() -> bool:
    """Imports Triton's halves where there is a Triton; a traced graph takes the answer as it is."""
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
            return False
        import minigated.kernels.depthwise_triton
        import minigated.kernels.local_triton
        import minigated.kernels.windowed_triton  # noqa: F401
    except ImportError:
        return False
    return True


def usable(x: Tensor) -> bool:
    """Whether kernels serve this tensor: on a GPU, in a dtype they know, with Triton there, and not switched off."""
    return _allowed and x.is_cuda and x.dtype in DTYPES and _loaded()


@contextlib.contextmanager
def switched_off():
    """Plain forms only while the context lasts; a recorded CUDA graph stays as it is.

    For comparisons, and for what kernels have not: gradients of gradients, derivatives in forward mode, hooks on
    convolutions.
    """
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def _padded(side: int) -> int:
    """The power of two that holds so many."""
    held = 1
    while held < side:
        held *= 2
    return held


def fits(v: Tensor, row_window: int, column_window: int, row_tables=(), column_tables=()) -> bool:
    """Whether `windowed` serves values [B, h, w, H, D] in windows of these sides.

    Args:
        row_tables, column_tables: of the height pass and of the width pass, [..., H, W, W]; none may want a gradient.
    """
    cells = _padded(row_window) * _padded(column_window)
    if not usable(v) or 0 in v.shape or cells > CELLS or v.shape[-1] > WIDTH:
        return False
    if cells * _padded(v.shape[-1]) * v.dtype.itemsize > BYTES or v.shape[1] % row_window or v.shape[2] % column_window:
        return False
    of_rows = all(_fits(t, v.shape[3], row_window, v.shape[1]) for t in row_tables)
    return of_rows and all(_fits(t, v.shape[3], column_window, v.shape[2]) for t in column_tables)


def _fits(table: Tensor, heads: int, window: int, side: int) -> bool:
    """Whether a pass along a side of the map can read a table: one for all segments, or one for each."""
    segments = tuple(table.shape[:-3]) in ((), (1,), (side // window,))
    return segments and table.shape[-3:] == (heads, window, window) and not table.requires_grad


def _kernel(name: str, x: Tensor):
    """The operation of that name, which there is only where `usable` has loaded it."""
    if not usable(x):
        off = "" if _allowed else ", not switched off"
        raise InputError(f"the kernel {name} got a tensor on {x.device}, {x.dtype}; accepted: {WANTED}{off}")
    return getattr(torch.ops.minigated, name)


def _check_filters(x: Tensor, weight: Tensor) -> None:
    if 0 in x.shape[1:]:
        raise InputError(f"a map of shape {list(x.shape)}; accepted: no empty side")
    if x.shape[-1] != weight.shape[0]:
        raise InputError(f"a map of {x.shape[-1]} channels; accepted: {weight.shape[0]}, as many as filters")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of each channel by itself, zeros around the map; under autocast the map is cast, filters are not.

    Args:
        x: [B, h, w, C]. weight: [C, 1, k, k], k odd. bias: [C].
    """
    _check_filters(x, weight)
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return _kernel("depthwise", x)(x, weight, bias, mirror=False, own=False, plus=None)


def depthwise_added(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The map plus its convolution in one kernel; arguments as in `depthwise`, the map in the dtype of the result."""
    _check_filters(x, weight)
    return _kernel("depthwise", x)(x, weight, bias, mirror=False, own=True, plus=None)


def windowed_softmax(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, row_mask: Tensor, column_mask: Tensor,
    window: tuple[int, int], shift: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """Rotation, shift and both passes of chapter 5 as one kernel.

    Args:
        qkv: [B, h, w, 3, H, D]. cos, sin: [h, w, D], or None for no rotation. row_mask, column_mask: as in
            `decomposed_fast`. window, shift: cells along height and width; windows must divide the map.

    Returns:
        [B, h, w, H, D].
    """
    masks = (row_mask, column_mask) * 2  # the softmax has nothing that multiplies
    return _kernel("windowed", qkv)(qkv, None, cos, sin, *masks, list(window), list(shift), True)


def windowed_local(
    qkv: Tensor, conv: torch.nn.Conv2d, cos: Tensor | None, sin: Tensor | None, row_mask: Tensor, column_mask: Tensor,
    window: tuple[int, int], shift: tuple[int, int] = (0, 0),
) -> Tensor:  # fmt: skip
    """`windowed_softmax` plus a depth-wise convolution of the values, whose two gradients are summed on the way."""
    masks = (row_mask, column_mask)
    operation = _kernel("windowed_local", qkv)
    return operation(qkv, conv.weight, conv.bias, cos, sin, *masks, list(window), list(shift))


def windowed_sigmoid(qk: Tensor, v: Tensor, tables, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Rotation, shift and both passes of `swat_decomposed` as one kernel.

    Args:
        qk: [B, h, w, 2, H, D]. v: [B, h, w, H, D]. tables: `SwatTables`. shift: as in `windowed_softmax`.
    """
    window = [tables.rows.window, tables.columns.window]
    of_scores = (tables.row_bias, tables.column_bias, tables.row_decay, tables.column_decay)
    operation = _kernel("windowed", v)
    return operation(qk.to(v.dtype), v, tables.cos, tables.sin, *of_scores, window, list(shift), False)
