"""The cores of chapters 5 and 6, width pass and height pass in windows: the matrix form against the one that fuses.

Each form gets the projected q, k, v of a map, rotates, does both passes and, with `training`, goes back. Forms are
those that `minigated.decay_passes` and `minigated.swat` list, so a new one is timed as soon as it has a name there;
"kernel" is what "auto" takes on a GPU, both passes in one kernel, and absent where that kernel cannot run. "Recorded"
is a call as one CUDA graph, as inside a recorded training step: without the host's time.
"""

from functools import partial

import torch

from minigated import decay_passes, kernels, swat
from minigated.bench.formulas import two_passes
from minigated.bench.rows import Absent, Case, Prepared, Row
from minigated.bench.runner import run_suite
from minigated.cuda_graph import Later
from minigated.decay import rmt_log_decay
from minigated.retention import WindowTableBuilder, decomposed, decomposed_reference
from minigated.swat_tables import SwatTableBuilder

CLAIM = "one fused kernel for both passes of a window, in a CUDA graph, is five times as fast as eager matrix products"
FILES = [
    *("decay.py", "decay_passes.py", "retention.py", "swat.py", "swat_tables.py", "tables.py", "windows.py"),
    *("kernels/__init__.py", "kernels/lines_triton.py", "kernels/windowed_triton.py", "cuda_graph.py"),
    "bench/suite_retention.py",
]
# images, side of the map, channels, heads. 32 channels a head; on a GPU q, k, v are far larger than its cache.
SIZES = {"cpu": (8, 16, 64, 2), "gpu": (64, 56, 128, 4)}
WINDOWS = {
    "cpu": {"retention": (4, 8), "swat": (4,)},
    "gpu": {"retention": (4, 7, 8), "swat": (4, 7, 8)},
}
KERNEL = {"kernel": "auto"}  # on a GPU "auto" is the kernel wherever `require_kernel` is content
WAYS = {  # of each form; a compiler leaves the kernel as it is
    "matmul": ("eager", "compiled"),
    "pointwise": ("eager", "compiled", "compiled and recorded"),
    "kernel": ("eager", "recorded"),
}
WAYS_CPU = {"matmul": ("eager",), "pointwise": ("eager", "compiled"), "kernel": ("eager",)}
CHECKED = 2  # images that are compared with the reference


def swat_by_matrices(qk, v, tables):
    """The matrix form: what the brute-force loops of chapter 6 are held against."""
    return swat.swat_decomposed(qk, v, tables, form="matmul")


def as_projected(mixer: str, qkv) -> list[torch.Tensor]:
    """[B, h, w, 3, H, D] as a model hands it to the core: retention projects all at once, SWAT the values apart."""
    return [qkv] if mixer == "retention" else [qkv[..., :2, :, :].contiguous(), qkv[..., 2, :, :].contiguous()]


CORES = {
    "retention": (decomposed, decomposed_reference, decay_passes.FORMS),
    "swat": (swat.swat_decomposed, swat_by_matrices, swat.FORMS),
}


def make_tables(mixer: str, side: int, heads: int, head_width: int, window: int, shifted: bool, device, dtype=None):
    """The masks, slopes and rotation of a map, on the device."""
    decay = rmt_log_decay(heads)
    if mixer == "retention":
        builder = WindowTableBuilder(head_width, decay, window, shifted)
    else:
        builder = SwatTableBuilder(heads, head_width, decay, window, shifted)
    return builder.to(device, dtype)(side, side)


def require_kernel(x: torch.Tensor, window: int) -> None:
    """Raises `Absent` with the reason where "auto" would silently take another form than the kernel.

    Args:
        x: values [..., H, D]. window: side of the windows.
    """
    if not x.is_cuda:
        raise Absent(f"the fused kernel runs on a GPU, this is a {x.device.type}")
    if not kernels.usable(x):
        raise Absent(f"the fused kernel needs {kernels.WANTED}; these are {x.dtype}")
    if not kernels.fits(x, window, window):
        reason = f"the fused kernel takes windows of up to {kernels.CELLS} cells and heads of up to {kernels.WIDTH}"
        raise Absent(f"{reason}, not {window} x {window} and {x.shape[-1]}")


def prepare(mixer, form, way, sizes, window, shifted, training, device, dtype) -> Prepared:
    """A form of a core, ready to run; `way` is one of `WAYS`."""
    batch, side, channels, heads = sizes
    core, reference, _ = CORES[mixer]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side, side, 3, heads, channels // heads, generator=generator).to(device, dtype)
    grown = torch.randn(qkv[..., 0, :, :].shape, generator=generator).to(device, dtype)
    given = [x.requires_grad_(training) for x in as_projected(mixer, qkv)]
    if form == "kernel":
        require_kernel(qkv[..., 2, :, :], window)
    tables = make_tables(mixer, side, heads, channels // heads, window, shifted, device)
    run = partial(core, form=KERNEL.get(form, form))
    if "compiled" in way:
        run = torch.compile(run, dynamic=False)

    def step():
        with torch.set_grad_enabled(training):
            y = run(*given, tables)
        return [y, *torch.autograd.grad(y, given, grown)] if training else [y]

    if "recorded" in way:
        step = Later(step, device)

    def check():
        got = [x[:CHECKED] for x in step()]
        wide = [x[:CHECKED].detach().double().requires_grad_(training) for x in given]
        exact = make_tables(mixer, side, heads, channels // heads, window, shifted, device, torch.float64)
        y = reference(*wide, exact)
        expected = [y, *torch.autograd.grad(y, wide, grown[:CHECKED].double())] if training else [y]
        return got, expected

    facts = {"window": window, "shifted": shifted, "way": way, "form": form}
    return Prepared(step, check, facts, counted="recorded" not in way)


def case(mixer: str, window: int, sizes, training: bool, device, dtype, shifted=False) -> Case:
    """All forms of a core at a window. On a CPU nothing is recorded, and only the pointwise form is compiled."""
    batch, side, channels, _ = sizes
    cost = two_passes(batch, side, side, channels, window, dtype.itemsize, training)
    names = [*(form for form in CORES[mixer][2] if form != "auto"), "kernel"]
    ways = WAYS if device.type == "cuda" else WAYS_CPU
    rows = [
        Row(
            f"{form}, {way}",
            partial(prepare, mixer, form, way, sizes, window, shifted, training, device, dtype),
            flops=cost.flops, bytes=cost.bytes, items=batch,
        )
        for form in names for way in ways.get(form, ("eager",))
    ]  # fmt: skip
    kind = "training" if training else "inference"
    return Case(f"{mixer} window {window}{' shifted' if shifted else ''} {kind}", rows, "maps", dtype)


def cases(scale: str, device: torch.device) -> list[Case]:
    """Both mixers at each window, forward and backward; on a GPU also forward alone, and shifted windows."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, made = SIZES[scale], []
    for mixer in CORES:
        for window in WINDOWS[scale][mixer]:
            made.append(case(mixer, window, size, True, device, dtype))
        if scale == "gpu":
            made.append(case(mixer, 7, size, False, device, dtype))
            made.append(case(mixer, 7, size, True, device, dtype, shifted=True))
    return made


run = partial(run_suite, "retention")
