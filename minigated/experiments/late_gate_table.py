"""Rows, claims and words of `ch07_late_gate`."""

from minigated import records
from minigated.experiments.moe_table import missing, singles
from minigated.measure import summary
from minigated.statistics import paired_difference

NAMES = ("none", "late, from one", "late, at random", "from the start")
# claim, contender, rival, measure; the paper's findings lead us to expect the contender lower. The record's verdict is
# the first one's.
CLAIMS = (
    ("a gate from the start is better than one added late at one", "from the start", "late, from one", "loss"),
    ("a gate from the start is better than one added late at random", "from the start", "late, at random", "loss"),
    ("a gate from the start is better than none", "from the start", "none", "loss"),
    ("from the start it leaves smaller activations than late at one", "from the start", "late, from one", "m_act"),
    ("from the start it leaves a smaller first-token share", "from the start", "late, from one", "f_attn"),
)


def make_row(arm: str, runs: list[dict]) -> dict:
    """One arm: its test loss; the paper prints no number to put beside it."""
    results = [run["result"] for run in runs]
    tables = [summary(r["measures"]) for r in results]

    def mean(values):
        return None if None in values else sum(values) / len(values)

    return records.row(
        arm,
        [r["test"] for r in results],
        None,
        before=mean([r["before"] for r in results]),
        when_added=mean([r["when_added"] for r in results]),
        jump=mean([r["when_added"] - r["before"] for r in results]),
        gate_score=mean([t["gate_score"] for t in tables]),
        gate_std=mean([mean(r["measures"]["gate"]["std"]) if r["measures"]["gate"] else None for r in results]),
        **{what: mean([t[what] for t in tables]) for what in ("f_attn", "m_act")},
        **{f"{what}_values": [t[what] for t in tables] for what in ("f_attn", "m_act")},
        uniform=tables[0]["uniform"],
        parameters=results[0]["parameters"],
        curves=[r["curve"] for r in results],
    )


def late_effects(rows: list[dict]) -> list[dict]:
    """What each late gate changes against going on without one: mean paired difference and its standard error."""
    by, found = {row["name"]: row for row in rows}, []
    for arm in ("late, from one", "late, at random"):
        for what in ("loss", "m_act", "f_attn") if arm in by and "none" in by else ():
            a, b = (by[n]["values"] if what == "loss" else by[n]["extra"][f"{what}_values"] for n in (arm, "none"))
            mean, error = paired_difference(a, b)
            found.append({"arm": arm, "measure": what, "difference": mean, "standard_error": error})
    return found


def describe(rows: list[dict], names, diverged: list[str], effects: list[dict]) -> str:
    """The note: what the late gates changed, what was not run."""
    by = {row["name"]: row["extra"] for row in rows}
    said = []
    for arm in dict.fromkeys(one["arm"] for one in effects):
        parts = []
        for one in (e for e in effects if e["arm"] == arm):
            error = "" if one["standard_error"] is None else f" ± {one['standard_error']:.1g}"
            parts.append(f"{one['measure']} {one['difference']:+.2g}{error}")
        said.append(
            f"{arm}: {', '.join(parts)}; adding it changed the validation loss by {by[arm]['jump']:+.2g} at once"
        )
    effect = f"Against going on without a gate, {'. Against it, '.join(said)}." if said else ""
    parts = (
        "The verdict is that of the first claim; the paper prints no numbers for this (A.7: no effect).",
        effect,
        "Scores of the gate from one lie between 0 and 2. Parameters are not matched.",
        missing(NAMES, names),
        f"Diverged: {'; '.join(diverged)}." if diverged else "",
        singles(rows),
    )
    return " ".join(part for part in parts if part)
