"""Both passes of decomposed attention within windows of at most 64 cells as one Triton kernel, and its gradient.

A program owns one head of one window, or of several windows where these are small. It reads q, k, v once and writes
the result once; the value between the passes never leaves the chip. What a pass does is in `lines_triton.py`.

Everything around the passes that would be a journey through memory of its own is done on the way: queries and keys are
rotated as they are read, a shift only changes which cells are read, and the gradients of q, k and v are written side by
side, where the projection wants them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from minigated.kernels.depthwise_triton import even, refuse_twice
from minigated.kernels.lines_triton import line_gradients, line_results, line_shares, turned_lines

CELLS, WIDTH, WARPS = 64, 32, 4  # of a program: cells, in several windows where these are small, of heads no wider
GROUP = 16  # the fewest cells of whole rows, or columns, that are one product; `GW` and `GH` in the kernels


@triton.jit
def _cells(
    row, column, held, windows, nh, nw, ph, pw, up, left,
    WH: tl.constexpr, WW: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Of each cell of the tile: whether there is one, its number on the map and the place of its window.

    Args:
        row, column, held: its place in the window, and which of the program's windows. up, left: the shift; windows lie
            on the map rolled by so many cells.
    """
    window = tl.program_id(0) * HELD + held
    there = (row < WH) & (column < WW) & (window < windows)
    image, down, right = window // (nh * nw), (window // nw) % nh, window % nw
    y, x = down * WH + row + up, right * WW + column + left
    y, x = tl.where(y >= ph, y - ph, y), tl.where(x >= pw, x - pw, x)
    cell = (image * ph + y).to(tl.int64) * pw + x
    return there, tl.where(there, cell, 0), tl.where(there, down, 0), tl.where(there, right, 0)


