"""The retention mixer: windowed against unwindowed, fast against reference, and the abstract's order of things."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import minigated.retention as retention
from minigated.decay import (
    decay_mask,
    manhattan_decomposed,
    manhattan_full,
    manhattan_mask,
    rmt_log_decay,
    rotate,
    rotation_table,
)
from minigated.errors import InputError
from minigated.retention import (
    FullTableBuilder,
    Retention,
    WindowTableBuilder,
    decomposed,
    decomposed_reference,
    full,
)
from minigated.windows import merge, partition

HEADS, WIDTH = 2, 4
LOG_DECAY = rmt_log_decay(HEADS, dtype=torch.float64)
EXACT = {"rtol": 0, "atol": 1e-12}
MAPS = [(7, 7, 7), (14, 14, 7), (9, 9, 4), (10, 10, 7), (5, 9, 4), (4, 14, 7), (3, 2, 8), (1, 1, 4)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(height, width, batch=2, dtype=torch.float64):
    return draw(batch, height, width, 3, HEADS, WIDTH, dtype=dtype)


def tables(height, width, window, shifted=False, rotation=True, dtype=torch.float64):
    return WindowTableBuilder(WIDTH, LOG_DECAY, window, shifted, rotation).to(dtype)(height, width)


def regions(side, window, shifted):
    """The cells that may see each other along one axis, as (start, end): worked out from the definition alone."""
    window = min(window, side)
    shift = window // 2 if shifted and side > window else 0
    borders = sorted({0, side, *range(shift, side, window)})
    return list(zip(borders[:-1], borders[1:]))


def on_rectangles(x, window, shifted):
    """The unwindowed form on each rectangle between the region borders, with the rotation of the window's size."""
    height, width = x.shape[1:3]
    out = x.new_empty(x.shape[:3] + x.shape[4:])
    cos, sin = rotation_table(min(window, height), min(window, width), WIDTH, torch.float64)
    for top, bottom in regions(height, window, shifted):
        for left, right in regions(width, window, shifted):
            q, k, v = x[:, top:bottom, left:right].unbind(3)
            h, w = bottom - top, right - left
            q, k = rotate(q, cos[:h, :w], sin[:h, :w]), rotate(k, cos[:h, :w], sin[:h, :w])
            masks = decay_mask(LOG_DECAY, h), decay_mask(LOG_DECAY, w)
            out[:, top:bottom, left:right] = manhattan_decomposed(q, k, v, *masks)
    return out


# ---------------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), MAPS)
def test_windowed_is_unwindowed_on_every_rectangle(height, width, window, shifted):
    x = qkv(height, width)
    assert_close(decomposed(x, tables(height, width, window, shifted)), on_rectangles(x, window, shifted), **EXACT)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("no mask in the height pass", lambda t: t._replace(row_mask=t.row_mask[:1])),
        ("no mask in the width pass", lambda t: t._replace(column_mask=t.column_mask[:1])),
        ("segments of the mask in reverse", lambda t: t._replace(row_mask=t.row_mask.flip(0))),
        ("rates of the heads in reverse", lambda t: t._replace(column_mask=t.column_mask.flip(1))),
        ("no rotation", lambda t: t._replace(cos=None, sin=None)),
        ("rotation of the whole map", lambda t: t._replace(**dict(zip(("cos", "sin"), rotation_table(14, 14, WIDTH))))),
    ],
)
def test_the_rectangles_see_a_planted_bug(name, spoil):
    x, right = qkv(14, 14), tables(14, 14, 7, True)
    wrong = decomposed(x, spoil(right))
    assert (wrong - on_rectangles(x, 7, True)).abs().max() > 0.1, name


@pytest.mark.parametrize("window", [2, 14, None])
def test_the_crops_see_windows_of_another_side(window):
    x = qkv(14, 14)
    assert (decomposed(x, tables(14, 14, window)) - on_rectangles(x, 7, False)).abs().max() > 0.1


