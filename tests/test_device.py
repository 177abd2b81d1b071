"""Compiled graphs: how many, and under which names."""

import torch
from torch import nn
from toy_training import ToyBlock, ToyModel, toy_batch, toy_loss

from minigated import device


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_and_seeds_share_one_graph_and_another_structure_starts_anew():
    device.reset_compilation()
    counts = []
    for width, seed in ((8, 0), (8, 1), (12, 0)):
        before, model = graphs(), ToyModel(width=width, seed=seed)
        names, batch = list(model.state_dict()), toy_batch(0)
        with device.compiled(model, "blocks", backend="eager"):
            toy_loss(model, batch).backward()
            assert list(model.state_dict()) == names
            with device.plain(model):
                model(batch[:3])
        model(batch[:2])  # plain again: no graph for another batch size
        counts.append(graphs() - before)
    assert counts == [1, 0, 1]


def test_many_variants_in_one_process_stay_compiled(monkeypatch):
    monkeypatch.setattr(device, "GRAPHS", 2)
    device.reset_compilation()
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in range(2, 8):
            before, model = graphs(), ToyModel(width=width)
            with device.compiled(model, "blocks", backend="eager"):
                model(toy_batch(0))
            assert graphs() - before == 1


def test_blocks_of_many_widths_in_one_model_stay_compiled():
    """As the stages of a vision model; PyTorch's own limit is eight."""
    device.reset_compilation()
    before, model = graphs(), nn.Module()
    model.blocks = nn.ModuleList(ToyBlock(width) for width in range(2, 14))
    with torch._dynamo.config.patch(recompile_limit=8), device.compiled(model, "blocks", backend="eager"):
        for width, block in enumerate(model.blocks, 2):
            block(torch.ones(3, width))
    assert graphs() - before == 12


def test_whole_model_compiles_under_its_own_names():
    model = ToyModel()
    names, before = list(model.state_dict()), graphs()
    with device.compiled(model, "whole", backend="eager"):
        loss = toy_loss(model, toy_batch(0))
    assert graphs() == before + 1 and list(model.state_dict()) == names and loss.isfinite()
