"""Chapter 4: windows cut and put back, the shift, the plan of an axis, and who may look at whom afterwards.

References are slices and loops over cells written from the definitions; timm's Swin is a second opinion where the
windows divide the map (where they do not, it rolls before it pads). Each comparison has twins with a planted bug.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minigated.decay import rmt_log_decay
from minigated.decay_passes import axis_pass
from minigated.errors import InputError
from minigated.layers import DepthwiseConv
from minigated.retention import Retention, WindowTableBuilder, forbidden
from minigated.swat import SwatAttention, lce_in_windows, lce_on_map
from minigated.swat_tables import SwatTableBuilder, SwatTables
from minigated.torchvision_cpu import prepare_torchvision
from minigated.windows import (
    Axis,
    axis_mask,
    full_mask,
    merge,
    partition,
    plan_axis,
    region_ids,
    roll_in,
    roll_out,
    swin_region_ids,
)

prepare_torchvision()

EXACT = {"rtol": 0, "atol": 1e-12}
MAPS = [(8, 8, 4), (14, 14, 7), (8, 12, 4), (12, 6, 3), (4, 14, 7), (9, 9, 4), (10, 10, 7), (5, 11, 4), (3, 7, 2)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plans(height, width, window, shifted=True):
    return plan_axis(height, window, shifted), plan_axis(width, window, shifted)


def places(height, width):
    """A map whose cells hold their own row and column, counted from 1: padding is 0. [1, h, w, 2]."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)[None] + 1


# ---------------------------------------------------------------------------------------------- cut and put back
def cut_by_slices(x, window_h, window_w):
    return torch.stack([
        image[top : top + window_h, left : left + window_w]
        for image in x
        for top in range(0, x.shape[1], window_h)
        for left in range(0, x.shape[2], window_w)
    ])  # fmt: skip


def cut_in_order(*order):
    """A cut with its six axes [B, nh, Wh, nw, Ww, C] in another order."""

    def cut(x, window_h, window_w):
        split = x.unflatten(2, (-1, window_w)).unflatten(1, (-1, window_h))
        return split.permute(order).reshape(-1, window_h, window_w, x.shape[-1])

    return cut


WRONG_CUTS = {
    "runs of cells instead of squares": cut_in_order(0, 1, 2, 3, 4, 5),
    "the batch innermost": cut_in_order(1, 3, 0, 2, 4, 5),
    "windows counted column by column": cut_in_order(0, 3, 1, 2, 4, 5),
    "rows and columns swapped inside a window": cut_in_order(0, 1, 3, 4, 2, 5),
    "sides of the window swapped": lambda x, window_h, window_w: cut_by_slices(x, window_w, window_h),
}
CUTS = [(2, 6, 4, 3, 2), (1, 4, 9, 2, 3), (3, 5, 5, 5, 1), (2, 1, 6, 1, 6), (1, 1, 1, 1, 1)]  # B, h, w, Wh, Ww


@pytest.mark.parametrize(("batch", "height", "width", "window_h", "window_w"), CUTS)
def test_windows_are_slices_row_by_row_and_images_outermost(batch, height, width, window_h, window_w):
    x = draw(batch, height, width, 3)
    windows = partition(x, window_h, window_w)
    assert torch.equal(windows, cut_by_slices(x, window_h, window_w))
    assert torch.equal(merge(windows, height, width), x)


def test_the_frame_of_the_wrong_cuts_is_right():
    x = draw(2, 6, 4, 3)
    assert torch.equal(cut_in_order(0, 1, 3, 2, 4, 5)(x, 3, 2), cut_by_slices(x, 3, 2))


@pytest.mark.parametrize("wrong", WRONG_CUTS.values(), ids=WRONG_CUTS)
def test_a_wrong_cut_is_seen(wrong):
    x = draw(2, 12, 24, 3)
    found, right = wrong(x, 3, 4), cut_by_slices(x, 3, 4)
    assert found.shape != right.shape or not torch.equal(found, right)


@pytest.mark.parametrize("wrong", list(WRONG_CUTS.values())[:-1], ids=list(WRONG_CUTS)[:-1])
def test_a_wrong_cut_is_not_put_back(wrong):
    x = draw(2, 12, 24, 3)
    assert not torch.equal(merge(wrong(x, 3, 4), 12, 24), x)
    assert not torch.equal(merge(partition(x, 3, 4), 24, 12).reshape(x.shape), x)  # height and width swapped


