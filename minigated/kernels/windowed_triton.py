"""Both passes of decomposed attention within windows of at most 64 cells as one Triton kernel, and its gradient.

A program owns one head of one window, or of several windows where these are small. It reads q, k, v once and writes
the result once: the width pass and the height pass share the scores q k^T of all pairs of cells, of which each pass
uses those in its own rows or columns, and the value between the passes never leaves the chip. Of the products with a
64 x 64 matrix seven eighths are zeros, which costs a tensor core less than moving the value would.

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


@triton.jit
def _weights(
    scores, add, times, same, one, other, place, head, heads,
    W: tl.constexpr, SEGMENTS: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Weights of a pass and, for the sigmoid, their derivative. `one`, `other` are positions along the axis."""
    segment = place if SEGMENTS > 1 else place * 0
    at = ((segment * heads + head) * W + one[:, None]) * W + other[None, :]
    if SOFTMAX:
        scores = tl.where(same, scores + tl.load(add + at, same, 0.0), float("-inf"))
        top = tl.max(scores, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(scores - top[:, None])
        total = tl.sum(weights, 1)
        weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
        return weights, weights
    at_bias = (head * W + one[:, None]) * W + other[None, :]  # slopes know no regions
    open_ = 1.0 / (1.0 + tl.exp(-(scores + tl.load(add + at_bias, same, 0.0))))
    decay = tl.load(times + at, same, 0.0)
    return open_ * decay, open_ * (1.0 - open_) * decay


@triton.jit
def _slope(gradient, weights, derivative, SOFTMAX: tl.constexpr):
    """From the gradient of the weights to that of the scores."""
    if SOFTMAX:
        return weights * (gradient - tl.sum(weights * gradient, 1)[:, None])
    return gradient * derivative


@triton.jit
def _place(windows, nh, nw, ph, pw, up, left, WH: tl.constexpr, WW: tl.constexpr, TILE: tl.constexpr):
    """Of each line of the tile: whether there is a cell, its number on the map, its window and its place in it.

    `up` and `left` are the shift: the windows lie on the map rolled by so many cells.
    """
    line, held = tl.arange(0, TILE), TILE // (WH * WW)
    inside = line % (WH * WW)
    window = tl.program_id(0) * held + line // (WH * WW)
    there = (line < held * WH * WW) & (window < windows)
    window = tl.where(there, window, -1 - line)  # no two lines without a cell share a window
    image, down, right = window // (nh * nw), (window // nw) % nh, window % nw
    row, column = inside // WW, inside % WW
    y, x = down * WH + row + up, right * WW + column + left
    y, x = tl.where(y >= ph, y - ph, y), tl.where(x >= pw, x - pw, x)
    cell = (image * ph + y).to(tl.int64) * pw + x
    down, right = tl.where(there, down, 0), tl.where(there, right, 0)
    return there, cell, window, down, right, row, column


@triton.jit
def _turned(x, at, real, d, cos, sin, sign, SWAPPED: tl.constexpr):
    """Rows of a matrix with neighbouring channels (0, 1), (2, 3), ... rotated; also with the two of a pair swapped."""
    value = tl.load(x + at + d[None, :], real, 0.0)
    other = tl.load(x + at + (d ^ 1)[None, :], real, 0.0)
    turned = (value * cos + other * sign * sin).to(value.dtype)
    if SWAPPED:
        return turned, (other * cos - value * sign * sin).to(value.dtype)
    return turned, turned


@triton.jit
def _angles(cos, sin, row, column, pw, real, d, D: tl.constexpr):
    """Cosines and sines of the cells of a tile, and the sign that the partner of each channel gets."""
    at = (row * pw + column)[:, None] * D + d[None, :]
    sign = tl.where(d % 2 == 0, -1.0, 1.0)[None, :]
    return tl.load(cos + at, real, 0.0), tl.load(sin + at, real, 0.0), sign


@triton.jit
def _forward(
    q, k, v, cos, sin, row_add, column_add, row_times, column_times, out, q_step, k_step, v_step,
    windows, nh, nw, ph, pw, up, left, heads, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TURN: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    there, cell, window, down, right, row, column = _place(windows, nh, nw, ph, pw, up, left, WH, WW, TILE)
    head, d = tl.program_id(1), tl.arange(0, BLOCK)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
    if TURN:
        c, s, sign = _angles(cos, sin, row, column, pw, real, d, D)
        a, _ = _turned(q, cell[:, None] * q_step + head * D, real, d, c, s, sign, False)
        b, _ = _turned(k, cell[:, None] * k_step + head * D, real, d, c, s, sign, False)
    else:
        a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
        b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    mates = (window[:, None] == window[None, :]) & there[:, None]
    same = mates & (row[:, None] == row[None, :])
    weights, _ = _weights(scores, column_add, column_times, same, column, column, right[:, None], head, heads,
                          WW, COLUMNS, SOFTMAX)  # fmt: skip
    z = tl.dot(weights.to(z.dtype), z, input_precision=PRECISION).to(z.dtype)
    same = mates & (column[:, None] == column[None, :])
    weights, _ = _weights(scores, row_add, row_times, same, row, row, down[:, None], head, heads,
                          WH, ROWS, SOFTMAX)  # fmt: skip
    z = tl.dot(weights.to(z.dtype), z, input_precision=PRECISION)
    tl.store(out + cell[:, None] * (heads * D) + part, z, real)


@triton.jit
def _backward(
    q, k, v, cos, sin, row_add, column_add, row_times, column_times, gradient, more, dq, dk, dv,
    q_step, k_step, v_step, windows, nh, nw, ph, pw, up, left, heads, scale, dq_step, dv_step,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TURN: tl.constexpr, MORE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    there, cell, window, down, right, row, column = _place(windows, nh, nw, ph, pw, up, left, WH, WW, TILE)
    head, d = tl.program_id(1), tl.arange(0, BLOCK)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
    if TURN:
        c, s, sign = _angles(cos, sin, row, column, pw, real, d, D)
        a, a_swapped = _turned(q, cell[:, None] * q_step + head * D, real, d, c, s, sign, True)
        b, b_swapped = _turned(k, cell[:, None] * k_step + head * D, real, d, c, s, sign, True)
    else:
        a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
        b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    g = tl.load(gradient + cell[:, None] * (heads * D) + part, real, 0.0)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    mates = (window[:, None] == window[None, :]) & there[:, None]
    same_row = mates & (row[:, None] == row[None, :])
    same_column = mates & (column[:, None] == column[None, :])
    p, p_slope = _weights(scores, column_add, column_times, same_row, column, column, right[:, None], head, heads,
                          WW, COLUMNS, SOFTMAX)  # fmt: skip
    middle = tl.dot(p.to(z.dtype), z, input_precision=PRECISION).to(z.dtype)
    r, r_slope = _weights(scores, row_add, row_times, same_column, row, row, down[:, None], head, heads,
                          WH, ROWS, SOFTMAX)  # fmt: skip
    change = tl.dot(g, tl.trans(middle), input_precision=PRECISION)
    slope = _slope(change, r, r_slope, SOFTMAX)
    g = tl.dot(tl.trans(r.to(z.dtype)), g, input_precision=PRECISION).to(z.dtype)
    change = tl.dot(g, tl.trans(z), input_precision=PRECISION)
    slope = (slope + _slope(change, p, p_slope, SOFTMAX)) * scale
    slope = slope.to(z.dtype)
    g = tl.dot(tl.trans(p.to(z.dtype)), g, input_precision=PRECISION)
    if MORE:
        g += tl.load(more + cell[:, None] * (heads * D) + part, real, 0.0)
    tl.store(dv + cell[:, None] * dv_step + part, g, real)
    da = tl.dot(slope, b, input_precision=PRECISION)
    db = tl.dot(tl.trans(slope), a, input_precision=PRECISION)
    if TURN:  # back by the same angle; a product with swapped channels is the product's swapped channels
        da = da * c - tl.dot(slope, b_swapped, input_precision=PRECISION) * sign * s
        db = db * c - tl.dot(tl.trans(slope), a_swapped, input_precision=PRECISION) * sign * s
    at = cell[:, None] * dq_step + part
    tl.store(dq + at, da, real)
    tl.store(dk + at, db, real)


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
    tile = max(16, triton.next_power_of_2(window[0] * window[1]))
    held, windows = tile // (window[0] * window[1]), batch * nh * nw
    angles = [tables[0]] * 2 if cos is None else [cos.contiguous(), sin.contiguous()]
    tables = [table.contiguous() for table in tables]
    places = [q_step, k_step, v_step, windows, nh, nw, ph, pw, *shift, heads, width**-0.5]
    rows, columns = (1 if t.ndim == 3 else len(t) for t in (tables[2:] if not softmax else tables[:2]))
    constants = {
        "D": width, "BLOCK": max(16, triton.next_power_of_2(width)), "WH": window[0], "WW": window[1], "ROWS": rows,
        "COLUMNS": columns, "SOFTMAX": softmax, "TURN": cos is not None, "TILE": tile, "num_warps": max(1, tile // 16),
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
        row_add, column_add: added to the scores, [H, W, W] or one a segment. row_times, column_times: multiply the
            sigmoid; a softmax does not read them. window, shift: cells along height and width.

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
    step, channels = made.stride(2), gradient.shape[3:].numel()
    where = made.select(3, 2) if v is None else apart
    other = gradient if more is None else more.contiguous()
    wrap_triton(_backward)[grid](
        *tensors, gradient, other, made.select(3, 0), made.select(3, 1), where, *places, step,
        step if v is None else channels, MORE=more is not None, **constants,
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
    values, sums = filter_gradients(qkv.select(3, 2).flatten(-2), flat, filters)
    more = depthwise(flat, filters, filters, True, None).view_as(gradient)
    packed, _ = windowed_gradients(qkv, None, cos, sin, *masks, *masks, gradient, more, *ctx.rest, True)
    return packed, values, sums.to(bias.dtype), *(None,) * 6


windowed_local.register_autograd(_gradients_local, setup_context=_keep_local)
