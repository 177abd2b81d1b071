"""Frequencies for longer contexts: definitions, limits, transformers, and twins with a planted bug that must fail.

The rotation itself is tested with attention, in test_attention.py.
"""

import math

import pytest
import torch

from minigated.errors import InputError
from minigated.rope import (
    RAMPS,
    SCALINGS,
    RotaryTable,
    attention_factor,
    base_for_length,
    rotary_angles,
    rotary_frequencies,
    scaled_frequencies,
    yarn_loop,
    yarn_ramp,
    yarn_ramp_by_index,
)

CASES = [(32, 10_000.0, 4.0, 256), (64, 10_000.0, 8.0, 4096), (128, 1e6, 4.0, 32_768), (8, 100.0, 2.5, 64)]


def near(value, expected, tolerance=1e-6):
    return torch.allclose(torch.as_tensor(value).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=0)


# ---------------------------------------------------------------------------------------------- definitions
def test_yarn_by_hand():
    # Turns of the two pairs within 2 pi * 17 positions: 17 and 1.7. Ramp: 16/31 and 0.7/31.
    trained = round(2 * math.pi * 17)
    turns = [trained / (2 * math.pi), trained / (20 * math.pi)]
    expected = [f * (g + (1 - g) / 4) for f, g in zip((1.0, 0.1), [(r - 1) / 31 for r in turns])]
    assert near(scaled_frequencies(4, 100.0, "yarn", 4.0, trained), expected)


@pytest.mark.parametrize(("width", "base", "factor", "trained"), CASES)
def test_yarn_equals_its_loop(width, base, factor, trained):
    assert near(scaled_frequencies(width, base, "yarn", factor, trained), yarn_loop(width, base, factor, trained), 1e-5)


def test_interpolation_divides_positions():
    angles = rotary_angles(9, 8, scaling="interpolation", factor=4.0)
    assert near(angles[8], rotary_angles(3, 8)[2])


def test_a_larger_base_slows_the_slowest_pair_by_s_and_leaves_the_fastest():
    plain, slowed = rotary_frequencies(64), scaled_frequencies(64, scaling="base", factor=8.0)
    ratio = plain / slowed
    assert ratio[0] == 1 and near(ratio[-1], 8.0, 1e-4)
    assert (ratio.diff() > 0).all()
    assert near(slowed, rotary_frequencies(64, base_for_length(10_000.0, 8.0, 64)), 0)


# ---------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("ramp", RAMPS)
def test_a_factor_of_one_changes_nothing(scaling, ramp):
    scaled, plain = RotaryTable(300, 16, 10_000.0, scaling, 1.0, 64, ramp), RotaryTable(300, 16)
    assert torch.equal(scaled.cos, plain.cos) and torch.equal(scaled.sin, plain.sin)


@pytest.mark.parametrize("ramp", RAMPS)
def test_the_ramps_ends(ramp):
    width, base, trained, factor = 128, 10_000.0, 4096, 8.0
    plain = rotary_frequencies(width, base)
    slowed = plain / scaled_frequencies(width, base, "yarn", factor, trained, ramp)
    turns = trained * plain / (2 * math.pi)
    slack = 1.2 if ramp == "index" else 1.0  # whole pairs: up to one pair further
    assert (slowed[turns >= 32 * slack] == 1).all() and (turns >= 32 * slack).any()
    assert near(slowed[turns <= 1 / slack], factor) and (turns <= 1 / slack).any()
    between = slowed[(turns < 32 / slack) & (turns > slack)]
    assert len(between) and ((between > 1) & (between < factor)).all() and (slowed.diff() >= 0).all()


def test_the_ramp_is_straight_in_turns_and_in_pairs():
    plain = rotary_frequencies(128)
    ramp = yarn_ramp(plain, 4096)
    inside = (ramp > 0) & (ramp < 1)
    assert near(ramp[inside].diff() / plain[inside].diff(), 4096 / (62 * math.pi), 1e-3)
    by_index = yarn_ramp_by_index(128, 10_000.0, 4096)
    steps = by_index[(by_index > 0) & (by_index < 1)].diff()
    assert near(steps, steps[0], 1e-4) and not near(by_index, ramp, 0.1)


def test_cosines_and_sines_carry_the_attention_factor():
    table, size = RotaryTable(50, 8, scaling="yarn", factor=4.0, trained=32), 0.1 * math.log(4.0) + 1
    assert near(table.cos**2 + table.sin**2, size**2, 1e-5)
    assert [attention_factor(s, 4.0) for s in SCALINGS] == [1.0, 1.0, 1.0, size]


