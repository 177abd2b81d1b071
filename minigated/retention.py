"""The mixer of Gated-SwinRMT-Retention (arXiv 2604.06014, chapter 5), and RMT's two forms of it without a gate.

The paper's abstract gives the order of things; its equations are not available to this project. Our reading of it:
softmax retention with an additive log-space decay, width pass before height pass within each window, plus local
context enhancement (LCE), then the G1 gate from the block input, then W_O:

    Z = height(width(V)),  Y = Z + LCE(V),  out = (sigma(u W_g) (.) Y) W_O                                    (5.1)

Numbers (5.x) are those of chapter 5. A mixer is called as mixer(x, tables, residual, probe) on maps [B, h, w, C].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minigated import kernels
from minigated.attention import AttentionShape
from minigated.decay import decay_mask, manhattan_decomposed, manhattan_mask, rotate, rotation_table
from minigated.decay_passes import decomposed_fast, full_fast
from minigated.errors import InputError, one_of
from minigated.gates import GateSpec, build_gate
from minigated.layers import DepthwiseConv, check_map
from minigated.tables import SizedTables
from minigated.windows import Axis, axis_mask, merge, partition, plan_axis, roll_in, roll_out

GATES = ("none", "elementwise", "headwise")
GATE_INPUTS = ("normed", "residual")


# ---------------------------------------------------------------------------------------------- tables
class WindowTables(NamedTuple):
    """What the two passes need for a map: [ph, pw] is the padded map, Wh and Ww are the window's sides.

    Attributes:
        rows, columns: the plans of the two axes.
        cos, sin: [ph, pw, D], indexed inside the window; None without rotation.
        row_mask: [segments or 1, H, Wh, Wh], of the height pass. column_mask: [segments or 1, H, Ww, Ww], width pass.
    """

    rows: Axis
    columns: Axis
    cos: Tensor | None
    sin: Tensor | None
    row_mask: Tensor
    column_mask: Tensor


class WindowTableBuilder(SizedTables):
    """Makes `WindowTables`.

    Args:
        head_width: D. log_decay: [H], log of each head's rate.
        window: side of a window; None takes the whole map, RMT's decomposed form. shifted: by half a window.
        rotation: whether queries and keys are rotated.
        size: (height, width) to build at once.
    """

    def __init__(
        self,
        head_width: int,
        log_decay: Tensor,
        window: int | None = None,
        shifted: bool = False,
        rotation: bool = True,
        size: tuple[int, int] | None = None,
    ):
        self.head_width, self.log_decay, self.window = head_width, log_decay.tolist(), window
        self.shifted, self.rotation = shifted, rotation
        super().__init__(size)

    def build(self, height, width, device, dtype):
        rows, columns = (plan_axis(side, self.window, self.shifted) for side in (height, width))
        log_decay = torch.tensor(self.log_decay, device=device, dtype=dtype)
        cos = sin = None
        if self.rotation:
            cos, sin = (
                table.to(device).repeat(rows.windows, columns.windows, 1)  # [ph, pw, D]
                for table in rotation_table(rows.window, columns.window, self.head_width, dtype)
            )
        masks = (decay_mask(log_decay, axis.window) + forbidden(axis, device, dtype) for axis in (rows, columns))
        return WindowTables(rows, columns, cos, sin, *masks)


def forbidden(axis: Axis, device=None, dtype=torch.float32) -> Tensor:
    """-inf between cells of one window that lie in different regions. [segments, 1, W, W], or [1, ...] of zeros."""
    allowed = axis_mask(axis).to(device)  # [segments, W, W]
    allowed = allowed if axis.shift or axis.padding else allowed[:1]  # no borders: one mask serves all segments
    return torch.zeros(allowed.shape, device=device, dtype=dtype).masked_fill(~allowed, float("-inf")).unsqueeze(1)


class FullTables(NamedTuple):
    """Tables of RMT's full form: cos, sin [h, w, D] or None; mask [H, N, N]."""

    cos: Tensor | None
    sin: Tensor | None
    mask: Tensor


class FullTableBuilder(SizedTables):
    """Makes `FullTables`; the arguments are those of `WindowTableBuilder`."""

    def __init__(self, head_width: int, log_decay: Tensor, rotation: bool = True, size=None):
        self.head_width, self.log_decay, self.rotation = head_width, log_decay.tolist(), rotation
        super().__init__(size)

    def build(self, height, width, device, dtype):
        cos = sin = None
        if self.rotation:
            cos, sin = (table.to(device) for table in rotation_table(height, width, self.head_width, dtype))
        log_decay = torch.tensor(self.log_decay, device=device, dtype=dtype)
        return FullTables(cos, sin, manhattan_mask(log_decay, height, width))


