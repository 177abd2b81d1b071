"""Windows on a map: cut, put back, shift, and who may look at whom afterwards (chapter 4).

Swin (arXiv 2103.14030) lets a cell attend inside its window only, and moves the windows by half their side in every
second layer. The move is a cyclic roll of the map, so a window at the border holds cells that were no neighbours: masks
keep them apart. All of it is a matter of one axis at a time, and `Axis` is the plan of one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.errors import InputError


# ---------------------------------------------------------------------------------------------- the plan of an axis
@dataclass(frozen=True)
class Axis:
    """How one axis of a map is cut.

    Attributes:
        side: cells of the map. window: W, after the adaptive rule. shift: cells the map is rolled by.
        padding: cells added at the end, so that windows divide the axis.
    """

    side: int
    window: int
    shift: int
    padding: int

    @property
    def padded(self) -> int:
        """Cells with the padding."""
        return self.side + self.padding

    @property
    def windows(self) -> int:
        """Number of windows along this axis."""
        return self.padded // self.window


def plan_axis(side: int, window: int | None, shifted: bool = False, pad: bool = True) -> Axis:
    """The adaptive rule, for one axis: a window is never larger than the map, and one window needs no shift.

    Args:
        side: cells of the map.
        window: wanted side of a window; None takes the whole axis.
        shifted: whether to move by half a window.
        pad: add cells where windows do not divide the axis; otherwise such an axis is refused.

    Raises:
        InputError: a side or window under 1, or an axis that does not divide where `pad` is off.
    """
    if side < 1:
        raise InputError(f"an axis of {side} cells; accepted: 1 or more")
    if window is not None and window < 1:
        raise InputError(f"window {window}; accepted: 1 or more, or None for the whole axis")
    window = side if window is None else min(window, side)
    padding = -side % window
    if padding and not pad:
        raise InputError(f"{side} cells cannot be cut into windows of {window}; choose a divisor or allow padding")
    return Axis(side, window, window // 2 if shifted and side > window else 0, padding)


# ---------------------------------------------------------------------------------------------- cut and put back
def partition(x: Tensor, window_h: int, window_w: int) -> Tensor:
    """Cuts a map into windows, row by row, images outermost. [B, h, w, C] -> [B * windows, window_h, window_w, C]."""
    height, width = x.shape[1:3]
    if window_h < 1 or window_w < 1 or height % window_h or width % window_w:
        raise InputError(f"a map of {height} x {width} cells cannot be cut into windows of {window_h} x {window_w}")
    x = x.unflatten(2, (-1, window_w)).unflatten(1, (-1, window_h))  # [B, nh, Wh, nw, Ww, C]
    return x.transpose(2, 3).flatten(0, 2)


def merge(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `partition`. [B * windows, Wh, Ww, C] -> [B, height, width, C]."""
    window_h, window_w = windows.shape[1:3]
    if height % window_h or width % window_w or len(windows) % ((height // window_h) * (width // window_w)):
        raise InputError(f"windows {list(windows.shape)} do not make up maps of {height} x {width} cells")
    x = windows.unflatten(0, (-1, height // window_h, width // window_w))  # [B, nh, nw, Wh, Ww, C]
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def roll_in(x: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Pads with zeros at the end, then rolls by minus the shift. [B, h, w, ...] -> [B, padded h, padded w, ...]."""
    if rows.padding or columns.padding:  # before the roll: padding must not come between what the roll joins
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, columns.padding, 0, rows.padding))
    if rows.shift or columns.shift:
        x = torch.roll(x, (-rows.shift, -columns.shift), (1, 2))
    return x


def roll_out(x: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """The inverse of `roll_in`: rolls back, then takes the padding off."""
    if rows.shift or columns.shift:
        x = torch.roll(x, (rows.shift, columns.shift), (1, 2))
    return x[:, : rows.side, : columns.side] if rows.padding or columns.padding else x


# ---------------------------------------------------------------------------------------------- who may look at whom
def region_ids(axis: Axis) -> Tensor:
    """For each cell in rolled order: 0, or 1 for what the roll brought round to the end, or 2 for padding. [padded]."""
    cell = torch.arange(axis.padded) + axis.shift
    return torch.where(cell % axis.padded >= axis.side, 2, (cell >= axis.padded).long())


def axis_mask(axis: Axis) -> Tensor:
    """True where a cell of a window may look at another of it along this axis. Bool [windows, W, W]."""
    ids = region_ids(axis).view(axis.windows, axis.window)
    return ids[:, :, None] == ids[:, None, :]  # a cell sees itself, so no row is empty


def full_mask(rows: Axis, columns: Axis) -> Tensor:
    """Swin's mask: both axes must agree. Bool [windows, N, N] with N = Wh * Ww cells, windows row by row."""
    both = axis_mask(rows)[:, None, :, None, :, None] & axis_mask(columns)[None, :, None, :, None, :]
    return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)  # from [nh, nw, Wh, Ww, Wh, Ww]


def swin_region_ids(rows: Axis, columns: Axis) -> Tensor:
    """One number a region of the rolled map, 3 * row region + column region. [padded h, padded w]."""
    return 3 * region_ids(rows)[:, None] + region_ids(columns)
