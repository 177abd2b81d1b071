"""Rows of tokens to their experts, and what comes back added up (chapter 7): sorting, dispatching, collecting.

A token visits k experts, so N tokens make A = N k assignments. Sorted by expert, those of one expert stand next to each
other. Dispatching puts a token's row to each of its k places there; collecting adds up what stands at these places.

Each is the other's gradient, as a matrix and its transpose are, and both read rows and write each result once. For
`x[token]` PyTorch cannot know which gradients meet in a row: it sorts them once more, or adds one at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Assignments (token, expert) in the order of the experts; assignment i is choice i % k of token i // k.

    Attributes:
        order: [A], order[p] is the assignment at place p. back: [A], back[i] is the place of assignment i, the inverse.
        ends: [E] int32, one past the last place of each expert. k: experts a token.
    """

    order: Tensor
    back: Tensor
    ends: Tensor
    k: int

    @property
    def token(self) -> Tensor:
        """[A] the token of each."""
        return self.order // self.k

    @property
    def counts(self) -> Tensor:
        """[E] how many each expert has."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def sort_by_expert(chosen: Tensor, experts: int) -> Sorted:
    """Puts the tokens of one expert next to each other. chosen [N, k]; no value is read back from the device."""
    narrow = torch.int16 if experts <= 2**15 else torch.int32  # a GPU sorts some bits a pass
    ranked, order = chosen.flatten().to(narrow).sort(stable=True)  # [A] each
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ranked, torch.arange(experts, device=order.device).to(narrow), right=True, out_int32=True)
    return Sorted(order, back, ends, chosen.shape[1])


def summed(x: Tensor) -> Tensor:
    """Sum over the second dimension, [N, k, ...] -> [N, ...]; for a compiler in steps of fewer than eight.

    It writes those out. Of eight and more it makes a loop: on an H200 0.16 ms where reading the rows takes 0.035.
    """
    while torch.compiler.is_compiling() and x.shape[1] >= 8:
        few = next((step for step in range(7, 1, -1) if x.shape[1] % step == 0), None)
        if few is None:
            break
        x = x.unflatten(1, (-1, few)).sum(2)
    return x.sum(1)


def _keep(ctx, inputs, output) -> None:
    _, order, back, ctx.k = inputs
    ctx.save_for_backward(order, back)


class _Dispatched(torch.autograd.Function):
    generate_vmap_rule, setup_context = True, staticmethod(_keep)

    @staticmethod
    def forward(x: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        return x[order // k]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Collected.apply(gradient, *ctx.saved_tensors, ctx.k), None, None, None


class _Collected(torch.autograd.Function):
    generate_vmap_rule, setup_context = True, staticmethod(_keep)

    @staticmethod
    def forward(rows: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        return summed(rows[back].view(len(back) // k, k, *rows.shape[1:]))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Dispatched.apply(gradient, *ctx.saved_tensors, ctx.k), None, None, None


def dispatch(x: Tensor, plan: Sorted) -> Tensor:
    """Each token's row to its k places. x [N, ...] -> [A, ...]."""
    return _Dispatched.apply(x, plan.order, plan.back, plan.k)


def collect(rows: Tensor, plan: Sorted) -> Tensor:
    """The sum of what stands at the k places of each token. rows [A, ...] -> [N, ...]."""
    return _Collected.apply(rows, plan.order, plan.back, plan.k)
