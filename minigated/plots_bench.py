"""Figures of chapter 9: bars of a component's steps, the roofline of a machine, profiles; the same from bench records.

Each function returns the figure and its alternative text, so that `show(*bars_figure(...), caption)` draws it.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from minigated.bench.profile import IDLE, KINDS, OTHER
from minigated.bench.targets import shares
from minigated.errors import InputError
from minigated.plots import COLORS, INK, MARKERS

HATCHES = ("", "///", "...", "xx", "\\\\", "++")
TERA, GIGA = 1e12, 1e9
LABEL = 32  # longer labels beside bars take several lines
ALL = [*dict(KINDS), OTHER, IDLE]  # kinds of kernels, each with its colour and its pattern


# ---------------------------------------------------------------------------------------------- bars
def bars_figure(milliseconds: Mapping[str, Sequence[float]], floor: float | None = None, what: str = "milliseconds"):
    """A bar a step, from top to bottom, on a logarithmic axis: the median, with quartiles as a thin line.

    Args:
        milliseconds: label -> (lower quartile, median, upper quartile).
        floor: milliseconds that the machine's limits allow, a dashed line; None draws none.

    Raises:
        InputError: nothing to draw, or a time that is not above 0, which such an axis cannot show.
    """
    _positive(milliseconds)
    labels = [textwrap.fill(label, LABEL, break_on_hyphens=False) for label in milliseconds]
    tall = any("\n" in label for label in labels)
    figure, axis = plt.subplots(figsize=(5.4, (0.5 if tall else 0.42) * len(labels) + 1.0))
    medians = [times[1] for times in milliseconds.values()]
    left = min([*medians, *([floor] if floor else [])]) / 2
    for place, (low, median, high) in enumerate(milliseconds.values()):
        axis.barh(place, median - left, left=left, height=0.62, color=COLORS[0], alpha=0.85)
        axis.plot([low, high], [place, place], color=INK, linewidth=1.5)
        axis.text(max(median, high) * 1.08, place, _short(median), va="center", fontsize=9, color=INK)
    if floor:
        axis.axvline(floor, color=INK, linewidth=1.2, linestyle="--")
        axis.annotate(" limit", (floor, 1.0), xycoords=("data", "axes fraction"), va="bottom", fontsize=9)
    axis.set_xscale("log")
    axis.set_xlim(left, max(medians) * 2.2)
    _numbered(axis.xaxis, *axis.get_xlim())
    axis.set_yticks(range(len(milliseconds)), labels, **({"fontsize": 9} if tall else {}))
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel(what)
    figure.tight_layout()
    told = "; ".join(f"{label} {_short(times[1])}" for label, times in milliseconds.items())
    limit = f" The machine's limit would be {floor:.3g}." if floor else ""
    return figure, f"Bars, {what}: {told}.{limit}"


def _numbered(side, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, two at least."""
    if high < 100 * low:
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif high > 1e5 * low:  # a number at each power of ten would touch the next
        side.set_major_locator(LogLocator(base=100))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    side.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _positive(milliseconds: Mapping[str, Sequence[float]]) -> None:
    if not milliseconds:
        raise InputError("no bars to draw; accepted: one label or more, each with its quartiles")
    for label, times in milliseconds.items():
        if len(times) != 3 or min(times) <= 0:
            raise InputError(f"{label!r} has {tuple(times)}; accepted: lower quartile, median, upper quartile, above 0")


# ---------------------------------------------------------------------------------------------- the roofline
def roof(intensity: float, matrix_rate: float, copy_rate: float) -> float:
    """Eq. (9.3): the operations a second that `intensity` operations a byte allow."""
    return min(matrix_rate, intensity * copy_rate)


