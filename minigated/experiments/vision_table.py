"""Backbones trained under one budget: what a vision experiment declares, and how it is run and judged."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from minigated import records
from minigated.data.images import load_images
from minigated.device import choose_device
from minigated.errors import one_of
from minigated.experiments.runlog import RunLog
from minigated.experiments.vision_runs import FILES, train_one
from minigated.statistics import paired_difference, verdict
from minigated.vit import ViTConfig
from minigated.vit_sizes import DECOMPOSED_BUT_LAST, SIZES

GATED = {"ffn_ratios": 2.5}  # a gate of C x C a block is paid for by half a C in the feed-forward: equal parameters
MIXERS: dict[str, dict] = {
    "RMT": {"mixers": DECOMPOSED_BUT_LAST, "window": None},
    "Swin attention": {"mixers": "swin"},
    "Retention without gate": {"gate": "none"},
    "Retention": GATED,
    "SWAT": {"mixers": "gated_swinrmt_swat", **GATED},
}
RECIPE = {"batch": 512, "rate": 4e-3, "warmup": 2, "weight_decay": 0.05, "augment": {"smoothing": 0.1}}
AT_64 = RECIPE | {"rate": 2e-3}  # twice as much upsets models without a gate there, see `ch06_doubled_rate`
NANO_RECIPE = {**RECIPE, "batch": 64, "epochs": 0.2, "warmup": 0.05}


@dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        name: of the row. options: fields of `ViTConfig` over the table's size. paper: the paper's accuracy, per cent.
        single: one seed only.
    """

    name: str
    options: dict = field(default_factory=dict)
    paper: float | None = None
    single: bool = False


@dataclass(frozen=True)
class VisionTable:
    """One experiment.

    Attributes:
        id, chapter, claim: of the record.
        arms: the rows. claims: (sentence, contender, rival), the paper finds the contender better; the first decides
            the record's verdict; none for a table that only describes.
        size: name of the models by scale. plans: by scale, see `train_one`. images: by scale.
        options: fields of `ViTConfig` for all rows.
    """

    id: str
    chapter: int
    claim: str
    arms: tuple[Arm, ...]
    claims: tuple[tuple[str, str, str], ...]
    size: dict[str, str]
    plans: dict[str, dict]
    images: dict[str, str]
    options: dict = field(default_factory=dict)

    def config(self, arm: Arm, scale: str, classes: int, side: int) -> ViTConfig:
        """The backbone of a row."""
        base = SIZES[self.size[scale]]
        return dataclasses.replace(base, classes=classes, image_size=side, **self.options | arm.options)


def make_row(arm: Arm, runs: list[dict]) -> dict:
    """A record's row from the runs of one arm, one a seed."""
    results = [run["result"] for run in runs]
    mean = lambda key: sum(r[key] for r in results) / len(results)
    return records.row(
        arm.name,
        [r["test"] for r in results],
        arm.paper,
        validation=mean("validation"),
        parameters=results[0]["parameters"],
        images_per_second=mean("images_per_second"),
        seconds=mean("seconds"),
        steps=results[0]["steps"],
        curves=[r["curve"] for r in results],
        followed=[r["followed"] for r in results],
        options={k: v for k, v in dataclasses.asdict(arm)["options"].items()} or None,
    )


def judge(claims, rows: list[dict]) -> list[dict]:
    """The claims whose rows are there, over the seeds that both have, with their verdict by the house rule."""
    by, judged = {row["name"]: row["values"] for row in rows}, []
    for claim, name, rival in claims:
        if name in by and rival in by:
            pairs = [list(values) for values in zip(*zip(by[name], by[rival]))]
            mean, error = paired_difference(*pairs)
            judged.append(
                {"claim": claim, "difference": mean, "standard_error": error, "verdict": verdict(*pairs, 1)}
            )
    return judged


def build_record(table: VisionTable, log: RunLog, arms, seeds: list[int], scale: str, images) -> dict:
    """Rows, claims, what was not run."""
    found = {arm.name: [log.find(arm=arm.name, seed=s) for s in (seeds[:1] if arm.single else seeds)] for arm in arms}
    runs = {name: [run for run in made if run] for name, made in found.items() if any(made)}
    arms = [arm for arm in arms if arm.name in runs]
    diverged = [name for name, found in runs.items() if any(run["result"]["test"] is None for run in found)]
    rows = [make_row(arm, runs[arm.name]) for arm in arms if arm.name not in diverged]
    judged = judge(table.claims, rows)
    missing = [arm.name for arm in table.arms if arm.name not in runs]
    single = [arm.name for arm in arms if len(runs[arm.name]) == 1]
    fewer = [arm.name for arm in arms if 1 < len(runs[arm.name]) < len(seeds)]
    kinds = (("Not run", missing), ("Diverged", diverged), ("Single run", single), ("Fewer seeds", fewer))
    said = [f"{why}: {'; '.join(which)}." for why, which in kinds if which]
    said += [f"{j['claim']}: {j['difference']:+.2f} points, {j['verdict']}." for j in judged]
    record = records.make(
        files=FILES,
        id=table.id,
        chapter=table.chapter,
        claim=table.claim,
        command=f"python -m minigated run {table.id} --scale {scale} --seeds {len(seeds)}",
        config={**log.settings, "claims": judged},
        seeds=seeds,
        metric={"name": "top-1 accuracy in %", "split": "test", "better": "higher"},
        rows=rows,
        verdict=judged[0]["verdict"] if judged else None,
        data={"name": images.name, "sha256": images.sha256},
        seconds=sum(run["result"]["seconds"] + run["result"]["compile_seconds"] for run in log.runs),
        note=" ".join([*said, log.provenance()]).strip(),
    )
    return log.as_made(record)


def run_table(
    table: VisionTable, scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None,
    made_only=False,
) -> dict:  # fmt: skip
    """Trains what the log lacks, arm by arm so that seeds share a compilation, and writes the record.

    Args:
        table: what to run. scale: "cpu" (a few steps, to see that it works) or "gpu".
        seeds: how many; three by default. device, out, resume: as everywhere.
        text: name or folder of other images than the table's own. names: arms to run; all by default.
        made_only: train nothing; the record is that of the runs in the log.
    """
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" and not made_only else device)
    for name in names or ():
        one_of(f"arm of {table.id}", name, [arm.name for arm in table.arms])
    images, plan = load_images(text or table.images[scale]), table.plans[scale]
    settings = plan | {"size": table.size[scale], "options": table.options, "images": images.name}
    settings |= {"sha256": images.sha256, "side": images.size}
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    log = RunLog(folder, table.id, settings, FILES, resume, made_only)
    wanted, start = list(range(seeds or 3)), time.perf_counter()
    arms = [arm for arm in table.arms if not names or arm.name in names]
    for arm in arms:
        config = table.config(arm, scale, len(images.classes), images.size)
        for seed in wanted[:1] if arm.single else wanted:
            run = lambda c=config, s=seed, n=arm.name: train_one(c, s, plan, images, chosen, n)
            made = log.get(run, arm=arm.name, seed=seed)
            if made is None:
                continue
            result = made["result"]
            said = "diverged" if result["test"] is None else f"{result['test']:.2f} % of the test images"
            at, speed = f"{time.perf_counter() - start:5.0f} s", f"{result['images_per_second']:,.0f} images/s"
            print(f"{at}  {arm.name:28} seed {seed}: {said}, {speed}", flush=True)
    record = build_record(table, log, arms, wanted, scale, images)
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
