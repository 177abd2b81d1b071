"""Chapter 3: decay rates, masks, rotation, and every form of retention against its equation.

References are loops over cells or steps written from the equations; each comparison has twins with a planted bug that
must fail. The same tests run on a GPU where there is one (`device` in conftest.py).
"""

import math
import shutil

import pytest
import torch
from torch.testing import assert_close

from minigated.decay import (
    decay_after_softmax,
    decay_mask,
    distances,
    manhattan_decomposed,
    manhattan_full,
    manhattan_loops,
    manhattan_mask,
    retention_parallel,
    retention_recurrent,
    retnet_log_decay,
    rmt_log_decay,
    rotate,
    rotation_table,
)
from minigated.decay_passes import axis_pass, decomposed_fast, full_fast
from minigated.errors import InputError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-2}
BATCH, HEADS, WIDTH = 2, 2, 4
HEIGHT, ACROSS = 3, 5  # a map that is not square shows sides that are mixed up
RATES = rmt_log_decay(HEADS, initial=1.0, dtype=torch.float64)  # gamma 0.5 and 0.875: a reversed order shows


def draw(*shape, seed=0, dtype=torch.float64, device="cpu"):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(device, dtype)


def maps(height=HEIGHT, width=ACROSS, dtype=torch.float64, device="cpu", batch=BATCH):
    """q, k, v and an upstream gradient, [B, h, w, H, D] each."""
    return [draw(batch, height, width, HEADS, WIDTH, seed=s, dtype=dtype, device=device) for s in range(4)]


def lines(steps=7, dtype=torch.float64, device="cpu"):
    """q, k, v and an upstream gradient, [B, H, T, D] each."""
    return [draw(BATCH, HEADS, steps, WIDTH, seed=s, dtype=dtype, device=device) for s in range(4)]


def assert_equals(form, reference, inputs, upstream):
    """Output and the three gradients of `form`, against those of `reference` in float64 on the same numbers."""
    own = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    output, wanted = form(*own), reference(*exact)
    assert output.dtype == upstream.dtype and output.shape == wanted.shape
    output.backward(upstream)
    wanted.backward(upstream.double())
    for found, right in [(output, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact)]:
        assert_close(found.double(), right, rtol=0, atol=TOLERANCE[upstream.dtype])


# ---------------------------------------------------------------------------------------------- rates
PRINTED = {  # (heads, initial, span): the rates of RMT's released sizes, to four digits
    (4, 2, 4): [0.75, 0.875, 0.9375, 0.96875],
    (8, 2, 6): [0.75, 0.8513, 0.9116, 0.9474, 0.9688, 0.9814, 0.9890, 0.9934],
    (5, 2, 5): [0.75, 0.875, 0.9375, 0.9688, 0.9844],
    (7, 2, 6): [0.75, 0.862, 0.9238, 0.9579, 0.9768, 0.9872, 0.9929],
}
WRONG_RATES = {
    "divided by heads - 1": lambda n, a, s: torch.log(1 - 2.0 ** -(a + s * torch.arange(n) / (n - 1))),
    "RetNet's": lambda n, a, s: torch.log(1 - 2.0 ** -(5.0 + torch.arange(n))),
    "powers of e": lambda n, a, s: torch.log(1 - torch.exp(-(a + s * torch.arange(n) / n))),
    "counted from 1": lambda n, a, s: torch.log(1 - 2.0 ** -(a + s * torch.arange(1, n + 1) / n)),
    "reversed": lambda n, a, s: rmt_log_decay(n, a, s).flip(0),
    "logarithm to base 2": lambda n, a, s: torch.log2(1 - 2.0 ** -(a + s * torch.arange(n) / n)),
}


def agrees_with_the_printed_rates(rates) -> bool:
    return all((rates(*sizes).exp() - torch.tensor(gammas)).abs().max() < 6e-5 for sizes, gammas in PRINTED.items())


def test_rates_are_those_of_the_released_sizes():
    assert agrees_with_the_printed_rates(rmt_log_decay)


@pytest.mark.parametrize("wrong", WRONG_RATES.values(), ids=WRONG_RATES)
def test_wrong_rates_are_seen(wrong):
    assert not agrees_with_the_printed_rates(wrong)


def test_rates_are_worked_out_in_float64():
    exact = torch.tensor([math.log1p(-(2.0 ** -(2 + 50 * h / 3))) for h in range(3)], dtype=torch.float64)
    assert torch.equal(rmt_log_decay(3, span=50.0), exact.float())
    assert_close(rmt_log_decay(3, span=50.0, dtype=torch.float64), exact, rtol=1e-14, atol=0)
    assert torch.log(1 - torch.exp2(-2 - 50 * torch.arange(3) / 3))[2] == 0  # in float32 throughout the last is 1


