"""Linear layers that read the same x: one product in a compiled training step, and the numbers of the layers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
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


LEFT = torch.nn.Linear(20, 8), torch.nn.Linear(20, 8, bias=False), torch.nn.Linear(20, 8, bias=False)


def cast_between(x):
    with torch.autocast("cpu", torch.bfloat16):
        first = LEFT[1](x)
    return first, LEFT[2](x)


def after(write):
    def call(x):
        x = x + 1
        first = LEFT[1](x)
        write(x)
        return first, LEFT[2](x)

    return call


def assign(x):
    x[0] = 2


def add_to(x):
    x += 2


APART = {
    "a bias": lambda x: (LEFT[0](x), LEFT[1](x)),
    "another x": lambda x: (LEFT[1](x), LEFT[2](x + 1)),
    "a matrix made on the way": lambda x: (LEFT[1](x), F.linear(x, LEFT[2].weight * 2)),
    "another precision": cast_between,
    "x written to": after(lambda x: x.mul_(2)),
    "a view of x written to": after(lambda x: x[0].mul_(2)),
    "x in part set": after(assign),
    "x added to": after(add_to),
    "x cut off in place": after(lambda x: F.relu(x, inplace=True)),
    "x dropped in place": after(lambda x: F.dropout(x, 1.0, True, True)),
    "x given as a result's place": after(lambda x: torch.mul(x, 2, out=x)),
}


@pytest.mark.parametrize("why", APART)
def test_these_stay_apart(why):
    x = torch.randn(3, 20)
    found, rows = compiled(APART[why], x)
    assert rows == [8, 8]
    assert_close(found, APART[why](x))


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


def test_generated_code_gives_the_numbers_of_the_layers(monkeypatch):
    block, counts = build_lm("lm_nano", variant="g1_elementwise", layers=1).blocks[0], products(monkeypatch)
    x = torch.randn(2, 12, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(block, backend=stacked, fullgraph=True, dynamic=False)(x, None)
        expected = block(x, None)
    assert counts == [2]
    for found, wanted in zip(with_gradients(block, x, y), with_gradients(block, x, expected)):
        assert_close(found, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
