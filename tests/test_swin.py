"""Chapter 4: Swin's attention in shifted, padded windows, against three references.

Loops over pairs of cells written from eq. (4.2); timm's WindowAttention with the same weights, where windows divide the
map; the layer itself without windows, on every rectangle between the borders of regions.
"""

import copy
import functools
import math
import shutil

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import minigated.swin as swin
from minigated.errors import InputError
from minigated.swin import SwinAttention, SwinTables
from minigated.torchvision_cpu import prepare_torchvision
from minigated.windows import full_mask, plan_axis

prepare_torchvision()

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}
HEADS, WIDTH = 3, 4
CHANNELS = HEADS * WIDTH
DIVISIBLE = [(8, 8, 4), (14, 14, 7), (4, 8, 4), (8, 12, 4), (6, 3, 3)]  # height, width, window
MAPS = [*DIVISIBLE, (9, 9, 4), (10, 9, 7), (5, 11, 4), (4, 14, 7), (3, 2, 8), (1, 7, 3), (1, 1, 4), (5, 4, 1)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixer(window, dtype=torch.float64, **options):
    module = SwinAttention(CHANNELS, HEADS, window, **options).double()
    for number, weight in enumerate(module.parameters()):
        weight.data.copy_(0.4 * draw(*weight.shape, seed=50 + number))  # at the usual start most bugs cannot be seen
    return module.to(dtype)


def tables(height, width, window, shifted=True, dtype=torch.float64):
    return SwinTables(window, shifted).to(dtype)(height, width)


def borders(side, window, shifted):
    """The regions of one axis as (start, end): worked out from the definition alone."""
    window = min(window, side)
    shift = window // 2 if shifted and side > window else 0
    edges = sorted({0, side, *range(shift, side, window)})
    return list(zip(edges[:-1], edges[1:]))


def rectangles(height, width, window, shifted):
    for top, bottom in borders(height, window, shifted):
        for left, right in borders(width, window, shifted):
            yield slice(top, bottom), slice(left, right)


# ---------------------------------------------------------------------------------------------- the bias
def test_the_offset_of_every_pair_by_hand():
    module = mixer(2)
    table = module.relative_position_bias_table
    table.data = torch.arange(9.0).view(9, 1)  # entry 3 (rows down + 1) + columns right + 1
    assert module.bias(2, 2)[0].tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    assert module.bias(1, 2)[0].tolist() == [[4, 3], [5, 4]]
    assert module.bias(2, 1)[0].tolist() == [[4, 1], [7, 4]]


@pytest.mark.parametrize(("window", "window_h", "window_w"), [(4, 4, 4), (4, 2, 3), (4, 1, 4), (7, 7, 5), (3, 1, 1)])
def test_a_smaller_window_reads_the_same_offsets(window, window_h, window_w):
    module, cells = mixer(window), [(i, j) for i in range(window_h) for j in range(window_w)]
    table = module.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, HEADS)
    rows = [[table[a - c + window - 1, b - d + window - 1] for c, d in cells] for a, b in cells]
    assert torch.equal(module.bias(window_h, window_w), torch.stack([torch.stack(r) for r in rows]).permute(2, 0, 1))


def test_the_index_is_timms():
    from timm.models.swin_transformer import get_relative_position_index

    for window in (1, 2, 4, 7):
        module = SwinAttention(2, 1, window)
        module.relative_position_bias_table.data = torch.arange((2.0 * window - 1) ** 2).view(-1, 1)
        assert torch.equal(module.bias(window, window)[0].long(), get_relative_position_index(window, window))
        if window > 1:
            assert not torch.equal(module.bias(window, window)[0].long().T, get_relative_position_index(window, window))


# ---------------------------------------------------------------------------------------------- against loops
def by_loops(module, x, window, shifted):
    """Eq. (4.2) from one cell to each cell of its region."""
    batch, height, width, _ = x.shape
    q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(3)  # [B, h, w, H, D]
    y, table, side = torch.zeros_like(v), module.relative_position_bias_table, 2 * module.window - 1
    for down, across in rectangles(height, width, window, shifted):
        cells = [(i, j) for i in range(down.start, down.stop) for j in range(across.start, across.stop)]
        for i, j in cells:
            scores = []
            for a, b in cells:
                offset = (i - a + module.window - 1) * side + j - b + module.window - 1
                scores.append((q[:, i, j] * k[:, a, b]).sum(-1) / math.sqrt(WIDTH) + table[offset])
            weights = torch.softmax(torch.stack(scores), 0)  # [cells, B, H]
            y[:, i, j] = sum(w[..., None] * v[:, a, b] for w, (a, b) in zip(weights, cells))
    return module.proj(y.flatten(-2))


