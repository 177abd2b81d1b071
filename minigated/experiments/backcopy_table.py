"""`ch02_backcopy`: the sink of the toy task on a CPU, with and without a gate, and what it depends on."""

import time
from pathlib import Path

from minigated import records
from minigated.device import choose_device
from minigated.errors import InputError, one_of
from minigated.experiments.backcopy import train_backcopy
from minigated.statistics import verdict

FILES = [f"minigated/{n}.py" for n in ("attention", "gates", "layers", "optimizer", "recipe", "train")]
FILES += ["minigated/data/streams.py", "minigated/data/toys.py", "minigated/experiments/backcopy.py"]
ARMS = {
    "none": {},
    "elementwise": {"gate": "elementwise"},
    "headwise": {"gate": "headwise"},
    "none, embeddings of 0.02": {"embedding_std": 0.02},
    "none, cosine over 300 steps": {"schedule": 300},
}
STEPS = 300


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict:
    """Trains every arm with every seed and writes the record; a few minutes on a CPU at either scale."""
    if text:
        raise InputError(f"ch02_backcopy draws its own text, --text {text!r} is not used")
    for name in names or ():
        one_of("row", name, ARMS)
    wanted, start = list(range(seeds or 3)), time.perf_counter()
    chosen, rows = choose_device("cpu" if device == "auto" else device), []
    for name in names or ARMS:
        began = time.perf_counter()
        histories = [train_backcopy(steps=STEPS, seed=s, device=str(chosen), **ARMS[name])[1] for s in wanted]
        seconds = (time.perf_counter() - began) / len(wanted)
        last = {key: [history[-1][key] for history in histories] for key in histories[0][-1] if key != "step"}
        means = {key: sum(values) / len(values) for key, values in last.items() if key != "share_other"}
        rows.append(records.row(name, last["share_other"], seconds=seconds, histories=histories, **means))
        print(f"{name:30} share on BOS {rows[-1]['mean']:.3f}, {seconds:.0f} s a run", flush=True)
    by = {row["name"]: row["values"] for row in rows}
    gates = [g for g in ("elementwise", "headwise") if g in by and "none" in by]
    record = records.make(
        files=FILES,
        id="ch02_backcopy",
        chapter=2,
        claim="a head that has nothing to say looks at the first token, and less so when a gate lets it say nothing",
        command=f"python -m minigated run ch02_backcopy --seeds {len(wanted)}",
        config={"steps": STEPS, "arms": ARMS},
        seeds=wanted,
        metric={"name": "attention weight on BOS, non-trigger queries", "split": "fresh sequences", "better": "lower"},
        rows=rows,
        verdict=verdict(by["elementwise"], by["none"], -1) if "elementwise" in gates else None,
        data={"name": "bigram-backcopy", "sha256": ""},
        seconds=time.perf_counter() - start,
        note=f"Step {STEPS} of a schedule of 1,500. The verdict is on the elementwise gate against none.",
    )
    if chosen.type == "cpu":  # make() names a GPU where there is one
        record["hardware"] = records.processor()
    print(f"wrote {records.write(record, out or (records.FOLDER if names is None else Path('runs')))}")
    return record