def test_the_rectangles_see_windows_in_the_order_of_images(monkeypatch):
    x, t = qkv(14, 14), tables(14, 14, 7, True)
    assert_close(decomposed_reference(x, t), on_rectangles(x, 7, True), **EXACT)
    mixed = lambda windows, outer: windows.unflatten(0, (outer, -1)).transpose(0, 1).flatten(0, 1)
    monkeypatch.setattr(retention, "partition", lambda x, *window: mixed(partition(x, *window), len(x)))
    monkeypatch.setattr(retention, "merge", lambda windows, *map: merge(mixed(windows, 4), *map))
    assert (decomposed_reference(x, t) - on_rectangles(x, 7, True)).abs().max() > 0.1


def test_the_rotation_starts_again_in_every_window():
    x, t = qkv(7, 7), tables(7, 14, 7)
    alone, twice = decomposed(x, tables(7, 7, None)), torch.cat((x, x), 2)
    assert_close(decomposed(twice, t), torch.cat((alone, alone), 2), **EXACT)
    cos, sin = rotation_table(7, 14, WIDTH, torch.float64)
    one, other = decomposed(twice, t._replace(cos=cos, sin=sin)).split(7, 2)
    assert_close(one, other, **EXACT)  # only differences of indices count
    assert (one - alone).abs().max() > 0.1  # and a step down is as far as the map is wide


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), MAPS)
def test_fast_form_equals_the_reference(height, width, window, shifted, form):
    x, t = qkv(height, width).requires_grad_(), tables(height, width, window, shifted)
    fast, slow = decomposed(x, t, form), decomposed_reference(x, t)
    assert_close(fast, slow, **EXACT)
    up = draw(*fast.shape, seed=1)
    assert_close(*(torch.autograd.grad(y, x, up)[0] for y in (fast, slow)), **EXACT)


@pytest.mark.parametrize("form", ["auto", "matmul", "pointwise"])
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
def test_no_image_gives_no_map(shifted, form):
    x = qkv(8, 6, batch=0).requires_grad_()
    y = decomposed(x, tables(8, 6, 4, shifted), form)
    y.sum().backward()
    assert y.shape == (0, 8, 6, HEADS, WIDTH) and x.grad.shape == x.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_low_precision_stays_near(dtype, tolerance):
    x = qkv(10, 9, dtype=dtype)
    y = decomposed(x, tables(10, 9, 4, True, dtype=torch.float32))
    assert y.dtype == dtype
    assert_close(y.double(), decomposed(x.double(), tables(10, 9, 4, True)), rtol=0, atol=tolerance)


def test_full_form_is_one_softmax_over_the_map():
    x = qkv(3, 5)
    t = FullTableBuilder(WIDTH, LOG_DECAY).double()(3, 5)
    q, k, v = x.unbind(3)
    cos, sin = rotation_table(3, 5, WIDTH, torch.float64)
    expected = manhattan_full(rotate(q, cos, sin), rotate(k, cos, sin), v, manhattan_mask(LOG_DECAY, 3, 5))
    assert_close(full(x, t), expected, **EXACT)
    assert (decomposed(x, tables(3, 5, None)) - expected).abs().max() > 0.05  # two forms, not one by mistake


def test_without_queries_both_forms_agree():
    x = qkv(3, 5)
    x[..., 0, :, :] = 0
    t = FullTableBuilder(WIDTH, LOG_DECAY).double()(3, 5)
    assert_close(decomposed(x, tables(3, 5, None)), full(x, t), **EXACT)


# ---------------------------------------------------------------------------------------------- the module
def mixer(dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = Retention(HEADS * WIDTH, HEADS, **options)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)  # at the usual start most bugs cannot be seen
    return module.to(dtype)