LOOPED = [(5, 7, 3), (4, 6, 4), (7, 4, 5), (3, 2, 8), (1, 1, 4)]


@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), LOOPED)
def test_attention_equals_loops_over_pairs(height, width, window, shifted):
    module, x = mixer(window).requires_grad_(False), draw(2, height, width, CHANNELS)
    found = module(x, tables(height, width, window, shifted))
    assert_close(found, by_loops(module, x, window, shifted), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- without windows
def on_rectangles(module, x, window, shifted):
    """The layer as one window over each rectangle between borders: no cut, no roll, no mask, no padding."""
    out = torch.empty_like(x)
    for down, across in rectangles(*x.shape[1:3], window, shifted):
        height, width = down.stop - down.start, across.stop - across.start
        t = SwinTables(None).double()(height, width)
        assert t.mask is None and t.rows.windows == t.columns.windows == 1
        out[:, down, across] = module(x[:, down, across], t)
    return out


@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), MAPS)
def test_windows_are_the_layer_on_every_rectangle(height, width, window, shifted):
    module, x = mixer(window).requires_grad_(False), draw(2, height, width, CHANNELS)
    found = module(x, tables(height, width, window, shifted))
    assert_close(found, on_rectangles(module, x, window, shifted), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- planted bugs
def bias_changed(change):
    """The layer reads another bias; `change` takes and gives [H, N, N]."""

    def plant(module, tables, patch):
        right = module.bias
        module.bias = lambda *window: change(right(*window))
        return tables

    return plant


def mask_changed(change):
    return lambda module, tables, patch: tables._replace(mask=change(tables.mask))


def replaced(**functions):
    """Functions of windows.py that the layer calls, replaced; each is given the right one before its arguments."""

    def plant(module, tables, patch):
        for name, function in functions.items():
            patch.setattr(swin, name, functools.partial(function, getattr(swin, name)))
        return tables

    return plant


def projection_changed(change):
    """`change` takes and gives the three parts of the projection's weights, [3, C, C] or [3, C] for the bias."""

    def plant(module, tables, patch):
        for weight in (module.qkv.weight, module.qkv.bias):
            weight.data = change(weight.data.unflatten(0, (3, -1)).clone()).flatten(0, 1)
        return tables

    return plant


def without_scale(parts):
    parts[0] *= WIDTH**0.5
    return parts


def swapped_offsets(bias):
    side = math.isqrt(bias.shape[-1])
    return bias.unflatten(1, (side, side)).unflatten(3, (side, side)).permute(0, 2, 1, 4, 3).reshape(bias.shape)


def batch_innermost(right, x, *window):
    return right(x, *window).unflatten(0, (len(x), -1)).transpose(0, 1).flatten(0, 1)


def batch_outermost_again(right, windows, height, width):
    return right(windows.unflatten(0, (-1, IMAGES)).transpose(0, 1).flatten(0, 1), height, width)


IMAGES = 3
BUGS = {
    "offsets turned round": bias_changed(lambda bias: bias.mT),
    "rows and columns of an offset swapped": bias_changed(swapped_offsets),
    "heads of the bias reversed": bias_changed(lambda bias: bias.flip(0)),
    "no bias": bias_changed(torch.zeros_like),
    "no mask": mask_changed(lambda mask: None),
    "windows of the mask reversed": mask_changed(lambda mask: mask.flip(0)),
    "a mask in the last window only": mask_changed(lambda mask: torch.cat((mask[:1], mask[:1], mask[:1], mask[3:]))),
    "cells of the mask column by column": mask_changed(lambda mask: swapped_offsets(mask[:, 0])[:, None]),
    "windows in the order of images": replaced(partition=batch_innermost, merge=batch_outermost_again),
    "windows of an image column by column": replaced(
        partition=lambda right, x, h, w: right(x.transpose(1, 2), w, h).transpose(1, 2).contiguous(),
        merge=lambda right, y, h, w: right(y.transpose(1, 2), w, h).transpose(1, 2),
    ),
    "rolled the other way": replaced(
        roll_in=lambda right, x, *axes: x.roll([a.shift for a in axes], (1, 2)),
        roll_out=lambda right, x, *axes: x.roll([-a.shift for a in axes], (1, 2)),
    ),
    "not rolled back": replaced(roll_out=lambda right, x, rows, columns: x),
    "no scale": projection_changed(without_scale),
    "queries and keys exchanged": projection_changed(lambda parts: parts[[1, 0, 2]]),
    "queries and values exchanged": projection_changed(lambda parts: parts[[2, 1, 0]]),
    "heads innermost": projection_changed(lambda p: p.unflatten(1, (WIDTH, HEADS)).transpose(1, 2).flatten(1, 2)),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_seen(bug, monkeypatch):
    """By each reference: loops, timm, and the layer without windows."""
    module, x = mixer(4).requires_grad_(False), draw(IMAGES, 8, 8, CHANNELS)
    t = tables(8, 8, 4)
    references = [f(module, x, 4, True) for f in (by_loops, on_rectangles)]
    references.append(timms(module, 8, 8, 4)._attn(x).detach())
    for right in references:
        assert_close(module(x, t), right, rtol=0, atol=1e-12)
    t = bug(module, t, monkeypatch)
    for right in references:
        assert (module(x, t) - right).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- against timm
def timms(module, height, width, window, shifted=True):
    """A block of timm with our weights; its `_attn` rolls, cuts, attends, puts back and rolls back. float64."""
    from timm.models.swin_transformer import SwinTransformerBlock

    shift = window // 2 if shifted else 0
    block = SwinTransformerBlock(CHANNELS, (height, width), HEADS, window_size=window, shift_size=shift).double()
    block.attn.load_state_dict(module.state_dict(), strict=False)
    return block


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), DIVISIBLE)
def test_attention_is_timms_forward_and_backward(height, width, window, shifted, dtype):
    own, x = mixer(window, dtype), draw(2, height, width, CHANNELS, dtype=dtype).requires_grad_()
    exact, exact_x = copy.deepcopy(own).double(), x.detach().double().requires_grad_()
    theirs = timms(exact, height, width, window, shifted)
    up = draw(2, height, width, CHANNELS, seed=1, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = own(x, tables(height, width, window, shifted, wide))
    right = theirs._attn(exact_x)
    assert found.dtype == dtype
    found.backward(up)
    right.backward(up.double())
    pairs = [(found, right), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for (_, p), (_, q) in zip(named(own), named(theirs.attn), strict=True)]
    for a, b in pairs:
        scale = max(1.0, b.abs().max().item())
        assert_close(a.double() / scale, b / scale, rtol=0, atol=TOLERANCE[dtype])


def named(module):
    return sorted(module.named_parameters())


# ---------------------------------------------------------------------------------------------- who is reached
def reached(module, x, cell, t):
    """Where the output changes when one cell is moved by noise (a constant would vanish in a norm). Bool [h, w]."""
    moved = x.clone()
    moved[0, cell[0], cell[1]] += draw(CHANNELS, seed=9)
    return (module(moved, t) - module(x, t)).abs().amax(-1)[0] > 1e-9


def its_region(cell, height, width, window, shifted):
    expected = torch.zeros(height, width, dtype=torch.bool)
    for down, across in rectangles(height, width, window, shifted):
        if down.start <= cell[0] < down.stop and across.start <= cell[1] < across.stop:
            expected[down, across] = True
    return expected


def rolled_then_padded(right, x, rows, columns):
    x = x.roll((-rows.shift, -columns.shift), (1, 2))
    return nn.functional.pad(x, (0, 0, 0, columns.padding, 0, rows.padding))


def cut_then_rolled_back(right, x, rows, columns):
    return x[:, : rows.side, : columns.side].roll((rows.shift, columns.shift), (1, 2))


@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), [(9, 9, 4), (5, 7, 3), (3, 9, 4)])
def test_a_cell_reaches_its_region_and_nothing_else(height, width, window, shifted):
    module, t, x = mixer(window), tables(height, width, window, shifted), draw(1, height, width, CHANNELS)
    for cell in [(0, 0), (1, 3), (height // 2, width // 2), (height - 1, 2), (height - 1, width - 1)]:
        assert torch.equal(reached(module, x, cell, t), its_region(cell, height, width, window, shifted)), cell


def test_the_region_of_a_corner_by_hand():
    module, x = mixer(4), draw(1, 9, 9, CHANNELS)
    still, shifted = (reached(module, x, (8, 0), tables(9, 9, 4, s)).nonzero().tolist() for s in (False, True))
    assert still == [[8, 0], [8, 1], [8, 2], [8, 3]]  # the last row has a window to itself, padded
    assert shifted == [[6, 0], [6, 1], [7, 0], [7, 1], [8, 0], [8, 1]]


LEAKS = {
    "padded after the roll": replaced(roll_in=rolled_then_padded, roll_out=cut_then_rolled_back),
    "no mask": mask_changed(lambda mask: None),
    "masked by rows only": lambda module, t, patch: t._replace(mask=one_axis(t.rows, plan_axis(11, 4))),
    "masked by columns only": lambda module, t, patch: t._replace(mask=one_axis(plan_axis(11, 4), t.columns)),
    "more masked than must be": mask_changed(
        lambda mask: mask.masked_fill(~torch.eye(16, dtype=torch.bool).expand_as(mask), -torch.inf)
    ),
}


def one_axis(rows, columns):
    allowed = full_mask(rows, columns).unsqueeze(1)
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_leak_is_seen(leak, monkeypatch):
    module, x, cells = mixer(4), draw(1, 11, 11, CHANNELS), [(0, 0), (0, 10), (10, 0), (10, 10), (4, 4)]
    t = leak(module, tables(11, 11, 4), monkeypatch)
    assert not all(torch.equal(reached(module, x, cell, t), its_region(cell, 11, 11, 4, True)) for cell in cells)


def padded_with_garbage(right, x, rows, columns):
    padding = right(torch.ones_like(x), rows, columns) == 0
    return torch.where(padding, 10 * draw(*padding.shape, seed=9), right(x, rows, columns))


@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
def test_nobody_looks_at_padding(shifted, monkeypatch):
    module, x, t = mixer(4), draw(2, 9, 11, CHANNELS), tables(9, 11, 4, shifted)
    still = module(x, t)
    replaced(roll_in=padded_with_garbage)(module, t, monkeypatch)
    assert torch.equal(module(x, t), still)
    assert (module(x, t._replace(mask=None)) - still).abs().max() > 0.05
    monkeypatch.setattr("minigated.windows.region_ids", lambda axis: torch.zeros(axis.padded, dtype=torch.long))
    assert (module(x, tables(9, 11, 4, shifted)) - still).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- shapes and precision
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize(("height", "width", "window"), [*MAPS, (8, 4, 4), (4, 9, 4), (9, 4, 4)])
def test_one_image_and_views_give_what_a_batch_gives(height, width, window, shifted):
    """With one image and one row of windows the cut needs no copy, and memory stays in the order of the map."""
    module, x, t = mixer(window), draw(3, height, width, CHANNELS), tables(height, width, window, shifted)
    together = module(x, t)
    for image in range(3):
        assert_close(module(x[image : image + 1], t), together[image : image + 1], rtol=0, atol=1e-12)
    channels_first = x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert_close(module(channels_first, t), together, rtol=0, atol=1e-12)
    assert x.equal(draw(3, height, width, CHANNELS)), "the input stays as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width", "window"), [(9, 7, 4), (10, 10, 7), (1, 1, 4)])
