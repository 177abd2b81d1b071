"""The figures and tables of chapter 2."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated import records
from minigated.plots_gates import (
    backcopy_figure,
    character_maps,
    claims_table,
    claims_told,
    order_figure,
    pair_figure,
    positions_figure,
    sink_figure,
    two_ways,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def look(step, gate=None):
    found = {"step": step, "share_other": 0.1, "share_trigger": 0.01, "uniform": 0.044, "value_ratio": 1.0}
    return found if gate is None else found | {"gate_trigger": gate, "gate_other": gate / 2}


def words(axis):
    return [text.get_text() for text in axis.texts]


def test_two_ways_shows_shares_and_outputs():
    figure = two_ways({"a": [0.9, 0.1], "b": [0.5, 0.5]}, {"a": (0.1, 0.1), "b": (2.0, 0.25)}, ["x", "y"])
    assert figure.axes[1].get_title(loc="left") == "b: average 2.00, out goes 0.25"
    assert words(figure.axes[0]) == ["0.90", "0.10"]


def test_backcopy_figure_draws_gates_only_where_there_are_some():
    figure = backcopy_figure({"none": [look(0), look(25)], "gate": [look(0, 0.5), look(25, 0.8)]})
    share, value, gate = figure.axes
    assert (len(value.lines), len(gate.lines)) == (2, 2)
    assert [list(line.get_ydata()) for line in gate.lines] == [[0.5, 0.8], [0.25, 0.4]]
    assert "uniform" in words(share)


def test_maps_hide_the_future_and_mark_triggers():
    figure = character_maps({"m": torch.full((3, 3), 0.5)}, "ate", [False, True, True], {"m": torch.rand(3)})
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "▸ t", "▸ e"]
    assert left.images[0].get_array().mask.tolist() == torch.ones(3, 3).triu(1).bool().tolist()
    assert len(right.patches) == 3


def test_positions_names_all_five():
    assert {"G1", "G2", "G3", "G4", "G5"} <= set(words(positions_figure().axes[0]))


def test_pair_figure_counts_layers_from_one_and_averages_the_loss():
    plain = {"first_token_share": [0.1, 0.2], "uniform_share": 0.05, "gate": None}
    measures = {"none": plain, "g1_elementwise": plain | {"gate": {"mean": [0.4, 0.5]}}}
    loss, share, gate = pair_figure({"none": [4.0, 2.0], "g1_elementwise": [3.0, 1.0]}, measures, every=2).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0], [2.0]]
    assert list(share.lines[0].get_xdata()) == [1, 2]
    assert words(gate) == ["0.40", "0.50"]


def test_order_figure_numbers_rows_in_the_papers_order():
    rows = [records.row("none", [1.0, 1.2], 6.0), records.row("g2_headwise", [0.9], 5.8)]
    figure, legend = order_figure({"rows": rows, "metric": {"name": "nats a byte"}})
    assert legend == "1 g2_headwise, 2 none"
    assert [(text.get_text(), text.xy) for text in figure.axes[0].texts] == [("1", (5.8, 0.9)), ("2", (6.0, 1.1))]


def test_sink_figure_has_both_arms_and_the_reference_in_both_panels():
    extra = {"followed": [{"step": 1, "f_attn": 0.1}], "measures": {"first_token_share": [0.1, 0.2]}, "uniform": 0.07}
    rows = [records.row(name, [0.1], **extra) for name in ("none", "g1_elementwise")]
    for axis in sink_figure({"rows": rows}).axes:
        assert len(axis.lines) == 3
        assert list(axis.lines[-1].get_ydata()) == [0.07, 0.07]


def test_claims_table_says_what_was_measured():
    claim = {"claim": "c", "measure": "m_act", "difference": -0.5, "standard_error": None, "verdict": "direction only"}
    record = {"metric": {"name": "nats a byte"}, "config": {"claims": [claim]}}
    assert claims_table(record).splitlines()[2] == "| c | largest activation | -0.5 | – | direction only |"


def test_claims_are_told_under_their_verdicts_and_those_of_single_runs_are_not():
    claims = [("a", 0.1, "reproduced"), ("b", None, "direction only"), ("c", 0.2, "reproduced"), ("d", 0.0, "no")]
    record = {"config": {"claims": [{"claim": c, "standard_error": e, "verdict": v} for c, e, v in claims]}}
    assert claims_told(record) == "**reproduced**: a; c.\n\n**no**: d."
