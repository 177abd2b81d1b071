"""Checks of chapter 6: a pass of sigmoid attention, balanced slopes, what follows the passes."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_cases,
    expect_close,
    expect_good_manners,
    expect_refusal,
    expect_tensor,
    refuse,
)


def logistic(z: Tensor) -> Tensor:
    """The sigmoid from its definition, independent of torch's."""
    return 1 / (1 + torch.exp(-z))


# ---------------------------------------------------------------------------------------------- 6.1
def pass_reference(q: Tensor, k: Tensor, v: Tensor, slope: float, gamma: float) -> Tensor:
    rows = []
    for i in range(q.shape[-2]):
        row = torch.zeros_like(v[..., 0, :])
        for j in range(k.shape[-2]):
            score = (q[..., i, :] * k[..., j, :]).sum(-1) / math.sqrt(q.shape[-1]) + slope * (i - j)
            row = row + (logistic(score) * gamma ** abs(i - j))[..., None] * v[..., j, :]
        rows.append(row)
    return torch.stack(rows, dim=-2)


def pass_suspects(q: Tensor, k: Tensor, v: Tensor, slope: float, gamma: float) -> dict[str, Tensor]:
    cells = torch.arange(q.shape[-2])
    offset = (cells[:, None] - cells).double()
    s, d, bias = q @ k.mT / math.sqrt(q.shape[-1]), gamma ** offset.abs(), slope * offset
    right = logistic(s + bias) * d
    return {
        "a softmax instead of a sigmoid: here nothing makes the weights sum to one": torch.softmax(s + bias, -1)
        * d
        @ v,
        "a softmax and the decay inside it: that is the retention of chapter 5": torch.softmax(s + bias + d.log(), -1)
        @ v,
        "the weights are divided by their sum: eq. (6.1) divides by nothing": right / right.sum(-1, keepdim=True) @ v,
        "the decay is added inside the sigmoid as a logarithm; after a sigmoid that is another number": (
            logistic(s + bias + d.log()) @ v
        ),
        "the slope is outside the sigmoid; it shifts the score, not the weight": (logistic(s) * d + bias) @ v,
        "the slope multiplies |i - j|; with the signed offset a head looks to one side": (
            logistic(s + slope * offset.abs()) * d @ v
        ),
        "the offset is j - i instead of i - j: the head looks to the other side": logistic(s - bias) * d @ v,
        "the decay takes the signed offset: gamma^(i - j) grows on one side": logistic(s + bias) * gamma**offset @ v,
        "the slope is missing": logistic(s) * d @ v,
        "the decay is missing": logistic(s + bias) @ v,
        "the scale 1 / sqrt(D) is missing": logistic(s * math.sqrt(q.shape[-1]) + bias) * d @ v,
        "the scale is applied to the slope too": logistic(s + bias / math.sqrt(q.shape[-1])) * d @ v,
        "queries and keys are exchanged: the weights are transposed": right.mT @ v,
    }


@exercise(
    "6.1",
    "A pass that sums to anything",
    kind="fill",
    difficulty=2,
    minutes=20,
    hint=(
        "Make the offsets first, a W x W table of i - j from torch.arange. One of the two terms uses it with its sign, "
        "the other one its absolute value. There are three steps: scores, weights, output."
    ),
    pseudo=(
        "offset[i, j] = i - j\n"
        "scores = q k^T / sqrt(D) + slope * offset\n"
        "weights = sigmoid(scores) * gamma to the power |offset|\n"
        "return weights times v"
    ),
)
def sigmoid_pass(f):
    q, k, v = (draw(2, 3, 5, 4, seed=s) for s in range(3))
    expect_tensor(call(f, q, k, v, 0.5, 0.8), (2, 3, 5, 4))
    cases = {
        "with q = 0, slope 0 and gamma 1 every weight is one half": (0 * q, k, v, 0.0, 1.0),
        "with slope 0 and gamma 1 it must be plain sigmoid attention": (q, k, v, 0.0, 1.0),
        "with gamma 1 a slope of 0.5 must shift the scores": (q, k, v, 0.5, 1.0),
        "with slope 0 a gamma of 0.8 must dim the weights": (q, k, v, 0.0, 0.8),
        "wrong values with slope and decay": (q, k, v, -0.25, 0.9),
    }
    expect_cases(f, pass_reference, cases, pass_suspects)
    other = {"q": draw(3, 2), "k": draw(3, 2, seed=1), "v": draw(3, 2, seed=2)}
    expect_good_manners(f, pass_reference, other, 0.5, 0.75)


