"""The figures of chapter 8 and their alternative texts."""

import math

import matplotlib.pyplot as plt
import pytest

from minigated import records
from minigated.plots_length import (
    clock_figure,
    frequency_figure,
    passkey_maps,
    position_figure,
    record_figure,
    share_figure,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def curves(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.lines if not line.get_label().startswith("_")}


def test_a_dial_shows_what_training_met_and_what_is_new():
    figure, alt = clock_figure([1.0, math.pi / 200], 101, 301)
    fast, slow = ([list(line.get_xdata()) for line in axis.lines] for axis in figure.axes)
    assert fast[0][-1] == pytest.approx(2 * math.pi) and fast[1][0] == fast[1][-1]  # nothing is new to a fast hand
    assert slow[0][-1] == slow[1][0] == pytest.approx(math.pi / 2) and slow[1][-1] == pytest.approx(1.5 * math.pi)
    assert "0.25 turns: 25 %, then 75 %" in alt


def test_frequencies_end_where_the_definitions_say():
    figure, alt = frequency_figure(32, 10_000.0, 8.0, 512)
    slower, ramp = (curves(axis) for axis in figure.axes)
    assert set(slower["unscaled"]) == {1.0} and set(slower["interpolation"]) == {8.0}
    assert (slower["YaRN"][0], slower["YaRN"][-1]) == (1.0, 8.0) and slower["larger base"][-1] == pytest.approx(8, 1e-3)
    assert [values[0] for values in ramp.values()] == [1.0, 1.0] and [v[-1] for v in ramp.values()] == [0.0, 0.0]
    assert "16 pairs within 512 positions" in alt


def test_losses_stand_in_the_middle_of_their_bins():
    rows = [{"start": 0, "end": 64, "nats": 2.0}, {"start": 64, "end": 128, "nats": 3.0}]
    figure, alt = position_figure({"a": rows, "b": rows[::-1]}, 64)
    line = figure.axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([32, 96], [2.0, 3.0])
    assert "a: 2.00 to 3.00; b: 3.00 to 2.00" in alt


def test_a_passkey_map_has_depth_down_and_length_across():
    rows = [{"length": n, "depth": d, "digit": n / 100 + d / 10, "exact": 0.0} for d in (1.0, 0.0) for n in (80, 20)]
    figure, alt = passkey_maps({"m": rows})
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["20", "80", "30", "90"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0 %", "100 %"]
    assert alt.endswith("m: 25 % at 20, 85 % at 80.")
    assert "whole keys" in passkey_maps({"m": rows}, "exact")[1]


def test_shares_stand_beside_uniform():
    rows = [{"length": n, "f_attn": 0.4, "uniform": 1 / n} for n in (8, 16)]
    figure, alt = share_figure({"a": rows}, 8)
    assert curves(figure.axes[0]) == {"a": [0.4, 0.4], "uniform": [1 / 8, 1 / 16]}
    assert "uniform 0.125 to 0.062" in alt


def test_the_record_is_drawn_over_the_papers_numbers():
    rows = [
        records.row(f"{arm}, {setting}, {n} T", [10.0 * n], 50.0 if yarn else None, arm=arm, setting=setting, length=n)
        for arm in ("none", "g1_elementwise")
        for yarn, setting in enumerate(("trained on", "trained on, yarn"))
        for n in (1, 2, 4, 8)
    ]
    record = {"rows": rows, "metric": {"name": "digits"}, "config": {"context": 1}}
    figure, alt = record_figure(record)
    ours, paper = (curves(axis) for axis in figure.axes)
    assert set(ours) == {"no gate", "G1 elementwise", "no gate, YaRN", "G1 elementwise, YaRN"}
    assert ours["no gate"] == [10, 20, 40, 80] and set(paper) == {"no gate, YaRN", "G1 elementwise, YaRN"}
    assert "no gate, YaRN (paper): 50, 50, 50, 50" in alt