def roofline_figure(points: Mapping[str, tuple[float, float]], matrix_rate: float, copy_rate: float):
    """Both axes logarithmic: operations a byte across, operations a second up, the two limits as one line with a bend.

    Args:
        points: label -> (operations a byte, operations a second).
        matrix_rate: measured operations a second of matrix products. copy_rate: measured bytes a second of a copy.

    Raises:
        InputError: a point, or a limit, that is not above 0.
    """
    if min([matrix_rate, copy_rate, *(value for point in points.values() for value in point)]) <= 0:
        raise InputError(f"limits {matrix_rate}, {copy_rate} and points {dict(points)}; accepted: numbers above 0")
    unit, name = (TERA, "TFLOP/s") if matrix_rate >= TERA else (GIGA, "GFLOP/s")
    bend = matrix_rate / copy_rate
    across = [intensity for intensity, _ in points.values()] + [bend]
    left, right = min(across) / 3, max(across) * 4
    columns = 1 if max(map(len, points), default=0) > 24 else 2
    beneath = 0.22 * math.ceil(len(points) / columns) + 0.1  # inches of the legend
    figure, axis = plt.subplots(figsize=(5.4, 3.2 + beneath))
    line = [left, bend, right]
    axis.plot(line, [roof(x, matrix_rate, copy_rate) / unit for x in line], color=INK, linewidth=2)
    axis.axvline(bend, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    for index, (label, (intensity, rate)) in enumerate(points.items()):
        axis.plot(
            intensity, rate / unit, MARKERS[index % 6], color=COLORS[index % 6], markersize=8, label=label,
            markerfacecolor="none" if index >= 6 else COLORS[index % 6], linestyle="",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    _numbered(axis.xaxis, *axis.get_xlim())
    _numbered(axis.yaxis, *axis.get_ylim())
    axis.set_xlabel("operations a byte")
    axis.set_ylabel(name)
    figure.legend(fontsize=9, loc="lower center", ncols=columns)
    figure.tight_layout(rect=(0, beneath / figure.get_figheight(), 1, 1))
    start = f"A roof that rises until {bend:.3g} operations a byte, then stays at {matrix_rate / unit:.3g} {name}. "
    return figure, start + _told(points, matrix_rate, copy_rate, unit, name)


def _told(points, matrix_rate: float, copy_rate: float, unit: float, name: str) -> str:
    parts = []
    for label, (x, y) in points.items():
        share = y / roof(x, matrix_rate, copy_rate)
        parts.append(f"{label}: {x:.3g} operations a byte, {y / unit:.3g} {name}, {share:.0%} of the roof")
    return "; ".join(parts) + "."


# ---------------------------------------------------------------------------------------------- from records
def cases_of(record: dict) -> dict[str, list[dict]]:
    """Rows of a bench record by case, in their order."""
    found: dict[str, list[dict]] = {}
    for row in record["rows"]:
        found.setdefault(row["extra"]["case"], []).append(row)
    return found


def record_bars(record: dict, case: str):
    """One case of a bench record as bars, with the time that the measured limits allow.

    Raises:
        InputError: a case that the record does not have.
    """
    cases = cases_of(record)
    if case not in cases:
        raise InputError(f"no case {case!r} in {record['id']}; accepted: {', '.join(cases)}")
    bars = {}
    for row in cases[case]:
        low, high = row["extra"]["quartiles_ms"]
        bars[row["extra"]["contender"]] = (low, row["extra"]["median_ms"], high)
    return bars_figure(bars, limit_ms(cases[case][0]["extra"], record["config"]["ceilings"]))


def limit_ms(extra: dict, ceilings: Mapping[str, float]) -> float | None:
    """Milliseconds below which no row of this work can come by the measured limits; None where work is not counted."""
    if not extra["flops"] or not extra["bytes"]:
        return None
    return 1e3 * max(extra["flops"] / ceilings[extra["dtype"]], extra["bytes"] / ceilings["copy"])


def record_roofline(record: dict):
    """Of each case of a bench record the fastest row whose work is counted, on the roofline."""
    ceilings, points = record["config"]["ceilings"], {}
    dtype = record["rows"][0]["extra"]["dtype"]
    for case, rows in cases_of(record).items():
        counted = [row["extra"] for row in rows if row["extra"]["intensity"] and row["extra"]["dtype"] == dtype]
        if counted:
            best = max(counted, key=lambda extra: extra["per_second"])
            points[f"{case}: {best['contender']}"] = (best["intensity"], best["flop_rate"])
    return roofline_figure(points, ceilings[dtype], ceilings["copy"])


# ---------------------------------------------------------------------------------------------- profiles
def profile_figure(record: dict, case: str):
    """One case's rows as bars of 100 %, cut by what the GPU does in that time; `waiting` is time without a kernel.

    Raises:
        InputError: a case that the record does not have, or none of its rows was looked at.
    """
    cases = cases_of(record)
    if case not in cases:
        raise InputError(f"no case {case!r} in {record['id']}; accepted: {', '.join(cases)}")
    seen = [row["extra"] for row in cases[case] if row["extra"].get("profile")]
    if not seen:
        raise InputError(f"no row of {case!r} has a profile; those of a GPU have one")
    parts = [shares(extra) for extra in seen]
    kinds = [kind for kind in ALL if any(part.get(kind) for part in parts)]
    figure, axis = plt.subplots(figsize=(5.4, 0.48 * len(seen) + 1.0 + 0.22 * len(kinds)))
    for place, (extra, part) in enumerate(zip(seen, parts)):
        left = 0.0
        for kind in kinds:
            width, index = 100 * part.get(kind, 0.0), ALL.index(kind)
            look = {"color": COLORS[index % 6], "hatch": HATCHES[index // 6]} if kind != IDLE else {"color": "none"}
            axis.barh(place, width, left=left, height=0.4, edgecolor=INK, linewidth=0.6, **look)
            left += width
        axis.text(0, place - 0.24, extra["contender"], va="bottom", fontsize=9, color=INK)  # names are long: above
        axis.text(left, place, f" {_short(extra['median_ms'])} ms", va="center", fontsize=9, color=INK)
    axis.set_yticks([])
    axis.set_ylim(len(seen) - 0.5, -0.75)
    axis.set_xlim(0, 115)  # room for the milliseconds
    axis.set_xticks(range(0, 101, 25))
    axis.grid(False)  # it would cross the names
    axis.set_xlabel("% of a call")
    boxes = axis.containers[: len(kinds)]
    figure.legend(boxes, kinds, fontsize=9, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.22 * ((len(kinds) + 1) // 2) / figure.get_figheight() + 0.02, 1, 1))
    told = [
        f"{extra['contender']}, {_short(extra['median_ms'])} ms: "
        + ", ".join(f"{kind} {part[kind]:.0%}" for kind in kinds if part.get(kind, 0) >= 0.1)
        for extra, part in zip(seen, parts)
    ]
    return figure, f"Bars of what the GPU does, a tenth or more of a call. {'; '.join(told)}."
