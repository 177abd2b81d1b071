"""Checks of chapter 5: stages and parameters by prediction, walls inside LCE, what a gate must do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import expect_number, expect_property, expect_tensor, refuse


# ---------------------------------------------------------------------------------------------- 5.5
def counted_stages(pixels: int, stem_stride: int, window: int) -> list[tuple[int, int, int]]:
    """Sides counted cell by cell, as strided convolutions with padding leave them."""
    side, plan = len(range(0, pixels, stem_stride)), []
    for _ in range(4):
        used = window if window < side else side
        plan.append((side, used, used // 2 if used < side else 0))
        side = len(range(0, side, 2))
    return plan


@exercise(
    "5.5",
    "Four stages",
    kind="predict",
    difficulty=1,
    minutes=10,
    hint="At 32 pixels and stride 4 the sides are 8, 4, 2, 1. Then apply the adaptive rule to each side on its own.",
    pseudo=(
        "side = pixels / stem_stride, rounded up\n"
        "four times: used = min(window, side); shift = used // 2 if the map is larger, else 0; side = side / 2, up"
    ),
)
def plan_of_stages(f):
    for case in ((32, 4, 8), (224, 4, 7), (64, 4, 4), (96, 2, 8), (30, 4, 4)):
        found, right = f(*case), counted_stages(*case)
        about = f"{case[0]} pixels, stem stride {case[1]}, window {case[2]}"
        many = isinstance(found, (list, tuple)) and len(found) == 4
        if not many or any(not isinstance(row, (list, tuple)) or len(row) != 3 for row in found):
            refuse(f"return four triples (side, window, shift); for {about} you return {found!r}")
        for stage, (row, good) in enumerate(zip(found, right), start=1):
            side, used, shift = row
            where = f"{about}, stage {stage}"
            if side != good[0]:
                if side == case[0] // case[1] // 2 ** (stage - 1):
                    refuse(f"{where}: side {side}; a side that does not come out even is rounded up")
                refuse(f"{where}: side {side}; the stem divides by its stride, each later stage by two")
            if used != good[1]:
                refuse(f"{where}: window {used}; a window is the smaller of the wanted one and the map")
            if shift != good[2]:
                if good[2] == 0:
                    refuse(f"{where}: shift {shift}; one window covers the map, so nothing is shifted")
                refuse(f"{where}: shift {shift}; half the window that is used, rounded down")


# ---------------------------------------------------------------------------------------------- 5.6
def counted_parameters(channels: int, heads: int) -> dict[str, int]:
    """Counted on the package's own module."""
    from minigated.retention import Retention

    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        fine, coarse = Retention(channels, heads), Retention(channels, heads, gate="headwise")
    return {
        "qkv": count(fine.qkv),
        "lce": count(fine.lce),
        "gate_elementwise": count(fine.gate),
        "gate_headwise": count(coarse.gate),
        "out": count(fine.out_proj),
        "total": count(fine),
    }


def parameter_suspects(name: str, channels: int, heads: int) -> dict[str, int]:
    c = channels
    suspects = {
        "qkv": {"a projection has a bias too": 3 * c * c, "queries, keys and values: three of them": c * (c + 1)},
        "lce": {
            "a depth-wise convolution has one filter a channel, not one for each pair of channels": c * (25 * c + 1),
            "the convolution has a bias": 25 * c,
            "the filter is 5 x 5": c * 10,
        },
        "gate_elementwise": {
            "the gate has no bias": c * (c + 1),
            "a score for each channel, not one a head": c * heads,
        },
        "gate_headwise": {"the gate has no bias": heads * (c + 1), "one score a head, not one a channel": c * c},
        "out": {"a projection has a bias too": c * c},
        "total": {
            "a mixer has one gate, not both": c * (5 * c + 30 + heads),
            "decay masks and rotations are buffers; and the gate is part of the mixer": c * (4 * c + 30),
        },
    }
    return suspects[name]


@exercise(
    "5.6",
    "What a mixer learns",
    kind="predict",
    difficulty=2,
    minutes=10,
    hint="A linear layer from a to b channels has a * b weights and b biases. A depth-wise filter sees one channel.",
    pseudo="qkv: 3 C (C + 1)\nlce: C filters of 25 and C biases\ngates: C C, or C H\nout: C (C + 1)\ntotal: with C C",
)
def parameters_of_a_mixer(f):
    for sizes in ((32, 2), (96, 6), (512, 16)):
        predicted, right = f(*sizes), counted_parameters(*sizes)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            where = f"{name!r} for C = {sizes[0]}, H = {sizes[1]}"
            expect_number(predicted[name], value, where, parameter_suspects(name, *sizes))


# ---------------------------------------------------------------------------------------------- 5.7
def summed(image: Tensor) -> Tensor:
    """3 x 3 sums with zeros beyond the border."""
    return F.conv2d(image[None, None], torch.ones(1, 1, 3, 3, dtype=image.dtype), padding=1)[0, 0]


