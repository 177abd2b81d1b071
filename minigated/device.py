"""Where and how a model runs: device, precision, compilation, deterministic kernels, random state.

Each choice is made once, by name, and says no where the name cannot be honoured: nothing falls back silently.
"""

import contextlib
import os
import re
from collections.abc import Callable

import torch
from torch import nn

from minigated.errors import InputError
from minigated.stacked import stacked

GRAPHS = 64  # of one function
_compiled_last: str | None = None


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called `name`; plain "cuda" and "auto" take GPU number `local_rank`.

    Raises:
        InputError: unknown name, or a GPU that is not there; the message lists what is.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", "cuda" if name == "auto" else str(name))
    if match is None:
        raise InputError(f"unknown device {name!r}; accepted: auto, cpu, cuda, cuda:N")
    index = local_rank if match[1] is None else int(match[1])
    if index >= count:
        reason = "" if torch.backends.cuda.is_built() else " (this PyTorch is built without CUDA)"
        raise InputError(f"device {name!r} asks for GPU {index}, which is not there; there is: {there}{reason}")
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> str:
    """What `name` comes to: "auto" is bf16 on a GPU that computes in it, float32 elsewhere."""
    if name != "auto":
        return name
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if native else "float32"


def choose_compile(name: str, device: torch.device, model: nn.Module) -> str:
    """What `name` comes to: "auto" compiles on a GPU, by blocks where there are any, not on a CPU."""
    blocks = getattr(model, "blocks", None)
    if name == "blocks" and not blocks:
        raise InputError(
            f"compile 'blocks' needs a model with `blocks`, {type(model).__name__} has none; accepted: none, whole"
        )
    if name == "graph" and device.type != "cuda":
        raise InputError(f"compile 'graph' needs a CUDA device and this is {device}; accepted: none, blocks, whole")
    if name != "auto":
        return name
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return "none"
    return "blocks" if blocks else "whole"


def autocast(device: torch.device, precision: str):
    """Matrix products in bf16 under "bf16"; nothing under "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def allow_graphs() -> None:
    """Lets `torch.compile` make up to `GRAPHS` graphs of a function in this process.

    A model of several stages compiles its block once a stage, for training and for validation: with its own limit of 8
    PyTorch would quietly run the rest uncompiled.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)


def reset_compilation() -> None:
    """Forgets every compiled graph of this process."""
    global _compiled_last
    _compiled_last = None
    torch._dynamo.reset()


@contextlib.contextmanager
def compiled(model: nn.Module, mode: str, backend: str | Callable = stacked):
    """Compiles `model` in place while the context lasts: the whole of it, or each of `model.blocks`.

    Modules keep their class and their state-dict names. Blocks of the same structure share one graph, so
    depth costs no compile time. Graphs are kept when the next model has the same structure (another seed)
    and forgotten when it has not, so that many variants can be trained in one process. Afterwards the model
    is plain again: probes and caches of other shapes then trigger no compilation. The usual backend is PyTorch's,
    told to make layers that read one input one product, see `minigated.stacked`.
    """
    global _compiled_last
    parts = {"none": [], "graph": [], "blocks": list(getattr(model, "blocks", [])), "whole": [model]}[mode]
    parts = [part for part in parts if part._compiled_call_impl is None]
    if parts:
        structure = f"{mode} {backend} {getattr(model, 'config', None)} {model}"
        if structure != _compiled_last:
            reset_compilation()
        _compiled_last = structure
        allow_graphs()
    for part in parts:
        part.compile(backend=backend, dynamic=False)  # stages of a backbone differ in shape; each gets its own kernels
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


@contextlib.contextmanager
def plain(model: nn.Module):
    """Calls `model` uncompiled while the context lasts: other batch sizes and probes then cost no graph."""
    held = [(module, module._compiled_call_impl) for module in model.modules()]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in held:
            module._compiled_call_impl = call


@contextlib.contextmanager
def kernels(deterministic: bool):
    """Deterministic kernels while the context lasts; an operation that has none raises a RuntimeError."""
    if not deterministic:
        yield
        return
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """PyTorch's random state on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts back what `random_state` returned (the CPU's part alone where the GPU's is missing)."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def own_random_state(device: torch.device):
    """A context after which the caller's random state is what it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done everything it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(batch, device: torch.device):
    """Moves a tensor, or the tensors of a tuple, list or dict, without making the host wait."""
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    if device.type == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def first_tensor(batch) -> torch.Tensor:
    """The first tensor of a batch: its elements are what tokens per second count."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch


def micro_batches(batch, count: int) -> list:
    """Cuts a batch along its first dimension into `count` equal parts, each of the batch's own form.

    Args:
        batch: tensor, or tuple, list or dict of tensors, all with the same number of rows.
        count: how many parts; 1 gives the batch itself.

    Raises:
        InputError: the rows do not divide by `count`, or tensors differ in rows: no cut would be equal to the whole.
    """
    if count == 1:
        return [batch]
    rows = len(first_tensor(batch))
    if rows % count:
        fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise InputError(f"accumulate is {count} and this process has {rows} rows of each batch; accepted: {fits}")
    return [_rows(batch, part * rows // count, (part + 1) * rows // count, rows) for part in range(count)]


def _rows(batch, start: int, stop: int, rows: int):
    """Rows start .. stop of every tensor in a batch."""
    if isinstance(batch, dict):
        return {key: _rows(value, start, stop, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_rows(value, start, stop, rows) for value in batch)
    if batch.ndim == 0 or len(batch) != rows:
        raise InputError(
            f"accumulate cuts batches by rows, and one tensor is {list(batch.shape)} where the first has {rows} rows"
        )
    return batch[start:stop]
