"""`ch02_sink_lm`: the attention sink in a language model, with and without a gate, one long run each."""

from pathlib import Path

from minigated import records
from minigated.device import choose_device
from minigated.experiments.gate_table import has_sink
from minigated.experiments.lm_runs import FILES, find_text, train_one
from minigated.experiments.runlog import RunLog
from minigated.measure import summary
from minigated.statistics import verdict
from minigated.variants import get_variant

ARMS = ("none", "g1_elementwise")
PLANS = {
    "cpu": {"size": "lm_nano", "context": 128, "batch": 16, "steps": 60, "warmup": 10, "windows": 64, "rate": 3e-3},
    "gpu": {
        "size": "lm_medium",
        "context": 512,
        "batch": 64,
        "steps": 9000,
        "warmup": 300,
        "windows": 2048,
        "rate": 3e-3,
    },
}
TEXTS = {"cpu": "shakespeare", "gpu": "books"}
# No QK-norm: it bounds the logits, and with it no sink shows at this size. A BOS and a high rate help one to form.
MODEL = {"qk_norm": False}


def make_row(name: str, runs: list[dict]) -> dict:
    """One arm: its first-token share beside the paper's, everything else in `extra`."""
    results = [run["result"] for run in runs]
    tables = [summary(r["measures"]) for r in results]
    paper, first = get_variant(name).paper, results[0]
    return records.row(
        name,
        [t["f_attn"] for t in tables],
        paper.f_attn,
        uniform=tables[0]["uniform"],
        m_act=tables[0]["m_act"],
        paper_m_act=paper.m_act,
        gate_score=tables[0]["gate_score"],
        paper_gate_score=paper.gate_score,
        test=first["test"],
        parameters=first["parameters"],
        seconds=first["seconds"],
        tokens_per_second=first["tokens_per_second"],
        followed=first["followed"],
        curve=first["curve"],
        measures=first["measures"],
    )


def judge(plain: dict, gated: dict) -> str:
    """The house rule, where there is a sink to remove."""
    if not has_sink(plain["mean"], plain["extra"]["uniform"]):
        return "not at this scale"
    return verdict(gated["values"], plain["values"], -1)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains the arms that the log lacks and, when all are there, writes the record."""
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus = find_text(text or TEXTS[scale])
    plan = PLANS[scale] | {"model": MODEL}
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = plan | {"text": corpus.name, "sha256": corpus.sha256, "match_parameters": True}
    log = RunLog(folder, "ch02_sink_lm", settings, FILES, resume)
    wanted = list(range(seeds or 1))
    for name in names or ARMS:
        for seed in wanted:
            work = Path("runs") / "ch02_sink_lm" / log.digest / f"{name}_{seed}"
            found = log.get(
                lambda n=name, s=seed, w=work: train_one(n, s, plan, corpus, chosen, folder=w, follow=20),
                variant=name,
                seed=seed,
            )
            print(f"{name} seed {seed}: {summary(found['result']['measures'])}", flush=True)
    if not all(log.find(variant=n, seed=s) for n in ARMS for s in wanted):
        print("the other arm is not in the log yet; no record written")
        return None
    rows = [make_row(n, [log.find(variant=n, seed=s) for s in wanted]) for n in ARMS]
    plain, gated = rows
    note = (
        f"Without a gate the first token gets {plain['mean']:.4f} of the attention, "
        f"{plain['mean'] / plain['extra']['uniform']:.1f} times what uniform attention gives it and "
        f"{plain['mean'] / plain['paper']:.2f} of the paper's {plain['paper']}; with the gate {gated['mean']:.4f}. "
        f"{log.provenance()}"
    )
    record = records.make(
        files=FILES,
        id="ch02_sink_lm",
        chapter=2,
        claim="a head-specific sigmoid gate on the attention output removes the attention sink",
        command=f"python -m minigated run ch02_sink_lm --scale {scale} --seeds {len(wanted)}",
        config=log.settings,
        seeds=wanted,
        metric={"name": "first-token share", "split": "test", "better": "lower"},
        rows=rows,
        verdict=judge(plain, gated),
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(found["result"]["seconds"] for found in log.runs),
        note=note.strip(),
    )
    print(f"wrote {records.write(log.as_made(record), folder)}")
    return record
