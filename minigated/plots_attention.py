"""Figures and tables of chapter 1: maps of attention weights, curves, time and memory over the length."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from minigated.plots import INK, style

PAPER, DEEP = "#c3d0d9", "#0b4f7d"  # cells are opaque, so that the numbers in them do not depend on the page
CELLS = LinearSegmentedColormap.from_list("cells", [PAPER, DEEP])
FORM_ORDER = ("naive", "blocks", "sdpa")
FORM_NAMES = {
    "naive": "naive, all scores in memory",
    "blocks": "blocks, in plain PyTorch",
    "sdpa": "SDPA, one fused kernel",
}


# -------------------------------------------------------------------------------- maps of weights
def weight_maps(
    maps: Sequence[Tensor], titles: Sequence[str], rows: Sequence[str], columns: Sequence[str],
    digits: int | None = 2, width: float = 5.4,
):  # fmt: skip
    """Matrices as tables of shaded cells; the darkest cell of each has its largest value.

    Args:
        maps: tensors [T, S]; a cell that is -inf or NaN is masked and drawn hatched.
        titles: one a map. rows, columns: labels of queries and keys.
        digits: after the point in the cells, or None for no numbers.
        width: inches of the figure.
    """
    cell = width / (len(maps) * (len(columns) + 0.9))
    figure, axes = plt.subplots(1, len(maps), figsize=(width, cell * len(rows) + 0.9), squeeze=False)
    for axis, values, title in zip(axes[0], maps, titles):
        _one_map(axis, values.detach().float().cpu().tolist(), digits)
        axis.set_title(title, color=INK, fontsize=12)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0, 0] else [])
    axes[0, 0].set_ylabel("query")
    axes[0, 0].set_xlabel("key")
    figure.tight_layout()
    return figure


def _one_map(axis, values: list[list[float]], digits: int | None) -> None:
    finite = [v for row in values for v in row if math.isfinite(v)]
    largest = max(finite) or 1.0
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            corner = (j - 0.46, i - 0.46)
            if not math.isfinite(value):
                masked = {"fill": False, "hatch": "////", "edgecolor": INK, "linewidth": 0, "alpha": 0.6}
                axis.add_patch(Rectangle(corner, 0.92, 0.92, **masked))
                continue
            share = max(0.0, value / largest)
            axis.add_patch(Rectangle(corner, 0.92, 0.92, facecolor=CELLS(share), linewidth=0))
            if digits is not None:
                ink = "white" if share > 0.62 else "#0d161d"
                axis.text(j, i, f"{value:.{digits}f}", ha="center", va="center", color=ink, fontsize=11)
    axis.set_xlim(-0.55, len(values[0]) - 0.45)
    axis.set_ylim(len(values) - 0.45, -0.55)
    axis.set_aspect("equal")
    axis.grid(False)
    axis.tick_params(length=0, labelsize=11)
    for side in axis.spines.values():
        side.set_visible(False)


# -------------------------------------------------------------------------------- curves
def curves(
    x: Sequence[float], series: dict[str, Sequence[float]], xlabel: str, ylabel: str,
    levels: dict[str, float] | None = None, powers: bool = False, markers: bool = True, nested: bool = False,
):  # fmt: skip
    """Lines over a common x, each with its own colour, stroke and marker.

    Args:
        series: label -> values. levels: label -> height of a horizontal reference line.
        powers: x on a scale of powers of two, y from zero. markers: draw them (off for dense curves).
        nested: thick below thin, so that curves which coincide are all seen.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.3))
    for index, (label, values) in enumerate(series.items()):
        look = style(index) if markers and not nested else {**style(index), "marker": ""}
        if nested:
            look["linewidth"] = max(1.5, 8.0 - 3.25 * index)
        axis.plot(x, values, label=label, **look)
    for label, height in (levels or {}).items():
        axis.axhline(height, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axis.annotate(label, (1.0, height), fontsize=10, **place)
    if powers:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(x), [f"{value:g}" for value in x])
        axis.set_ylim(bottom=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if len(series) > 1:
        axis.legend()
    figure.tight_layout()
    return figure


# -------------------------------------------------------------------------------- time and memory
def cost_rows(record: dict) -> list[dict]:
    """Forward rows of the record `ch01_attention_cost` as {form, tokens, milliseconds, spread, peak_mib}."""
    return [
        {"form": entry["extra"]["form"], "tokens": entry["extra"]["tokens"], "milliseconds": entry["mean"],
         "spread": entry["std"] or 0.0, "peak_mib": entry["extra"].get("peak_mib")}
        for entry in record["rows"]
        if not entry["extra"].get("backward")
    ]  # fmt: skip


def cost_figure(rows: list[dict], beside: list[dict] | None = None):
    """Time, and peak memory where it was measured, over the length; both axes logarithmic.

    Args:
        rows: dicts with form, tokens, milliseconds and, if known, spread and peak_mib.
        beside: rows of another run, drawn as open rings.
    """
    quantities = [("milliseconds", "milliseconds a call")]
    if all(row.get("peak_mib") for row in rows):
        quantities.append(("peak_mib", "peak memory, MiB"))
    figure, axes = plt.subplots(len(quantities), 1, figsize=(5.4, 3.3 * len(quantities)), squeeze=False)
    for axis, (key, label) in zip(axes[:, 0], quantities):
        for index, form in enumerate(FORM_ORDER):
            mine = [row for row in rows if row["form"] == form]
            errors = [row.get("spread", 0.0) for row in mine] if key == "milliseconds" else []
            points = [row["tokens"] for row in mine], [row[key] for row in mine]
            errors = errors if any(errors) else None
            axis.errorbar(*points, yerr=errors, label=FORM_NAMES[form], capsize=3, **style(index))
            ringed = [row for row in beside or [] if row["form"] == form and row.get(key)]
            points = [row["tokens"] for row in ringed], [row[key] for row in ringed]
            ring = {"markerfacecolor": "none", "markeredgecolor": style(index)["color"], "markersize": 12}
            axis.plot(*points, "o", **ring)
        _log_axes(axis, sorted({row["tokens"] for row in [*rows, *(beside or [])]}))
        axis.set_ylabel(label)
    axes[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))  # beside the curves there is no room
    axes[-1, 0].set_xlabel("tokens T")
    figure.tight_layout()
    return figure


