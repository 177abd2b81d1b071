"""Exercises of chapter 1. Replace a `raise` by your answer, then `pytest exercises -k 1_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 1.1 Scaled dot product: fill, difficulty 1 of 5, about 10 minutes
def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every query look at every key, and mix the values it finds.

    Compare each query with each key by a dot product, divide by the square root of the head width D, turn
    each query's row of scores into weights that sum to 1, and average the values with these weights. No
    mask yet, and no call of torch's ready-made attention: that one checks you.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, H, S, D].
        v: values [B, H, S, D].

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    raise NotImplementedError("1.1")


# 1.2 The causal mask: fill, difficulty 2 of 5, about 15 minutes
def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Hide the future before the softmax sees it.

    Return the attention weights of queries that may look at their own token and at earlier ones only. While
    text is generated there are more keys than queries: the T queries are then the *last* T of the S tokens,
    so the last query sees every key.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, H, S, D] with S >= T.

    Returns:
        Weights [B, H, T, S]; each row sums to 1, and what lies in the future has weight 0.
    """
    raise NotImplementedError("1.2")


# 1.3 Grouped-query attention: fill, difficulty 2 of 5, about 15 minutes
def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let several query heads share one key/value head.

    With H query heads and K key/value heads each group of H / K neighbouring query heads reads the same
    keys and values: query heads 0, 1, 2 read head 0, query heads 3, 4, 5 read head 1, and so on (here H / K
    = 3). Attention within a head is that of exercise 1.1, without a mask.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, K, S, D]; H is a multiple of K.
        v: values [B, K, S, D].

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    raise NotImplementedError("1.3")


# 1.4 Rotary positions: fill, difficulty 3 of 5, about 25 minutes
def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Write a token's position into its query or key by turning it (RoPE).

    Channel i and channel i + D/2 form a pair, a point in a plane. At position p the pair i turns by the
    angle p * base ** (-2 * i / D), from the first channel towards the second: at a quarter turn (1, 0)
    becomes (0, 1). Angles are computed in float32 or better, or far positions blur.

    Args:
        x: queries or keys [B, H, T, D], D even.
        positions: position of each of the T tokens, whole numbers [T]; they need not start at 0.
        base: sets the wavelengths.

    Returns:
        [B, H, T, D] in the dtype of x.
    """
    raise NotImplementedError("1.4")


# 1.5 Merge two blocks of keys: fill, difficulty 4 of 5, about 30 minutes
def merge_partials(first: tuple, second: tuple) -> tuple:
    """Join two half-finished softmax averages: the heart of FlashAttention.

    Attention over a block of keys can be kept in three tensors: the largest score `maximum`, the sum of
    exp(score - maximum) called `total`, and the sum of exp(score - maximum) times the value called
    `output`. Given the three of two blocks, return the three of both blocks together. Scores may be as
    large as 1,000, and a block in which everything is masked has maximum -inf, total 0 and output 0.

    Args:
        first: (maximum [..., T, 1], total [..., T, 1], output [..., T, D]) of one block.
        second: the same three of another block.

    Returns:
        (maximum, total, output) of the two together; output / total is the attention over all keys.
    """
    raise NotImplementedError("1.5")


# 1.6 What attention costs: predict, difficulty 2 of 5, about 15 minutes
def attention_cost(batch: int, heads: int, kv_heads: int, tokens: int, width: int) -> dict:
    """Predict what one attention layer costs, before the counter tells you.

    Write three formulas for B sequences of T tokens with H query heads, K key/value heads and head width D.
    The first counts the floating point operations of the two matrix products of naive attention (scores,
    and weights times values, every query against every key, nothing saved by a mask); a multiplication and
    an addition are two operations. The second is the memory of the score matrix in float32, the third that
    of the KV cache in bfloat16.

    Args:
        batch: B.
        heads: H.
        kv_heads: K.
        tokens: T.
        width: D.

    Returns:
        {"flops": whole number, "score_bytes": whole number, "cache_bytes": whole number}
    """
    raise NotImplementedError("1.6")


# 1.7 Break the naive softmax: break, difficulty 2 of 5, about 10 minutes
def overflowing_inputs() -> tuple:
    """Break this attention with harmless-looking numbers.

    It works in every small test, yet it is wrong:

        def naive_attention(q, k, v):
            scores = q @ k.T / math.sqrt(q.shape[-1])
            weights = torch.exp(scores)
            return weights / weights.sum(-1, keepdim=True) @ v

    Return queries, keys and values, float32 and of head width 16, with no entry beyond 10 in absolute
    value, for which this code returns NaN or infinity although the attention itself is perfectly well
    defined.

    Returns:
        (q [T, 16], k [S, 16], v [S, 16]) with T, S >= 1.
    """
    raise NotImplementedError("1.7")


# 1.8 Prove that nothing leaks: prove, difficulty 3 of 5, about 20 minutes
def is_causal(attention) -> bool:
    """Write the property: a token's output does not depend on later tokens.

    You get some attention function and do not know what is inside: softmax or not, any scale, any window.
    Find out by calling it with inputs of your own whether token i learns anything about tokens i + 1, i +
    2, ... Your answer is graded by the leaking implementations it catches and by the causal ones it
    accepts. Mind that a token is known by its query, its key and its value, and that a test of one token
    proves little about the others.

    Args:
        attention: a function of q, k, v, each [B, H, T, D] (any sizes, float32), that returns [B, H, T, D].

    Returns:
        True if it is causal, otherwise False.
    """
    raise NotImplementedError("1.8")
