"""What the fast path set out to reach, and what the records of a GPU say, target by target.

A target whose rows no record holds is left open. One that was missed is shown with what a call spends its time on.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from minigated.bench.profile import IDLE

Records = Mapping[str, dict]  # suite -> its record
Rows = Mapping[str, Mapping]  # contender -> extra
Cases = Mapping[str, Rows]  # case -> its rows


@dataclass(frozen=True)
class Target:
    """A number to reach, of the fastest of our rows in a case.

    Attributes:
        what: a line's beginning. suite, case: where it is measured. ours: how the names of our rows begin.
        aim: the number. least: whether the measured one must be at least that, or at most. shown: format of both.
        theirs: rows that ours is compared with; the number is our speed over that of their fastest, and needs them all.
        extra: then the number is our time over theirs, less 1. forms: the line ends with the name of their fastest.
        key: without `theirs`, what of our row's `extra` the number is.
    """

    what: str
    suite: str
    case: str
    ours: str
    aim: float
    theirs: tuple[str, ...] = ()
    key: str = ""
    extra: bool = False
    forms: bool = False
    least: bool = True
    shown: str = "{:.2f}"


def _language() -> list[Target]:
    made, plain = [], "minigated, gate none, compiled"  # the beginning of "compiled and recorded" too
    recorded = f"{plain} and recorded"
    for width, gate, aim in ((1024, "elementwise", 0.02), (1024, "headwise", 0.02), (2048, "elementwise", 0.02),
                             (2048, "headwise", 0.01)):  # fmt: skip
        what, case = f"{gate} gate at width {width:,}, extra time of a step", f"gates, width {width}, 2048 tokens"
        ours, way = f"minigated, gate {gate}, compiled", {"extra": True, "least": False, "shown": "{:.1%}"}
        made.append(Target(what, "lm", case, ours, aim, (plain, recorded), **way))
    for size, share in (("110 M", 0.45), ("350 M", 0.50)):
        case, peer = f"training, {size}", "transformers Qwen3, compiled"
        what = f"{size} model, share of the matrix rate"
        made.append(Target(what, "lm", case, plain, share, key="flop_share", shown="{:.0%}"))
        what = f"{size} model, times as fast as {peer}"
        made.append(Target(what, "lm", case, plain, 1.3, (peer,)))
        made.append(Target(f"{what}, recorded too", "lm", case, plain, 1.3, (peer, f"{peer} and recorded")))
    forms = ("(eager), eager", "(grouped_mm), eager", "(grouped_mm), compiled")
    peers = tuple(f"transformers Qwen3-MoE {form}" for form in forms)
    for experts in (16, 64):
        case, ours = f"model, {experts} experts, training", "minigated, experts"
        dense = "minigated, dense, same active operations, compiled"
        what = f"{experts} experts, speed over that of a dense model with as many active operations"
        made.append(Target(what, "moe", case, ours, 0.6, (dense,)))
        made.append(Target(f"{what}, recorded too", "moe", case, ours, 0.6, (dense, f"{dense} and recorded")))
        what = f"{experts} experts, times as fast as the fastest of transformers' Qwen3-MoE,"
        made.append(Target(what, "moe", case, ours, 1.0, peers, forms=True))
    for size, aim in (("350 M", 2.5), ("1.7 B", 1.5)):
        case, ours = f"decoding, {size}", "minigated, static cache, fused"
        what = f"decoding {size}, a token's time over reading the weights"
        made.append(Target(what, "generate", case, ours, aim, key="against_weights", least=False))
        what = f"decoding {size}, times as fast as transformers' compiled static cache"
        made.append(Target(what, "generate", case, ours, 1.0, ("transformers generate, static cache",)))
    return made


def _vision() -> list[Target]:
    made = []
    for mixer in ("retention", "swat"):
        for window in (4, 7, 8):
            case, name = f"{mixer} window {window} training", f"{mixer} core, window {window}"
            what = f"{name}, times as fast as eager matrices"
            made.append(Target(what, "retention", case, "", 5.0, ("matmul, eager",)))
            what = f"{name}, share of the copy bandwidth"
            made.append(Target(what, "retention", case, "", 0.6, key="byte_share", shown="{:.0%}"))
    swin, ours = "timm Swin, equal parameters", "minigated retention"
    for case in ("32 px, small, training", "224 px, small, training", "224 px, paper, training"):
        name = f"backbone, {case.removesuffix(', training')}, times as fast as timm's Swin"
        made.append(Target(f"{name}, compiled", "vit", case, ours, 1.0, (f"{swin}, compiled",)))
        both = (f"{swin}, compiled", f"{swin}, compiled and recorded")
        made.append(Target(f"{name}, recorded too", "vit", case, ours, 1.0, both))
    for mixer in ("retention", "swat"):
        case, what = "224 px, paper, training", f"backbone, 224 px, paper's size, {mixer}, images/s"
        made.append(Target(what, "vit", case, f"minigated {mixer}", 1260, key="per_second", shown="{:,.0f}"))
    return made


TARGETS = [*_language(), *_vision()]


def by_case(record: Mapping) -> Cases:
    """The rows of a bench record by case and contender, in their order."""
    found: dict[str, dict[str, Mapping]] = {}
    for row in record["rows"]:
        found.setdefault(row["extra"]["case"], {})[row["extra"]["contender"]] = row["extra"]
    return found


def rows_of(target: Target, records: Records) -> Rows:
    """The timed rows of the target's case in a record of a GPU."""
    record = records.get(target.suite)
    if record is None or record["id"].endswith("_cpu"):
        return {}
    return by_case(record).get(target.case, {})


