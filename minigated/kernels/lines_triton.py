"""One pass of decomposed attention over the lines of windows, rows or columns, for kernels that hold both passes.

A pass needs the scores of cells of one line, four or eight, which is less than a matrix unit multiplies at a time. So
whole lines are put together to groups of sixteen cells or more, every group is one small product, and of its scores
those within a line count. For the other pass the cells are put in the other order, columns after one another in place
of rows.
"""

import triton
import triton.language as tl


@triton.jit
def _grouped(x, G: tl.constexpr):
    """[TILE, BLOCK] -> [TILE // G, G, BLOCK]."""
    return tl.reshape(x, [x.shape[0] // G, G, x.shape[1]])


@triton.jit
def _flat(x):
    """[groups, G, BLOCK] -> [groups * G, BLOCK]."""
    return tl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2]])


@triton.jit
def line_shares(
    a, b, add, times, there, place, head, heads, SCALE: tl.constexpr, W: tl.constexpr, LINE: tl.constexpr,
    G: tl.constexpr, SEGMENTS: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each cell takes of the others in its line and, for the sigmoid, the derivative of that, [groups, G, G].

    Args:
        a, b: queries and keys of whole lines one after another, [TILE, BLOCK]. there: whether a cell is one, [TILE].
        place: of which window along the axis it is, [TILE]. W, LINE: cells of a line, and that as a power of two.
    """
    queries, keys = _grouped(a, G), _grouped(b, G)
    there, place = tl.reshape(there, [a.shape[0] // G, G]), tl.reshape(place, [a.shape[0] // G, G])
    scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)), input_precision=PRECISION) * SCALE
    g = tl.arange(0, G)
    line, one = (g // LINE)[None, :], (g % LINE)[None, :]
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
        shares = tl.exp(scores - top[:, :, None])
        total = tl.sum(shares, 2)
        shares = shares * (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]
        return shares, shares
    open_ = 1.0 / (1.0 + tl.exp(-(scores + tl.load(add + within, inside, 0.0))))  # slopes know no regions
    decay = tl.where(same, tl.load(times + at, allowed, 0.0), 0.0)
    return open_ * decay, open_ * (1.0 - open_) * decay


@triton.jit
def line_results(shares, z, G: tl.constexpr, PRECISION: tl.constexpr):
    """The result of a pass: shares of the values, [TILE, BLOCK] float32."""
    return _flat(tl.dot(shares.to(z.dtype), _grouped(z, G), input_precision=PRECISION))


@triton.jit
def line_gradients(
    dy, a, b, z, shares, derivative, SCALE: tl.constexpr, G: tl.constexpr, SOFTMAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of a pass's result to those of queries, keys and values, [TILE, BLOCK] float32."""
    dy, a, b, z = _grouped(dy, G), _grouped(a, G), _grouped(b, G), _grouped(z, G)
    dz = _flat(tl.dot(tl.permute(shares.to(z.dtype), (0, 2, 1)), dy, input_precision=PRECISION))
    slope = tl.dot(dy, tl.permute(z, (0, 2, 1)), input_precision=PRECISION)
    if SOFTMAX:
        slope = shares * (slope - tl.sum(shares * slope, 2)[:, :, None])
    else:
        slope = slope * derivative
    slope = (slope * SCALE).to(a.dtype)
    da = _flat(tl.dot(slope, b, input_precision=PRECISION))
    return da, _flat(tl.dot(tl.permute(slope, (0, 2, 1)), a, input_precision=PRECISION)), dz


@triton.jit
def turned_lines(x, LINES: tl.constexpr, LENGTH: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """From lines of one direction, [HELD LINES LENGTH, BLOCK], to those of the other."""
    x = tl.permute(tl.reshape(x, [HELD, LINES, LENGTH, BLOCK]), (0, 2, 1, 3))
    return tl.reshape(x, [HELD * LINES * LENGTH, BLOCK])
