"""`ch02_sink_lm`: the attention sink in a language model, with and without a gate, one long run each."""

import time
from pathlib import Path

import torch

from minigated import records
from minigated.data import TextBatches
from minigated.device import choose_device, choose_precision
from minigated.experiments.gate_table import evaluate, find_text
from minigated.experiments.runlog import RunLog, settings_of
from minigated.lm import build_lm, lm_loss
from minigated.measure import measure, summary
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import get_variant, parameters

FILES = [
    f"minigated/{n}.py"
    for n in ("attention", "gates", "layers", "lm", "measure", "recipe", "rope", "train", "variants")
]
FILES += ["minigated/data/text.py", "minigated/experiments/gate_table.py", "minigated/experiments/sink_lm.py"]
ARMS = ("none", "g1_elementwise")
# No QK-norm: it bounds the logits, and with it no sink shows at this size. A high rate and a BOS help one to form.
SCALES = {
    "cpu": {
        "size": "lm_nano",
        "context": 128,
        "batch": 16,
        "steps": 60,
        "warmup": 10,
        "rate": 3e-3,
        "windows": 64,
        "text": "shakespeare",
    },
    "gpu": {
        "size": "lm_medium",
        "context": 512,
        "batch": 64,
        "steps": 9000,
        "warmup": 300,
        "rate": 3e-3,
        "windows": 2048,
        "text": "books",
    },
}
MODEL = {"qk_norm": False}
PROBED = 32


def train_arm(variant: str, seed: int, plan: dict, corpus, device, folder: Path) -> dict:
    """Trains one arm with checkpoints; the share and the largest activation are followed as it learns."""
    precision = choose_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else None
    held_out = [b[:, :-1] for b in TextBatches(corpus.test, context=plan["context"], batch=8).sequential(PROBED // 8)]
    torch.manual_seed(seed)
    model = build_lm(plan["size"], variant=variant, context=plan["context"], match_parameters=True, **MODEL)
    batches = TextBatches(corpus.train, context=plan["context"], batch=plan["batch"], seed=seed)
    config = TrainConfig(
        steps=plan["steps"], warmup=plan["warmup"], rate=plan["rate"], seed=seed, device=str(device), resume=True,
        eval_every=max(1, plan["steps"] // 20), save_every=max(1, plan["steps"] // 10),
        out=str(folder / f"{variant}_{seed}"), name=f"sink {variant}",
    )  # fmt: skip

    def follow(model) -> dict[str, float]:
        seen = summary(measure(model, held_out[:1], dtype))
        return {k: v for k, v in seen.items() if v is not None}

    result = Trainer(model, lm_loss, batches.at, config, follow).run()
    every = max(1, plan["steps"] // 100)
    return {
        "test": evaluate(model, corpus.test, plan, device, precision),
        "measures": measure(model, held_out, dtype), "followed": result.evals,
        "curve": [[i, round(result.losses[i], 4)] for i in range(every - 1, len(result.losses), every)],
        "largest_loss_jump": max((b - a for a, b in zip(result.losses[200:], result.losses[201:])), default=0.0),
        "parameters": parameters(model), "ffn_width": model.config.ffn_width, "seconds": result.seconds,
        "compile_seconds": result.compile_seconds, "tokens_per_second": result.tokens_per_second,
        "peak_memory": result.peak_memory, "stopped": result.stopped,
    }  # fmt: skip


def make_row(name: str, runs: list[dict]) -> dict:
    """One arm: its first-token share beside the paper's, everything else in `extra`."""
    results = [run["result"] for run in runs]
    tables = [summary(r["measures"]) for r in results]
    paper, first = get_variant(name).paper, results[0]
    return records.row(
        name, [t["f_attn"] for t in tables], paper.f_attn,
        uniform=tables[0]["uniform"], m_act=tables[0]["m_act"], paper_m_act=paper.m_act,
        gate_score=tables[0]["gate_score"], paper_gate_score=paper.gate_score, test=first["test"],
        parameters=first["parameters"], seconds=first["seconds"], tokens_per_second=first["tokens_per_second"],
        followed=first["followed"], curve=first["curve"], measures=first["measures"],
    )  # fmt: skip


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains the arms that the log lacks and, when all are there, writes the record."""
    plan = SCALES[scale] | ({"text": text} if text else {})
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus = find_text(plan["text"])
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = settings_of(**{**plan, "text": corpus.name}, **MODEL, sha256=corpus.sha256, match_parameters=True)
    log = RunLog(folder, "ch02_sink_lm", settings, FILES, resume)
    wanted = list(range(seeds or 1))
    start = time.perf_counter()
    for seed in wanted:
        for name in names or ARMS:
            work = Path("runs") / "ch02_sink_lm" / log.digest
            found = log.get(lambda n=name, s=seed: train_arm(n, s, plan, corpus, chosen, work), variant=name, seed=seed)
            print(f"{name} seed {seed}: {summary(found['result']['measures'])}", flush=True)
    if not all(log.find(variant=n, seed=s) for n in ARMS for s in wanted):
        print("the other arm is not in the log yet; no record written")
        return None
    rows = [make_row(n, [log.find(variant=n, seed=s) for s in wanted]) for n in ARMS]
    ratio = rows[0]["mean"] / rows[1]["mean"]
    record = records.make(
        files=FILES, id="ch02_sink_lm", chapter=2,
        claim="a head-specific sigmoid gate on the attention output removes the attention sink",
        command=f"python -m minigated run ch02_sink_lm --scale {scale} --seeds {len(wanted)}", config=log.settings, seeds=wanted,
        metric={"name": "first-token share", "split": "test", "better": "lower"}, rows=rows,
        verdict="direction only" if ratio > 1 else "not at this scale",
        data={"name": corpus.name, "sha256": corpus.sha256}, seconds=time.perf_counter() - start,
        note=f"The ungated model gives the first token {rows[0]['mean']:.4f} of its attention, {rows[0]['mean'] / rows[0]['extra']['uniform']:.1f} "
        f"times uniform; the paper's 0.467 is far above. Without a gate the share is {ratio:.1f} times that with one. {log.provenance()}".strip(),
    )  # fmt: skip
    record["hardware"], record["software"] = log.runs[0]["hardware"], log.runs[0]["software"]
    record["seconds"] = sum(r["result"]["seconds"] for r in log.runs)
    print(f"wrote {records.write(record, folder)}")
    return record
