"""Chapter 1: every form of attention equals equation (2), forward and backward, in three precisions.

The same tests run on a GPU where there is one (`device` in conftest.py). Twins with a planted bug must fail.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from minigated.attention import (
    Attention,
    AttentionShape,
    KVCache,
    attention_blocks,
    attention_loops,
    attention_matrix,
    attention_sdpa,
    attention_weights,
    causal_mask,
    repeat_kv,
)
from minigated.errors import InputError
from minigated.rope import RotaryTable, apply_rope, rotary_angles

BATCH, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 6, 2, 7, 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


# ------------------------------------------------------------------------------------ the forms, one signature
def loops(q, k, v, causal):
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    rows = [attention_loops(*(t[b, h] for t in (q, k, v)), causal) for b in range(len(q)) for h in range(q.shape[1])]
    return torch.stack(rows).view_as(q)


def matrix(q, k, v, causal):
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    mask = causal_mask(q.shape[2], k.shape[2], q.device) if causal else None
    return attention_matrix(q, k, v, mask)


def blocks(q, k, v, causal):
    k, v = repeat_kv(k, q.shape[1] // k.shape[1]), repeat_kv(v, q.shape[1] // v.shape[1])
    return attention_blocks(q, k, v, causal, block=3)


FORMS = [loops, matrix, blocks, attention_sdpa]
RECTANGULAR = [matrix, blocks, attention_sdpa]  # also for more keys than queries


def equation_2(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v spelled out per query with exp and division, sharing no code with the package."""
    rows = []
    for i in range(q.shape[2]):
        last = k.shape[2] - q.shape[2] + i + 1 if causal else k.shape[2]
        groups = q[:, :, i].unflatten(1, (k.shape[1], -1))  # [B, K, G, D]
        score = torch.einsum("bkgd,bksd->bkgs", groups, k[:, :, :last]) / math.sqrt(q.shape[3])
        weight = score.exp() / score.exp().sum(-1, keepdim=True)
        rows.append(torch.einsum("bkgs,bksd->bkgd", weight, v[:, :, :last]).flatten(1, 2))
    return torch.stack(rows, dim=2)


def draw(queries=TOKENS, keys=TOKENS, dtype=torch.float64, device="cpu", kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, queries, WIDTH), *[(BATCH, kv_heads, keys, WIDTH)] * 2, (BATCH, HEADS, queries, WIDTH)]
    *qkv, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return qkv, upstream


def assert_equals_equation(form, qkv, upstream, causal, wanted_form=equation_2):
    """Output and the three gradients of `form`, against the equation in float64 on the same numbers."""
    dtype = upstream.dtype
    own = [t.clone().requires_grad_() for t in qkv]
    exact = [t.double().requires_grad_() for t in qkv]
    output, wanted = form(*own, causal), wanted_form(*exact, causal)
    assert output.dtype == dtype
    output.backward(upstream)
    wanted.backward(upstream.double())
    pairs = [(output, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact, strict=True)]
    for found, right in pairs:
        torch.testing.assert_close(found.double(), right, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_equation_2(form, causal, dtype, device):
    assert_equals_equation(form, *draw(dtype=dtype, device=device), causal)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("form", RECTANGULAR)
def test_the_last_query_is_aligned_with_the_last_key(form, queries, dtype, device):
    assert_equals_equation(form, *draw(queries, TOKENS, dtype, device), True)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_key_value_heads(form, kv_heads):
    assert_equals_equation(form, *draw(kv_heads=kv_heads), True)


def test_fast_form_equals_torchs_own_causal_attention(device):
    (q, k, v), _ = draw(device=device)
    right = F.scaled_dot_product_attention(q, *(t.repeat_interleave(3, dim=1) for t in (k, v)), is_causal=True)
    torch.testing.assert_close(attention_sdpa(q, k, v), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 5, 7, 64])
def test_the_block_size_does_not_matter(block):
    assert_equals_equation(
        lambda q, k, v, causal: attention_blocks(q, repeat_kv(k, 3), repeat_kv(v, 3), causal, block), *draw(), True
    )


