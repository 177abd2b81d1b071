"""What the experiments of chapter 7 share: rows with the paper's numbers, claims and their verdicts, runs and words."""

from minigated.experiments.gate_table import has_sink, make_row
from minigated.statistics import paired_difference, verdict
from minigated.variants import get_variant


def moe_row(name: str, runs: list[dict], plain: int) -> dict:
    """A row of `gate_table`, with parameters added and the state of the experts; of a model with experts.

    Args:
        name: a variant. runs: of this variant, one a seed. plain: parameters of the model without a gate.
    """
    row = make_row(name, runs)
    experts = [layer for run in runs for layer in run["result"]["experts"]]
    row["extra"] |= {
        "added_millions": (row["extra"]["parameters"] - plain) / 1e6,
        "paper_added_millions": get_variant(name).paper.added_millions,
        "fullest_expert": max(layer["fullest"] for layer in experts),
        "unused_experts": max(layer["unused"] for layer in experts),
    }
    return row


def values_of(row: dict, measure: str) -> list[float] | None:
    """One number a seed: the row's own values for "loss", else what its extra holds under `<measure>_values`."""
    return row["values"] if measure == "loss" else row["extra"].get(f"{measure}_values")


def judge(rows: list[dict], claims) -> list[dict]:
    """The claims whose two rows are there and hold the measure, by the house rule.

    Seeds 0, 1, ... are paired as far as both rows have them; a single pair is at most "direction only". A first-token
    share is judged only where the rival has a sink to remove.

    Args:
        rows: of a record. claims: (claim, contender, rival, measure), the contender lower in the paper.
    """
    by, judged = {row["name"]: row for row in rows}, []
    for claim, name, rival, what in claims:
        a, b = (values_of(by[n], what) if n in by else None for n in (name, rival))
        if not a or not b:
            continue
        pairs = min(len(a), len(b))
        a, b = a[:pairs], b[:pairs]
        found = verdict(a, b, -1)
        if what == "f_attn" and not has_sink(by[rival]["extra"]["f_attn"], by[rival]["extra"]["uniform"]):
            found = "not at this scale"
        mean, error = paired_difference(a, b)
        judged.append(
            {"claim": claim, "measure": what, "difference": mean, "standard_error": error, "verdict": found}
            | {"pairs": pairs}
        )
    return judged


def singles(rows: list[dict]) -> str:
    """A sentence on the rows with one seed, "" if there are none."""
    alone = [row["name"] for row in rows if len(row["values"]) == 1]
    return f"Single runs: {'; '.join(alone)}." if alone else ""


def missing(names, found) -> str:
    """A sentence on the rows that were planned and not run, "" if there are none."""
    left = [name for name in names if name not in found]
    return f"Not run: {'; '.join(left)}." if left else ""


def spent(runs: list[dict]) -> float:
    """Seconds of training and compilation of some runs."""
    return sum(run["result"]["seconds"] + run["result"]["compile_seconds"] for run in runs)