def by_sentence(module, x, t, gate):
    """Eq. (5.1), from the abstract's sentence and plain functions."""
    q, k, v = module.qkv(x).chunk(3, -1)
    split = lambda y: y.unflatten(-1, (HEADS, WIDTH))
    z = decomposed_reference(torch.stack((split(q), split(k), split(v)), 3), t).flatten(-2)
    conv = module.lce.conv
    lce = nn.functional.conv2d(v.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2, groups=HEADS * WIDTH)
    return module.out_proj(gate(z, lce.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_the_gate_covers_attention_and_lce_before_the_output_projection(granularity):
    module, x, t = mixer(gate=granularity), draw(2, 9, 6, HEADS * WIDTH), tables(9, 6, 4, True)
    scores = torch.sigmoid(x @ module.gate.scores.linear.weight.T)  # [B, h, w, C or H]
    scores = scores.repeat_interleave(WIDTH if granularity == "headwise" else 1, -1)
    assert_close(module(x, t), by_sentence(module, x, t, lambda z, lce: scores * (z + lce)), **EXACT)
    for wrong in (
        lambda z, lce: scores * z + lce,
        lambda z, lce: z + lce,
        lambda z, lce: scores * (z + lce) + lce,
        lambda z, lce: scores.mean((0, 1, 2)) * (z + lce),  # a gate that is learned but does not look
    ):
        assert (module(x, t) - by_sentence(module, x, t, wrong)).abs().max() > 0.05


def test_a_gate_of_weight_zero_halves_what_it_covers():
    module, x, t = mixer(), draw(1, 5, 5, HEADS * WIDTH), tables(5, 5, 3)
    module.gate.scores.linear.weight.data.zero_()
    half = module(x, t) - module.out_proj.bias
    module.gate = None
    assert_close(2 * half, module(x, t) - module.out_proj.bias, **EXACT)


def test_a_gate_with_a_large_bias_is_open():
    module, x, t = mixer(gate_bias=True), draw(1, 5, 5, HEADS * WIDTH), tables(5, 5, 3)
    module.gate.scores.linear.weight.data.zero_()
    module.gate.scores.linear.bias.data.fill_(60.0)
    gated = module(x, t)
    module.gate = None
    assert_close(gated, module(x, t), **EXACT)


def test_a_shut_gate_hands_nothing_on():
    module, x, t = mixer(gate_bias=True), draw(1, 5, 5, HEADS * WIDTH), tables(5, 5, 3)
    module.gate.scores.linear.weight.data.zero_()
    module.gate.scores.linear.bias.data.fill_(-60.0)
    assert_close(module(x, t), module.out_proj.bias.expand_as(x), **EXACT)


def test_a_score_belongs_to_its_cell():
    module, x, t, seen = mixer(), draw(1, 6, 5, HEADS * WIDTH), tables(6, 5, 3, True), []
    moved = x.clone()
    moved[0, 2, 3] += draw(HEADS * WIDTH, seed=9)
    keep = lambda name, value: seen.append(value[1]) if name == "gate_score" else None
    module(x, t, probe=keep), module(moved, t, probe=keep)
    assert (seen[0] != seen[1]).flatten(-2).any(-1).nonzero().tolist() == [[0, 2, 3]]


def test_the_gate_reads_the_input_it_is_told_to():
    x, t, residual = draw(1, 4, 4, HEADS * WIDTH), tables(4, 4, 4), draw(1, 4, 4, HEADS * WIDTH, seed=5)
    normed, raw = mixer(), mixer(gate_input="residual")
    assert_close(normed(x, t, residual), normed(x, t, 3 * residual), **EXACT)
    assert_close(raw(x, t, x), normed(x, t, residual), **EXACT)
    assert (raw(x, t, residual) - raw(x, t, 3 * residual)).abs().max() > 0.05


def test_lce_sees_the_map_as_it_lies():
    module, x = mixer(gate="none"), draw(1, 8, 8, HEADS * WIDTH)
    module.attend = lambda qkv, t: torch.zeros_like(qkv[..., 2, :, :])
    expected = module.out_proj(module.lce(module.qkv(x)[..., 2 * HEADS * WIDTH :]))
    assert_close(module(x, tables(8, 8, 4, True)), expected, **EXACT)


def reached(module, t, height, width, cell):
    """Where the output changes when one cell is moved by random noise. Bool [h, w]."""
    x = draw(1, height, width, HEADS * WIDTH)
    moved = x.clone()
    moved[0, cell[0], cell[1]] += draw(HEADS * WIDTH, seed=9)
    return (module(moved, t) - module(x, t)).abs().amax(-1)[0] > 1e-9


def its_region(height, width, window, cell):
    expected = torch.zeros(height, width, dtype=torch.bool)
    (top, bottom), (left, right) = (
        next(r for r in regions(side, window, True) if r[0] <= at < r[1]) for side, at in zip((height, width), cell)
    )
    expected[top:bottom, left:right] = True
    return expected


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 4), (9, 6, 4), (10, 10, 7)])
def test_influence_stays_in_the_region(height, width, window):
    module, t = mixer(lce=0), tables(height, width, window, True)
    for cell in [(0, 0), (height // 2, width // 2), (height - 1, width - 1)]:
        assert torch.equal(reached(module, t, height, width, cell), its_region(height, width, window, cell)), cell


@pytest.mark.parametrize("mask", ["row_mask", "column_mask"])
def test_the_influence_map_sees_a_missing_mask(mask):
    t = tables(8, 8, 4, True)
    found = reached(mixer(lce=0), t._replace(**{mask: getattr(t, mask)[:1]}), 8, 8, (0, 0))
    region = its_region(8, 8, 4, (0, 0))
    assert found[region].all() and found.sum() == 2 * region.sum()  # the far end of one axis hears it too


def test_nothing_about_places_is_learned_or_saved():
    module, builder = mixer(), WindowTableBuilder(WIDTH, LOG_DECAY, 4, True, size=(8, 8))
    assert not list(builder.parameters()) and not builder.state_dict()
    learned = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert learned == {"qkv", "lce", "gate", "out_proj"}


def test_tables_keep_their_precision_and_follow_the_model():
    builder = WindowTableBuilder(WIDTH, LOG_DECAY, 4, True, size=(8, 8))
    exact = builder(8, 8).row_mask
    assert builder.to(torch.bfloat16)(8, 8).row_mask.dtype == torch.float32
    assert torch.equal(builder(8, 8).row_mask, exact)
    wide = builder.double()(8, 8).row_mask
    assert wide.dtype == torch.float64 and torch.equal(wide[0, :, 0, 1], LOG_DECAY)
    assert builder(8, 8).row_mask is builder(8, 8).row_mask, "built once a size"
    assert builder(5, 9).column_mask.shape == (3, HEADS, 4, 4)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="10 channels cannot be split into 4 heads"):
        Retention(10, 4)
    with pytest.raises(InputError, match="gate 'tanh'"):
        Retention(8, 2, gate="tanh")
    with pytest.raises(InputError, match="gate_input 'raw'"):
        Retention(8, 2, gate_input="raw")
    with pytest.raises(InputError, match="odd side, got 4"):
        Retention(8, 2, lce=4)


@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (1, 4, 4, 16), (1, 16, 8), (8,)], ids=str)
def test_a_map_that_does_not_fit_is_refused(shape):
    with pytest.raises(InputError, match=r"map of shape \[.*\]; accepted: \[batch, height, width, 8\]$") as caught:
        mixer()(draw(*shape), tables(4, 4, 4))
    assert str(list(shape)) in str(caught.value)


