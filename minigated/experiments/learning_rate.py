"""`ch07_learning_rate`: the paper's Table 2 on a deep narrow model: which rates a gate lets training stand.

The paper's dense model of 48 layers loses much at twice the rate without a gate (7.421 to 9.195), little with one
(7.288 to 7.325); sandwich norms rescue it without a gain, clipping what the branches add does not (appendix A.6).
Here: 24 layers of width 256, parameters matched, the paper's 4e-3 as the single rate, and twice and four times it.

Rules, written before any run:
- A loss spike: a step after the warm-up whose training loss lies more than 0.1 nats above the moving average (weight
  0.9 on the past, as the paper smooths its curves) of all steps before it. Steps in a row are one spike. The average
  goes on through spikes.
- A run that diverged, that is, whose loss, gradient or weights are no longer finite, is a result: its test loss counts
  as ln 256, that of a guess among all bytes, and so does the test loss of a run that ends above it.
- What the doubled or fourfold rate costs is judged on each seed's difference to the same variant at the single rate,
  and only where it harms the model without a gate (its mean loss rises); "not at this scale" otherwise. The record's
  verdict is on the cost of the smaller of the two rates that harms it.

Plan for one H100 at an expected 0.6 M tokens/s (many short kernels). 500 steps of 32,768 tokens are 28 s.

    | rows                                              | runs | seconds each | compile | seconds |
    |---------------------------------------------------|-----:|-------------:|--------:|--------:|
    | none, at 1x, 2x, 4x, three seeds                  |    9 |           28 |      30 |     282 |
    | g1_elementwise, at 1x, 2x, 4x, three seeds        |    9 |           30 |      30 |     300 |
    | sandwich_norm, clip_100, each once at 2x and 4x   |    4 |           30 |  2 x 30 |     180 |
    | together                                          |   22 |              |         |     762 |
"""

import time
from pathlib import Path

from minigated import records
from minigated.device import choose_device
from minigated.errors import one_of
from minigated.experiments.learning_rate_table import GUESS, JUMP, judge_rates, make_rows, overall
from minigated.experiments.lm_runs import FILES as LM_FILES
from minigated.experiments.lm_runs import find_text, train_one
from minigated.experiments.moe_table import missing, singles, spent
from minigated.experiments.runlog import RunLog

RATE = 4e-3
SEEDED = tuple((name, times) for name in ("none", "g1_elementwise") for times in (1, 2, 4))
ALONE = tuple((name, times) for name in ("sandwich_norm", "clip_100") for times in (2, 4))
NAMES = tuple(f"{name}, {times}x" for name, times in (*SEEDED, *ALONE))
TABLES = ("learning_rate", "learning_rate_table", "moe_table")
FILES = [*LM_FILES, *(f"minigated/experiments/{name}.py" for name in TABLES)]
PLANS = {
    "cpu": {"size": "lm_nano", "context": 64, "batch": 8, "steps": 40, "warmup": 5, "windows": 32},
    "gpu": {"size": "lm_small", "context": 512, "batch": 64, "steps": 500, "warmup": 60, "windows": 2048},
}
MODEL = {
    "cpu": {"layers": 6, "width": 48, "heads": 2, "kv_heads": 1, "head_width": 24, "ffn_width": 144},
    "gpu": {
        **{"layers": 24, "width": 256, "heads": 4, "kv_heads": 2, "head_width": 64, "ffn_width": 768},
        "ffn_multiple": 8,  # parameters within 0.5 %
    },
}
TEXTS = {"cpu": "shakespeare", "gpu": "books"}


def train_rows(log: RunLog, names, seeds: int | None, corpus, device) -> dict[tuple[str, int], list[dict]]:
    """Trains what the log lacks, variant by variant so that rates and seeds share a compilation; the runs by arm."""
    start, runs = time.perf_counter(), {}
    for arm in (*SEEDED, *ALONE):
        if f"{arm[0]}, {arm[1]}x" not in names:
            continue
        for seed in range((seeds or 3) if arm in SEEDED else 1):
            plan = log.settings | {"rate": RATE * arm[1]}

            def make(plan=plan, name=arm[0], seed=seed):
                return train_one(name, seed, plan, corpus, device, points=plan["steps"])

            made = log.get(make, variant=arm[0], times=arm[1], seed=seed)
            runs.setdefault(arm, []).append(made)
            loss = made["result"]["test"]
            said = "diverged" if loss is None else f"{loss:.4f} nats a byte"
            print(f"{time.perf_counter() - start:5.0f} s  {arm[0]}, {arm[1]}x, seed {seed}: {said}", flush=True)
    return runs


# ---------------------------------------------------------------------------------------------- the record
def describe(rows: list[dict], names) -> str:
    """The note: rules, what was not run or ran once, what diverged, whether clipping had anything to clip."""
    spoilt = [f"{r['name']} ({r['extra']['diverged']} of {len(r['values'])})" for r in rows if r["extra"]["diverged"]]
    free = [r["extra"]["m_act"] for r in rows if r["extra"]["variant"] == "none" and r["extra"]["m_act"]]
    reach = f"The mean of the layers' largest activations without a gate is at most {max(free):.0f}." if free else ""
    parts = (
        "1x is 4e-3. The verdict is on the cost of the smallest rate that harms the model without a gate.",
        f"A loss spike is a stretch of steps after the warm-up more than {JUMP} nats above the moving average of the "
        "training loss before them (weight 0.9 on the past).",
        f"A diverged run counts with ln 256 = {GUESS:.3f} nats.",
        f"Diverged: {'; '.join(spoilt)}." if spoilt else "None diverged.",
        missing(NAMES, names),
        "Not planned here: clip_300.",
        singles(rows),
        reach,
        "The paper's column is the perplexity of its 48-layer model after 400B tokens (4e-3 and 8e-3; it has no 4x).",
    )
    return " ".join(part for part in parts if part)


def build_record(log: RunLog, runs: dict, seeds: list[int], scale: str, corpus) -> dict:
    """Rows and claims from the runs."""
    rows = make_rows(runs, log.settings["warmup"])
    judged = judge_rates(rows)
    record = records.make(
        files=FILES,
        id="ch07_learning_rate",
        chapter=7,
        claim="a gated model stands a rate that harms one without a gate",
        command=f"python -m minigated run ch07_learning_rate --scale {scale} --seeds {len(seeds)}",
        config={**log.settings, "claims": judged},
        seeds=seeds,
        metric={"name": "nats a byte", "split": "test", "better": "lower"},
        rows=rows,
        verdict=overall(rows, judged),
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(spent(found) for found in runs.values()),
        note=f"{describe(rows, [row['name'] for row in rows])} {log.provenance()}".strip(),
    )
    return log.as_made(record)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict:
    """Trains what the log lacks and writes the record."""
    for name in names or NAMES:
        one_of("row", name, NAMES)
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus = find_text(text or TEXTS[scale])
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = PLANS[scale] | {"single_rate": RATE, "model": MODEL[scale], "match_parameters": True}
    settings |= {"text": corpus.name, "sha256": corpus.sha256}
    log = RunLog(folder, "ch07_learning_rate", settings, FILES, resume)
    runs = train_rows(log, names or NAMES, seeds, corpus, chosen)
    record = build_record(log, runs, list(range(seeds or 3)), scale, corpus)
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