# ---------------------------------------------------------------------------------------------- the cores
def rotated(qkv: Tensor, tables) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated, values as they are. qkv [B, h, w, 3, H, D] -> three of [B, h, w, H, D]."""
    q, k, v = qkv.unbind(3)
    if tables.cos is not None:
        q, k = rotate(q, tables.cos, tables.sin), rotate(k, tables.cos, tables.sin)
    return q, k, v


def fused(qkv: Tensor, tables: WindowTables) -> tuple | None:
    """What the one kernel for both passes takes besides qkv; None where it does not serve, as for a padded map."""
    rows, columns = tables.rows, tables.columns
    masks = (tables.row_mask, tables.column_mask)
    sides = (rows.window, columns.window)
    if rows.padding or columns.padding or not kernels.fits(qkv[..., 2, :, :], *sides, masks[:1], masks[1:]):
        return None
    return tables.cos, tables.sin, *masks, sides, (rows.shift, columns.shift)


def decomposed(qkv: Tensor, tables: WindowTables, form: str = "auto") -> Tensor:
    """Width pass, then height pass, within windows. [B, h, w, 3, H, D] -> [B, h, w, H, D].

    No window is ever cut out: a width pass stays in its row, so all it needs is the row in segments (chapter 4). With
    form="auto" one kernel shifts, rotates and does both passes where it can (chapter 9).
    """
    if form == "auto" and (rest := fused(qkv, tables)) is not None:
        return kernels.windowed_softmax(qkv, *rest)
    rows, columns = tables.rows, tables.columns
    q, k, v = rotated(roll_in(qkv, rows, columns), tables)  # [B, ph, pw, H, D]
    z = decomposed_fast(q, k, v, tables.row_mask, tables.column_mask, rows.window, columns.window, form)
    return roll_out(z, rows, columns)


def decomposed_reference(qkv: Tensor, tables: WindowTables) -> Tensor:
    """The same as the sentence says it: shift, cut into windows, two passes in each window, put back."""
    rows, columns = tables.rows, tables.columns
    batch, _, _, _, heads, head_width = qkv.shape
    q, k, v = rotated(roll_in(qkv, rows, columns), tables)
    cut = lambda x: partition(x.flatten(-2), rows.window, columns.window).unflatten(-1, (heads, head_width))
    q, k, v = cut(q), cut(k), cut(v)  # [B * windows, Wh, Ww, H, D]
    done = torch.empty_like(v)
    for index in range(len(v)):
        place = index % (rows.windows * columns.windows)  # windows of an image lie row by row
        row_mask = tables.row_mask[min(place // columns.windows, len(tables.row_mask) - 1)]
        column_mask = tables.column_mask[min(place % columns.windows, len(tables.column_mask) - 1)]
        one = slice(index, index + 1)
        done[one] = manhattan_decomposed(q[one], k[one], v[one], row_mask, column_mask)
    z = merge(done.flatten(-2), rows.padded, columns.padded).unflatten(-1, (heads, head_width))
    return roll_out(z, rows, columns)


def full(qkv: Tensor, tables: FullTables) -> Tensor:
    """RMT's full form: one softmax over all cells of the map. [B, h, w, 3, H, D] -> [B, h, w, H, D]."""
    return full_fast(*rotated(qkv, tables), tables.mask)


# ---------------------------------------------------------------------------------------------- the module
def g1_gate(channels: int, heads: int, granularity: str, bias: bool = False) -> nn.Module | None:
    """Chapter 2's gate at position G1 for maps; None for "none". `bias` adds one to the projection of the scores."""
    one_of("gate", granularity, GATES)
    if granularity == "none":
        return None
    gate = build_gate(GateSpec("g1", granularity), AttentionShape(channels, heads, heads, channels // heads))
    if bias:
        gate.scores.linear = nn.Linear(channels, gate.scores.linear.out_features)
    return gate


class Retention(nn.Module):
    """Eq. (5.1): retention plus LCE, gated, projected.

    Args:
        channels: C. heads: H, a divisor of C.
        attend: `decomposed` or `full`; decides which tables `forward` takes.
        gate: "elementwise" (one score a channel), "headwise" (one a head) or "none", which is RMT.
        gate_input: scores are read from the "normed" block input, or from the "residual" before its norm.
        gate_bias: a bias in the gate's projection; the paper does not say.
        lce: side of the depth-wise kernel of the local context enhancement; 0 leaves it out.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        attend: Callable[[Tensor, NamedTuple], Tensor] = decomposed,
        gate: str = "elementwise",
        gate_input: str = "normed",
        gate_bias: bool = False,
        lce: int = 5,
    ):
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError(f"{channels} channels cannot be split into {heads} heads evenly")
        one_of("gate_input", gate_input, GATE_INPUTS)
        self.heads, self.attend, self.gate_input = heads, attend, gate_input
        self.qkv = nn.Linear(channels, 3 * channels)
        self.lce = DepthwiseConv(channels, lce) if lce else None
        self.gate = g1_gate(channels, heads, gate, gate_bias)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tables: NamedTuple, residual: Tensor | None = None, probe=None) -> Tensor:
        """Mixes the cells of a map.

        Args:
            x: block input after its norm, [B, h, w, C].
            tables: of the map's size, from the builder that belongs to `attend`.
            residual: the block input before its norm; only for gate_input="residual".
            probe: called as probe(name, value): "attended" Z, "before_gate" Z + LCE(V), "gate_score".

        Returns:
            [B, h, w, C].
        """
        check_map(x, self.qkv.in_features)
        if residual is None and self.gate is not None and self.gate_input == "residual":
            raise InputError("residual None; accepted: the block input before its norm, as gate_input is 'residual'")
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, h, w, 3, H, D]
        both = self.lce is not None and probe is None and self.attend is decomposed
        if both and (rest := fused(qkv, tables)) is not None:
            y = kernels.windowed_local(qkv, self.lce.conv, *rest)  # the same, passes and LCE together
        else:
            y = self._attend_and_local(qkv, tables, probe)
        if probe is not None:
            probe("before_gate", y)
        if self.gate is not None:
            y = self.gate(y, x if self.gate_input == "normed" else residual, probe)
        return self.out_proj(y.flatten(-2))  # [B, h, w, C]

    def _attend_and_local(self, qkv: Tensor, tables: NamedTuple, probe) -> Tensor:
        y = self.attend(qkv, tables)  # [B, h, w, H, D]
        if probe is not None:
            probe("attended", y)
        if self.lce is not None:
            y = y + self.lce(qkv[..., 2, :, :].flatten(-2)).view_as(y)  # on the map as it lies, not on windows
        return y
