"""Fused kernels for small maps on a GPU, and when to use them (chapter 9).

Each has a plain form elsewhere that it must equal: `DepthwiseConv` through torch's convolution, `decomposed_fast` and
`swat_decomposed` through two passes of `axis_pass` and `swat_pass`. `torch.compile` takes them as parts of its graphs.
"""

import contextlib

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS, WIDTH = 64, 128  # of a window, of a head: what fits on the chip at once
_allowed = True


@torch.compiler.assume_constant_result
def _loaded() -> bool:
    """Imports Triton's halves where there is a Triton; a traced graph takes the answer as it is."""
    try:
        import minigated.kernels.depthwise_triton
        import minigated.kernels.windowed_triton  # noqa: F401
    except ImportError:
        return False
    return True


def usable(x: Tensor) -> bool:
    """Whether kernels serve this tensor: on a GPU, in a dtype they know, with Triton there, and not switched off."""
    return _allowed and x.is_cuda and x.dtype in DTYPES and _loaded()


@contextlib.contextmanager
def switched_off():
    """Plain forms only while the context lasts, for comparisons; what is compiled already stays as it is."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def fits(v: Tensor, row_window: int, column_window: int) -> bool:
    """Whether `windowed` serves values [B, h, w, H, D] in windows of these sides."""
    return row_window * column_window <= CELLS and v.shape[-1] <= WIDTH and usable(v)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of each channel by itself, zeros around the map; under autocast the map is cast, filters are not.

    Args:
        x: [B, h, w, C]. weight: [C, 1, k, k], k odd. bias: [C].
    """
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return torch.ops.minigated.depthwise(x, weight, bias, False)


def windowed_softmax(
    q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor, column_mask: Tensor, row_window: int, column_window: int
) -> Tensor:
    """`decomposed_fast` as one kernel; shapes as there."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    tables = (row_mask, column_mask, row_mask, column_mask)  # the softmax has nothing that multiplies
    return torch.ops.minigated.windowed(q, k, v, *tables, [row_window, column_window], True)


def windowed_sigmoid(q: Tensor, k: Tensor, v: Tensor, tables, row_window: int, column_window: int) -> Tensor:
    """Both passes of `swat_decomposed` as one kernel; `tables` are `SwatTables`."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    tables = (tables.row_bias, tables.column_bias, tables.row_decay, tables.column_decay)
    return torch.ops.minigated.windowed(q, k, v, *tables, [row_window, column_window], False)