def test_low_precision_with_padding_stays_near(height, width, window, dtype):
    module, x = mixer(window, dtype), draw(2, height, width, CHANNELS, dtype=dtype)
    found = module(x, tables(height, width, window, dtype=dtype))
    exact = module.double()(x.double(), tables(height, width, window))
    assert found.dtype == dtype
    scale = max(1.0, exact.abs().max().item())
    assert_close(found.double() / scale, exact / scale, rtol=0, atol=TOLERANCE[dtype])
    rough = mixer(window, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = rough(x.float(), tables(height, width, window, dtype=torch.float32))
    assert found.dtype == torch.bfloat16
    assert_close(found.double() / scale, exact / scale, rtol=0, atol=TOLERANCE[torch.bfloat16])


def test_gradients():
    module, t = mixer(2), tables(3, 4, 2)
    names = list(dict(module.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights)), (x, t))

    inputs = draw(1, 3, 4, CHANNELS).requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_the_probe_is_told_what_goes_into_the_projection():
    module, x, told = mixer(3), draw(2, 5, 7, CHANNELS), {}
    y = module(x, tables(5, 7, 3), probe=told.__setitem__)
    assert list(told) == ["attended"] and told["attended"].shape == x.shape
    assert_close(module.proj(told["attended"]), y, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_traces_as_one_graph(grad):
    module, x = mixer(4, torch.float32), draw(2, 5, 7, CHANNELS, dtype=torch.float32)
    t = tables(5, 7, 4, dtype=torch.float32)
    traced = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.set_grad_enabled(grad):
        found, right = traced(x, t), module(x, t)
    assert found.requires_grad == grad
    assert_close(found, right, rtol=0, atol=2e-5)
    if grad:
        weights, up = list(module.parameters()), draw(*x.shape, seed=1, dtype=torch.float32)
        for a, b in zip(torch.autograd.grad(found, weights, up), torch.autograd.grad(right, weights, up)):
            assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiles_without_gradients():
    """The mode in which torch's compiler replaces attention by kernels of its own; masked and padded windows."""
    module, x = mixer(4, torch.float32), draw(2, 5, 7, CHANNELS, dtype=torch.float32)
    t = tables(5, 7, 4, dtype=torch.float32)
    with torch.no_grad():
        found = torch.compile(module, fullgraph=True, dynamic=False)(x, t)
        assert_close(found, module(x, t), rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------------------- tables
def test_tables_hold_the_mask_of_the_size_that_is_asked_for():
    builder = SwinTables(4, True, size=(8, 8))
    assert builder(8, 8).mask is builder(8, 8).mask, "built once a size"
    for height, width in [(8, 12), (4, 4), (9, 9), (4, 4), (8, 8), (3, 14)]:
        rows, columns, mask = builder(height, width)
        assert (rows, columns) == (plan_axis(height, 4, True), plan_axis(width, 4, True))
        allowed = full_mask(rows, columns)
        if mask is None:
            assert allowed.all()
        else:
            assert torch.equal(mask[:, 0] == 0, allowed) and torch.equal(mask[:, 0] == -torch.inf, ~allowed)
    assert SwinTables(4, False)(8, 8).mask is None and SwinTables(4, False)(9, 8).mask is not None
    assert SwinTables(None, True)(9, 5).mask is None
    assert not builder.state_dict() and not list(builder.parameters())


def test_tables_follow_the_model_and_keep_their_precision():
    builder = SwinTables(4, True, size=(8, 8))
    assert builder.bfloat16()(8, 8).mask.dtype == torch.float32
    assert builder.double()(8, 8).mask.dtype == torch.float64
    with torch.device("meta"):
        builder = SwinTables(4, True, size=(8, 8))
    assert torch.equal(builder.to_empty(device="cpu")(8, 8).mask, SwinTables(4, True)(8, 8).mask)


# ---------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: SwinAttention(10, 4, 7), "10 channels cannot be split into 4 heads evenly"),
        (lambda: SwinAttention(8, 0, 7), "8 channels cannot be split into 0 heads"),
        (lambda: SwinAttention(8, 2, 0), "window 0; accepted: 1 or more"),
        (lambda: SwinAttention(8, 2, None), "window None"),
        (lambda: SwinTables(0)(4, 4), "window 0"),
        (lambda: SwinTables(4)(0, 4), "an axis of 0 cells"),
        (lambda: SwinTables(4, size=(4, 0)), "an axis of 0 cells"),
        # entries of other offsets would be read, and nothing would stop it
        (lambda: mixer(4)(draw(1, 1, 8, CHANNELS), tables(1, 8, None)), "1 x 8 cells; accepted: sides up to 4"),
        (lambda: mixer(4)(draw(1, 8, 8, CHANNELS), tables(8, 8, 8)), "8 x 8 cells; accepted: sides up to 4"),
    ],
)
def test_wrong_sizes_are_refused(call, said):
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)
