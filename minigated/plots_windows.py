"""Figures of chapter 4: numbered maps with window borders, masks, where a cell's influence reaches."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from minigated.plots import COLORS, INK, style
from minigated.plots_attention import CELLS, DEEP

FILLS = ("#c3d0d9", "#e8c39e", "#a9d3bd", "#d9b8cc", "#e6dca0", "#c2bfe6", "#d0d0d0", "#b5e0e8", "#f0b5a5")


def numbered_maps(maps: Sequence[Tensor], titles: Sequence[str], window: int, groups: Sequence[Tensor] | None = None):
    """Maps of whole numbers side by side, with lines at the borders of windows.

    Args:
        maps: [h, w] whole numbers, printed in the cells. titles: one a map.
        window: side of a window, for the lines.
        groups: [h, w] each; cells of one group get one colour. The numbers themselves by default.
    """
    side = maps[0].shape[1]
    cell = 5.4 / (len(maps) * (side + 0.6))
    figure, axes = plt.subplots(1, len(maps), figsize=(5.4, cell * maps[0].shape[0] + 0.5), squeeze=False)
    for axis, numbers, title, group in zip(axes[0], maps, titles, groups or maps):
        colours = {value: FILLS[i % len(FILLS)] for i, value in enumerate(sorted(set(group.flatten().tolist())))}
        for i, row in enumerate(numbers.tolist()):
            for j, value in enumerate(row):
                fill = colours[group[i, j].item()]
                axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=fill, edgecolor="white", linewidth=1))
                axis.text(j, i, str(value), ha="center", va="center", color="#0d161d", fontsize=11)
        _window_lines(axis, numbers.shape, window)
        _bare(axis, numbers.shape, title)
    figure.tight_layout(w_pad=0.5)
    return figure


def mask_maps(masks: Sequence[Tensor], titles: Sequence[str], labels: Sequence[Sequence[int]]):
    """Masks as tables: filled with a dot where a cell may look, empty where not.

    Args:
        masks: bool [N, N] each. titles: one a mask. labels: of the N cells of each.
    """
    cells = len(masks[0])
    size = 5.4 / (len(masks) * (cells + 0.9))
    figure, axes = plt.subplots(1, len(masks), figsize=(5.4, size * cells + 0.9), squeeze=False)
    for axis, mask, title, names in zip(axes[0], masks, titles, labels):
        for i, row in enumerate(mask.tolist()):
            for j, allowed in enumerate(row):
                fill = {"facecolor": DEEP if allowed else "none", "edgecolor": INK, "linewidth": 0.6}
                axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, **fill))
                if allowed:
                    axis.text(j, i, "•", ha="center", va="center", color="white", fontsize=11)
        _bare(axis, mask.shape, title)
        axis.set_xticks(range(cells), names)
        axis.set_yticks(range(cells), names)
        axis.tick_params(length=0, labelsize=9)
    axes[0, 0].set_ylabel("this cell looks at")
    figure.tight_layout(w_pad=0.4)
    return figure


def influence_maps(maps: Sequence[Tensor], titles: Sequence[str], cell: tuple[int, int], window: int | None = None):
    """Which cells of the output move when one cell of the input is changed.

    Args:
        maps: [h, w] each; 0 where nothing moved. titles: one a map.
        cell: the changed one, marked with a cross. window: for lines at the borders, or None.
    """
    figure, axes = plt.subplots(1, len(maps), figsize=(5.4, 5.2 / len(maps) + 0.7), squeeze=False)
    for axis, moved, title in zip(axes[0], maps, titles):
        shape = moved.shape
        axis.imshow((moved > 0).float().tolist(), cmap=CELLS, vmin=0, vmax=1)
        if window:
            _window_lines(axis, shape, window)
        axis.scatter([cell[1]], [cell[0]], marker="x", s=40, color="white", linewidths=3)
        axis.scatter([cell[1]], [cell[0]], marker="x", s=32, color=COLORS[1], linewidths=1.6)
        _bare(axis, shape, title)
        axis.set_xlabel(f"{int((moved > 0).sum())} of {moved.numel()} cells", fontsize=10)
    figure.tight_layout(w_pad=0.4)
    return figure


def reach_figure(layers: Sequence[int], reached: dict[str, Sequence[float]]):
    """Share of the map that one cell's output depends on, over the number of layers.

    Args:
        layers: numbers of layers. reached: label -> share, 0 to 1, one a number.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.0))
    for index, (label, values) in enumerate(reached.items()):
        axis.plot(layers, [100 * v for v in values], label=label, **style(index))
    axis.set_xlabel("layers")
    axis.set_ylabel("% of the map seen")
    axis.set_xticks(list(layers))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.tight_layout()
    return figure


def cost_figure(sides: Sequence[int], costs: dict[str, Sequence[float]]):
    """Multiplications over the side of the map, both axes logarithmic.

    Args:
        sides: of square maps. costs: label -> multiplications.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.2))
    for index, (label, values) in enumerate(costs.items()):
        axis.plot(sides, values, label=label, **style(index))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(sides), [str(s) for s in sides])
    axis.set_xlabel("side of the map, cells")
    axis.set_ylabel("multiplications")
    axis.legend()
    figure.tight_layout()
    return figure


def _window_lines(axis, shape, window: int) -> None:
    for at in range(0, shape[0] + 1, window):
        axis.plot([-0.5, shape[1] - 0.5], [at - 0.5] * 2, color="#0d161d", linewidth=1.6)
    for at in range(0, shape[1] + 1, window):
        axis.plot([at - 0.5] * 2, [-0.5, shape[0] - 0.5], color="#0d161d", linewidth=1.6)


def _bare(axis, shape, title: str) -> None:
    axis.set_xlim(-0.6, shape[1] - 0.4)
    axis.set_ylim(shape[0] - 0.4, -0.6)
    axis.set_aspect("equal")
    axis.set_title(title, color=INK, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)
