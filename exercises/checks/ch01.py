"""Checks of chapter 1: attention in matrices, masked, and with shared heads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    close,
    draw,
    expect_close,
    expect_good_manners,
    expect_tensor,
    refuse,
)

NO_SCALE = "your result is the one without the 1/sqrt(D) scale"


def qkv(batch=2, heads=3, queries=4, keys=5, width=6, kv_heads=None, seed=1) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of different sizes everywhere, so that no two axes can be confused."""
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = (batch, heads, queries), (batch, kv_heads, keys), (batch, kv_heads, keys)
    return tuple(draw(*shape, width, seed=seed + i) for i, shape in enumerate(shapes))


def softmax_over(q: Tensor, k: Tensor, scale: float, axis: int = -1) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * scale, dim=axis)


# ---------------------------------------------------------------------------------------------- 1.1
@exercise(
    "1.1",
    "Scaled dot product",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "`k.transpose(-2, -1)` swaps the last two axes, and `@` multiplies the last two axes of any stack "
        "of matrices. Each row of weights belongs to one query: over which axis must it sum to 1?"
    ),
    pseudo=(
        "scores = q times k transposed, divided by sqrt(D)\n"
        "weights = softmax of scores along the keys\n"
        "return weights times v"
    ),
)
def scaled_dot_product(f):
    q, k, v = qkv()
    expect_tensor(call(f, q, k, v), (2, 3, 4, 6))
    reference = F.scaled_dot_product_attention

    eye = torch.eye(5, dtype=q.dtype).expand(2, 3, 5, 5)
    weights = call(f, q, k, eye)  # values that are unit vectors show the weights themselves
    expect_tensor(weights, (2, 3, 4, 5), "the result for values of another width than the keys")
    ones = lambda axis: close(weights.sum(axis), torch.ones_like(weights.sum(axis)))
    if not ones(-1):
        if ones(-2):
            refuse(
                "rows do not sum to 1 but columns do: the softmax runs over the queries instead of the keys"
            )
        if ones(1):
            refuse("the weights sum to 1 over the heads: the softmax runs over the heads instead of the keys")
        refuse("the weights of a query do not sum to 1: the softmax belongs over the last axis, the keys")

    expect_close(
        call(f, 0 * q, k, v),
        v.mean(2, keepdim=True).expand(2, 3, 4, 6),
        "a query of zeros must look at all keys alike, so that its output is the mean of the values",
    )
    suspects = {
        NO_SCALE: softmax_over(q, k, 1.0) @ v,
        "the scores are divided by D, not by its square root": softmax_over(q, k, 1 / 6) @ v,
        "the scores are multiplied by sqrt(D), not divided": softmax_over(q, k, 6**0.5) @ v,
        "the scores are divided by the square root of the number of heads, not of the head width D": (
            softmax_over(q, k, 3**-0.5) @ v
        ),
        "the scores are divided by the square root of the number of keys, not of the head width D": (
            softmax_over(q, k, 5**-0.5) @ v
        ),
        "the scores are divided by the square root of the number of queries, not of the head width D": (
            softmax_over(q, k, 4**-0.5) @ v
        ),
    }
    expect_close(
        call(f, q, k, v), reference(q, k, v), "the values differ from softmax(q k^T / sqrt(D)) v", suspects
    )
    order = torch.tensor([3, 0, 4, 1, 2])
    expect_close(
        call(f, q, k[:, :, order], v[:, :, order]),
        reference(q, k, v),
        "shuffling keys and values together must change nothing",
    )
    expect_good_manners(f, reference, {"q": q, "k": k, "v": v})
    single = qkv(1, 1, 1, 7, 16)
    expect_close(call(f, *single), reference(*single), "wrong for a single query of a wider head")


# ---------------------------------------------------------------------------------------------- 1.2
def weights_reference(q: Tensor, k: Tensor) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2]
    weights = q.new_zeros(*q.shape[:-1], keys)
    for i in range(queries):
        seen = keys - queries + i + 1
        scores = (q[..., i : i + 1, :] * k[..., :seen, :]).sum(-1) / math.sqrt(q.shape[-1])
        weights[..., i, :seen] = torch.softmax(scores, dim=-1)
    return weights


@exercise(
    "1.2",
    "The causal mask",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "What must a score be so that its exponential is exactly 0? For the case of more keys than "
        "queries, write down by hand which keys the first of 2 queries may see when there are 5 keys."
    ),
    pseudo=(
        "scores as in 1.1\n"
        "query i stands at position S - T + i\n"
        "where the key's position is larger: score = minus infinity\n"
        "return softmax of scores along the keys"
    ),
)
def causal_weights(f):
    q, k, _ = qkv(queries=4, keys=4)
    weights = call(f, q, k)
    expect_tensor(weights, (2, 3, 4, 4))
    _check_square_mask(weights, q, k)

    q, k, _ = qkv(queries=2, keys=5)
    start = torch.ones(2, 5, dtype=torch.bool).tril()
    from_start = torch.softmax((q @ k.mT / math.sqrt(6)).masked_fill(~start, float("-inf")), dim=-1)
    expect_close(
        call(f, q, k),
        weights_reference(q, k),
        "right for T = S, wrong for T = 2 queries and S = 5 keys",
        {
            "with more keys than queries the mask is aligned to the start: query 0 sees key 0 only. The queries "
            "are the last tokens, so align it to the end (S - T)": from_start
        },
    )
    q, k, _ = qkv(queries=4, keys=4)
    q[..., 0], k[..., -1, 0] = 50.0, 500.0  # the last key is far louder than all others together
    expect_close(
        call(f, q, k),
        weights_reference(q, k),
        "a loud future token spoils earlier rows: the softmax saw scores that were masked only afterwards",
    )
    q, k, _ = qkv(queries=3, keys=5)
    expect_good_manners(f, weights_reference, {"q": q, "k": k})
    q, k, _ = qkv(1, 1, 1, 6, 16)
    expect_close(call(f, q, k), weights_reference(q, k), "a single query, as in generation, sees every key")


