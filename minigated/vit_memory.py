"""How much memory training a vision backbone takes on one GPU, and what for (chapter 9).

For language models `minigated.memory` has a formula. Here a true step, forward and backward, runs on the CPU with two
and with three images, see `minigated.step_memory`; all numbers follow from these two exactly, for any batch.

    total = weights + AdamW's two moments + images + copies + kept + moment

copies are autocast's bf16 copies of the matrices. kept is what autograd keeps for the backward pass, by the part of
the model that kept it first: the input of a norm is also the residual stream, so the stream counts with the norms.
moment is what else is there when most is: the gradients so far, and what the running operation reads and writes.
The gradients as a whole, which are there at the end of the backward pass when little else is, are no summand.

A CPU step keeps something else than a GPU's: more in the mixers, where the plain form stores what our fused kernels
compute again, and less under autocast in the norms. By default the step therefore runs with stand-ins for the kernels
and CUDA's casts (`minigated.gpu_stand_ins`). kernels=False counts the CPU's own step, which is 11 to 14 % over the
peaks that an H200 measured in training steps; with the stand-ins the prediction is 0.5 to 2 % under them. Those rows
are in docs/results/ch09_bench_vit.json, the comparison on the page of speeds. What is missing are
workspaces and rounding. Compiled models keep less than this, as the compiler fuses and computes again.
"""

import contextlib
from dataclasses import replace

import torch
import torch.nn.functional as F

from minigated.device import autocast, own_random_state
from minigated.errors import InputError, one_of
from minigated.gpu_stand_ins import as_on_a_gpu
from minigated.memory import FLOAT, MOST
from minigated.step_memory import Growth, watch
from minigated.variants import parameters
from minigated.vit import ViTConfig
from minigated.vit_sizes import SIZES, build_vit

PRECISIONS = ("bf16", "float32")  # bf16 is autocast: float32 weights, products in bf16
BATCHES = (2, 3)  # one image would let some copies be views
LARGEST = 512  # pixels a side: three such images still pass through the largest backbone here
PARTS = ("stem", "positions", "norms", "mixers", "feed-forwards", "downsamples", "head", "other")
IN_BLOCK = {
    "position": "positions", "mixer_norm": "norms", "ffn_norm": "norms", "mixer": "mixers", "ffn": "feed-forwards",
    "mixer_scale": "other", "ffn_scale": "other", "drop_path": "other",
}  # fmt: skip


def part_of(name: str) -> str:
    """The part that a module of a `VisionTransformer` belongs to, by its name; "" is the whole model, and the loss.

    A block itself keeps nothing but its position encoding, which on a GPU is no call of the module; a stage itself
    nothing but the inputs of checkpointed blocks, which are "other".
    """
    first, *rest = name.split(".")
    if first in ("stem", "downsamples"):
        return first
    if first != "stages":
        return "head"
    if len(rest) < 3 or rest[1] != "blocks":  # a stage, its lists, its tables
        return "other"
    return IN_BLOCK[rest[3]] if len(rest) > 3 else "positions"


def growth(config: ViTConfig, precision: str, checkpointing: bool, kernels: bool = True) -> Growth:
    """Two steps of a backbone on the CPU; see `vit_memory_report`."""
    cpu, steps = torch.device("cpu"), []
    with own_random_state(cpu):
        model = build_vit(config, cpu).to(memory_format=torch.channels_last)
        model.train().checkpoint_activations(checkpointing)
        for count in BATCHES:
            images = torch.zeros(count, config.image_channels, *config.image_size)
            images, labels = images.to(memory_format=torch.channels_last), torch.zeros(count, dtype=torch.long)

            def loss(images=images, labels=labels):
                with autocast(cpu, precision):
                    return F.cross_entropy(model(images).float(), labels)

            with as_on_a_gpu(precision) if kernels else contextlib.nullcontext():
                steps.append(watch(model, loss, [images, labels], part_of))
    return Growth(*steps)