# ---------------------------------------------------------------------------------------------- 6.2
def slopes_by_rule(size, heads: int, sign=lambda h, half: 1 if h < half else -1) -> Tensor:
    half = heads // 2
    return torch.tensor([sign(h, half) * size(h % half + 1, half) for h in range(heads)], dtype=torch.float64)


def slope_suspects(heads: int) -> dict[str, Tensor]:
    right = slopes_by_rule(lambda k, half: 2.0**-k, heads)
    wrong = {
        "k starts at 1, so the steepest slope is one half": slopes_by_rule(lambda k, half: 2.0 ** -(k - 1), heads),
        "all slopes are positive: one half of the heads needs a minus sign": right.abs(),
        "all slopes are negative, as in ALiBi: only the second half is": -right.abs(),
        "the halves are exchanged: the first half is positive": -right,
        "the signs alternate; the first half is positive, the second negative": torch.stack(
            (right[: heads // 2], right[heads // 2 :]), dim=1
        ).flatten(),
        "the second half goes on with smaller numbers; it mirrors the first": slopes_by_rule(
            lambda k, half: 2.0**-k, 2 * heads
        )[:heads]
        * right.sign(),
        "that is ALiBi's sequence 2^(-8k / (H/2)); SWAT's is 2^-k": slopes_by_rule(
            lambda k, half: 2 ** (-8 * k / half), heads
        ),
        "that is ALiBi's sequence 2^(-8k / H) over all heads; SWAT's is 2^-k": torch.tensor(
            [2 ** (-8 * k / heads) for k in range(1, heads + 1)], dtype=torch.float64
        ),
        "1 / k falls too slowly; the slopes halve from head to head": slopes_by_rule(
            lambda k, half: 1 / (2 * k), heads
        ),
        "the second half is the first one backwards": torch.cat((right[: heads // 2], -right[: heads // 2].flip(0))),
    }
    return {message: value for message, value in wrong.items() if not torch.equal(value, right)}


@exercise(
    "6.2",
    "Slopes of both signs",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint="torch.arange(1, n + 1) counts from 1 to n; 2.0 ** -x works on tensors. Check the number of heads first.",
    pseudo=(
        "if H is odd (or there are no heads): raise ValueError\n"
        "half = 2^-1, 2^-2, ... 2^-(H/2)\n"
        "return half, followed by minus half"
    ),
)
def slopes_of_both_signs(f):
    results = {}
    for heads in (4, 6, 2):
        value = call(f, heads)
        expect_tensor(value, (heads,), f"the result for {heads} heads")
        if not value.is_floating_point():
            refuse(f"the slopes are {value.dtype}; they are fractions, so make them floats")
        results[heads] = value
    wanted = {heads: slopes_by_rule(lambda k, half: 2.0**-k, heads) for heads in results}
    for message in slope_suspects(6):
        if all(torch.allclose(results[h].double(), slope_suspects(h).get(message, wanted[h])) for h in results):
            refuse(message)
    for heads, value in results.items():
        expect_close(value, wanted[heads], f"wrong slopes for {heads} heads")
    expect_refusal(f, 5, about="5 heads")
    expect_refusal(f, 1, about="1 head")


# ---------------------------------------------------------------------------------------------- 6.3
def layer_norm(x: Tensor, *axes: int) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(axes, keepdim=True) + 1e-6)


def convolve(v: Tensor, kernel: Tensor) -> Tensor:
    """[B, h, w, C], shifted and added."""
    reach, height, width = kernel.shape[-1] // 2, *v.shape[1:3]
    padded = torch.nn.functional.pad(v, (0, 0, reach, reach, reach, reach))
    terms = [
        kernel[:, dy, dx] * padded[:, dy : dy + height, dx : dx + width]
        for dy in range(kernel.shape[1])
        for dx in range(kernel.shape[2])
    ]
    return sum(terms)


def end_reference(z: Tensor, v: Tensor, kernel: Tensor, w_out: Tensor) -> Tensor:
    return (layer_norm(z.flatten(-2), -1) + convolve(v, kernel)) @ w_out.mT


def end_suspects(z: Tensor, v: Tensor, kernel: Tensor, w_out: Tensor) -> dict[str, Tensor]:
    joined, local, out = z.flatten(-2), convolve(v, kernel), w_out.mT
    normed = layer_norm(joined, -1)
    return {
        "the norm is missing": (joined + local) @ out,
        "the local context is missing": normed @ out,
        "the norm is taken after the local context was added; normalise z alone": layer_norm(joined + local, -1) @ out,
        "the norm is taken after W_O; normalise before": layer_norm((joined + local) @ out, -1),
        "the convolution reads z; it reads the values v": (normed + convolve(joined, kernel)) @ out,
        "the convolution reads the normalised z; it reads the values v": (normed + convolve(normed, kernel)) @ out,
        "W_O maps z alone and the local context is added after it; both go through W_O": normed @ out + local,
        "each head is normalised by itself; the norm runs over all C channels of a cell": (
            (layer_norm(z, -1).flatten(-2) + local) @ out
        ),
        "the norm runs over the whole map; every cell has its own mean and deviation": (
            (layer_norm(joined, 1, 2, 3) + local) @ out
        ),
        "the norm runs over the cells; it runs over the channels of each cell": (layer_norm(joined, 1, 2) + local)
        @ out,
        "the mean is not subtracted: that is RMSNorm": (
            (joined / torch.sqrt((joined**2).mean(-1, keepdim=True) + 1e-6) + local) @ out
        ),
        "channels and heads of z are joined in the wrong order": (layer_norm(z.mT.flatten(-2), -1) + local) @ out,
        "rows and columns of the map are exchanged in the convolution": (normed + convolve(v, kernel.mT)) @ out,
        "w_out is a weight of nn.Linear, [outputs, inputs]: use ... @ w_out.T": (normed + local) @ w_out,
    }


@exercise(
    "6.3",
    "Normalise, then add",
    kind="fill",
    difficulty=2,
    minutes=20,
    hint=(
        "F.layer_norm(x, x.shape[-1:], eps=1e-6) normalises the last axis, so join the heads first. The convolution "
        "wants channels before height and width: permute there and back."
    ),
    pseudo=(
        "joined = z with heads and channels in one axis\n"
        "normed = layer norm of joined over its last axis\n"
        "local = depth-wise convolution of v (channels first, and back)\n"
        "return (normed + local) times w_out transposed"
    ),
)
def normalise_then_add(f):
    z, v = draw(2, 3, 5, 4, 4), draw(2, 3, 5, 16, seed=1)
    kernel, w_out = draw(16, 5, 5, seed=2) / 5, draw(16, 16, seed=3) / 4
    expect_tensor(call(f, z, v, kernel, w_out), (2, 3, 5, 16))
    cases = {
        "with a kernel of zeros only the normalised z goes through W_O": (z, v, 0 * kernel, w_out),
        "z times 50 must give the same: the norm takes its scale out": (50 * z, v, kernel, w_out),
        "wrong values for random inputs": (z, v, kernel, w_out),
    }
    expect_cases(f, end_reference, cases, end_suspects)
    other = {"z": draw(1, 4, 2, 2, 3), "v": draw(1, 4, 2, 6), "kernel": draw(6, 5, 5) / 5, "w_out": draw(6, 6) / 4}
    expect_good_manners(f, end_reference, other)
