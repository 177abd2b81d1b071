"""Both passes of decomposed attention within windows of at most 64 cells as one Triton kernel, and its gradient.

A program owns one head of one window, or of several windows where these are small. It reads q, k, v once and writes
the result once; the value between the passes never leaves the chip. A pass needs the scores of cells of one line, four
or eight, which is less than a matrix unit multiplies at a time. So whole lines are put together to groups of sixteen
cells or more, every group is one small product, and of its scores those within a line count. For the second pass the
cells are put in the other order, columns after one another in place of rows.

Everything around the passes that would be a journey through memory of its own is done on the way: queries and keys are
rotated as they are read, a shift only changes which cells are read, and the gradients of q, k and v are written side by
side, where the projection wants them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from minigated.kernels.depthwise_triton import depthwise, filter_gradients

CELLS, WARPS = 64, 4  # of a program; with heads wider than 32 channels fewer cells
GROUP = 16  # the fewest cells of whole rows, or columns, that are one product; `GW` and `GH` in the kernels


@triton.jit
def _weights(
    scores, add, times, line, one, there, place, head, heads,
    W: tl.constexpr, SEGMENTS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Weights of a pass and, for the sigmoid, their derivative, [groups, G, G].

    Of a group's cells, [1, G] or [groups, G]: `line` and `one`, in which line and where in it; `there`, whether it is a
    cell; `place`, of which window along the axis.
    """
    same = (line[:, :, None] == line[:, None, :]) & there[:, None, :]
    inside = (one < W)[:, :, None] & (one < W)[:, None, :]
    within = (head * W + one[:, :, None]) * W + one[:, None, :]
    if SEGMENTS > 1:
        at = within + (place * (heads * W * W))[:, :, None]
        allowed = same & inside
    else:
        at, allowed = within, inside
    if SOFTMAX:
        scores = tl.where(same, scores + tl.load(add + at, allowed, 0.0), float("-inf"))
        top = tl.max(scores, 2)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - top[:, :, None])
        total = tl.sum(weights, 2)
        weights = weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]
        return weights, weights
    open_ = 1.0 / (1.0 + tl.exp(-(scores + tl.load(add + within, inside, 0.0))))  # slopes know no regions
    decay = tl.where(same, tl.load(times + at, allowed, 0.0), 0.0)
    return open_ * decay, open_ * (1.0 - open_) * decay


