"""Mixture of experts: routing by hand, three forms of running the experts, the layer inside the language model."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigated.dispatch import sort_by_expert
from minigated.errors import InputError
from minigated.lm import TrainingLoss, build_lm, lm_loss
from minigated.lm_config import LMConfig
from minigated.moe import (
    FORMS,
    MoE,
    choose_form,
    experts_batched,
    experts_grouped,
    experts_loop,
    route,
)

N, C, HIDDEN, E = 37, 16, 24, 6
TINY = LMConfig(
    width=24, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=8, vocabulary=31, context=16, experts=5, top_k=2
)


def weights(dtype=torch.float64, seed=0, tokens=N):
    """x, gate_up, down and logits; large enough that experts and choices differ clearly."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((tokens, C), (E, 2 * HIDDEN, C), (E, C, HIDDEN), (tokens, E))
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) * 0.5 for size in sizes]


# ------------------------------------------------------------------------------------ routing
def test_routing_by_hand():
    """Two experts of three: exp(0), exp(log 2), exp(log 5) are 1, 2 and 5 eighths."""
    logits = torch.tensor([[0.0, 2.0, 5.0]]).clamp(min=1).log()  # log of 1, 2, 5
    plain, renormalised = route(logits, 2), route(logits, 2, renormalise=True)
    assert plain.chosen.tolist() == [[2, 1]]
    assert_close(plain.weights, torch.tensor([[5 / 8, 2 / 8]]))
    assert_close(renormalised.weights, torch.tensor([[5 / 7, 2 / 7]]))


def test_weights_before_and_after_renormalising():
    logits = weights()[3]
    for k in range(1, E + 1):
        plain, renormalised = route(logits, k), route(logits, k, renormalise=True)
        assert torch.equal(plain.chosen, renormalised.chosen)
        assert_close(renormalised.weights.sum(-1), torch.ones(N, dtype=torch.float64))
        assert (
            (plain.weights.sum(-1) < 1).all()
            if k < E
            else torch.allclose(plain.weights.sum(-1), plain.weights.new_ones(N))
        )
        assert (plain.weights.diff(dim=-1) <= 0).all()


def test_routing_is_computed_in_float32():
    """bfloat16 keeps three digits; in it these two logits would tie."""
    logits = torch.tensor([[8.0, 8.03125, 0.0]]).to(torch.bfloat16)
    found = route(logits, 1)
    assert found.logits.dtype == found.weights.dtype == torch.float32
    layer = MoE(C, HIDDEN, E, 2)
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        layer(torch.randn(1, 5, C), seen)
    assert seen[0].logits.dtype == torch.float32
    assert_close(seen[0].weights, route(seen[0].logits, 2).weights, rtol=0, atol=0)


def test_a_second_softmax_changes_weights_and_a_second_division_does_not():
    logits = weights()[3]
    once = route(logits, 2, renormalise=True)
    assert_close(once.weights / once.weights.sum(-1, keepdim=True), once.weights)
    assert not torch.allclose(route(torch.softmax(logits, -1), 2).weights, route(logits, 2).weights, atol=1e-2)


# ------------------------------------------------------------------------------------ by hand, token by token
def by_hand(x, gate_up, down, routing):
    """Eq. (7.2) and (7.3) for one token after the other, without packing or sorting."""
    out = []
    for n in range(len(x)):
        total = torch.zeros(C, dtype=x.dtype)
        for expert, weight in zip(routing.chosen[n].tolist(), routing.weights[n], strict=True):
            gate, up = gate_up[expert, :HIDDEN] @ x[n], gate_up[expert, HIDDEN:] @ x[n]
            total = total + weight * (down[expert] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("form", ["loop", "batched", "gathered"])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_forms_equal_token_by_token(form, top_k):
    x, gate_up, down, logits = weights()
    routing = route(logits, top_k)
    assert_close(FORMS[form](x, gate_up, down, routing), by_hand(x, gate_up, down, routing))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", [n for n in FORMS if n != "grouped" or hasattr(F, "grouped_mm")])
def test_forms_in_lower_precision(form, dtype, tolerance):
    exact = by_hand(*weights()[:3], route(weights()[3], 2))
    x, gate_up, down, logits = weights(dtype)
    found = FORMS[form](x, gate_up, down, route(weights()[3], 2))
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < tolerance * exact.abs().max()


def gradients(function, x, gate_up, down, logits):
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, logits)]
    out = function(*leaves[:3], route(leaves[3], 2))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), leaves)


