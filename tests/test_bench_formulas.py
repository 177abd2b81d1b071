"""Operations by formula against torch's counter; bytes against sizes of tensors, added up by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minigated.bench import formulas, suite_attention, suite_vit
from minigated.cost import count_flops
from minigated.decay_passes import decomposed_fast
from minigated.lm import build_lm
from minigated.lm_config import LMConfig
from minigated.moe import MoE
from minigated.variants import parameters
from minigated.vit_sizes import SIZES, build_vit

DENSE = LMConfig(width=48, layers=3, heads=4, kv_heads=2, head_width=12, ffn_width=64, vocabulary=96, context=32)


def counted(function) -> int:
    """Operations of a call with its backward pass."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def numbers(*tensors) -> int:
    return sum(t.numel() for t in tensors)


# ---------------------------------------------------------------------------------------------- layers
def test_causal_attention_is_half_of_what_the_counter_sees_without_a_mask():
    q, k, v = (torch.randn(2, 4, 16, 8) for _ in "qkv")
    full = count_flops(suite_attention.sdpa_core, q, k, v, None)
    assert formulas.causal_attention(2, 16, 4, 8).flops == full // 2
    assert formulas.causal_attention(2, 16, 4, 8, training=True).flops == 3 * full // 2


def test_bytes_of_attention_are_its_tensors_each_once():
    q, k = torch.empty(2, 4, 16, 8), torch.empty(2, 2, 16, 8)
    forward = numbers(q, k, k, q)  # q, k, v, y
    backward = numbers(q, k, k, q, q) + numbers(q, k, k)  # those and the gradient of y; three gradients
    assert formulas.causal_attention(2, 16, 4, 8, kv_heads=2, item=2).bytes == 2 * forward
    assert formulas.causal_attention(2, 16, 4, 8, kv_heads=2, item=2, training=True).bytes == 2 * (forward + backward)


@pytest.mark.parametrize("gate", suite_attention.GATES)
def test_attention_layer(gate):
    layer, x = suite_attention.our_layer(gate, 32, 4), torch.randn(2, 16, 32)
    core = formulas.causal_attention(2, 16, 4, 8).flops
    assert formulas.attention_module(2, 16, 32, 4, 8, gate).flops == count_flops(layer, x) - core  # half the square
    x.requires_grad_()
    training = formulas.attention_module(2, 16, 32, 4, 8, gate, training=True).flops
    assert training == counted(lambda: layer(x).sum().backward()) - 3 * core


@pytest.mark.parametrize("training", [False, True])
def test_two_passes(training):
    q, k, v = (torch.randn(2, 8, 8, 3, 5, requires_grad=training) for _ in "qkv")
    mask = torch.zeros(3, 4, 4)
    run = lambda: decomposed_fast(q, k, v, mask, mask, 4, 4, form="matmul")
    made = counted(lambda: run().sum().backward()) if training else count_flops(run)
    cost = formulas.two_passes(2, 8, 8, 15, 4, item=2, training=training)
    assert cost.flops == made
    gradients = numbers(q, k, v, v) + numbers(q, k, v) if training else 0  # q, k, v and dy read, three written
    assert cost.bytes == 2 * (numbers(q, k, v, v) + gradients)


@pytest.mark.parametrize("training", [False, True])
def test_moe_layer(training):
    layer, x = MoE(16, 24, experts=6, top_k=2, form="loop"), torch.randn(1, 40, 16, requires_grad=training)
    made = counted(lambda: layer(x).sum().backward()) if training else count_flops(layer, x)
    cost = formulas.moe_layer(40, 16, 24, 6, 2, item=4, training=training)
    assert cost.flops == made
    assert cost.bytes == 4 * (parameters(layer) + 2 * x.numel()) * (3 if training else 1)


# ---------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"experts": 6, "top_k": 2}, {"variant": "g1_elementwise"}, {"variant": "q_heads_half_more"}],
)
def test_language_model(changes):
    config = replace(DENSE, **changes, expert_form="loop")
    model, tokens = build_lm(config), torch.randint(96, (2, 32))
    made = counted(lambda: model(tokens).sum().backward())
    heads = model.blocks[0].attention.shape.heads
    core = formulas.causal_attention(2, 32, heads, 12, training=True).flops
    total = parameters(model)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # counted with the rest, multiply nothing
    expected = formulas.lm_training(config, total - norms, 2, 32)
    assert expected == made - config.layers * core  # the counter sees the whole square
    assert formulas.lm_training(config, total, 2, 32) == pytest.approx(expected, rel=0.02)


def test_decoding_reads_every_weight_once_but_the_embedding():
    model = build_lm(DENSE).bfloat16()
    cache = model.new_cache(1, 20)
    past = sum(numbers(layer.k, layer.v) for layer in cache)
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "embedding.weight")
    assert formulas.lm_decoding(DENSE, parameters(model), 20, item=2).bytes == 2 * (weights + past)
    more = replace(DENSE, variant="kv_heads_doubled")
    grown = formulas.lm_decoding(more, 0, 20, item=2).bytes - formulas.lm_decoding(more, 0, 0, item=2).bytes
    cache = build_lm(more).bfloat16().new_cache(1, 20)
    assert grown == 2 * sum(numbers(layer.k, layer.v) for layer in cache) == 2 * 2 * past
    tied = replace(DENSE, tied=True)
    assert formulas.lm_matrix_parameters(tied, parameters(build_lm(tied))) == parameters(build_lm(tied))


@pytest.mark.parametrize("mixer", suite_vit.MIXERS)
@pytest.mark.parametrize(("pixels", "patch", "window"), [(32, 4, 4), (32, 2, 4), (16, 1, 8)])
def test_backbone(mixer, pixels, patch, window):
    config = suite_vit.our_config(mixer, "nano", pixels, patch, window)
    model = build_vit(config).eval()
    assert formulas.vit_flops(config) == count_flops(model, torch.randn(1, 3, pixels, pixels))


def test_backbone_without_gate():
    config = replace(suite_vit.our_config("retention", "nano", 32, 4, 4), gate="none")
    assert formulas.vit_flops(config) == count_flops(build_vit(config).eval(), torch.randn(1, 3, 32, 32))


def test_bytes_of_a_backbone_grow_with_images_and_its_weights_count_once():
    config = SIZES["gated_swinrmt_retention_paper"]
    one, two = (formulas.vit_bytes(config, 1_000, batch) for batch in (1, 2))
    maps = sum(d * w * (56 // 2**i) ** 2 for i, (d, w) in enumerate(zip(config.depths, config.widths)))
    assert two - one == 2 * 45 * maps and 2 * one - two == 2 * 1_000
    assert formulas.vit_bytes(config, 1_000, 1, training=True) == 3 * one