def test_the_order_of_windows_by_hand():
    x = torch.arange(2 * 2 * 4).view(2, 2, 4, 1)  # image 0: 0 1 2 3 / 4 5 6 7
    assert partition(x, 2, 2)[:, :, :, 0].tolist() == [
        [[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [12, 13]], [[10, 11], [14, 15]],
    ]  # fmt: skip
    assert partition(x, 1, 4).flatten(1).tolist() == x.view(4, 4).tolist()


def test_gradients_go_through_the_cut_and_back():
    x, up = draw(2, 4, 6, 3).requires_grad_(), draw(2, 4, 6, 3, seed=1)
    merge(partition(x, 2, 3), 4, 6).backward(up)
    assert torch.equal(x.grad, up)


# ---------------------------------------------------------------------------------------------- the shift
def rolled_by_index(x, rows, columns):
    """Cell (i, j) of the shifted map is cell (i + shift, j + shift) of the padded one, counted round."""
    out = x.new_zeros(x.shape[0], rows.padded, columns.padded, *x.shape[3:])
    for i in range(rows.padded):
        for j in range(columns.padded):
            row, column = (i + rows.shift) % rows.padded, (j + columns.shift) % columns.padded
            if row < rows.side and column < columns.side:
                out[:, i, j] = x[:, row, column]
    return out


def padded_last(x, rows, columns):
    """The planted bug of this field: roll the map, then pad it."""
    x = torch.roll(x, (-rows.shift, -columns.shift), (1, 2))
    return F.pad(x, (0, 0) * (x.ndim - 3) + (0, columns.padding, 0, rows.padding))


WRONG_ROLLS = {
    "padded after the roll": padded_last,
    "rolled the other way": lambda x, rows, columns: roll_in(x, turned(rows), turned(columns)),
    "shifts of the axes swapped": lambda x, rows, columns: roll_in(x, other(rows, columns), other(columns, rows)),
}


def turned(axis):
    return Axis(axis.side, axis.window, -axis.shift, axis.padding)


def other(axis, neighbour):
    return Axis(axis.side, axis.window, neighbour.shift, axis.padding)


@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
@pytest.mark.parametrize("more", [(3,), (3, 2, 4), (2, 5)], ids=str)
@pytest.mark.parametrize(("height", "width", "window"), MAPS)
def test_a_map_rolled_in_is_indexed_round_and_comes_back(height, width, window, more, shifted):
    axes, x = plans(height, width, window, shifted), draw(2, height, width, *more)
    found = roll_in(x, *axes)
    assert torch.equal(found, rolled_by_index(x, *axes))
    assert torch.equal(roll_out(found, *axes), x)


def joined_only_if_neighbours(roll, height, width, window):
    """Whether cells that the mask lets meet lie as far apart in their window as they did on the map."""
    rows, columns = plans(height, width, window)
    cut = partition(roll(places(height, width), rows, columns), rows.window, columns.window).flatten(1, 2)
    here = places(rows.window, columns.window).flatten(1, 2)[0]  # [N, 2]
    before, after = (t[..., :, None, :] - t[..., None, :, :] for t in (cut, here))
    real = (cut > 0).all(-1)
    meet = full_mask(rows, columns) & real[:, :, None] & real[:, None, :]
    padded = full_mask(rows, columns) & real[:, :, None] & ~real[:, None, :]
    return bool((before == after).all(-1)[meet].all()) and not padded.any()


@pytest.mark.parametrize(("height", "width", "window"), MAPS)
def test_the_mask_joins_only_neighbours(height, width, window):
    assert joined_only_if_neighbours(roll_in, height, width, window)


@pytest.mark.parametrize("wrong", WRONG_ROLLS.values(), ids=WRONG_ROLLS)
def test_a_wrong_roll_is_seen(wrong):
    maps = [(9, 7, 5), (4, 14, 7)]  # padding and a shift on both axes; no padding, and a shift on one axis only
    assert not all(joined_only_if_neighbours(wrong, *sizes) for sizes in maps)
    axes = [plans(*sizes) for sizes in maps]
    pairs = [(wrong(x, *a), rolled_by_index(x, *a)) for a in axes for x in [draw(1, a[0].side, a[1].side, 3)]]
    assert not all(torch.equal(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------- the plan of an axis
def timm_block(height, width, window, shifted=True):
    from timm.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(8, (height, width), 2, window_size=window, shift_size=window // 2 if shifted else 0)


@pytest.mark.parametrize(
    ("sides", "window", "windows", "shifts"),
    [
        ((8, 4, 2, 1), 4, (4, 4, 2, 1), (2, 0, 0, 0)),
        ((32, 16, 8, 4), 8, (8, 8, 8, 4), (4, 4, 0, 0)),
        ((16, 8, 4, 2), 4, (4, 4, 4, 2), (2, 2, 0, 0)),
        ((56, 28, 14, 7), 7, (7, 7, 7, 7), (3, 3, 3, 0)),
        ((8, 4, 2, 1), 7, (7, 4, 2, 1), (3, 0, 0, 0)),
    ],
)
def test_windows_of_the_usual_maps(sides, window, windows, shifts):
    axes = [plan_axis(side, window, True) for side in sides]
    assert tuple(a.window for a in axes) == windows and tuple(a.shift for a in axes) == shifts
    for axis in axes:
        block = timm_block(axis.side, axis.side, window)
        assert (block.window_size, block.shift_size) == ((axis.window,) * 2, (axis.shift,) * 2)


def test_every_axis_is_planned_on_its_own():
    rows, columns = plans(4, 14, 7)
    assert (rows, columns) == (Axis(4, 4, 0, 0), Axis(14, 7, 3, 0))  # one rule for both would forbid the shift
    assert plans(9, 3, 4) == (Axis(9, 4, 2, 3), Axis(3, 3, 0, 0))
    assert plans(9, 3, 4, False) == (Axis(9, 4, 0, 3), Axis(3, 3, 0, 0))
    assert plan_axis(9, None, True) == plan_axis(9, 20, True) == Axis(9, 9, 0, 0)
    assert plan_axis(5, 1, True) == Axis(5, 1, 0, 0)


SMALL = list(itertools.product(range(1, 21), [*range(1, 9), None], [False, True]))  # side, window, shifted


def test_plans_of_all_small_axes():
    for side, window, shifted in SMALL:
        axis = plan_axis(side, window, shifted)
        assert axis.window == (side if window is None else min(side, window))
        assert axis.shift == (axis.window // 2 if shifted and axis.window < side else 0)
        assert axis.padded == axis.windows * axis.window and side <= axis.padded < side + axis.window


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plan_axis(0, 4), "an axis of 0 cells; accepted: 1 or more"),
        (lambda: plan_axis(8, 0), "window 0; accepted: 1 or more, or None for the whole axis"),
        (lambda: plan_axis(8, -2), "window -2"),
        (lambda: plan_axis(9, 4, pad=False), "9 cells cannot be cut into windows of 4"),
        (lambda: partition(draw(1, 8, 9, 2), 4, 4), "a map of 8 x 9 cells cannot be cut into windows of 4 x 4"),
        (lambda: partition(draw(1, 9, 8, 2), 4, 4), "a map of 9 x 8 cells"),
        (lambda: partition(draw(1, 4, 4, 2), 0, 4), "windows of 0 x 4"),
        (lambda: merge(draw(4, 4, 4, 2), 8, 9), "do not make up maps of 8 x 9 cells"),
        (lambda: merge(draw(3, 4, 4, 2), 8, 8), r"windows [3, 4, 4, 2] do not make up maps of 8 x 8 cells"),
    ],
)
def test_wrong_sizes_are_refused(call, said):
    with pytest.raises(InputError) as refused:
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert plan_axis(8, 4, pad=False).padding == 0


# ---------------------------------------------------------------------------------------------- who may look at whom
def test_the_4_by_4_map_by_hand():
    """Chapter 4 prints these: windows of 2, shifted by 1. Cell 1 stands first, cell 0 was brought round to the end."""
    rows, columns = plans(4, 4, 2)
    assert roll_in(torch.arange(16).view(1, 4, 4, 1), rows, columns)[0, :, :, 0].tolist() == [
        [5, 6, 7, 4], [9, 10, 11, 8], [13, 14, 15, 12], [1, 2, 3, 0],
    ]  # fmt: skip
    assert region_ids(rows).tolist() == [0, 0, 0, 1]
    assert swin_region_ids(rows, columns).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [3, 3, 3, 4]]
    yes, no = [[True] * 2] * 2, [[True, False], [False, True]]
    assert axis_mask(rows).tolist() == [yes, no]
    left, right = "xx.. xx.. ..xx ..xx", "x.x. .x.x x.x. .x.x"
    all_, none = "xxxx " * 4, "x... .x.. ..x. ...x"  # the last window holds the four corners of the map
    assert full_mask(rows, columns).flatten(1).tolist() == [
        [c == "x" for c in window.replace(" ", "")] for window in (all_, right, left, none)
    ]


def test_padding_is_a_region_by_hand():
    rows, columns = plan_axis(3, 2, True), plan_axis(3, 2)
    assert region_ids(rows).tolist() == [0, 0, 2, 1] and region_ids(columns).tolist() == [0, 0, 0, 2]
    assert swin_region_ids(rows, columns).tolist() == [[0, 0, 0, 2], [0, 0, 0, 2], [6, 6, 6, 8], [3, 3, 3, 5]]


def mask_by_neighbours(axis):
    """Two cells of a window may meet if every step between them was a step between neighbours before the roll."""
    before = [(place + axis.shift) % axis.padded for place in range(axis.padded)]
    real = [cell < axis.side for cell in before]
    joined = [before[i + 1] == before[i] + 1 and real[i + 1] == real[i] for i in range(axis.padded - 1)]
    cells = range(axis.window)
    return [
        [[all(joined[start + min(i, j) : start + max(i, j)]) for j in cells] for i in cells]
        for start in range(0, axis.padded, axis.window)
    ]


def test_masks_of_all_small_axes():
    for sizes in SMALL:
        axis = plan_axis(*sizes)
        mask = axis_mask(axis)
        assert mask.tolist() == mask_by_neighbours(axis), sizes
        assert mask.any(-1).all() and mask.diagonal(dim1=1, dim2=2).all(), sizes  # a softmax over nothing is NaN


WRONG_IDS = {
    "nothing is kept apart": lambda axis: torch.zeros(axis.padded, dtype=torch.long),
    "padding not told from the map": lambda axis: (torch.arange(axis.padded) >= axis.padded - axis.shift).long(),
    "the last window cut at its shift from the left": lambda axis: torch.where(
        region_ids(axis) < 2, (torch.arange(axis.padded) >= axis.padded - axis.window + axis.shift).long(), 2
    ),
    "ids in the order before the roll": lambda axis: region_ids(axis).roll(axis.shift),
    "ids of an axis without padding": lambda axis: torch.where(
        torch.arange(axis.padded) + axis.shift >= axis.side, 1, 0
    ),
}


@pytest.mark.parametrize("wrong", WRONG_IDS.values(), ids=WRONG_IDS)
def test_wrong_ids_are_seen(wrong, monkeypatch):
    monkeypatch.setattr("minigated.windows.region_ids", wrong)
    with pytest.raises(AssertionError):
        test_masks_of_all_small_axes()


def swins_mask(height, width, window):
    """Swin's way to its mask: paint three slices an axis, cut the painting, compare. Windows divide the map."""
    rows, columns = plans(height, width, window)
    slices = lambda a: [slice(0, -a.window), slice(-a.window, -a.shift or None), slice(-a.shift, None)]
    paint = torch.zeros(1, height, width, 1)
    for number, (down, across) in enumerate(itertools.product(slices(rows), slices(columns))):
        paint[:, down, across] = number
    cells = partition(paint, rows.window, columns.window).flatten(1)
    return cells[:, :, None] == cells[:, None, :]


DIVISIBLE = [(8, 8, 4), (14, 14, 7), (8, 12, 4), (12, 6, 3), (4, 14, 7), (14, 7, 7), (4, 4, 2), (10, 5, 5)]


@pytest.mark.parametrize(("height", "width", "window"), DIVISIBLE)
def test_the_full_mask_is_swins(height, width, window):
    mask = full_mask(*plans(height, width, window))
    assert torch.equal(mask, swins_mask(height, width, window))
    assert torch.equal(mask, timm_block(height, width, window).attn_mask == 0)


def joined(both):
    """[nh, nw, Wh, Ww, Wh, Ww] -> [windows, N, N]."""
    return both.flatten(4, 5).flatten(2, 3).flatten(0, 1)


DOWN = lambda axis: axis_mask(axis)[:, None, :, None, :, None]
ACROSS = lambda axis: axis_mask(axis)[None, :, None, :, None, :]
WRONG_MASKS = {
    "one axis is enough": lambda rows, columns: joined(DOWN(rows) | ACROSS(columns)),
    "rows only": lambda rows, columns: joined(DOWN(rows) & ACROSS(columns)[:, :1].expand_as(ACROSS(columns))),
    "columns only": lambda rows, columns: joined(DOWN(rows)[:1].expand_as(DOWN(rows)) & ACROSS(columns)),
    "windows column by column": lambda rows, columns: joined((DOWN(rows) & ACROSS(columns)).transpose(0, 1)),
    "cells column by column": lambda rows, columns: joined((DOWN(rows) & ACROSS(columns)).permute(0, 1, 3, 2, 5, 4)),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_a_wrong_full_mask_is_seen(wrong):
    found, right = wrong(*plans(8, 12, 4)), swins_mask(8, 12, 4)
    assert found.shape == right.shape and not torch.equal(found, right)
    assert torch.equal(joined(DOWN(plan_axis(8, 4, True)) & ACROSS(plan_axis(12, 4, True))), right)


# ---------------------------------------------------------------------------------------------- passes along one axis
HEADS, WIDTH = 2, 4
LOG_DECAY = rmt_log_decay(HEADS, dtype=torch.float64)
AXES = [
    (8, 4, True),
    (8, 4, False),
    (9, 4, True),
    (9, 4, False),
    (11, 5, True),
    (7, 7, True),
    (3, 5, True),
    (1, 4, True),
]


def stretches(axis):
    """What lies between the borders of regions, worked out from the plan's numbers alone."""
    borders = sorted({0, axis.side, *range(axis.shift, axis.side, axis.window)})
    return [slice(a, b) for a, b in zip(borders, borders[1:])]


def pass_in_windows(qkv, axis, along, form="matmul", mask=None, garbage=0.0):
    """A pass in shifted, padded windows on maps [B, h, w, H, D]; `garbage` is what the padding holds."""
    still = plan_axis(qkv[0].shape[3 - along], None)
    axes = (axis, still) if along == 1 else (still, axis)
    padding = roll_in(torch.ones_like(qkv[0]), *axes) == 0
    rolled = [torch.where(padding, garbage * draw(*padding.shape, seed=9), roll_in(x, *axes)) for x in qkv]
    mask = forbidden(axis, dtype=torch.float64) if mask is None else mask
    return roll_out(axis_pass(*rolled, masked_decay(axis.window, mask), along, axis.window, form), *axes)


def masked_decay(cells, mask=0.0):
    apart = torch.arange(cells)[:, None] - torch.arange(cells)
    return LOG_DECAY[:, None, None] * apart.abs() + mask


def pass_on_stretches(qkv, axis, along):
    """The unwindowed pass on each stretch for itself."""
    out = torch.empty_like(qkv[2])
    for cells in stretches(axis):
        at = (slice(None), cells) if along == 1 else (slice(None), slice(None), cells)
        out[at] = axis_pass(*(x[at] for x in qkv), masked_decay(cells.stop - cells.start), along)
    return out


def maps_for(axis, along):
    sides = (axis.side, 3) if along == 1 else (3, axis.side)
    return [draw(2, *sides, HEADS, WIDTH, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("form", ["matmul", "pointwise"])
@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("sizes", AXES, ids=str)
def test_a_pass_in_windows_is_the_unwindowed_pass_between_borders(sizes, along, form):
    axis = plan_axis(*sizes)
    qkv = maps_for(axis, along)
    right = pass_on_stretches(qkv, axis, along)
    assert_close(pass_in_windows(qkv, axis, along, form), right, **EXACT)
    assert_close(pass_in_windows(qkv, axis, along, form, garbage=50.0), right, **EXACT)  # padding is not looked at


@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize(
    "spoil",
    [lambda m: m[:1], lambda m: m.flip(0), lambda m: m.flip(2, 3), lambda m: m.roll(1, 0)],
    ids=["no mask", "windows in reverse", "cells in reverse", "masks of the next window"],
)
def test_a_wrong_mask_of_a_pass_is_seen(spoil, along):
    axis = plan_axis(11, 5, True)
    qkv = maps_for(axis, along)
    found = pass_in_windows(qkv, axis, along, mask=spoil(forbidden(axis, dtype=torch.float64)))
    assert (found - pass_on_stretches(qkv, axis, along)).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- in whole layers
def layer(kind, window, shifted=True):
    """A mixer with large random weights and its tables, in float64."""
    torch.manual_seed(0)
    if kind == "retention":
        module = Retention(HEADS * WIDTH, HEADS)
        tables = WindowTableBuilder(WIDTH, LOG_DECAY, window, shifted)
    else:
        module = SwatAttention(HEADS * WIDTH, HEADS)
        tables = SwatTableBuilder(HEADS, WIDTH, LOG_DECAY, window, shifted)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return module.double(), tables.double()


@pytest.mark.parametrize("kind", ["retention", "swat"])
@pytest.mark.parametrize(("height", "width", "window"), [(7, 7, 7), (5, 7, 7), (4, 4, 9), (1, 6, 6), (1, 1, 4)])
def test_one_window_over_the_map_is_the_unwindowed_layer(kind, height, width, window):
    x = draw(2, height, width, HEADS * WIDTH)
    (module, windowed), (_, whole) = layer(kind, window), layer(kind, None)
    assert torch.equal(module(x, windowed(height, width)), module(x, whole(height, width)))
    if height > 1:
        assert (module(x, layer(kind, 3)[1](height, width)) - module(x, whole(height, width))).abs().max() > 0.01


def padded_with_garbage(x, rows, columns):
    padding = roll_in(torch.ones_like(x), rows, columns) == 0
    return torch.where(padding, 10 * draw(*padding.shape, seed=9), roll_in(x, rows, columns))


def padding_seen_along(*sides):
    """Region ids that tell padding from the map on no axis of these sides."""
    return lambda axis: WRONG_IDS["padding not told from the map"](axis) if axis.side in sides else region_ids(axis)


@pytest.mark.parametrize("kind", ["retention", "swat"])
@pytest.mark.parametrize("shifted", [False, True], ids=["still", "shifted"])
def test_no_pass_looks_at_padding(kind, shifted, monkeypatch):
    x = draw(2, 9, 11, HEADS * WIDTH)  # with a padding as wide as the shift a border would lie there anyway
    module, builder = layer(kind, 4, shifted)
    still = module(x, builder(9, 11))
    monkeypatch.setattr(f"minigated.{kind}.roll_in", padded_with_garbage)
    assert torch.equal(module(x, builder(9, 11)), still)
    for sides in [(9,), (11,), (9, 11)]:  # the height pass, the width pass, both
        monkeypatch.setattr("minigated.windows.region_ids", padding_seen_along(*sides))
        assert (module(x, layer(kind, 4, shifted)[1](9, 11)) - still).abs().max() > 0.05, sides


def test_a_convolution_in_windows_or_on_the_rolled_map_is_another():
    """The share of cells it changes is the share that lies within two cells of a border of windows."""
    conv, shares = DepthwiseConv(3, 5).double(), {}
    for side, window, shifted in [(14, 7, False), (8, 4, False), (7, 7, True), (14, 7, True)]:
        x, (rows, columns) = draw(1, side, side, 3), plans(side, side, window, shifted)
        right = F.conv2d(x.movedim(-1, 1), conv.conv.weight, conv.conv.bias, padding=2, groups=3).movedim(1, -1)
        tables = SwatTables(rows, columns, *[None] * 6)
        assert_close(lce_on_map(conv, x, tables), right, **EXACT)
        rolled = roll_out(conv(roll_in(x, rows, columns)), rows, columns)
        for name, found in [("windows", lce_in_windows(conv, x, tables)), ("rolled", rolled)]:
            shares[name, side, shifted] = ((found - right).abs().amax(-1) > 1e-9).double().mean().item()
    assert shares["windows", 14, False] == 1 - (10 / 14) ** 2 and shares["windows", 8, False] == 0.75
    assert shares["windows", 7, True] == shares["rolled", 7, True] == shares["rolled", 14, False] == 0
    assert shares["rolled", 14, True] == 0.75  # rows 0-4, 12 and 13, and the same columns
