"""Chapter 6: sigmoid attention with slopes and decay equals its equations, and nothing less does.

`swat_by_hand` goes through a map cell by cell in float64; it is the reference for the whole mixer.
"""

import math
import shutil

import pytest
import swat_by_hand
import torch
from swat_cases import ALTERNATIVES, DEFAULT, assert_same, build, by_hand, different, draw

import minigated.swat as swat
from minigated.decay import rotation_table
from minigated.errors import InputError
from minigated.swat import SwatAttention, SwatOptions, SwatTableBuilder, balanced_slopes, swat_loops, swat_pass
from minigated.swat_options import READINGS, unchanged

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}
SHAPES = [((1, 1), None), ((1, 7), 3), ((4, 4), 2), ((5, 7), 3), ((3, 8), 4), ((4, 6), 8)]  # (map, window)


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


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("form", ["matmul", "pointwise"])
def test_a_pass_compiles_with_and_without_gradients(form, device):
    qkv, upstream, tables, _ = pass_case(2, 2, torch.float32, 2, 4, device)
    one = lambda q, k, v: swat_pass(q, k, v, *tables, 2, 2, form)
    compiled = torch.compile(one, dynamic=False, fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(*qkv), one(*qkv), TOLERANCE[torch.float32])
    own, exact = ([t.clone().requires_grad_() for t in qkv] for _ in range(2))
    found, wanted = compiled(*own), one(*exact)
    found.backward(upstream)
    wanted.backward(upstream)
    for a, b in [(found, wanted)] + [(a.grad, b.grad) for a, b in zip(own, exact)]:
        assert_same(a, b, TOLERANCE[torch.float32])


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


@pytest.mark.parametrize("options", [DEFAULT, *ALTERNATIVES], ids=different)
def test_every_reading_equals_its_equation(options):
    module, tables = build(options)
    x = draw(1, 4, 5, 16)
    assert_same(module(x, tables(4, 5)), by_hand(module, x, 3, True), 1e-11)


@pytest.mark.parametrize("value", READINGS["value"])
def test_the_raw_value_is_that_before_its_gate(value):
    module, tables = build(SwatOptions(value=value, lce="raw"), heads=2)
    x = draw(1, 4, 5, 8)
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
    "rotation counted on the map": tables_changed(
        cos=lambda t: rotation_table(*t.cos.shape, torch.float64)[0],
        sin=lambda t: rotation_table(*t.sin.shape, torch.float64)[1],
    ),
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


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window"), [((9, 9), 4), ((4, 10), 4), ((7, 5), 3)])
def test_padding_changes_nothing_on_the_map(size, window, shifted, monkeypatch):
    module, tables = build(heads=2, window=window, shifted=shifted)
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


# ------------------------------------------------------------------------------------ wrong input
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


@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (1, 4, 4, 16), (1, 16, 8), (8,)], ids=str)
def test_a_map_that_does_not_fit_is_refused(shape):
    module, tables = build(heads=2)
    with pytest.raises(InputError, match=r"map of shape \[.*\]; accepted: \[batch, height, width, 8\]$") as caught:
        module(draw(*shape), tables(4, 4))
    assert str(list(shape)) in str(caught.value)
