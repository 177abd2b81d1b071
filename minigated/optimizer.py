"""The optimizer: AdamW, which tensors it decays, its rate over time, and clipping.

The rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math

import torch
from torch import nn

from minigated.errors import InputError
from minigated.recipe import TrainConfig
from minigated.sharded import whole


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update number `step` (from 0): linear warm-up, then half a cosine down to the final rate.

    Update `warmup - 1` and update `warmup` both take the peak; the last update takes exactly `final_ratio *
    rate`, but the peak if the warm-up leaves one update or none (`warmup >= steps - 1`).
    """
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    span = max(1, config.steps - 1 - config.warmup)
    done = min(1.0, (step - config.warmup) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.rate * (config.final_ratio + (1.0 - config.final_ratio) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups in the order of `model.parameters()`: tensors that decay and tensors that do not.

    Matrices (linear maps, embeddings, convolution kernels: two or more dimensions) decay. Gains, biases and
    per-head scalars do not: pulling them to zero would switch a feature off rather than keep a map small. Two
    variants have such tensors with an axis for heads and one for channels, a norm's gains per head and scores
    that are constant; by their axes they decay, in the records too. A tied matrix is one parameter and stands
    once. Frozen parameters are left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("the model has no parameter that requires a gradient; there is nothing to train")
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; one fused kernel for all tensors on CUDA."""
    groups = parameter_groups(model, config.weight_decay)
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, fused=fused)


def clip_gradients(model: nn.Module, clip: float) -> torch.Tensor:
    """Scales gradients to a global norm of at most `clip` (0: off); returns the norm before, on device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))  # over all processes' shares
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
