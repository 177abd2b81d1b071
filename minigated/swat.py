"""The mixer of Gated-SwinRMT-SWAT (arXiv 2604.06014, chapter 6).

The paper's abstract names its parts; its equations are not available to this project. Our reading of it: queries and
keys meet in a sigmoid instead of a softmax, with an ALiBi slope inside and a decay outside,

    z_i = sum_j P_ij v_j,   P_ij = sigma(q_i . k_j / sqrt(D) + s_h (i - j)) gamma_h^|i - j|                  (6.1)

along the width of each window and then, with the same queries and keys, along its height. Nothing makes the weights
sum to one, so the result is normalised, and the values are gated before the passes:

    Y = LayerNorm(Z) + LCE(V),   out = Y W_O                                                                 (6.4)
    V = SiLU(u W_1) (.) (u W_2)                                                                              (6.5)

There is no gate on the output. What else the abstract may mean is in `minigated.swat_options`. A mixer is called as
mixer(x, tables, residual, probe) on maps [B, h, w, C].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minigated import kernels
from minigated.decay import rotate
from minigated.errors import InputError, one_of
from minigated.layers import DepthwiseConv, check_map
from minigated.swat_options import NORM_PLACES, NORMS, VALUES, SwatOptions, balanced_slopes, unchanged
from minigated.swat_tables import SwatTableBuilder, SwatTables, slopes_on_cpu
from minigated.windows import merge, partition, roll_in, roll_out

__all__ = [
    "SwatAttention", "SwatOptions", "SwatTableBuilder", "SwatTables", "balanced_slopes", "swat_decomposed",
    "swat_loops", "swat_pass",
]  # fmt: skip
FORMS = ("auto", "matmul", "pointwise")


# ---------------------------------------------------------------------------------------------- reference form
def swat_loops(q, k, v, slope: float, gamma: float, distance: str = "signed", allowed=None) -> Tensor:
    """One pass of eq. (6.1) for one head, as it would be written by hand.

    Args:
        q, k, v: [W, D].
        slope: s of the head. gamma: its decay rate.
        distance: "signed" i - j or "absolute".
        allowed: bool [W, W], True where cell i may look at cell j; everything by default.

    Returns:
        [W, D], float64.
    """
    cells, width = q.shape
    q, k, v = q.double(), k.double(), v.double()
    output = torch.zeros_like(v)
    for i in range(cells):
        for j in range(cells):
            if allowed is not None and not allowed[i, j]:
                continue
            score = sum(q[i, d] * k[j, d] for d in range(width)) / math.sqrt(width)
            score = score + slope * (abs(i - j) if distance == "absolute" else i - j)
            weight = 1 / (1 + torch.exp(-score)) * gamma ** abs(i - j)
            output[i] += weight * v[j]
    return output


# ---------------------------------------------------------------------------------------------- the fast form
def swat_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    decay: Tensor,
    axis: int,
    window: int | None = None,
    form: str = "auto",
    weigh: Callable[[Tensor], Tensor] = unchanged,
) -> Tensor:
    """Eq. (6.1) along one axis of a map, in segments of `window` cells.

    Args:
        q, k, v: [B, h, w, H, D].
        bias: inside the sigmoid, [H, W, W] or one a segment, [segments, H, W, W].
        decay: multiplies after it, like `bias`; 0 where a pair is forbidden.
        axis: 1 for the height, 2 for the width.
        window: W; the whole side by default.
        form: "matmul"; "pointwise", products and sums that a compiler fuses into one kernel; "auto", pointwise in a
            graph compiled for a GPU, else matmul.
        weigh: applied to the weights, whose last axis runs over the keys.

    Returns:
        [B, h, w, H, D] in the dtype of v. What follows the scores is in float32 at least; the scores themselves are
        too in the pointwise form, and a product in the dtype of q in the other.
    """
    one_of("form", form, FORMS)
    if axis not in (1, 2):
        raise InputError(f"axis {axis}; accepted: 1 (height), 2 (width)")
    side = v.shape[axis]
    window = side if window is None else window
    if window < 1 or side % window:
        raise InputError(f"a side of {side} cells cannot be cut into windows of {window}")
    for name, table in (("bias", bias), ("decay", decay)):
        sizes = (v.shape[3], window, window)
        if table.shape[-3:] != sizes or table.ndim > 4 or (table.ndim == 4 and len(table) not in (1, side // window)):
            raise InputError(
                f"{name} of shape {list(table.shape)}; accepted: {list(sizes)}, or one of these for each of the "
                f"{side // window} segments"
            )
    if form == "auto":
        form = "pointwise" if torch.compiler.is_compiling() and v.is_cuda else "matmul"
    # [before, segments, W, after, H, D]: cells of one segment stand in axis 2, all else is batch.
    shape = (-1, side // window, window, math.prod(v.shape[axis + 1 : 3]), v.shape[3])
    q, k, split = (x.reshape(*shape, x.shape[-1]) for x in (q, k, v))
    core = _pointwise if form == "pointwise" else _matmul
    return core(q, k, split, bias, decay, weigh).reshape(v.shape)


def _matmul(q, k, v, bias, decay, weigh) -> Tensor:
    q, k, v = (x.permute(0, 1, 3, 4, 2, 5) for x in (q, k, v))  # [before, segments, after, H, W, D]
    bias, decay = (t.view(-1, 1, *t.shape[-3:]) for t in (bias, decay))  # [segments | 1, 1, H, W, W]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [before, segments, after, H, W, W]
    weights = weigh(torch.sigmoid(scores + bias) * decay)  # eq. (6.1), at least float32 as the tables are
    return (weights.to(v.dtype) @ v).permute(0, 1, 4, 2, 3, 5)  # [before, segments, W, after, H, D]


def _pointwise(q, k, v, bias, decay, weigh) -> Tensor:
    bias, decay = (t.view(-1, *t.shape[-3:]).permute(0, 2, 1, 3).unsqueeze(2) for t in (bias, decay))
    wide = torch.promote_types(v.dtype, torch.float32)
    keys = k.movedim(2, -2).unsqueeze(2).to(wide)  # [before, segments, 1, after, H, W, D]
    scores = (q.unsqueeze(-2).to(wide) * keys).sum(-1) * q.shape[-1] ** -0.5  # [before, segments, W, after, H, W]
    weights = weigh(torch.sigmoid(scores + bias) * decay)  # eq. (6.1); the tables are [segments | 1, W, 1, H, W]
    values = v.movedim(2, -2).unsqueeze(2)  # [before, segments, 1, after, H, W, D]
    return (weights.to(v.dtype).unsqueeze(-1).to(wide) * values).sum(-2).to(v.dtype)


# ---------------------------------------------------------------------------------------------- the mixer
def swat_decomposed(
    qk: Tensor, v: Tensor, tables: SwatTables, weigh: Callable[[Tensor], Tensor] = unchanged, form: str = "auto"
) -> Tensor:
    """Width pass, then height pass, within windows: qk [B, h, w, 2, H, D], v [B, h, w, H, D] -> [B, h, w, H, D].

    As in chapter 5 no window is cut out: a pass needs the rows, or the columns, in segments. With form="auto" one
    kernel shifts, rotates and does both passes where it can.
    """
    rows, columns = tables.rows, tables.columns
    whole = not (rows.padding or columns.padding)
    of_rows, of_columns = (tables.row_bias, tables.row_decay), (tables.column_bias, tables.column_decay)
    whole = whole and all(t.ndim == 3 or len(t) == 1 for t in (tables.row_bias, tables.column_bias))
    served = whole and weigh is unchanged and kernels.fits(v, rows.window, columns.window, of_rows, of_columns)
    if form == "auto" and served:
        return kernels.windowed_sigmoid(qk, v, tables, (rows.shift, columns.shift))
    q, k = roll_in(qk, rows, columns).unbind(3)  # [B, ph, pw, H, D]
    if tables.cos is not None:
        q, k = rotate(q, tables.cos, tables.sin), rotate(k, tables.cos, tables.sin)
    z = roll_in(v, rows, columns)
    z = swat_pass(q, k, z, tables.column_bias, tables.column_decay, 2, columns.window, form, weigh)
    z = swat_pass(q, k, z, tables.row_bias, tables.row_decay, 1, rows.window, form, weigh)
    return roll_out(z, rows, columns)


def lce_on_map(conv: nn.Module, v: Tensor, tables: SwatTables) -> Tensor:
    """The convolution on the map as it lies: it looks across window borders. [B, h, w, C] -> same."""
    return conv(v)


def lce_in_windows(conv: nn.Module, v: Tensor, tables: SwatTables) -> Tensor:
    """The convolution inside each window, zeros around it. Where a shift brought two edges together it mixes them."""
    rows, columns = tables.rows, tables.columns
    rolled = roll_in(v, rows, columns)  # [B, ph, pw, C]
    windows = conv(partition(rolled, rows.window, columns.window))  # [B * windows, Wh, Ww, C]
    return roll_out(merge(windows, rows.padded, columns.padded), rows, columns)


LCE_PLACES = {"map": lce_on_map, "window": lce_in_windows}


class SwatAttention(nn.Module):
    """Eq. (6.1), (6.4), (6.5): sigmoid attention with slopes and decay on gated values, a norm, LCE, a projection.

    Args:
        channels: C. heads: H, an even divisor of C. options: which reading; ours by default.
        lce: side of the depth-wise kernel.
    """

    def __init__(self, channels: int, heads: int, options: SwatOptions | None = None, lce: int = 5):
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError(f"{channels} channels cannot be split into {heads} heads evenly")
        options = SwatOptions() if options is None else options
        slopes_on_cpu(options, heads)  # refuses odd heads here too
        self.heads, self.options = heads, options
        self.value = VALUES[options.value](channels)
        self.qkv = nn.Linear(channels, (2 + self.value.parts) * channels)
        self.norm, self.weigh = NORMS[options.norm].module(channels, heads), NORMS[options.norm].weights
        self.lce = DepthwiseConv(channels, lce) if options.lce != "none" else None
        self.lce_place, self.norm_place = LCE_PLACES[options.lce_place], NORM_PLACES[options.norm_place]
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tables: SwatTables, residual: Tensor | None = None, probe=None) -> Tensor:
        """Mixes the cells of a map.

        Args:
            x: block input after its norm, [B, h, w, C].
            tables: of the map's size, from a `SwatTableBuilder` with the same options.
            residual: not used; all mixers are called alike.
            probe: called as probe(name, value): "value_gate", the factor of the values, [B, h, w, H, D]; "attended" Z,
                the same shape; "before_out" Y, [B, h, w, C].

        Returns:
            [B, h, w, C].
        """
        check_map(x, self.qkv.in_features)
        q_and_k, *parts = self.qkv(x).split((2 * x.shape[-1], *(x.shape[-1],) * self.value.parts), dim=-1)
        value, raw, factor = self.value(*parts)  # [B, h, w, C] each
        heads = (self.heads, -1)
        z = swat_decomposed(q_and_k.unflatten(-1, (2, *heads)), value.unflatten(-1, heads), tables, self.weigh)
        local = 0.0
        if self.lce is not None:
            local = self.lce_place(self.lce, value if self.options.lce == "gated" else raw, tables)
        y = self.norm_place(self.norm, z.flatten(-2), local)  # eq. (6.4)
        if probe is not None:
            if factor is not None:
                probe("value_gate", factor.unflatten(-1, heads))
            probe("attended", z)
            probe("before_out", y)
        return self.out_proj(y)
