"""A backbone compiled part by part: parts that are alike share a graph, so depth costs no compile time (chapter 9)."""

from torch import nn

from minigated.device import allow_graphs
from minigated.errors import InputError


def compile_parts(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compiles each of `model.parts` in place, 23 of them to 12 graphs in the paper's size; returns the model.

    A trainer with compile="graph" then records the steps: the fastest way to train a backbone. What lies between the
    parts stays as it is.

    Raises:
        InputError: a model without parts.
    """
    if not hasattr(model, "parts"):
        raise InputError(f"{type(model).__name__} has no parts; accepted: a backbone, for others use torch.compile")
    allow_graphs()
    for part in model.parts:
        part.compile(backend=backend, dynamic=False)
    return model
