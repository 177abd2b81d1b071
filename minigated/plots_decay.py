"""Figures of chapter 3: decay around a cell, rates, the mask, photographs, two forms, rotation, hidden cells."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from minigated.plots import COLORS, INK, style
from minigated.plots_attention import CELLS


def _bare(axis, title: str = "", label: str = "") -> None:
    axis.set_title(title, color=INK, fontsize=11)
    axis.set_xlabel(label, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


def _cross(axis, cell: tuple[int, int]) -> None:
    axis.scatter([cell[1]], [cell[0]], marker="x", s=46, color="white", linewidths=3)
    axis.scatter([cell[1]], [cell[0]], marker="x", s=38, color=COLORS[1], linewidths=1.7)


def _tabled(axis, values: list[list[float]], words: list[list[str]] | None = None, size: float = 10) -> None:
    """Opaque cells shaded by their share of the largest value, with words in them."""
    largest = max(map(max, values)) or 1.0
    axis.imshow(values, cmap=CELLS, vmin=0, vmax=largest)
    for y, row in enumerate(values if words else []):
        for x, value in enumerate(row):
            ink = "white" if value / largest > 0.62 else "#0d161d"
            axis.text(x, y, words[y][x], ha="center", va="center", color=ink, fontsize=size)


# ---------------------------------------------------------------------------------------------- the question
def around_figure(line: Sequence[float], maps: dict[str, Tensor], cell: tuple[int, int], steps: int):
    """A line that fades into the past, and below it maps that fade in all directions from one cell.

    Args:
        line: weights of the steps of a line, the present last. maps: title -> weights [h, w]. cell: its place.
        steps: how far from it a dashed diamond is drawn.
    """
    figure = plt.figure(figsize=(5.4, 4.6))
    top, *below = figure.subplot_mosaic([["line"] * len(maps), [*maps]], height_ratios=[1, 2.6]).values()
    words = [f"{v:.2f}".lstrip("0") if v < 1 else "1" for v in line]
    _tabled(top, [list(line)], [words], 10)
    _bare(top, "text: γ to the power of the steps back", "earlier   →   now")
    for axis, (title, values) in zip(below, maps.items()):
        _tabled(axis, values.tolist())
        y, x = cell
        corners = [x - steps, x, x + steps, x, x - steps], [y, y - steps, y, y + steps, y]
        axis.plot(*corners, color="white", linewidth=1.4, linestyle="--")
        _cross(axis, cell)
        _bare(axis, title)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- rates
def fading_figure(heads: dict[str, Sequence[float]], farthest: int = 24):
    """gamma^distance of several heads; a dot where half is left.

    Args:
        heads: group -> gammas, one curve a head, the groups by colour and stroke. farthest: last distance drawn.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.3))
    for index, (label, gammas) in enumerate(heads.items()):
        look = style(index) | {"marker": ""}
        for number, gamma in enumerate(gammas):
            left = [gamma**d for d in range(farthest + 1)]
            axis.plot(left, label="" if number else label, **look)
            half = math.log(0.5) / math.log(gamma)
            if half <= farthest:
                axis.plot([half], [0.5], color=look["color"], marker=style(index)["marker"], markersize=6)
    axis.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    axis.set_xlabel("steps apart")
    axis.set_ylabel("what is left of the weight")
    axis.set_ylim(0, 1.03)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(heads))
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- the mask
def distance_table(apart: Tensor, width: int):
    """Distances between all cells of a map, [N, N], as a table; lines part the blocks that belong to a pair of rows."""
    cells = apart.shape[0]
    figure, axis = plt.subplots(figsize=(5.4, 5.2))
    near = apart.max() - apart  # dark is near
    _tabled(axis, near.tolist(), [[str(int(d)) for d in row] for row in apart.tolist()], 12)
    for at in range(width, cells, width):
        axis.axhline(at - 0.5, color="white", linewidth=2.5)
        axis.axvline(at - 0.5, color="white", linewidth=2.5)
    names = [f"{i // width},{i % width}" for i in range(cells)]
    _bare(axis, label="key: row,column")
    axis.set_xticks(range(cells), names)
    axis.set_yticks(range(cells), names)
    axis.set_ylabel("query: row,column", fontsize=10)
    axis.tick_params(length=0, labelsize=10)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- photographs
