"""Loss spikes, rows and claims of `ch07_learning_rate`; the rules stand in `minigated.experiments.learning_rate`."""

import math

from minigated import records
from minigated.experiments.moe_table import judge
from minigated.measure import summary
from minigated.variant_table import TABLE_2

GUESS = math.log(256)  # nats a byte of a guess among all bytes
KEEP, JUMP = 0.9, 0.1  # of the moving average; nats above it


def count_spikes(losses: list[float], warmup: int) -> int:
    """Loss spikes of one run: stretches of steps, after the warm-up, more than `JUMP` above the average before them.

    Args:
        losses: of every step. warmup: steps that only feed the average.
    """
    average, spikes, inside = None, 0, False
    for step, loss in enumerate(losses):
        above = average is not None and step >= warmup and loss > average + JUMP
        spikes += above and not inside
        inside = above
        average = loss if average is None else KEEP * average + (1 - KEEP) * loss
    return spikes


def counted_loss(result: dict) -> float:
    """The test loss as it counts: at most that of a guess, which is also what a diverged run gets."""
    return GUESS if result["test"] is None else min(result["test"], GUESS)


def paper_perplexity(variant: str, times: int) -> float | None:
    """The 48-layer, 400B-token row of Table 2 for a variant at 1 or 2 times 4e-3; None where there is none."""
    wanted = ("1.7B-48L", variant, 400, times * 4e-3)
    return next((r.ppl for r in TABLE_2 if (r.size, r.variant, r.tokens, r.rate) == wanted), None)


def make_rows(runs: dict[tuple[str, int], list[dict]], warmup: int) -> list[dict]:
    """A row for each variant and rate from its runs, one a seed."""
    single = {name: [counted_loss(run["result"]) for run in found] for (name, n), found in runs.items() if n == 1}
    rows = []
    for (name, times), found in runs.items():
        results = [run["result"] for run in found]
        tables = [summary(r["measures"]) if r["measures"] else None for r in results]
        spikes = [count_spikes([loss for _, loss in r["curve"]], warmup) for r in results]
        done = [t for t in tables if t]
        row = records.row(
            f"{name}, {times}x",
            [counted_loss(r) for r in results],
            paper_perplexity(name, times),
            variant=name,
            times=times,
            diverged=sum(r["test"] is None for r in results),
            spikes=sum(spikes) / len(spikes),
            spikes_values=spikes,
            cost_values=[a - b for a, b in zip(map(counted_loss, results), single.get(name, ()))] or None,
            m_act=sum(t["m_act"] for t in done) / len(done) if done else None,
            m_act_values=[t and t["m_act"] for t in tables],
            f_attn=sum(t["f_attn"] for t in done) / len(done) if done else None,
            uniform=done[0]["uniform"] if done else None,
            parameters=results[0]["parameters"],
            ffn_width=results[0]["ffn_width"],
            tokens_per_second=sum(r["tokens_per_second"] for r in results) / len(results),
            steps_made=[len(r["curve"]) for r in results],
            curves=[r["curve"][:: max(1, len(r["curve"]) // 120)] for r in results],
        )
        rows.append(row)
    return rows


# claim, contender, rival, measure; the paper finds the contender lower. "cost" is the loss less that of the same
# variant and seed at the single rate.
CLAIMS = (
    ("twice the rate costs a gated model less", "g1_elementwise, 2x", "none, 2x", "cost"),
    ("four times the rate cost a gated model less", "g1_elementwise, 4x", "none, 4x", "cost"),
    ("without a gate the single rate is better than twice the rate", "none, 1x", "none, 2x", "loss"),
    ("without a gate the single rate is better than four times the rate", "none, 1x", "none, 4x", "loss"),
    ("at the single rate the gate is better than none", "g1_elementwise, 1x", "none, 1x", "loss"),
    ("at twice the rate the gate is better than none", "g1_elementwise, 2x", "none, 2x", "loss"),
    ("at four times the rate the gate is better than none", "g1_elementwise, 4x", "none, 4x", "loss"),
    ("at twice the rate the gate leaves fewer loss spikes", "g1_elementwise, 2x", "none, 2x", "spikes"),
    ("at four times the rate the gate leaves fewer loss spikes", "g1_elementwise, 4x", "none, 4x", "spikes"),
    ("at twice the rate sandwich norms are better than none", "sandwich_norm, 2x", "none, 2x", "loss"),
    ("at twice the rate the gate is better than sandwich norms", "g1_elementwise, 2x", "sandwich_norm, 2x", "loss"),
    ("at four times the rate sandwich norms are better than none", "sandwich_norm, 4x", "none, 4x", "loss"),
    ("at four times the rate the gate is better than clipping", "g1_elementwise, 4x", "clip_100, 4x", "loss"),
)
RIVALS = {claim: rival for claim, _, rival, _ in CLAIMS}


def harmed(rows: list[dict]) -> set[str]:
    """Names of the rows whose rate costs something: the mean loss is above that of the same seeds at 1x."""
    costs = {row["name"]: row["extra"]["cost_values"] for row in rows}
    return {name for name, cost in costs.items() if cost and sum(cost) > 0}


def judge_rates(rows: list[dict]) -> list[dict]:
    """`judge` of `CLAIMS`; what a rate costs a gated model says nothing where it costs one without a gate nothing."""
    judged, hurt = judge(rows, CLAIMS), harmed(rows)
    for one in judged:
        if one["measure"] == "cost" and RIVALS[one["claim"]] not in hurt:
            one["verdict"] = "not at this scale"
    return judged


def overall(rows: list[dict], judged: list[dict]) -> str | None:
    """The record's verdict: on the cost of the smallest rate that harms a model without a gate."""
    costs = [one for one in judged if one["measure"] == "cost"]  # from the smaller rate to the larger
    hurt = harmed(rows)
    found = next((one["verdict"] for one in costs if RIVALS[one["claim"]] in hurt), "not at this scale")
    return found if costs else None