def test_online_softmax_survives_scores_that_overflow_exp():
    (q, k, v), _ = draw(dtype=torch.float32)
    q, k, v = 300 * q, repeat_kv(k, 3), repeat_kv(v, 3)
    assert torch.isinf((q @ k.transpose(2, 3) / 2).max().exp())
    mask = causal_mask(TOKENS, TOKENS)
    right = attention_matrix(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(attention_blocks(q, k, v, block=2).double(), right, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ planted bugs
def softmax_over_queries(q, k, v, causal):
    k, v = repeat_kv(k, 3), repeat_kv(v, 3)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~causal_mask(q.shape[2], k.shape[2]), -1e9)
    return scores.softmax(-2) @ v


def scale_forgotten(q, k, v, causal):
    return attention_matrix(q, repeat_kv(k, 3), repeat_kv(v, 3), causal_mask(q.shape[2], k.shape[2]), scale=1.0)


def mask_after_softmax(q, k, v, causal):
    return (attention_weights(q, repeat_kv(k, 3)) * causal_mask(q.shape[2], k.shape[2])) @ repeat_kv(v, 3)


def mask_aligned_at_the_start(q, k, v, causal):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return attention_matrix(q, repeat_kv(k, 3), repeat_kv(v, 3), mask)


def mask_without_the_diagonal(q, k, v, causal):
    mask = causal_mask(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2] - 1)
    return attention_matrix(q, repeat_kv(k, 3), repeat_kv(v, 3), mask).nan_to_num()


def kv_heads_repeated_as_a_whole(q, k, v, causal):
    return attention_sdpa(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1), causal)


def blocks_without_rescaling(q, k, v, causal):
    k, v = repeat_kv(k, 3), repeat_kv(v, 3)
    mask = causal_mask(q.shape[2], k.shape[2])
    total, output = 0, 0
    for start in range(0, k.shape[2], 3):  # each block with its own maximum, the running sums never brought over
        part = slice(start, start + 3)
        scores = (q @ k[:, :, part].transpose(2, 3) / 2).masked_fill(~mask[:, part], -1e9)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * mask[:, part]
        total, output = total + weights.sum(-1, keepdim=True), output + weights @ v[:, :, part]
    return output / total


BUGS = [
    softmax_over_queries,
    scale_forgotten,
    mask_after_softmax,
    mask_without_the_diagonal,
    kv_heads_repeated_as_a_whole,
    blocks_without_rescaling,
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_the_comparison(bug, dtype):
    with pytest.raises(AssertionError):
        assert_equals_equation(bug, *draw(dtype=dtype), True)


def test_a_mask_aligned_at_the_start_fails_with_more_keys():
    assert_equals_equation(mask_aligned_at_the_start, *draw(), True)  # equal lengths hide it
    with pytest.raises(AssertionError):
        assert_equals_equation(mask_aligned_at_the_start, *draw(3, TOKENS), True)


def test_a_missing_mask_fails():
    with pytest.raises(AssertionError):
        assert_equals_equation(lambda q, k, v, causal: matrix(q, k, v, False), *draw(), True)


# ------------------------------------------------------------------------------------ small parts
def test_causal_mask_by_hand():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(1, 3).tolist() == [[True, True, True]]


@pytest.mark.parametrize("form", RECTANGULAR)
def test_more_queries_than_keys_are_refused_under_a_causal_mask_alone(form):
    (q, k, v), _ = draw(TOKENS, 5)
    with pytest.raises(InputError, match="at least as many keys as queries, got 7 queries, 5 keys"):
        form(q, k, v, True)
    assert_equals_equation(form, *draw(TOKENS, 5), False)


def test_weights_are_a_distribution_over_the_past():
    (q, k, _), _ = draw(kv_heads=HEADS)
    weights = attention_weights(q, k, causal_mask(TOKENS, TOKENS))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()


def test_repeat_kv_gives_neighbours_the_same_head():
    heads = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    assert repeat_kv(heads, 3).flatten().tolist() == [10, 10, 10, 20, 20, 20]


# ------------------------------------------------------------------------------------ rotary positions
def relative_products(rotate) -> torch.Tensor:
    """<rotate(q at m), rotate(k at n)> for all m and n, [12, 12], one head of width 8, in float64."""
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = rotary_angles(12, 8).double()
    at_all = [rotate(x.expand(1, 12, 1, 8), angles.cos(), angles.sin())[0, :, 0] for x in (q, k)]
    return at_all[0] @ at_all[1].T


def depends_on_distance_only(products: torch.Tensor) -> bool:
    diagonals = [products.diagonal(shift) for shift in range(-11, 12)]
    return all((d - d[0]).abs().max() < 1e-6 for d in diagonals)


def test_rotary_products_depend_on_the_distance_only():
    products = relative_products(apply_rope)
    assert depends_on_distance_only(products)
    assert (products[0] - products[0, 0]).abs()[1:].min() > 1e-3  # and do depend on it


def test_a_rotation_with_a_wrong_sign_fails():
    def wrong(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos - first * sin), dim=-1)

    assert not depends_on_distance_only(relative_products(wrong))


