"""The figures of chapter 6."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated import records
from minigated.plots_swat import (
    POINTS,
    gate_overlays,
    growth_figure,
    map_grid,
    readings_table,
    situations_figure,
    training_figure,
)
from minigated.swat_options import READINGS, SwatOptions


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_situations_show_every_weight_and_its_sum():
    figure = situations_figure(
        {"one": {"softmax": [0.75, 0.25], "sigmoid": [0.9, 0.5]}, "two": {"softmax": [1.0, 0.0]}}, ["a", "b"]
    )
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.75", "0.25", "0.90", "0.50"]
    assert [text.get_text() for text in axis.get_legend().texts] == ["softmax, sum 1.00", "sigmoid, sum 1.40"]
    assert {bar.get_hatch() for bar in axis.patches} == {None, "///"}  # not by colour alone


def test_a_grid_says_how_large_each_map_is_and_where_the_cell_is():
    figure = map_grid([[torch.tensor([[0.0, 2.0]])], [torch.tensor([[0.5, 0.0]])]], ["r", "s"], ["c"], cell=(0, 1))
    first, second = figure.axes
    assert (first.get_xlabel(), second.get_xlabel()) == ("largest 2.00", "largest 0.50")
    assert first.get_title() == "c" and second.get_title() == "" and second.get_ylabel() == "s"
    assert first.images[0].get_clim() == (0, 2)
    assert first.collections[0].get_offsets().tolist() == [[1.0, 0.0]]


def test_growth_draws_predictions_as_lines_and_measurements_as_marks():
    axis = growth_figure([0.0, 1.0], {"a": [1.0, 9.0]}, {"a": [1.1, 9.2], "norm": [1.0, 1.0]}).axes[0]
    line, points, other = axis.lines
    assert line.get_marker() == "" and points.get_linestyle() == "None"
    assert points.get_color() == line.get_color() != other.get_color()
    assert points.get_marker() != other.get_marker()
    assert [text.get_text() for text in axis.get_legend().texts] == ["a", "norm"]


def test_training_averages_the_loss_and_keeps_the_accuracies():
    losses = {"a": [4.0, 2.0, 1.0, 1.0], "b": [3.0, 3.0, 2.0, 2.0]}
    loss, right = training_figure(losses, {"a": [(4, 0.5)], "b": [(2, 0.2), (4, 0.4)]}, every=2).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 1.0], [3.0, 2.0]]
    assert list(loss.lines[0].get_xdata()) == [2, 4]
    assert [list(line.get_ydata()) for line in right.lines] == [[0.5], [0.2, 0.4]]


def test_overlays_have_a_row_of_pictures_and_a_row_for_each_gate():
    images = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    between = lambda low, high: torch.linspace(low, high, 12).view(3, 2, 2)
    figure = gate_overlays(images, {"value gate": between(0.25, 0.75), "G1": between(1.0, 3.0)})
    assert len(figure.axes) == 9
    assert figure.axes[3].get_ylabel() == "value gate\n0.25 to 0.75"
    assert {axis.images[0].get_clim() for axis in figure.axes[6:]} == {(1, 3)}


def test_the_table_names_every_reading_that_is_not_the_default():
    named = {name for *_, readings in POINTS for name in readings}
    default = vars(SwatOptions())
    assert named == {f"{n}={v}" for n, accepted in READINGS.items() for v in accepted if v != default[n]}


def a_row(name, values, **options):
    return records.row(name, values, options={"swat": vars(SwatOptions(**options)), "ffn_ratios": 2.5})


def test_the_table_shows_changes_in_points_and_says_what_was_not_run():
    rows = [a_row("as it is", [79.0, 81.0]), a_row("a", [78.5], value="plain"), a_row("b", [80.1], norm="rms")]
    table = readings_table({"rows": rows})
    assert "`value=plain` -0.50 (single run)" in table and "`norm=rms` +1.10 (single run); `norm=head`" in table
    assert "`norm=none`: not run yet" in table
    assert "80.00 ± 1.41 over seeds" in table
    empty = readings_table(None)
    assert empty.count("not run yet") == sum(bool(readings) for *_, readings in POINTS)
    assert {line.count("|") for line in empty.splitlines()} == {6}


def test_a_change_is_over_the_seeds_that_both_rows_have():
    default = a_row("as it is", [70.0, 80.0, 90.0])
    rows = [default, a_row("a", [71.0], value="plain"), a_row("b", [71.0, 83.0], norm="rms")]
    rows.append(a_row("c", [69.0, 78.0, 84.0], lce="none"))
    table = readings_table({"rows": rows})  # less the mean of all three seeds: -9.00, -3.00, -3.00
    assert "`value=plain` +1.00 (single run)" in table
    assert "`norm=rms` +2.00 (2 seeds)" in table
    assert "`lce=none` -3.00 (3 seeds)" in table
    more = [a_row("as it is", [70.0]), a_row("a", [71.0, 50.0], value="plain")]
    assert "`value=plain` +1.00 (single run)" in readings_table({"rows": more})