def summed_in_windows(image: Tensor) -> Tensor:
    out = torch.zeros_like(image)
    for top in (0, 4):
        for left in (0, 4):
            out[top : top + 4, left : left + 4] = summed(image[top : top + 4, left : left + 4])
    return out


@exercise(
    "5.7",
    "Walls inside the local context",
    kind="break",
    difficulty=2,
    minutes=15,
    hint="A 3 x 3 filter looks one cell far. Which cells have a neighbour in another window? Where is that neighbour?",
    pseudo=(
        "choose a cell at a window's border, with a neighbour behind it\n"
        "a map of zeros, but for that neighbour\n"
        "return the map and the cell"
    ),
)
def map_that_shows_the_walls(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 3:
        refuse(f"return (map, row, column); you return {type(case).__name__}")
    image, row, column = case
    expect_tensor(image, (8, 8), "the map")
    if not all(isinstance(n, int) and 0 <= n < 8 for n in (row, column)):
        refuse(f"row {row!r} and column {column!r}: whole numbers from 0 to 7 are accepted")
    image = image.double()
    if not image.isfinite().all():
        refuse("the map holds NaN or infinity")
    top, left = row // 4 * 4, column // 4 * 4
    if image[top : top + 4, left : left + 4].any():
        refuse(f"the window of cell ({row}, {column}) is not empty: then it could differ for other reasons")
    if not image.any():
        refuse("the map is 0 everywhere: both ways give 0")
    if summed(image)[row, column] == summed_in_windows(image)[row, column]:
        if 0 < row % 4 < 3 and 0 < column % 4 < 3:
            refuse(f"cell ({row}, {column}) lies inside its window: all its neighbours are there, nothing differs")
        both = f"both give {summed(image)[row, column]:g}"
        refuse(f"at cell ({row}, {column}) {both}: the neighbours behind the wall say nothing")


# ---------------------------------------------------------------------------------------------- 5.8
def over(score) -> object:
    """A gate that multiplies by `score(logits, z)`."""
    return lambda z, logits: z * score(logits, z)


def sigma(logits: Tensor, z: Tensor | None = None) -> Tensor:
    return torch.sigmoid(logits)


RIGHT = {
    "sigmoid times z": over(sigma),
    "the same, written as a division": lambda z, logits: z / (1 + torch.exp(-logits)),
    "a steeper sigmoid": over(lambda logits, z: torch.sigmoid(2 * logits)),
}
BROKEN = {
    "no gate at all": lambda z, logits: z,
    "SiLU in place of the sigmoid: it enlarges, and turns signs": over(lambda logits, z: F.silu(logits)),
    "scores in [0.5, 1]: it never shuts": over(lambda logits, z: 0.5 + 0.5 * sigma(logits)),
    "twice the sigmoid: it enlarges when open": over(lambda logits, z: 2 * sigma(logits)),
    "half the sigmoid: it never opens wide": over(lambda logits, z: 0.5 * sigma(logits)),
    "a score that overshoots 1 on its way from shut to open": over(
        lambda logits, z: sigma(logits) * (3 - 2 * sigma(logits))
    ),
    "a SiLU that is cut off at 1: small negative logits turn the sign": over(
        lambda logits, z: F.silu(logits).clamp(max=1)
    ),
    "the sign of the logits is turned round": over(lambda logits, z: sigma(-logits)),
    "a softmax over channels: one channel's logit moves all the others": over(
        lambda logits, z: torch.softmax(logits, -1)
    ),
    "one score a head, the mean over channels": over(lambda logits, z: sigma(logits.mean(-1, keepdim=True))),
    "rows and columns of the scores are swapped": over(
        lambda logits, z: sigma(logits.transpose(1, 2).reshape(logits.shape))
    ),
    "the map of scores lies upside down": over(lambda logits, z: sigma(logits.flip(1))),
    "images share their scores": over(lambda logits, z: sigma(logits.mean(0, keepdim=True))),
    "half of z passes by the gate": lambda z, logits: 0.5 * z + 0.5 * z * sigma(logits),
    "the gate is added": lambda z, logits: z + sigma(logits),
}


@exercise(
    "5.8",
    "Prove that a gate gates",
    kind="prove",
    difficulty=3,
    minutes=25,
    hint=(
        "Four sentences, four lines: logits of -60, logits of +60, one logit changed, and the size and sign of what "
        "comes out. Use random z with both signs, and a map that is not square."
    ),
    pseudo=(
        "z, logits: random [2, 3, 4, 5]\n"
        "shut: the result at -60 is nearly 0; open: at +60 it is z\n"
        "change one logit: exactly that entry of the result moves\n"
        "the result is nowhere larger than z, and nowhere of another sign"
    ),
)
def gate_does_its_work(f):
    expect_property(f, RIGHT, BROKEN)
