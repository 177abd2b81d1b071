"""A backbone on a CPU that allocates and keeps what it would on a GPU; its numbers mean nothing (chapter 9).

Three things differ on a GPU. Our kernels keep their inputs for the backward pass, where the plain form keeps queries,
keys, weights and sums besides. Autocast for CUDA runs norms and softmax in float32, from a copy of their input that
they keep, where that for CPUs leaves their dtype alone. And under autocast a convolution of ours casts its map.

The stand-ins return zeros and have the `_keep` and the gradients' sizes of the operations in `minigated.kernels`; a
test holds their arguments to these. What is inside of the operations themselves, a kernel's partial sums say, is left
out.
"""

import contextlib
import functools
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated import kernels

WIDE = ((F, "layer_norm"), (F, "softmax"), (torch, "softmax"))  # what of a backbone autocast for CUDA runs in float32


def _like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=x.dtype)


class Depthwise(torch.autograd.Function):
    """`minigated::depthwise`: keeps the map and the filters."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        return _like(gradient), _like(weight), weight.new_zeros(len(weight))


class Windowed(torch.autograd.Function):
    """`minigated::windowed`: keeps queries and keys, or all three, in one tensor; and the tables."""

    @staticmethod
    def forward(ctx, packed, v, *tables):
        ctx.save_for_backward(packed, v, *tables)
        return packed.new_zeros(packed.shape[:3] + packed.shape[4:])

    @staticmethod
    def backward(ctx, gradient):
        packed, v, *tables = ctx.saved_tensors
        gradient = gradient.contiguous()
        return _like(packed), _like(v), *(None for _ in tables)


class WindowedLocal(torch.autograd.Function):
    """`minigated::windowed_local`: keeps queries, keys and values in one tensor, the filters and the tables."""

    @staticmethod
    def forward(ctx, qkv, filters, bias, *tables):
        ctx.save_for_backward(qkv, filters, bias, *tables)
        passes = qkv.new_zeros(qkv.shape[:3] + qkv.shape[4:])
        return _like(passes)

    @staticmethod
    def backward(ctx, gradient):
        qkv, filters, bias, *tables = ctx.saved_tensors
        gradient = gradient.contiguous()
        more = _like(gradient)  # noqa: F841 - of the convolution, there while that of the passes is made
        return _like(qkv), _like(filters), _like(bias), *(None for _ in tables)


def depthwise(x, weight, bias, mirror, own, plus):
    """Stands in for the operation of that name."""
    return Depthwise.apply(x, weight, bias)


def windowed(packed, v, cos, sin, row_add, column_add, row_times, column_times, window, shift, softmax):
    """Stands in for the operation of that name."""
    return Windowed.apply(packed, v, cos, sin, row_add, column_add, row_times, column_times)


def windowed_local(qkv, filters, bias, cos, sin, row_add, column_add, window, shift):
    """Stands in for the operation of that name."""
    return WindowedLocal.apply(qkv, filters, bias, cos, sin, row_add, column_add)


OPERATIONS = {"depthwise": depthwise, "windowed": windowed, "windowed_local": windowed_local}


def _wide(function):
    """The function in float32, from copies of its inputs, wherever autocast is on."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            return function(*wide, **kwargs)

    return run


def _usable(x: Tensor) -> bool:
    return kernels._allowed and x.dtype in kernels.DTYPES


@contextlib.contextmanager
def as_on_a_gpu(precision: str):
    """While it lasts, models on the CPU call the stand-ins wherever one on a GPU would call our kernels.

    Args:
        precision: "float32" or "bf16", which is autocast.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    wide = precision == "bf16"
    torch.set_autocast_enabled("cuda", wide)  # what the calls of the kernels ask for; CPU tensors do not
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    replaced = [(kernels, "usable", _usable), (kernels, "_kernel", lambda name, x: OPERATIONS[name])]
    replaced += [(home, name, _wide(getattr(home, name))) for home, name in WIDE]
    try:
        with contextlib.ExitStack() as stack:
            for one in replaced:
                stack.enter_context(mock.patch.object(*one))
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
