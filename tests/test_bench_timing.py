"""The timing core with a clock that stands still unless a step moves it, and rows that are wrong, absent or broken."""

import time
import types

import pytest
import torch

from minigated.bench import ceilings
from minigated.bench.ceilings import copy_bandwidth, matrix_rate
from minigated.bench.rows import Absent, Case, Prepared, Row, difference, measure_case
from minigated.bench.timing import (
    LEAST_SAMPLES,
    MOST_CALLS,
    Memory,
    Timer,
    calls_in_a_sample,
    interleave,
    spread,
    warm_up,
)

CPU = torch.device("cpu")


class FakeTimer(Timer):
    """Time passes only where `pass_` says so."""

    def __init__(self):
        super().__init__(CPU)
        self.time, self.calls = 0.0, []

    def now(self) -> float:
        return self.time

    def pass_(self, name: str, *seconds: float):
        """A step that takes these seconds at its first, second, ... call, and the last of them from then on."""
        left = list(seconds)

        def step():
            self.calls.append(name)
            self.time += left.pop(0) if len(left) > 1 else left[0]

        return step


def test_first_call_is_kept_apart_and_later_ones_give_the_estimate():
    timer = FakeTimer()
    first, later = warm_up(timer.pass_("a", 5.0, 0.5, 0.25, 0.5), timer, calls=3)
    assert (first, later) == (5.0, 0.25)


