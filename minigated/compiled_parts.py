"""A backbone compiled part by part: parts that are alike share a graph, so depth costs no compile time (chapter 9)."""

import torch
from torch import nn

from minigated.device import GRAPH_LIMIT


def compile_parts(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compiles each of `model.parts` in place, 23 of them to 12 graphs in the paper's size; returns the model.

    A trainer with compile="graph" then records the steps: the fastest way to train a backbone. What lies between the
    parts stays as it is.
    """
    limits = torch._dynamo.config  # beyond its limit PyTorch would quietly run the rest uncompiled
    limits.recompile_limit = max(limits.recompile_limit, GRAPH_LIMIT)
    for part in model.parts:
        part.compile(backend=backend, dynamic=False)
    return model
