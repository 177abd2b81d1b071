"""What the fast path set out to reach, and what the records of a GPU say, target by target.

A target whose rows no record holds yet is left open. One that was missed is shown with where its time goes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from minigated.bench.profile import IDLE

Records = Mapping[str, dict]  # suite -> its record


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        what: a sentence's beginning. suite, case: where it is measured. row: the beginning of the names of
            rows whose fastest has the profile that explains a miss.
        aim: the number. least: whether the measured one must be at least that, or at most.
        measure: of the case's rows (name -> extra), the measured number. shown: format of both.
    """

    what: str
    suite: str
    case: str
    row: str
    aim: float
    measure: Callable[[Mapping[str, dict]], float]
    least: bool = True
    shown: str = "{:.2f}"


def speed(rows: Mapping[str, dict], ours: str, theirs: str) -> float:
    """The fastest row of ours over the fastest of theirs; a row counts whose name begins with the word."""
    best = lambda word: max(extra["per_second"] for name, extra in rows.items() if name.startswith(word))
    return best(ours) / best(theirs)


def ratio(ours: str, theirs: str) -> Callable[[Mapping[str, dict]], float]:
    """`speed` of these two."""
    return lambda rows: speed(rows, ours, theirs)


def of(row: str, key: str) -> Callable[[Mapping[str, dict]], float]:
    """One number of one row."""
    return lambda rows: rows[row][key]


def _gates() -> list[Target]:
    made = []
    for width in (1024, 2048):
        for gate, aim in (("elementwise", 0.02), ("headwise", 0.02 if width == 1024 else 0.01)):
            row, plain = f"minigated, gate {gate}, compiled", "minigated, gate none, compiled"
            cost = lambda rows, row=row, plain=plain: rows[row]["median_ms"] / rows[plain]["median_ms"] - 1
            case, what = f"gates, width {width}, 2048 tokens", f"{gate} gate at width {width:,}, a step's extra time"
            made.append(Target(what, "lm", case, row, aim, cost, least=False, shown="{:.1%}"))
    return made


def _language() -> list[Target]:
    made, row = [], "minigated, gate none, compiled"
    for size, share in (("110 M", 0.45), ("350 M", 0.50)):
        case = f"training, {size}"
        what = f"{size} model, share of the matrix rate"
        made.append(Target(what, "lm", case, row, share, of(row, "flop_share"), shown="{:.0%}"))
        what = f"{size} model, times as fast as transformers' Qwen3, compiled"
        made.append(Target(what, "lm", case, row, 1.3, ratio(row, "transformers Qwen3, compiled")))
    for experts in (16, 64):
        case, row = f"model, {experts} experts, training", "minigated, experts, compiled"
        what = f"{experts} experts, speed over that of a dense model with as many active operations"
        made.append(Target(what, "moe", case, row, 0.6, ratio("minigated, experts", "minigated, dense")))
        what = f"{experts} experts, times as fast as transformers' Qwen3-MoE in its fastest form"
        made.append(Target(what, "moe", case, row, 1.0, ratio("minigated, experts", "transformers")))
    for size, aim in (("350 M", 2.5), ("1.7 B", 1.5)):
        case, row = f"decoding, {size}", "minigated, static cache, fused"
        what = f"decoding {size}, a token's time over reading the weights"
        made.append(Target(what, "generate", case, row, aim, of(row, "against_weights"), least=False))
        what = f"decoding {size}, times as fast as transformers' compiled static cache"
        made.append(Target(what, "generate", case, row, 1.0, ratio(row, "transformers generate, static")))
    return made


