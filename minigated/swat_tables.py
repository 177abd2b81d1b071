"""Slopes, decay, masks and rotation of Gated-SwinRMT-SWAT as buffers, built once for each size of map (chapter 6)."""

from typing import NamedTuple

import torch
from torch import Tensor

from minigated.decay import rotation_table
from minigated.errors import InputError
from minigated.swat_options import ALIBI, DISTANCES, NORMS, SwatOptions
from minigated.tables import SizedTables
from minigated.windows import Axis, axis_mask, plan_axis


class SwatTables(NamedTuple):
    """What the two passes need for a map: [ph, pw] is the padded map, Wh and Ww are the window's sides.

    Attributes:
        rows, columns: the plans of the two axes.
        cos, sin: [ph, pw, D], indexed inside the window; None without rotation.
        row_bias, row_decay: [1 | segments, H, Wh, Wh], of the height pass.
        column_bias, column_decay: [1 | segments, H, Ww, Ww], of the width pass.
    """

    rows: Axis
    columns: Axis
    cos: Tensor | None
    sin: Tensor | None
    row_bias: Tensor
    column_bias: Tensor
    row_decay: Tensor
    column_decay: Tensor


class SwatTableBuilder(SizedTables):
    """Makes `SwatTables`: slopes and decay as buffers, built once a size, never trained.

    Args:
        heads: H. head_width: D. log_decay: [H], log of each head's rate gamma.
        window: side of a window; None takes the whole map. shifted: by half a window.
        options: which reading.
        size: (height, width) to build at once.

    Raises:
        InputError: odd heads where slopes are balanced; a log-decay of another length.
    """

    def __init__(
        self,
        heads: int,
        head_width: int,
        log_decay: Tensor,
        window: int | None = None,
        shifted: bool = False,
        options: SwatOptions | None = None,
        size: tuple[int, int] | None = None,
    ):
        self.options = SwatOptions() if options is None else options
        self.row_slopes, self.column_slopes = (slopes.tolist() for slopes in slopes_on_cpu(self.options, heads))
        self.head_width, self.window, self.shifted = head_width, window, shifted
        self.log_decay = [rate * self.options.decay for rate in log_decay.tolist()]
        if len(self.log_decay) != heads:
            raise InputError(f"{len(self.log_decay)} decay rates were given for {heads} heads")
        super().__init__(size)

    def build(self, height, width, device, dtype):
        rows, columns = (plan_axis(side, self.window, self.shifted) for side in (height, width))
        cos = sin = None
        if self.options.rotation:
            cos, sin = (
                table.to(device).repeat(rows.windows, columns.windows, 1)  # [ph, pw, D]
                for table in rotation_table(rows.window, columns.window, self.head_width, dtype)
            )
        row_bias, row_decay = self._axis(rows, self.row_slopes, device, dtype)
        column_bias, column_decay = self._axis(columns, self.column_slopes, device, dtype)
        return SwatTables(rows, columns, cos, sin, row_bias, column_bias, row_decay, column_decay)

    def _axis(self, axis: Axis, slopes: list[float], device, dtype) -> tuple[Tensor, Tensor]:
        options, norm = self.options, NORMS[self.options.norm]
        cells = torch.arange(axis.window, device=device, dtype=dtype)
        offset = cells[:, None] - cells  # [W, W], i - j
        per_head = [torch.tensor(x, device=device, dtype=dtype)[:, None, None] for x in (slopes, self.log_decay)]
        inside, outside = ALIBI[options.alibi](*per_head, DISTANCES[options.distance](offset), offset.abs())
        allowed = axis_mask(axis).to(device).unsqueeze(1)  # [segments, 1, W, W]
        allowed = allowed if axis.shift or axis.padding else allowed[:1]  # no borders: one mask serves all segments
        decay = outside.exp() * norm.factor(axis.window) * allowed  # exactly 0 where forbidden
        return (inside + norm.bias(axis.window)).unsqueeze(0), decay  # [1, H, W, W], [1 | segments, H, W, W]


def slopes_on_cpu(options: SwatOptions, heads: int) -> tuple[Tensor, Tensor]:
    """`options.signs`, as numbers also where the model itself is built on the meta device."""
    with torch.device("cpu"):
        return options.signs(heads)
