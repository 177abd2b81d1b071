"""The figures and the table of chapter 5."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated import records
from minigated.experiments.gate_ablation import TABLE
from minigated.plots_vit import (
    POINTS,
    block_figure,
    gates_over_images,
    pairs_figure,
    pyramid_figure,
    question_figure,
    readings_table,
    steps_figure,
)
from minigated.windows import plan_axis


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def words(axis):
    return [text.get_text() for text in axis.texts]


def test_maps_beside_a_picture_share_one_scale_and_say_their_mean():
    maps = {name: torch.tensor([[low, 0.5]]) for name, low in (("a", 0.1), ("b", 0.3), ("c", 0.5))}
    picture, *others = question_figure(torch.zeros(4, 4, 3, dtype=torch.uint8), maps).axes
    assert picture.get_title() == "the picture" and [axis.get_title() for axis in others] == ["a", "b", "c"]
    assert others[0].get_xlabel() == "smallest 0.10, mean 0.30"
    assert {axis.images[0].get_clim() for axis in others} == {(0, 1)}


def test_steps_are_numbered_and_write_every_number():
    first, second, empty = steps_figure({"Q": [[1.0, 0.25], [0.0, -2.0]], "K": [[12.5]]}).axes
    assert (first.get_title(), second.get_title()) == ("1. Q", "2. K")
    assert words(first) == ["1", "0.25", "0", "-2"] and words(second) == ["12.5"]
    shade = [patch.get_facecolor() for patch in first.patches]
    assert shade[2] == shade[3] != shade[1] != shade[0]  # nothing below zero is darker than zero
    assert first.texts[0].get_color() == "white" != first.texts[1].get_color()  # white on dark cells
    assert not empty.axison


def test_the_block_gates_after_the_sum_and_before_the_output():
    axis = block_figure().axes[0]
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    order = ["map, [h, w, C]", "LayerNorm: $u$", "$Q$, $K$", "$Y = Z$ + LCE", "G1", "$W_O$", "+ stream"]
    assert [heights[name] for name in order] == sorted(heights[name] for name in order)
    assert axis.collections[0].get_offsets().tolist() == [[2.0, heights["G1"]]]
    assert heights["$\\sigma(u W_g)$"] == heights["$V$"]  # all three from the same input


def test_a_stage_is_drawn_with_its_windows_and_their_shift():
    still, shifted = plan_axis(8, 4, False), plan_axis(8, 4, True)
    whole = plan_axis(4, 4, False)
    first, second = pyramid_figure({"row": [(still, shifted), (whole, plan_axis(4, 4, True))]}).axes
    assert (first.get_title(), first.get_ylabel()) == ("stage 1: 8²", "row")
    assert (first.get_xlabel(), second.get_xlabel()) == ("4 windows\nof 4²", "1 window\nof 4²")
    solid = {line.get_xdata()[0] for line in first.lines if line.get_linestyle() == "-"} - {0}
    dashed = {line.get_xdata()[0] for line in first.lines if line.get_linestyle() == "--"} - {0}
    assert solid == {4} and dashed == {shifted.shift, shifted.shift + 4}
    assert not second.lines  # one window needs no border, and nothing to shift


def test_pairs_draw_each_seed_thin_and_the_mean_thick():
    losses = {"a": [[4.0, 2.0, 1.0, 1.0], [2.0, 2.0, 3.0, 1.0]]}
    loss, right = pairs_figure(losses, {"a": [[(2, 10.0), (4, 30.0)], [(2, 20.0), (4, 50.0)]]}, every=2).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 1.0], [2.0, 2.0], [2.5, 1.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[10.0, 30.0], [20.0, 50.0], [15.0, 40.0]]
    assert list(loss.lines[0].get_xdata()) == list(right.lines[2].get_xdata()) == [2, 4]
    thin, other, mean = (line.get_linewidth() for line in loss.lines)
    assert thin == other < mean and [text.get_text() for text in loss.get_legend().texts] == ["a"]


def test_covers_grow_as_a_gate_closes():
    images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    gates = torch.tensor([[[0.2, 0.6], [0.4, 0.6]]])
    picture, covered = gates_over_images(images, {"G1": gates}).axes
    assert covered.get_ylabel() == "G1\n0.20 to 0.60"
    assert not picture.patches
    widths = [patch.get_width() for patch in covered.patches]
    assert widths == pytest.approx([4, 0, 2, 0], abs=1e-5)  # a cell is four pixels wide
    corner = covered.patches[0].get_xy()
    assert corner == pytest.approx((-0.5, -0.5), abs=1e-5)  # and pixels begin half a step before their number
    assert covered.patches[2].get_xy() == pytest.approx((0.5, 4.5), abs=1e-5)


def test_the_table_names_arms_that_the_experiment_has():
    named = {arm for *_, arm in POINTS if arm}
    arms = [arm.name for arm in TABLE.arms]
    assert arms[0] == "as it is" and named < set(arms)


def test_the_table_compares_the_same_seeds_and_says_what_was_not_run():
    values = {"as it is": [70.0, 80.0, 90.0], "no LCE": [69.0], "no gate": [68.0, 79.0]}
    rows = [records.row(*row) for row in values.items()]
    table = readings_table({"rows": rows})
    assert "no LCE: -1.00, single run" in table and "no gate: -1.50, 2 seeds" in table
    assert "no decay: not run yet" in table and "not measured" in table
    empty = readings_table(None)
    assert empty.count("not run yet") == sum(bool(arm) for *_, arm in POINTS)
    assert {line.count("|") for line in empty.splitlines()} == {6}
    alone = readings_table({"rows": rows[1:]})  # nothing to compare with
    assert "no LCE: not run yet" in alone
