"""Linear layers that read the same x: one product in a compiled training step, and the numbers of the layers."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from minigated import device
from minigated.attention import AttentionShape
from minigated.layers import SwiGLU
from minigated.lm import build_lm, lm_loss
from minigated.rope import rotary_angles
from minigated.stacked import stack_products, stacked
from minigated.train import TrainConfig, Trainer
from minigated.variants import get_variant

SHAPE = AttentionShape(width=20, heads=3, kv_heads=1, head_width=12)  # q, k, v: 36 + 12 + 12 rows; a score a head: 3
OUTPUT = 20  # rows of W_O, and of W_down
STACKED = {  # variant -> rows of one matrix, a multiple of 8
    "none": 64, "g1_headwise": 64, "g1_elementwise": 96, "g2_elementwise": 72, "g3_elementwise": 72,
    "g4_elementwise": 96, "g5_elementwise": 80, "g1_shared": 96, "g2_headwise": 64, "g1_rmsnorm": 64,
    "g1_input_independent": 64, "g1_silu_output": 64, "g2_shared": 72,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compiled():
    device.reset_compilation()
    torch.manual_seed(0)


def drawn(module):
    """All weights random, constant scores too."""
    for weight in module.double().parameters():
        weight.data.normal_(0.0, 0.3)
    return module


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def compiled(call, *given, rule=stack_products):
    """What a compiled call gives, and the rows of the matrices of its products in their order."""
    rows = []

    class Watched(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch._C._nn.linear:
                rows.append(len(args[1]))
            return super().call_function(target, args, kwargs)

    def backend(graph, inputs):
        rule(graph)
        return Watched(graph).run

    return torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*given), rows


def with_gradients(module, x, y) -> list:
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


def same(module, x, y, *more):
    assert_close(with_gradients(module, x, y), with_gradients(module, x, module(x, *more)), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize("variant", sorted(STACKED))
def test_attention_reads_x_with_one_product(variant):
    module, x = drawn(get_variant(variant).attention(SHAPE)), some(2, 5, 20)
    angles = rotary_angles(5, 12).double()
    y, rows = compiled(module, x, rotary := (angles.cos(), angles.sin()))
    assert rows == [STACKED[variant], OUTPUT]
    same(module, x, y, rotary)


def test_experts_in_place_of_a_projection_join_too():
    """SwitchHead's values: queries 36, keys 12, eight experts of 12 and their scores for one head."""
    module, x = drawn(get_variant("switch_v_8top2").attention(SHAPE)), some(2, 5, 20)
    y, rows = compiled(module, x)
    assert rows == [36 + 12 + 8 * 12 + 8, OUTPUT]
    same(module, x, y)


def test_a_feed_forward_reads_x_with_one_product():
    module, x = drawn(SwiGLU(20, 30)), some(2, 5, 20)
    y, rows = compiled(module, x)
    assert rows == [64, OUTPUT]
    same(module, x, y)


def test_a_checkpointed_block_too():
    model = build_lm("lm_nano", variant="g1_headwise", layers=1).double()
    model.checkpoint_activations()
    batch, counts = torch.randint(256, (2, 13)), []
    loss, _ = compiled(partial(lm_loss, model), batch, rule=lambda graph: counts.append(stack_products(graph)))
    assert counts == [2]
    weights = list(model.parameters())
    found, expected = (torch.autograd.grad(y, weights) for y in (loss, lm_loss(model, batch)))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_however_a_layer_is_written():
    first, second, third = (torch.randn(8, 20) for _ in range(3))

    def call(x):
        return F.linear(x, first), F.linear(x, second, bias=None), F.linear(input=x, weight=third)

    found, rows = compiled(call, x := torch.randn(3, 20))
    assert rows == [24]
    assert_close(found, call(x))


BIASED, ONE, TWO = nn.Linear(20, 8), nn.Linear(20, 8, bias=False), nn.Linear(20, 8, bias=False)
VECTOR = nn.Parameter(torch.randn(20))
FROZEN, ROUNDED = nn.Linear(20, 8, bias=False).requires_grad_(False), nn.Linear(20, 8, bias=False).bfloat16()
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


def within(context, second=TWO, around=nullcontext):
    """The first layer inside a context, the second after it."""

    def call(x):
        with around():
            with context():
                first = ONE(x)
            return first, second(x)

    return call


def after(write):
    """The second layer after something is written."""

    def call(x):
        x = x + 1
        first = ONE(x)
        write(x)
        return first, TWO(x)

    return call


def add_to(x):
    x += 2


def assign(x):
    x[0] = 2


def rounded_later(x):
    first = ONE(x)
    with BF16():
        return first, TWO(x)


def add_results(x):
    first, second = ONE(x), TWO(x)
    first += second
    return first, second


def differentiated(x):
    slope = torch.func.grad(lambda y: y.sum() * ONE(x).sum())(torch.ones(3))
    return slope, TWO(x)


