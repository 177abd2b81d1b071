"""Mixtures of experts equal to transformers' Qwen3-MoE and Qwen3-Next, random weights, float32, CPU; bugs planted."""

import pytest
import torch
from qwen_models import GROUPED, qwen3_moe, qwen3_next_moe, tokens
from torch.testing import assert_close

from minigated import moe
from minigated.balance import pooled_balance_loss
from minigated.errors import InputError
from minigated.interop import from_qwen3, from_qwen3_next

TOLERANCE = 2e-5


def pair(transformers, family: str, renormalise: bool):
    theirs = {"moe": qwen3_moe, "next": qwen3_next_moe}[family](transformers, GROUPED, renormalise)
    loader = {"moe": from_qwen3, "next": from_qwen3_next}[family]
    return loader(theirs.state_dict(), theirs.config.to_dict()), theirs


@torch.no_grad()
def largest_error(ours, theirs) -> float:
    batch = tokens()
    wanted = theirs(batch).logits
    assert wanted.std() > 0.5
    return (ours(batch) - wanted).abs().max().item()


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("family", ["moe", "next"])
def test_logits(transformers, family, renormalise):
    ours, theirs = pair(transformers, family, renormalise)
    assert ours.config.experts == 5 and ours.config.top_k == 2 and ours.config.renormalise == renormalise
    assert ours.config.variant == ("none" if family == "moe" else "g1_elementwise")
    assert (ours.config.shared_width > 0) == (family == "next")
    assert largest_error(ours, theirs) < TOLERANCE


def test_a_shared_expert_of_zero_is_no_shared_expert(transformers):
    """Qwen3-Next with its shared expert's last matrix at zero equals our model without one."""
    ours, theirs = pair(transformers, "next", True)
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.mlp.shared_expert.down_proj.weight.zero_()
    assert largest_error(ours, theirs) > 1e-2  # it mattered
    for block in ours.blocks:
        block.ffn.shared = None
    assert largest_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("family", ["moe", "next"])
def test_gradients(transformers, family):
    ours, theirs = pair(transformers, family, True)
    batch = tokens()
    weight = torch.linspace(-1, 1, 61)
    (ours(batch) * weight).sum().backward()
    (theirs(batch).logits * weight).sum().backward()
    layer, block = theirs.model.layers[0].mlp, ours.blocks[0].ffn
    found = (block.router.weight, block.experts.gate_up_proj, block.experts.down_proj)
    for mine, other in zip(found, (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj)):
        assert other.grad.abs().max() > 1e-2
        assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item())


def test_auxiliary_loss_in_transformers_form(transformers):
    """Whatever transformers makes of the logits it returns; ours are the raw ones."""
    ours, theirs = pair(transformers, "moe", False)
    routings, batch = [], tokens()
    with torch.no_grad():
        ours(batch, routings=routings)
        out = theirs(batch, output_router_logits=True)
    for mine, other in zip(routings, out.router_logits, strict=True):
        raw = torch.allclose(mine.logits, other, atol=1e-4)
        assert raw or torch.allclose(torch.softmax(mine.logits, -1), other, atol=1e-4)
    twice = not torch.allclose(routings[0].logits, out.router_logits[0], atol=1e-4)  # a known fault of some versions
    if twice:
        routings = [r._replace(logits=torch.softmax(r.logits, -1)) for r in routings]
    assert_close(pooled_balance_loss(routings), out.aux_loss, rtol=1e-5, atol=0)


def test_experts_of_older_files_are_packed(transformers):
    ours, theirs = pair(transformers, "moe", False)
    state = {}
    for name, tensor in theirs.state_dict().items():
        stem, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, 1))):
                state[f"{stem}.{expert}.gate_proj.weight"], state[f"{stem}.{expert}.up_proj.weight"] = gate, up
        elif part == "down_proj" and tensor.dim() == 3:
            state |= {f"{stem}.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            state[name] = tensor
    again = from_qwen3(state, theirs.config.to_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))
    del state["model.layers.1.mlp.experts.4.up_proj.weight"]
    with pytest.raises(InputError, match="gives 5 experts; model.layers.1.mlp.experts.4.up_proj.weight is missing"):
        from_qwen3(state, theirs.config.to_dict())


# ------------------------------------------------------------------------------------ planted bugs
def without_float_weights(logits, top_k, renormalise=False):
    """Softmax over the chosen logits only: right if renormalised, wrong otherwise."""
    values, chosen = logits.topk(top_k, -1)
    return moe.Routing(logits, chosen, torch.softmax(values, -1))


def second_softmax(logits, top_k, renormalise=False):
    found = right(torch.softmax(logits, -1), top_k, renormalise)
    return found._replace(logits=logits)


def reversed_choices(logits, top_k, renormalise=False):
    found = right(logits, top_k, renormalise)
    return found._replace(weights=found.weights.flip(-1))


right = moe.route


@pytest.mark.parametrize("bug", [without_float_weights, second_softmax, reversed_choices])
def test_a_wrong_router_shows(transformers, monkeypatch, bug):
    ours, theirs = pair(transformers, "moe", False)
    monkeypatch.setattr(moe, "route", bug)
    assert largest_error(ours, theirs) > 100 * TOLERANCE


def test_gate_and_up_exchanged_show(transformers):
    ours, theirs = pair(transformers, "moe", False)
    with torch.no_grad():
        for block in ours.blocks:
            block.ffn.experts.gate_up_proj.copy_(block.ffn.experts.gate_up_proj.roll(12, 1))
    assert largest_error(ours, theirs) > 100 * TOLERANCE


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    "changed, said",
    [
        ({"norm_topk_prob": None}, "norm_topk_prob as None; true or false is accepted"),
        ({"num_experts": 6, "num_local_experts": 6}, "the config says num_experts = 6, the weights say 5"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers as \[0\]; only \[\] can be loaded"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step as 2; only 1 can be loaded"),
        ({"num_experts_per_tok": 9}, "top_k must be from 1 to 5, the number of experts, got 9"),
    ],
)
def test_what_does_not_fit_is_refused(transformers, changed, said):
    theirs = qwen3_moe(transformers, GROUPED, True)
    with pytest.raises(InputError, match=said):
        from_qwen3(theirs.state_dict(), theirs.config.to_dict() | changed)