@triton.jit
def _slope(gradient, weights, derivative, SOFTMAX: tl.constexpr):
    """From the gradient of the weights to that of the scores."""
    if SOFTMAX:
        return weights * (gradient - tl.sum(weights * gradient, 2)[:, :, None])
    return gradient * derivative


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
def _turned_lines(x, LINES: tl.constexpr, LENGTH: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """From lines of one direction, [HELD LINES LENGTH, BLOCK], to those of the other."""
    x = tl.permute(tl.reshape(x, [HELD, LINES, LENGTH, BLOCK]), (0, 2, 1, 3))
    return tl.reshape(x, [HELD * LINES * LENGTH, BLOCK])


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
    row, column, held = (i // WP) % HP, i % WP, i // (WP * HP)
    there, cell, down, right = _cells(row, column, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
    a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
    b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    if TURN:
        c, s = _angles(cos, sin, (row * pw + column)[:, None] * D + d[None, :], d, real)
        a = (a * c + _swapped(a, TILE, BLOCK) * s).to(z.dtype)
        b = (b * c + _swapped(b, TILE, BLOCK) * s).to(z.dtype)
    q_, k_, v_ = (
        tl.reshape(a, [TILE // GW, GW, BLOCK]), tl.reshape(b, [TILE // GW, GW, BLOCK]),
        tl.reshape(z, [TILE // GW, GW, BLOCK]),
    )  # fmt: skip
    scores = tl.dot(q_, tl.permute(k_, (0, 2, 1)), input_precision=PRECISION) * SCALE
    g = tl.arange(0, GW)
    weights, _ = _weights(scores, column_add, column_times, (g // WP)[None, :], (g % WP)[None, :],
                          tl.reshape(there, [TILE // GW, GW]), tl.reshape(right, [TILE // GW, GW]), head, heads,
                          WW, COLUMNS, SOFTMAX)  # fmt: skip
    z = tl.dot(weights.to(z.dtype), v_, input_precision=PRECISION).to(z.dtype)
    z = tl.reshape(z, [TILE, BLOCK])

    row, column = i % HP, (i // HP) % WP
    there, cell, down, right = _cells(row, column, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    q_ = tl.reshape(_turned_lines(a, HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    k_ = tl.reshape(_turned_lines(b, HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    v_ = tl.reshape(_turned_lines(z, HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    scores = tl.dot(q_, tl.permute(k_, (0, 2, 1)), input_precision=PRECISION) * SCALE
    g = tl.arange(0, GH)
    weights, _ = _weights(scores, row_add, row_times, (g // HP)[None, :], (g % HP)[None, :],
                          tl.reshape(there, [TILE // GH, GH]), tl.reshape(down, [TILE // GH, GH]), head, heads,
                          WH, ROWS, SOFTMAX)  # fmt: skip
    y = tl.dot(weights.to(v_.dtype), v_, input_precision=PRECISION)
    real = there[:, None] & (d < D)[None, :]
    tl.store(out + cell[:, None] * (heads * D) + part, tl.reshape(y, [TILE, BLOCK]), real)


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
    row, column, held = (i // WP) % HP, i % WP, i // (WP * HP)
    there, cell, down, right = _cells(row, column, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
    a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
    b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    if TURN:
        c, s = _angles(cos, sin, (row * pw + column)[:, None] * D + d[None, :], d, real)
        a = (a * c + _swapped(a, TILE, BLOCK) * s).to(z.dtype)
        b = (b * c + _swapped(b, TILE, BLOCK) * s).to(z.dtype)
    # the width pass once more
    q_w, k_w, v_w = (
        tl.reshape(a, [TILE // GW, GW, BLOCK]), tl.reshape(b, [TILE // GW, GW, BLOCK]),
        tl.reshape(z, [TILE // GW, GW, BLOCK]),
    )  # fmt: skip
    scores = tl.dot(q_w, tl.permute(k_w, (0, 2, 1)), input_precision=PRECISION) * SCALE
    g = tl.arange(0, GW)
    p, p_slope = _weights(scores, column_add, column_times, (g // WP)[None, :], (g % WP)[None, :],
                          tl.reshape(there, [TILE // GW, GW]), tl.reshape(right, [TILE // GW, GW]), head, heads,
                          WW, COLUMNS, SOFTMAX)  # fmt: skip
    middle = tl.dot(p.to(z.dtype), v_w, input_precision=PRECISION).to(z.dtype)
    # the height pass and its gradients
    row_h, column_h = i % HP, (i // HP) % WP
    there_h, cell_h, down, _ = _cells(row_h, column_h, held, windows, nh, nw, ph, pw, up, left, WH, WW, HELD)
    real_h = there_h[:, None] & (d < D)[None, :]
    dy = tl.reshape(tl.load(gradient + cell_h[:, None] * (heads * D) + part, real_h, 0.0), [TILE // GH, GH, BLOCK])
    q_h = tl.reshape(_turned_lines(a, HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    k_h = tl.reshape(_turned_lines(b, HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    v_h = tl.reshape(_turned_lines(tl.reshape(middle, [TILE, BLOCK]), HP, WP, HELD, BLOCK), [TILE // GH, GH, BLOCK])
    scores = tl.dot(q_h, tl.permute(k_h, (0, 2, 1)), input_precision=PRECISION) * SCALE
    g = tl.arange(0, GH)
    r, r_slope = _weights(scores, row_add, row_times, (g // HP)[None, :], (g % HP)[None, :],
                          tl.reshape(there_h, [TILE // GH, GH]), tl.reshape(down, [TILE // GH, GH]), head, heads,
                          WH, ROWS, SOFTMAX)  # fmt: skip
    change = tl.dot(dy, tl.permute(v_h, (0, 2, 1)), input_precision=PRECISION)
    slope = (_slope(change, r, r_slope, SOFTMAX) * SCALE).to(z.dtype)
    da = tl.dot(slope, k_h, input_precision=PRECISION)
    db = tl.dot(tl.permute(slope, (0, 2, 1)), q_h, input_precision=PRECISION)
    dz = tl.dot(tl.permute(r.to(z.dtype), (0, 2, 1)), dy, input_precision=PRECISION).to(z.dtype)
    da = _turned_lines(tl.reshape(da, [TILE, BLOCK]), WP, HP, HELD, BLOCK)
    db = _turned_lines(tl.reshape(db, [TILE, BLOCK]), WP, HP, HELD, BLOCK)
    dz = tl.reshape(_turned_lines(tl.reshape(dz, [TILE, BLOCK]), WP, HP, HELD, BLOCK), [TILE // GW, GW, BLOCK])
    # those of the width pass
    change = tl.dot(dz, tl.permute(v_w, (0, 2, 1)), input_precision=PRECISION)
    slope = (_slope(change, p, p_slope, SOFTMAX) * SCALE).to(z.dtype)
    dz = tl.reshape(tl.dot(tl.permute(p.to(z.dtype), (0, 2, 1)), dz, input_precision=PRECISION), [TILE, BLOCK])
    if MORE:
        dz += tl.load(more + cell[:, None] * (heads * D) + part, real, 0.0)
    at = cell[:, None] * step + part
    if PACKED:
        tl.store(made + 2 * heads * D + at, dz, real)
    else:
        tl.store(apart + cell[:, None] * (heads * D) + part, dz, real)
    da += tl.reshape(tl.dot(slope, k_w, input_precision=PRECISION), [TILE, BLOCK])
    db += tl.reshape(tl.dot(tl.permute(slope, (0, 2, 1)), q_w, input_precision=PRECISION), [TILE, BLOCK])
    if TURN:  # back by the same angle, read again, since registers decide how many programs run at a time
        c, s = _angles(cos, sin, (row * pw + column)[:, None] * D + d[None, :], d, real)
        da = da * c - _swapped(da, TILE, BLOCK) * s
        db = db * c - _swapped(db, TILE, BLOCK) * s
    tl.store(made + at, da, real)
    tl.store(made + heads * D + at, db, real)


def _even(x: Tensor) -> tuple[Tensor, int]:
    """[B, h, w, H, D] with all cells the same stride apart and heads side by side; and that stride."""
    _, height, width, _, channels = x.shape
    step = x.stride(2)
    if x.stride() == (height * width * step, width * step, step, channels, 1):
        return x, step
    return x.contiguous(), x.shape[3] * channels


def _launch(packed, v, cos, sin, tables, window: list[int], shift: list[int], softmax: bool) -> tuple:
    """Arguments, constants and grid that both kernels share."""
    values = packed.select(3, 2) if v is None else v
    (q, q_step), (k, k_step), (v, v_step) = (_even(x) for x in (packed.select(3, 0), packed.select(3, 1), values))
    batch, ph, pw, heads, width = v.shape
    nh, nw = ph // window[0], pw // window[1]
    windows, (high, wide) = batch * nh * nw, (triton.next_power_of_2(side) for side in window)
    block = max(16, triton.next_power_of_2(width))
    held = max(1, CELLS * 32 // max(32, block) // (high * wide), GROUP // (high * wide))
    angles = [tables[0]] * 2 if cos is None else [cos.contiguous(), sin.contiguous()]
    tables = [table.contiguous() for table in tables]
    places = [q_step, k_step, v_step, windows, nh, nw, ph, pw, *shift, heads]
    rows, columns = (1 if t.ndim == 3 else len(t) for t in (tables[2:] if not softmax else tables[:2]))
    constants = {  # the scale too: as an argument a compiler would take it for float64, and with it all that follows
        "SCALE": width**-0.5, "D": width, "BLOCK": block, "WH": window[0], "WW": window[1], "ROWS": rows,
        "COLUMNS": columns, "SOFTMAX": softmax, "TURN": cos is not None, "HP": high, "WP": wide, "HELD": held,
        "GW": max(GROUP, wide), "GH": max(GROUP, high), "num_warps": WARPS,
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return [q, k, v, *angles, *tables], places, constants, (triton.cdiv(windows, held), heads)


@triton_op("minigated::windowed", mutates_args={})
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
    out = torch.empty(tensors[2].shape, dtype=packed.dtype, device=packed.device)
    wrap_triton(_forward)[grid](*tensors, out, *places, **constants)
    return out


@triton_op("minigated::windowed_gradients", mutates_args={})
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
    wrap_triton(_backward)[grid](
        *tensors, gradient, other, made, apart, *places, made.stride(2), PACKED=v is None, MORE=more is not None,
        **constants,
    )  # fmt: skip
    return made, apart


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _gradients(ctx, gradient):
    v = ctx.saved_tensors[1]
    packed, apart = windowed_gradients(*ctx.saved_tensors, gradient, None, *ctx.rest)
    return packed, None if v is None else apart, *(None,) * 9


windowed.register_autograd(_gradients, setup_context=_keep)


# ---------------------------------------------------------------------------------------------- with the values' LCE
@triton_op("minigated::windowed_local", mutates_args={})
def windowed_local(
    qkv: Tensor, filters: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, row_add: Tensor,
    column_add: Tensor, window: list[int], shift: list[int],
) -> Tensor:  # fmt: skip
    """Softmax passes plus a depth-wise convolution of the values, whose two gradients meet in one place.

    Args:
        qkv: [B, h, w, 3, H, D]. filters: [H D, 1, k, k]. bias: [H D]. All else as in `windowed`.
    """
    masks = (row_add, column_add)
    y = windowed(qkv, None, cos, sin, *masks, *masks, window, shift, True)
    return depthwise(qkv.select(3, 2).flatten(-2), filters, bias, False, y.flatten(-2)).view_as(y)


def _keep_local(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _gradients_local(ctx, gradient):
    qkv, filters, bias, cos, sin, *masks = ctx.saved_tensors
    flat = gradient.flatten(-2).contiguous()
    taps, offset = filter_gradients(qkv.select(3, 2).flatten(-2), flat, filters)
    more = depthwise(flat, filters, filters, True, None).view_as(gradient)
    packed, _ = windowed_gradients(qkv, None, cos, sin, *masks, *masks, gradient, more, *ctx.rest, True)
    return packed, taps, offset.to(bias.dtype), *(None,) * 6


windowed_local.register_autograd(_gradients_local, setup_context=_keep_local)
