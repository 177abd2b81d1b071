"""`ch02_gate_table`: every dense row of the paper's Tables 1, 3 and 4, trained under one budget and compared."""

import math
import time
from pathlib import Path

from minigated import records
from minigated.device import choose_device
from minigated.experiments.lm_runs import FILES, find_text, train_one
from minigated.experiments.runlog import RunLog
from minigated.measure import summary
from minigated.statistics import bootstrap_rank_correlation, paired_difference, rank_correlation, verdict
from minigated.variants import VARIANTS, get_variant

NAMES = tuple(n for n, v in VARIANTS.items() if v.dense and v.paper.rows[:2] in ("T1", "T3", "T4"))
PLANS = {
    "cpu": {"size": "lm_nano", "context": 128, "batch": 16, "steps": 60, "warmup": 10, "windows": 64},
    "gpu": {"size": "lm_small", "context": 512, "batch": 64, "steps": 840, "warmup": 100, "windows": 2048},
}
TEXTS = {"cpu": "shakespeare", "gpu": "books"}


def make_row(name: str, runs: list[dict]) -> dict:
    """A record's row from the runs of one variant, one a seed."""
    results = [run["result"] for run in runs]
    tables = [summary(r["measures"]) for r in results]

    def mean(values):
        return None if None in values else sum(values) / len(values)

    gate, paper = get_variant(name).gate, get_variant(name).paper
    scored = gate is not None and gate.form == "multiply" and "sigmoid" in gate.activation  # others are no share of Y
    test = [r["test"] for r in results]
    return records.row(
        name,
        test,
        paper.ppl,
        perplexity=math.exp(mean(test)),
        gate_score=mean([t["gate_score"] for t in tables]) if scored else None,
        paper_gate_score=paper.gate_score,
        f_attn=mean([t["f_attn"] for t in tables]),
        paper_f_attn=paper.f_attn,
        uniform=tables[0]["uniform"],
        m_act=mean([t["m_act"] for t in tables]),
        paper_m_act=paper.m_act,
        parameters=results[0]["parameters"],
        ffn_width=results[0]["ffn_width"],
        seconds=mean([r["seconds"] for r in results]),
        tokens_per_second=mean([r["tokens_per_second"] for r in results]),
        f_attn_values=[t["f_attn"] for t in tables],
        m_act_values=[t["m_act"] for t in tables],
        gate_score_values=[t["gate_score"] for t in tables] if scored else None,
        curves=[r["curve"] for r in results],
        paper_rows=paper.rows,
    )


# claim, contender, rival, what is compared; the paper finds the contender lower in all of them.
CLAIMS = (
    ("a gate on the attention output (G1, elementwise) is better than none", "g1_elementwise", "none", "loss"),
    ("one score a head is enough to be better than none (G1, headwise)", "g1_headwise", "none", "loss"),
    ("a gate on the values (G2) is better than none", "g2_elementwise", "none", "loss"),
    ("G1 is better than G2", "g1_elementwise", "g2_elementwise", "loss"),
    ("G1 is better than a gate on the keys (G3)", "g1_elementwise", "g3_elementwise", "loss"),
    ("G1 is better than a gate on the queries (G4)", "g1_elementwise", "g4_elementwise", "loss"),
    ("G1 is better than a gate after W_O (G5)", "g1_elementwise", "g5_elementwise", "loss"),
    ("G1 is better than half more query heads", "g1_elementwise", "q_heads_half_more", "loss"),
    ("scores of its own for each head are better than shared ones", "g1_elementwise", "g1_shared", "loss"),
    ("sigmoid is better than SiLU", "g1_elementwise", "g1_silu", "loss"),
    ("multiplying is better than adding", "g1_elementwise", "g1_additive_silu", "loss"),
    ("sparse scores are better than scores above one half", "g1_elementwise", "g1_nonsparse", "loss"),
    ("scores that depend on the input are better than constant ones", "g1_elementwise", "g1_input_independent", "loss"),
    ("G1 lowers the largest activations", "g1_elementwise", "none", "m_act"),
    ("G1 lowers the first-token share", "g1_elementwise", "none", "f_attn"),
)


def has_sink(share: float, uniform: float) -> bool:
    """Whether a first-token share is a sink: more than twice what uniform attention gives. Less is a trace."""
    return share > 2 * uniform