def _vision() -> list[Target]:
    made = []
    for mixer in ("retention", "swat"):
        for window in (4, 7, 8):
            case, name = f"{mixer} window {window} training", f"{mixer} core, window {window}"
            row = "kernel"
            made.append(Target(f"{name}, times as fast as eager", "retention", case, row, 5.0,
                               lambda rows: speed(rows, "", "matmul, eager")))  # fmt: skip
            share = lambda rows: max(extra["byte_share"] for extra in rows.values())
            made.append(Target(f"{name}, share of the copy bandwidth", "retention", case, row, 0.6, share,
                               shown="{:.0%}"))  # fmt: skip
    for case in ("32 px, small, training", "224 px, small, training", "224 px, paper, training"):
        what = f"backbone, {case.removesuffix(', training')}, times as fast as timm's Swin compiled"
        row, peer = "minigated retention, recorded", "timm Swin, equal parameters, compiled"
        made.append(Target(what, "vit", case, row, 1.0,
                           lambda rows, peer=peer: best_of(rows) / rows[peer]["per_second"]))  # fmt: skip
    for mixer in ("retention", "swat"):
        row = f"minigated {mixer}, recorded"
        what = f"backbone, paper's size at 224 px, {mixer}, images/s"
        made.append(Target(what, "vit", "224 px, paper, training", row, 1260, of(row, "per_second"), shown="{:,.0f}"))
    return made


def best_of(rows: Mapping[str, dict]) -> float:
    """Images a second of our fastest row with retention."""
    return max(extra["per_second"] for name, extra in rows.items() if name.startswith("minigated retention"))


TARGETS = [*_gates(), *_language(), *_vision()]


def reached(target: Target, records: Records) -> tuple[float, bool] | None:
    """The measured number and whether it is good enough; None where no record of a GPU holds the rows."""
    record = records.get(target.suite)
    if record is None or record["id"].endswith("_cpu"):
        return None
    rows = {row["extra"]["contender"]: row["extra"] for row in record["rows"] if row["extra"]["case"] == target.case}
    try:
        value = target.measure(rows)
    except (KeyError, ValueError):  # a row that was not timed
        return None
    return value, value >= target.aim if target.least else value <= target.aim


def shares(extra: Mapping) -> dict[str, float]:
    """Parts of a row's time by kind of kernel, of its profile; `IDLE` is what no kernel fills, between calls too."""
    kinds, median = extra["profile"]["kinds"], extra["median_ms"]
    found = {kind: time / median for kind, time in kinds.items() if kind != IDLE}
    full = max(1.0, sum(found.values()))  # the call that was looked at may have been slower than the median
    found = {kind: share / full for kind, share in found.items()}
    return found | {IDLE: 1 - sum(found.values())}


def where(target: Target, records: Records) -> str:
    """ "matrix products 49 %, compiled 25 %, ...": the parts of the row's time, largest first, small ones left out."""
    found = [row["extra"] for row in records[target.suite]["rows"] if row["extra"]["case"] == target.case]
    seen = [extra for extra in found if extra["contender"].startswith(target.row) and extra["profile"]]
    if not seen:
        return ""
    parts = sorted(shares(max(seen, key=lambda extra: extra["per_second"])).items(), key=lambda part: -part[1])
    return ", ".join(f"{kind} {share:.0%}" for kind, share in parts if share >= 0.03)


def tally(record: dict) -> str:
    """ "3 of 12 targets reached", of the targets that a suite's record answers; "" if it answers none."""
    suite = record["id"].removeprefix("ch09_bench_")
    found = [reached(target, {suite: record}) for target in TARGETS if target.suite == suite]
    found = [good for one in found if one for good in one[1:]]
    return f"{sum(found)} of {len(found)} targets reached" if found else ""


def targets_table(records: Records) -> str:
    """The targets as a Markdown table: aim, measured, reached or where the time goes; below it how many are open."""
    lines, left = ["| target | aim | measured | |", "|---|---:|---:|---|"], []
    for target in TARGETS:
        found = reached(target, records)
        if found is None:
            left.append(target.suite)
            continue
        aim = ("≥\N{NO-BREAK SPACE}" if target.least else "≤\N{NO-BREAK SPACE}") + target.shown.format(target.aim)
        why = "" if found[1] else where(target, records)
        said = "reached" if found[1] else f"missed; a call is {why}" if why else "missed"
        lines.append(f"| {target.what} | {aim} | {target.shown.format(found[0])} | {said} |")
    table = ["\n".join(lines)] if len(lines) > 2 else []
    open_ = [f"Not recorded on a GPU yet: {', '.join(dict.fromkeys(left))}; targets left open: {len(left)}."]
    return "\n\n".join([*table, *(open_ if left else [])])