def _check_square_mask(weights: Tensor, q: Tensor, k: Tensor) -> None:
    scores, below = q @ k.mT / math.sqrt(6), torch.ones(4, 4, dtype=torch.bool).tril()
    if not torch.isfinite(weights[..., 0, :]).all():
        refuse(
            "the row of query 0 is NaN: it has nothing left to look at. A token may see itself, keep the diagonal"
        )
    future = weights.masked_fill(below, 0.0)
    if future.abs().max() > 1e-6:
        if close(weights.tril(-1), torch.zeros_like(weights)):
            refuse("queries look at the future alone: the mask is the wrong way round")
        if close(weights, torch.softmax(scores * below, dim=-1)):
            refuse("masked scores are set to 0, and exp(0) = 1 is still a weight: set them to minus infinity")
        refuse("weight falls on keys in the future: the causal mask is missing or too wide")
    sums = weights.sum(-1)
    if not close(sums, torch.ones_like(sums)):
        if close(weights, torch.softmax(scores, dim=-1) * below):
            refuse("rows sum to less than 1: the mask comes after the softmax instead of before it")
        refuse("the rows do not sum to 1")
    if (weights.diagonal(dim1=-2, dim2=-1) == 0).any():
        refuse("a token cannot see itself: keep the diagonal of the mask")
    suspects = {NO_SCALE: torch.softmax((scores * math.sqrt(6)).masked_fill(~below, float("-inf")), dim=-1)}
    expect_close(
        weights, weights_reference(q, k), "the future is hidden, but the weights are wrong", suspects
    )


# ---------------------------------------------------------------------------------------------- 1.3
def grouped_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    heads = [
        F.scaled_dot_product_attention(q[:, h], k[:, h // group], v[:, h // group]) for h in range(q.shape[1])
    ]
    return torch.stack(heads, dim=1)


@exercise(
    "1.3",
    "Grouped-query attention",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "`repeat` and `repeat_interleave` give the same shape and a different order. Try both on "
        "torch.arange(2)."
    ),
    pseudo=(
        "group = H / K\nrepeat each key head and each value head `group` times, in place\nattention as in 1.1"
    ),
)
def grouped_query_attention(f):
    q, k, v = qkv(heads=6, kv_heads=2, queries=4, keys=5)
    expect_tensor(call(f, q, k, v), (2, 6, 4, 6))
    same = qkv(heads=3)
    suspects = {NO_SCALE: softmax_over(same[0], same[1], 1.0) @ same[2]}
    expect_close(
        call(f, *same),
        grouped_reference(*same),
        "with K = H it must be the attention of exercise 1.1",
        suspects,
    )

    numbers = torch.arange(2.0, dtype=q.dtype)[:, None, None].expand_as(v)  # a head's values are its number
    read = call(f, q, k, numbers)[0, :, 0, 0]
    expected = torch.tensor([0, 0, 0, 1, 1, 1], dtype=q.dtype)
    if not close(read, expected):
        found = ", ".join(f"{x:.2g}" for x in read.tolist())
        tiled = found == "0, 1, 0, 1, 0, 1"
        about = "use repeat_interleave, not repeat" if tiled else "each head reads exactly one"
        refuse(f"query heads 0 to 5 read the value heads {found}; expected 0, 0, 0, 1, 1, 1: {about}")

    weights_tiled = softmax_over(q, k.repeat(1, 3, 1, 1), 6**-0.5)
    mixed_time = lambda x: x.repeat_interleave(3, dim=2).reshape(2, 6, 5, 6)
    suspects = {
        "values are shared in the right order, but keys are not: repeat_interleave both": (
            weights_tiled @ v.repeat_interleave(3, dim=1)
        ),
        "tokens are repeated instead of heads: the axis of repeat_interleave is wrong": (
            softmax_over(q, mixed_time(k), 6**-0.5) @ mixed_time(v)
        ),
    }
    expect_close(call(f, q, k, v), grouped_reference(q, k, v), "right with K = H, wrong with K < H", suspects)
    expect_good_manners(f, grouped_reference, {"q": q, "k": k, "v": v})
    other = qkv(1, 4, 3, 3, 8, kv_heads=1)
    expect_close(
        call(f, *other), grouped_reference(*other), "wrong when all heads share a single key/value head"
    )