def judge(rows: list[dict]) -> list[dict]:
    """The paper's single claims, of those whose rows are there, with their verdict by the house rule.

    A first-token share is only judged where the baseline has a sink to remove.
    """
    by = {row["name"]: row for row in rows}
    judged = []
    for claim, name, rival, what in CLAIMS:
        if name not in by or rival not in by:
            continue
        a, b = (by[n]["values"] if what == "loss" else by[n]["extra"][f"{what}_values"] for n in (name, rival))
        mean, error = paired_difference(a, b)
        found = verdict(a, b, -1)
        if what == "f_attn" and not has_sink(by[rival]["extra"]["f_attn"], by[rival]["extra"]["uniform"]):
            found = "not at this scale"
        judged.append({"claim": claim, "measure": what, "difference": mean, "standard_error": error, "verdict": found})
    return judged


def rank_order(rows: list[dict]) -> dict:
    """How far the order of the rows is the paper's: reproduced if the bootstrap interval lies above zero."""
    if len(rows) < 4:
        return {"correlation": None, "interval": None, "verdict": None, "said": "Too few rows to compare their order."}
    paper = [row["paper"] for row in rows]
    rho = rank_correlation([row["mean"] for row in rows], paper)
    low, high = bootstrap_rank_correlation([row["values"] for row in rows], paper)
    said = (
        f"Spearman's rank correlation with the paper's order over {len(rows)} rows is {rho:.2f} (95 % bootstrap "
        f"interval {low:.2f} to {high:.2f}); the verdict is on that order: reproduced if the interval lies above zero."
    )
    verdict = "reproduced" if low > 0 else ("direction only" if rho > 0 else "not at this scale")
    return {"correlation": rho, "interval": [low, high], "verdict": verdict, "said": said}


def build_record(log: RunLog, names, seeds, scale: str, corpus) -> dict:
    """Rows, rank correlation with the paper's order, claims."""
    runs = {n: [log.find(variant=n, seed=s) for s in seeds] for n in names}
    diverged = [n for n in names if any(run["result"]["test"] is None for run in runs[n])]
    names = [n for n in names if n not in diverged]
    rows = [make_row(n, runs[n]) for n in names]
    order = rank_order(rows)
    judged, missing = judge(rows), [n for n in NAMES if n not in names and n not in diverged]
    counts = [row["extra"]["parameters"] for row in rows]
    left_out = [f"{why}: {', '.join(which)}." for why, which in (("Not run", missing), ("Diverged", diverged)) if which]
    note = (
        f"{' '.join(left_out)} {order['said']} Parameters are matched within {max(counts) / min(counts) - 1:.1%} by a "
        f"narrower feed-forward, which the paper's mixture-of-experts rows are not. The paper's column is the "
        f"perplexity of its MoE-15A2B. {log.provenance()}"
    )
    record = records.make(
        files=FILES,
        id="ch02_gate_table",
        chapter=2,
        claim="where a gate sits decides what it does: the order of the paper's Tables 1, 3 and 4",
        command=f"python -m minigated run ch02_gate_table --scale {scale} --seeds {len(seeds)}",
        config={
            **log.settings,
            "rank_correlation": order["correlation"],
            "rank_interval": order["interval"],
            "claims": judged,
        },
        seeds=seeds,
        metric={"name": "nats a byte", "split": "test", "better": "lower"},
        rows=rows,
        verdict=order["verdict"],
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(run["result"]["seconds"] + run["result"]["compile_seconds"] for run in log.runs),
        note=note.strip(),
    )
    return log.as_made(record)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict:
    """Trains what the log lacks, variant by variant so that seeds share a compilation, and writes the record."""
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus = find_text(text or TEXTS[scale])
    plan = PLANS[scale] | {"rate": 2e-3, "model": {}}
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = plan | {"text": corpus.name, "sha256": corpus.sha256, "match_parameters": True}
    log = RunLog(folder, "ch02_gate_table", settings, FILES, resume)
    wanted, names, start = list(range(seeds or 3)), names or NAMES, time.perf_counter()
    for name in names:
        for seed in wanted:
            found = log.get(lambda n=name, s=seed: train_one(n, s, plan, corpus, chosen), variant=name, seed=seed)
            at = f"{time.perf_counter() - start:5.0f} s"
            loss = found["result"]["test"]
            said = "diverged" if loss is None else f"{loss:.4f} nats a byte"
            print(f"{at}  {name:22} seed {seed}: {said}", flush=True)
    record = build_record(log, names, wanted, scale, corpus)
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
