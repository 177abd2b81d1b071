"""Checks of chapter 8: what a stretched sink lets through, five wrong tables, a property of safe scalings."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import expect_number, expect_property, refuse


def thetas(width: int, base: float = 10_000.0) -> Tensor:
    return torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- 8.5
def softmax_share(keys: int, margin: float, scale: float = 1.0) -> float:
    """Share of the first key, from the scores themselves."""
    scores = torch.zeros(keys, dtype=torch.float64)
    scores[0] = margin
    return torch.softmax(scale * scores, 0)[0].item()


def measured_sink(margin: float, trained: int, factor: int) -> dict[str, float]:
    table = 1 + 0.1 * math.log(factor)
    wanted, longer = softmax_share(trained, margin), trained * factor
    low, high = margin, margin + 50.0
    for _ in range(100):  # the margin that keeps the share, by halving the interval
        middle = (low + high) / 2
        low, high = (middle, high) if softmax_share(longer, middle) < wanted else (low, middle)
    return {
        "table": table,
        "scores": table**2,
        "trained": wanted,
        "longer": softmax_share(longer, margin),
        "yarn": softmax_share(longer, margin, table**2),
        "needed": low,
    }


def sink_suspects(name: str, margin: float, trained: int, factor: int, right: dict) -> dict[str, float]:
    value, longer = right[name], trained * factor
    share = lambda keys, a: 1 / (1 + (keys - 1) * math.exp(-a))
    off_by_one = lambda keys, a: 1 / (1 + keys * math.exp(-a))
    wrong = {
        "table": {
            "the logarithm is the natural one, not to base 10": 0.1 * math.log10(factor) + 1,
            "the logarithm is the natural one, not to base 2": 0.1 * math.log2(factor) + 1,
            "the 1 is missing: with s = 1 nothing may change": 0.1 * math.log(factor),
            "that is the factor of the scores": value**2,
            "that is what the softmax's temperature divides by": 1 / value,
        },
        "scores": {
            "queries and keys are both multiplied": right["table"],
            "both factors are multiplied, not added": 2 * right["table"],
            "it makes scores larger, the softmax sharper": 1 / value,
        },
        "trained": {
            "that is what leaks, not the share": 1 - value,
            "the first key is one of the n: n - 1 others": off_by_one(trained, margin),
            "the other keys are missing from the sum": 1 / (1 + math.exp(-margin)),
        },
        "longer": {
            "that is what leaks, not the share": 1 - value,
            "the text is s times as long, so more keys share": right["trained"],
            "the share does not fall in proportion: the sink's own term is in the sum": right["trained"] / factor,
            "the first key is one of the n: n - 1 others": off_by_one(longer, margin),
        },
        "yarn": {
            "the temperature is not used": right["longer"],
            "the temperature counts twice, on queries and on keys": share(longer, right["table"] * margin),
            "the temperature multiplies scores, it does not divide them": share(longer, margin / right["scores"]),
            "the temperature multiplies scores, not shares": right["scores"] * right["longer"],
        },
        "needed": {
            "the first key is not among those that multiply: (s T - 1) / (T - 1), not s": margin + math.log(factor),
            "the margin adds a logarithm, it is not multiplied by the factor": margin * factor,
            "more keys need a larger margin": 2 * margin - value,
            "that is what has to be added to the margin": value - margin,
        },
    }[name]
    return {message: number for message, number in wrong.items() if abs(number - value) > 1e-6 * max(1.0, abs(value))}


@exercise(
    "8.5",
    "A sink in a longer text",
    kind="predict",
    difficulty=3,
    minutes=20,
    hint=(
        "Equal scores may be set to 0, the first one to the margin a: the softmax gives e^a / (e^a + n - 1). Both "
        "queries and keys carry YaRN's factor. For the last entry set two of these shares equal: only (n - 1) e^-a "
        "counts."
    ),
    pseudo=(
        "share(n, a) = 1 / (1 + (n - 1) e^-a)\ntable = 0.1 ln s + 1; scores = table squared\n"
        "longer: share(s T, a); yarn: share(s T, scores * a)\nneeded: (s T - 1) e^-new = (T - 1) e^-a"
    ),
)
def stretched_sink(f):
    for margin, trained, factor in ((3.0, 16, 4), (6.0, 256, 8), (1.5, 2, 2), (7.5, 100, 10)):
        predicted, right = f(margin, trained, factor), measured_sink(margin, trained, factor)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            what = f"{name!r} for a = {margin:g}, {trained} keys, factor {factor}"
            expect_number(predicted[name], value, what, sink_suspects(name, margin, trained, factor, right))


# ---------------------------------------------------------------------------------------------- 8.6
def mixed(old: Tensor, factor: float, ramp: Tensor) -> Tensor:
    return ramp * old + (1 - ramp) * old / factor


def turn_ramp(old: Tensor, trained: float) -> Tensor:
    return ((trained * old / (2 * math.pi) - 1) / 31).clamp(0, 1)


def index_ramp(width: int, base: float, trained: float) -> Tensor:
    """Straight in the pair's number; a head of one pair has that pair alone."""
    place = lambda turns: width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
    pairs = torch.arange(width // 2, dtype=torch.float64)
    return ((place(1) - pairs) / (place(1) - place(32))).clamp(0, 1)


def tables(width: int, base: float, factor: float, trained: int) -> dict[str, Tensor]:
    """The right frequencies under "right", and the wrong ones by name."""
    old, turns = thetas(width, base), trained * thetas(width, base) / (2 * math.pi)
    return {
        "right": mixed(old, factor, turn_ramp(old, trained)),
        "squeezed": old / factor,
        "longer": mixed(old, factor, turn_ramp(old, trained * factor)),
        "unclipped": mixed(old, factor, (turns - 1) / 31),
        "index": mixed(old, factor, index_ramp(width, base, trained)),
        "step": torch.where(turns < 32, old / factor, old),
    }


UNSEEN = {
    "squeezed": "a ramp that is 0 for every pair, or a factor near 1, is interpolation",
    "longer": "the two ramps differ only for pairs between 1 / s and 32 turns; have you one there, and is s above 1?",
    "unclipped": "without the cut a pair far above 32 turns, or below 1, goes wrong; have you one far enough?",
    "index": "the two ramps share their ends; you need a pair well between 1 and 32 turns",
    "step": "it differs where the ramp is neither 0 nor 1; have you a pair well inside?",
}
RANGES = {"width": (2, 16), "base": (100, 1_000_000), "factor": (1, 16), "trained": (1, 8192)}


@exercise(
    "8.6",
    "Break five tables",
    kind="break",
    difficulty=2,
    minutes=15,
    hint=(
        "Write down the turns (8.1) of your pairs. To see all five you need a pair far above 32 turns, or well below "
        "1, and at least one between; and a factor that is worth the trouble."
    ),
    pseudo=(
        "choose T and the base so that the turns spread from over 100 to under 1\n"
        "choose D large enough for pairs in between\nchoose s well above 1"
    ),
)
def yarn_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 4:
        refuse("return the four of (width, base, factor, trained)")
    for (name, (low, high)), value in zip(RANGES.items(), case):
        whole = name in ("width", "trained")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            refuse(f"{name} is {value!r}: it must be a {'whole ' if whole else ''}number")
        if not low <= value <= high:
            refuse(f"{name} is {value!r}; accepted: {low} to {high:,}")
    if case[0] % 2:
        refuse(f"width is {case[0]}: it must be even")
    found = tables(*case)
    right = found.pop("right")
    for name, value in found.items():
        gap = float(((value - right) / right).abs().max())
        if gap <= 0.1:
            refuse(f"'{name}' goes unnoticed: {UNSEEN[name]}")


# ---------------------------------------------------------------------------------------------- 8.9
def _ramp_scaling(make_ramp: Callable) -> Callable:
    return lambda width, factor, trained: mixed(thetas(width), factor, make_ramp(width, factor, trained))


def _turns(width: int, trained: float) -> Tensor:
    return trained * thetas(width) / (2 * math.pi)


def _base_scaling(power: float = 1.0) -> Callable:
    return lambda width, factor, trained: thetas(width, 10_000.0 * (factor**power) ** (width / (width - 2)))


SAFE = {
    "YaRN, straight in turns": _ramp_scaling(lambda w, s, t: turn_ramp(thetas(w), t)),
    "YaRN, straight in pairs": _ramp_scaling(lambda w, s, t: index_ramp(w, 10_000.0, t)),
    "a step at one turn": _ramp_scaling(lambda w, s, t: (_turns(w, t) >= 1).double()),
    "a step at two turns": _ramp_scaling(lambda w, s, t: (_turns(w, t) >= 2).double()),
    "slow pairs stopped": lambda w, s, t: torch.where(_turns(w, t) < 1, 0.0, thetas(w)),
}
UNSAFE = {
    "nothing is scaled": lambda w, s, t: thetas(w),
    "interpolation": lambda w, s, t: thetas(w) / s,
    "a larger base": _base_scaling(),
    "a base that is s times larger": lambda w, s, t: thetas(w, 10_000.0 * s),
    "YaRN with turns of the longer text": _ramp_scaling(lambda w, s, t: turn_ramp(thetas(w), s * t)),
    "YaRN with its ramp upside down": _ramp_scaling(lambda w, s, t: 1 - turn_ramp(thetas(w), t)),
    "YaRN with the square root of s": lambda w, s, t: mixed(thetas(w), s**0.5, turn_ramp(thetas(w), t)),
    "YaRN, radians taken for turns": _ramp_scaling(lambda w, s, t: turn_ramp(thetas(w), 2 * math.pi * t)),
    "YaRN and its temperature on frequencies": lambda w, s, t: mixed(thetas(w), s, turn_ramp(thetas(w), t))
    * (1 + 0.1 * math.log(s)),
    "only the slowest pair is slowed": _ramp_scaling(lambda w, s, t: (torch.arange(w // 2) < w // 2 - 1).double()),
}


@exercise(
    "8.9",
    "Prove that a scaling is safe",
    kind="prove",
    difficulty=3,
    minutes=25,
    hint=(
        "Compute the old frequencies yourself. A pair never finished a turn if trained * theta is under 2 pi. For "
        "these, compare factor * trained * new with trained * old, with a little room for rounding. A width of 8 has "
        "few slow pairs: try others."
    ),
    pseudo=(
        "for several widths, factors and trained lengths:\n"
        "    old = 10,000^(-2i/D); new = scale(width, factor, trained)\n    new[0] must be 1\n"
        "    where trained * old < 2 pi: factor * new must not exceed old\nreturn True if all hold"
    ),
)
def spares_and_slows(f):
    expect_property(f, SAFE, UNSAFE)
