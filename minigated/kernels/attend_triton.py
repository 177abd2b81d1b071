"""Attention of one token over a cache as one Triton kernel, with the norms, rotation, cache and gate around it.

The cache is read in parts, by a program for each part and head; the last of a head to be done puts them together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minigated.kernels.decode_triton import launch, let_next, rounded, wait_for_last

WARPS = 4
TOKENS = 64  # of the cache that a program reads at once
MOST_PARTS = 64  # of the cache, each with a program for every head


@triton.jit
def _halves(x, width, pair):
    """The first and the second half of a head's channels, float32."""
    inside = pair < width // 2
    first, second = tl.load(x + pair, inside, 0.0), tl.load(x + width // 2 + pair, inside, 0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _turned(a, b, weight, cos, sin, eps, width, pair, like, NORM: tl.constexpr):
    """A query or key in halves, normed if `NORM` and turned to its position; float32, rounded as `like`."""
    if NORM:
        first, second = _halves(weight, width, pair)
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / width + eps)
        a, b = rounded(rounded(a * scale, like) * first, like), rounded(rounded(b * scale, like) * second, like)
    return rounded(a * cos - b * sin, like), rounded(b * cos + a * sin, like)


@triton.jit
def _held(keys, values, row, start, end, width, pair, TOKENS: tl.constexpr):
    """Some tokens of the cache before `end`, zeros beyond: keys in halves, values in halves, [TOKENS, PAIRS] each."""
    token = start + tl.arange(0, TOKENS)
    there = (token < end)[:, None] & (pair < width // 2)[None, :]
    at = row + token[:, None] * width + pair[None, :]
    old1, old2 = tl.load(keys + at, there, 0.0), tl.load(keys + at + width // 2, there, 0.0)
    return old1, old2, tl.load(values + at, there, 0.0), tl.load(values + at + width // 2, there, 0.0)


@triton.jit
def _attend(
    qkv, q_norm, k_norm, cos, sin, position, keys, values, partial, arrived, out, eps, scale, heads, groups, width,
    capacity, NORM: tl.constexpr, GATE: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query head over a part of the cache; the last part to arrive puts them together and gates the sum.

    The part in which the new token stands writes its key and value. A part leaves behind, in float32, its weighted sum
    of values in halves, its largest score and its sum of weights: 2 PAIRS + 2 numbers.
    """
    let_next(EARLY)
    head, part, pair = tl.program_id(0), tl.program_id(1), tl.arange(0, PAIRS)
    now = tl.load(position)  # it, the tables and the tokens so far were there before this step began
    newest = (now // SPAN).to(tl.int32)
    group, inside = head // (heads // groups), pair < width // 2
    row, turn = group.to(tl.int64) * capacity * width, now * (width // 2) + pair
    c, s = tl.load(cos + turn, inside, 0.0), tl.load(sin + turn, inside, 0.0)
    start, end = part * SPAN, tl.minimum(now, (part + 1) * SPAN)
    old1, old2, held1, held2 = _held(keys, values, row, start, end, width, pair, TOKENS)
    wait_for_last(EARLY)
    if part <= newest:
        q1, q2 = _halves(qkv + head * width, width, pair)
        k1, k2 = _halves(qkv + (heads + group) * width, width, pair)
        v1, v2 = _halves(qkv + (heads + groups + group) * width, width, pair)
        q1, q2 = _turned(q1, q2, q_norm, c, s, eps, width, pair, qkv, NORM)
        k1, k2 = _turned(k1, k2, k_norm, c, s, eps, width, pair, qkv, NORM)
        if (part == newest) & (head % (heads // groups) == 0):  # one head of a group; the others have it at hand
            here = row + now * width + pair
            tl.store(keys + here, k1, inside)
            tl.store(keys + here + width // 2, k2, inside)
            tl.store(values + here, v1, inside)
            tl.store(values + here + width // 2, v2, inside)
        own = part == newest
        largest = tl.where(own, (tl.sum(q1 * k1, 0) + tl.sum(q2 * k2, 0)) * scale, -float("inf"))
        total, y1, y2 = own.to(tl.float32), tl.where(own, v1, 0.0), tl.where(own, v2, 0.0)
        for place in range(start, end, TOKENS):
            token = place + tl.arange(0, TOKENS)
            scores = tl.sum(old1.to(tl.float32) * q1[None, :] + old2.to(tl.float32) * q2[None, :], 1)
            scores = tl.where(token < end, scores * scale, -float("inf"))
            larger = tl.maximum(largest, tl.max(scores, 0))
            shrink, share = tl.exp(largest - larger), tl.exp(scores - larger)
            total = total * shrink + tl.sum(share, 0)
            y1 = y1 * shrink + tl.sum(share[:, None] * held1.to(tl.float32), 0)
            y2 = y2 * shrink + tl.sum(share[:, None] * held2.to(tl.float32), 0)
            largest = larger
            old1, old2, held1, held2 = _held(keys, values, row, place + TOKENS, end, width, pair, TOKENS)
        size = 2 * PAIRS + 2
        mine = partial + (head * PARTS + part) * size
        tl.store(mine + pair, y1)
        tl.store(mine + PAIRS + pair, y2)
        tl.store(mine + 2 * PAIRS, largest)
        tl.store(mine + 2 * PAIRS + 1, total)
        tl.debug_barrier()  # all of this program's numbers are written before it says so
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == newest:
            tl.store(arrived + head, 0)  # for the next layer
            each = tl.arange(0, PARTS)
            there, at = each <= newest, partial + (head * PARTS + each) * size
            peaks = tl.load(at + 2 * PAIRS, there, -float("inf"), cache_modifier=".cg")
            share = tl.exp(peaks - tl.max(peaks, 0))
            total = tl.sum(share * tl.load(at + 2 * PAIRS + 1, there, 0.0, cache_modifier=".cg"), 0)
            y1 = tl.load(at[:, None] + pair[None, :], there[:, None], 0.0, cache_modifier=".cg")
            y2 = tl.load(at[:, None] + PAIRS + pair[None, :], there[:, None], 0.0, cache_modifier=".cg")
            y1 = rounded(tl.sum(share[:, None] * y1, 0) / total, out)
            y2 = rounded(tl.sum(share[:, None] * y2, 0) / total, out)
            logits = qkv + (heads + 2 * groups) * width
            if GATE == "headwise":
                open_ = rounded(tl.sigmoid(tl.load(logits + head).to(tl.float32)), out)
                y1, y2 = y1 * open_, y2 * open_
            if GATE == "elementwise":
                open1, open2 = _halves(logits + head * width, width, pair)
                y1, y2 = y1 * rounded(tl.sigmoid(open1), out), y2 * rounded(tl.sigmoid(open2), out)
            tl.store(out + head * width + pair, y1, inside)
            tl.store(out + head * width + width // 2 + pair, y2, inside)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor,
    norms: tuple[Tensor, Tensor] | None, eps: float, heads: int, gate: str, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of one token over the cache, which gets its key and value.

    The position and the tokens before it have to be there before this step's `embed`.

    Args:
        qkv: queries [H, D], keys [K, D], values [K, D] and logits of the gate, [H, D] or [H] if any, as one flat row.
        keys, values: the cache, [1, K, capacity, D]. position: int64 [1], on the device.
        cos, sin: [positions, D/2]. norms: weights [D] of the QK-norm of queries and keys. gate: "plain" (none),
            "headwise" or "elementwise".
        arrived: int32 [H], zeros, and zeros again afterwards: how many parts of each head are done.

    Returns:
        [H * D], the input of W_O.
    """
    _, groups, capacity, width = keys.shape
    pairs, blocks = triton.next_power_of_2(width // 2), triton.cdiv(capacity, TOKENS)
    span = TOKENS * triton.next_power_of_2(triton.cdiv(blocks, MOST_PARTS))
    parts = triton.cdiv(capacity, span)
    sizes = {"PAIRS": pairs, "TOKENS": TOKENS, "SPAN": span, "PARTS": triton.next_power_of_2(parts)}
    out = qkv.new_empty(heads * width)
    partial = torch.empty(heads * sizes["PARTS"] * (2 * pairs + 2), dtype=torch.float32, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    _attend[(heads, parts)](
        qkv, q_norm, k_norm, cos, sin, position, keys, values, partial, arrived, out, eps, width**-0.5, heads, groups,
        width, capacity, NORM=norms is not None, GATE=gate, **sizes, **launch(qkv, WARPS),
    )  # fmt: skip
    return out
