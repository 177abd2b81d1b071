"""The figures and tables of chapter 1."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated import records
from minigated.plots_attention import cost_figure, cost_rows, cost_table, cost_words, curves, weight_maps


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def entry(form, tokens, milliseconds, peak=None, backward=False):
    return records.row(f"{form} {tokens}", milliseconds, form=form, tokens=tokens, backward=backward, peak_mib=peak)


@pytest.fixture
def rows():
    entries = [
        entry("naive", 1024, [1.0, 3.0], 96.0), entry("naive", 2048, [8.0, 8.0], 384.0),
        entry("sdpa", 1024, [0.5, 0.5], 6.0), entry("sdpa", 1024, [9.0, 9.0], 6.0, backward=True),
    ]  # fmt: skip
    return cost_rows({"rows": entries})


def test_rows_are_the_forward_ones_with_mean_and_deviation(rows):
    assert [(row["form"], row["tokens"], row["milliseconds"]) for row in rows] == [
        ("naive", 1024, 2.0), ("naive", 2048, 8.0), ("sdpa", 1024, 0.5),
    ]  # fmt: skip
    assert rows[0]["spread"] == pytest.approx(2**0.5)


def test_table_has_a_line_a_length_and_a_dash_for_what_was_not_measured(rows):
    head, rule, first, second = cost_table(rows).splitlines()
    assert head == "| tokens | naive, ms | sdpa, ms | naive, MiB | sdpa, MiB |"
    assert rule == "|" + "---:|" * 5
    assert first == "| 1,024 | 2 ± 1.4 | 0.5 | 96 | 6 |"
    assert second == "| 2,048 | 8 | – | 384 | – |"


def test_memory_is_left_out_where_it_was_not_measured(rows):
    on_cpu = [{**row, "peak_mib": None} for row in rows]
    assert "MiB" not in cost_table(on_cpu) and "MiB" not in cost_words(on_cpu)
    assert len(cost_figure(on_cpu).axes) == 1
    assert len(cost_figure(rows, beside=on_cpu).axes) == 2


def test_words_name_both_ends_of_each_curve(rows):
    text = cost_words(rows)
    assert "naive from 2 ms at 1,024 tokens to 8 ms at 2,048, 96 to 384 MiB" in text
    assert "sdpa from 0.5 ms" in text and "blocks" not in text


def test_masked_cells_are_hatched_and_carry_no_number():
    values = torch.tensor([[1.0, float("-inf")], [0.25, 0.75], [float("nan"), 0.5]])
    axis = weight_maps([values], [""], ["a", "b", "c"], ["x", "y"]).axes[0]
    assert [patch.get_hatch() for patch in axis.patches].count("////") == 2
    assert sorted(text.get_text() for text in axis.texts) == ["0.25", "0.50", "0.75", "1.00"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]


def test_curves_need_no_colour_to_be_told_apart():
    axis = curves([1, 2, 4], {"one": [1, 2, 3], "two": [3, 2, 1]}, "x", "y", levels={"limit": 2.5}).axes[0]
    first, second, level = axis.lines
    assert first.get_marker() != second.get_marker() and first.get_linestyle() != second.get_linestyle()
    assert level.get_ydata()[0] == 2.5 and [text.get_text() for text in axis.texts] == ["limit"]
