"""Checks of chapter 1: rotary positions, and the softmax in blocks."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    close,
    draw,
    expect_close,
    expect_good_manners,
    expect_number,
    expect_tensor,
    expect_untouched,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 1.4
def rotate_reference(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    angles = positions.double()[:, None] * base**-exponents
    points = torch.complex(x[..., :half].double(), x[..., half:].double())  # a pair is a complex number
    turned = points * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


@exercise(
    "1.4",
    "Rotary positions",
    kind="fill",
    difficulty=3,
    minutes=25,
    hint=(
        "A point (a, b) turned by an angle t is (a cos t - b sin t, b cos t + a sin t). All first members "
        "of the pairs are the first half of the channels, all second members the second half."
    ),
    pseudo=(
        "frequencies = base ** (-2 i / D) for i = 0 .. D/2 - 1\n"
        "angles = positions times frequencies, [T, D/2]\n"
        "a, b = the two halves of x\n"
        "return (a cos - b sin, b cos + a sin), joined along the channels"
    ),
)
def rotate(f):
    x, positions = draw(2, 3, 5, 8), torch.tensor([3, 4, 5, 9, 12])
    expect_tensor(call(f, x, positions), x.shape)
    expect_close(call(f, x[:, :, :1], torch.tensor([0])), x[:, :, :1], "position 0 must leave x as it is")
    turned = call(f, x, positions)
    if not close(turned.norm(dim=-1), x.norm(dim=-1)):
        refuse(
            "the length of a vector changes, so this is not a rotation: check the signs, one must be a minus"
        )
    if close(turned, call(f, x, torch.arange(5))):
        refuse("`positions` is not used: tokens 3, 4, 5, 9, 12 are turned as if they were 0, 1, 2, 3, 4")
    _check_pairs(f)
    expect_close(turned, rotate_reference(x, positions), "wrong values for positions 3, 4, 5, 9, 12")
    suspects = {"the argument `base` is not used": rotate_reference(x, positions)}
    expect_close(
        call(f, x, positions, 100.0), rotate_reference(x, positions, 100.0), "wrong for base 100", suspects
    )

    q, k = draw(1, 1, 1, 8, seed=2), draw(1, 1, 1, 8, seed=3)
    near, far = (
        (call(f, q, torch.tensor([3 + s])) * call(f, k, torch.tensor([1 + s]))).sum() for s in (0, 20)
    )
    if not close(near, far, 1e-4):
        refuse("the dot product of query and key must depend on the distance of their positions alone")
    expect_good_manners(f, rotate_reference, {"x": x}, positions)
    distant, rounded = torch.tensor([1000, 1001, 1003, 2047, 4095]), x.bfloat16()
    expect_close(
        call(f, rounded, distant),
        rotate_reference(rounded, distant),
        "far positions blur when x is bfloat16: compute the angles in float32 or better, cast at the end",
        tolerance=3e-2,
    )


def _check_pairs(f) -> None:
    one = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    one[..., 0] = 1.0
    turned = call(f, one, torch.tensor([1])).flatten()
    if close(turned, torch.tensor([math.cos(1), -math.sin(1)]).double()):
        refuse("the pair (1, 0) turns backwards, towards (0, -1): swap the two signs")
    expect_close(
        turned, torch.tensor([math.cos(1), math.sin(1)]).double(), "with D = 2 the angle is the position"
    )
    two = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    two[0, ..., 0], two[1, ..., 1] = 1.0, 1.0  # the first pair, then the second
    turned = call(f, two, torch.tensor([1])).reshape(2, 4)
    if turned[0, 1].abs() > 1e-3:
        refuse(
            "channels 0 and 1 form a pair (the interleaved layout); here channel i goes with channel i + D/2"
        )
    angle = float(torch.atan2(turned[1, 3], turned[1, 1]))
    expect_number(
        angle,
        10_000.0**-0.5,
        "the angle of the second pair at position 1 with D = 4",
        {
            "the exponent is -i / D, it must be -2 i / D": 10_000.0**-0.25,
            "the exponent is -4 i / D, it must be -2 i / D": 10_000.0**-1.0,
            "it does not differ from pair to pair": 1.0,
        },
    )


# ---------------------------------------------------------------------------------------------- 1.5
def partial(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, total and output of a block of keys: scores [T, S], v [S, D]."""
    maximum = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum)
    return maximum, weights.sum(-1, keepdim=True), weights @ v