def _log_axes(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def cost_table(rows: list[dict]) -> str:
    """The rows as a Markdown table, a line a length: milliseconds of each form ± deviation, peak MiB."""
    forms = [form for form in FORM_ORDER if any(row["form"] == form for row in rows)]
    memory = all(row.get("peak_mib") for row in rows)
    heads = ["tokens", *(f"{form}, ms" for form in forms), *(f"{form}, MiB" for form in forms if memory)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads)]
    for tokens in sorted({row["tokens"] for row in rows}):
        found = {row["form"]: row for row in rows if row["tokens"] == tokens}
        cells = [f"{tokens:,}", *(_time(found.get(form)) for form in forms)]
        cells += [f"{found[form]['peak_mib']:,.0f}" if form in found else "–" for form in forms if memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_words(rows: list[dict]) -> str:
    """The figure in words, for those who cannot see it: each form at the shortest and the longest length."""
    parts = []
    for form in FORM_ORDER:
        mine = sorted((row for row in rows if row["form"] == form), key=lambda row: row["tokens"])
        if not mine:
            continue
        first, last = mine[0], mine[-1]
        text = f"{form} from {first['milliseconds']:.3g} ms at {first['tokens']:,} tokens to "
        text += f"{last['milliseconds']:.3g} ms at {last['tokens']:,}"
        if first.get("peak_mib"):
            text += f", {first['peak_mib']:,.0f} to {last['peak_mib']:,.0f} MiB"
        parts.append(text)
    return "Curves over the number of tokens, both axes logarithmic: " + "; ".join(parts) + "."


def _time(row: dict | None) -> str:
    if row is None:
        return "–"
    spread = f" ± {row['spread']:.2g}" if row.get("spread") else ""
    return f"{row['milliseconds']:.3g}{spread}"
