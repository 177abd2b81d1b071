"""One token of one sequence: a decoder layer as five Triton kernels, one before all layers and one after (chapter 9).

With a single token every product is a matrix times a vector: each weight is read once and used once, so reading the
weights is what a step cannot be faster than. Small kernels that wait for each other are what it spends beyond that.
So norms are worked out again by every program that needs them, sums are added where they are made, and between two
products lies nothing but the attention itself. Roundings are those of the plain form, after every step of it; sums run
in another order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a product whose matrices have few or `MANY` weights (`gate_and_up`: one of its two): weights of a block of rows, at
# least one row; warps of a program; programs on each processor of the GPU. A program holds this block and the next.
# Found by trying, with models of 350 M and 1.7 B on an H200.
SHAPES = {
    "project": {False: (8192, 4, 4), True: (16384, 8, 2)},
    "gate_and_up": {False: (2048, 2, 8), True: (4096, 4, 4)},
    "add": {False: (8192, 8, 4), True: (16384, 8, 2)},
}
MANY = 1 << 22
ATTEND_WARPS = 4
COUNTS = ["rows", "rows_1", "rows_2", "rows_3", "rows_4", "blocks"]  # of which a 1 shall be no kernel of its own
EARLY = True  # start a kernel's programs before the one before it is done, where the GPU can
TOKENS = 64  # of the cache that a program reads at once
WORDS = 1024  # logits that a program compares
MOST_PARTS = 64  # of the cache, each with a program for every head


@triton.jit
def _rounded(x, like):
    """To the dtype of a pointer's elements and back to float32: what the plain form would have written."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _let_next(EARLY: tl.constexpr):
    """The next kernel's programs may take their places. They read weights, or the cache, then wait as this one does."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_last(EARLY: tl.constexpr):
    """Until the kernel before has written everything. What another one of this step writes is not touched before.

    `embed` keeps steps apart, so what a step before wrote may be read at once: the position, older tokens of the cache.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()


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
def _place(block, first, second, third, fourth, rows_1, rows_2, rows_3, rows_4, ROWS: tl.constexpr):
    """Of up to four matrices in a row, that of a block: itself, its first result, how many it has, the block's rows."""
    weight, start, rows, inner = first, 0, rows_1, block
    if inner >= tl.cdiv(rows, ROWS):
        inner -= tl.cdiv(rows, ROWS)
        weight, start, rows = second, rows_1, rows_2
        if inner >= tl.cdiv(rows, ROWS):
            inner -= tl.cdiv(rows, ROWS)
            weight, start, rows = third, rows_1 + rows_2, rows_3
            if inner >= tl.cdiv(rows, ROWS):
                inner -= tl.cdiv(rows, ROWS)
                weight, start, rows = fourth, rows_1 + rows_2 + rows_3, rows_4
    return weight, start, rows, inner * ROWS + tl.arange(0, ROWS)


