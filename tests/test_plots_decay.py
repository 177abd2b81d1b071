"""The figures of chapter 3."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated.plots_decay import (
    around_figure,
    distance_table,
    fading_figure,
    filled_figure,
    likeness_figure,
    looks_figure,
    rate_figure,
    rotation_figure,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def words(axis):
    return [text.get_text() for text in axis.texts]


def cross(axis):
    """(x, y) of the cross that marks a cell."""
    (place,) = {tuple(marks.get_offsets().tolist()[0]) for marks in axis.collections}
    return place


def test_a_line_ends_with_the_present_and_a_diamond_stands_around_the_cell():
    figure = around_figure([0.25, 0.5, 1.0], {"a": torch.rand(5, 7), "b": torch.rand(5, 7)}, (1, 4), 2)
    line, first, second = figure.axes
    assert words(line) == [".25", ".50", "1"]
    assert (first.get_title(), second.get_title()) == ("a", "b")
    assert cross(first) == (4, 1)  # x is the column
    (diamond,) = first.lines
    assert set(zip(diamond.get_xdata(), diamond.get_ydata())) == {(2, 1), (4, -1), (6, 1), (4, 3)}


def test_a_dot_stands_where_half_is_left():
    axis = fading_figure({"slow": [0.5**0.25, 0.5**0.01], "fast": [0.5]}, farthest=8).axes[0]
    dots = [line for line in axis.lines if len(line.get_xdata()) == 1]
    assert [list(dot.get_xdata()) for dot in dots] == [[pytest.approx(4)], [pytest.approx(1)]]  # not at 100, unseen
    assert [text.get_text() for text in axis.get_legend().texts] == ["slow", "fast"]  # once for all heads of a group
    curves = [list(line.get_ydata()) for line in axis.lines if len(line.get_xdata()) == 9]
    assert len(curves) == 3 and curves[2] == [0.5**d for d in range(9)]
    assert axis.lines[0].get_color() == dots[0].get_color() != dots[1].get_color()
    assert dots[0].get_marker() != dots[1].get_marker()


def test_a_table_of_distances_is_darkest_where_it_says_zero():
    apart = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1], [1, 2, 0, 1], [2, 1, 1, 0]])
    axis = distance_table(apart, 2).axes[0]
    assert words(axis) == [str(d) for d in apart.flatten().tolist()]
    assert axis.images[0].get_array().tolist() == (2 - apart).tolist()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0,0", "0,1", "1,0", "1,1"]
    assert [list(line.get_xdata()) for line in axis.lines[1::2]] == [[1.5, 1.5]]  # between the rows of the map


def test_likeness_is_written_out_and_guesses_run_along_the_diagonal():
    measured, guess = torch.tensor([[1.0, 0.5], [0.25, 0.75]]), torch.tensor([[1.0, 0.5], [0.25, 0.125]])
    table, curve = likeness_figure(measured, {"product": guess}).axes
    assert words(table) == ["1", ".50", ".25", ".75"]
    assert (table.get_xlabel(), table.get_ylabel()) == ("columns apart", "rows apart")
    found = {line.get_label(): list(line.get_ydata()) for line in curve.lines}
    assert found == {"measured": [1.0, 0.75], "product": [1.0, 0.125]}
    assert len({line.get_marker() for line in curve.lines}) == 2  # not by colour alone


def test_looks_carry_their_own_scale_and_leave_no_empty_frame():
    maps = {name: torch.full((2, 3), value) for name, value in (("a", 0.5), ("b", 0.25), ("c", 2.0))}
    axes = looks_figure(maps, [(0, 0), (1, 2), (0, 1)]).axes
    assert [axis.get_xlabel() for axis in axes[:3]] == ["largest 0.50", "largest 0.25", "largest 2.00"]
    assert [axis.images[0].get_clim()[1] for axis in axes[:3]] == [0.5, 0.25, 2.0]
    assert [cross(axis) for axis in axes[:3]] == [(0, 0), (2, 1), (1, 0)]
    assert axes[2].axison and not axes[3].axison


def test_rotations_share_one_scale_around_zero():
    index = torch.arange(6).view(2, 3)
    products = {name: torch.full((2, 3), value) for name, value in (("a", -0.5), ("b", 0.1), ("c", 1.0))}
    first, *others = rotation_figure(index, products, (1, 0)).axes
    assert words(first) == ["0", "1", "2", "3", "4", "5"]
    assert [axis.get_title() for axis in others] == ["a", "b", "c"]
    assert {axis.images[0].get_clim() for axis in others} == {(-1, 1)} and cross(others[0]) == (0, 1)


def test_the_best_rate_of_each_curve_is_named_and_marked():
    axis = rate_figure([0.2, 0.5, 0.8], {"a": [1.0, 0.4, 0.6], "b": [0.9, 0.8, 0.7]}, [0.5, 0.75], "heads").axes[0]
    assert [text.get_text() for text in axis.get_legend().texts] == ["a: best γ = 0.50", "b: best γ = 0.80"]
    assert [line.get_markevery() for line in axis.lines[:2]] == [[1], [2]]
    assert [line.get_xdata()[0] for line in axis.lines[2:]] == [0.5, 0.75]
    assert words(axis) == ["heads"]


def test_hidden_cells_are_holes_in_the_second_row_only():
    pictures, hidden = torch.full((2, 3, 3, 3), 1.5), torch.zeros(2, 3, 3, dtype=torch.bool)
    hidden[0, 1, 2] = True
    axes = filled_figure({"whole": pictures, "holes": pictures, "filled": pictures}, hidden).axes
    assert [axis.get_ylabel() for axis in axes] == ["whole", "", "holes", "", "filled", ""]
    shown = [axis.images[0].get_array() for axis in axes]
    assert [tuple(s.shape) for s in shown] == [(3, 3, 3)] * 2 + [(3, 3, 4)] * 2 + [(3, 3, 3)] * 2
    assert shown[0].max() == 1  # cut off
    assert shown[2][..., 3].tolist() == (~hidden[0]).float().tolist() and shown[3][..., 3].min() == 1
    assert [bool(axis.patches) for axis in axes] == [False, False, True, True, False, False]
