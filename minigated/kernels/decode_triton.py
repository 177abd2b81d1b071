"""One token of one sequence through a decoder layer as five Triton kernels (chapter 9).

With a single token every product is a matrix times a vector: each weight is read once and used once, so reading the
weights is what a step cannot be faster than. Small kernels that wait for each other are what it spends beyond that.
So norms are worked out again by every program that needs them, sums are added where they are made, and between two
products lies nothing but the attention itself. Roundings are those of the plain form: after every step of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # weights that a program holds at once
TOKENS = 64  # of the cache that a program reads at once
PARTS = 64  # of the cache at most, each with a program for every head


@triton.jit
def _rounded(x, like):
    """To the dtype of a pointer's elements and back to float32: what the plain form would have written."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _normed(x, weight, eps, width, channel):
    """RMSNorm of a vector, float32: `minigated.layers.RMSNorm`."""
    inside = channel < width
    value, scale = tl.load(x + channel, inside, 0.0).to(tl.float32), tl.load(weight + channel, inside, 0.0)
    value = _rounded(value * tl.rsqrt(tl.sum(value * value, 0) / width + eps), x)
    return _rounded(value * scale.to(tl.float32), x)


@triton.jit
def _read(weight, row, rows, width, channel):
    """Some rows of a matrix [rows, width]. Programs read them first, so that they come while the rest is made."""
    at = weight + row.to(tl.int64)[:, None] * width + channel[None, :]
    return tl.load(at, (row < rows)[:, None] & (channel < width)[None, :], 0.0)


@triton.jit
def _product(tile, vector):
    """Rows times a vector, float32."""
    return tl.sum(tile.to(tl.float32) * vector[None, :], 1)