def likeness_figure(likeness: Tensor, guesses: dict[str, Tensor]):
    """Correlation of cells by rows and columns apart, and how two guesses from the axes alone fare on the diagonal.

    Args:
        likeness: [n, n], measured. guesses: label -> [n, n], made from the first row and column of `likeness`.
    """
    figure, (table, curve) = plt.subplots(2, 1, figsize=(5.4, 7.0), height_ratios=[1.35, 1])
    words = [[f"{v:.2f}".lstrip("0") if v < 0.995 else "1" for v in row] for row in likeness.tolist()]
    _tabled(table, likeness.tolist(), words, 10.5)
    _bare(table, label="columns apart")
    table.set_ylabel("rows apart", fontsize=10)
    table.set_xticks(range(likeness.shape[1]))
    table.set_yticks(range(likeness.shape[0]))
    table.tick_params(length=0, labelsize=10)
    steps = range(likeness.shape[0])
    for index, (label, values) in enumerate({"measured": likeness, **guesses}.items()):
        curve.plot(steps, values.diagonal().tolist(), label=label, **style(index))
    curve.set_xlabel("rows apart = columns apart")
    curve.set_ylabel("correlation")
    curve.set_ylim(bottom=0)
    curve.legend(fontsize=9)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- two forms, rotation
def looks_figure(maps: dict[str, Tensor], cells: Sequence[tuple[int, int]]):
    """Weights of a cell on all others in two columns, each map shaded to its own largest value, which stands below it.

    Args:
        maps: title -> [h, w]. cells: (row, column) of the cell that looks, one a map.
    """
    figure, axes = plt.subplots(-(-len(maps) // 2), 2, figsize=(5.4, 2.75 * -(-len(maps) // 2)), squeeze=False)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    for axis, (title, values), cell in zip(axes.flat, maps.items(), cells):
        axis.imshow(values.tolist(), cmap=CELLS, vmin=0, vmax=float(values.max()))
        _cross(axis, cell)
        _bare(axis, title, f"largest {float(values.max()):.2f}")
    figure.tight_layout()
    return figure


def rotation_figure(index: Tensor, products: dict[str, Tensor], cell: tuple[int, int]):
    """The index of each cell, and what a rotation makes of equal queries and keys, from -1 (pale) to 1 (dark).

    Args:
        index: [h, w]. products: three, title -> [h, w], of the query at `cell` with the key of every cell.
    """
    figure, axes = plt.subplots(2, 2, figsize=(5.4, 5.6))
    _tabled(axes[0, 0], index.tolist(), [[str(int(i)) for i in row] for row in index.tolist()])
    _bare(axes[0, 0], "the index")
    for axis, (title, values) in zip(axes.flat[1:], products.items()):
        axis.imshow(values.tolist(), cmap=CELLS, vmin=-1, vmax=1)
        _cross(axis, cell)
        _bare(axis, title)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- hidden cells
def rate_figure(gammas: Sequence[float], errors: dict[str, Sequence[float]], marked: Sequence[float], label: str):
    """Error of a decayed mean over its rate, the lowest point of each curve marked; vertical lines at some rates.

    Args:
        gammas: of all curves. errors: name of a curve -> one a gamma. marked: gammas. label: what these are.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for index, (name, values) in enumerate(errors.items()):
        look = style(index)
        best = min(range(len(values)), key=lambda i: values[i])
        legend = f"{name}: best γ = {gammas[best]:.2f}"
        axis.plot(gammas, values, label=legend, markevery=[best], **look | {"markersize": 8})
    for gamma in marked:
        axis.axvline(gamma, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top", "fontsize": 10}
    axis.annotate(label, (min(marked) - 0.015, 0.99), **place)
    axis.set_xlabel("γ")
    axis.set_ylabel("error at hidden cells")
    axis.set_ylim(0, 1.25)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    figure.tight_layout()
    return figure


def filled_figure(rows: dict[str, Tensor], hidden: Tensor):
    """Small colour maps in rows, one picture a column; the second row has holes, drawn hatched.

    Args:
        rows: label -> [pictures, h, w, 3]; numbers outside 0 to 1 are cut off. hidden: [pictures, h, w].
    """
    count, (height, width) = len(hidden), hidden.shape[1:]
    figure, axes = plt.subplots(len(rows), count, figsize=(5.4, 5.4 * len(rows) / count + 0.2), squeeze=False)
    for number, (line, (label, pictures)) in enumerate(zip(axes, rows.items())):
        for axis, picture, holes in zip(line, pictures.clamp(0, 1), hidden):
            shown = picture
            if number == 1:  # see through the holes to a hatched sheet
                sheet = {"facecolor": "white", "edgecolor": INK, "hatch": "//////", "linewidth": 0, "zorder": 0}
                axis.add_patch(Rectangle((-0.5, -0.5), width, height, **sheet))
                shown = torch.cat((picture, (~holes)[..., None].to(picture)), -1)
            axis.imshow(shown.tolist(), interpolation="nearest", zorder=1)
            _bare(axis)
        line[0].set_ylabel(label, fontsize=9)
    figure.tight_layout(pad=0.3)
    return figure