def test_a_gate_that_reads_the_residual_must_get_it():
    x, t = draw(1, 4, 4, 8), tables(4, 4, 4)
    with pytest.raises(InputError, match="residual None; accepted: the block input before its norm, .*'residual'"):
        mixer(gate_input="residual")(x, t)
    assert mixer(gate_input="residual")(x, t, x).shape == x.shape
    assert mixer(gate="none", gate_input="residual")(x, t).shape == x.shape  # nothing reads it


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("attend", [decomposed, full])
def test_eager_equals_compiled(attend, grad):
    """One graph, the same output and the same gradients."""
    module, x = mixer(torch.float32, attend=attend), draw(2, 9, 6, HEADS * WIDTH, dtype=torch.float32)
    t = tables(9, 6, 4, True, dtype=torch.float32) if attend is decomposed else FullTableBuilder(WIDTH, LOG_DECAY)(9, 6)
    traced = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.set_grad_enabled(grad):
        found, right = traced(x, t), module(x, t)
    assert found.requires_grad == grad
    assert_close(found, right)
    if grad:
        weights, up = list(module.parameters()), draw(*x.shape, seed=1, dtype=torch.float32)
        for a, b in zip(torch.autograd.grad(found, weights, up), torch.autograd.grad(right, weights, up)):
            assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attend", [decomposed, full])
def test_gradients(attend):
    module = mixer(attend=attend)
    t = tables(3, 4, 2, True) if attend is decomposed else FullTableBuilder(WIDTH, LOG_DECAY).double()(3, 4)
    names = list(dict(module.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, t))

    inputs = draw(1, 3, 4, HEADS * WIDTH).requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
