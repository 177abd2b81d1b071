"""Chapter 2: what each gate must do exactly. Section 7.1, items 7 and 8 of the facts, and eq. (5) by hand.

The comparison with eq. (5) runs in three precisions, forward and backward, on the CPU and a GPU where there is one.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import Attention, AttentionShape, repeat_kv
from minigated.errors import InputError
from minigated.gates import (
    ConstantScores,
    Gate,
    GateSpec,
    HeadRMSNorm,
    HeadSiLU,
    Scores,
    SharedScores,
    SwitchProjection,
    build_gate,
    ns_sigmoid,
)
from minigated.rope import RotaryTable
from minigated.variants import get_variant

SHAPE = AttentionShape(width=24, heads=6, kv_heads=2, head_width=4)  # G = 3, C = H*D
GROUP = SHAPE.heads // SHAPE.kv_heads
BATCH, TOKENS = 2, 7
ALL_POSITIONS = ["g1", "g2", "g3", "g4", "g5"]


def inputs() -> Tensor:
    return torch.randn(BATCH, TOKENS, SHAPE.width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def layer(variant: str = "none", base: Attention | None = None, **options) -> Attention:
    """An attention layer in float64, far from uniform; with `base`, all weights they have in common are its own."""
    torch.manual_seed(0)
    module = get_variant(variant).attention(SHAPE, **options).double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(1.0, 0.3) if weight.dim() == 1 else weight.normal_(0.0, 2 / SHAPE.width**0.5)
    if base is not None:
        module.load_state_dict(base.state_dict(), strict=False)
    return module


def run(module: Attention, x: Tensor | None = None) -> Tensor:
    return module(inputs() if x is None else x, [t.double() for t in RotaryTable(16, SHAPE.head_width)(0, TOKENS)])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-10)


def gate_weight(module: Attention) -> nn.Parameter:
    return next(iter(module.gates.values())).scores.linear.weight


def set_weight(module: Attention, value: Tensor) -> Attention:
    gate_weight(module).data.copy_(value)
    return module


# ------------------------------------------------------------------------------------ eq. (5) by hand
def eq_5(y: Tensor, x: Tensor, weight: Tensor, heads: int, per_head: int) -> Tensor:
    """Y' = Y (.) sigmoid(X W_theta), one head after another, with 1 / (1 + exp(-z)) written out."""
    gated = []
    for head in range(heads):
        logits = x @ weight[head * per_head : (head + 1) * per_head].T  # [B, T, D | 1]
        gated.append(y[:, :, head] / (1 + torch.exp(-logits)))
    return torch.stack(gated, dim=2)


def tiled_scores(gate: Gate, y: Tensor, x: Tensor) -> Tensor:
    """The bug: rows of W_theta dealt out channel first, so heads get each other's scores."""
    return y * torch.sigmoid(gate.scores.linear(x).unflatten(-1, (-1, y.shape[2])).transpose(-1, -2))


