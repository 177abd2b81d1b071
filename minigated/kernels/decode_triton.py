"""One token of one sequence: a decoder layer as five Triton kernels, one before all layers and one after (chapter 9).

With a single token every product is a matrix times a vector: each weight is read once and used once, so reading the
weights is what a step cannot be faster than. Small kernels that wait for each other are what it spends beyond that.
So norms are worked out again by every program that needs them, sums are added where they are made, and between two
products lies nothing but the attention itself, which is in `minigated.kernels.attend_triton`. Roundings are those of
the plain form, after every step of it; sums run in another order.
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
COUNTS = ["rows", "rows_1", "rows_2", "rows_3", "rows_4", "blocks"]  # of which a 1 shall be no kernel of its own
EARLY = True  # start a kernel's programs before the one before it is done, where the GPU can
WORDS = 1024  # logits that a program compares


@triton.jit
def rounded(x, like):
    """To the dtype of a pointer's elements and back to float32: what the plain form would have written."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def let_next(EARLY: tl.constexpr):
    """The next kernel's programs may take their places. They read weights, or the cache, then wait as this one does."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
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
    value = rounded(value * tl.rsqrt(tl.sum(value * value, 0) / width + eps), x)
    return rounded(value * scale.to(tl.float32), x)


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
    let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    weight, start, rows, row = _place(block, first, second, third, fourth, rows_1, rows_2, rows_3, rows_4, ROWS)
    tile = _read(weight, row, rows, width, channel)
    wait_for_last(EARLY)
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
    let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    row = block * ROWS + tl.arange(0, ROWS)
    gates, ups = _read(gate, row, rows, width, channel), _read(up, row, rows, width, channel)
    wait_for_last(EARLY)
    vector = _normed(x, norm, eps, width, channel)
    for _ in range(block, blocks, tl.num_programs(0)):
        ahead = row + tl.num_programs(0) * ROWS
        gates_, ups_ = _read(gate, ahead, rows, width, channel), _read(up, ahead, rows, width, channel)
        opened, value = rounded(_product(gates, vector), x), rounded(_product(ups, vector), x)
        tl.store(out + row, rounded(opened * tl.sigmoid(opened), x) * value, row < rows)
        gates, ups, row = gates_, ups_, ahead


@triton.jit(do_not_specialize=COUNTS)
def _add(x, y, weight, rows, width, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr):
    """x + weight y, in place: every program reads and writes its own rows of x."""
    let_next(EARLY)
    block, channel = tl.program_id(0), tl.arange(0, WIDTH)
    row = block * ROWS + tl.arange(0, ROWS)
    tile = _read(weight, row, rows, width, channel)
    wait_for_last(EARLY)
    vector = tl.load(y + channel, channel < width, 0.0).to(tl.float32)
    for _ in range(block, blocks, tl.num_programs(0)):
        ahead = row + tl.num_programs(0) * ROWS
        following = _read(weight, ahead, rows, width, channel)
        before = tl.load(x + row, row < rows, 0.0).to(tl.float32)
        tl.store(x + row, before + rounded(_product(tile, vector), x), row < rows)
        tile, row = following, ahead


@triton.jit
def _embed(table, tokens, arrived, out, width, heads, WIDTH: tl.constexpr, HEADS: tl.constexpr, EARLY: tl.constexpr):
    """The row of a token, of the first one where it is -1; and nobody has arrived yet."""
    let_next(EARLY)
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
    let_next(EARLY)
    wait_for_last(EARLY)
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
    return min(blocks, most), {"blocks": blocks, "ROWS": height, "WIDTH": wide, **launch(like, warps)}


def launch(like: Tensor, warps: int) -> dict:
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
    options = launch(table, 4)
    options.pop("launch_pdl", None)
    _embed[(1,)](table, tokens, arrived, x, width, heads, **sizes, **options)
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
    _choose[(parts,)](logits, tokens, position, peaks, places, arrived, words, **sizes, **launch(logits, 4))


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