def vit_memory_report(
    model: str | ViTConfig, batch: int, precision: str = "bf16", checkpointing=False, image_size=None, kernels=True
) -> dict:
    """Bytes on one GPU in a training step with AdamW, by part.

    Args:
        model: a name of `vit_sizes.SIZES`, or a config.
        batch: images of a step.
        precision: a name of `PRECISIONS`.
        checkpointing: blocks keep their input, see `minigated.recompute`.
        image_size: one side or (height, width); the config's own by default.
        kernels: whether our kernels run, as in an eager step on a GPU; otherwise the CPU's own step is counted.

    Returns:
        parameters, gradients, optimizer; images; copies; parts: {name of `PARTS`: bytes kept}; kept: their sum; moment;
        total: all but the gradients. fullest: how far the backward pass is at the peak, by its operations, 0 to 1; less
        than 0 in the forward pass. And the settings.

    Raises:
        InputError: an unknown model or precision, a batch under 1 or over `memory.MOST`, images over `LARGEST`.
    """
    if isinstance(model, str):
        one_of("vision model", model, SIZES)
    config = SIZES[model] if isinstance(model, str) else model
    config = config if image_size is None else replace(config, image_size=image_size)
    one_of("precision", precision, PRECISIONS)
    if not 1 <= batch <= MOST:
        raise InputError(f"batch {batch}; accepted: 1 to {MOST:,}")
    if max(config.image_size) > LARGEST:
        raise InputError(f"image_size {config.image_size}; accepted: 1 to {LARGEST} pixels a side")
    if not config.classes:
        raise InputError("classes 0; accepted: 1 or more, as a training step needs a loss")
    held = FLOAT * parameters(build_vit(config, "meta"))
    step = growth(config, precision, checkpointing, kernels)
    found = step.kept(batch)
    parts = {name: found.get(name, 0) for name in PARTS}
    sums = {
        "parameters": held, "optimizer": 2 * held,
        "images": FLOAT * batch * config.image_channels * config.image_size[0] * config.image_size[1],
        "copies": step.copies(), "kept": sum(found.values()),
    }  # fmt: skip
    trace = step.trace(batch)
    sums["moment"] = max(trace) - sums["copies"] - sums["kept"]
    fullest = (trace.index(max(trace)) - step.few.forward) / (len(trace) - step.few.forward)
    settings = {"image_size": list(config.image_size), "batch": batch, "precision": precision}
    settings |= {"checkpointing": checkpointing, "kernels": kernels}
    return {**settings, **sums, "gradients": held, "parts": parts, "fullest": fullest, "total": sum(sums.values())}


# ---------------------------------------------------------------------------------------------- the command
LINES = {
    "weights": "parameters", "AdamW's moments": "optimizer", "images": "images", "copies of the weights": "copies",
    **{f"kept: {part}": part for part in PARTS[:-1]}, "kept: inputs, other": "other",
    "for a moment": "moment", "total": "total", "(gradients at the end)": "gradients",
}  # fmt: skip


def vit_memory_rows(name: str, batch: int, image_size: int | None = None) -> list[dict]:
    """Reports of a named backbone in both precisions, without checkpointing and with it."""
    return [
        vit_memory_report(name, batch, precision, again, image_size)
        for precision in PRECISIONS
        for again in (False, True)
    ]


def format_vit_report(name: str, rows: list[dict]) -> str:
    """The rows as columns of a table for a terminal, in GB of 10^9 bytes, or in MB where every total is under 1 GB."""
    first = rows[0]
    power, unit = (9, "GB") if max(row["total"] for row in rows) >= 1e9 else (6, "MB")
    height, width = first["image_size"]
    title = (
        f"{name}: {unit} (10^{power} bytes) on one GPU; {first['batch']:,} x {height} x {width} pixels, an eager step "
        f"with our kernels; float32 weights, bf16 by autocast"
    )
    lines = [title, ""]
    for head, cells in (
        ("precision", [row["precision"] for row in rows]),
        ("blocks keep", ["their input" if row["checkpointing"] else "all" for row in rows]),
        *((head, [f"{(row | row['parts'])[key] / 10**power:.2f}" for row in rows]) for head, key in LINES.items()),
    ):
        lines.append(f"{head:24}" + "".join(f"{cell:>14}" for cell in cells))
    said = "inputs: of checkpointed blocks. for a moment: when memory is fullest, with the gradients so far."
    return "\n".join([*lines, "", said, "total: the peak, without workspaces of libraries and the CUDA context."])
