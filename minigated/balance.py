"""Keeping experts in use: the load-balancing loss, the z-loss, and what to look at (chapter 7).

    f_e = share of all assignments that went to expert e          sums to 1; a count, no gradient            (7.4)
    P_e = mean router probability of expert e                     sums to 1; carries the gradient            (7.5)
    L_balance = E * sum_e f_e P_e                                 1 when either is uniform, at most E / k        (7.6)
    L_z = mean over tokens of logsumexp(logits)^2                 ST-MoE, arXiv 2202.08906                   (7.7)

Balanced over what? Over one batch on one process, or, as arXiv 2501.11873 asks, over all that one optimizer step sees:
then f_e is counted over all processes and P_e stays local. A model's loss is the mean over its layers.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from minigated.moe import Routing


def assignment_counts(routing: Routing) -> Tensor:
    """How many of the N k assignments each expert got. [E], int64."""
    flat = routing.chosen.flatten()
    return torch.zeros(routing.logits.shape[-1], dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def balance_loss(routing: Routing, counts: Tensor | None = None) -> Tensor:
    """Eq. (7.6) for one layer, a scalar.

    Args:
        routing: of one layer.
        counts: [E], the assignments that f is computed from; this batch's own unless given.
    """
    counts = assignment_counts(routing) if counts is None else counts
    probability = torch.softmax(routing.logits, -1).mean(0)  # [E], eq. (7.5)
    share = counts.to(probability.dtype) / counts.sum()  # [E], eq. (7.4)
    return len(share) * (share * probability).sum()


def over_processes(counts: Tensor) -> Tensor:
    """The counts of all processes together; unchanged without torchrun.

    With P_e local, the processes' losses then average to the loss of the whole batch, and so do their gradients: exact,
    as long as all processes hold equally many tokens.
    """
    if dist.is_available() and dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


class RunningCounts:
    """Balance over the micro-batches of one optimizer step, as they come. An approximation.

    Micro-batch m is balanced against the counts of 1 .. m; the exact form would need the counts of all of them before
    the first gradient, that is, two passes.

    Args:
        micro_batches: how many make one step; then the count starts again.
    """

    def __init__(self, micro_batches: int):
        self.micro_batches, self.seen, self.totals = micro_batches, 0, None

    def __call__(self, counts: list[Tensor]) -> list[Tensor]:
        """Adds the counts of a micro-batch, one tensor a layer; returns the sums so far."""
        if self.seen % self.micro_batches == 0:
            self.totals = [torch.zeros_like(c) for c in counts]
        self.seen += 1
        self.totals = [total + c for total, c in zip(self.totals, counts, strict=True)]
        return self.totals


def pooled_balance_loss(routings: list[Routing]) -> Tensor:
    """The form of transformers' `load_balancing_loss_func`: one product for all layers together, k when balanced.

    Layers that each overload other experts look balanced here. For comparison; training uses `balance_loss`.
    """
    logits = torch.cat([r.logits for r in routings])  # [layers * N, E]
    chosen = torch.cat([r.chosen for r in routings])  # [layers * N, k]
    share = torch.nn.functional.one_hot(chosen, logits.shape[-1]).float().mean(0)  # [k, E]
    return logits.shape[-1] * (share * torch.softmax(logits, -1).mean(0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Eq. (7.7) for one layer: keeps the logits small, where float32 and bfloat16 still agree. A scalar."""
    return routing.logits.logsumexp(-1).square().mean()


@torch.no_grad()
def expert_statistics(routings: list[Routing]) -> list[dict]:
    """What each layer's router does, JSON-able.

    Returns:
        A dict a layer: share (of assignments, [E]), fullest (largest share times E, 1 when balanced), unused (experts
        without a token), entropy (of the mean probability over log E, 1 when uniform), top (mean largest probability).
    """
    rows = []
    for routing in routings:
        probabilities = torch.softmax(routing.logits.float(), -1)  # [N, E]
        counts, mean = assignment_counts(routing), probabilities.mean(0)
        share = counts / counts.sum()
        entropy = -(mean * mean.clamp(min=1e-30).log()).sum() / math.log(max(2, len(mean)))  # 0 for one expert
        rows.append(
            {
                "share": share.tolist(),
                "fullest": float(share.max() * len(share)),
                "unused": int((counts == 0).sum()),
                "entropy": float(entropy),
                "top": float(probabilities.amax(-1).mean()),
            }
        )
    return rows
