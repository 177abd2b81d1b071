"""The figures of chapter 7 and their alternative texts."""

import matplotlib.pyplot as plt
import pytest
import torch

from minigated import records
from minigated.plots_moe import (
    collapse_figure,
    gate_text_figure,
    letters,
    paths_figure,
    rate_figure,
    sinks_figure,
    use_figure,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def sheet(axis) -> list[list[float]]:
    return axis.images[0].get_array().tolist()


def curves(axis) -> dict[str, list[float]]:
    """Label -> heights, of plain lines and of those with error bars."""
    bars = {bar.get_label(): list(bar.lines[0].get_ydata()) for bar in axis.containers}
    return bars | {line.get_label(): list(line.get_ydata()) for line in axis.lines if line.get_label()[0] != "_"}


def test_blanks_have_signs():
    assert letters("a b\n") == ["a", "␣", "b", "¶"]


def test_a_path_stands_in_the_row_of_its_expert():
    figure, alt = paths_figure("ab", torch.tensor([[2, 0], [2, 1]]), 4)
    assert sheet(figure.axes[0]) == [[0.6, 0.0], [0.0, 0.6], [1.0, 1.0], [0.0, 0.0]]
    assert "4 experts by 2 characters" in alt and "visits 2 experts; together they visit 3 of 4" in alt


def test_an_even_load_is_one():
    figure, alt = use_figure({"a": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]], "b": [[1.0, 0.0, 0.0, 0.0]] * 2}, ["x", "y"])
    first, second = figure.axes
    assert [text.get_text() for text in first.texts] == ["1.0"] * 4 + ["2.0"] * 2 + ["0.0"] * 2
    assert [text.get_text() for text in second.texts][:2] == ["4.0", "0.0"]
    assert "a: fullest 1.0 in x, 2.0 in y; b: fullest 4.0 in x, 4.0 in y" in alt
    few = use_figure({"a": [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]}, ["x", "y"], least=2.0)[0].axes[0]
    assert [text.get_text() for text in few.texts] == ["2.0", "2.0"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 4)


def test_experts_are_sorted_by_their_load_at_the_end():
    looks = {"with": [[0.5, 0.5], [0.5, 0.5]], "without": [[0.6, 0.4], [0.02, 0.98]]}
    figure, alt = collapse_figure(looks, {"with": [2.0, 1.0], "without": [2.0, 1.5]}, every=10)
    even, fallen, losses = figure.axes
    assert sheet(even) == [[1.0, 1.0], [1.0, 1.0]]
    assert sheet(fallen) == [[0.8, pytest.approx(1.96)], [1.2, pytest.approx(0.04)]]
    assert curves(losses) == {"with": [2.0, 1.0], "without": [2.0, 1.5]}
    assert list(losses.lines[0].get_xdata()) == [5.0, 15.0]
    assert "over 20 steps" in alt and "with: fullest 1.0 times its part, 0 of 2 hardly used" in alt
    assert "without: fullest 2.0 times its part, 1 of 2 hardly used" in alt


def test_gate_scores_stand_head_by_head():
    scores = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]])  # [layers, H, T]
    figure, alt = gate_text_figure("ab", scores)
    axis = figure.axes[0]
    assert torch.tensor(sheet(axis)).allclose(scores.flatten(0, 1))
    assert list(axis.get_yticks()) == [0.5, 2.5] and [t.get_text() for t in axis.get_yticklabels()][1] == "layer 2"
    assert alt.endswith("Means: layer 1 0.25, layer 2 0.65.")


def test_rates_are_drawn_over_the_papers_numbers():
    rows = [
        records.row(f"{arm}, {n}x", [float(n), n + 1.0], 7.0 + n if n < 4 else None, variant=arm, times=n)
        for arm in ("none", "g1_elementwise")
        for n in (1, 2, 4)
    ]
    rows += [records.row("clip_100, 4x", [3.0], None, variant="clip_100", times=4)]
    figure, alt = rate_figure({"rows": rows, "metric": {"name": "nats"}})
    ours, paper = (curves(axis) for axis in figure.axes)
    assert ours == {"no gate": [1.5, 2.5, 4.5], "G1 elementwise": [1.5, 2.5, 4.5], "clip at 100": [3.0]}
    assert paper == {"no gate": [8.0, 9.0], "G1 elementwise": [8.0, 9.0]}
    assert "clip at 100 (mean): 3 at 4x" in alt and "no gate (paper): 8 at 1x, 9 at 2x" in alt


def test_layers_are_drawn_of_the_rows_that_are_there():
    def row(name, gate):
        layers = {"f_attn_by_layer": [0.2, 0.1], "m_act_by_layer": [5.0, 50.0], "gate_by_layer": gate}
        return records.row(name, [50.0], None, f_attn=0.15, uniform=0.05, **layers)

    record = {"rows": [row("g1_elementwise", [0.4, 0.3]), row("none", None), row("g1_shared", [0.5, 0.5])]}
    figure, alt = sinks_figure(record)
    share, largest, gate = (curves(axis) for axis in figure.axes)
    assert list(share) == ["no gate", "G1 elementwise"] and list(gate) == ["G1 elementwise"]
    assert largest["no gate"] == [5.0, 50.0] and gate["G1 elementwise"] == [0.4, 0.3]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label()[0] == "_"] == [0.05]
    assert 1 < figure.axes[1].get_ylim()[0] < 5 and figure.axes[1].get_yscale() == "log"
    assert alt.endswith("none 0.150 and 50, g1_elementwise 0.150 and 50.")
