"""Both passes of decomposed attention within windows of at most 64 cells as one Triton kernel, and its gradient.

A program owns one head of one window, or of several windows where these are small. It reads q, k, v once and writes
the result once: the width pass and the height pass share the scores q k^T of all pairs of cells, of which each pass
uses those in its own rows or columns, and the value between the passes never leaves the chip. Of the products with a
64 x 64 matrix seven eighths are zeros, which costs a tensor core less than moving the value would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


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
def _place(windows, nh, nw, ph, pw, WH: tl.constexpr, WW: tl.constexpr, TILE: tl.constexpr):
    """Of each line of the tile: whether there is a cell, its number on the map, its window and its place in it."""
    line, held = tl.arange(0, TILE), TILE // (WH * WW)
    inside = line % (WH * WW)
    window = tl.program_id(0) * held + line // (WH * WW)
    there = (line < held * WH * WW) & (window < windows)
    window = tl.where(there, window, -1 - line)  # no two lines without a cell share a window
    image, down, right = window // (nh * nw), (window // nw) % nh, window % nw
    row, column = inside // WW, inside % WW
    cell = (image * ph + down * WH + row).to(tl.int64) * pw + right * WW + column
    down, right = tl.where(there, down, 0), tl.where(there, right, 0)
    return there, cell, window, down, right, row, column


@triton.jit
def _forward(
    q, k, v, row_add, column_add, row_times, column_times, out, q_step, k_step, v_step,
    windows, nh, nw, ph, pw, heads, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    there, cell, window, down, right, row, column = _place(windows, nh, nw, ph, pw, WH, WW, TILE)
    head, d = tl.program_id(1), tl.arange(0, BLOCK)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
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
    q, k, v, row_add, column_add, row_times, column_times, gradient, dq, dk, dv, q_step, k_step, v_step,
    windows, nh, nw, ph, pw, heads, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SOFTMAX: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    there, cell, window, down, right, row, column = _place(windows, nh, nw, ph, pw, WH, WW, TILE)
    head, d = tl.program_id(1), tl.arange(0, BLOCK)
    real = there[:, None] & (d < D)[None, :]
    part = (head * D + d)[None, :]
    a = tl.load(q + cell[:, None] * q_step + part, real, 0.0)
    b = tl.load(k + cell[:, None] * k_step + part, real, 0.0)
    z = tl.load(v + cell[:, None] * v_step + part, real, 0.0)
    at = cell[:, None] * (heads * D) + part
    g = tl.load(gradient + at, real, 0.0)
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
    tl.store(dv + at, tl.dot(tl.trans(p.to(z.dtype)), g, input_precision=PRECISION), real)
    tl.store(dq + at, tl.dot(slope, b, input_precision=PRECISION), real)
    tl.store(dk + at, tl.dot(tl.trans(slope), a, input_precision=PRECISION), real)


def _even(x: Tensor) -> tuple[Tensor, int]:
    """[B, h, w, H, D] with all cells the same stride apart and heads side by side; and that stride."""
    _, height, width, _, channels = x.shape
    step = x.stride(2)
    if x.stride() == (height * width * step, width * step, step, channels, 1):
        return x, step
    return x.contiguous(), x.shape[3] * channels


def _launch(q, k, v, tables, window: list[int], softmax: bool) -> tuple[list, dict, tuple]:
    """Arguments, constants and grid that both kernels share."""
    (q, q_step), (k, k_step), (v, v_step) = (_even(x) for x in (q, k, v))
    batch, ph, pw, heads, width = v.shape
    nh, nw = ph // window[0], pw // window[1]
    tile = max(16, triton.next_power_of_2(window[0] * window[1]))
    held, windows = tile // (window[0] * window[1]), batch * nh * nw
    tables = [table.contiguous() for table in tables]
    places = [q_step, k_step, v_step, windows, nh, nw, ph, pw, heads, width**-0.5]
    rows, columns = (1 if t.ndim == 3 else len(t) for t in (tables[2:] if not softmax else tables[:2]))
    constants = {
        "D": width, "BLOCK": max(16, triton.next_power_of_2(width)), "WH": window[0], "WW": window[1], "ROWS": rows,
        "COLUMNS": columns, "SOFTMAX": softmax, "TILE": tile, "num_warps": max(1, tile // 16),
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return [q, k, v, *tables], places, constants, (triton.cdiv(windows, held), heads)


@triton_op("minigated::windowed", mutates_args={})
def windowed(
    q: Tensor, k: Tensor, v: Tensor, row_add: Tensor, column_add: Tensor, row_times: Tensor, column_times: Tensor,
    window: list[int], softmax: bool,
) -> Tensor:  # fmt: skip
    """[B, h, w, H, D] three times -> [B, h, w, H, D]; `add` goes into the scores, `times` multiplies the sigmoid."""
    tensors, places, constants, grid = _launch(q, k, v, (row_add, column_add, row_times, column_times), window, softmax)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    wrap_triton(_forward)[grid](*tensors, out, *places, **constants)
    return out


@triton_op("minigated::windowed_gradients", mutates_args={})
def windowed_gradients(
    q: Tensor, k: Tensor, v: Tensor, row_add: Tensor, column_add: Tensor, row_times: Tensor, column_times: Tensor,
    gradient: Tensor, window: list[int], softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    tensors, places, constants, grid = _launch(q, k, v, (row_add, column_add, row_times, column_times), window, softmax)
    made = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(3)]
    wrap_triton(_backward)[grid](*tensors, gradient.contiguous(), *made, *places, **constants)
    return made[0], made[1], made[2]


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.window, ctx.softmax = inputs[7:]


def _gradients(ctx, gradient):
    return *windowed_gradients(*ctx.saved_tensors, gradient, ctx.window, ctx.softmax), *(None,) * 6


windowed.register_autograd(_gradients, setup_context=_keep)