@exercise(
    "1.5",
    "Merge two blocks of keys",
    kind="fill",
    difficulty=4,
    minutes=30,
    hint=(
        "exp(s - old maximum) times exp(old maximum - new maximum) is exp(s - new maximum): so both the "
        "total and the output of a block shrink by one factor. What is -inf minus -inf?"
    ),
    pseudo=(
        "maximum = the larger maximum\n"
        "for each block: shrink = exp(its maximum - maximum), 0 if it is empty\n"
        "total = sum of shrink * total\n"
        "output = sum of shrink * output"
    ),
)
def merge_partials(f):
    scores, v = draw(4, 6), draw(6, 3, seed=1)
    scores[:, 3:] += 4.0  # the second block is the louder one
    first, second = partial(scores[:, :3], v[:3]), partial(scores[:, 3:], v[3:])
    merged = call(f, first, second)
    if not isinstance(merged, (tuple, list)) or len(merged) != 3:
        refuse("return three tensors: maximum, total, output")
    for value, like, name in zip(merged, first, ("maximum", "total", "output")):
        expect_tensor(value, like.shape, f"`{name}`")
    _check_merged(merged, first, second, partial(scores, v))
    swapped = call(f, second, first)
    for value, expected, name in zip(swapped, partial(scores, v), ("maximum", "total", "output")):
        expect_close(value, expected, f"`{name}` is wrong when the *first* block is the louder one")

    loud = partial(scores[:, :3] + 900.0, v[:3]), partial(scores[:, 3:] + 1000.0, v[3:])
    both = partial(torch.cat((scores[:, :3] + 900.0, scores[:, 3:] + 1000.0), 1), v)
    for value, expected in zip(call(f, *loud), both):
        expect_close(
            value, expected, "overflow with scores near 1,000: only exp of a *difference* of maxima is safe"
        )
    empty = torch.full((4, 1), float("-inf")).double(), torch.zeros(4, 1).double(), torch.zeros(4, 3).double()
    for blocks in ((empty, first), (first, empty)):
        for value, expected in zip(call(f, *blocks), first):
            expect_close(
                value, expected, "merging with an empty block (maximum -inf, total 0) must change nothing"
            )
    if any(torch.isnan(value).any() for value in call(f, empty, empty)):
        refuse("two empty blocks give NaN: exp(-inf - (-inf)) needs care")
    expect_untouched(
        lambda *tensors: f(tensors[:3], tensors[3:]),
        dict(
            zip(
                ("first[0]", "first[1]", "first[2]", "second[0]", "second[1]", "second[2]"), (*first, *second)
            )
        ),
    )


def _check_merged(merged, first, second, expected) -> None:
    maximum, total, output = merged
    expect_close(maximum, expected[0], "`maximum` must be the larger one of the two, row by row")
    shrink = torch.exp(first[0] - second[0])  # right for the first block here
    totals = {
        "the totals are added without rescaling: exp(score - maximum) refers to two different maxima": (
            first[1] + second[1]
        ),
        "the exponent has the wrong sign: shrink = exp(old maximum - new maximum), which is at most 1": (
            first[1] / shrink + second[1]
        ),
        "the wrong block is rescaled: the one with the smaller maximum shrinks": first[1]
        + second[1] * shrink,
    }
    expect_close(total, expected[1], "`total` is wrong", totals)
    mean = (first[2] / first[1] + second[2] / second[1]) / 2
    outputs = {
        "`total` is rescaled, but `output` is not: the two shrink alike": first[2] + second[2],
        "`output` is already divided by `total`: divide once, after the last block": expected[2]
        / expected[1],
        "`output` is the plain mean of the two averages: blocks count by their totals": mean,
    }
    expect_close(output, expected[2], "`output` is wrong", outputs)
