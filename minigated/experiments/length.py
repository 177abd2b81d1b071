"""`ch08_length`: a gated and an ungated model far beyond their trained length; the paper's Table 5, scaled.

The paper trains at 4k, changes the rotary base from 10,000 to 1,000,000 and trains on at 32k, then reaches 128k with
YaRN at s = 4, without training. Here: T, then 2 T, then 8 T. Passkeys, which are part of the training text, stand for
RULER. Beside it, every scaling at s = 8 straight on the model of length T.
"""

from pathlib import Path

import torch

from minigated import records
from minigated.data.passkey import PasskeyBatches, passkey_accuracy
from minigated.data.text import TextBatches
from minigated.device import autocast, choose_device, choose_precision
from minigated.experiments.gate_table import has_sink
from minigated.experiments.length_table import ARMS, TIMES, judge, make_rows
from minigated.experiments.lm_runs import FILES as LM_FILES
from minigated.experiments.lm_runs import find_text
from minigated.experiments.runlog import RunLog
from minigated.lm import build_lm, lm_loss
from minigated.long_context import loss_by_position, share_by_length, with_rope
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import parameters

LENGTH_FILES = ("data/passkey", "long_context", "experiments/length", "experiments/length_table")
FILES = [*LM_FILES, *(f"minigated/{n}.py" for n in LENGTH_FILES)]
REACH, LONGER = TIMES[-1], 2
BASE = 1_000_000.0
PLANS = {
    "cpu": {"size": "lm_nano", "context": 80, "batch": 8, "steps": 60, "more_steps": 10, "windows": 4},
    "gpu": {"size": "lm_small", "context": 512, "batch": 64, "steps": 4000, "more_steps": 400, "windows": 64},
}
RECIPE = {"warmup_share": 0.08, "rate": 3e-3, "more_rate": 1e-3, "mixed": 0.5}
TEXTS = {"cpu": "shakespeare", "gpu": "books"}
# QK-norm as in the paper, unlike ch02_sink_lm: without it small models did not learn to find a passkey.
MODEL = {"qk_norm": True}


