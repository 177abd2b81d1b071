"""Chapter 6: sigmoid attention with slopes and decay equals its equations, in every reading, and nothing less does.

`swat_by_hand` goes through a map cell by cell in float64; it is the reference for the whole mixer.
"""

import copy
import math
from dataclasses import replace

import pytest
import swat_by_hand
import torch
from torch import nn

import minigated.swat as swat
from minigated.decay import rmt_log_decay
from minigated.errors import InputError
from minigated.swat import SwatAttention, SwatOptions, SwatTableBuilder, balanced_slopes, swat_loops, swat_pass
from minigated.swat_options import NORMS, READINGS, unchanged

DEFAULT = SwatOptions()
ALTERNATIVES = [
    replace(DEFAULT, **{name: value})
    for name, accepted in READINGS.items()
    for value in accepted
    if value != getattr(DEFAULT, name)
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}
SHAPES = [((1, 1), None), ((1, 7), 3), ((4, 4), 2), ((5, 7), 3), ((3, 8), 4), ((4, 6), 8)]  # (map, window)
each_option = pytest.mark.parametrize("options", [DEFAULT, *ALTERNATIVES], ids=lambda o: str(different(o)))


def different(options: SwatOptions) -> str:
    found = [f"{n}={v}" for n, v in vars(options).items() if v != getattr(DEFAULT, n)]
    return " ".join(found) or "default"


