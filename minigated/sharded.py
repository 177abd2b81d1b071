"""A model whose weights are spread over processes: FSDP2, the second way to use several GPUs.

With "ddp" every process holds all weights, gradients and both moments of AdamW: 16 bytes a parameter in float32. With
"fsdp" each of N processes keeps one N-th of all four; a block's weights are put together just before the block runs,
forward and backward, and dropped after it (ZeRO, arXiv 1910.02054, stage 3; PyTorch's form: arXiv 2304.11277). Each
gradient is averaged and cut in one go, so a process sees its own share of it.

Weights stay float32 and "bf16" stays autocast, as in the rest of the loop, so both ways train the same numbers. The
price: bf16 copies of the matrices, which autocast makes for the backward pass, live until it is over.
"""

import torch
import torch.distributed as dist
from torch import nn

from minigated.distributed import World, average
from minigated.errors import InputError


def shard_model(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    """Spreads `model` over all processes, in place: each of `model.blocks` by itself, then what is left.

    All start from the leader's weights. Parameters are `DTensor`s afterwards: `value.full_tensor()`, called by all
    processes, is the whole of one. Only calls of the model itself put weights together; another method that computes
    must be named to `torch.distributed.fsdp.register_fsdp_forward_method` first.

    Args:
        model: on any device; its blocks move to `device` one by one, so that the whole need not fit there.
        device: of this process.
        world: all processes; they must already be joined.

    Raises:
        InputError: a parameter without dimensions, which has no rows to spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, value in model.named_parameters():
        if value.ndim == 0:
            raise InputError(
                f"parallel 'fsdp' cuts parameters by rows and {name} has no dimensions; "
                "make its shape [1], or use 'ddp'"
            )
    _from_leader([*model.parameters(), *model.buffers()], device)
    mesh = init_device_mesh(device.type, (world.size,))
    for block in getattr(model, "blocks", ()):
        hand_on_lists(fully_shard(block, mesh=mesh))
    return hand_on_lists(fully_shard(model, mesh=mesh))


class _Hidden:
    """A list that torch's walks through arguments take for a value."""

    def __init__(self, held: list):
        self.held = held


def hand_on_lists(module: nn.Module) -> nn.Module:
    """Lets an empty list given to `module` reach its `forward` as that very list, to be filled there.

    What FSDP2 does to tensors before a forward pass it does on a copy of the arguments (torch 2.11 always, later
    versions on a GPU). The `routings` of a mixture of experts would be filled in the copy, and the balance loss be zero
    without a word.
    """

    def hide(_, args, kwargs):
        box = lambda value: _Hidden(value) if type(value) is list and not value else value
        return tuple(box(value) for value in args), {name: box(value) for name, value in kwargs.items()}

    def show(_, args, kwargs):
        unbox = lambda value: value.held if isinstance(value, _Hidden) else value
        return tuple(unbox(value) for value in args), {name: unbox(value) for name, value in kwargs.items()}

    module.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)  # before all hooks there are
    module.register_forward_pre_hook(show, with_kwargs=True)  # after all of them
    return module


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the leader's buffers, such as BatchNorm's running means: data-parallel copies do so too.

    Training does not read them, so it is enough before validation and saving.
    """
    for buffer in model.buffers():
        _from_leader([buffer], buffer.device)


@torch.no_grad()
def _from_leader(tensors: list[torch.Tensor], device: torch.device) -> None:
    for tensor in tensors:
        there = tensor.detach().to(device).contiguous()  # NCCL sends only what is on a GPU
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a spread tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a spread tensor, when all processes ask for it; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def all_finite(model: nn.Module, world: World) -> bool:
    """Whether every weight is a finite number: one answer from the device, the same in all processes."""
    here = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all()
    return average(here.float(), world).item() == 1.0
