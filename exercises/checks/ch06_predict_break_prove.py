"""Checks of chapter 6: masks that leak, pairs that decide alone, what the start and a gate amount to."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minigated.check import exercise
from minigated.expectations import expect_number, expect_property, refuse


# ---------------------------------------------------------------------------------------------- 6.4
def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1])


MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "zeroed": lambda s, v, allowed: torch.sigmoid(s * allowed) @ v,
    "minus_100": lambda s, v, allowed: torch.sigmoid(s - 100.0 * ~allowed) @ v,
    "silenced": lambda s, v, allowed: torch.sigmoid(s) @ (v * allowed.any(0)[:, None]),
}
UNSEEN = {
    "zeroed": "a forbidden pair gets the weight one half there, so its value must be large enough to show",
    "minus_100": "100 is taken from the score: what must the score be, so that this is not enough?",
    "silenced": "it leaves all pairs open as long as every cell is seen by somebody; are the values all near zero?",
}


@exercise(
    "6.4",
    "Break three masks",
    kind="break",
    difficulty=3,
    minutes=20,
    hint=(
        "A sigmoid forgets nothing: its weight does not compete, so a score that is large enough survives any finite "
        "mask. Which q and k, with entries up to 20, make s = q . k / sqrt(D) larger than 100?"
    ),
    pseudo=(
        "choose W and D, and groups of neighbouring cells; allowed[i, j] = same group\n"
        "choose q and k alike and large: q . k / sqrt(D) = sqrt(D) times the square of an entry\n"
        "choose v so that values of another group show\n"
        "return q, k, v, allowed"
    ),
)
def mask_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 4:
        refuse("return the four of (q, k, v, allowed)")
    q, k, v, allowed = case
    for name, value in zip(("q", "k", "v"), (q, k, v)):
        if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype != torch.float64:
            refuse(f"{name} must be a float64 tensor [W, D]")
        if not value.numel() or max(value.shape) > 16 or value.shape != q.shape:
            refuse(f"{name} has the shape {list(value.shape)}: q, k and v are [W, D] with W and D from 1 to 16")
        if not (value.abs() <= 20).all():  # NaN too
            refuse(f"an entry of {name} is larger than 20 in absolute value, or not a number")
    _check_groups(allowed, len(q))
    s = _scores(q, k)
    right = (torch.sigmoid(s) * allowed) @ v
    for name, wrong in MASKS.items():
        if (wrong(s, v, allowed) - right).abs().max() <= 0.1:
            refuse(f"the mask '{name}' goes unnoticed: {UNSEEN[name]}")


def _check_groups(allowed, cells: int) -> None:
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.shape != (cells, cells):
        refuse(f"allowed must be a bool tensor [{cells}, {cells}]")
    if not allowed.diagonal().all():
        refuse("a cell may not look at itself: no shifted window forbids that")
    if allowed.all():
        refuse("nothing is forbidden, so there is nothing to leak")
    starts = [0] + [i for i in range(1, cells) if not allowed[i, i - 1]]
    group = torch.tensor([sum(i >= s for s in starts) for i in range(cells)])
    if not torch.equal(allowed, group[:, None] == group):
        refuse("no shifted window has this mask: the cells of a group are neighbours and all see each other")


# ---------------------------------------------------------------------------------------------- 6.5
def _attend(weigh: Callable[[Tensor], Tensor]):
    return lambda q, k, v: weigh(_scores(q, k)) @ v


def _distance(s: Tensor) -> Tensor:
    cells = torch.arange(s.shape[-1])
    return (cells[:, None] - cells).double()


def _masked(s: Tensor) -> Tensor:
    return torch.sigmoid(s) * (_distance(s).abs() < 3)


def _share_of(weights: Tensor, axis: int) -> Tensor:
    return weights / weights.sum(axis, keepdim=True)


ALONE = {
    "plain sigmoid attention": _attend(torch.sigmoid),
    "a sigmoid with slope and decay, eq. (6.1)": _attend(
        lambda s: torch.sigmoid(s + 0.5 * _distance(s)) * 0.8 ** _distance(s).abs()
    ),
    "a sigmoid with a mask": _attend(_masked),
    "a sigmoid divided by the number of cells": _attend(lambda s: torch.sigmoid(s) / s.shape[-1]),
    "squared ReLU attention": _attend(lambda s: s.relu() ** 2),
}
SHARING = {
    "softmax attention": _attend(lambda s: torch.softmax(s, -1)),
    "a softmax multiplied by a decay (the formula of RMT's paper)": _attend(
        lambda s: torch.softmax(s, -1) * 0.8 ** _distance(s).abs()
    ),
    "a softmax over the queries": _attend(lambda s: torch.softmax(s, -2)),
    "a sigmoid divided by its row sum": _attend(lambda s: _share_of(torch.sigmoid(s), -1)),
    "a sigmoid divided by its column sum": _attend(lambda s: _share_of(torch.sigmoid(s), -2)),
    "a sigmoid divided by the row's largest weight": _attend(
        lambda s: torch.sigmoid(s) / torch.sigmoid(s).amax(-1, keepdim=True)
    ),
    "a sigmoid of scores whose row mean was taken out": _attend(lambda s: torch.sigmoid(s - s.mean(-1, keepdim=True))),
    "a softmax with one extra logit that belongs to no cell": _attend(
        lambda s: torch.softmax(torch.cat((s, torch.zeros_like(s[..., :1])), -1), -1)[..., :-1]
    ),
    "an output brought to deviation 1 over all cells": lambda q, k, v: (
        (z := torch.sigmoid(_scores(q, k)) @ v) / z.std((-2, -1), keepdim=True)
    ),
}


@exercise(
    "6.5",
    "Prove that pairs decide alone",
    kind="prove",
    difficulty=3,
    minutes=25,
    hint=(
        "Two experiments. Set v of one cell to zero, then change k of that cell: who could notice? And change q of one "
        "cell: who may? Do both for every cell, and compare with torch.allclose."
    ),
    pseudo=(
        "draw q, k, v\n"
        "for every cell c:\n"
        "    with v[c] = 0, a change of k[c] must leave every output as it was\n"
        "    a change of q[c] must leave the outputs of all other cells as they were\n"
        "return True if nothing else moved"
    ),
)
def weights_are_independent(f):
    expect_property(f, ALONE, SHARING)


# ---------------------------------------------------------------------------------------------- 6.6
def measured_growth(window: int, gamma: float) -> dict[str, float]:
    """The two passes carried out on values of 1."""
    cells = torch.arange(window)
    weights = torch.sigmoid(torch.zeros(window, window, dtype=torch.float64)) * gamma ** (cells[:, None] - cells).abs()
    rows = weights.sum(-1)
    values = torch.ones(window, window, dtype=torch.float64)
    values = torch.einsum("ij,rj->ri", weights, values)  # width
    values = torch.einsum("ij,jc->ic", weights, values)  # height
    return {
        "row_end": rows[0].item(),
        "row_middle": rows[window // 2].item(),
        "corner": values[0, 0].item(),
        "middle": values[window // 2, window // 2].item(),
        "mean": values.mean().item(),
    }


def growth_suspects(name: str, window: int, gamma: float, right: dict) -> dict[str, float]:
    end, middle, value = right["row_end"], right["row_middle"], right[name]
    two = name in ("corner", "middle", "mean")
    near, far = (middle, end) if "middle" in name else (end, middle)
    rows = right["rows"]
    suspects = {
        "a sigmoid of 0 is one half; the half is missing": value * (4 if two else 2),
        "that is the cell at the other place": far**2 if two else far,
        "the cell itself counts once, with weight one half": near + 0.5 if not two else (near + 0.5) ** 2,
        "the cell itself is left out": near - 0.5 if not two else (near - 0.5) ** 2,
    }
    if name == "row_middle":
        suspects["both sides count: the middle has neighbours left and right"] = 0.5 * sum(
            gamma**d for d in range(window // 2 + 1)
        )
    if name == "mean":
        suspects["that is a single pass; two passes multiply"] = sum(rows) / window
        suspects["two passes multiply, they do not add"] = 2 * sum(rows) / window
        suspects["average over all cells, not over the corner and the middle alone"] = (end**2 + middle**2) / 2
        suspects["average over all W x W cells, not over the diagonal"] = sum(r**2 for r in rows) / window
    elif two:
        suspects["that is a single pass; two passes multiply"] = near
        suspects["two passes multiply, they do not add"] = 2 * near
    return {message: number for message, number in suspects.items() if abs(number - value) > 1e-9}


@exercise(
    "6.6",
    "How much the start multiplies",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "Write the row of weights of the first cell for W = 3: 1/2, gamma/2, gamma^2/2. Then that of the middle cell. "
        "The height pass meets values that the width pass has already multiplied, by the same factor in every row."
    ),
    pseudo=(
        "row sum of cell i: half the sum over j of gamma^|i - j|\n"
        "row_end: i = 0; row_middle: i = W // 2\n"
        "corner and middle: the square of the row sum there\n"
        "mean: over all cells (r, c) of sum_r times sum_c, which is the square of the mean row sum"
    ),
)
def growth_at_the_start(f):
    for window, gamma in ((3, 0.5), (7, 1.0), (7, 0.9375), (13, 0.75)):
        predicted, right = f(window, gamma), measured_growth(window, gamma)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        sums = [sum(gamma ** abs(i - j) for j in range(window)) / 2 for i in range(window)]
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            suspects = growth_suspects(name, window, gamma, right | {"rows": sums})
            expect_number(predicted[name], value, f"{name!r} for W = {window}, gamma = {gamma}", suspects)


# ---------------------------------------------------------------------------------------------- 6.7
def counted_parameters(channels: int, heads: int) -> dict[str, int]:
    """Counted on modules without memory."""

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def linear(outputs: int = channels, bias: bool = True) -> nn.Module:
        return nn.Linear(channels, outputs, bias=bias, device="meta")

    convolution = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, device="meta")
    norm = nn.LayerNorm(channels, device="meta")
    rmt = [linear(), linear(), linear(), linear(), convolution]
    return {
        "rmt": count(*rmt),
        "retention": count(*rmt, linear(bias=False)),
        "headwise": count(*rmt, linear(heads, bias=False)),
        "swat": count(*rmt, linear(), norm),
        "self": count(*rmt, linear(), norm),
        "mlp": count(*rmt, linear(), linear(), norm),
        "plain": count(*rmt, norm),
    }


def parameter_suspects(name: str, right: dict[str, int], channels: int, heads: int) -> dict[str, int]:
    value, square = right[name], channels**2
    suspects = {
        "the convolution is depth-wise: one 5 x 5 filter a channel, not one for each pair of channels": (
            value - 25 * channels + 25 * square
        ),
        "a bias of C numbers is missing; convolution and LayerNorm have one too": value - channels,
        "the convolution is missing": value - 26 * channels,
        "W_O is missing": value - square - channels,
        "the linear layers have biases": value - channels * {"swat": 5, "self": 5, "mlp": 6}.get(name, 4),
        "the LayerNorm is missing": value - 2 * channels,
    }
    own = {
        "retention": {
            "G1 is bias-free": value + channels,
            "the elementwise gate has C outputs, not H": right["headwise"],
            "the gate is missing": right["rmt"],
        },
        "headwise": {
            "the headwise gate has H outputs, not C": right["retention"],
            "G1 is bias-free": value + heads,
            "the gate is missing": right["rmt"],
        },
        "swat": {
            "SiLU(uW_1) * (uW_2) takes two matrices in place of one": right["plain"],
            "there is no third matrix after the product": right["mlp"],
            "there is no output gate G1 beside the value gate": value + square,
        },
        "self": {"W reads V, so W_V is needed as well": right["plain"]},
        "mlp": {"the third matrix comes on top of the other two": right["swat"]},
        "plain": {"the plain value has one matrix": right["swat"]},
    }
    return {m: n for m, n in (own.get(name, {}) | suspects).items() if n != value}


@exercise(
    "6.7",
    "What a value gate costs",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "A linear layer from C to C with a bias has C * C + C parameters, a depth-wise 5 x 5 filter has 25 numbers a "
        "channel. Count matrices: how many of size C x C does each mixer have?"
    ),
    pseudo=(
        "rmt: 4 linear layers and the convolution, 26 C\n"
        "retention: plus C C; headwise: plus C H\n"
        "swat and self: 5 linear layers, convolution, 2 C for the norm\n"
        "mlp: one linear layer more; plain: one fewer"
    ),
)
def mixer_parameters(f):
    for channels, heads in ((12, 4), (40, 8), (1024, 32)):
        predicted, right = f(channels, heads), counted_parameters(channels, heads)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            suspects = parameter_suspects(name, right, channels, heads)
            expect_number(predicted[name], value, f"{name!r} for C = {channels}, H = {heads}", suspects)