# ---------------------------------------------------------------------------------------------- one arm
def look(model, plan: dict, text, device, precision: str) -> dict:
    """Loss by position, passkeys and first-token share of one model at all lengths."""
    lengths = [plan["context"] * n for n in TIMES]
    windows = TextBatches(text, lengths[-1], batch=4).sequential(plan["windows"] // 4)
    with autocast(device, precision):
        keys = passkey_accuracy(model, text, lengths, count=plan["windows"], batch=4)
    dtype = torch.bfloat16 if precision == "bf16" else None
    return {
        "loss": loss_by_position(model, windows, [0, *lengths], precision),
        "passkey": keys,
        "share": share_by_length(model, text, lengths, precision=dtype),
    }


def train(model, plan: dict, corpus, seed: int, device, folder: Path, longer: bool = False):
    """One phase of training, at T, or `longer` at 2 T with as many tokens a step and draws that go on."""
    times, before = (LONGER, plan["steps"]) if longer else (1, 0)
    more = "more_" if longer else ""
    steps = plan[f"{more}steps"]
    batches = PasskeyBatches(
        corpus.train, plan["context"] * times, plan["batch"] // times, seed=seed, mixed=plan["mixed"]
    )
    config = TrainConfig(
        steps=steps,
        warmup=int(steps * plan["warmup_share"]),
        rate=plan[f"{more}rate"],
        seed=seed,
        device=str(device),
        name=folder.name,
        save_every=steps // 10,
        out=str(folder),
        resume=True,
    )
    result = Trainer(model, lm_loss, lambda step, *part: batches.at(step + before, *part), config).run()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return result


def train_arm(variant: str, seed: int, plan: dict, corpus, device, folder: Path) -> dict:
    """Trains one variant at T, then at 2 T, and looks at it under every setting.

    Returns:
        settings (of `look`, by name; None if training diverged), parameters, seconds, curve.
    """
    torch.manual_seed(seed)
    short = plan["context"]
    model = build_lm(plan["size"], variant=variant, context=short, match_parameters=True, **MODEL)
    precision = choose_precision("auto", device)
    first = train(model, plan, corpus, seed, device, folder / "short")
    found, results = {}, [first]
    if first.stopped is None:
        tables = {s: with_rope(model, s, REACH) for s in ("base", "interpolation", "yarn")}
        tables = {"none": with_rope(model, context=short * REACH), **tables}
        found = {name: look(table, plan, corpus.test, device, precision) for name, table in tables.items()}
        longer = with_rope(model, base=BASE, context=short * LONGER)  # from here on the weights of `model` move too
        results.append(train(longer, plan, corpus, seed, device, folder / "longer", longer=True))
    if results[-1].stopped is None:
        tables = {
            "trained on": with_rope(longer, context=short * REACH),
            "trained on, yarn": with_rope(longer, "yarn", REACH / LONGER),
        }
        found |= {name: look(table, plan, corpus.test, device, precision) for name, table in tables.items()}
    every = max(1, plan["steps"] // 60)
    losses = [loss for result in results for loss in result.losses]
    return {
        "settings": None if results[-1].stopped else found,
        "parameters": parameters(model),
        "seconds": sum(result.seconds + result.compile_seconds for result in results),
        "curve": [[i, round(losses[i], 4)] for i in range(every - 1, len(losses), every)],
    }


# ---------------------------------------------------------------------------------------------- the record
def build_record(log: RunLog, seeds: list[int], scale: str, corpus) -> dict | None:
    """The record of the seeds for which no arm diverged; None if there are none."""
    runs = {arm: [log.find(variant=arm, seed=s) for s in seeds] for arm in ARMS}
    spoilt = {f"{a} seed {r['key']['seed']}" for a, found in runs.items() for r in found if not r["result"]["settings"]}
    kept = [s for i, s in enumerate(seeds) if all(runs[arm][i]["result"]["settings"] for arm in ARMS)]
    if not kept:
        return None
    rows = make_rows({arm: [log.find(variant=arm, seed=s) for s in kept] for arm in ARMS}, log.settings["context"])
    judged, by = judge(rows), {row["name"]: row for row in rows}
    base = by["none, none, 1 T"]["extra"]
    sink = "a sink" if has_sink(base["f_attn"], base["uniform"]) else "no sink"
    note = (
        f"T is {log.settings['context']}. Digits guessed at random: 10 %; the paper's column is RULER. Without a gate "
        f"the first token gets {base['f_attn']:.4f} of the attention at T, {base['f_attn'] / base['uniform']:.1f} "
        f"times uniform: {sink}. {'Diverged: ' + ', '.join(sorted(spoilt)) + '.' if spoilt else ''} {log.provenance()}"
    )
    record = records.make(
        files=FILES,
        id="ch08_length",
        chapter=8,
        claim=judged[0]["claim"],
        command=f"python -m minigated run ch08_length --scale {scale} --seeds {len(seeds)}",
        config={**log.settings, "claims": judged},
        seeds=kept,
        metric={"name": "passkey digits right, %", "split": "test", "better": "higher"},
        rows=rows,
        verdict=judged[0]["verdict"],
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(run["result"]["seconds"] for run in log.runs),
        note=" ".join(note.split()),
    )
    return log.as_made(record)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains the arms that the log lacks and, when all are there, writes the record."""
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus, plan = find_text(text or TEXTS[scale]), PLANS[scale] | RECIPE
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = plan | {"model": MODEL, "times": TIMES, "base": BASE, "text": corpus.name, "sha256": corpus.sha256}
    log = RunLog(folder, "ch08_length", settings, FILES, resume)
    wanted = list(range(seeds or 1))
    for seed in wanted:
        for name in names or ARMS:
            work = Path("runs") / "ch08_length" / log.digest / f"{name}_{seed}"
            found = log.get(
                lambda n=name, s=seed, w=work: train_arm(n, s, plan, corpus, chosen, w), variant=name, seed=seed
            )
            print(f"{name} seed {seed}: {said(found['result'], plan['context'])}", flush=True)
    if not all(log.find(variant=n, seed=s) for n in ARMS for s in wanted):
        print("the other arm is not in the log yet; no record written")
        return None
    record = build_record(log, wanted, scale, corpus)
    if record is None:
        print("every seed diverged in one arm; no record written")
        return None
    print(f"wrote {records.write(record, folder)}")
    return record


def said(result: dict, short: int) -> str:
    """One line on an arm: digits right at each length under each setting."""
    if result["settings"] is None:
        return "diverged"
    parts = []
    for setting, one in result["settings"].items():
        digits = [[k["digit"] for k in one["passkey"] if k["length"] == short * n] for n in TIMES]
        parts.append(f"{setting} " + "/".join(f"{100 * sum(d) / len(d):.0f}" for d in digits))
    return "; ".join(parts) + " % of digits"