@triton.jit
def _project(
    x, norm, first, second, third, fourth, out, rows_1, rows_2, rows_3, rows_4, eps, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Up to four matrices times the normed vector, one after the other in `out`."""
    block, weight, rows, start = tl.program_id(0), first, rows_1, 0
    if block >= tl.cdiv(rows, ROWS):
        block, weight, rows, start = block - tl.cdiv(rows, ROWS), second, rows_2, rows_1
        if block >= tl.cdiv(rows, ROWS):
            block, weight, rows, start = block - tl.cdiv(rows, ROWS), third, rows_3, rows_1 + rows_2
            if block >= tl.cdiv(rows, ROWS):
                block, weight, rows, start = block - tl.cdiv(rows, ROWS), fourth, rows_4, rows_1 + rows_2 + rows_3
    channel, row = tl.arange(0, WIDTH), block * ROWS + tl.arange(0, ROWS)
    tile = _read(weight, row, rows, width, channel)
    found = _product(tile, _normed(x, norm, eps, width, channel))
    tl.store(out + start + row, found, row < rows)


@triton.jit
def _gate_and_up(x, norm, gate, up, out, rows, eps, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """SiLU(gate x) * up x of the normed vector."""
    channel, row = tl.arange(0, WIDTH), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gates, ups = _read(gate, row, rows, width, channel), _read(up, row, rows, width, channel)
    vector = _normed(x, norm, eps, width, channel)
    opened, value = _rounded(_product(gates, vector), x), _rounded(_product(ups, vector), x)
    tl.store(out + row, _rounded(opened * tl.sigmoid(opened), x) * value, row < rows)


@triton.jit
def _add(x, y, weight, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x + weight y, in place: every program reads and writes its own rows of x."""
    channel, row = tl.arange(0, WIDTH), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile, before = _read(weight, row, rows, width, channel), tl.load(x + row, row < rows, 0.0).to(tl.float32)
    found = _rounded(_product(tile, tl.load(y + channel, channel < width, 0.0).to(tl.float32)), x)
    tl.store(x + row, before + found, row < rows)


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
        a, b = _rounded(_rounded(a * scale, like) * first, like), _rounded(_rounded(b * scale, like) * second, like)
    return _rounded(a * cos - b * sin, like), _rounded(b * cos + a * sin, like)


@triton.jit
def _attend(
    qkv, q_norm, k_norm, cos, sin, position, keys, values, partial, arrived, out, eps, scale, heads, groups, width,
    capacity, NORM: tl.constexpr, GATE: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, SPAN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One query head over a part of the cache; the last part to arrive puts them together and gates the sum.

    The part in which the new token stands writes its key and value. A part leaves behind, in float32, its weighted sum
    of values in halves, its largest score and its sum of weights: 2 PAIRS + 2 numbers.
    """
    head, part, pair = tl.program_id(0), tl.program_id(1), tl.arange(0, PAIRS)
    now = tl.load(position)
    newest = (now // SPAN).to(tl.int32)
    if part <= newest:
        group, inside = head // (heads // groups), pair < width // 2
        q1, q2 = _halves(qkv + head * width, width, pair)
        k1, k2 = _halves(qkv + (heads + group) * width, width, pair)
        v1, v2 = _halves(qkv + (heads + groups + group) * width, width, pair)
        turn = now * (width // 2) + pair
        c, s = tl.load(cos + turn, inside, 0.0), tl.load(sin + turn, inside, 0.0)
        q1, q2 = _turned(q1, q2, q_norm, c, s, eps, width, pair, qkv, NORM)
        k1, k2 = _turned(k1, k2, k_norm, c, s, eps, width, pair, qkv, NORM)
        row = group.to(tl.int64) * capacity * width
        if (part == newest) & (head % (heads // groups) == 0):  # one head of a group; the others have it at hand
            here = row + now * width + pair
            tl.store(keys + here, k1, inside)
            tl.store(keys + here + width // 2, k2, inside)
            tl.store(values + here, v1, inside)
            tl.store(values + here + width // 2, v2, inside)
        own = part == newest
        largest = tl.where(own, (tl.sum(q1 * k1, 0) + tl.sum(q2 * k2, 0)) * scale, -float("inf"))
        total, y1, y2 = own.to(tl.float32), tl.where(own, v1, 0.0), tl.where(own, v2, 0.0)
        for start in range(part * SPAN, tl.minimum(now, (part + 1) * SPAN), TOKENS):
            token = start + tl.arange(0, TOKENS)
            past = (token < now)[:, None] & inside[None, :]
            at = row + token[:, None] * width + pair[None, :]
            old1, old2 = tl.load(keys + at, past, 0.0), tl.load(keys + at + width // 2, past, 0.0)
            held1, held2 = tl.load(values + at, past, 0.0), tl.load(values + at + width // 2, past, 0.0)
            scores = tl.sum(old1.to(tl.float32) * q1[None, :] + old2.to(tl.float32) * q2[None, :], 1)
            scores = tl.where(token < now, scores * scale, -float("inf"))
            larger = tl.maximum(largest, tl.max(scores, 0))
            shrink, share = tl.exp(largest - larger), tl.exp(scores - larger)
            total = total * shrink + tl.sum(share, 0)
            y1 = y1 * shrink + tl.sum(share[:, None] * held1.to(tl.float32), 0)
            y2 = y2 * shrink + tl.sum(share[:, None] * held2.to(tl.float32), 0)
            largest = larger
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
            y1 = _rounded(tl.sum(share[:, None] * y1, 0) / total, out)
            y2 = _rounded(tl.sum(share[:, None] * y2, 0) / total, out)
            scores = qkv + (heads + 2 * groups) * width
            if GATE == "headwise":
                open_ = _rounded(tl.sigmoid(tl.load(scores + head).to(tl.float32)), out)
                y1, y2 = y1 * open_, y2 * open_
            if GATE == "elementwise":
                open1, open2 = _halves(scores + head * width, width, pair)
                y1, y2 = y1 * _rounded(tl.sigmoid(open1), out), y2 * _rounded(tl.sigmoid(open2), out)
            tl.store(out + head * width + pair, y1, inside)
            tl.store(out + head * width + width // 2 + pair, y2, inside)


# ---------------------------------------------------------------------------------------------- launching
def _blocks(width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE // wide), "WIDTH": wide}


def project(x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> Tensor:
    """One to four matrices [N_i, C] times RMSNorm(x), x [C]; their results one after the other, [sum N_i]."""
    rows = [w.shape[0] for w in weights] + [0] * (4 - len(weights))
    given, sizes = [*weights, *(weights[:1] * (4 - len(weights)))], _blocks(x.shape[0])
    out = x.new_empty(sum(rows))
    grid = (sum(triton.cdiv(n, sizes["ROWS"]) for n in rows),)
    _project[grid](x, norm, *given, out, *rows, eps, x.shape[0], **sizes)
    return out


def gate_and_up(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate u) * up u with u = RMSNorm(x); x [C], matrices [F, C] -> [F]."""
    out, sizes = x.new_empty(gate.shape[0]), _blocks(x.shape[0])
    grid = (triton.cdiv(out.shape[0], sizes["ROWS"]),)
    _gate_and_up[grid](x, norm, gate, up, out, *out.shape, eps, *x.shape, **sizes)
    return out


def add(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x += weight y in place; x [C], y [N], weight [C, N]."""
    sizes = _blocks(y.shape[0])
    _add[(triton.cdiv(x.shape[0], sizes["ROWS"]),)](x, y, weight, *x.shape, *y.shape, **sizes)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor,
    norms: tuple[Tensor, Tensor] | None, eps: float, heads: int, gate: str, arrived: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of one token over the cache, which gets its key and value.

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
    span = TOKENS * triton.next_power_of_2(triton.cdiv(blocks, PARTS))
    parts = triton.cdiv(capacity, span)
    sizes = {"PAIRS": pairs, "TOKENS": TOKENS, "SPAN": span, "PARTS": triton.next_power_of_2(parts)}
    out = qkv.new_empty(heads * width)
    partial = torch.empty(heads * sizes["PARTS"] * (2 * pairs + 2), dtype=torch.float32, device=qkv.device)
    q_norm, k_norm = norms or (qkv, qkv)
    _attend[(heads, parts)](
        qkv, q_norm, k_norm, cos, sin, position, keys, values, partial, arrived, out, eps, width**-0.5, heads, groups,
        width, capacity, NORM=norms is not None, GATE=gate, **sizes,
    )  # fmt: skip
    return out
