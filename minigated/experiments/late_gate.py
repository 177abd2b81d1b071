"""`ch07_late_gate`: a gate added in continued training, beside one that was there from the start (appendix A.7).

The paper's appendix adds the gate to a trained model, goes on training and finds no effect on sinks, activations or
quality; it prints no numbers. Its first author tells of two ways (issue 10 of the official repository): scores
2 sigmoid(x W) with W = 0, which leave the loss as it is because every score is 1, and ordinary random gates, after
which the loss jumps and comes back slowly. Here a plain model is trained, then goes on in three ways: without a gate,
with a gate that starts at one, with a random gate. A fourth arm has had its gate from the start. All see the same
data in the same order, all go on with a fresh optimizer, warm-up and cosine; parameters are not matched, as a gate
that comes late cannot narrow what is trained already.

That nothing changes is no claim the house rule can settle, since it looks for differences. Judged is what follows: the
gate from the start does better than the late one. What the late ones change against going on without a gate stands in
the note and in the config, without a verdict.

Plan for one H100 at 1.1 M tokens/s, three seeds. 1,400 steps of 32,768 tokens are 42 s, 500 more are 15 s.

    | rows                                      | runs | seconds each | compile | seconds |
    |-------------------------------------------|-----:|-------------:|--------:|--------:|
    | plain training, then none                 |    3 |      42 + 15 |      30 |     201 |
    | late, from one                            |    3 |           17 |      30 |      81 |
    | late, at random                           |    3 |           17 |      30 |      81 |
    | from the start                            |    3 |      47 + 17 |       0 |     192 |
    | together                                  |   12 |              |         |     555 |
"""

import time
from pathlib import Path

import torch

from minigated import records
from minigated.checkpoint import list_checkpoints, load_model
from minigated.data import TextBatches
from minigated.device import choose_device, choose_precision
from minigated.errors import one_of
from minigated.experiments.late_gate_table import CLAIMS, NAMES, describe, late_effects, make_row
from minigated.experiments.lm_runs import FILES as LM_FILES
from minigated.experiments.lm_runs import PROBED, evaluate, find_text
from minigated.experiments.moe_table import judge
from minigated.experiments.runlog import RunLog
from minigated.lm import build_lm, lm_loss
from minigated.measure import measure
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import parameters

FILES = [*LM_FILES, *(f"minigated/experiments/{name}.py" for name in ("late_gate", "late_gate_table", "moe_table"))]
PLANS = {
    "cpu": {"size": "lm_nano", "context": 64, "batch": 8, "steps": 50, "more_steps": 20, "windows": 32},
    "gpu": {"size": "lm_small", "context": 512, "batch": 64, "steps": 1400, "more_steps": 500, "windows": 2048},
}
RECIPE = {"warmup_share": 0.08, "rate": 2e-3, "more_rate": 1e-3}
TEXTS = {"cpu": "shakespeare", "gpu": "books"}


# ---------------------------------------------------------------------------------------------- one arm
def double_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """2 sigmoid(x): 1 where x is 0, so that a gate without weights changes nothing."""
    return 2 * torch.sigmoid(x)


def add_gate(plain, from_one: bool):
    """A copy of a trained plain model with an elementwise gate at G1.

    Args:
        plain: a `LanguageModel` without a gate; it stays as it was.
        from_one: scores 2 sigmoid(x W) with W = 0, which change no output; otherwise sigmoid(x W) with W random, drawn
            like every other matrix of a new model, so that scores start near one half.
    """
    config = {**vars(plain.config), "variant": "g1_elementwise"}
    gated = build_lm(plain.config, **config)
    left = gated.load_state_dict(plain.state_dict(), strict=False)
    wrong = [name for name in left.missing_keys if ".gates.g1." not in name] + left.unexpected_keys
    if wrong:
        raise RuntimeError(f"the gated model differs from the plain one in more than its gates: {wrong[0]}")
    for block in gated.blocks if from_one else ():
        scores = block.attention.gates["g1"].scores
        torch.nn.init.zeros_(scores.linear.weight)
        scores.activation = double_sigmoid
    return gated


def train(model, plan: dict, corpus, seed: int, device, more: bool = False, folder: Path | None = None):
    """The first phase, or the second, whose batches go on where those of the first ended."""
    before, steps, rate = (plan["steps"], plan["more_steps"], "more_rate") if more else (0, plan["steps"], "rate")
    batches = TextBatches(corpus.train, plan["context"], plan["batch"], seed=seed)
    config = TrainConfig(
        steps=steps,
        warmup=int(steps * plan["warmup_share"]),
        rate=plan[rate],
        seed=seed,
        device=str(device),
        name=f"{'more' if more else 'first'} #{seed}",
        out=folder and str(folder),
        resume=bool(folder),
    )
    result = Trainer(model, lm_loss, lambda step, *part: batches.at(step + before, *part), config).run()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    return result


