"""The formulas of `minigated.cost` against torch's counter and against real tensors."""

import pytest
import torch

from minigated.attention import Attention, AttentionShape, attention_blocks, attention_matrix, attention_sdpa
from minigated.cost import Cost, attention_cost, count_flops, kv_cache_bytes
from minigated.lm import build_lm

# batch, tokens, heads, key/value heads, head width: no two alike, so that a swapped letter shows
SHAPES = [(1, 16, 1, 1, 8), (2, 24, 4, 4, 16), (3, 40, 6, 2, 10), (1, 33, 8, 1, 12)]


def draw(batch, tokens, heads, kv_heads, width, dtype=torch.float32):
    sizes = (heads, kv_heads, kv_heads)
    return [torch.randn(batch, count, tokens, width).to(dtype) for count in sizes]  # q, k, v


@pytest.mark.parametrize("shape", SHAPES)
def test_operations_by_formula_equal_the_counter_for_the_fused_form(shape):
    batch, tokens, heads, kv_heads, width = shape
    cost = attention_cost(batch, tokens, heads, width, kv_heads)
    assert count_flops(attention_sdpa, *draw(*shape)) == cost.flops


@pytest.mark.parametrize("form", [attention_matrix, attention_blocks])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_operations_by_formula_equal_the_counter_for_the_plain_forms(form, shape):
    batch, tokens, heads, kv_heads, width = shape
    assert count_flops(form, *draw(*shape)) == attention_cost(batch, tokens, heads, width, kv_heads, fused=False).flops


def test_a_whole_layer_costs_its_projections_and_its_attention():
    shape = AttentionShape(width=20, heads=6, kv_heads=2, head_width=4)
    batch, tokens = 2, 15
    outputs = 2 * shape.heads + 2 * shape.kv_heads  # of q and o, of k and v, in heads
    projections = 2 * batch * tokens * shape.width * outputs * shape.head_width
    counted = count_flops(Attention(shape), torch.randn(batch, tokens, shape.width))
    assert counted == projections + attention_cost(batch, tokens, 6, 4, 2).flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_those_of_the_tensors_that_move(shape, dtype):
    batch, tokens, heads, kv_heads, width = shape
    q, k, v = draw(*shape, dtype=dtype)
    y = attention_sdpa(q, k, v)
    ends = sum(tensor.nbytes for tensor in (q, k, v, y))
    scores = q @ q.transpose(-2, -1)  # [B, H, T, T], as large as the scores with repeated keys
    options = {"kv_heads": kv_heads, "item": q.element_size()}
    assert attention_cost(batch, tokens, heads, width, fused=True, **options).bytes == ends
    assert attention_cost(batch, tokens, heads, width, fused=False, **options).bytes == ends + 4 * scores.nbytes


def test_key_value_heads_default_to_query_heads():
    assert attention_cost(2, 10, 6, 8) == attention_cost(2, 10, 6, 8, kv_heads=6)
    assert attention_cost(2, 10, 6, 8) != attention_cost(2, 10, 6, 8, kv_heads=3)


def test_naive_intensity_stays_below_its_limit_while_fused_grows():
    lengths, width, item = (256, 1024, 4096, 16384), 64, 2
    naive = [attention_cost(1, n, 4, width, item=item, fused=False).intensity for n in lengths]
    fused = [attention_cost(1, n, 4, width, item=item, fused=True).intensity for n in lengths]
    assert naive == sorted(naive) and max(naive) < width / item
    assert max(naive) > 0.99 * width / item
    assert fused[-1] == pytest.approx(64 * fused[0])


def test_intensity_is_operations_a_byte():
    assert Cost(flops=30, bytes=4).intensity == 7.5


@pytest.mark.parametrize("variant", ["none", "kv_heads_doubled"])
def test_cache_bytes_equal_those_of_a_real_cache(variant):
    model = build_lm("lm_nano", variant=variant)
    batch, capacity = 3, 50
    held = sum(tensor.nbytes for layer in model.new_cache(batch, capacity) for tensor in (layer.k, layer.v))
    shape = model.blocks[0].attention.shape
    size = kv_cache_bytes(batch, capacity, len(model.blocks), shape.kv_heads, shape.head_width, item=4)
    assert size == held


def test_cache_bytes_by_hand():
    assert kv_cache_bytes(batch=1, tokens=2, layers=3, kv_heads=5, head_width=7) == 2 * 2 * 3 * 5 * 7 * 2


def test_counting_leaves_no_gradient_behind():
    layer = Attention(AttentionShape(8, 2, 1, 4))
    result = []
    count_flops(lambda x: result.append(layer(x)), torch.randn(1, 3, 8))
    assert not result[0].requires_grad