def fastest(rows: Rows, start: str) -> Mapping | None:
    """The fastest of the rows whose names begin so."""
    found = [extra for name, extra in rows.items() if name.startswith(start)]
    return max(found, key=lambda extra: extra["per_second"], default=None)


def reached(target: Target, records: Records) -> tuple[float, bool] | None:
    """The measured number and whether it is good enough; None where rows for it are missing."""
    rows = rows_of(target, records)
    ours, peers = fastest(rows, target.ours), [rows.get(name) for name in target.theirs]
    if ours is None or None in peers:
        return None
    value = ours[target.key] if target.key else ours["per_second"] / max(peer["per_second"] for peer in peers)
    value = 1 / value - 1 if target.extra else value
    return value, value >= target.aim if target.least else value <= target.aim


def shares(extra: Mapping) -> dict[str, float]:
    """Parts of a row's time by kind of kernel, of its profile; `IDLE` is what no kernel fills, between calls too."""
    kinds = {kind: time for kind, time in extra["profile"]["kinds"].items() if kind != IDLE}  # the first record has it
    found = {kind: time / extra["median_ms"] for kind, time in kinds.items()}
    full = max(1.0, sum(found.values()))  # the call that was looked at may have been slower than the median
    found = {kind: share / full for kind, share in found.items()}
    return found | {IDLE: max(0.0, round(1 - sum(found.values()), 6))}


def fastest_form(target: Target, records: Records) -> str:
    """ "(grouped_mm), eager": of the forms of one peer the fastest, without the words that all begin with."""
    shared, rows = os.path.commonprefix(target.theirs), rows_of(target, records)
    name = max(target.theirs, key=lambda name: rows[name]["per_second"])
    return name[shared.rfind(" ") + 1 :]


def where(target: Target, records: Records) -> str:
    """ "matrix products 49%, compiled 25%, ...": parts of our row's time, largest first, below 5 % left out; or ""."""
    ours = fastest(rows_of(target, records), target.ours)
    if ours is None or not ours["profile"]:
        return ""
    parts = sorted(shares(ours).items(), key=lambda part: -part[1])
    return f"{ours['contender']}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in parts if share >= 0.05)


def tally(record: dict) -> str:
    """ "3 of 12 targets reached", of the targets that a suite's record answers; "" if it answers none."""
    suite = record["id"].removeprefix("ch09_bench_")
    found = [reached(target, {suite: record}) for target in TARGETS if target.suite == suite]
    found = [one[1] for one in found if one]
    return f"{sum(found)} of {len(found)} targets reached" if found else ""


def measured(target: Target, value: float, good: bool) -> str:
    """The number as the aim is shown; a near miss with so many digits more that it does not look like the aim."""
    shown = target.shown
    while not good and shown.format(value) == shown.format(target.aim):
        shown = re.sub(r"\.(\d)", lambda found: f".{int(found[1]) + 1}", shown)
    return shown.format(value)


def targets_table(records: Records) -> str:
    """The targets as a Markdown table: aim, measured, reached or what a call is; below it how many are open."""
    lines, left, last = ["| target | aim | measured | |", "|---|---:|---:|---|"], [], ""
    for target in TARGETS:
        found = reached(target, records)
        if found is None:
            left.append(target.suite)
            continue
        aim = ("≥\N{NO-BREAK SPACE}" if target.least else "≤\N{NO-BREAK SPACE}") + target.shown.format(target.aim)
        why = "" if found[1] else where(target, records)
        said = "reached" if found[1] else f"missed; {'as above' if why == last else why}" if why else "missed"
        last = why
        what = f"{target.what} {fastest_form(target, records)}" if target.forms else target.what
        lines.append(f"| {what} | {aim} | {measured(target, *found)} | {said} |")
    table = ["\n".join(lines)] if len(lines) > 2 else []
    open_ = [f"Not measured on a GPU yet: {len(left)} targets, suites {', '.join(dict.fromkeys(left))}."]
    return "\n\n".join([*table, *(open_ if left else [])])
