"""`ch07_moe_gates`: the rows of the paper's Table 1 on a mixture of experts, where the paper measured them.

The model is `moe_small` with 32 experts half as wide and 8 of them a token, so that four experts more are half more
active ones, as in the paper (8 of 128 to 12 of 132). As in the paper, parameters are not matched: each row adds what
it adds, and the record holds it beside the paper's number. Four rows get three paired seeds, the rest single runs.

Plan for one H100 at an expected 0.5 M tokens/s, half of what the dense model of this width does. 900 steps of 32,768
tokens are 59 s; the first seed of a variant compiles, its other seeds use what was compiled.

    | rows                                                   | runs | seconds each | compile | seconds |
    |--------------------------------------------------------|-----:|-------------:|--------:|--------:|
    | none, g1_elementwise, g1_headwise, kv_heads_doubled    |   12 |           59 |  4 x 40 |     870 |
    | g2_elementwise, q_heads_half_more, experts_added       |    3 |           65 |  3 x 40 |     315 |
    | together                                               |   15 |              |         |   1,185 |
"""

import time
from pathlib import Path

from minigated import records
from minigated.device import choose_device
from minigated.errors import one_of
from minigated.experiments.gate_table import rank_order
from minigated.experiments.lm_runs import FILES as LM_FILES
from minigated.experiments.lm_runs import find_text, train_one
from minigated.experiments.moe_table import judge, missing, moe_row, singles, spent
from minigated.experiments.runlog import RunLog
from minigated.lm import build_lm
from minigated.variants import parameters

SEEDED = ("none", "g1_elementwise", "g1_headwise", "kv_heads_doubled")
NAMES = (*SEEDED, "g2_elementwise", "q_heads_half_more", "experts_added")
FILES = [*LM_FILES, *(f"minigated/experiments/{name}.py" for name in ("gate_table", "moe_gates", "moe_table"))]
PLANS = {
    "cpu": {"size": "moe_nano", "context": 64, "batch": 8, "steps": 50, "warmup": 8, "windows": 32},
    "gpu": {"size": "moe_small", "context": 512, "batch": 64, "steps": 900, "warmup": 100, "windows": 2048},
}
MODEL = {
    "cpu": {"match_parameters": False},
    "gpu": {"match_parameters": False, "top_k": 8, "ffn_width": 128},
}
RATE = 2e-3
TEXTS = {"cpu": "shakespeare", "gpu": "books"}
# claim, contender, rival, measure; the paper finds the contender lower. The record's verdict is the first one's.
CLAIMS = (
    ("in a mixture of experts a gate on the attention output is better than none", "g1_elementwise", "none", "loss"),
    ("one score a head is enough to be better than none", "g1_headwise", "none", "loss"),
    ("the gate is better than twice the key/value heads", "g1_elementwise", "kv_heads_doubled", "loss"),
    ("one score a head is better than twice the key/value heads", "g1_headwise", "kv_heads_doubled", "loss"),
    ("twice the key/value heads are better than the baseline", "kv_heads_doubled", "none", "loss"),
    ("a score per channel is better than one a head", "g1_elementwise", "g1_headwise", "loss"),
    ("a gate on the values is better than none", "g2_elementwise", "none", "loss"),
    ("a gate on the attention output is better than one on the values", "g1_elementwise", "g2_elementwise", "loss"),
    ("the gate is better than half more query heads", "g1_elementwise", "q_heads_half_more", "loss"),
    ("the gate is better than four more experts", "g1_elementwise", "experts_added", "loss"),
)


# ---------------------------------------------------------------------------------------------- runs
def open_log(scale: str, text: str | None, out, resume: bool) -> tuple[RunLog, object, Path]:
    """The log of these runs, which `ch07_sparsity_sinks` shares; with it the corpus and the folder."""
    corpus = find_text(text or TEXTS[scale])
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    plan = PLANS[scale] | {"rate": RATE, "model": MODEL[scale]}
    settings = plan | {"text": corpus.name, "sha256": corpus.sha256}
    return RunLog(folder, "ch07_moe_gates", settings, FILES, resume), corpus, folder


