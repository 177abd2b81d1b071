"""Swin's mixer (arXiv 2103.14030): softmax attention inside shifted windows, with a learned bias for each offset.

    softmax(Q K^T / sqrt(D) + bias[offset] + mask) V   in every window                                       (4.2)

Number (4.2) is that of chapter 4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.errors import InputError
from minigated.layers import check_map
from minigated.tables import SizedTables
from minigated.windows import Axis, full_mask, merge, partition, plan_axis, roll_in, roll_out


class SwinMasks(NamedTuple):
    """Plans of the two axes; mask [windows, 1, N, N] of 0 and -inf, or None where all cells of a window agree."""

    rows: Axis
    columns: Axis
    mask: Tensor | None


class SwinTables(SizedTables):
    """Makes `SwinMasks`.

    Args:
        window: side of a window; None takes the whole map. shifted: by half a window.
        size: (height, width) to build at once.
    """

    def __init__(self, window: int | None, shifted: bool = False, size: tuple[int, int] | None = None):
        self.window, self.shifted = window, shifted
        super().__init__(size)

    def build(self, height, width, device, dtype):
        rows, columns = (plan_axis(side, self.window, self.shifted) for side in (height, width))
        if not any((rows.shift, rows.padding, columns.shift, columns.padding)):
            return SwinMasks(rows, columns, None)  # no borders, nothing to forbid
        allowed = full_mask(rows, columns).to(device).unsqueeze(1)  # [windows, 1, N, N]
        zeros = torch.zeros(allowed.shape, device=device, dtype=dtype)
        return SwinMasks(rows, columns, zeros.masked_fill(~allowed, float("-inf")))


class SwinAttention(nn.Module):
    """Eq. (4.2) on maps [B, h, w, C].

    Args:
        channels: C. heads: H, a divisor of C.
        window: W; the bias has one entry for each of the (2W - 1)^2 offsets and each head. Where the adaptive rule
            makes windows smaller, the same offsets are read.
        qkv_bias: biases in the projection of queries, keys and values.
    """

    def __init__(self, channels: int, heads: int, window: int, qkv_bias: bool = True):
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError(f"{channels} channels cannot be split into {heads} heads evenly")
        if window is None or window < 1:
            raise InputError(f"window {window}; accepted: 1 or more, as the bias table needs a size")
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def bias(self, window_h: int, window_w: int) -> Tensor:
        """The bias of each pair of cells of a window, row by row. [H, N, N] with N = window_h * window_w."""
        if max(window_h, window_w) > self.window:
            raise InputError(f"a window of {window_h} x {window_w} cells; accepted: sides up to {self.window}")
        side, device = 2 * self.window - 1, self.relative_position_bias_table.device
        apart = []
        for cells in (window_h, window_w):
            place = torch.arange(cells, device=device)
            apart.append(place[:, None] - place + self.window - 1)  # [W, W], 0 .. 2W - 2
        index = apart[0][:, None, :, None] * side + apart[1][None, :, None, :]  # [Wh, Ww, Wh, Ww]
        cells = window_h * window_w
        return self.relative_position_bias_table[index.reshape(cells, cells)].permute(2, 0, 1)

    def forward(self, x: Tensor, tables: SwinMasks, residual: Tensor | None = None, probe=None) -> Tensor:
        """Mixes the cells of a map.

        Args:
            x: block input after its norm, [B, h, w, C].
            tables: of the map's size, from `SwinTables`.
            residual: not used; all mixers are called alike.
            probe: called as probe("attended", y) with y [B, h, w, C].

        Returns:
            [B, h, w, C].
        """
        check_map(x, self.proj.in_features)
        rows, columns = tables.rows, tables.columns
        batch, cells = len(x), rows.window * columns.window
        windows = partition(roll_in(self.qkv(x), rows, columns), rows.window, columns.window)  # [B*n, Wh, Ww, 3C]
        q, k, v = windows.reshape(-1, cells, 3, self.heads, x.shape[-1] // self.heads).permute(2, 0, 3, 1, 4)
        mask = self.bias(rows.window, columns.window).unsqueeze(0)  # [1, H, N, N]
        if tables.mask is not None:
            mask = (mask + tables.mask).repeat(batch, 1, 1, 1)  # [B * windows, H, N, N]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))  # [B * windows, H, N, D]
        y = y.transpose(1, 2).reshape(-1, rows.window, columns.window, x.shape[-1])
        y = roll_out(merge(y, rows.padded, columns.padded), rows, columns)
        if probe is not None:
            probe("attended", y)
        return self.proj(y)