def gate_reads_the_output(gate: Gate, y: Tensor, x: Tensor) -> Tensor:
    """The bug: scores computed from Y instead of the layer's input."""
    return gate(y, y.flatten(2))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def assert_equals_eq_5(apply, granularity, dtype, device):
    torch.manual_seed(0)
    gate = build_gate(GateSpec("g1", granularity), SHAPE).to(device, dtype)
    y = torch.randn(BATCH, TOKENS, SHAPE.heads, SHAPE.head_width).to(device, dtype).requires_grad_()
    x = torch.randn(BATCH, TOKENS, SHAPE.width).to(device, dtype).requires_grad_()
    own = (y, x, gate.scores.linear.weight)
    exact = [t.detach().double().requires_grad_() for t in own]
    per_head = SHAPE.head_width if granularity == "elementwise" else 1
    found, wanted = apply(gate, y, x), eq_5(*exact, SHAPE.heads, per_head)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    wanted.backward(upstream.double())
    assert found.dtype == dtype
    for a, b in [(found, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact, strict=True)]:
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_gate_equals_eq_5(granularity, dtype, device):
    assert_equals_eq_5(lambda gate, y, x: gate(y, x), granularity, dtype, device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bug", [tiled_scores, gate_reads_the_output])
def test_a_bug_planted_in_the_gate_fails_the_comparison(bug, dtype):
    with pytest.raises(AssertionError):
        assert_equals_eq_5(bug, "elementwise", dtype, "cpu")


# ------------------------------------------------------------------------------------ fully open, fully closed
def force(module: Attention, logit: float) -> Attention:
    """Replaces the logits of every gate of the layer by one constant."""
    for gate in module.gates.values():
        sizes = gate.scores.sizes
        gate.scores.logits = lambda x, sizes=sizes: x.new_full((*x.shape[:2], *sizes), logit)
    return module


HEADED = [(position, kind) for position in ALL_POSITIONS[:4] for kind in ("elementwise", "headwise", "shared")]


@pytest.mark.parametrize("position, granularity", [*HEADED, ("g5", "elementwise")])
def test_open_gates_give_the_baseline(position, granularity):
    base = layer(qk_norm=False)  # it would hide a half-open gate on queries or keys
    gated = layer(base=base, qk_norm=False)
    gated.gates = nn.ModuleDict({position: build_gate(GateSpec(position, granularity), SHAPE)})
    assert same(run(force(gated, math.inf)), run(base))
    assert not same(run(force(gated, 0.0)), run(base))


@pytest.mark.parametrize("position", ["g1", "g2", "g5"])
def test_closed_gates_silence_the_layer(position):
    assert run(force(layer(f"{position}_elementwise"), -math.inf)).abs().max() == 0


@pytest.mark.parametrize("position", ["g3", "g4"])
def test_closed_query_or_key_gates_leave_the_mean_of_the_past(position):
    gated, x = force(layer(f"{position}_elementwise"), -math.inf), inputs()
    past = (x @ gated.v_proj.weight.T).cumsum(1) / torch.arange(1, TOKENS + 1)[:, None]  # [B, T, K*D]
    heads = past.unflatten(-1, (2, 4)).repeat_interleave(GROUP, dim=2).flatten(2)
    assert same(run(gated), heads @ gated.o_proj.weight.T)


# ------------------------------------------------------------------------------------ activations
def test_non_sparse_sigmoid():
    x = torch.tensor([-1e9, -3.0, 0.0, 3.0, 1e9])
    scores = ns_sigmoid(x)
    assert scores[[0, 2, 4]].tolist() == [0.5, 0.75, 1.0]
    assert (scores.diff() > 0).all()
    torch.testing.assert_close(scores, 0.5 + 0.5 / (1 + torch.exp(-x)))  # eq. (9)


def test_each_activation_is_used():
    """The same logits through the four multiplicative and additive forms, against torch's own functions."""
    x, base = inputs(), layer()
    reference = layer("g1_elementwise", base)
    logits = x @ gate_weight(reference).T

    def heads_output():
        captured = {}
        base(x, [t.double() for t in RotaryTable(16, 4)(0, TOKENS)], probe=captured.__setitem__)
        return captured["sdpa"].flatten(2)

    y = heads_output()
    wanted = {
        "g1_elementwise": y * torch.sigmoid(logits),
        "g1_silu": y * F.silu(logits),
        "g1_additive_silu": y + F.silu(logits),
        "g1_additive_identity": y + logits,
        "g1_nonsparse": y * (0.5 + 0.5 * torch.sigmoid(logits)),
        "g1_silu_output": F.silu(y),
    }
    for name, gated in wanted.items():
        module = layer(name, base)
        if module.gates["g1"].state_dict():
            set_weight(module, gate_weight(reference).data)
        assert same(run(module), gated @ base.o_proj.weight.T), name


# ------------------------------------------------------------------------------------ granularity and sharing
@pytest.mark.parametrize("position, heads", [("g1", 6), ("g2", 2), ("g3", 2), ("g4", 6)])
def test_headwise_is_elementwise_with_tied_rows(position, heads):
    base = layer(qk_norm=False)  # it would hide a headwise gate on queries or keys
    layers = []
    for granularity in ("headwise", "elementwise"):
        gated = layer(base=base, qk_norm=False)
        gated.gates = nn.ModuleDict({position: build_gate(GateSpec(position, granularity), SHAPE).double()})
        layers.append(gated)
    headwise, elementwise = layers
    rows = torch.randn(heads, SHAPE.width, dtype=torch.float64)
    set_weight(headwise, rows)
    assert same(run(headwise), run(set_weight(elementwise, rows.repeat_interleave(4, dim=0))))
    assert not same(run(headwise), run(set_weight(elementwise, rows.repeat(4, 1))))  # twin: the stack repeated


@pytest.mark.parametrize("mean_of", ["score", "logit"])
@pytest.mark.parametrize("position, heads", [("g1", 6), ("g2", 2)])
def test_shared_is_elementwise_when_all_heads_have_equal_rows(position, heads, mean_of):
    base = layer()
    shared = layer(f"{position}_shared", base, shared_mean=mean_of)
    elementwise = layer(f"{position}_elementwise", base)
    rows = torch.randn(4, SHAPE.width, dtype=torch.float64).repeat(heads, 1)
    assert same(run(set_weight(shared, rows)), run(set_weight(elementwise, rows)))
    different = torch.randn(heads * 4, SHAPE.width, dtype=torch.float64)
    assert not same(run(set_weight(shared, different)), run(set_weight(elementwise, different)))


def test_shared_mean_of_logits_is_one_matrix_and_mean_of_scores_is_not():
    x = inputs()
    rows = 3 * torch.randn(6 * 4, SHAPE.width, dtype=torch.float64)
    results = {}
    for mean_of in ("score", "logit"):
        scores = SharedScores(SHAPE.width, (6, 4), torch.sigmoid, mean_of).double()
        scores.linear.weight.data.copy_(rows)
        results[mean_of] = scores(x)
        assert results[mean_of].shape == (BATCH, TOKENS, 1, 4)
    one_matrix = torch.sigmoid(x @ rows.unflatten(0, (6, 4)).mean(0).T)[:, :, None]
    by_score = torch.sigmoid(x @ rows.T).unflatten(-1, (6, 4)).mean(2, keepdim=True)
    assert same(results["logit"], one_matrix) and same(results["score"], by_score)
    assert not same(results["score"], results["logit"])


# ------------------------------------------------------------------------------------ starts
def test_additive_gates_with_zero_weights_are_the_baseline():
    base = layer()
    for name in ("g1_additive_silu", "g1_additive_identity"):
        gated = layer(name, base)
        assert not same(run(gated), run(base))
        assert same(run(set_weight(gated, torch.zeros(24, 24))), run(base))


def test_multiplicative_silu_with_zero_weights_is_silent():
    assert run(set_weight(layer("g1_silu"), torch.zeros(24, 24))).abs().max() == 0


def test_input_independent_gate_starts_at_one_half_and_learns_without_looking():
    base = layer()
    gated = get_variant("g1_input_independent").attention(SHAPE).double()
    assert gated.gates["g1"].scores.theta.shape == (6, 4)
    gated.load_state_dict(base.state_dict(), strict=False)
    assert same(run(gated), 0.5 * run(base))
    theta = gated.gates["g1"].scores.theta
    run(gated).square().sum().backward()
    assert (theta.grad != 0).all()
    assert torch.equal(gated.gates["g1"].scores(inputs()), gated.gates["g1"].scores(-inputs()))


# ------------------------------------------------------------------------------------ gates on queries and keys
@pytest.mark.parametrize("position", ["g3", "g4"])
def test_headwise_gates_before_qk_norm_do_nothing(position):
    """RMSNorm divides a common factor of a head out again (up to its eps)."""
    base = layer(eps=1e-12)

    def gated(granularity, **options):
        module = layer(base=base, eps=1e-12, **options)
        module.gates = nn.ModuleDict({position: build_gate(GateSpec(position, granularity), SHAPE).double()})
        return run(module)

    assert torch.allclose(gated("headwise"), run(base), rtol=0, atol=1e-8)
    assert not torch.allclose(gated("elementwise"), run(base), rtol=0, atol=1e-3)
    after_norm = gated("headwise", qk_order=("norm", "gate", "rope"))
    assert not torch.allclose(after_norm, run(base), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------ G2 against G1
def with_constant(position: str, theta: Tensor, base: Attention) -> Attention:
    scores = ConstantScores(tuple(theta.shape), torch.sigmoid).double()
    scores.theta.data.copy_(theta)
    gated = layer(base=base)
    gated.gates = nn.ModuleDict({position: Gate(position, scores)})
    return gated


def test_a_constant_gate_commutes_with_the_weighted_sum():
    base, theta = layer(), 2 * torch.randn(2, 4, dtype=torch.float64)
    values = run(with_constant("g2", theta, base))
    assert same(values, run(with_constant("g1", theta.repeat_interleave(GROUP, dim=0), base)))
    assert not same(values, run(with_constant("g1", theta.repeat(GROUP, 1), base)))  # twin: groups mixed up


def test_token_dependent_gates_at_g1_and_g2_differ():
    """The same rows, shared inside each group: G2 scores belong to the key's token, G1 scores to the query's."""
    base, rows = layer(), torch.randn(2, SHAPE.width, dtype=torch.float64)
    values = set_weight(layer("g2_headwise", base), rows)
    output = set_weight(layer("g1_headwise", base), rows.repeat_interleave(GROUP, dim=0))
    assert not same(run(values), run(output))
    assert same(run(values)[:, 0], run(output)[:, 0])  # the first token attends to itself alone: one score for both


# ------------------------------------------------------------------------------------ SwitchHead
def test_one_expert_is_the_headwise_gate_on_values():
    base = layer()
    gated = layer("g2_headwise", base)
    switch = layer(base=base)
    switch.v_proj = SwitchProjection(SHAPE.width, 2, 4, experts=1, top_k=1).double()
    switch.v_proj.experts.weight.data.copy_(base.v_proj.weight)
    switch.v_proj.router.weight.data.copy_(gate_weight(gated).data)
    assert same(run(switch), run(gated))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_are_the_top_scores_weighted_sum(top_k):
    torch.manual_seed(0)
    heads, experts, width = 2, 3, 4
    switch, x = SwitchProjection(SHAPE.width, heads, width, experts, top_k).double(), inputs()
    found = switch(x).unflatten(-1, (heads, width))
    for b in range(BATCH):
        for t in range(TOKENS):
            for head in range(heads):
                scores = torch.sigmoid(switch.router.weight[head * experts : (head + 1) * experts] @ x[b, t])
                wanted = torch.zeros(width, dtype=torch.float64)
                for e in scores.argsort(descending=True)[:top_k]:
                    start = (head * experts + int(e)) * width
                    wanted += scores[e] * (switch.experts.weight[start : start + width] @ x[b, t])
                assert same(found[b, t, head], wanted)


def test_unused_experts_get_no_gradient_from_a_token():
    torch.manual_seed(0)
    switch = SwitchProjection(SHAPE.width, heads=1, head_width=4, experts=3, top_k=1).double()
    x = inputs()[:1, :1]
    best = int((switch.router.weight @ x[0, 0]).argmax())
    switch(x).sum().backward()
    touched = switch.experts.weight.grad.unflatten(0, (3, 4)).abs().amax((1, 2)) > 0
    assert touched.nonzero().flatten().tolist() == [best]


# ------------------------------------------------------------------------------------ instead of a gate
def test_head_norm_normalises_each_head_alone():
    y = torch.randn(BATCH, TOKENS, 6, 4, dtype=torch.float64) * torch.tensor([1, 10, 100, 0.1, 1, 1])[:, None]
    normed = HeadRMSNorm(6, 4)(y, None)
    rms = normed.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-3)
    all_heads = y / y.square().mean((2, 3), keepdim=True).sqrt()
    assert not torch.allclose(normed, all_heads, atol=0.1)


def test_head_norm_weight_is_shared_or_per_head():
    assert HeadRMSNorm(6, 4).norm.weight.shape == (4,)
    per_head = HeadRMSNorm(6, 4, per_head=True)
    per_head.norm.weight.data[2] = 3.0
    y = torch.randn(BATCH, TOKENS, 6, 4)
    plain = HeadRMSNorm(6, 4)(y, None)
    torch.testing.assert_close(per_head(y, None)[:, :, 2], 3 * plain[:, :, 2])
    assert torch.equal(per_head(y, None)[:, :, 3], plain[:, :, 3])


def test_head_silu():
    y = torch.randn(BATCH, TOKENS, 6, 4)
    torch.testing.assert_close(HeadSiLU()(y, None), y / (1 + torch.exp(-y)))


# ------------------------------------------------------------------------------------ probe and wrong input
@pytest.mark.parametrize("variant, size", [("g1_elementwise", 4), ("g1_headwise", 1), ("g1_input_independent", 4)])
def test_the_probe_sees_the_scores_of_every_head_and_token(variant, size):
    seen = []
    x = inputs()
    layer(variant)(x, probe=lambda name, value: seen.append(value) if name == "gate_score" else None)
    ((position, scores),) = seen
    assert position == "g1" and scores.shape == (BATCH, TOKENS, 6, size)
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"position": "g6"}, "unknown gate position 'g6'; accepted: g1, g2, g3, g4, g5"),
        ({"granularity": "tokenwise"}, "unknown gate granularity 'tokenwise'; accepted: elementwise, headwise"),
        ({"form": "divide"}, "unknown gate form 'divide'; accepted: multiply, add"),
        ({"activation": "tanh"}, "unknown gate activation 'tanh'; accepted: sigmoid, silu"),
        ({"position": "g5", "granularity": "headwise"}, "g5 has no heads"),
        ({"position": "g5", "granularity": "shared"}, "g5 has no heads"),
    ],
)
def test_unknown_words_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        GateSpec(**{"position": "g1", **change})


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_numbers_of_experts_are_refused(top_k):
    with pytest.raises(InputError, match=f"between 1 and the 4 experts, got {top_k}"):
        SwitchProjection(8, 2, 4, experts=4, top_k=top_k)


def test_an_unknown_mean_is_refused():
    with pytest.raises(InputError, match="unknown shared_mean 'median'; accepted: score, logit"):
        SharedScores(8, (2, 4), torch.sigmoid, "median")


def test_scores_are_one_linear_map_without_bias():
    scores = Scores(24, (6, 4), torch.sigmoid)
    assert [name for name, _ in scores.named_parameters()] == ["linear.weight"]
    assert torch.equal(scores(torch.zeros(1, 1, 24)), torch.full((1, 1, 6, 4), 0.5))


def test_gated_values_are_shared_inside_a_group():
    """G2 acts before the heads of a group share a value: gating after `repeat_kv` with repeated scores is the same."""
    v, scores = torch.randn(2, 2, 5, 4), torch.rand(2, 2, 5, 4)
    assert torch.equal(repeat_kv(v * scores, 3), repeat_kv(v, 3) * repeat_kv(scores, 3))
