"""The figures of chapter 4."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated.plots_windows import cost_figure, influence_maps, mask_maps, numbered_maps, reach_figure


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_numbers_stand_in_their_cells_and_groups_share_a_colour():
    numbers, groups = torch.tensor([[5, 6, 4], [9, 10, 8]]), torch.tensor([[0, 0, 1], [0, 0, 1]])
    axis = numbered_maps([numbers], ["rolled"], 2, [groups]).axes[0]
    assert [(t.get_text(), t.get_position()) for t in axis.texts][2] == ("4", (2, 0))
    colours = [patch.get_facecolor() for patch in axis.patches]
    assert colours[0] == colours[1] == colours[3] != colours[2] == colours[5]
    assert axis.get_title() == "rolled"


def test_lines_stand_at_the_borders_of_windows():
    axis = numbered_maps([torch.zeros(4, 6, dtype=torch.long)], ["map"], 2).axes[0]
    upright = sorted(line.get_xdata()[0] for line in axis.lines if line.get_xdata()[0] == line.get_xdata()[1])
    assert upright == [-0.5, 1.5, 3.5, 5.5]
    assert len(axis.lines) == 4 + 3


def test_a_mask_has_a_dot_where_a_cell_may_look():
    mask = torch.tensor([[True, False], [True, True]])
    axis = mask_maps([mask], ["m"], [[7, 4]]).axes[0]
    assert sorted(text.get_position() for text in axis.texts) == [(0, 0), (0, 1), (1, 1)]  # column, row
    assert [label.get_text() for label in axis.get_xticklabels()] == ["7", "4"]


def test_influence_counts_the_cells_that_moved_and_marks_the_changed_one():
    moved = torch.tensor([[0.0, 0.1, 0.0], [0.0, 2.0, 0.0]])
    axis = influence_maps([moved], ["m"], (1, 2)).axes[0]
    assert axis.get_xlabel() == "2 of 6 cells"
    assert axis.collections[-1].get_offsets().tolist() == [[2.0, 1.0]]
    assert axis.images[0].get_array().tolist() == [[0, 1, 0], [0, 1, 0]]  # how much does not matter


def test_reach_is_drawn_in_per_cent():
    axis = reach_figure([1, 2], {"fixed": [0.25, 0.25], "shifted": [0.25, 0.5]}).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[25, 25], [25, 50]]
    assert axis.lines[0].get_marker() != axis.lines[1].get_marker()


def test_costs_have_logarithmic_axes():
    axis = cost_figure([7, 14], {"whole": [4.0, 64.0], "windows": [2.0, 8.0]}).axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axis.get_legend().texts] == ["whole", "windows"]