@pytest.mark.parametrize("form", [experts_batched, experts_grouped])
def test_gradients_equal_the_loops(form):
    if form is experts_grouped and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    dtype = torch.float32 if form is experts_grouped else torch.float64
    tensors = weights(dtype)
    for found, expected in zip(gradients(form, *tensors), gradients(experts_loop, *tensors), strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(found, expected, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-12)


# ------------------------------------------------------------------------------------ planted bugs
def swapped_gate_and_up(x, gate_up, down, routing):
    return experts_loop(x, gate_up.roll(HIDDEN, 1), down, routing)


def unweighted(x, gate_up, down, routing):
    return experts_loop(x, gate_up, down, routing._replace(weights=torch.ones_like(routing.weights)))


def weights_of_the_other_choice(x, gate_up, down, routing):
    return experts_loop(x, gate_up, down, routing._replace(weights=routing.weights.flip(-1)))


def weighted_before_the_expert(x, gate_up, down, routing):
    """The expert is not linear, so the weight cannot move to its input."""
    parts = [
        experts_loop(
            x * routing.weights[:, i, None].to(x.dtype),
            gate_up,
            down,
            routing._replace(chosen=routing.chosen[:, i, None], weights=torch.ones_like(routing.weights[:, :1])),
        )
        for i in range(routing.chosen.shape[1])
    ]
    return sum(parts)


def not_sorted_back(x, gate_up, down, routing):
    plan = sort_by_expert(routing.chosen, E)
    expert = routing.chosen.flatten().sort().values
    hidden = torch.einsum("afc,ac->af", gate_up[expert], x[plan.token])
    gate, up = hidden.chunk(2, -1)
    out = torch.einsum("acf,af->ac", down[expert], F.silu(gate) * up)
    return (out.unflatten(0, routing.weights.shape) * routing.weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize(
    "bug",
    [swapped_gate_and_up, unweighted, weights_of_the_other_choice, weighted_before_the_expert, not_sorted_back],
)
def test_the_comparison_sees_bugs(bug):
    x, gate_up, down, logits = weights()
    routing = route(logits, 2)
    with pytest.raises(AssertionError):
        assert_close(bug(x, gate_up, down, routing), by_hand(x, gate_up, down, routing))


# ------------------------------------------------------------------------------------ hard cases
@pytest.mark.parametrize("form", [n for n in FORMS if n != "grouped" or hasattr(F, "grouped_mm")])
def test_experts_without_a_token(form):
    """Expert 3 gets all: the others get none, add nothing and have a gradient of zero."""
    x, gate_up, down, _ = weights(torch.float32)
    gate_up.requires_grad_()
    logits = torch.full((N, E), -10.0)
    logits[:, 3] = 10.0
    out = FORMS[form](x, gate_up, down, route(logits, 1))
    out.square().sum().backward()
    assert out.abs().max() > 0.01
    busy = gate_up.grad.abs().amax((1, 2))
    assert busy[3] > 0 and busy[[0, 1, 2, 4, 5]].eq(0).all()


def test_one_token_alone():
    x, gate_up, down, logits = weights(tokens=1)
    routing = route(logits, 2)
    assert_close(experts_batched(x, gate_up, down, routing), by_hand(x, gate_up, down, routing))


def test_capacity_is_never_exceeded_in_silence():
    x, gate_up, down, logits = weights()
    routing = route(logits, 2)
    counts = sort_by_expert(routing.chosen, E).counts
    fullest = int(counts.max())
    assert_close(experts_batched(x, gate_up, down, routing, fullest + 3), experts_loop(x, gate_up, down, routing))
    said = f"expert {int(counts.argmax())} received {fullest} tokens and has room for {fullest - 1}; give capacity"
    with pytest.raises(InputError, match=said):
        experts_batched(x, gate_up, down, routing, fullest - 1)


# ------------------------------------------------------------------------------------ the layer
def test_the_layer_adds_its_shared_expert():
    torch.manual_seed(0)
    layer, x = MoE(C, HIDDEN, E, 2, shared_width=10).double(), torch.randn(2, 7, C, dtype=torch.float64)
    with torch.no_grad():
        layer.shared_gate.weight.normal_()
    both = layer(x)
    shared = torch.sigmoid(x @ layer.shared_gate.weight.T) * layer.shared(x)
    layer.shared = None
    assert_close(both, layer(x) + shared)
    assert shared.abs().max() > 1e-2


def test_one_expert_is_a_dense_feed_forward():
    layer, x = MoE(C, HIDDEN, 1, 1).double(), torch.randn(3, C, dtype=torch.float64)[None]
    gate, up = (x @ layer.experts.gate_up_proj[0].T).chunk(2, -1)
    assert_close(layer(x), (F.silu(gate) * up) @ layer.experts.down_proj[0].T)


@pytest.mark.parametrize(("width", "hidden"), [(48, 50), (50, 48), (12, 36), (36, 12), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_any_width(width, hidden, dtype):
    """Rows of a grouped product start at multiples of 16 bytes."""
    torch.manual_seed(0)
    layer, x = MoE(width, hidden, experts=4, top_k=2).to(dtype), torch.randn(2, 16, width, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    layer.experts.form = "loop"
    assert_close(y, layer(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_auto_takes_the_grouped_form_where_it_can():
    x = torch.zeros(2, 8)
    assert choose_form("auto", x.double(), 8) is experts_batched
    assert choose_form("auto", x, 8) is (experts_grouped if hasattr(F, "grouped_mm") else experts_batched)
    assert choose_form("loop", x, 8) is experts_loop
    assert choose_form("auto", x.double(), 8, few=True) is experts_batched  # with gradients, which it is not made for
    with torch.no_grad():
        assert choose_form("auto", x, 8, few=True) is FORMS["gathered"]


def test_few_tokens_fetch_their_experts_and_many_do_not(monkeypatch):
    seen = []
    monkeypatch.setattr("minigated.moe.choose_form", lambda *told: seen.append(told[3]) or experts_loop)
    layer = MoE(C, HIDDEN, E, 2)
    for tokens in (1, 3, 4):  # of 6 experts, two a token
        layer(torch.randn(1, tokens, C))
    assert seen == [True, True, False]


@pytest.mark.parametrize("form", [n for n in FORMS if n != "grouped" or hasattr(F, "grouped_mm")])
def test_autocast_runs_every_form_in_bfloat16(form):
    torch.manual_seed(0)
    layer, x = MoE(C, HIDDEN, E, 2, form=form), torch.randn(2, 5, C)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), layer(x), atol=5e-5, rtol=5e-2)


# ------------------------------------------------------------------------------------ the language model
def model(**overrides):
    torch.manual_seed(0)
    return build_lm(TINY, **{"initializer_range": 0.3, **overrides})


def windows(batch=3, length=12):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def test_a_model_tells_the_routing_of_every_layer():
    net, routings = model(), []
    net(windows(), routings=routings)
    assert [r.logits.shape for r in routings] == [(36, 5)] * 2
    dense = []
    build_lm("lm_nano")(windows(), routings=dense)
    assert dense == []


def test_the_training_loss_adds_the_router_losses():
    from minigated.balance import balance_loss, z_loss

    net, batch, routings = model(balance_weight=0.3, z_weight=0.01), windows(), []
    net(batch[:, :-1], routings=routings)
    extra = sum(0.3 * balance_loss(r) + 0.01 * z_loss(r) for r in routings)
    assert extra > 0.5
    assert_close(TrainingLoss()(net, batch), lm_loss(net, batch) + extra)
    assert_close(TrainingLoss()(model(balance_weight=0, z_weight=0), batch), lm_loss(net, batch))


def test_all_parameters_are_trained():
    net = model(shared_width=8, variant="g1_elementwise")
    TrainingLoss()(net, windows(8)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_more_experts_of_the_variant_are_total_and_active():
    added = model(variant="experts_added").blocks[0].ffn
    assert added.router.weight.shape[0] == 9 and added.top_k == 6
    assert model().blocks[0].ffn.top_k == 2


def test_cached_equals_uncached():
    """In float64 the batched form runs; a token's experts do not depend on who is routed beside it."""
    net, batch = model().double().eval(), windows()
    whole, cache = net(batch), net.new_cache(3, 12)
    steps = torch.cat([net(batch[:, i : i + 1], cache) for i in range(12)], 1)
    assert_close(steps, whole)


def test_compiled_as_one_graph():
    """No value is read back from the device in the grouped form, so nothing breaks the graph."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    net = model(expert_form="grouped", width=32).bfloat16()
    block, x = net.blocks[0], torch.randn(2, 6, 32, dtype=torch.bfloat16)
    rotary, found = net.rotary(0, 6), []
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, rotary, None, None, found), block(x, rotary))
    assert len(found) == 1 and found[0].chosen.shape == (12, 2)


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    "fields, said",
    [
        ({"top_k": 6}, "top_k must be from 1 to 5, the number of experts, got 6"),
        ({"top_k": 0}, "top_k must be from 1 to 5, the number of experts, got 0"),
        ({"experts": 0}, "top_k=2 and shared_width=0 need experts, got experts=0"),
        ({"experts": -1}, "experts and shared_width must be 0 or more, got -1"),
        ({"expert_form": "fast"}, "form of the experts 'fast'; accepted: auto, loop, batched, grouped"),
        ({"balance_scope": "rank"}, "balance_scope 'rank'; accepted: global, batch"),
        ({"match_parameters": True}, "narrows a dense feed-forward; this model has 5 experts"),
    ],
)
def test_impossible_mixtures_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        build_lm(TINY, **fields)


def test_a_layer_refuses_what_it_cannot_choose():
    with pytest.raises(InputError, match="top_k must be from 1 to 4, the number of experts, got 5"):
        MoE(C, HIDDEN, 4, 5)


@pytest.mark.parametrize("top_k", [E + 1, 0, -1])
def test_a_router_refuses_what_it_cannot_choose(top_k):
    with pytest.raises(InputError, match=f"^top_k must be from 1 to {E}, the number of experts, got {top_k}$"):
        route(weights()[3], top_k)


def test_a_grouped_form_that_cannot_run_is_refused():
    with pytest.raises(InputError, match="width 10 and hidden width 6 in torch.float32; accepted: multiples of 16"):
        MoE(10, 6, 4, 2, form="grouped")(torch.randn(1, 3, 10))