def test_retnet_rates():
    assert_close(retnet_log_decay(4).exp(), torch.tensor([0.96875, 0.984375, 0.9921875, 0.99609375]))
    gammas = retnet_log_decay(5, "linspace").exp()
    assert_close(gammas[[0, -1]], torch.tensor([1 - 1 / 32, 1 - 1 / 512]))
    ratios = (1 - gammas[1:]) / (1 - gammas[:-1])  # 1 - gamma falls by the same factor from head to head
    assert_close(ratios, ratios[:1].expand(4), rtol=1e-4, atol=0)
    assert_close(retnet_log_decay(1, "linspace"), retnet_log_decay(1))


# ---------------------------------------------------------------------------------------------- masks
def test_distances_by_hand():
    assert distances(3).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_manhattan_mask_by_hand():
    half = torch.tensor([0.5]).log()
    powers = manhattan_mask(half, 2, 3).exp()[0, 0]  # what the first cell of a 2 x 3 map sees
    assert_close(powers.view(2, 3), torch.tensor([[1, 0.5, 0.25], [0.5, 0.25, 0.125]]))
    assert_close(decay_mask(half, 3).exp()[0, 1], torch.tensor([0.5, 1, 0.5]))


def mask_by_loops(log_decay, height, width):
    cells = [(row, column) for row in range(height) for column in range(width)]
    apart = [[abs(a - c) + abs(b - d) for c, d in cells] for a, b in cells]
    return torch.tensor(apart, dtype=torch.float64) * log_decay[:, None, None]


def of_distance(measure):
    """A mask from a distance between (rows apart, columns apart)."""

    def mask(log_decay, height, width):
        rows, columns = distances(height).double(), distances(width).double()
        apart = measure(rows[:, None, :, None].expand(height, width, height, width), columns[None, :, None, :])
        return apart.reshape(height * width, -1) * log_decay[:, None, None]

    return mask


WRONG_MASKS = {
    "flattened index": lambda log_decay, h, w: decay_mask(log_decay, h * w),
    "sides swapped": lambda log_decay, h, w: manhattan_mask(log_decay, w, h),
    "largest of the two": of_distance(torch.maximum),
    "straight line": of_distance(torch.hypot),
    "rows only": of_distance(lambda rows, columns: rows),
    "rates reversed": lambda log_decay, h, w: manhattan_mask(log_decay.flip(0), h, w),
    "rates, not their logarithms": lambda log_decay, h, w: manhattan_mask(log_decay.exp(), h, w),
}


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1), (1, 1)])
def test_manhattan_mask_equals_loops(height, width):
    mask = manhattan_mask(RATES, height, width)
    assert_close(mask, mask_by_loops(RATES, height, width), rtol=0, atol=1e-15)
    rows, columns = decay_mask(RATES, height), decay_mask(RATES, width)  # and is the sum of the two line masks
    summed = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # [H, h, w, h, w]
    assert_close(mask.view_as(summed), summed, rtol=0, atol=1e-15)


