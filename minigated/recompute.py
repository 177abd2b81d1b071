"""Activation checkpointing (arXiv 1604.06174): blocks that keep their input alone and compute the rest again.

A block keeps for its backward pass what its products and norms have seen, some 20 to 40 numbers for each number of its
input. A checkpointed block keeps the input, and runs forward once more when its gradient is due: one more forward pass
of the blocks, a third of their operations, for memory that no longer grows with what is inside a block. The numbers
stay the same: dropout draws again what it drew, autocast is as it was.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


class Checkpointing:
    """The option, for a model with blocks: `model.checkpoint_activations()`.

    It belongs to a run and not to a model's config: weights and results are the same with it and without.
    """

    checkpointing = False

    def checkpoint_activations(self, on: bool = True):
        """Switches checkpointing of every block on or off; returns the model."""
        self.checkpointing = on
        return self


def recomputed(on: bool, function: Callable, *arguments):
    """function(*arguments), inside of which nothing is kept for the backward pass if `on`.

    Args:
        on: nothing changes where it is False, or where no gradients are recorded.
        function: computes the same when called twice. What it writes elsewhere it writes twice: give it no probe, no
            cache, and no module with running statistics.
        *arguments: tensors among them are kept.
    """
    if not (on and torch.is_grad_enabled()):
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)  # early stop: no more is run again than was kept
