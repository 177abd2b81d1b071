"""Checks of chapter 1: what attention costs, where it breaks, what must hold."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minigated.check import exercise
from minigated.expectations import (
    expect_number,
    expect_property,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 1.6
@exercise(
    "1.6",
    "What attention costs",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "A product of an [a, b] and a [b, c] matrix makes a * c numbers, each from b multiplications and "
        "b additions. How many bytes has a float32, how many a bfloat16? Which heads are cached?"
    ),
    pseudo=(
        "flops = two products, each 2 * (T * T * D) for every head and sequence\n"
        "score_bytes = one T x T matrix for every query head and sequence, times the bytes of a float32\n"
        "cache_bytes = keys and values, T x D for every key/value head, times the bytes of a bfloat16"
    ),
)
def attention_cost(f):
    for sizes in ((2, 6, 2, 5, 7), (1, 4, 4, 16, 8), (3, 8, 1, 9, 4)):
        predicted = f(*sizes)
        if not isinstance(predicted, dict):
            refuse(
                f"return a dictionary with flops, score_bytes and cache_bytes, not {type(predicted).__name__}"
            )
        counted, suspects = _count_cost(*sizes)
        for name, number in counted.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            expect_number(predicted[name], number, f"{name} for B, H, K, T, D = {sizes}", suspects[name])


def _count_cost(batch, heads, kv_heads, tokens, width) -> tuple[dict, dict]:
    q, k, v = (torch.empty(batch, heads, tokens, width, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        scores = q @ k.mT
        scores.softmax(-1) @ v
    flops, nbytes = counter.get_total_flops(), scores.numel() * scores.element_size()
    cache = torch.empty(2, batch, kv_heads, tokens, width, dtype=torch.bfloat16, device="meta")
    cached = cache.numel() * cache.element_size()
    counted = {"flops": flops, "score_bytes": nbytes, "cache_bytes": cached}
    suspects = {
        "flops": {
            "that counts a multiplication and its addition as one, or only one of the two products": flops
            // 2,
            "a quarter: there are two products, and each has multiplications and additions": flops // 4,
            "the heads are missing": flops // heads,
            "the query is compared with every key: T * T, not T": flops // tokens,
        },
        "score_bytes": {
            "a float32 has four bytes, not two": nbytes // 2,
            "count bytes, not numbers": nbytes // 4,
            "the heads are missing": nbytes // heads,
        },
        "cache_bytes": {
            "the cache holds the K key/value heads, not all H query heads": cached * heads // kv_heads,
            "keys *and* values are cached": cached // 2,
            "a bfloat16 has two bytes, not four": cached * 2,
            "count bytes, not numbers": cached // 4,
        },
    }
    # Where a suspect coincides with the right number at these sizes (K = H, one head), it is no suspect.
    return counted, {name: {m: n for m, n in s.items() if n != counted[name]} for name, s in suspects.items()}


# ---------------------------------------------------------------------------------------------- 1.7
def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.T / math.sqrt(q.shape[-1]))
    return weights / weights.sum(-1, keepdim=True) @ v


@exercise(
    "1.7",
    "Break the naive softmax",
    kind="break",
    difficulty=2,
    minutes=10,
    hint=(
        "The largest float32 is about 3.4e38. Whose exponential is that? With entries up to 10 and head "
        "width 16, how large can a scaled score become?"
    ),
    pseudo=(
        "choose a query and a key that point the same way, as long as allowed\n"
        "their score is 16 * 10 * 10 / 4; its exponential does not fit into float32"
    ),
)
def overflowing_inputs(f):
    inputs = f()
    if not isinstance(inputs, (tuple, list)) or len(inputs) != 3:
        refuse("return the three tensors (q, k, v)")
    for tensor, name in zip(inputs, "qkv"):
        if not isinstance(tensor, Tensor):
            refuse(f"`{name}` is a {type(tensor).__name__}, not a tensor")
        if tensor.dim() != 2 or tensor.shape[1] != 16 or not len(tensor):
            refuse(f"`{name}` has the shape {list(tensor.shape)}, expected [tokens, 16]")
        if tensor.dtype != torch.float32:
            refuse(f"`{name}` is {tensor.dtype}; the inputs must be float32")
        if not torch.isfinite(tensor).all():
            refuse(f"`{name}` holds NaN or infinity itself: that breaks any attention")
        if tensor.abs().max() > 10:
            refuse(
                f"`{name}` has an entry of {float(tensor.abs().max()):g}; entries beyond 10 are not allowed"
            )
    q, k, v = inputs
    if len(k) != len(v):
        refuse(f"{len(k)} keys and {len(v)} values: each key needs its value")
    if torch.isfinite(naive_attention(q, k, v)).all():
        largest = float((q @ k.T / 4).max())
        refuse(
            f"the naive code survives: its largest score, after the division by sqrt(16), is {largest:.3g}. "
            "Exponentials overflow in float32 only for larger scores"
        )


# ---------------------------------------------------------------------------------------------- 1.8
def _masked(allowed, before: bool = True):
    def attention(q, k, v):
        tokens = q.shape[-2]
        mask = allowed(torch.arange(tokens)[:, None], torch.arange(tokens)[None, :])
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if before:
            return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v
        return torch.softmax(scores, dim=-1) * mask @ v

    return attention


def _running_mean(q, k, v):
    count = torch.arange(1, v.shape[2] + 1)[:, None]
    return (torch.sigmoid(k) * v).cumsum(2) / count * torch.tanh(q)


def _last_head_leaks(q, k, v):
    causal, full = _masked(lambda i, j: j <= i)(q, k, v), F.scaled_dot_product_attention(q, k, v)
    return torch.cat((causal[:, :-1], full[:, -1:]), dim=1)


CAUSAL = {
    "torch's own causal attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "causal attention with another scale": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=1.0
    ),
    "a sliding window over the last three tokens": _masked(lambda i, j: (j <= i) & (j > i - 3)),
    "a running mean without any softmax": _running_mean,
}
LEAKING = {
    "no mask at all": F.scaled_dot_product_attention,
    "a mask that lets every token see one step ahead": _masked(lambda i, j: j <= i + 1),
    "a mask after the softmax: future *keys* still change how the weights are normalised": _masked(
        lambda i, j: j <= i, before=False
    ),
    "a mask the wrong way round": _masked(lambda i, j: j >= i),
    "only the last head looks ahead": _last_head_leaks,
    "only token 0 looks ahead": _masked(lambda i, j: (j <= i) | (i == 0)),
    "only token 0 looks ahead, by one step": _masked(lambda i, j: (j <= i) | ((i == 0) & (j == 1))),
    "values with their mean over all tokens subtracted": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v - v.mean(2, keepdim=True), is_causal=True
    ),
    "queries with their mean over all tokens subtracted": lambda q, k, v: F.scaled_dot_product_attention(
        q - q.mean(2, keepdim=True), k, v, is_causal=True
    ),
}


@exercise(
    "1.8",
    "Prove that nothing leaks",
    kind="prove",
    difficulty=3,
    minutes=20,
    hint=(
        "Change the future and watch the past: everything after token i may be anything, and the outputs "
        "up to token i must stay. Compare with torch.allclose, not with a reference of your own."
    ),
    pseudo=(
        "draw q, k, v with several heads and tokens; before = attention(q, k, v)\n"
        "for every token i:\n"
        "    replace q, k and v after token i by other numbers\n"
        "    if an output up to token i has changed: return False\n"
        "return True"
    ),
)
def is_causal(f):
    expect_property(f, CAUSAL, LEAKING)
