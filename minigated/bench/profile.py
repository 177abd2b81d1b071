"""What a GPU does during one call: its kernels by kind, seen by torch's profiler, and how long it had nothing to do.

A GPU at work for a while runs slower than one that rested, so the call that is looked at follows others at once.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch

LONGEST = 1.0  # seconds a call may take to be looked at: a profile of ten thousand kernels takes longer than they do
WARM, MOST = 0.1, 20  # seconds of calls before that, and how many at most
OTHER = "element by element"
KINDS = (  # kind -> its kernels' names; the first that fits counts
    ("compiled", r"^triton_"),  # by torch.compile, whatever they do
    ("our kernels", r"^_(convolve|filter_gradient|forward|backward|project|gate_and_up|add|attend|embed|choose)$"),
    ("attention", r"flash|fmha|sdpa|attention|convert_dq|dot_do_o"),
    ("convolution", r"conv|fprop|dgrad|wgrad"),
    ("matrix products", r"gemm|gemv|nvjet|xmma|cutlass|cublas|splitk"),
    ("optimizer", r"adam"),
    ("copies and casts", r"^mem(cpy|set)|copy"),
)
IDLE = "waiting"  # what is left of a call's time, see `minigated.bench.targets.shares`


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel's name belongs to; `OTHER` if none."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans (start, end) cover together; kernels may overlap."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def look(step: Callable[[], object], seconds: float) -> dict | None:
    """What the last of some calls of a step on a CUDA device does, seen by the profiler.

    Args:
        seconds: what a call takes.

    Returns:
        `kinds`, milliseconds by kind, together the time in which a kernel ran; `kernels`, how many ran; `longest`, the
        five names that took longest as [name, milliseconds, runs]. None if a call takes longer than `LONGEST` or
        nothing was seen.
    """
    if seconds > LONGEST:
        return None
    from torch.profiler import ProfilerActivity, profile

    calls = 1 + min(MOST, int(WARM / seconds))
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    found = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return summary([(e.name, e.time_range.start, e.time_range.end) for e in found], calls)


def summary(kernels: list[tuple[str, float, float]], calls: int = 1) -> dict | None:
    """What `look` returns, of the kernels (name, start, end), in microseconds, of so many calls: the last one's."""
    if len(kernels) < calls:
        return None
    kernels = sorted(kernels, key=lambda kernel: kernel[1])[-(len(kernels) // calls) :]  # all calls run equally many
    kinds, names, runs = Counter(), Counter(), Counter()
    for name, start, end in kernels:
        kinds[kind_of(name)] += end - start
        names[name] += end - start
        runs[name] += 1
    covered = busy((start, end) for _, start, end in kernels)
    shrunk = covered / sum(kinds.values())  # of kernels that overlap each gets its share
    found = {kind: kinds[kind] * shrunk / 1e3 for kind in [*dict(KINDS), OTHER] if kinds[kind]}
    longest = [[name[:80], round(took / 1e3, 4), runs[name]] for name, took in names.most_common(5)]
    return {"kinds": found, "kernels": len(kernels), "longest": longest}
