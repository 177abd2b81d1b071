"""Depth-wise convolution of a channel-last map in Triton: forward, gradient of the map, gradient of the filters.

One program owns a block of cells and channels and walks over the k x k taps; neighbours come from the cache, so the map
is read from memory about once. Libraries spend most of a small map's time here on the gradient of the filters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

CELLS, CHANNELS = 64, 64  # of one program
PART = 128  # cells that one program sums for the gradient of the filters


@triton.jit
def _convolve(
    x, weight, bias, plus, out, cells, height, width, channels, stride,
    K: tl.constexpr, MIRROR: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr, CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (cell // width) % height, cell % width
    inside = channel < channels
    total = tl.zeros((CELLS, CHANNELS), tl.float32)
    if BIAS:
        total += tl.load(bias + channel, inside, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(K * K):
        down, right = tap // K - K // 2, tap % K - K // 2
        there = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        there = there & (cell < cells)
        at = (cell + down * width + right).to(tl.int64) * stride
        value = tl.load(x + at[:, None] + channel[None, :], there[:, None] & inside[None, :], 0.0)
        index = K * K - 1 - tap if MIRROR else tap
        factor = tl.load(weight + channel * K * K + index, inside, 0.0)
        total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    at = cell.to(tl.int64) * channels
    if PLUS:
        there = (cell < cells)[:, None] & inside[None, :]
        total += tl.load(plus + at[:, None] + channel[None, :], there, 0.0).to(tl.float32)
    tl.store(out + at[:, None] + channel[None, :], total, (cell < cells)[:, None] & inside[None, :])


@triton.jit
def _filter_gradient(
    x, gradient, parts, cells, height, width, channels, stride,
    K: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row, column = (cell // width) % height, cell % width
    inside = channel < channels
    at = cell.to(tl.int64) * channels
    g = tl.load(gradient + at[:, None] + channel[None, :], (cell < cells)[:, None] & inside[None, :], 0.0)
    g = g.to(tl.float32)
    to = parts + tl.program_id(0).to(tl.int64) * (K * K + 1) * channels + channel
    for tap in tl.static_range(K * K):
        down, right = tap // K - K // 2, tap % K - K // 2
        there = (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        there = there & (cell < cells)
        at = (cell + down * width + right).to(tl.int64) * stride
        value = tl.load(x + at[:, None] + channel[None, :], there[:, None] & inside[None, :], 0.0)
        tl.store(to + tap * channels, tl.sum(g * value.to(tl.float32), 0), inside)
    tl.store(to + K * K * channels, tl.sum(g, 0), inside)


def _even(x: Tensor) -> tuple[Tensor, int]:
    """The map with all cells the same stride apart, which a slice of a wider map has too; and that stride."""
    step, (_, height, width, _) = x.stride(2), x.shape
    if x.stride(3) == 1 and x.stride(1) == width * step and x.stride(0) == height * width * step:
        return x, step
    return x.contiguous(), x.shape[3]


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[:3].numel(), *x.shape[1:]


@triton_op("minigated::depthwise", mutates_args={})
def depthwise(x: Tensor, weight: Tensor, bias: Tensor, mirror: bool, plus: Tensor | None) -> Tensor:
    """[B, h, w, C] with filters [C, 1, k, k] -> [B, h, w, C] in the dtype of x; `mirror` gives the map's gradient.

    `plus`, [B, h, w, C], is added to the result.
    """
    x, stride = _even(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cells, height, width, channels = _sizes(x)
    grid = (triton.cdiv(cells, CELLS), triton.cdiv(channels, CHANNELS))
    wrap_triton(_convolve)[grid](
        x, weight, bias, out if plus is None else plus.contiguous(), out, cells, height, width, channels, stride,
        K=weight.shape[-1], MIRROR=mirror, BIAS=not mirror, PLUS=plus is not None, CELLS=CELLS, CHANNELS=CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return out


@triton_op("minigated::depthwise_filters", mutates_args={})
def depthwise_filters(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """Sums over all cells: [k * k + 1, C] float32, the filters' gradient tap by tap and the bias' in the last row."""
    x, stride = _even(x)
    gradient = gradient.contiguous()
    cells, height, width, channels = _sizes(x)
    grid = (triton.cdiv(cells, PART), triton.cdiv(channels, CHANNELS))
    parts = torch.empty((grid[0], kernel * kernel + 1, channels), dtype=torch.float32, device=x.device)
    wrap_triton(_filter_gradient)[grid](
        x, gradient, parts, cells, height, width, channels, stride, K=kernel, CELLS=PART, CHANNELS=CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return parts.sum(0)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.plus = inputs[4] is not None


def filter_gradients(x: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the filters, in their shape and dtype, and of the bias, [C] float32."""
    sums = depthwise_filters(x, gradient, weight.shape[-1])
    return sums[:-1].T.reshape(weight.shape).to(weight.dtype), sums[-1]


def _backward(ctx, gradient):
    x, weight = ctx.saved_tensors
    gradient = gradient.contiguous()
    filters, bias = filter_gradients(x, gradient, weight)
    plus = gradient if ctx.plus else None
    return depthwise(gradient, weight, weight, True, None), filters, bias.to(weight.dtype), None, plus


depthwise.register_autograd(_backward, setup_context=_keep)
