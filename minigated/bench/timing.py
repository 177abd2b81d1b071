"""How a row is timed: warm first, then in turns with the rows it is compared with, so a busy moment hits all alike.

One sample is a group of calls long enough for the clock; its time is divided by the calls. What a row reports is the
median of its samples and their quartiles: a mean would carry the one sample during which something else ran.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch

SAMPLE_SECONDS = 0.002  # a sample is at least this long, next to a clock that reads in microseconds
MOST_CALLS = 200  # in one sample; a GPU's queue holds about a thousand launches
LEAST_SAMPLES = 5  # quartiles of fewer say nothing


class Timer:
    """Seconds of calls on one device: CUDA events on a GPU, the processor's clock elsewhere.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        """Seconds on the host's clock, after the device has done everything it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, step: Callable[[], object], calls: int) -> float:
        """Seconds one call takes, averaged over `calls` calls that follow each other."""
        start = self.now()
        if self.device.type != "cuda":
            for _ in range(calls):
                step()
            return (self.now() - start) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            step()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1e3 / calls


class Memory:
    """Peak memory of one row on a GPU, other rows' memory not counted; None on a CPU, whose allocator keeps no count.

    `held` is what the row keeps between calls (weights, gradients, optimizer state, captured graphs), `peak` is that
    and the most a call adds to it, in bytes.
    """

    def __init__(self, device: torch.device):
        self.device, self.held, self.peak = device, None, None
        self.before = self._now()

    def _now(self) -> int:
        if self.device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)

    def measure(self, step: Callable[[], object]) -> None:
        """Runs one call and reads what it held and what it added."""
        if self.device.type != "cuda":
            return
        start = self._now()
        self.held = start - self.before
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device) - start + self.held


def calls_in_a_sample(seconds: float, sample: float = SAMPLE_SECONDS) -> int:
    """How many calls of `seconds` each fill a sample."""
    return min(MOST_CALLS, max(1, round(sample / max(seconds, 1e-9) + 0.5)))


def warm_up(step: Callable[[], object], timer: Timer, calls: int = 3) -> tuple[float, float]:
    """Runs a step until it has nothing left to prepare.

    Returns:
        Seconds of the first call (where a compiler works), and of one of the later ones.
    """
    start = timer.now()
    step()
    first = timer.now() - start
    return first, min(timer.seconds(step, 1) for _ in range(calls))


def interleave(
    steps: dict[str, Callable[[], object]],
    estimates: dict[str, float],
    timer: Timer,
    samples: int,
    seconds: float = float("inf"),
    shown: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """Takes samples of all steps in turns.

    Args:
        steps: what to time, by name. estimates: seconds a call, from `warm_up`.
        samples: of each step. seconds: end the rounds after this long, though never before `LEAST_SAMPLES`.
        shown: called with the number of rounds done.

    Returns:
        Seconds a call, one value a sample, for every step equally many. Each round starts with another step, so that
        none always follows the same neighbour.
    """
    names = list(steps)
    calls = {name: calls_in_a_sample(estimates[name]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    start = timer.now()
    for done in range(samples):
        if done >= LEAST_SAMPLES and timer.now() - start >= seconds:
            break
        turn = done % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            times[name].append(timer.seconds(steps[name], calls[name]))
        if shown is not None:
            shown(done + 1)
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, that value."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    return tuple(statistics.quantiles(times, n=4, method="inclusive"))
