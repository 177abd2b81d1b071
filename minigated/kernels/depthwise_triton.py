"""Depth-wise convolution of a channel-last map in Triton: forward, gradient of the map, gradient of the filters.

A program owns some channels of blocks of neighbouring columns. A value that was read serves every column of the block
it is a neighbour of, so 5 x 5 taps take 10 reads a result in place of 25 where a block has four columns; what the next
row reads again comes from the cache. Sums are tuples, one tensor for each column of a block, or for each tap of the
gradient, in the registers from the first cell to the last.

Each operation is closed to `torch.compile`. A compiler that may look inside reads the kernel anew at every call of a
graph: that was two thirds of the time that a backbone took to compile. It keeps graphs on disk by the names of what
they call, backward passes too: after a change to a gradient here, set TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from minigated.errors import InputError

CHANNELS, BLOCKS = 64, 8  # channels and blocks of columns of one program
WIDE, NARROW = 8, 4  # columns of a block
PROGRAMS = 512  # at most, of the gradient of the filters: each leaves its sums in memory


@triton.jit
def _place(block, height, width, cells, COLUMNS: tl.constexpr):
    """Of blocks of columns: the row, the first column, the number of the first cell, and whether there is one."""
    across = tl.cdiv(width, COLUMNS)
    line = block // across
    column = (block % across) * COLUMNS
    return line % height, column, line * width + column, line * width < cells


@triton.jit
def _neighbour(x, down, right, row, column, cell, there, height, width, stride, channel, inside):
    """What lies so many rows and columns from each cell, zeros beyond the map, [BLOCKS, CHANNELS] float32."""
    held = there & (row + down >= 0) & (row + down < height)  # this and the product below serve a whole row
    here = held & (column + right >= 0) & (column + right < width)
    at = (cell + down * width).to(tl.int64) * stride + right * stride
    return tl.load(x + at[:, None] + channel[None, :], here[:, None] & inside[None, :], 0.0).to(tl.float32)


@triton.jit
def _added(sums, index: tl.constexpr, more):
    """The sums with something added to one of them."""
    return sums[:index] + (sums[index] + more,) + sums[index + 1 :]


@triton.jit
def _convolve(
    x, taps, bias, plus, out, cells, height, width, channels, stride,
    K: tl.constexpr, MIRROR: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr, PLUS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, column, cell, there = _place(tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), height, width, cells, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    start = tl.zeros((BLOCKS, CHANNELS), tl.float32)
    if BIAS:
        start += tl.load(bias + channel, inside, 0.0).to(tl.float32)[None, :]
    totals = (start,) * COLUMNS
    for line in tl.static_range(K):
        factors = ()
        for tap in tl.static_range(K):
            index = K * K - 1 - line * K - tap if MIRROR else line * K + tap
            factor = tl.load(taps + index * channels + channel, inside, 0.0).to(tl.float32)
            if OWN and index == K * K // 2:
                factor += 1.0
            factors = factors + (factor[None, :],)
        for j in tl.static_range(COLUMNS + K - 1):
            value = _neighbour(x, line - K // 2, j - K // 2, row, column, cell, there, height, width, stride, channel,
                               inside)  # fmt: skip
            for i in tl.static_range(COLUMNS):
                if 0 <= j - i and j - i < K:
                    totals = _added(totals, i, value * factors[j - i])
    for i in tl.static_range(COLUMNS):
        real = (there & (column + i < width))[:, None] & inside[None, :]
        at = (cell + i).to(tl.int64)[:, None] * channels + channel[None, :]
        total = totals[i]
        if PLUS:
            total += tl.load(plus + at, real, 0.0).to(tl.float32)
        tl.store(out + at, total, real)


@triton.jit
def _filter_gradient(
    x, gradient, parts, cells, height, width, channels, stride, steps,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    sums = (tl.zeros((BLOCKS, CHANNELS), tl.float32),) * (K * K + 1)
    first = tl.program_id(0) * steps * BLOCKS + tl.arange(0, BLOCKS)
    for step in range(steps):
        row, column, cell, there = _place(first + step * BLOCKS, height, width, cells, COLUMNS)
        grown = ()
        for i in tl.static_range(COLUMNS):
            real = (there & (column + i < width))[:, None] & inside[None, :]
            at = (cell + i).to(tl.int64)[:, None] * channels + channel[None, :]
            g = tl.load(gradient + at, real, 0.0).to(tl.float32)
            grown = grown + (g,)
            sums = _added(sums, K * K, g)
        for line in tl.static_range(K):
            for j in tl.static_range(COLUMNS + K - 1):
                value = _neighbour(x, line - K // 2, j - K // 2, row, column, cell, there, height, width, stride,
                                   channel, inside)  # fmt: skip
                for i in tl.static_range(COLUMNS):
                    if 0 <= j - i and j - i < K:
                        sums = _added(sums, line * K + j - i, value * grown[i])
    to = parts + tl.program_id(0).to(tl.int64) * (K * K + 1) * channels + channel
    for tap in tl.static_range(K * K + 1):
        tl.store(to + tap * channels, tl.sum(sums[tap], 0), inside)


def even(x: Tensor) -> tuple[Tensor, int]:
    """The map with all cells the same stride apart, which a slice of a wider map has too; and that stride."""
    step, (_, height, width, _) = x.stride(2), x.shape
    if x.stride(3) == 1 and x.stride(1) == width * step and x.stride(0) == height * width * step:
        return x, step
    return x.contiguous(), x.shape[3]


def _columns(width: int) -> int:
    """How many columns a block has on a map that is so wide."""
    return WIDE if width > NARROW else NARROW


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0] * x.shape[1] * x.shape[2], *x.shape[1:]


@custom_op("minigated::depthwise", mutates_args=())
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, mirror: bool, own: bool, plus: Tensor | None
) -> Tensor:
    """Convolution of each channel, [B, h, w, C] -> [B, h, w, C] in the dtype of x.

    Args:
        x: [B, h, w, C]. weight: filters, [C, 1, k, k]. bias: [C] or none.
        mirror: turns the filters around, which gives the map's gradient.
        own: adds x, as a one in the middle of every filter; nothing is read twice for it.
        plus: added to the result, [B, h, w, C].
    """
    x, stride = even(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cells, height, width, channels = _sizes(x)
    taps = weight.flatten(1).T.contiguous()  # neighbouring channels' side by side
    columns = _columns(width)
    blocks = cells // width * triton.cdiv(width, columns)
    grid = (triton.cdiv(blocks, BLOCKS), triton.cdiv(channels, CHANNELS))
    with torch.cuda.device_of(x):  # a launch goes to the current GPU, whichever the tensors are on
        _convolve[grid](
            x, taps, taps if bias is None else bias.contiguous(), out if plus is None else plus.contiguous(), out,
            cells, height, width, channels, stride, K=weight.shape[-1], MIRROR=mirror, BIAS=bias is not None, OWN=own,
            PLUS=plus is not None, COLUMNS=columns, BLOCKS=BLOCKS, CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return out


@depthwise.register_fake
def _(x, weight, bias, mirror, own, plus):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("minigated::depthwise_filters", mutates_args=())
def depthwise_filters(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """Sums over all cells: [k * k + 1, C] float32, the filters' gradient tap by tap and the bias' in the last row."""
    x, stride = even(x)
    gradient = gradient.contiguous()
    cells, height, width, channels = _sizes(x)
    # 25 taps fill the registers with their sums, and each program leaves 26 to be added up: half as many is faster
    columns, programs = (_columns(width), PROGRAMS) if kernel < 5 else (NARROW, PROGRAMS // 2)
    rounds, across = triton.cdiv(cells // width * triton.cdiv(width, columns), BLOCKS), triton.cdiv(channels, CHANNELS)
    steps = triton.cdiv(rounds * across, programs)
    grid = (triton.cdiv(rounds, steps), across)
    parts = torch.empty((grid[0], kernel * kernel + 1, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _filter_gradient[grid](
            x, gradient, parts, cells, height, width, channels, stride, steps, K=kernel, COLUMNS=columns, BLOCKS=BLOCKS,
            CHANNELS=CHANNELS, num_warps=4,
        )  # fmt: skip
    return parts.sum(0)


@depthwise_filters.register_fake
def _(x, gradient, kernel):
    return torch.empty((kernel * kernel + 1, x.shape[3]), dtype=torch.float32, device=x.device)


def refuse_twice(ctx, inputs, output) -> None:
    raise InputError("the gradient of a gradient is not among the kernels; switch them off for that")


depthwise_filters.register_autograd(refuse_twice, setup_context=refuse_twice)


def _keep(ctx, inputs, output) -> None:
    if inputs[3]:
        refuse_twice(ctx, inputs, output)
    ctx.save_for_backward(*inputs[:2])
    ctx.own, ctx.of_bias = inputs[4], None if inputs[2] is None else inputs[2].dtype


def filter_gradients(x: Tensor, gradient: Tensor, weight: Tensor, of_bias: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the filters, in their shape and dtype, and of the bias, [C]."""
    sums = depthwise_filters(x, gradient, weight.shape[-1])
    return sums[:-1].T.reshape(weight.shape).to(weight.dtype).contiguous(), sums[-1].to(of_bias, copy=True)


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    gradient, of_map, filters, bias = gradient.contiguous(), None, None, None
    if ctx.needs_input_grad[0]:
        of_map = depthwise(gradient, weight, bias=None, mirror=True, own=ctx.own, plus=None)
    if any(ctx.needs_input_grad[1:3]):
        filters, bias = filter_gradients(x, gradient, weight, ctx.of_bias or weight.dtype)
    return of_map, filters, bias if ctx.of_bias else None, None, None, gradient if ctx.needs_input_grad[5] else None


depthwise.register_autograd(_backward, setup_context=_keep)
