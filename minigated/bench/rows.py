"""What is timed: rows in cases. A case is one piece of work; its rows are the contenders that do it.

A row's output is compared with the reference form's before anything is timed. One that differs is reported as wrong
and never timed: how fast a wrong answer comes is of no interest.
"""

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minigated.bench.profile import look
from minigated.bench.timing import Memory, Timer, interleave, spread, warm_up

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of `difference`; sums run in another order


class Absent(Exception):
    """Raised by a row's `prepare` when the peer cannot run here; the message says why."""


@dataclass
class Prepared:
    """A row that is ready to run.

    Attributes:
        step: one call of the work.
        check: returns (what this row computes, what the reference form computes), tensors in the same order; it runs
            before the first sample. None for the reference itself, or for a peer that is another function.
        flops: of one call, where the row did not know them before the model was built.
        tolerance: of `difference`; `TOLERANCE` of the case's dtype by default.
        facts: what is worth keeping beside the time, JSON-able, e.g. the number of parameters.
        counted: whether the allocator sees its memory; that of a CUDA graph it does not.
        before: what a call does before its items begin to repeat, e.g. to read a prompt and write the first token.
    """

    step: Callable[[], object]
    check: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]] | None = None
    facts: dict = field(default_factory=dict)
    tolerance: float | None = None
    flops: float | None = None
    counted: bool = True
    before: Callable[[], object] | None = None


@dataclass
class Row:
    """A contender.

    Attributes:
        name: unique in its case. prepare: builds it on the device.
        state: what it is if all goes well: "equal" is earned by the check; "reference" and "other function" are not
            checked. It may become "wrong", "absent", "failed" or "not run".
        flops, bytes: of one call, by formula; None where no formula is given.
        items: tokens, images or maps a call works on.
        weight_bytes: of decoding, the part of `bytes` that are weights: what a token cannot be faster than.
    """

    name: str
    prepare: Callable[[], Prepared]
    state: str = "equal"
    flops: float | None = None
    bytes: float | None = None
    items: int = 1
    weight_bytes: float | None = None


@dataclass
class Case:
    """Rows that do the same work. `unit` is what `items` counts; `dtype` decides the tolerance of the check."""

    name: str
    rows: list[Row]
    unit: str = "tokens"
    dtype: torch.dtype = torch.float32


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of the tensors, |got - expected| / |expected| in Frobenius norms.

    Infinite where shapes or counts differ or a value is not finite. Of a zero tensor the absolute error counts.
    """
    if len(got) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected):
        if a.shape != b.shape or not bool((a.isfinite() & b.isfinite()).all()):
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        size = b.norm().item()
        worst = max(worst, (a - b).norm().item() / (size if size > 0 else 1.0))
    return worst


def measure_case(
    case: Case, timer: Timer, samples: int, seconds: float = float("inf"), shown: Callable[[str], object] | None = None
) -> list[dict]:
    """Prepares, checks, warms and times all rows of a case; see `untimed` for what a result holds.

    Args:
        samples, seconds: see `minigated.bench.timing.interleave`.
        shown: called with the name of each row that is done with its preparation.

    Returns:
        One dict a row, in the order of the case.
    """
    steps, estimates, results = {}, {}, []
    for row in case.rows:
        result, step = _start(case, row, timer)
        results.append(result)
        if step is not None:
            steps[row.name], estimates[row.name] = step, result["call_seconds"]
        if shown is not None:
            shown(row.name)
    times = {}
    try:
        for step in steps.values():  # once more, now that all share the memory: its pool grows here, not in a sample
            step()
        times = interleave(steps, estimates, timer, samples, seconds)
    except Exception as error:  # memory that one row alone had, for one; the next case goes on
        for result in results:
            result |= _failure(error) if result["row"] in steps else {}
    for result in results:
        if result["row"] in times:
            lower, median, upper = spread(times[result["row"]])
            result |= {"times": times[result["row"]], "median": median, "quartiles": [lower, upper]}
            if timer.device.type == "cuda":
                with contextlib.suppress(Exception):  # the times are there, whatever a profiler says
                    result["profile"] = look(steps[result["row"]], median)
    steps.clear()
    _forget(timer.device)
    return results


def untimed(case: Case, row: Row) -> dict:
    """What is known of a row before anything runs.

    The keys of a result: case, row, unit, dtype, state, reason (why it is not timed), error (see `difference`), flops,
    bytes, weight_bytes, items, first_seconds (of the first call after the check), call_seconds, before_seconds,
    held_bytes, peak_bytes, times, facts, profile (see `minigated.bench.profile.look`); and of a timed row
    prepare_seconds (until it was built and checked, in which most compile), median and quartiles.
    """
    return {
        "case": case.name, "row": row.name, "unit": case.unit, "dtype": str(case.dtype).removeprefix("torch."),
        "state": row.state, "reason": None, "error": None, "flops": row.flops, "bytes": row.bytes, "items": row.items,
        "first_seconds": None, "call_seconds": None, "held_bytes": None, "peak_bytes": None, "times": [], "facts": {},
        "weight_bytes": row.weight_bytes, "before_seconds": None, "profile": None,
    }  # fmt: skip


def _start(case: Case, row: Row, timer: Timer) -> tuple[dict, Callable | None]:
    """Prepares, checks and warms a row: its result so far, and its step unless there is nothing to time."""
    result = untimed(case, row)
    memory = Memory(timer.device)
    try:
        start = timer.now()
        prepared = row.prepare()
        if prepared.check is not None:
            result["error"] = difference(*prepared.check())
            accepted = TOLERANCE[case.dtype] if prepared.tolerance is None else prepared.tolerance
            if result["error"] > accepted:
                reason = f"differs from the reference by {result['error']:.1e}, {accepted:.0e} is accepted"
                return result | {"state": "wrong", "error": min(result["error"], 1e30), "reason": reason}, None
        result["prepare_seconds"] = timer.now() - start
        result["first_seconds"], result["call_seconds"] = warm_up(prepared.step, timer)
        if prepared.before is not None:
            result["before_seconds"] = warm_up(prepared.before, timer)[1]
        if prepared.counted:
            memory.measure(prepared.step)
    except Absent as reason:
        return result | {"state": "absent", "reason": str(reason)}, None
    except Exception as error:  # whatever a peer or a compiler raises must not take the other rows with it
        _forget(timer.device)
        return result | _failure(error), None
    result |= {"held_bytes": memory.held, "peak_bytes": memory.peak, "facts": prepared.facts}
    result["flops"] = row.flops if prepared.flops is None else prepared.flops
    return result, prepared.step


def _failure(error: Exception) -> dict:
    """State and reason of a row that raised; the error forgets where, which would keep the row's tensors alive."""
    error.__traceback__ = None
    said = str(error).strip()
    return {"state": "failed", "reason": f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"[:200]}


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
