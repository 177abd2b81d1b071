"""Checks of chapter 8: turns of a hand, interpolation, a larger base, YaRN's ramp."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    close,
    expect_cases,
    expect_close,
    expect_good_manners,
    expect_number,
    expect_tensor,
    refuse,
)


def thetas(width: int, base: float) -> Tensor:
    return torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)


def expect_floats(value, shape) -> None:
    expect_tensor(value, shape)
    if not value.is_floating_point():
        refuse(f"the result has the dtype {value.dtype}: return floats, it has fractions")


def others(right: Tensor, wrong: dict[str, Tensor]) -> dict[str, Tensor]:
    """The suspects that differ from the right answer here."""
    return {message: value for message, value in wrong.items() if not close(value, right)}


# ---------------------------------------------------------------------------------------------- 8.1
def turns_suspects(width: int, base: float, trained: int) -> dict[str, Tensor]:
    theta = thetas(width, base)
    right = trained * theta / (2 * math.pi)
    wrong = {
        "that is the angle at the end of the window, in radians: a full turn is 2 pi of them": trained * theta,
        "that is the wavelength, not how many of them fit": 2 * math.pi / theta,
        "that is the inverse: wavelength over trained length": 1 / right,
        "a turn is 2 pi, not pi": 2 * right,
        "the exponent is -2i/D: you have -i/D": trained * thetas(2 * width, base)[: width // 2] / (2 * math.pi),
        "the order is reversed: pair 0 is the fastest": right.flip(0),
        "whole turns only: keep the fraction, it tells which pairs never finished one": right.floor(),
        "multiplied by 2 pi instead of divided": trained * theta * 2 * math.pi,
    }
    return others(right, wrong)


@exercise(
    "8.1",
    "Turns of a clock hand",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "torch.arange(0, D, 2) is 2i for every pair. A hand that moves by theta radians a position needs 2 pi / theta "
        "positions for a turn. With D = 8, base 10,000 and 256 positions the turns are 40.7, 4.07, 0.407 and 0.0407."
    ),
    pseudo="theta_i = base to the power -2i / D\nwavelength_i = 2 pi / theta_i\nreturn trained / wavelength_i",
)
def turns_in_training(f):
    for width, base, trained in ((8, 10_000.0, 256), (6, 500.0, 40), (2, 10_000.0, 10), (32, 1e6, 4096)):
        right = trained * thetas(width, base) / (2 * math.pi)
        value = f(width, base, trained)
        expect_floats(value, (width // 2,))
        hint = f"wrong turns for width {width}, base {base:g}, {trained} positions"
        expect_close(value, right, hint, turns_suspects(width, base, trained))


# ---------------------------------------------------------------------------------------------- 8.2
def angle_suspects(length: int, width: int, base: float, factor: float) -> dict[str, Tensor]:
    theta, positions = thetas(width, base), torch.arange(length, dtype=torch.float64)
    right = torch.outer(positions / factor, theta)
    wrong = {
        "the angles are not scaled: the factor is not used": torch.outer(positions, theta),
        "multiplied by the factor: a longer text must move less, not more": torch.outer(positions * factor, theta),
        "positions are rounded down to whole ones: neighbours now share an angle": torch.outer(
            (positions / factor).floor(), theta
        ),
        "positions are counted from 0": torch.outer((positions + 1) / factor, theta),
        "the base is divided by the factor; that is another scaling": torch.outer(
            positions, thetas(width, base / factor)
        ),
        "the base is multiplied by the factor; that is another scaling": torch.outer(
            positions, thetas(width, base * factor)
        ),
        "all pairs turn at the same speed": torch.outer(positions / factor, torch.ones_like(theta)),
        "the exponent is -2i/D: you have -i/D": torch.outer(positions / factor, thetas(2 * width, base)[: width // 2]),
        "positions repeat after the trained length; they must be squeezed": torch.outer(
            positions % max(1, int(length / factor)), theta
        ),
    }
    return others(right, wrong)


@exercise(
    "8.2",
    "Squeeze the positions",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "torch.outer of positions and frequencies gives all angles. Only the positions change. With factor 4, "
        "position 4 has the angles that position 1 had."
    ),
    pseudo=(
        "theta_i = base to the power -2i / D\n"
        "position p = 0 ... length - 1, divided by factor\n"
        "return position * theta_i"
    ),
)
def interpolated_angles(f):
    cases = ((9, 4, 10_000.0, 4.0), (12, 8, 100.0, 2.5), (5, 2, 10_000.0, 8.0), (4, 6, 10_000.0, 1.0))
    for length, width, base, factor in cases:
        value = f(length, width, base, factor)
        expect_floats(value, (length, width // 2))
        right = torch.outer(torch.arange(length, dtype=torch.float64) / factor, thetas(width, base))
        hint = f"wrong angles for {length} positions, width {width}, factor {factor:g}"
        expect_close(value, right, hint, angle_suspects(length, width, base, factor), tolerance=1e-6)


# ---------------------------------------------------------------------------------------------- 8.3
def base_suspects(base: float, factor: float, width: int, pair: int) -> dict[str, float]:
    right = base * factor ** (width / (2 * pair))
    wrong = {
        "that is the base multiplied by s: pair i only turns s^(2i/D) times slower": base * factor,
        "that slows the slowest pair, whatever the pair asked for": base * factor ** (width / (width - 2))
        if width > 2
        else right,
        "a larger base makes pairs slower, yours is smaller": base / factor ** (width / (2 * pair)),
        "the exponent is upside down: D / (2i), not 2i / D": base * factor ** (2 * pair / width),
        "a pair has the exponent 2i / D; the 2 is missing": base * factor ** (width / pair),
        "pairs are counted from 0": base * factor ** (width / (2 * pair - 2)) if pair > 1 else right,
        "that is the pair's new frequency; the base is asked for": base ** (-2 * pair / width) / factor,
        "the factor is raised together with the base; only the factor has the exponent D / (2i)": (base * factor)
        ** (width / (2 * pair)),
    }
    return {message: value for message, value in wrong.items() if abs(value - right) > 1e-9 * right}


@exercise(
    "8.3",
    "The base that slows one pair",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "Write the frequency of the pair with the new base and set it equal to the old one divided by the factor. Then "
        "take both sides to the power -D / (2i). For the slowest pair it is eq. (8.2)."
    ),
    pseudo="new ^ (-2i/D) = base ^ (-2i/D) / factor\nsolve for new",
)
def base_for_pair(f):
    cases = ((10_000.0, 8.0, 32, 15), (10_000.0, 4.0, 8, 2), (500.0, 2.0, 12, 1), (10_000.0, 16.0, 16, 4))
    for base, factor, width, pair in cases:
        right = base * factor ** (width / (2 * pair))
        what = f"the base for pair {pair} of width {width}, factor {factor:g}"
        expect_number(f(base, factor, width, pair), right, what, base_suspects(base, factor, width, pair))


# ---------------------------------------------------------------------------------------------- 8.4
def yarn_by_loops(frequencies: Tensor, factor: float, trained: int) -> Tensor:
    new = []
    for theta in frequencies:
        r = trained * theta / (2 * math.pi)
        share = (r - 1) / 31 if 1 < r < 32 else (0 * r if r <= 1 else 0 * r + 1)
        new.append(theta / factor + share * (theta - theta / factor))
    return torch.stack(new)


def ramped(frequencies, factor, trained, turn=2 * math.pi, low=1.0, high=32.0, clip=True) -> Tensor:
    ramp = (trained * frequencies / turn - low) / (high - low)
    ramp = ramp.clamp(0, 1) if clip else ramp
    return (1 - ramp) * frequencies / factor + ramp * frequencies


def yarn_suspects(frequencies: Tensor, factor: float, trained: int) -> dict[str, Tensor]:
    ramp = ((trained * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
    old, slow = frequencies, frequencies / factor
    return {
        "that is interpolation: every pair is slowed by the factor": slow,
        "nothing is slowed": old,
        "the ramp is upside down: pairs with many turns keep their frequency": ramp * slow + (1 - ramp) * old,
        "the ramp is not cut off at 0 and 1": ramped(old, factor, trained, clip=False),
        "turns are counted in the longer text; the trained length decides": ramped(old, factor, trained * factor),
        "radians are taken for turns: divide by 2 pi": ramped(old, factor, trained, turn=1.0),
        "the ramp goes from 0 to 32 turns; it begins at 1": ramped(old, factor, trained, low=0.0),
        "the factor is missing where the ramp is 0": ramp * old + (1 - ramp) * old * factor,
        "there is no ramp: a step at one turn": torch.where(trained * old < 2 * math.pi, slow, old),
        "there is no ramp: a step at 32 turns": torch.where(trained * old < 64 * math.pi, slow, old),
        "the wavelengths are mixed; eq. (8.4) mixes frequencies": 1 / ((1 - ramp) * factor / old + ramp / old),
        "the result is scaled by the temperature: that belongs to cosines and sines": ramped(old, factor, trained)
        * (0.1 * math.log(factor) + 1),
    }


@exercise(
    "8.4",
    "YaRN's ramp",
    kind="fill",
    difficulty=2,
    minutes=20,
    hint=(
        "Turns first: trained * frequency / (2 pi). The ramp is a straight line through (1, 0) and (32, 1), cut off "
        "with clamp(0, 1). A pair with 16.5 turns and factor 8 keeps 0.5 + 0.5 / 8 of its frequency."
    ),
    pseudo=(
        "r = trained * theta / 2 pi\nramp = (r - 1) / (32 - 1), cut off at 0 and 1\n"
        "return (1 - ramp) * theta / factor + ramp * theta"
    ),
)
def yarn_frequencies(f):
    head = thetas(16, 10_000.0)
    cases = {
        "with factor 1 nothing changes": (head, 1.0, 1024),
        "a pair that never finished a turn is slowed by the factor, one with 32 turns or more not at all": (
            torch.tensor([1.0, 0.001], dtype=torch.float64),
            4.0,
            512,
        ),
        "wrong values between 1 and 32 turns": (head, 8.0, 1024),
        "wrong values for another head and length": (thetas(10, 500.0), 2.0, 300),
    }
    telling = {name: case for name, case in cases.items() if name != "with factor 1 nothing changes"}
    expect_cases(f, yarn_by_loops, telling, yarn_suspects)
    expect_cases(f, yarn_by_loops, cases, lambda *_: {})
    expect_good_manners(f, yarn_by_loops, {"frequencies": thetas(8, 10_000.0)}, 4.0, 256)
