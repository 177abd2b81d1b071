"""Data parallel runs started by `torchrun`: who am I, and the few things processes say to each other.

Without torchrun every function here is a no-op for a world of one, so the training loop has no second form.
"""

import atexit
import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from minigated.device import choose_device
from minigated.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and `local_rank` on its machine (the number of its GPU)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """True in the one process that prints, evaluates and saves."""
        return self.rank == 0


def setup_distributed(device: str = "auto") -> World:
    """Joins the processes that torchrun started; alone, returns a world of one and opens nothing.

    NCCL on CUDA, gloo on a CPU. When all processes share this machine, gloo is kept on the loopback
    interface, so that it works without a network.

    Raises:
        InputError: torchrun's variables are incomplete, or this machine has too few GPUs for its processes.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ.get(name) for name in names}
    if not any(given.values()):
        return World()
    for name, value in given.items():
        if value is None or not value.isdigit():
            raise InputError(
                f"{name} is {value!r} while other variables of torchrun are set; start through torchrun"
            )
    world = World(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]))
    if world.size == 1 or dist.is_initialized():
        return world
    place = choose_device(device, world.local_rank)
    if os.environ.get("LOCAL_WORLD_SIZE") == given["WORLD_SIZE"] and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if place.type == "cuda":
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", device_id=place)
    else:
        dist.init_process_group("gloo")
    atexit.register(_leave)
    return world


def _leave() -> None:
    gc.collect()  # a data-parallel wrapper is a cycle; one left over keeps gloo's threads past the end, which aborts
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":  # one that leaves while another still talks to it may abort; wait, not for long
        with contextlib.suppress(RuntimeError):
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=5))
    dist.destroy_process_group()


class Objective(nn.Module):
    """`loss_fn(model, batch)` as a module, so that data parallelism wraps the loss and hands on the model."""

    def __init__(self, model: nn.Module, loss_fn: Callable):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch) -> torch.Tensor:
        loss = self.loss_fn(self.model, batch)
        if loss.ndim:
            raise InputError(f"loss_fn must return a scalar, got shape {list(loss.shape)}")
        return loss


def objective(
    model: nn.Module, loss_fn: Callable, device: torch.device, world: World, sharded: bool = False
) -> nn.Module:
    """The training objective; with several processes, its backward pass averages the gradients over them."""
    alone = Objective(model, loss_fn)
    if world.size == 1 or sharded:  # a spread model averages by itself
        return alone
    return nn.parallel.DistributedDataParallel(alone, device_ids=[device] if device.type == "cuda" else None)


def unsent(objective: nn.Module, unsent: bool):
    """While the context lasts and `unsent` holds, gradients of data-parallel copies add up and are not averaged yet."""
    wrapped = isinstance(objective, nn.parallel.DistributedDataParallel)
    return objective.no_sync() if wrapped and unsent else contextlib.nullcontext()


def average(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The mean of `tensor` over all processes, the same bits in each."""
    if world.size > 1:
        dist.all_reduce(tensor)
        tensor /= world.size
    return tensor


def from_leader(value, world: World):
    """The leader's `value`, in every process."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value, world: World) -> list:
    """The values of all processes, by rank."""
    if world.size == 1:
        return [value]
    box = [None] * world.size
    dist.all_gather_object(box, value)
    return box


def leader_does(work: Callable, world: World):
    """Calls `work()` in the leading process alone and hands its value to all; what it raises, all raise."""
    value, error = None, None
    if world.leads:
        try:
            value = work()
        except Exception as raised:  # the others wait for an answer, so they are told before it goes on
            error = raised
    value, told = from_leader((value, None if error is None else (type(error).__name__, str(error))), world)
    if error is not None:
        raise error
    if told is not None:
        kind, message = told
        raise InputError(message) if kind == "InputError" else RuntimeError(f"process 0 stopped with {kind}: {message}")
    return value


def require_agreement(settings: dict, world: World) -> None:
    """Ends all processes with status 2 and one line when they do not mean the same run; nothing to one process.

    Without this they would train different things, or wait for each other for ever. A ValueError would be printed once
    a process, with a traceback each; so the leader says the line and every process leaves.

    Args:
        settings: names and JSON-able values that must be equal everywhere.

    Raises:
        SystemExit: with status 2, in every process.
    """
    line = next(iter(disagreements(from_all(settings, world))), None)
    if line is None:
        return
    if world.leads:
        print(f"error: {line}", file=sys.stderr, flush=True)
    from_leader(None, world)  # nobody leaves before the line is out: torchrun ends all at the first that does
    raise SystemExit(2)


def disagreements(settings: list[dict]) -> list[str]:
    """A line for each name whose value is not that of process 0; `settings` by rank."""
    lines = []
    for rank, other in enumerate(settings[1:], start=1):
        for name in [*settings[0], *(name for name in other if name not in settings[0])]:
            first, value = (repr(held[name]) if name in held else "missing" for held in (settings[0], other))
            if first != value:
                lines.append(
                    f"the processes disagree: {name} is {first} in process 0 and {value} in process {rank}; "
                    "give all of them the same settings"
                )
    return lines
