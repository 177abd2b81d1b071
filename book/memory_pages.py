"""Peak memory: what the records measured on a GPU beside what the package computes for the same steps."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from record_tables import markdown

from minigated import records
from minigated.bench.outcomes import span
from minigated.bench.suite_lm import BESIDE, GATED, GATES
from minigated.bench.suite_vit import SIZED, our_config
from minigated.memory import memory_report
from minigated.vit_memory import vit_memory_report

MIB = 2**20
NEAR = "{:.3f}"  # how computed over measured is shown
HEADS = ["", "batch", "held between steps, MiB", "peak measured, MiB", "computed, MiB", "computed / measured"]


# ---------------------------------------------------------------------------------------------- the steps of the rows
@functools.cache  # one step takes about a second
def vit_step(case: str, mixer: str, kernels: bool = True, again: bool = False) -> dict:
    """Report of an eager training step of a case of the suite `vit`."""
    *sizes, batch, _ = SIZED["gpu"][case]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other on a machine that does something else too
    try:
        return vit_memory_report(our_config(mixer, *sizes), batch, checkpointing=again, kernels=kernels)
    finally:
        torch.set_num_threads(threads)


def vit_row(row: dict) -> tuple[str, str, dict] | None:
    """Name, batch and report of a row; None if nothing computes it."""
    extra = row["extra"]
    case, _, training = extra["case"].rpartition(", ")
    mixer, way = extra["facts"].get("mixer"), extra["contender"].rpartition(", ")[2]
    if training != "training" or mixer is None or way != "eager" or case not in SIZED["gpu"]:
        return None
    return f"{case}: {extra['contender']}", f"{extra['items']:,} images", vit_step(case, mixer)


def lm_row(row: dict) -> tuple[str, str, dict] | None:
    """The same for a row of the suite `lm`."""
    extra = row["extra"]
    case, known = extra["case"].removeprefix("training, ").removeprefix("gates, "), BESIDE["gpu"] | GATED["gpu"]
    case = case.partition(", ")[0]
    if not extra["contender"].startswith("minigated") or case not in known:
        return None
    config, batch, length = known[case]
    gate, facts = extra["contender"].removeprefix("minigated, gate ").partition(",")[0], extra["facts"]
    config = replace(config, variant=GATES.get(gate, "none"), ffn_width=facts["ffn_width"])
    report = memory_report(config, 1, batch, length, chunk=facts.get("chunk", 0))
    return f"{case}: {extra['contender']}", f"{batch} x {length:,} tokens", report


ROWS: dict[str, Callable] = {"ch09_bench_vit": vit_row, "ch09_bench_lm": lm_row}


def compared(record: dict) -> list[tuple[str, str, float, float, dict]]:
    """Name, batch, held and peak in MiB, and report of every row that has both a measured and a computed peak."""
    found = []
    for row in record["rows"]:
        if row["extra"].get("peak_mib") and (one := ROWS[record["id"]](row)):
            found.append((*one[:2], row["extra"]["held_mib"], row["extra"]["peak_mib"], one[2]))
    return found


# ---------------------------------------------------------------------------------------------- the page
def table(record: dict) -> str:
    """One row each: held, measured, computed, and how near they are."""
    made = [HEADS]
    for name, batch, held, peak, report in compared(record):
        total = report["total"] / MIB
        made.append([name, batch, f"{held:,.0f}", f"{peak:,.0f}", f"{total:,.0f}", NEAR.format(total / peak)])
    return markdown(made)


def vit_words(record: dict) -> str:
    """What the peak of a backbone is made of, in numbers of the largest row; and where the count is off."""
    rows = compared(record)
    name, _, _, _, report = max(rows, key=lambda row: row[3])
    share = {part: f"{100 * size / report['total']:.0f} %" for part, size in report["parts"].items()}
    held = f"{100 * (report['parameters'] + report['optimizer'] + report['images']) / report['total']:.0f} %"
    plain, again, all_kept = (
        vit_step("32 px, small", "retention", *options)["total"] for options in ((False,), (True, True), ())
    )
    return (
        f"Of the step with the highest peak ({name}) {held} are weights, AdamW's moments and images. Nearly all of the "
        f"rest is what autograd keeps for the backward pass: mixers {share['mixers']}, feed-forwards "
        f"{share['feed-forwards']}, norms with the residual stream {share['norms']}, stem {share['stem']}. Memory is "
        f"fullest after {100 * report['fullest']:.0f} % of the backward pass' operations. The computation runs a step "
        f"with a few images on a CPU, with stand-ins that keep what our kernels keep; computed over measured is "
        f"{span((row[4]['total'] / MIB / row[3] for row in rows), NEAR)}; the libraries' workspaces and rounding are "
        f"not counted. Without the kernels the first step of the table would take {plain / all_kept:.2f} times its "
        f"peak, with checkpointing {again / all_kept:.2f} times (both computed, not measured)."
    )


def lm_words(record: dict) -> str:
    """The same for language models."""
    rows = compared(record)
    ratios = {way: [row[4]["total"] / MIB / row[3] for row in rows if (", eager" in row[0]) == (way == "eager")]
              for way in ("eager", "compiled")}  # fmt: skip
    name, _, _, _, report = max(rows, key=lambda row: row[4]["total"])
    share = {part: f"{100 * report[part] / report['total']:.0f} %" for part in ("activations", "loss")}
    off = " and ".join(f"{span(values, NEAR)} for {way} steps" for way, values in ratios.items() if values)
    return (
        f"The formula adds up weights, gradients and moments, autocast's copies, what backward keeps and the logits of "
        f"an eager step ({name}: activations {share['activations']}, the moment of the loss {share['loss']}), though "
        f"they are not all there at once. Computed over measured is {off}. A compiled step keeps less, as the compiler "
        f"fuses and computes cheap things again, and for it the formula is a bound from above only."
    )


WORDS = {"ch09_bench_vit": vit_words, "ch09_bench_lm": lm_words}


def peaks(results: Path, **_) -> str:
    """A table for each suite and what the numbers come from."""
    there = {record["id"]: record for record in records.all_records(results) if record["id"] in ROWS}
    parts = [
        "What one training step needs at most, and what it holds between steps: weights, AdamW's moments, its data. "
        "The measured numbers are the records'; the computed ones are made with this page by `minigated.vit_memory` "
        "and `minigated.memory`. `python -m minigated memory MODEL` prints them for a named model and any batch."
    ]
    for name in ROWS:
        if name in there and compared(there[name]):
            parts += [f"**Suite `{name.removeprefix('ch09_bench_')}`**", table(there[name]), WORDS[name](there[name])]
    return "\n\n".join(parts) if len(parts) > 1 else "There are no records with a peak yet."
