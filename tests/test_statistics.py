"""The rules by which claims are judged."""

import math

import pytest

from minigated.statistics import bootstrap_rank_correlation, paired_difference, rank_correlation, ranks, verdict


def test_ranks_share_ties():
    assert ranks([30.0, 10.0, 20.0, 10.0]) == [4.0, 1.5, 3.0, 1.5]


def test_rank_correlation_sees_order_and_not_size():
    assert rank_correlation([1, 2, 3, 4], [10, 200, 3000, 40000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # by hand: ranks 1 2 3 against 1 3 2 give 1 - 6 * 2 / (3 * 8) = 0.5
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)


def test_bootstrap_interval_is_wide_for_noise_and_narrow_for_order():
    ordered = [[i + 0.01 * s for s in range(3)] for i in range(15)]
    low, high = bootstrap_rank_correlation(ordered, list(range(15)))
    assert low > 0.95 and high <= 1.0
    noise = [[math.sin(12.9898 * i) * 43758 % 1] * 3 for i in range(15)]
    low, high = bootstrap_rank_correlation(noise, list(range(15)))
    assert low < 0 < high or high - low > 0.5


def test_paired_difference_uses_pairs():
    mean, error = paired_difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])  # unpaired spread is large, paired is nothing
    assert mean == pytest.approx(0.1) and error == pytest.approx(0.0, abs=1e-12)
    assert paired_difference([1.0], [2.0]) == (-1.0, None)


@pytest.mark.parametrize(
    ("values", "baseline", "sign", "expected"),
    [
        ([0.9, 1.9, 2.9], [1.0, 2.0, 3.01], -1, "reproduced"),
        ([0.9, 2.3, 2.5], [1.0, 2.0, 3.0], -1, "direction only"),
        ([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], -1, "not at this scale"),
        ([1.1, 2.1, 3.11], [1.0, 2.0, 3.0], +1, "reproduced"),
        ([0.5], [1.0], -1, "direction only"),  # one pair has no spread to compare with
    ],
)
def test_verdict_by_the_rule(values, baseline, sign, expected):
    assert verdict(values, baseline, sign) == expected