def first_phase(variant: str, seed: int, plan: dict, corpus, device, folder: Path):
    """The model after the first phase, from its checkpoint where that is there already.

    Returns:
        (model, or None if it diverged; seconds it took now).
    """
    done = list_checkpoints(folder)
    if done and done[-1].name == f"step_{plan['steps']:06d}":
        return load_model(done[-1]).to(device), 0.0
    torch.manual_seed(seed)
    model = build_lm(plan["size"], variant=variant, context=plan["context"])
    result = train(model, plan, corpus, seed, device, folder=folder)
    return None if result.stopped else model, result.seconds + result.compile_seconds


def train_arm(arm: str, seed: int, plan: dict, corpus, device, work: Path) -> dict:
    """Goes on from the first phase in the way of one arm, and measures.

    Returns:
        test, measures (None where training diverged), before and when_added (validation loss at the end of the first
        phase and after the gate was added), curve of the second phase, parameters, seconds.
    """
    precision = choose_precision("auto", device)
    variant = "g1_elementwise" if arm == "from the start" else "none"
    model, seconds = first_phase(variant, seed, plan, corpus, device, work / f"{variant}_{seed}")
    if model is None:
        return {"test": None, "measures": None, "before": None, "when_added": None, "seconds": seconds}
    before = evaluate(model, corpus.validation, plan, device, precision)
    if arm.startswith("late"):
        torch.manual_seed(seed + 1000)  # of the random gate
        model = add_gate(model.cpu(), arm == "late, from one").to(device)
    when_added = evaluate(model, corpus.validation, plan, device, precision)
    result = train(model, plan, corpus, seed, device, more=True)
    every, spoilt = max(1, plan["more_steps"] // 100), result.stopped is not None
    held_out = TextBatches(corpus.test, context=plan["context"], batch=8).sequential(PROBED // 8)
    probed = [batch[:, :-1] for batch in held_out]  # [8, T] each
    dtype = torch.bfloat16 if precision == "bf16" else None
    return {
        "test": None if spoilt else evaluate(model, corpus.test, plan, device, precision),
        "measures": None if spoilt else measure(model, probed, dtype),
        "before": before,
        "when_added": when_added,
        "curve": [[i, round(result.losses[i], 4)] for i in range(0, len(result.losses), every)],
        "parameters": parameters(model),
        "seconds": seconds + result.seconds + result.compile_seconds,
    }


# ---------------------------------------------------------------------------------------------- the record
def build_record(log: RunLog, runs: dict[str, list[dict]], seeds: list[int], scale: str, corpus) -> dict | None:
    """Rows of the arms that trained to the end, claims, effects of the late gates; None if every arm diverged."""
    diverged = [arm for arm, found in runs.items() if any(run["result"]["test"] is None for run in found)]
    rows = [make_row(arm, found) for arm, found in runs.items() if arm not in diverged]
    if not rows:
        return None
    judged, effects = judge(rows, CLAIMS), late_effects(rows)
    record = records.make(
        files=FILES,
        id="ch07_late_gate",
        chapter=7,
        claim="a gate added in continued training does not bring what one from the start brings",
        command=f"python -m minigated run ch07_late_gate --scale {scale} --seeds {len(seeds)}",
        config={**log.settings, "claims": judged, "late_effects": effects},
        seeds=seeds,
        metric={"name": "nats a byte", "split": "test", "better": "lower"},
        rows=rows,
        verdict=next((j["verdict"] for j in judged if j["claim"] == CLAIMS[0][0]), None),
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(run["result"]["seconds"] for found in runs.values() for run in found),
        note=f"{describe(rows, list(runs), diverged, effects)} {log.provenance()}".strip(),
    )
    return log.as_made(record)


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains what the log lacks, arm by arm so that seeds share a compilation, and writes the record."""
    for name in names or NAMES:
        one_of("row", name, NAMES)
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    corpus, plan = find_text(text or TEXTS[scale]), PLANS[scale] | RECIPE
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    settings = plan | {"text": corpus.name, "sha256": corpus.sha256, "match_parameters": False}
    log = RunLog(folder, "ch07_late_gate", settings, FILES, resume)
    work, wanted = Path("runs") / "ch07_late_gate" / log.digest, list(range(seeds or 3))
    runs, start = {}, time.perf_counter()
    for arm in names or NAMES:
        for seed in wanted:
            made = log.get(lambda a=arm, s=seed: train_arm(a, s, plan, corpus, chosen, work), variant=arm, seed=seed)
            runs.setdefault(arm, []).append(made)
            loss = made["result"]["test"]
            said = "diverged" if loss is None else f"{loss:.4f} nats a byte"
            print(f"{time.perf_counter() - start:5.0f} s  {arm:15} seed {seed}: {said}", flush=True)
    record = build_record(log, runs, wanted, scale, corpus)
    if record is None:
        print("every arm diverged; no record written")
        return None
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