@triton.jit
def _swapped(x, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of each pair (0, 1), (2, 3), ... in the other order, [TILE, BLOCK]."""
    first, second = tl.split(tl.reshape(x, [TILE, BLOCK // 2, 2]))
    return tl.reshape(tl.join(second, first), [TILE, BLOCK])


@triton.jit
def _angles(cos, sin, at, d, real):
    """Cosines of the cells' angles, and sines with the sign that goes with `_swapped`, [TILE, BLOCK]."""
    sign = tl.where(d % 2 == 0, -1.0, 1.0)[None, :]
    return tl.load(cos + at, real, 0.0), tl.load(sin + at, real, 0.0) * sign


@triton.jit
def _read(
    q, k, v, cos, sin, cell, part, corner, d, real, q_step, k_step, v_step, TURN: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Queries and keys, rotated, and values of the tile's cells, [TILE, BLOCK]; `corner`: where its angles lie."""
    a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
    b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    if TURN:
        c, s = _angles(cos, sin, corner, d, real)
        a = (a * c + _swapped(a, TILE, BLOCK) * s).to(z.dtype)
        b = (b * c + _swapped(b, TILE, BLOCK) * s).to(z.dtype)
    return a, b, z


@triton.jit
def _forward(
    q, k, v, cos, sin, row_add, column_add, row_times, column_times, out, q_step, k_step, v_step,
    windows, nh, nw, ph, pw, up, left, heads, SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TURN: tl.constexpr, HP: tl.constexpr, WP: tl.constexpr,
    HELD: tl.constexpr, GW: tl.constexpr, GH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = HELD * HP * WP
    head, d, i = tl.program_id(1), tl.arange(0, BLOCK), tl.arange(0, TILE)
    part = (head * D + d)[None, :]
    row, column, held = (i // WP) % HP, i % WP, i // (WP * HP)
    there, cell, _, right = _cells(row, column, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    real, corner = there[:, None] & (d < D)[None, :], (row * pw + column)[:, None] * D + d[None, :]
    a, b, z = _read(q, k, v, cos, sin, cell, part, corner, d, real, q_step, k_step, v_step, TURN, TILE, BLOCK)
    shares, _ = line_shares(
        a, b, column_add, column_times, there, right, head, heads, SCALE, WW, WP, GW, COLUMNS, SOFTMAX, PRECISION
    )
    z = line_results(shares, z, GW, PRECISION).to(z.dtype)

    there, cell, down, _ = _cells(i % HP, (i // HP) % WP, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    a, b = turned_lines(a, HP, WP, HELD, BLOCK), turned_lines(b, HP, WP, HELD, BLOCK)
    shares, _ = line_shares(
        a, b, row_add, row_times, there, down, head, heads, SCALE, WH, HP, GH, ROWS, SOFTMAX, PRECISION
    )
    y = line_results(shares, turned_lines(z, HP, WP, HELD, BLOCK), GH, PRECISION)
    tl.store(out + cell[:, None] * (heads * D) + part, y, there[:, None] & (d < D)[None, :])


@triton.jit
def _backward(
    q, k, v, cos, sin, row_add, column_add, row_times, column_times, gradient, more, made, apart,
    q_step, k_step, v_step, windows, nh, nw, ph, pw, up, left, heads, step, SCALE: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TURN: tl.constexpr, MORE: tl.constexpr, HP: tl.constexpr,
    WP: tl.constexpr, HELD: tl.constexpr, GW: tl.constexpr, GH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = HELD * HP * WP
    head, d, i = tl.program_id(1), tl.arange(0, BLOCK), tl.arange(0, TILE)
    part = (head * D + d)[None, :]
    row, column, held = (i // WP) % HP, i % WP, i // (WP * HP)
    there, cell, _, right = _cells(row, column, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    real, corner = there[:, None] & (d < D)[None, :], (row * pw + column)[:, None] * D + d[None, :]
    a, b, z = _read(q, k, v, cos, sin, cell, part, corner, d, real, q_step, k_step, v_step, TURN, TILE, BLOCK)
    # the width pass once more
    p, p_slope = line_shares(
        a, b, column_add, column_times, there, right, head, heads, SCALE, WW, WP, GW, COLUMNS, SOFTMAX, PRECISION
    )
    between = line_results(p, z, GW, PRECISION).to(z.dtype)
    # the height pass and its gradients
    there, other, down, _ = _cells(i % HP, (i // HP) % WP, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    a_h, b_h = turned_lines(a, HP, WP, HELD, BLOCK), turned_lines(b, HP, WP, HELD, BLOCK)
    r, r_slope = line_shares(
        a_h, b_h, row_add, row_times, there, down, head, heads, SCALE, WH, HP, GH, ROWS, SOFTMAX, PRECISION
    )
    dy = tl.load(gradient + other[:, None] * (heads * D) + part, there[:, None] & (d < D)[None, :], 0.0)
    between = turned_lines(between, HP, WP, HELD, BLOCK)
    da, db, dz = line_gradients(dy, a_h, b_h, between, r, r_slope, SCALE, GH, SOFTMAX, PRECISION)
    da, db = turned_lines(da, WP, HP, HELD, BLOCK), turned_lines(db, WP, HP, HELD, BLOCK)
    dz = turned_lines(dz.to(z.dtype), WP, HP, HELD, BLOCK)
    # those of the width pass
    more_a, more_b, dz = line_gradients(dz, a, b, z, p, p_slope, SCALE, GW, SOFTMAX, PRECISION)
    if MORE:
        dz += tl.load(more + cell[:, None] * (heads * D) + part, real, 0.0)
    at = cell[:, None] * step + part
    if PACKED:
        tl.store(made + 2 * heads * D + at, dz, real)
    else:
        tl.store(apart + cell[:, None] * (heads * D) + part, dz, real)
    da, db = da + more_a, db + more_b
    if TURN:  # back by the same angle, read again, since registers decide how many programs run at a time
        c, s = _angles(cos, sin, corner, d, real)
        da = da * c - _swapped(da, TILE, BLOCK) * s
        db = db * c - _swapped(db, TILE, BLOCK) * s
    tl.store(made + at, da, real)
    tl.store(made + heads * D + at, db, real)


def _launch(packed, v, cos, sin, tables, window: list[int], shift: list[int], softmax: bool) -> tuple:
    """Arguments, constants and grid that both kernels share."""
    values = packed.select(3, 2) if v is None else v
    batch, ph, pw, heads, width = values.shape
    parts = (packed.select(3, 0), packed.select(3, 1), values)
    (q, q_step), (k, k_step), (v, v_step) = (even(x.flatten(-2)) for x in parts)  # heads side by side in a cell
    nh, nw = ph // window[0], pw // window[1]
    windows, (high, wide) = batch * nh * nw, (triton.next_power_of_2(side) for side in window)
    block = max(16, triton.next_power_of_2(width))
    held = max(1, CELLS * WIDTH // max(WIDTH, block) // (high * wide), GROUP // (high * wide))
    angles = [tables[0]] * 2 if cos is None else [cos.contiguous(), sin.contiguous()]
    tables = [table.contiguous() for table in tables]
    places = [q_step, k_step, v_step, windows, nh, nw, ph, pw, *shift, heads]
    rows, columns = (1 if t.ndim == 3 else len(t) for t in (tables[2:] if not softmax else tables[:2]))
    constants = {
        "SCALE": width**-0.5, "D": width, "BLOCK": block, "WH": window[0], "WW": window[1], "ROWS": rows,
        "COLUMNS": columns, "SOFTMAX": softmax, "TURN": cos is not None, "HP": high, "WP": wide, "HELD": held,
        "GW": max(GROUP, wide), "GH": max(GROUP, high), "num_warps": WARPS,
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return [q, k, v, *angles, *tables], places, constants, (triton.cdiv(windows, held), heads)


@custom_op("minigated::windowed", mutates_args=())
def windowed(
    packed: Tensor, v: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    row_add: Tensor, column_add: Tensor, row_times: Tensor, column_times: Tensor,
    window: list[int], shift: list[int], softmax: bool,
) -> Tensor:  # fmt: skip
    """Both passes.

    Args:
        packed: [B, h, w, 2, H, D], queries and keys; without `v` [B, h, w, 3, H, D], values too. v: [B, h, w, H, D].
        cos, sin: of the rotation, [h, w, D], of which the first window is read; none for no rotation.
        row_add, column_add: added to the scores, [H, W, W] or, for a softmax, one a segment. row_times, column_times:
            multiply the sigmoid, [H, W, W] or one a segment; a softmax does not read them.
        window, shift: cells along height and width.

    Returns:
        [B, h, w, H, D].
    """
    tables = (row_add, column_add, row_times, column_times)
    tensors, places, constants, grid = _launch(packed, v, cos, sin, tables, window, shift, softmax)
    out = torch.empty(packed.shape[:3] + packed.shape[4:], dtype=packed.dtype, device=packed.device)
    with torch.cuda.device_of(packed):  # a launch goes to the current GPU, whichever the tensors are on
        _forward[grid](*tensors, out, *places, **constants)
    return out


@windowed.register_fake
def _(packed, v, cos, sin, row_add, column_add, row_times, column_times, window, shift, softmax):
    return torch.empty(packed.shape[:3] + packed.shape[4:], dtype=packed.dtype, device=packed.device)


@custom_op("minigated::windowed_gradients", mutates_args=())
def windowed_gradients(
    packed: Tensor, v: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    row_add: Tensor, column_add: Tensor, row_times: Tensor, column_times: Tensor,
    gradient: Tensor, more: Tensor | None, window: list[int], shift: list[int], softmax: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `packed` and of `v` (empty where there is none); `more` is added to that of the values."""
    tables = (row_add, column_add, row_times, column_times)
    tensors, places, constants, grid = _launch(packed, v, cos, sin, tables, window, shift, softmax)
    gradient = gradient.contiguous()
    made = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    apart = torch.empty(0 if v is None else v.shape, dtype=packed.dtype, device=packed.device)
    other = gradient if more is None else more.contiguous()
    with torch.cuda.device_of(packed):
        _backward[grid](
            *tensors, gradient, other, made, apart, *places, made.stride(2), PACKED=v is None, MORE=more is not None,
            **constants,
        )  # fmt: skip
    return made, apart


@windowed_gradients.register_fake
def _(packed, v, cos, sin, row_add, column_add, row_times, column_times, gradient, more, window, shift, softmax):
    made = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    return made, torch.empty(0 if v is None else v.shape, dtype=packed.dtype, device=packed.device)


windowed_gradients.register_autograd(refuse_twice, setup_context=refuse_twice)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _gradients(ctx, gradient):
    v = ctx.saved_tensors[1]
    packed, apart = windowed_gradients(*ctx.saved_tensors, gradient, None, *ctx.rest)
    return packed, None if v is None else apart, *(None,) * 9


windowed.register_autograd(_gradients, setup_context=_keep)
