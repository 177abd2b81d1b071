"""Whole backbones: a training step and inference at 32 and at 224 pixels, beside timm's Swin of the same size.

The peer is another function, so its outputs are not compared; its parameters are equal to ours within a hundredth where
a Swin of that size exists. Ours, compiled or recorded, must give what it gives eager and without our kernels.
"Recorded" is the step as one CUDA graph, as `minigated.train` runs a backbone; the peer gets it too. Ours is compiled
part by part, which saves the compiler time; the peer as a whole. Stochastic depth is off everywhere.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from minigated import kernels
from minigated.bench.formulas import TRAINING, vit_bytes, vit_flops
from minigated.bench.lm_rows import BOTH, COMPILED, EAGER, RECORDED, deep_tolerance, training_step
from minigated.bench.peers import equal_swin, named, swin
from minigated.bench.rows import Absent, Case, Prepared, Row
from minigated.bench.runner import run_suite
from minigated.compiled_parts import compile_parts
from minigated.cost import count_flops
from minigated.cuda_graph import Later, recorded
from minigated.device import autocast, choose_precision, plain
from minigated.variants import parameters
from minigated.vit import ViTConfig
from minigated.vit_sizes import SIZES, build_vit

CLAIM = "a gated retention backbone trains at least as fast as a compiled Swin with as many parameters"
FILES = [
    "vit.py", "vit_mixers.py", "vit_parts.py", "vit_sizes.py", "retention.py", "decay.py", "decay_passes.py", "swat.py",
    "swat_tables.py", "layers.py", "windows.py", "tables.py", "kernels/__init__.py", "kernels/depthwise_triton.py",
    "kernels/lines_triton.py", "kernels/local_triton.py", "kernels/windowed_triton.py", "bench/lm_rows.py",
    "bench/peers.py", "cuda_graph.py", "compiled_parts.py", "device.py", "gates.py", "recompute.py", "swat_options.py",
    "bench/suite_vit.py",
]  # fmt: skip
MIXERS = ("retention", "swat")
# name -> size, pixels, first patch, window, images in training and in inference. Patch and window are the peer's too.
SIZED = {
    "cpu": {"32 px, nano": ("nano", 32, 4, 4, 8, 8)},
    "gpu": {
        "32 px, small": ("small", 32, 2, 4, 512, 2048),
        "224 px, small": ("small", 224, 4, 7, 128, 512),
        "224 px, paper": ("paper", 224, 4, 7, 128, 256),
    },
}


def our_config(mixer: str, size: str, pixels: int, patch: int, window: int) -> ViTConfig:
    """A named size at another resolution."""
    config = SIZES[f"gated_swinrmt_{mixer}_{size}"]
    return replace(config, image_size=pixels, stem_stride=patch, window=window, drop_path=0.0)


def images(batch: int, pixels: int, device: torch.device) -> torch.Tensor:
    """Random pictures, channels-last in memory as a data loader should hand them on."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, pixels, pixels, generator=generator).to(device, memory_format=torch.channels_last)


def make_ours(config: ViTConfig, device: torch.device) -> torch.nn.Module:
    """A backbone with the same weights every time."""
    torch.manual_seed(0)
    return build_vit(config, device)