def test_rotation_keeps_lengths_and_leaves_position_zero():
    x = torch.randn(2, 5, 3, 8)
    rotated = apply_rope(x, *RotaryTable(16, 8)(0, 5))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[:, 0], x[:, 0]) and not torch.allclose(rotated[:, 1], x[:, 1])


def test_rotary_angles_by_hand():
    angles = rotary_angles(3, 4, base=100.0)
    torch.testing.assert_close(angles, torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]))


def test_rotation_of_bfloat16_runs_in_float32():
    x = torch.randn(1, 300, 2, 8).bfloat16()
    table = RotaryTable(300, 8)(0, 300)
    rotated = apply_rope(x, *table)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), *table).bfloat16())


# ------------------------------------------------------------------------------------ the module
SHAPE = AttentionShape(width=10, heads=6, kv_heads=2, head_width=4)


def by_hand(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """Eq. (3) and (4) by the paper's footnote 2: each head times its own rows of W_O, summed. No norm, no rope."""
    output = 0
    for head in range(SHAPE.heads):
        own, shared = slice(4 * head, 4 * head + 4), slice(4 * (head // 3), 4 * (head // 3) + 4)
        q = x @ module.q_proj.weight[own].T
        k, v = x @ module.k_proj.weight[shared].T, x @ module.v_proj.weight[shared].T
        heads = torch.stack([attention_loops(q[b], k[b], v[b]) for b in range(len(x))])  # [B, T, D]
        output = output + heads @ module.o_proj.weight[:, own].T
    return output


def test_the_module_is_the_sum_of_its_heads():
    module, x = Attention(SHAPE, qk_norm=False).double(), torch.randn(2, 5, 10, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=0, atol=1e-12)


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    grouped = Attention(SHAPE).double()
    full = Attention(AttentionShape(width=10, heads=6, kv_heads=6, head_width=4)).double()
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    rotary = [t.double() for t in RotaryTable(8, 4)(0, 5)]
    torch.testing.assert_close(full(x, rotary), grouped(x, rotary), rtol=0, atol=1e-12)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    for name in ("q_proj", "k_proj"):
        for qk_norm in (True, False):
            module = Attention(SHAPE, qk_norm=qk_norm, eps=1e-12).double()
            before = module(x)
            with torch.no_grad():
                module.get_parameter(f"{name}.weight").mul_(50.0)
            assert torch.allclose(module(x), before, atol=1e-6) == qk_norm


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    "sizes, said",
    [
        ((8, 6, 4, 2), "6 query heads cannot share 4 key/value heads evenly"),
        ((8, 0, 1, 2), "heads must be at least 1, got 0"),
        ((8, 2, -2, 2), "kv_heads must be at least 1, got -2"),
        ((0, 2, 2, 2), "width must be at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(sizes, said):
    with pytest.raises(InputError, match=said):
        AttentionShape(*sizes)


def test_an_odd_rotary_width_is_refused():
    with pytest.raises(InputError, match="even head width, got 5"):
        RotaryTable(8, 5)


def test_positions_beyond_the_table_are_refused():
    table = RotaryTable(8, 4)
    assert table(3, 5)[0].shape == (5, 2)
    with pytest.raises(InputError, match="9 positions are longer than the rotary table of 8"):
        table(4, 5)


def test_an_unknown_order_of_gate_norm_and_rope_is_refused():
    with pytest.raises(InputError, match="gate, norm and rope once each, got .*'norm', 'rope'"):
        Attention(SHAPE, qk_order=("norm", "rope"))


def test_a_full_cache_refuses_and_keeps_what_it_has():
    cache = KVCache(2, 5, SHAPE)
    k = torch.randn(2, 2, 4, 4)
    cache.append(k, -k)
    with pytest.raises(InputError, match="the cache holds 5 tokens; 8 were given"):
        cache.append(k, k)
    held_k, held_v = cache.append(k[:, :, :1], k[:, :, :1])
    assert torch.equal(held_k[:, :, :4], k) and torch.equal(held_v[:, :, :4], -k) and held_k.shape[2] == 5
