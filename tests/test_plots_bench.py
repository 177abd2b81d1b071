"""The figures of chapter 9 and their alternative texts."""

import matplotlib.pyplot as plt
import pytest

from minigated import records
from minigated.errors import InputError
from minigated.plots_bench import (
    bars_figure,
    limit_ms,
    profile_figure,
    record_bars,
    record_roofline,
    roof,
    roofline_figure,
)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


@pytest.fixture
def record():
    """Two cases; the second counts no bytes. Limits: 1 TFLOP/s and 0.1 TB/s, so the bend is at 10 operations a byte."""
    ceilings = {"bfloat16": 1e12, "float32": 1e11, "copy": 1e11}

    def row(case, name, ms, flops, moved):
        rate = flops and flops / ms * 1e3
        return records.row(
            f"{case}: {name}", [ms], case=case, contender=name, median_ms=ms, quartiles_ms=[ms / 2, 2 * ms],
            per_second=1e3 / ms, against_first=8 / ms, flops=flops, bytes=moved, dtype="bfloat16", unit="maps",
            intensity=flops / moved if moved else None, flop_rate=rate, flop_share=rate / 1e12,
            byte_share=moved and moved / ms * 1e3 / 1e11,
        )  # fmt: skip

    rows = [row("a", "slow", 8.0, 1e9, 2e8), row("a", "fast", 4.0, 1e9, 2e8), row("b", "only", 5.0, 1e9, None)]
    return {"id": "ch09_bench_x", "rows": rows, "config": {"ceilings": ceilings}}


def test_bars_stand_from_top_to_bottom_with_their_medians():
    figure, alt = bars_figure({"first": (1.0, 2.0, 4.0), "second": (0.5, 0.5, 0.5)}, floor=0.1)
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"] and axis.yaxis_inverted()
    assert [bar.get_x() + bar.get_width() for bar in axis.patches] == pytest.approx([2.0, 0.5])
    assert [text.get_text() for text in axis.texts][:2] == ["2", "0.5"]
    assert axis.get_xscale() == "log" and alt == (
        "Bars, milliseconds: first 2; second 0.5. The machine's limit would be 0.1."
    )


def test_numbers_of_a_wide_axis_do_not_touch():
    figure, _ = bars_figure({"loop": (7e4, 7e4, 7e4), "graph": (1.2, 1.2, 1.2)}, floor=0.3)
    figure.canvas.draw()
    (low, high), side = figure.axes[0].get_xlim(), figure.axes[0].xaxis
    ticks = zip(side.get_majorticklocs(), side.get_ticklabels())
    boxes = [label.get_window_extent() for place, label in ticks if low < place < high]
    assert len(boxes) == 3 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("times", [{}, {"a": (0.0, 1.0, 2.0)}, {"a": (1.0, 2.0)}])
def test_bars_that_cannot_be_drawn_are_refused(times):
    with pytest.raises(InputError, match="accepted"):
        bars_figure(times)


def test_long_names_leave_room_for_the_bars():
    name = "minigated, dense, same active operations, compiled and recorded"
    figure, alt = bars_figure({name: (9.0, 10.0, 11.0), "short": (20.0, 30.0, 40.0)})
    axis = figure.axes[0]
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert shown[0].replace("\n", " ") == name and max(map(len, shown[0].split("\n"))) <= 32 and shown[1] == "short"
    assert axis.get_position().width > 0.4 and figure.get_tightbbox().width < 5.6  # inches; the figure has 5.4
    assert f"{name} 10; short 30." in alt
    figure.canvas.draw()
    assert {"5", "10", "20", "50"} <= {label.get_text() for label in axis.get_xticklabels()}


def test_the_roof_rises_then_stays():
    assert [roof(x, 100.0, 10.0) for x in (1.0, 10.0, 50.0)] == [10.0, 100.0, 100.0]


def test_points_stand_under_the_roof():
    figure, alt = roofline_figure({"p": (2.0, 1e9)}, 4e9, 1e9)
    axis = figure.axes[0]
    line, _, point = axis.lines
    assert list(line.get_ydata())[1:] == [4.0, 4.0] and line.get_xdata()[1] == 4.0  # GFLOP/s; the bend
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (2.0, 1.0)
    assert "p: 2 operations a byte, 1 GFLOP/s, 50% of the roof" in alt
    with pytest.raises(InputError, match="above 0"):
        roofline_figure({"p": (0.0, 1.0)}, 1.0, 1.0)


def test_a_records_case_has_the_limit_of_its_work(record):
    figure, alt = record_bars(record, "a")
    assert "slow 8; fast 4" in alt and "limit would be 2." in alt  # 2e8 bytes at 1e11 a second
    assert limit_ms(record["rows"][2]["extra"], record["config"]["ceilings"]) is None
    assert limit_ms({"flops": 9e9, "bytes": 1, "dtype": "bfloat16"}, record["config"]["ceilings"]) == 9.0
    assert "limit" not in record_bars(record, "b")[1]
    with pytest.raises(InputError, match="'c'.*a, b"):
        record_bars(record, "c")


def test_the_fastest_row_of_each_counted_case_is_on_the_roofline(record):
    figure, alt = record_roofline(record)
    assert [line.get_label() for line in figure.axes[0].lines[2:]] == ["a: fast"]
    assert "a: fast: 5 operations a byte, 0.25 TFLOP/s, 50% of the roof" in alt


# ------------------------------------------------------------------------------------- profiles
def test_a_profile_is_cut_by_kind_and_names_the_median(record):
    for row in record["rows"]:
        kinds = {"compiled": 1.0, "copies and casts": 1.0}
        row["extra"]["profile"] = {"kinds": kinds, "kernels": 2, "longest": []}
    figure, alt = profile_figure(record, "a")
    axis = figure.axes[0]
    widths = [[bar.get_width() for bar in axis.patches[3 * i : 3 * i + 3]] for i in range(2)]
    assert widths == [pytest.approx([12.5, 12.5, 75.0]), pytest.approx([25.0, 25.0, 50.0])]
    assert [text.get_text() for text in axis.texts] == ["slow", " 8 ms", "fast", " 4 ms"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["compiled", "copies and casts", "waiting"]
    assert alt == (
        "Bars of what the GPU does, a tenth or more of a call. "
        "slow, 8 ms: compiled 12%, copies and casts 12%, waiting 75%; "
        "fast, 4 ms: compiled 25%, copies and casts 25%, waiting 50%."
    )


def test_a_case_without_profile_is_refused(record):
    with pytest.raises(InputError, match="no row of 'b' has a profile"):
        profile_figure(record, "b")
    with pytest.raises(InputError, match="no case 'z'.*accepted: a, b"):
        profile_figure(record, "z")