@pytest.mark.parametrize("wrong", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_a_wrong_mask_is_seen(wrong):
    assert (wrong(RATES, 3, 5) - mask_by_loops(RATES, 3, 5)).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- rotation
def turned_by_hand(x):
    """Pairs as complex numbers, multiplied by exp(i * index * angle); x [B, h, w, H, D]."""
    _, height, width, _, channels = x.shape
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    out = torch.zeros_like(pairs)
    for row in range(height):
        for column in range(width):
            for i in range(channels // 2):
                angle = 10_000.0 ** -(i / (channels // 2 - 1)) * (row * width + column)
                factor = complex(math.cos(angle), math.sin(angle))
                out[:, row, column, :, i] = pairs[:, row, column, :, i] * factor
    return torch.view_as_real(out).flatten(-2)


def with_table(height, width, channels, index=None, angle=None):
    """The rotation table again, with another index or other frequencies."""
    index = torch.arange(height * width).view(height, width) if index is None else index
    angle = 10_000.0 ** -torch.linspace(0, 1, channels // 2, dtype=torch.float64) if angle is None else angle
    turned = index[..., None] * angle.repeat_interleave(2)
    return turned.cos(), turned.sin()


def rope_frequencies(channels):
    return 10_000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def half_split(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat((-second, first), -1) * sin.unsqueeze(-2)


def tall_index(height, width):
    return torch.arange(height)[:, None] * height + torch.arange(width)


WRONG_ROTATIONS = {
    "none": lambda x, h, w, d: x,
    "half split": lambda x, h, w, d: half_split(x, *rotation_table(h, w, d, torch.float64)),
    "backwards": lambda x, h, w, d: rotate(x, *(t * s for t, s in zip(with_table(h, w, d), (1, -1)))),
    "RoPE's frequencies": lambda x, h, w, d: rotate(x, *with_table(h, w, d, angle=rope_frequencies(d))),
    "index row * height + column": lambda x, h, w, d: rotate(x, *with_table(h, w, d, index=tall_index(h, w))),
    "index row + column": lambda x, h, w, d: rotate(
        x, *with_table(h, w, d, index=torch.arange(h)[:, None] + torch.arange(w))
    ),
    "column by column": lambda x, h, w, d: rotate(x, *with_table(h, w, d, index=torch.arange(h * w).view(w, h).T)),
}


@pytest.mark.parametrize(("height", "width"), [(7, 7), (4, 4), (5, 9)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_equals_complex_products(height, width, dtype, device):
    x = draw(2, height, width, 3, 8, dtype=dtype, device=device)
    table_dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(device) for t in rotation_table(height, width, 8, table_dtype))
    found = rotate(x, cos, sin)
    assert found.dtype == dtype and cos.shape == sin.shape == (height, width, 8)
    assert_close(found.double(), turned_by_hand(x.cpu()).to(device), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("wrong", WRONG_ROTATIONS.values(), ids=WRONG_ROTATIONS)
def test_a_wrong_rotation_is_seen(wrong):
    x = draw(1, 5, 9, 2, 8)
    assert (wrong(x, 5, 9, 8) - turned_by_hand(x)).abs().max() > 0.3


def test_rotation_of_a_line():
    x, (cos, sin) = draw(2, 6, 3, 4), rotation_table(1, 6, 4, torch.float64)
    assert_close(rotate(x, cos[0], sin[0]), turned_by_hand(x[:, None])[:, 0], rtol=0, atol=1e-12)


def products(table, height, width):
    """<q rotated at cell a, k rotated at cell b> of one q and k everywhere, [h, w, h, w]."""
    q, k = (draw(1, 1, 1, 1, 8, seed=s).expand(1, height, width, 1, 8) for s in (0, 1))
    return torch.einsum("yxd,rcd->yxrc", *(rotate(t, *table)[0, :, :, 0] for t in (q, k)))


def test_products_see_the_flattened_index():
    p = products(rotation_table(4, 5, 8, torch.float64), 4, 5)
    assert_close(p[0, 0, 0, :4], p[2, 1, 2, 1:])  # along a row: columns apart
    assert_close(p[0, 3, 1, 0], p[2, 1, 2, 3])  # a step down and three back is two to the right
    line = products(rotation_table(1, 20, 8, torch.float64), 1, 20)
    assert_close(p[:, 2, 0, 2], line[0, ::5, 0, 0])  # along a column: rows apart times the width
    wider = products(rotation_table(4, 7, 8, torch.float64), 4, 7)
    assert (wider[:, 2, 0, 2] - p[:, 2, 0, 2]).abs().max() > 0.1  # so the height pass knows the map's width


# ---------------------------------------------------------------------------------------------- retention in one line
def retention_by_loops(q, k, v):
    out = torch.zeros_like(v)
    gammas = RATES.exp().tolist()
    for h, gamma in enumerate(gammas):
        for n in range(q.shape[2]):
            for m in range(n + 1):
                score = (q[:, h, n] * k[:, h, m]).sum(-1, keepdim=True) * gamma ** (n - m)
                out[:, h, n] = out[:, h, n] + score * v[:, h, m]
    return out


def parallel(q, k, v):
    return retention_parallel(q, k, v, RATES.to(q.device))


def recurrent(q, k, v):
    return retention_recurrent(q, k, v, RATES.to(q.device))[0]


def in_chunks(q, k, v):
    state, outputs = None, []
    for part in (slice(0, 2), slice(2, 3), slice(3, None)):
        out, state = retention_recurrent(q[:, :, part], k[:, :, part], v[:, :, part], RATES.to(q.device), state)
        outputs.append(out)
    return torch.cat(outputs, 2)


def state_forgotten(q, k, v):
    parts = [retention_recurrent(q[:, :, p], k[:, :, p], v[:, :, p], RATES)[0] for p in (slice(0, 3), slice(3, None))]
    return torch.cat(parts, 2)


def decayed_too_late(q, k, v):
    state, outputs, gamma = 0, [], RATES.exp()[:, None, None]
    for n in range(q.shape[2]):
        state = gamma * (state + k[:, :, n, :, None] * v[:, :, n, None, :])  # the newest step fades too
        outputs.append((q[:, :, n, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2)


def with_decay(change):
    return lambda q, k, v: (q @ k.mT * change(decay_mask(RATES, q.shape[2]).exp())) @ v


WRONG_RETENTIONS = {
    "not causal": with_decay(lambda decay: decay),
    "looks ahead": with_decay(lambda decay: decay.triu()),
    "itself left out": with_decay(lambda decay: decay.tril(-1)),
    "heads reversed": with_decay(lambda decay: decay.flip(0).tril()),
    "no decay": with_decay(lambda decay: torch.ones_like(decay).tril()),
    "a softmax": lambda q, k, v: torch.softmax((q @ k.mT + decay_mask(RATES, 7)).masked_fill(
        torch.ones(7, 7).triu(1).bool(), -torch.inf), -1) @ v,
    "scaled": lambda q, k, v: parallel(q / 2, k, v),
    "state forgotten between chunks": state_forgotten,
    "decayed too late": decayed_too_late,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [parallel, recurrent, in_chunks])
def test_retention_equals_loops(form, dtype, device):
    *qkv, upstream = lines(dtype=dtype, device=device)
    scaled = [t * s for t, s in zip(qkv, (0.5, 0.5, 1.0))]
    assert_equals(form, retention_by_loops, scaled, upstream)


@pytest.mark.parametrize("wrong", WRONG_RETENTIONS.values(), ids=WRONG_RETENTIONS)
def test_a_wrong_retention_is_seen(wrong):
    *qkv, _ = lines()
    assert (wrong(*qkv) - retention_by_loops(*qkv)).abs().max() > 0.1


def test_the_state_is_what_the_past_has_left():
    q, k, v, _ = lines()
    _, state = retention_recurrent(q, k, v, RATES)
    fade = RATES.exp()[:, None] ** torch.arange(6, -1, -1)  # [H, T]
    assert_close(state, torch.einsum("bhtd,ht,bhte->bhde", k, fade, v), rtol=0, atol=1e-12)


def test_slow_heads_still_fade_in_bfloat16():
    slow = torch.tensor([1 - 2.0**-9]).log()
    assert slow.exp().bfloat16() == 1  # what a state in bfloat16 would multiply by
    ones = torch.ones(1, 1, 200, 1, dtype=torch.bfloat16)
    out, state = retention_recurrent(ones, ones, ones, slow)
    exact = (1 - (1 - 2.0**-9) ** 200) / 2.0**-9  # the geometric sum, about 166 and not 200
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert float(state) == pytest.approx(exact, rel=1e-4)
    assert float(retention_parallel(ones, ones, ones, slow)[0, 0, -1]) == pytest.approx(exact, rel=0.01)


# ---------------------------------------------------------------------------------------------- RMT's full form
FULL_MASK = manhattan_mask(RATES, HEIGHT, ACROSS)


def loops(q, k, v):
    one = lambda b, h: manhattan_loops(*(t[b, :, :, h] for t in (q, k, v)), RATES[h])
    return torch.stack([torch.stack([one(b, h) for h in range(HEADS)], 2) for b in range(len(q))])


def mask_for(q, mask=FULL_MASK):
    return mask.to(q.device, torch.promote_types(q.dtype, torch.float32))


def full_by_einsum(scale=WIDTH**-0.5, mask=FULL_MASK, weigh=lambda s, mask: torch.softmax(s + mask, -1)):
    def form(q, k, v):
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        weights = weigh(q @ k.mT * scale, mask.to(q.dtype))
        return (weights @ v).transpose(1, 2).unflatten(1, (HEIGHT, ACROSS))

    return form


FULL_FORMS = {
    "reference": lambda q, k, v: manhattan_full(q, k, v, mask_for(q)),
    "fast": lambda q, k, v: full_fast(q, k, v, mask_for(q)),
    "after the softmax, renormalised": lambda q, k, v: decay_after_softmax(q, k, v, mask_for(q), True),
}
WRONG_FULL = {
    "not renormalised": lambda q, k, v: decay_after_softmax(q, k, v, mask_for(q), False),
    "no scale": full_by_einsum(scale=1.0),
    "scaled twice": full_by_einsum(scale=1 / WIDTH),
    "decay on the flattened index": full_by_einsum(mask=decay_mask(RATES, HEIGHT * ACROSS)),
    "sides swapped": full_by_einsum(mask=manhattan_mask(RATES, ACROSS, HEIGHT)),
    "rates reversed": full_by_einsum(mask=FULL_MASK.flip(0)),
    "decay added, not its logarithm": full_by_einsum(mask=FULL_MASK.exp()),
    "decay multiplies the logits": full_by_einsum(weigh=lambda s, mask: torch.softmax(s * mask.exp(), -1)),
    "softmax over the queries": full_by_einsum(weigh=lambda s, mask: torch.softmax(s + mask, -2)),
    "decomposed instead": lambda q, k, v: decomposed(q, k, v),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FULL_FORMS.values(), ids=FULL_FORMS)
def test_full_form_equals_loops(form, dtype, device):
    *qkv, upstream = maps(dtype=dtype, device=device)
    assert_equals(form, loops, qkv, upstream)


def test_the_frame_of_the_wrong_full_forms_is_right():
    *qkv, upstream = maps()
    assert_equals(full_by_einsum(), loops, qkv, upstream)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", WRONG_FULL.values(), ids=WRONG_FULL)
def test_a_wrong_full_form_is_seen(wrong, dtype):
    *qkv, upstream = maps(dtype=dtype)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equals(wrong, loops, qkv, upstream)


def test_without_renormalising_rows_sum_to_less_than_one():
    q, k, v, _ = maps()
    sums = decay_after_softmax(q, k, torch.ones_like(v), FULL_MASK, False)
    assert 0 < sums.min() and sums.max() < 0.95
    assert_close(decay_after_softmax(q, k, torch.ones_like(v), FULL_MASK, True), torch.ones_like(v))


# ---------------------------------------------------------------------------------------------- two passes
ROW_MASK, COLUMN_MASK = decay_mask(RATES, HEIGHT), decay_mask(RATES, ACROSS)


def line_pass(q, k, v, log_decay, scale=WIDTH**-0.5):
    """One softmax pass along one line of one head, [n, D], cell by cell."""
    out = []
    for i in range(len(q)):
        scores = torch.stack([q[i] @ k[j] * scale + abs(i - j) * log_decay for j in range(len(q))])
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(weights[j] * v[j] for j in range(len(q))))
    return torch.stack(out)


def passes_by_loops(q, k, v, order=("width", "height"), values_again=False):
    """Line by line; `values_again` gives the second pass the values instead of the first one's result."""
    given = v
    for number, axis in enumerate(order):
        source, out = given if values_again else v, torch.zeros_like(v)
        for b in range(v.shape[0]):
            for h in range(HEADS):
                for line in range(v.shape[1 if axis == "width" else 2]):
                    at = (b, line, slice(None), h) if axis == "width" else (b, slice(None), line, h)
                    out[at] = line_pass(q[at], k[at], source[at], RATES[h])
        v = out if number == 0 or not values_again else v + out
    return v


def decomposed(q, k, v, height=HEIGHT, width=ACROSS):
    return manhattan_decomposed(q, k, v, mask_for(q, decay_mask(RATES, height)), mask_for(q, decay_mask(RATES, width)))


def fast(form):
    return lambda q, k, v: decomposed_fast(q, k, v, mask_for(q, ROW_MASK), mask_for(q, COLUMN_MASK), form=form)


PASSES = {"reference": decomposed, "matmul": fast("matmul"), "pointwise": fast("pointwise"), "auto": fast("auto")}
WRONG_PASSES = {
    "height before width": lambda q, k, v: passes_by_loops(q, k, v, ("height", "width")),
    "width only": lambda q, k, v: passes_by_loops(q, k, v, ("width",)),
    "both passes read the values": lambda q, k, v: passes_by_loops(q, k, v, values_again=True),
    "full instead": lambda q, k, v: manhattan_full(q, k, v, FULL_MASK.to(q.dtype)),
    "no scale": lambda q, k, v: decomposed(q * 2, k, v),
    "rates reversed": lambda q, k, v: manhattan_decomposed(q, k, v, ROW_MASK.flip(0).to(q), COLUMN_MASK.flip(0).to(q)),
    "no decay in the height pass": lambda q, k, v: manhattan_decomposed(q, k, v, 0 * ROW_MASK.to(q), COLUMN_MASK.to(q)),
    "queries and keys exchanged": lambda q, k, v: decomposed(k, q, v),
    "decay on the flattened index": lambda q, k, v: manhattan_decomposed(
        q, k, v, ACROSS * ROW_MASK.to(q), COLUMN_MASK.to(q)
    ),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", PASSES.values(), ids=PASSES)
def test_two_passes_equal_loops(form, dtype, device):
    *qkv, upstream = maps(dtype=dtype, device=device)
    assert_equals(form, passes_by_loops, qkv, upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", WRONG_PASSES.values(), ids=WRONG_PASSES)
def test_wrong_passes_are_seen(wrong, dtype):
    *qkv, upstream = maps(dtype=dtype)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_equals(wrong, passes_by_loops, qkv, upstream)


def test_masks_of_the_two_passes_are_not_exchanged():
    q, k, v, _ = maps(4, 4)  # a square map accepts either
    right = decomposed(q, k, v, 4, 4)
    row, column = decay_mask(RATES, 4), 2 * decay_mask(RATES, 4)
    for form in (manhattan_decomposed, decomposed_fast):
        assert_close(form(q, k, v, row, row), right, rtol=0, atol=1e-12)
        by_axis = axis_pass(q, k, axis_pass(q, k, v, column, 2), row, 1)
        assert_close(form(q, k, v, row, column), by_axis, rtol=0, atol=1e-12)
        assert (form(q, k, v, column, row) - by_axis).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- when are they equal?
def repeated(x, axis):
    """The first row (axis 1) or column (axis 2) of a map, everywhere."""
    return x.narrow(axis, 0, 1).expand_as(x)


EQUAL = {
    "queries zero": lambda q, k, v: (0 * q, k, v),
    "keys zero": lambda q, k, v: (q, 0 * k, v),
    "one key for all": lambda q, k, v: (q, repeated(repeated(k, 1), 2), v),
    "keys that depend on the row only": lambda q, k, v: (q, repeated(k, 2), v),
    "one query, keys a row part plus a column part": lambda q, k, v: (
        repeated(repeated(q, 1), 2), repeated(k, 1) + repeated(k, 2), v,
    ),
    "one value for all": lambda q, k, v: (q, k, repeated(repeated(v, 1), 2)),
}  # fmt: skip
DIFFERENT = {
    "nothing special": lambda q, k, v: (q, k, v),
    "keys that depend on the column only": lambda q, k, v: (q, repeated(k, 1), v),
    "one query for all": lambda q, k, v: (repeated(repeated(q, 1), 2), k, v),
    "queries that depend on the row only": lambda q, k, v: (repeated(q, 2), k, v),
    "values that depend on the row only": lambda q, k, v: (q, k, repeated(v, 2)),
}


def gap(q, k, v):
    height, width = v.shape[1:3]
    full = manhattan_full(q, k, v, manhattan_mask(RATES, height, width))
    return (decomposed(q, k, v, height, width) - full).abs().max()


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_two_passes_equal_the_full_form(case):
    assert gap(*case(*maps()[:3])) < 1e-12


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_two_passes_differ_from_the_full_form(case):
    assert gap(*case(*maps()[:3])) > 0.05


@pytest.mark.parametrize(("height", "width"), [(1, 6), (6, 1), (1, 1)])
def test_on_a_line_there_is_only_one_form(height, width):
    assert gap(*maps(height, width)[:3]) < 1e-12


# ---------------------------------------------------------------------------------------------- limits and symmetries
def with_rates(form, log_decay, q, k, v):
    height, width = v.shape[1:3]
    if form == "full":
        return manhattan_full(q, k, v, manhattan_mask(log_decay, height, width))
    return manhattan_decomposed(q, k, v, decay_mask(log_decay, height), decay_mask(log_decay, width))


def test_a_rate_of_one_is_plain_attention():
    q, k, v, _ = maps()
    tokens = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(*tokens).transpose(1, 2).view_as(v)
    assert_close(with_rates("full", 0 * RATES, q, k, v), plain, rtol=0, atol=1e-12)
    assert (with_rates("full", RATES, q, k, v) - plain).abs().max() > 0.05


@pytest.mark.parametrize("form", ["full", "decomposed"])
def test_a_rate_of_zero_leaves_each_cell_its_value(form):
    q, k, v, _ = maps()
    assert_close(with_rates(form, 0 * RATES - 100.0, q, k, v), v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["full", "decomposed"])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_mirrored_map_gives_the_mirrored_result_unless_it_is_rotated(form, axis):
    q, k, v, _ = maps()
    table = rotation_table(HEIGHT, ACROSS, WIDTH, torch.float64)
    straight = lambda q, k, v: with_rates(form, RATES, q, k, v)
    turned = lambda q, k, v: straight(rotate(q, *table), rotate(k, *table), v)
    mirrored = [x.flip(axis) for x in (q, k, v)]
    assert_close(straight(*mirrored).flip(axis), straight(q, k, v), rtol=0, atol=1e-12)
    assert (turned(*mirrored).flip(axis) - turned(q, k, v)).abs().max() > 0.05


def test_only_two_passes_feel_a_map_on_its_side():
    q, k, v, _ = maps()
    on_its_side = [x.transpose(1, 2) for x in (q, k, v)]
    for form, feels in (("full", False), ("decomposed", True)):
        back = with_rates(form, RATES, *on_its_side).transpose(1, 2)
        assert ((back - with_rates(form, RATES, q, k, v)).abs().max() > 0.05) == feels, form


# ---------------------------------------------------------------------------------------------- segments
def segment_masks(side, window, device="cpu", dtype=torch.float64):
    """A mask for each segment, some pairs forbidden, no row without a partner. [segments, H, W, W]."""
    forbidden = draw(side // window, 1, window, window, seed=7) > 0.8
    forbidden &= ~torch.eye(window, dtype=torch.bool)
    assert forbidden.any() and not forbidden.all(-1).any()
    return decay_mask(RATES, window).masked_fill(forbidden, -torch.inf).to(device, dtype)


def segment_by_segment(q, k, v, masks, axis, window):
    out = []
    for number, (a, b, c) in enumerate(zip(*(t.split(window, axis) for t in (q, k, v)))):
        mask = masks[number] if masks.ndim == 4 and len(masks) > 1 else masks.view(masks.shape[-3:])
        still = torch.full((HEADS, v.shape[3 - axis], v.shape[3 - axis]), -torch.inf, dtype=mask.dtype)
        still.diagonal(dim1=1, dim2=2).zero_()  # the other pass leaves everything in place
        still = still.to(mask.device)
        out.append(manhattan_decomposed(a, b, c, *((mask, still) if axis == 1 else (still, mask))))
    return torch.cat(out, axis)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["matmul", "pointwise"])
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "a mask a segment"])
@pytest.mark.parametrize(("axis", "window"), [(1, 3), (2, 4), (1, 6), (2, 8)])
def test_segments_do_not_see_each_other(axis, window, shared, form, dtype, device):
    *qkv, upstream = maps(6, 8, dtype, device)
    masks = segment_masks(6 if axis == 1 else 8, window, device)
    masks = masks[-1:] if shared else masks
    own = masks.to(torch.promote_types(dtype, torch.float32))
    assert_equals(
        lambda q, k, v: axis_pass(q, k, v, own, axis, window, form),
        lambda q, k, v: segment_by_segment(q, k, v, masks, axis, window),
        qkv,
        upstream,
    )


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_a_window_of_one_cell_returns_the_values(form):
    q, k, v, _ = maps()
    for axis in (1, 2):
        assert_close(axis_pass(q, k, v, decay_mask(RATES, 1), axis, 1, form), v, rtol=0, atol=1e-15)


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_masks_belong_to_their_segments(form):
    q, k, v, _ = maps(6, 8)
    masks = segment_masks(8, 4)
    right = segment_by_segment(q, k, v, masks, 2, 4)
    assert (axis_pass(q, k, v, masks.flip(0), 2, 4, form) - right).abs().max() > 0.05
    assert (axis_pass(q, k, v, masks[:1], 2, 4, form) - right).abs().max() > 0.05
    assert (axis_pass(q, k, v, decay_mask(RATES, 8), 2, None, form) - right).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- shapes and precision
@pytest.mark.parametrize("form", ["matmul", "pointwise"])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (1, 1, 6), (1, 7, 2), (3, 5, 5)])
def test_any_map(batch, height, width, form):
    q, k, v, _ = maps(height, width, batch=batch)
    masks = decay_mask(RATES, height), decay_mask(RATES, width)
    assert_close(decomposed_fast(q, k, v, *masks, form=form), manhattan_decomposed(q, k, v, *masks), rtol=0, atol=1e-12)
    mask = manhattan_mask(RATES, height, width)
    assert_close(full_fast(q, k, v, mask), manhattan_full(q, k, v, mask), rtol=0, atol=1e-12)


def test_views_of_a_fused_projection_need_no_copy():
    qkv = draw(BATCH, HEIGHT, ACROSS, 3, HEADS, WIDTH)
    q, k, v = qkv.unbind(3)
    assert not q.is_contiguous()
    for form in ("matmul", "pointwise"):
        found = decomposed_fast(q, k, v, ROW_MASK, COLUMN_MASK, form=form)
        assert_close(found, decomposed(q, k, v), rtol=0, atol=1e-12)


def under_autocast(device, form):
    """A form called as a model calls it: float32 maps and masks, products in bfloat16."""
    q, k, v, _ = maps(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        return form(q, k, v), decomposed(q.double(), k.double(), v.double())


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_autocast(form, device):
    found, exact = under_autocast(device, fast(form))
    assert_close(found.double(), exact, rtol=0, atol=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_masks_are_not_rounded_with_the_maps(form):
    """In bfloat16 the mask of a cell 29 steps away would be wrong by 0.06, its weight by six per cent."""
    mask = decay_mask(RATES.float(), 30)
    assert (mask - mask.bfloat16()).abs().max() > 0.03
    zero, far = torch.zeros(1, 1, 30, HEADS, 1).bfloat16(), torch.zeros(1, 1, 30, HEADS, 1).bfloat16()
    far[:, :, 29] = 1  # the output of cell 0 is the weight it gives to cell 29
    weight = axis_pass(zero, zero, far, mask, 2, None, form)[0, 0, 0, :, 0]
    assert_close(weight.double(), torch.softmax(decay_mask(RATES, 30), -1)[:, 0, 29], rtol=0.005, atol=0)


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_gradients(form):
    q, k, v = (t.requires_grad_() for t in maps(2, 3, batch=1)[:3])
    masks = decay_mask(RATES, 2), decay_mask(RATES, 3)
    assert torch.autograd.gradcheck(lambda q, k, v: decomposed_fast(q, k, v, *masks, form=form), (q, k, v))


def test_gradients_of_the_one_dimensional_forms():
    q, k, v = (t[:, :, :4].requires_grad_() for t in lines()[:3])
    assert torch.autograd.gradcheck(parallel, (q, k, v))
    assert torch.autograd.gradcheck(in_chunks, (q, k, v))


def test_rates_can_be_learned():
    """No form detaches its mask: the gradient reaches the rates, the same by both passes and by the full form."""
    q, k, v, upstream = maps()
    found = []
    for form in (
        lambda r: manhattan_full(0 * q, k, v, manhattan_mask(r, HEIGHT, ACROSS)),
        lambda r: full_fast(0 * q, k, v, manhattan_mask(r, HEIGHT, ACROSS)),
        lambda r: decomposed_fast(0 * q, k, v, decay_mask(r, HEIGHT), decay_mask(r, ACROSS), form="matmul"),
        lambda r: decomposed_fast(0 * q, k, v, decay_mask(r, HEIGHT), decay_mask(r, ACROSS), form="pointwise"),
    ):
        rates = RATES.clone().requires_grad_()
        found += torch.autograd.grad(form(rates), rates, upstream)
    assert found[0].abs().min() > 0.01
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=1e-12)


def test_inputs_stay_as_they_are():
    q, k, v, _ = maps()
    before = [t.clone() for t in (q, k, v, FULL_MASK, ROW_MASK)]
    for form in (*FULL_FORMS.values(), *PASSES.values()):
        form(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, FULL_MASK, ROW_MASK)))


# ---------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("form", [fast("matmul"), fast("pointwise"), fast("auto"), FULL_FORMS["fast"]])
def test_traces_as_one_graph(form, grad, device):
    *qkv, _ = maps(dtype=torch.float32, device=device)
    traced = torch.compile(form, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        assert_close(traced(*(t.requires_grad_(grad) for t in qkv)), form(*qkv), rtol=0, atol=2e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("form", ["matmul", "pointwise", "full"])
def test_compiles_with_and_without_gradients(form, device):
    """A softmax over five axes crashes torch's compiler without gradients, and only there: both are tried."""
    *qkv, upstream = maps(2, 3, torch.float32, device, batch=1)
    mask = (manhattan_mask(RATES, 2, 3) if form == "full" else decay_mask(RATES, 3)).to(device, torch.float32)
    one = lambda q, k, v: full_fast(q, k, v, mask) if form == "full" else axis_pass(q, k, v, mask, 2, None, form)
    plain = manhattan_full if form == "full" else lambda q, k, v, mask: axis_pass(q, k, v, mask, 2)
    compiled = torch.compile(one, dynamic=False, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(*qkv), one(*qkv), rtol=0, atol=2e-5)
    assert_equals(compiled, lambda q, k, v: plain(q, k, v, mask.double()), qkv, upstream)


# ---------------------------------------------------------------------------------------------- wrong input
Q, K, V, _ = maps()
REFUSED = {
    "heads 0, initial 2.0": lambda: rmt_log_decay(0),
    "initial 0": lambda: rmt_log_decay(2, initial=0),
    "span -1": lambda: rmt_log_decay(2, span=-1),
    "initial nan, span 4.0 give": lambda: rmt_log_decay(2, float("nan")),
    "initial 2000.0, span 4.0 give": lambda: rmt_log_decay(2, 2000.0),
    "initial 2.0, span inf give": lambda: rmt_log_decay(2, 2.0, float("inf")),
    "unknown RetNet decay form 'powers'; accepted: exponents, linspace": lambda: retnet_log_decay(2, "powers"),
    "heads 0; accepted: 1 or more": lambda: retnet_log_decay(0),
    "a line of 0 cells": lambda: distances(0),
    "a line of -2 cells": lambda: manhattan_mask(RATES, -2, 3),
    "a head width of 5 is not even": lambda: rotation_table(2, 2, 5),
    "a head width of 0 is not even": lambda: rotation_table(2, 2, 0),
    "a map of 0 x 3 cells": lambda: rotation_table(0, 3, 4),
    "axis 0; accepted: 1": lambda: axis_pass(Q, K, V, ROW_MASK, 0),
    "unknown form 'fast'; accepted: auto, matmul, pointwise": lambda: axis_pass(Q, K, V, ROW_MASK, 1, form="fast"),
    "a side of 3 cells cannot be cut into windows of 2": lambda: axis_pass(Q, K, V, ROW_MASK, 1, 2),
    "a side of 5 cells cannot be cut into windows of 0": lambda: axis_pass(Q, K, V, COLUMN_MASK, 2, 0),
    "a mask of shape [2, 5, 5]; accepted: [2, 3, 3], or one of these for each of the 1 segments": lambda: axis_pass(
        Q, K, V, COLUMN_MASK, 1
    ),
    "a mask of shape [2, 2, 3, 3]; accepted: [2, 3, 3]": lambda: axis_pass(Q, K, V, ROW_MASK.expand(2, 2, 3, 3), 1),
    "a mask of shape [1, 3, 3]; accepted: [2, 3, 3]": lambda: axis_pass(Q, K, V, ROW_MASK[:1], 1),
    "a mask of shape [2, 9, 9]; accepted: [2, 15, 15]": lambda: full_fast(Q, K, V, manhattan_mask(RATES, 3, 3)),
}


@pytest.mark.parametrize(("said", "call"), REFUSED.items(), ids=REFUSED)
def test_wrong_input_is_refused(said, call):
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value)