@triton.jit(do_not_specialize=COUNTS)
def _project(
    x, norm, first, second, third, fourth, out, rows_1, rows_2, rows_3, rows_4, eps, width, blocks,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Up to four matrices times the normed vector, one after the other in `out`."""
    _let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    weight, start, rows, row = _place(block, first, second, third, fourth, rows_1, rows_2, rows_3, rows_4, ROWS)
    tile = _read(weight, row, rows, width, channel)
    _wait_for_last(EARLY)
    vector = _normed(x, norm, eps, width, channel)
    for this in range(block, blocks, tl.num_programs(0)):
        ahead = this + tl.num_programs(0)
        weight, start_, rows_, row_ = _place(ahead, first, second, third, fourth, rows_1, rows_2, rows_3, rows_4, ROWS)
        following = _read(weight, row_, rows_, width, channel)
        tl.store(out + start + row, _product(tile, vector), row < rows)
        tile, start, rows, row = following, start_, rows_, row_


@triton.jit(do_not_specialize=COUNTS)
def _gate_and_up(
    x, norm, gate, up, out, rows, eps, width, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
):
    """SiLU(gate x) * up x of the normed vector."""
    _let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    row = block * ROWS + tl.arange(0, ROWS)
    gates, ups = _read(gate, row, rows, width, channel), _read(up, row, rows, width, channel)
    _wait_for_last(EARLY)
    vector = _normed(x, norm, eps, width, channel)
    for _ in range(block, blocks, tl.num_programs(0)):
        ahead = row + tl.num_programs(0) * ROWS
        gates_, ups_ = _read(gate, ahead, rows, width, channel), _read(up, ahead, rows, width, channel)
        opened, value = _rounded(_product(gates, vector), x), _rounded(_product(ups, vector), x)
        tl.store(out + row, _rounded(opened * tl.sigmoid(opened), x) * value, row < rows)
        gates, ups, row = gates_, ups_, ahead


@triton.jit(do_not_specialize=COUNTS)
def _add(x, y, weight, rows, width, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """x + weight y, in place: every program reads and writes its own rows of x."""
    _let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    row = block * ROWS + tl.arange(0, ROWS)
    tile = _read(weight, row, rows, width, channel)
    _wait_for_last(EARLY)
    vector = tl.load(y + channel, channel < width, 0.0).to(tl.float32)
    for _ in range(block, blocks, tl.num_programs(0)):
        ahead = row + tl.num_programs(0) * ROWS
        following = _read(weight, ahead, rows, width, channel)
        before = tl.load(x + row, row < rows, 0.0).to(tl.float32)
        tl.store(x + row, before + _rounded(_product(tile, vector), x), row < rows)
        tile, row = following, ahead


@triton.jit
def _embed(table, tokens, arrived, out, width, heads, WIDTH: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr):
    """The row of a token, of the first one where it is -1; and nobody has arrived yet."""
    _let_next(EARLY)
    channel, head = tl.arange(0, WIDTH), tl.arange(0, HEADS)
    row = tl.maximum(tl.load(tokens), 0)
    tl.store(out + channel, tl.load(table + row * width + channel, channel < width, 0.0), channel < width)
    tl.store(arrived + head, tl.zeros_like(head), head < heads)


@triton.jit
def _choose(
    logits, tokens, position, peaks, places, arrived, words, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The first of the largest logits, -1 where that is not finite; the last part to arrive writes it and moves on."""
    _let_next(EARLY)
    _wait_for_last(EARLY)
    part = tl.program_id(0)
    word = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + word, word < words, -float("inf")).to(tl.float32)
    value = tl.where(value != value, float("inf"), value)  # NaN leaves no choice either
    peak = tl.max(value, 0)
    tl.store(peaks + part, peak)
    tl.store(places + part, tl.min(tl.where(value == peak, word, words), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)  # for the next step
        each = tl.arange(0, BLOCKS)
        found = tl.load(peaks + each, each < tl.num_programs(0), -float("inf"), cache_modifier=".cg")
        place = tl.load(places + each, each < tl.num_programs(0), words, cache_modifier=".cg")
        largest = tl.max(found, 0)
        first = tl.min(tl.where(found == largest, place, words), 0)
        tl.store(tokens, tl.where(tl.abs(largest) < float("inf"), first, -1).to(tl.int64))
        tl.store(position, tl.load(position) + 1)


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
    _let_next(EARLY)
    head, part, pair = tl.program_id(0), tl.program_id(1), tl.arange(0, PAIRS)
    now = tl.load(position)  # it, the tables and the tokens so far were there before this step began
    newest = (now // SPAN).to(tl.int32)
    group, inside = head // (heads // groups), pair < width // 2
    row, turn = group.to(tl.int64) * capacity * width, now * (width // 2) + pair
    c, s = tl.load(cos + turn, inside, 0.0), tl.load(sin + turn, inside, 0.0)
    start, end = part * SPAN, tl.minimum(now, (part + 1) * SPAN)
    old1, old2, held1, held2 = _held(keys, values, row, start, end, width, pair, TOKENS)
    _wait_for_last(EARLY)
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
            y1 = _rounded(tl.sum(share[:, None] * y1, 0) / total, out)
            y2 = _rounded(tl.sum(share[:, None] * y2, 0) / total, out)
            logits = qkv + (heads + 2 * groups) * width
            if GATE == "headwise":
                open_ = _rounded(tl.sigmoid(tl.load(logits + head).to(tl.float32)), out)
                y1, y2 = y1 * open_, y2 * open_
            if GATE == "elementwise":
                open1, open2 = _halves(logits + head * width, width, pair)
                y1, y2 = y1 * _rounded(tl.sigmoid(open1), out), y2 * _rounded(tl.sigmoid(open2), out)
            tl.store(out + head * width + pair, y1, inside)
            tl.store(out + head * width + width // 2 + pair, y2, inside)


# ---------------------------------------------------------------------------------------------- launching
def _options(kernel: str, rows: list[int], width: int, like: Tensor) -> tuple[int, dict]:
    """Programs of a product with matrices of `rows` rows that are `width` long, and the launch's options.

    Each program goes through several blocks of rows: what they are multiplied by is read and normed once.
    """
    tile, warps, together = SHAPES[kernel][sum(rows) * width >= MANY]
    wide = triton.next_power_of_2(width)
    height = max(1, tile // wide)
    blocks = sum(triton.cdiv(n, height) for n in rows)
    most = together * (torch.cuda.get_device_properties(like.device).multi_processor_count if like.is_cuda else 1)
    return min(blocks, most), {"blocks": blocks, "ROWS": height, "WIDTH": wide, **_launch(like, warps)}


def _launch(like: Tensor, warps: int) -> dict:
    """Options of a launch. Programmatic dependent launch needs compute capability 9.0 and a Triton that knows it."""
    early = EARLY and like.is_cuda and torch.version.hip is None and hasattr(tl.extra.cuda, "gdc_wait")
    early = early and torch.cuda.get_device_capability(like.device) >= (9, 0)
    return {"EARLY": early, "num_warps": warps, **({"launch_pdl": True} if early else {})}


def embed(table: Tensor, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """x [C], a copy of the token's row of `table` [V, C]; and zeros, int32 [heads], for `attend`.

    Alone of all it starts only when everything before it is done, so that no kernel is ever early by a whole step.
    """
    width = table.shape[1]
    x, arrived = table.new_empty(width), torch.empty(heads, dtype=torch.int32, device=table.device)
    sizes = {"WIDTH": triton.next_power_of_2(width), "HEADS": triton.next_power_of_2(heads)}
    launch = _launch(table, 4)
    launch.pop("launch_pdl", None)
    _embed[(1,)](table, tokens, arrived, x, width, heads, **sizes, **launch)
    return x, arrived


def choose(logits: Tensor, tokens: Tensor, position: Tensor, arrived: Tensor) -> None:
    """Writes `minigated.static_cache.likeliest` of logits [1, V] to tokens [1], and adds 1 to position [1].

    Args:
        arrived: int32, zeros before and afterwards; the first is used.
    """
    words = logits.shape[-1]
    parts = triton.cdiv(words, WORDS)
    peaks = torch.empty(parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(parts, dtype=torch.int32, device=logits.device)
    sizes = {"BLOCK": WORDS, "BLOCKS": triton.next_power_of_2(parts)}
    _choose[(parts,)](logits, tokens, position, peaks, places, arrived, words, **sizes, **_launch(logits, 4))


def project(x: Tensor, norm: Tensor, eps: float, *weights: Tensor) -> Tensor:
    """One to four matrices [N_i, C] times RMSNorm(x), x [C]; their results one after the other, [sum N_i]."""
    rows = [w.shape[0] for w in weights] + [0] * (4 - len(weights))
    given, out = [*weights, *(weights[:1] * (4 - len(weights)))], x.new_empty(sum(rows))
    programs, options = _options("project", rows, *x.shape, x)
    _project[(programs,)](x, norm, *given, out, *rows, eps, *x.shape, **options)
    return out


def gate_and_up(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate u) * up u with u = RMSNorm(x); x [C], matrices [F, C] -> [F]."""
    out = x.new_empty(gate.shape[0])
    programs, options = _options("gate_and_up", [*out.shape], *x.shape, x)
    _gate_and_up[(programs,)](x, norm, gate, up, out, *out.shape, eps, *x.shape, **options)
    return out


def add(x: Tensor, y: Tensor, weight: Tensor) -> None:
    """x += weight y in place; x [C], y [N], weight [C, N]."""
    programs, options = _options("add", [*x.shape], *y.shape, x)
    _add[(programs,)](x, y, weight, *x.shape, *y.shape, **options)


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
        width, capacity, NORM=norms is not None, GATE=gate, **sizes, **_launch(qkv, ATTEND_WARPS),
    )  # fmt: skip
    return out