def watched(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights whose gradients the check compares: first and last matrix, and the first filters of each kind.

    Biases are left to the tests: sums of much that cancels, which bfloat16 alone moves by 8 %.
    """
    named = dict(model.named_parameters())
    kinds = ("position.conv.weight", "lce.conv.weight", "dwconv.conv.weight")
    first = [next((p for name, p in named.items() if name.endswith(kind)), None) for kind in kinds]
    matrices = [p for p in named.values() if p.ndim > 1]
    return [matrices[0], *(p for p in first if p is not None), matrices[-1]]


def prepare(make, way: str, training: bool, batch: int, pixels: int, device, checked: bool, facts) -> Prepared:
    """A backbone, ready to train or to look at images.

    Args:
        make: (device) -> the model. way: how it runs. checked: whether the eager model of `make` is the reference.
    """
    model, data = make(device).to(memory_format=torch.channels_last), images(batch, pixels, device)
    model.train(training)
    labels = torch.arange(batch, device=device) % 10
    precision = choose_precision("auto", device)

    def forward():
        with autocast(device, precision):
            y = model(data)
            return F.cross_entropy(y.float(), labels) if training else y

    compiled, graph = way in (COMPILED, BOTH), way in (RECORDED, BOTH)
    by_parts, run = hasattr(model, "parts"), forward
    if compiled and by_parts:
        compile_parts(model)
    elif compiled:
        run = torch.compile(forward, dynamic=False)
    step = training_step(model, run) if training else torch.no_grad()(run)
    weights = watched(model)

    def outputs(run):
        if not training:
            return [torch.no_grad()(run)()]
        value = run()
        return [value, *torch.autograd.grad(value, weights)]

    def check():
        look = partial(outputs, run)
        found = (recorded(look, device) if graph else look)()
        with plain(model), kernels.switched_off():
            return found, outputs(forward)

    by = ("parts" if by_parts else "whole") if compiled else None
    facts = {"parameters": parameters(model), "compiled": by, "recorded": graph, **facts}
    check = check if way != EAGER and checked else None
    if graph:
        step = Later(step, device)
    return Prepared(step, check, facts, deep_tolerance(device), counted=not graph)


def our_rows(name: str, sizes: tuple, training: bool, device) -> list[Row]:
    """Both mixers: eager, and on a GPU recorded, compiled, and both, which runs what the row before it compiled."""
    size, pixels, patch, window, *batches = sizes
    batch, item, rows = batches[0 if training else 1], 2 if device.type == "cuda" else 4, []
    for mixer in MIXERS:
        config = our_config(mixer, size, pixels, patch, window)
        flops = vit_flops(config) * batch * (TRAINING if training else 1)
        moved = vit_bytes(config, parameters(build_vit(config, "meta")), batch, item, training)
        ways = [EAGER, RECORDED, COMPILED, BOTH] if device.type == "cuda" else [EAGER]
        for way in ways:
            make = partial(make_ours, config)
            rows.append(
                Row(
                    f"minigated {mixer}, {way}",
                    partial(prepare, make, way, training, batch, pixels, device, True, {"mixer": mixer}),
                    state="reference" if way == EAGER else "equal",
                    flops=flops, bytes=moved, items=batch,
                )
            )  # fmt: skip
    return rows


def prepare_swin(options_of, way: str, training: bool, batch: int, pixels: int, device) -> Prepared:
    """timm's Swin, its size found when it is asked for, so that a missing library is one absent row."""
    options, count = options_of()
    facts = {"library": named("timm"), "swin": {k: str(v) for k, v in options.items()}}
    torch.manual_seed(0)
    prepared = prepare(partial(swin, options), way, training, batch, pixels, device, False, facts)
    if prepared.facts["parameters"] != count:
        raise Absent(f"timm built {prepared.facts['parameters']:,} parameters where {count:,} were counted")
    meta = torch.device("meta")
    once = count_flops(swin(options, meta).eval(), torch.empty(1, 3, pixels, pixels, device=meta))  # by torch's counter
    prepared.flops = once * batch * (TRAINING if training else 1)
    return prepared


def swin_rows(sizes: tuple, training: bool, device) -> list[Row]:
    """timm's Swin with as many parameters as our retention backbone, in every way that makes it faster."""
    size, pixels, patch, window, *batches = sizes
    config, batch = our_config("retention", size, pixels, patch, window), batches[0 if training else 1]
    target = parameters(build_vit(config, "meta"))
    options_of = partial(equal_swin, target, pixels, patch, window, config.classes, config.depths[2])
    return [
        Row(
            f"timm Swin, equal parameters, {way}",
            partial(prepare_swin, options_of, way, training, batch, pixels, device),
            state="other function",
            items=batch,
        )
        for way in ((EAGER, COMPILED, BOTH) if device.type == "cuda" else (EAGER,))
    ]


def cases(scale: str, device: torch.device) -> list[Case]:
    """Training and inference of every size."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = []
    for name, sizes in SIZED[scale].items():
        for training in (True, False):
            rows = our_rows(name, sizes, training, device) + swin_rows(sizes, training, device)
            made.append(Case(f"{name}, {'training' if training else 'inference'}", rows, "images", dtype))
    return made


run = partial(run_suite, "vit")