APART = {
    "a bias": lambda x: (BIASED(x), ONE(x)),
    "another x": lambda x: (ONE(x), TWO(x + 1)),
    "a matrix made on the way": lambda x: (ONE(x), F.linear(x, TWO.weight * 2, None)),
    "a vector": lambda x: (F.linear(x, VECTOR, None), TWO(x)),
    "a matrix that is not trained": lambda x: (ONE(x), FROZEN(x)),
    "a matrix of another precision": within(nullcontext, ROUNDED, BF16),
    "autocast before": within(BF16),
    "autocast after": rounded_later,
    "no gradients before": within(torch.no_grad),
    "another derivative": differentiated,
    "x written to": after(lambda x: x.mul_(2)),
    "its data written to": after(lambda x: x.data.mul_(2)),
    "a view of x written to": after(lambda x: x[0].mul_(2)),
    "x in part set": after(assign),
    "x added to": after(add_to),
    "x cut off in place": after(lambda x: F.relu(x, inplace=True)),
    "x dropped in place": after(lambda x: F.dropout(x, 1.0, True, True)),
    "x given as a result's place": after(lambda x: torch.mul(x, 2, out=x)),
    "x written to by an overload": after(lambda x: torch.ops.aten.mul_.Tensor(x, 2)),
    "a result written to": add_results,
}


@pytest.mark.parametrize("why", APART)
def test_these_stay_apart(why):
    found, rows = compiled(APART[why], x := torch.randn(3, 20))
    assert len(rows) == 2
    assert_close(found, APART[why](x))


def test_rows_of_no_known_number_stay_apart():
    def call(x, one, two):
        return F.linear(x, one), F.linear(x, two)

    def backend(graph, inputs):
        assert stack_products(graph) == 0
        return graph.forward

    given = torch.randn(3, 20), torch.randn(8, 20), torch.randn(9, 20)
    assert_close(torch.compile(call, backend=backend, dynamic=True)(*given), call(*given))


ASIDE = {
    "unused": lambda y: 0.0,
    "detached": lambda y: y.detach(),
    "detached later": lambda y: (F.relu(y) + 1).detach().mean(),
    "a choice": lambda y: y.argmax(-1, keepdim=True),
}


@pytest.mark.parametrize("aside", ASIDE)
def test_a_layer_that_no_gradient_reaches_gets_none(aside):
    """Zeros in place of none would let weight decay shrink it."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.too, self.idle = (nn.Linear(20, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.used(x) * self.too(x) + ASIDE[aside](self.idle(x))

    module, x = Three(), torch.randn(3, 20)
    y, rows = compiled(module, x)
    assert_close(y, module(x))
    y.sum().backward()
    assert sorted(rows) == [8, 16]  # two are one product
    assert module.used.weight.grad is not None and module.idle.weight.grad is None


# ---------------------------------------------------------------------------------------------- the backend
def products(monkeypatch) -> list:
    """Counts what the backend stacks."""
    counts = []
    monkeypatch.setattr("minigated.stacked.stack_products", lambda *a, **kw: counts.append(stack_products(*a, **kw)))
    return counts


def test_matrices_that_are_not_copied_anyhow_are_read_where_they_lie(monkeypatch):
    """One token a step would pay for stacking all weights anew; so does float32."""
    module, x, counts = SwiGLU(20, 30), torch.randn(1, 20), products(monkeypatch)
    step = torch.compile(module, backend=partial(stacked, compiler="eager"), fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        step(x)
    assert counts == []
    step(x)
    assert counts == [0]
    with torch.autocast("cpu", torch.bfloat16):
        step(x)
    assert counts == [0, 1]


def test_a_trainer_compiles_with_it(monkeypatch):
    model, counts = build_lm("lm_nano", layers=2), products(monkeypatch)
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: lambda graph, inputs: graph)
    batch = torch.randint(256, (2, 13))
    config = TrainConfig(steps=2, warmup=1, compile="blocks", device="cpu", precision="bf16", progress=False)
    Trainer(model, lm_loss, lambda *_: batch, config).run()
    assert counts == [2]  # one graph for all blocks


def test_matrices_are_rounded_before_they_are_stacked():
    """So that the stack is written once, in bfloat16."""
    module, x, stacks = SwiGLU(20, 30), torch.randn(4, 20), []

    def backend(graph, inputs):
        stack_products(graph, rounded=True)
        stacks.extend(node for node in graph.graph.nodes if node.target is torch.cat)
        assert "torch.cat" in graph.code  # what runs without a compiler
        return graph.forward

    with BF16():
        found = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(x)
        expected = module(x)
    assert [part.target for part in stacks[0].args[0]] == ["to", "to", "new_zeros"]
    assert all(part.args[1] == torch.bfloat16 for part in stacks[0].args[0][:2])
    assert_close(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_generated_code_gives_the_numbers_of_the_layers(monkeypatch, checkpointed):
    model, counts, compilers = build_lm("lm_nano", variant="g1_elementwise", layers=1), products(monkeypatch), []
    if checkpointed:
        model.checkpoint_activations()
    found = torch._dynamo.lookup_backend
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: compilers.append(name) or found(name))
    batch, weights = torch.randint(256, (2, 13)), list(model.parameters())
    with BF16():
        loss = torch.compile(partial(lm_loss, model), backend=stacked, fullgraph=True, dynamic=False)(batch)
        expected = lm_loss(model, batch)
    assert counts == [2] and "inductor" in compilers
    for got, wanted in zip(*(torch.autograd.grad(y, weights) for y in (loss, expected))):
        assert_close(got, wanted, rtol=0, atol=3e-2 * wanted.abs().max().item())