def test_the_table_comes_back_scaled_from_half_precision():
    table = RotaryTable(50, 8, scaling="yarn", factor=4.0, trained=32)
    assert torch.equal(RotaryTable(50, 8, scaling="yarn", factor=4.0, trained=32).bfloat16().cos, table.cos)


# ---------------------------------------------------------------------------------------------- transformers
def theirs(transformers, kind, width, base, factor, trained):
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    rope = {"rope_type": kind, "factor": factor, "rope_theta": base}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = trained
    config = transformers.Qwen3Config(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width,
        max_position_embeddings=int(trained * factor), rope_parameters=rope,
    )  # fmt: skip
    return functions[kind](config, "cpu")


@pytest.mark.parametrize(("width", "base", "factor", "trained"), CASES)
def test_transformers_has_the_same_numbers(transformers, width, base, factor, trained):
    frequencies, size = theirs(transformers, "linear", width, base, factor, trained)
    assert near(scaled_frequencies(width, base, "interpolation", factor), frequencies) and size == 1
    frequencies, size = theirs(transformers, "yarn", width, base, factor, trained)
    assert near(scaled_frequencies(width, base, "yarn", factor, trained, ramp="index"), frequencies, 1e-5)
    assert size == pytest.approx(attention_factor("yarn", factor))


def test_the_papers_ramp_is_not_that_of_transformers(transformers):
    frequencies, _ = theirs(transformers, "yarn", 128, 10_000.0, 8.0, 4096)
    ratio = scaled_frequencies(128, 10_000.0, "yarn", 8.0, 4096) / frequencies
    assert ratio.min() < 0.5 and ratio.max() < 1.05  # in the middle of the ramp, pairs turn twice as slowly here


# ---------------------------------------------------------------------------------------------- planted bugs
def yarn_holds(function) -> bool:
    """Whether `function(width, base, factor, trained)` gives YaRN's frequencies and its attention factor."""
    found = [function(*case) for case in CASES]
    frequencies = all(near(f, yarn_loop(*case), 1e-5) for (f, _), case in zip(found, CASES))
    return frequencies and all(abs(size - 0.1 * math.log(case[2]) - 1) < 1e-9 for (_, size), case in zip(found, CASES))


def ours(width, base, factor, trained):
    return scaled_frequencies(width, base, "yarn", factor, trained), attention_factor("yarn", factor)


def ramp_reversed(width, base, factor, trained):
    plain = rotary_frequencies(width, base)
    gamma = 1 - yarn_ramp(plain, trained)
    return plain * ((1 - gamma) / factor + gamma), attention_factor("yarn", factor)


def factor_forgotten(*case):
    return ours(*case)[0], 1.0


def logits_scaled_once(*case):
    return ours(*case)[0], attention_factor("yarn", case[2]) ** 0.5


def ramp_over_longer_length(width, base, factor, trained):
    return ours(width, base, factor, int(trained * factor))


def frequencies_from_the_slow_end(*case):
    return ours(*case)[0].flip(0), ours(*case)[1]


def positions_stretched(width, base, factor, trained):
    plain = rotary_frequencies(width, base)
    gamma = yarn_ramp(plain, trained)
    return plain * ((1 - gamma) * factor + gamma), attention_factor("yarn", factor)


def fast_pairs_interpolated(width, base, factor, trained):
    plain = rotary_frequencies(width, base)
    return torch.where(trained * plain / (2 * math.pi) > 32, plain / factor, plain), attention_factor("yarn", factor)


def test_yarn_holds_for_ours():
    assert yarn_holds(ours)


@pytest.mark.parametrize(
    "bug",
    [ramp_reversed, factor_forgotten, logits_scaled_once, ramp_over_longer_length, frequencies_from_the_slow_end,
     positions_stretched, fast_pairs_interpolated],
)  # fmt: skip
def test_a_planted_bug_is_seen(bug):
    assert not yarn_holds(bug)


# ---------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scaling": "ntk"}, "unknown rope scaling 'ntk'; accepted: none, base, interpolation, yarn"),
        ({"scaling": "yarn", "factor": 4.0}, "yarn needs the trained length, at least 1, got None"),
        ({"scaling": "interpolation", "factor": 0.5}, "rope factor is 0.5; accepted: a number from 1"),
        ({"scaling": "base", "factor": math.nan}, "rope factor is nan"),
        ({"factor": 4.0}, "rope factor 4 has no effect without a scaling"),
        ({"scaling": "yarn", "factor": 4.0, "trained": 8, "ramp": "log"}, "unknown yarn ramp 'log'"),
    ],
)
def test_wrong_input_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        RotaryTable(8, 4, **options)


def test_a_base_for_one_pair_is_refused():
    with pytest.raises(InputError, match="no pair of a head of width 2"):
        base_for_length(10_000.0, 2.0, 2)