def test_rows_take_turns_and_none_always_follows_the_same():
    timer = FakeTimer()
    steps = {name: timer.pass_(name, 1.0) for name in "abc"}
    times = interleave(steps, dict.fromkeys("abc", 1.0), timer, samples=6)
    rounds = ["".join(timer.calls[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert times == {name: [1.0] * 6 for name in "abc"}


def test_a_short_call_is_repeated_until_the_clock_can_read_it():
    timer = FakeTimer()
    times = interleave({"fast": timer.pass_("fast", 1e-4)}, {"fast": 1e-4}, timer, samples=5)
    assert len(timer.calls) == 5 * calls_in_a_sample(1e-4) and calls_in_a_sample(1e-4) >= 20
    assert times["fast"] == pytest.approx([1e-4] * 5)  # a call, not a sample
    assert calls_in_a_sample(0.0) == MOST_CALLS and calls_in_a_sample(10.0) == 1


def test_a_budget_ends_the_rounds_but_not_before_the_quartiles_mean_something():
    timer = FakeTimer()
    step = timer.pass_("a", 1.0)
    assert len(interleave({"a": step}, {"a": 1.0}, timer, samples=50, seconds=8.0)["a"]) == 8
    assert len(interleave({"a": step}, {"a": 1.0}, timer, samples=50, seconds=0.5)["a"]) == LEAST_SAMPLES


def test_one_slow_sample_moves_the_mean_and_not_the_median():
    lower, median, upper = spread([1.0, 1.0, 1.0, 1.0, 100.0])
    assert (lower, median, upper) == (1.0, 1.0, 1.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0) and spread([7.0]) == (7.0, 7.0, 7.0)


def test_a_real_clock_sees_a_real_sleep():
    assert 0.009 < Timer(CPU).seconds(lambda: time.sleep(0.01), 2) < 1  # a call, however busy the machine is


# ---------------------------------------------------------------------------------------------- outputs
def test_difference_is_relative_and_infinite_where_nothing_can_be_compared():
    x = torch.ones(4)
    assert difference([x], [x]) == 0.0
    assert difference([x * 1.01], [x]) == pytest.approx(0.01, rel=1e-4)
    assert difference([1000 * x * 1.01, x], [1000 * x, x]) == pytest.approx(0.01, rel=1e-4)  # the worst of them
    assert difference([x], [x.view(2, 2)]) == float("inf") and difference([x], [x, x]) == float("inf")
    assert difference([x * float("nan")], [x]) == difference([x], [x * float("nan")]) == float("inf")
    assert difference([x], [torch.zeros(4)]) == pytest.approx(2.0)


def rows_of(timer: FakeTimer, got: torch.Tensor, dtype=torch.float32) -> list[dict]:
    """A reference and a contender that computes `got` where ones are right."""
    ones = torch.ones(8)
    rows = [
        Row("reference", lambda: Prepared(timer.pass_("reference", 1.0)), state="reference", items=3),
        Row("contender", lambda: Prepared(timer.pass_("contender", 0.5), lambda: ([got], [ones])), items=3),
    ]
    return measure_case(Case("case", rows, dtype=dtype), timer, samples=5)


def test_an_equal_row_is_timed_with_its_error_beside_it():
    timer = FakeTimer()
    reference, contender = rows_of(timer, torch.ones(8) + 1e-6)
    assert (reference["median"], contender["median"]) == (1.0, 0.5)
    assert contender["state"] == "equal" and 0 < contender["error"] < 1e-4 and reference["error"] is None
    assert len(contender["times"]) == 5 and contender["quartiles"] == [0.5, 0.5]


@pytest.mark.parametrize("got", [torch.ones(8) * 1.01, torch.ones(8) * float("nan"), torch.ones(7)])
def test_a_wrong_row_is_reported_and_never_timed(got):
    timer = FakeTimer()
    reference, contender = rows_of(timer, got)
    assert contender["state"] == "wrong" and "differs from the reference" in contender["reason"]
    assert contender["times"] == [] and "contender" not in timer.calls
    assert len(reference["times"]) == 5


def test_bfloat16_rounding_is_accepted_and_a_bug_is_not():
    assert rows_of(FakeTimer(), torch.ones(8) * 1.01, torch.bfloat16)[1]["state"] == "equal"
    assert rows_of(FakeTimer(), torch.ones(8) * 1.03, torch.bfloat16)[1]["state"] == "wrong"


@pytest.mark.parametrize("after", [4, 7])  # all rows once more, or a sample
def test_a_row_that_fails_late_fails_its_case_and_no_other(after):
    timer, left = FakeTimer(), iter(range(after))

    def step():
        if next(left, None) is None:
            raise RuntimeError("no memory")
        timer.pass_("late", 1.0)()

    rows = [Row("fine", lambda: Prepared(timer.pass_("fine", 1.0))), Row("late", lambda: Prepared(step))]
    found = measure_case(Case("case", rows), timer, samples=5)
    assert [(one["state"], one["reason"], one["times"]) for one in found] == [
        ("failed", "RuntimeError: no memory", [])
    ] * 2


def test_absent_and_broken_rows_are_listed_beside_those_that_run():
    timer = FakeTimer()

    def missing():
        raise Absent("tetris is not installed")

    def breaks():
        raise RuntimeError("no kernel\nlong story")

    rows = [Row("peer", missing), Row("broken", breaks), Row("runs", lambda: Prepared(timer.pass_("runs", 1.0)))]
    peer, broken, runs = measure_case(Case("case", rows), timer, samples=5)
    assert (peer["state"], peer["reason"]) == ("absent", "tetris is not installed")
    assert (broken["state"], broken["reason"]) == ("failed", "RuntimeError: no kernel")
    assert peer["times"] == broken["times"] == [] and len(runs["times"]) == 5


# ---------------------------------------------------------------------------------------------- the machine
def test_ceilings_count_a_multiply_and_an_add_as_two_and_a_copy_both_ways():
    class EveryCall(FakeTimer):
        def seconds(self, step, calls):
            step()
            return 0.5

    assert matrix_rate(EveryCall(), 16, torch.float32, samples=3) == 2 * 16**3 / 0.5
    assert copy_bandwidth(EveryCall(), 1, samples=3) == 2 * 2**20 / 0.5


def test_a_processor_keeps_no_count_of_memory():
    memory = Memory(CPU)
    memory.measure(lambda: None)
    assert memory.held is None and memory.peak is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_is_what_a_row_holds_and_what_a_call_adds():
    device, kept = torch.device("cuda"), []
    other = torch.empty(2**24, device=device)  # another row's, not counted
    memory = Memory(device)
    kept.append(torch.empty(2**20, device=device))  # 4 MiB
    memory.measure(lambda: torch.empty(2**21, device=device))  # 8 MiB more
    assert memory.held == 4 * 2**20 and memory.peak == 12 * 2**20 and other.numel()


@pytest.mark.parametrize(("took", "calls"), [(1e-3, [3] * 10), (1.0, [1] * 5)])
def test_a_slow_machine_gives_few_samples_of_its_limit(took, calls, monkeypatch):
    """Ten samples of three calls at a GPU's size would take a processor minutes."""
    asked = []
    monkeypatch.setattr(ceilings, "warm_up", lambda step, timer: (took, took))
    timer = types.SimpleNamespace(device=torch.device("cpu"), seconds=lambda step, n: asked.append(n) or 2.0)
    assert ceilings.matrix_rate(timer, 4, torch.float32) == 2 * 4**3 / 2.0 and asked == calls