def seeds_for(name: str, seeds: int | None) -> list[int]:
    """Three seeds, or as many as asked for, for the rows of `SEEDED`; one for the others."""
    return list(range((seeds or 3) if name in SEEDED else 1))


def train_rows(log: RunLog, names, seeds: int | None, corpus, device) -> dict[str, list[dict]]:
    """Trains what the log lacks, variant by variant so that seeds share a compilation; the runs by name."""
    plan = {k: log.settings[k] for k in (*PLANS["cpu"], "rate", "model")}
    start, runs = time.perf_counter(), {}
    for name in names:
        for seed in seeds_for(name, seeds):
            made = log.get(lambda n=name, s=seed: train_one(n, s, plan, corpus, device), variant=name, seed=seed)
            runs.setdefault(name, []).append(made)
            loss = made["result"]["test"]
            said = "diverged" if loss is None else f"{loss:.4f} nats a byte"
            print(f"{time.perf_counter() - start:5.0f} s  {name:22} seed {seed}: {said}", flush=True)
    return runs


def make_rows(runs: dict[str, list[dict]], settings: dict) -> tuple[list[dict], list[str]]:
    """Rows of the variants that trained to the end with every seed, and the names of the others."""
    diverged = [n for n, found in runs.items() if any(run["result"]["test"] is None for run in found)]
    plain = parameters(build_lm(settings["size"], "meta", context=settings["context"], **settings["model"]))
    return [moe_row(n, found, plain) for n, found in runs.items() if n not in diverged], diverged


# ---------------------------------------------------------------------------------------------- the record
def describe(rows: list[dict], diverged: list[str], order: dict) -> str:
    """The note: what was not run or ran once, how the order compares, what the setting is not."""
    unused = max(row["extra"]["unused_experts"] for row in rows)
    ordered = ""
    if order["correlation"] is not None:
        low, high = order["interval"]
        ordered = (
            f"On the first seed of each of {len(rows)} rows, Spearman's rank correlation with the paper's order is "
            f"{order['correlation']:.2f} (95 % bootstrap interval {low:.2f} to {high:.2f})."
        )
    parts = (
        "The verdict is that of the first claim.",
        missing(NAMES, [row["name"] for row in rows] + diverged),
        f"Diverged: {', '.join(diverged)}." if diverged else "",
        singles(rows),
        ordered,
        f"Parameters are not matched, as in the paper. At the end of training at most {unused} experts of a layer got "
        "no held-out token. The paper's column is the perplexity of its MoE-15A2B.",
    )
    return " ".join(part for part in parts if part)


def build_record(log: RunLog, runs: dict, seeds: list[int], scale: str, corpus) -> dict | None:
    """Rows, claims and the order of rows; None if every row diverged."""
    rows, diverged = make_rows(runs, log.settings)
    if not rows:
        return None
    judged = judge(rows, CLAIMS)
    first = [row | {"values": row["values"][:1], "mean": row["values"][0]} for row in rows]
    order = rank_order(first)
    record = records.make(
        files=FILES,
        id="ch07_moe_gates",
        chapter=7,
        claim=CLAIMS[0][0],
        command=f"python -m minigated run ch07_moe_gates --scale {scale} --seeds {len(seeds)}",
        config={
            **log.settings,
            "rank_correlation": order["correlation"],
            "rank_interval": order["interval"],
            "rank_verdict": order["verdict"],
            "claims": judged,
        },
        seeds=seeds,
        metric={"name": "nats a byte", "split": "test", "better": "lower"},
        rows=rows,
        verdict=next((j["verdict"] for j in judged if j["claim"] == CLAIMS[0][0]), None),
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(spent(found) for found in runs.values()),
        note=f"{describe(rows, diverged, order)} {log.provenance()}".strip(),
    )
    return log.as_made(record)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains what the log lacks and writes the record."""
    for name in names or NAMES:
        one_of("row", name, NAMES)
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    log, corpus, folder = open_log(scale, text, out, resume)
    runs = train_rows(log, names or NAMES, seeds, corpus, chosen)
    record = build_record(log, runs, seeds_for("none", seeds), scale, corpus)
    if record is None:
        print("every row diverged; no record written")
        return None
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