def build(options=DEFAULT, heads=4, width=4, window=3, shifted=True, seed=0):
    """A mixer with all weights random and large (at the usual start many mistakes are too small to see), its tables."""
    module = SwatAttention(heads * width, heads, options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    tables = SwatTableBuilder(heads, width, rmt_log_decay(heads, dtype=torch.float64), window, shifted, options)
    return module, tables.double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(module, x, window, shifted, options=None):
    rates = rmt_log_decay(module.heads, dtype=torch.float64).tolist()
    with torch.no_grad():
        return torch.stack(
            [swat_by_hand.mixer(module, m, options or module.options, rates, window, shifted) for m in x]
        )


def assert_same(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ slopes
@pytest.mark.parametrize(
    ("heads", "form", "expected"),
    [
        (2, "swat", [0.5, -0.5]),
        (6, "swat", [0.5, 0.25, 0.125, -0.5, -0.25, -0.125]),
        (4, "alibi", [2**-4, 2**-8, -(2**-4), -(2**-8)]),
        (16, "alibi", [2.0**-k for k in range(1, 9)] + [-(2.0**-k) for k in range(1, 9)]),
        (3, "one_sided", [-(2 ** (-8 / 3)), -(2 ** (-16 / 3)), -(2**-8)]),
    ],
)
def test_slopes_by_hand(heads, form, expected):
    assert_same(balanced_slopes(heads, form, torch.float64), torch.tensor(expected, dtype=torch.float64), 1e-15)
    assert balanced_slopes(heads, form).dtype == torch.float32


@pytest.mark.parametrize("heads", [1, 3, 7])
def test_odd_heads_cannot_be_balanced(heads):
    said = f"balanced slopes need an even number of heads, half of each sign; got {heads}"
    for attempt in (
        lambda: balanced_slopes(heads),
        lambda: balanced_slopes(heads, "alibi"),
        lambda: SwatAttention(4 * heads, heads),
        lambda: SwatTableBuilder(heads, 4, torch.zeros(heads)),
    ):
        with pytest.raises(InputError, match=said):
            attempt()


def test_odd_heads_do_where_nothing_is_balanced():
    for options in (SwatOptions(alibi="none"), SwatOptions(slopes="one_sided")):
        module, tables = build(options, heads=3)
        assert module(draw(1, 4, 4, 12), tables(4, 4)).shape == (1, 4, 4, 12)


# ------------------------------------------------------------------------------------ one pass
def test_loops_by_hand():
    q = torch.tensor([[2.0], [0.0], [-2.0]])
    v = torch.tensor([[1.0], [10.0], [100.0]])
    logistic = lambda z: 1 / (1 + math.exp(-z))
    weights = [
        [logistic(4), logistic(0 - 1) / 2, logistic(-4 - 2) / 4],
        [logistic(0 + 1) / 2, logistic(0), logistic(0 - 1) / 2],
        [logistic(-4 + 2) / 4, logistic(0 + 1) / 2, logistic(4)],
    ]  # slope 1, gamma 1/2: earlier cells are raised
    expected = torch.tensor([[sum(w * x for w, x in zip(row, (1, 10, 100)))] for row in weights], dtype=torch.float64)
    assert_same(swat_loops(q, q, v, 1.0, 0.5), expected, 1e-12)


def pass_case(axis, window, dtype=torch.float64, height=6, width=8, device="cpu"):
    heads, side = 2, (height, width)[axis - 1]
    q, k, v, upstream = (draw(2, height, width, heads, 4, seed=s, dtype=dtype).to(device) for s in range(4))
    segments, window = (side // window, window) if window else (1, side)
    allowed = draw(segments, 1, window, window, seed=5) > -0.8
    allowed |= torch.eye(window, dtype=torch.bool)
    offset = torch.arange(window)[:, None] - torch.arange(window)
    slopes, gammas = torch.tensor([0.7, -0.3]).double(), torch.tensor([0.8, 0.95]).double()
    tables = slopes[:, None, None] * offset, gammas[:, None, None] ** offset.abs() * allowed
    wide = torch.promote_types(dtype, torch.float32)
    return (q, k, v), upstream, [t.to(device, wide) for t in tables], (slopes, gammas, allowed)


def loops(q, k, v, axis, window, slopes, gammas, allowed):
    """`swat_loops` over images, lines, segments and heads."""
    out, side = torch.zeros_like(v), v.shape[axis]
    window = window or side
    for b in range(len(v)):
        for line in range(v.shape[3 - axis]):
            for segment in range(side // window):
                cells = slice(segment * window, (segment + 1) * window)
                for h in range(v.shape[3]):
                    at = (b, cells, line, h) if axis == 1 else (b, line, cells, h)
                    mask = allowed[segment if len(allowed) > 1 else 0, 0]
                    out[at] = swat_loops(q[at], k[at], v[at], float(slopes[h]), float(gammas[h]), allowed=mask)
    return out


PASSES = [(1, None), (1, 3), (2, None), (2, 2)]


@pytest.mark.parametrize("form", ["matmul", "pointwise", "auto"])
@pytest.mark.parametrize(("axis", "window"), PASSES)
def test_a_pass_equals_the_loops(axis, window, form):
    qkv, upstream, tables, parts = pass_case(axis, window)
    own, exact = ([t.clone().requires_grad_() for t in qkv] for _ in range(2))
    found, wanted = swat_pass(*own, *tables, axis, window, form), loops(*exact, axis, window, *parts)
    found.backward(upstream)
    wanted.backward(upstream)
    for a, b in [(found, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact)]:
        assert_same(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["matmul", "pointwise"])
@pytest.mark.parametrize(("axis", "window"), PASSES)
def test_forms_agree_in_every_precision(axis, window, form, dtype, device):
    qkv, upstream, tables, _ = pass_case(axis, window, dtype, device=device)
    exact_tables = [t.double() for t in tables]
    own, exact = ([t.clone().to(d).requires_grad_() for t in qkv] for d in (dtype, torch.float64))
    found, wanted = swat_pass(*own, *tables, axis, window, form), swat_pass(*exact, *exact_tables, axis, window)
    assert found.dtype == dtype
    found.backward(upstream)
    wanted.backward(upstream.double())
    for a, b in [(found, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact)]:
        assert_same(a, b, TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 1))


def wrong_pass(weigh):
    """A pass with other weights: weigh(scores, bias, decay), all of them [..., W, W]."""

    def function(q, k, v, bias, decay, axis, window=None):
        side = v.shape[axis]
        shape = (-1, side // (window or side), window or side, math.prod(v.shape[axis + 1 : 3]), *v.shape[3:])
        q, k, values = (t.reshape(shape).permute(0, 1, 3, 4, 2, 5) for t in (q, k, v))  # [..., H, W, D]
        bias, decay = (t.view(-1, 1, *t.shape[-3:]) for t in (bias, decay))
        weights = weigh(q @ k.mT / math.sqrt(q.shape[-1]), bias, decay)
        return (weights @ values).permute(0, 1, 4, 2, 3, 5).reshape(v.shape)

    return function


WRONG_PASSES = {
    "softmax": wrong_pass(lambda s, b, d: torch.softmax(s + b, -1) * d),
    "decay before the sigmoid": wrong_pass(lambda s, b, d: torch.sigmoid(s + b + d.clamp(min=1e-300).log())),
    "slope outside the sigmoid": wrong_pass(lambda s, b, d: torch.sigmoid(s) * d + b * (d > 0)),
    "signs swapped": wrong_pass(lambda s, b, d: torch.sigmoid(s - b) * d),
    "one-sided slopes": wrong_pass(lambda s, b, d: torch.sigmoid(s - b.abs()) * d),
    "no scale": wrong_pass(lambda s, b, d: torch.sigmoid(2 * s + b) * d),
    "rows made to sum to one": wrong_pass(lambda s, b, d: swat_rows(torch.sigmoid(s + b) * d)),
    "mask of -100 before the sigmoid, decay unmasked": wrong_pass(
        lambda s, b, d: torch.sigmoid(s + b) * d.masked_fill(d == 0, 1.0)
    ),
    "sum over the queries": wrong_pass(lambda s, b, d: (torch.sigmoid(s + b) * d).mT),
}


def swat_rows(weights):
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(("axis", "window"), PASSES)
def test_the_frame_of_the_wrong_passes_is_right(axis, window):
    qkv, _, tables, _ = pass_case(axis, window)
    right = wrong_pass(lambda s, b, d: torch.sigmoid(s + b) * d)
    assert_same(right(*qkv, *tables, axis, window), swat_pass(*qkv, *tables, axis, window))


@pytest.mark.parametrize("wrong", WRONG_PASSES.values(), ids=WRONG_PASSES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_wrong_pass_is_seen(wrong, dtype):
    qkv, _, tables, parts = pass_case(2, 4, dtype)
    wanted = loops(*(t.double() for t in qkv), 2, 4, *parts)
    with pytest.raises(AssertionError):
        assert_same(wrong(*qkv, *(t.to(dtype) for t in tables), 2, 4), wanted, TOLERANCE[dtype])


def test_a_mask_of_minus_100_leaks_in_float64():
    leak = torch.sigmoid(torch.tensor(-100.0, dtype=torch.float64))
    assert 0 < leak < 1e-43 and torch.sigmoid(torch.tensor(-100.0)) < 1e-43  # nothing for a sum, and still not nothing
    assert torch.sigmoid(torch.tensor(-torch.inf)) == 0


# ------------------------------------------------------------------------------------ the whole mixer
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window"), SHAPES, ids=str)
def test_the_mixer_equals_the_equations_cell_by_cell(size, window, shifted):
    module, tables = build(heads=2, window=window, shifted=shifted)
    x = draw(2, *size, 8)
    assert_same(module(x, tables(*size)), by_hand(module, x, window, shifted))


@each_option
def test_every_reading_equals_its_equation(options):
    module, tables = build(options)
    x = draw(1, 4, 5, 16)
    assert_same(module(x, tables(4, 5)), by_hand(module, x, 3, True), 1e-11)


@pytest.mark.parametrize("options", ALTERNATIVES, ids=different)
def test_no_two_readings_are_the_same(options):
    module, _ = build(options)
    x = draw(1, 4, 5, 16)
    found = module(x, build(options)[1](4, 5))
    for other in [DEFAULT, *ALTERNATIVES]:
        same_weights = [p.shape for p in build(other)[0].parameters()] == [p.shape for p in module.parameters()]
        if other != options and same_weights:
            value = build(other)[0](x, build(other)[1](4, 5))
            assert (value - found).abs().max() > 1e-3, different(other)


def normalise_after_lce(norm, z, local):
    return norm(z + local)


def norm_twice(norm, z, local):
    return norm(norm(z) + local)


def height_first(qk, v, tables, weigh=unchanged, form="auto"):
    turned = tables._replace(
        rows=tables.columns, columns=tables.rows, row_bias=tables.column_bias, column_bias=tables.row_bias,
        row_decay=tables.column_decay, column_decay=tables.row_decay,
        cos=tables.cos.transpose(0, 1), sin=tables.sin.transpose(0, 1),
    )  # fmt: skip
    return swat_right(qk.transpose(1, 2), v.transpose(1, 2), turned, weigh, form).transpose(1, 2)


swat_right = swat.swat_decomposed


def tables_changed(**change):
    def function(qk, v, tables, weigh=unchanged, form="auto"):
        return swat_right(qk, v, tables._replace(**{n: f(tables) for n, f in change.items()}), weigh, form)

    return function


def one_region(decay):
    """The mask forgotten: every segment as the first, which no border crosses."""
    return decay[:1]


WRONG_MIXERS = {
    "height before width": height_first,
    "no shift mask in the width pass": tables_changed(column_decay=lambda t: one_region(t.column_decay)),
    "no shift mask in the height pass": tables_changed(row_decay=lambda t: one_region(t.row_decay)),
    "no rotation": tables_changed(cos=lambda t: torch.ones_like(t.cos), sin=lambda t: torch.zeros_like(t.sin)),
    "signs opposed in one pass": tables_changed(row_bias=lambda t: -t.row_bias),
    "heads reversed": tables_changed(
        row_decay=lambda t: t.row_decay.flip(1), column_decay=lambda t: t.column_decay.flip(1)
    ),
    "no decay": tables_changed(
        row_decay=lambda t: (t.row_decay > 0) * 1.0, column_decay=lambda t: (t.column_decay > 0) * 1.0
    ),
    "gated values twice": lambda qk, v, *rest: swat_right(qk, v * torch.nn.functional.silu(v), *rest),
    "one pass": lambda qk, v, tables, *rest: swat_right(
        qk, v, tables._replace(row_decay=torch.eye(tables.rows.window).double().expand_as(tables.row_decay)), *rest
    ),
}


@pytest.mark.parametrize("wrong", WRONG_MIXERS.values(), ids=WRONG_MIXERS)
def test_a_wrong_mixer_is_seen(wrong, monkeypatch):
    module, tables = build(heads=2)
    x = draw(2, 5, 8, 8)  # with two cells of padding a missing mask would have nothing to leak into the last window
    wanted = by_hand(module, x, 3, True)
    assert_same(module(x, tables(5, 8)), wanted)
    monkeypatch.setattr(swat, "swat_decomposed", wrong)
    with pytest.raises(AssertionError):
        assert_same(module(x, tables(5, 8)), wanted, 1e-3)


def rolled_lce(conv, v, tables):
    shifts = tables.rows.shift, tables.columns.shift
    return conv(v.roll(tuple(-s for s in shifts), (1, 2))).roll(shifts, (1, 2))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("norm_place", normalise_after_lce),
        ("norm_place", norm_twice),
        ("norm_place", lambda norm, z, local: z + local),
        ("lce_place", rolled_lce),
        ("lce_place", lambda conv, v, tables: conv(torch.nn.functional.silu(v))),
    ],
    ids=["norm after LCE", "norm twice", "no norm", "LCE on the rolled map", "LCE of something else"],
)
def test_a_wrong_end_is_seen(name, wrong):
    module, tables = build(heads=2)
    x = draw(2, 5, 7, 8)
    wanted = by_hand(module, x, 3, True)
    setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        assert_same(module(x, tables(5, 7)), wanted, 1e-3)


# ------------------------------------------------------------------------------------ windows, no own mathematics
def test_unshifted_windows_equal_a_global_layer_on_every_crop():
    options = SwatOptions(lce="none")
    module, tables = build(options, heads=2, window=3, shifted=False)
    everything = build(options, heads=2, window=None, shifted=False)[1]
    x = draw(2, 6, 9, 8)
    found = module(x, tables(6, 9))
    for row in range(0, 6, 3):
        for column in range(0, 9, 3):
            crop = slice(None), slice(row, row + 3), slice(column, column + 3)
            assert_same(found[crop], module(x[crop], everything(3, 3)))


def rectangles(side, window):
    """The regions of a shifted axis: up to the shift, whole windows, the rest."""
    borders = [0, *range(window // 2, side, window), side]
    return [slice(a, b) for a, b in zip(borders, borders[1:]) if a < b]


def test_shifted_windows_equal_a_global_layer_between_the_borders():
    options = SwatOptions(lce="none", rotation=False)  # a smaller rectangle would count its cells differently
    module, tables = build(options, heads=2, window=4)
    everything = build(options, heads=2, window=None)[1]
    x = draw(2, 8, 8, 8)
    found = module(x, tables(8, 8))
    for rows in rectangles(8, 4):
        for columns in rectangles(8, 4):
            crop = x[:, rows, columns]
            assert_same(found[:, rows, columns], module(crop, everything(*crop.shape[1:3])))


@pytest.mark.parametrize(("size", "window"), [((9, 9), 4), ((4, 10), 4), ((7, 5), 3)])
def test_padding_changes_nothing_on_the_map(size, window, monkeypatch):
    module, tables = build(heads=2, window=window)
    x = draw(1, *size, 8)
    wanted = module(x, tables(*size))
    right = swat.roll_in

    def dirty(value, rows, columns):
        marked = right(torch.ones_like(value), rows, columns)
        return torch.where(marked == 0, torch.full_like(marked, 7.0), right(value, rows, columns))

    monkeypatch.setattr(swat, "roll_in", dirty)
    assert_same(module(x, tables(*size)), wanted)


def influence(module, tables, size, cell):
    """The cells of a map whose output moves when one cell's input does, by random noise."""
    x = draw(1, *size, module.heads * 4)
    other = x.clone()
    other[0, cell[0], cell[1]] += draw(x.shape[-1], seed=1)
    moved = (module(other, tables(*size)) - module(x, tables(*size))).abs().amax(-1)[0] > 1e-12  # [h, w]
    return {tuple(found) for found in moved.nonzero().tolist()}


@pytest.mark.parametrize("shifted", [False, True])
def test_the_influence_of_a_cell_is_its_region(shifted):
    size, window = (6, 9), 4
    module, tables = build(SwatOptions(lce="none"), heads=2, window=window, shifted=shifted)
    for cell in ((0, 0), (1, 2), (5, 8), (3, 4), (0, 8)):
        places = [[swat_by_hand.Place(c, n, window, shifted).region for c in range(n)] for n in size]
        wanted = {
            (r, c)
            for r in range(size[0])
            for c in range(size[1])
            if places[0][r] == places[0][cell[0]] and places[1][c] == places[1][cell[1]]
        }
        assert influence(module, tables, size, cell) == wanted


def test_the_influence_map_sees_a_missing_mask(monkeypatch):
    module, tables = build(SwatOptions(lce="none"), heads=2, window=4)
    before = influence(module, tables, (6, 11), (0, 0))
    monkeypatch.setattr(swat, "swat_decomposed", WRONG_MIXERS["no shift mask in the width pass"])
    assert influence(module, tables, (6, 11), (0, 0)) > before


# ------------------------------------------------------------------------------------ properties
def weights_of(tables, q, k, which="column"):
    """Weights [H, W, W] of a pass for q, k [W, H, D], through the public function: v is the identity."""
    bias, decay = getattr(tables, f"{which}_bias")[0], getattr(tables, f"{which}_decay")[-1]
    cells, heads, _ = q.shape
    eye = torch.eye(cells, dtype=q.dtype).unsqueeze(1).expand(cells, heads, cells)
    line = (t.view(1, 1, cells, heads, -1) for t in (q, k, eye))
    return swat_pass(*line, bias, decay, 2)[0, 0].transpose(0, 1)  # [H, W, W]


def test_rows_do_not_sum_to_one_and_forbidden_pairs_are_exactly_zero():
    _, builder = build(heads=2, window=4)
    tables = builder(8, 8)
    weights = weights_of(tables, draw(4, 2, 4), draw(4, 2, 4, seed=1))
    assert (weights.sum(-1) - 1).abs().min() > 1e-3
    assert weights.max() < 1
    forbidden = tables.column_decay[-1] == 0
    assert forbidden.any() and (weights[forbidden] == 0).all() and (weights[~forbidden] > 0).all()


@pytest.mark.parametrize(("window", "flat", "dimmed"), [(4, 2.0, 1.85), (7, 3.5, 3.0), (8, 4.0, 3.4), (14, 7.0, 5.3)])
def test_a_row_sums_to_about_half_the_window_at_the_start(window, flat, dimmed):
    nothing = torch.zeros(window, 2, 4, dtype=torch.float64)  # scores of zero, as before training
    for rate, expected in ((0.0, flat), (math.log(0.9375), dimmed)):
        builder = SwatTableBuilder(2, 4, torch.full((2,), rate), window, options=SwatOptions(alibi="none")).double()
        sums = weights_of(builder(window, window), nothing, nothing).sum(-1)
        assert abs(float(sums.mean()) - expected) < 0.06
    growth = float(sums.mean()) ** 2
    assert window != 7 or 8.5 < growth < 9.5  # two passes, decay 0.9375


def test_two_passes_grow_values_that_agree_far_more_than_values_that_do_not():
    qk = torch.zeros(1, 7, 7, 2, 2, 4, dtype=torch.float64)
    tables = SwatTableBuilder(2, 4, torch.zeros(2), 7, options=SwatOptions(alibi="none")).double()(7, 7)
    agreeing, mixed = torch.ones(1, 7, 7, 2, 4, dtype=torch.float64), draw(1, 7, 7, 2, 4)
    assert_same(swat.swat_decomposed(qk, agreeing, tables), 3.5**2 * agreeing)
    assert swat.swat_decomposed(qk, mixed, tables).std() < 3 * mixed.std()


def test_the_norm_makes_the_branch_blind_to_the_scale_of_values():
    qk, v = draw(1, 5, 5, 2, 2, 4), draw(1, 5, 5, 2, 4, seed=1)
    tables = build(heads=2)[1](5, 5)
    z = swat.swat_decomposed(qk, v, tables).flatten(-2)
    for name, reading in NORMS.items():
        norm = reading.module(8, 2).double()
        same = torch.allclose(norm(z), norm(50 * z), atol=1e-2)
        assert same == (name in ("layer", "rms", "head")), name


# ------------------------------------------------------------------------------------ readings that meet
def tables_of(heads=4, log_decay=None, size=(5, 7), window=3, **options):
    log_decay = rmt_log_decay(heads, dtype=torch.float64) if log_decay is None else log_decay
    return SwatTableBuilder(heads, 4, log_decay, window, True, SwatOptions(**options)).double()(*size)


def assert_same_tables(a, b):
    for name in ("row_bias", "column_bias", "row_decay", "column_decay"):
        assert_same(getattr(a, name), getattr(b, name), 1e-14)


def test_outer_slopes_are_a_multiplicative_exponential():
    slopes = balanced_slopes(4, dtype=torch.float64)
    outer = tables_of(alibi="outer")
    assert_same_tables(outer, tables_of(alibi="none", log_decay=slopes))  # the slopes in place of log gamma
    far = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    assert_same(outer.column_decay[0], torch.exp(slopes[:, None, None] * far), 1e-14)
    assert not outer.column_bias.any()


def test_magnitudes_are_a_decay():
    slopes = balanced_slopes(4, dtype=torch.float64)
    assert_same_tables(tables_of(alibi="magnitude"), tables_of(alibi="none", log_decay=-slopes.abs()))
    assert tables_of(alibi="magnitude").row_decay.max() <= 1 < tables_of(alibi="outer").row_decay.max()


def test_slopes_of_zero_are_no_slopes_and_rates_of_one_no_decay(monkeypatch):
    assert_same_tables(tables_of(decay=False), tables_of(log_decay=torch.zeros(4)))
    none = tables_of(alibi="none")
    monkeypatch.setattr(SwatOptions, "signs", lambda self, heads: (torch.zeros(heads, dtype=torch.float64),) * 2)
    assert_same_tables(tables_of(alibi="both"), none)


def test_distance_and_pass_signs_on_the_tables():
    signed, absolute = tables_of(), tables_of(distance="absolute")
    assert_same(signed.column_bias.abs(), absolute.column_bias.abs())
    assert_same(signed.column_bias, -signed.column_bias.mT)  # looks to one side
    assert_same(absolute.column_bias, absolute.column_bias.mT)
    opposed, quadrants = tables_of(pass_signs="opposed"), tables_of(pass_signs="quadrants")
    assert_same(opposed.row_bias, -opposed.column_bias)
    signs = [
        (float(column), float(row))
        for column, row in zip(quadrants.column_bias[0, :, 1, 0].sign(), quadrants.row_bias[0, :, 1, 0].sign())
    ]
    assert len(set(signs)) == 4  # each head its own direction


def test_normalising_by_the_window_is_a_factor():
    x = draw(1, 5, 7, 16)
    seen = {}
    for name in ("none", "window"):
        module, tables = build(SwatOptions(norm=name))
        module(x, tables(5, 7), probe=lambda key, value, name=name: seen.__setitem__((name, key), value))
    assert_same(seen["window", "attended"] * 9, seen["none", "attended"])


def test_rows_of_the_row_sum_reading_do_sum_to_one():
    ones = torch.ones(1, 6, 6, 2, 4, dtype=torch.float64)
    qk, tables = draw(1, 6, 6, 2, 2, 4), build(heads=2)[1](6, 6)
    assert_same(swat.swat_decomposed(qk, ones, tables, NORMS["row_sum"].weights), ones, 1e-5)
    assert (swat.swat_decomposed(qk, ones, tables) - 1).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("one", "other", "window"),
    [
        (dict(value="plain", lce="raw"), dict(value="plain"), 3),
        (dict(lce_place="window"), dict(), None),
        (dict(alibi="outer", distance="absolute"), dict(alibi="outer"), 3),
        (dict(lce="none", norm_place="after_lce"), dict(lce="none"), 3),
    ],
    ids=str,
)
def test_readings_that_cannot_differ(one, other, window):
    x = draw(1, 5, 7, 16)
    first, second = (build(SwatOptions(**o), window=window) for o in (one, other))
    assert_same(first[0](x, first[1](5, 7)), second[0](x, second[1](5, 7)))


# ------------------------------------------------------------------------------------ modules
@each_option
def test_no_parameter_and_no_state_holds_positions_slopes_or_decay(options):
    module, builder = build(options)
    assert not list(builder.parameters()) and not builder.state_dict()
    builder(5, 7)
    assert not list(builder.parameters()) and not builder.state_dict()
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names <= {"qkv", "value", "norm", "lce", "out_proj"}
    assert not any(p.shape[-1] in (5, 7) and p.ndim < 3 for p in module.parameters())


def test_all_parameters_get_a_gradient():
    for options in [DEFAULT, *ALTERNATIVES]:
        module, tables = build(options)
        (module(draw(2, 5, 7, 16), tables(5, 7)) * draw(2, 5, 7, 16, seed=1)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precisions(dtype, device):
    module, tables = build()
    x = draw(2, 5, 7, 16)
    exact = module(x, tables(5, 7))
    low, low_tables = copy.deepcopy(module).to(device, dtype), copy.deepcopy(tables).to(device, dtype)
    made = low_tables(5, 7)
    assert {t.dtype for t in made if isinstance(t, torch.Tensor)} == {torch.float32}
    found = low(x.to(device, dtype), made)
    assert found.dtype == dtype
    assert_same(
        found.cpu(), exact, {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype] * float(exact.detach().abs().max())
    )


def test_bfloat16_tables_would_round_the_decay():
    _, builder = build()
    exact, kept = builder(5, 7).column_decay, copy.deepcopy(builder).bfloat16()(5, 7).column_decay
    assert_same(kept, exact, 1e-7)
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-4


def test_autocast_runs_and_keeps_its_precision():
    module, tables = build()
    module, tables, x = module.float(), tables.float(), draw(2, 5, 7, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, tables(5, 7))
    assert found.dtype == torch.bfloat16
    exact = module(x, tables(5, 7))
    assert_same(found, exact, 3e-2 * float(exact.detach().abs().max()))


def test_one_map_after_another_and_one_image_at_a_time():
    module, tables = build()
    for size in ((1, 1), (9, 2), (5, 7), (1, 1)):
        x = draw(3, *size, 16)
        together = module(x, tables(*size))
        assert together.shape == x.shape
        assert_same(together, torch.cat([module(one, tables(*size)) for one in x.split(1)]))


def test_the_input_is_left_alone_and_probes_see_every_step():
    module, tables = build()
    x, seen = draw(1, 5, 7, 16), {}
    before = x.clone()
    out = module(x, tables(5, 7), None, lambda name, value: seen.__setitem__(name, value))
    assert torch.equal(x, before)
    assert {n: v.shape[-2:] for n, v in seen.items()} == {
        "value_gate": (4, 4),
        "attended": (4, 4),
        "before_out": (7, 16),
    }
    assert_same(module.out_proj(seen["before_out"]), out)
    gate = torch.nn.functional.silu(module.qkv(x)[..., 32:48])
    assert_same(seen["value_gate"].flatten(-2), gate)


def test_gradcheck():
    for options in (DEFAULT, SwatOptions(norm="row_sum", value="mlp", distance="absolute")):
        module, tables = build(options, heads=2, width=2, window=2)
        made = tables(3, 2)
        names, weights = zip(*module.named_parameters())

        def run(x, *values, module=module, names=names, made=made):
            return torch.func.functional_call(module, dict(zip(names, values)), (x, made))

        inputs = draw(1, 3, 2, 4).requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


class Layer(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.mixer, self.tables = build(options)

    def forward(self, x):
        return self.mixer(x, self.tables(x.shape[1], x.shape[2]))


@pytest.mark.parametrize("options", [DEFAULT, SwatOptions(norm="row_sum", lce_place="window")], ids=different)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ready", [True, False], ids=["tables ready", "tables in the graph"])
def test_eager_equals_compiled(options, grad, ready):
    torch._dynamo.reset()
    layer, x = Layer(options), draw(2, 5, 7, 16)
    wanted = copy.deepcopy(layer)(x)
    if ready:
        layer.tables(5, 7)
    with torch.set_grad_enabled(grad):
        found = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)(x)
    assert found.requires_grad == grad
    assert_same(found, wanted)


def test_tables_on_the_meta_device_are_made_where_the_model_lands():
    with torch.device("meta"):
        layer = nn.ModuleList([SwatAttention(16, 4), SwatTableBuilder(4, 4, torch.zeros(4, device="cpu"), 4)])
    layer.to_empty(device="cpu")
    assert layer[1](5, 7).row_decay.device.type == "cpu"
    assert layer[1](5, 7).row_decay.max() == 1


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize("name", READINGS)
def test_unknown_readings_are_refused(name):
    with pytest.raises(InputError, match=rf"unknown swat {name} 'upside down'; accepted: "):
        SwatOptions(**{name: "upside down"})


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: SwatOptions(alibi="outer", decay=False), "alibi 'outer' makes the decay out of the slopes"),
        (lambda: SwatAttention(10, 4), "10 channels cannot be split into 4 heads evenly"),
        (lambda: SwatAttention(8, 0), "8 channels cannot be split into 0 heads"),
        (lambda: SwatTableBuilder(4, 4, torch.zeros(2)), "2 decay rates were given for 4 heads"),
        (lambda: SwatTableBuilder(2, 3, torch.zeros(2))(4, 4), "3"),
        (lambda: SwatTableBuilder(2, 4, torch.zeros(2), 0)(4, 4), "0"),
        (lambda: balanced_slopes(4, "steep"), "unknown slopes 'steep'; accepted: swat, alibi, one_sided"),
    ],
)
def test_wrong_settings_are_refused(attempt, said):
    with pytest.raises(InputError, match=said) as caught:
        attempt()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(axis=3), "axis 3; accepted: 1"),
        (dict(form="fast"), "unknown form 'fast'"),
        (dict(window=3), "a side of 8 cells cannot be cut into windows of 3"),
        (
            dict(window=4),
            r"bias of shape \[2, 8, 8\]; accepted: \[2, 4, 4\], or one of these for each of the 2 segments",
        ),
        (dict(decay=torch.ones(3, 2, 8, 8)), r"decay of shape \[3, 2, 8, 8\]"),
    ],
)
def test_a_pass_refuses_what_does_not_fit(change, said):
    (q, k, v), _, (bias, decay), _ = pass_case(2, None)
    arguments = dict(bias=bias, decay=decay, axis=2) | change
    with pytest.raises(InputError, match=said):
        swat_pass(q, k, v, **arguments)
