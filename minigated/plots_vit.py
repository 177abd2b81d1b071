"""Figures of chapter 5: what a gate keeps back, the mixer step by step, block, pyramid, pairs, gates on photographs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from minigated.plots import COLORS, INK, style
from minigated.plots_attention import CELLS
from minigated.windows import Axis


def _bare(axis) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)


# ---------------------------------------------------------------------------------------------- the question
def question_figure(image: Tensor, maps: dict[str, Tensor]):
    """A picture and maps over its cells, all shaded on one scale from 0 to 1; the mean of each stands below it.

    Args:
        image: [h, w, 3] uint8. maps: title -> [h', w'], from 0 to 1.
    """
    figure, axes = plt.subplots(2, 2, figsize=(5.4, 5.9))
    axes[0, 0].imshow(image.cpu().numpy(), interpolation="nearest")
    axes[0, 0].set_title("the picture", color=INK, fontsize=11)
    for axis, (title, values) in zip(axes.flat[1:], maps.items()):
        axis.imshow(values.detach().float().cpu().tolist(), cmap=CELLS, vmin=0, vmax=1)
        axis.set_title(title, color=INK, fontsize=11)
        axis.set_xlabel(f"smallest {float(values.min()):.2f}, mean {float(values.mean()):.2f}", fontsize=10)
    for axis in axes.flat:
        _bare(axis)
    figure.tight_layout(h_pad=1.4)
    return figure


# ---------------------------------------------------------------------------------------------- by hand
def steps_figure(steps: dict[str, Sequence[Sequence[float]]], columns: int = 3):
    """Small maps of numbers in reading order, one a step, each shaded from 0 to its own largest value.

    Args:
        steps: title -> rows of numbers. columns: maps side by side.
    """
    rows = -(-len(steps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4, 2.1 * rows), squeeze=False)
    for axis in axes.flat[len(steps) :]:
        axis.set_axis_off()
    for number, (axis, (title, values)) in enumerate(zip(axes.flat, steps.items()), start=1):
        largest = max(max(row) for row in values) or 1.0
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                share = max(0.0, value / largest)
                axis.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, facecolor=CELLS(share), linewidth=0))
                ink = "white" if share > 0.62 else "#0d161d"
                words = f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.2f}"
                axis.text(x, y, words, ha="center", va="center", color=ink, fontsize=12)
        axis.set_title(f"{number}. {title}", color=INK, fontsize=10)
        axis.set_xlim(-0.55, len(values[0]) - 0.45)
        axis.set_ylim(len(values) - 0.45, -0.55)
        axis.set_aspect("equal")
        axis.set_frame_on(False)
        _bare(axis)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- a block
def block_figure():
    """One block from bottom to top: position, norm, the mixer of eq. (5.1) with its gate, feed-forward."""
    figure, axis = plt.subplots(figsize=(5.4, 7.4))
    boxes = {
        "x": (2, 0, 2.2, "map, [h, w, C]"), "position": (2, 1.1, 2.6, "+ DWConv 3x3 of itself"),
        "norm": (2, 2.2, 1.8, "LayerNorm: $u$"), "qk": (0.4, 3.3, 1.3, "$Q$, $K$"), "v": (2, 3.3, 0.9, "$V$"),
        "scores": (4.1, 3.3, 1.5, "$\\sigma(u W_g)$"), "passes": (0.9, 4.5, 2.1, "width, height: $Z$"),
        "lce": (2.95, 4.5, 1.5, "LCE: DW 5x5"), "sum": (2, 5.6, 1.4, "$Y = Z$ + LCE"), "out": (2, 7.75, 0.9, "$W_O$"),
        "add": (2, 8.85, 1.5, "+ stream"), "ffn": (2, 9.95, 3.4, "+ feed-forward of LayerNorm"),
    }  # fmt: skip
    for x, y, wide, label in boxes.values():
        box = FancyBboxPatch((x - wide / 2, y - 0.27), wide, 0.54, boxstyle="round,pad=0.05", fc="none", ec=INK, lw=1.3)
        axis.add_patch(box)
        axis.text(x, y, label, ha="center", va="center", fontsize=10.5)
    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    arrows = [("x", "position"), ("position", "norm"), ("norm", "qk"), ("norm", "v"), ("norm", "scores"),
              ("qk", "passes"), ("v", "passes"), ("v", "lce"), ("passes", "sum"), ("lce", "sum"), ("sum", "gate"),
              ("gate", "out"), ("out", "add"), ("add", "ffn")]  # fmt: skip
    places = {name: box[:2] for name, box in boxes.items()} | {"gate": (2, 6.7)}
    for start, end in arrows:
        (x0, y0), (x1, y1) = places[start], places[end]
        axis.add_patch(FancyArrowPatch((x0, y0 + 0.35), (x1, y1 - 0.35), **look))
    axis.plot([4.1, 4.1], [3.65, 6.7], color=INK, lw=1.2)
    axis.add_patch(FancyArrowPatch((4.1, 6.7), (2.33, 6.7), **look))
    axis.plot([0.66, -0.75, -0.75], [1.1, 1.1, 8.85], color=INK, lw=1.2, linestyle="--")
    axis.add_patch(FancyArrowPatch((-0.75, 8.85), (1.19, 8.85), **look))
    axis.text(-0.63, 6.7, "the stream", fontsize=10, rotation=90, va="center")
    axis.scatter([2], [6.7], s=620, facecolor=COLORS[1], edgecolor=COLORS[1], zorder=3)
    axis.text(2, 6.7, "G1", ha="center", va="center", color="white", fontsize=11, fontweight="bold", zorder=4)
    axis.set_xlim(-1.1, 5.1)
    axis.set_ylim(-0.45, 10.4)
    axis.set_axis_off()
    return figure


# ---------------------------------------------------------------------------------------------- the pyramid
def pyramid_figure(stages: dict[str, Sequence[tuple[Axis, Axis]]]):
    """The map of each stage with its windows: solid in even blocks, dashed where odd blocks have shifted them.

    Args:
        stages: label of a row -> for each stage the plan of an axis without and with shift; maps are square.
    """
    count = max(map(len, stages.values()))
    figure, axes = plt.subplots(len(stages), count, figsize=(5.4, 2.0 * len(stages)), squeeze=False)
    for line, (label, plans) in zip(axes, stages.items()):
        largest = plans[0][0].side
        for number, (axis, (still, shifted)) in enumerate(zip(line, plans), start=1):
            side = still.side
            axis.add_patch(Rectangle((0, 0), side, side, facecolor=CELLS(0.25), edgecolor=COLORS[0], lw=1.6))
            for at in range(still.window, side, still.window):
                axis.plot([at, at], [0, side], [0, side], [at, at], color=COLORS[0], lw=1.1)
            for at in range(shifted.shift, side, shifted.window) if shifted.shift else ():
                axis.plot([at, at], [0, side], [0, side], [at, at], color=COLORS[1], lw=1.0, ls=(0, (2, 1.4)))
            room = largest * (0.5 + 0.5 * side / largest)  # small maps are enlarged a little, to be seen at all
            axis.set_xlim(side / 2 - room / 2, side / 2 + room / 2)
            axis.set_ylim(side / 2 + room / 2, side / 2 - room / 2)
            axis.set_aspect("equal")
            axis.set_title(f"stage {number}: {side}²", color=INK, fontsize=10)
            windows = still.windows**2
            axis.set_xlabel(f"{windows} window{'s' if windows > 1 else ''}\nof {still.window}²", fontsize=9)
            for spine in axis.spines.values():
                spine.set_visible(False)
            _bare(axis)
        line[0].set_ylabel(label, fontsize=10)
    figure.tight_layout(w_pad=0.3)
    return figure


# ---------------------------------------------------------------------------------------------- trained pairs
def pairs_figure(losses: dict[str, list[Sequence[float]]], accuracy: dict[str, list[list[tuple[int, float]]]], every=5):
    """Training loss and validation accuracy over the steps; thick the mean over the seeds, thin each seed.

    Args:
        losses: model -> for each seed the loss of each step. accuracy: model -> for each seed (step, per cent).
        every: steps a point of the loss.
    """
    figure, (loss, right) = plt.subplots(2, 1, figsize=(5.4, 5.4), sharex=True)
    for index, name in enumerate(losses):
        look = style(index)
        steps = list(range(every, len(losses[name][0]) + 1, every))
        runs = [[sum(run[s - every : s]) / every for s in steps] for run in losses[name]]
        points = [[value for _, value in run] for run in accuracy[name]]
        places = [step for step, _ in accuracy[name][0]]
        for axis, x, values in ((loss, steps, runs), (right, places, points)):
            for run in values:
                axis.plot(x, run, **look | {"linewidth": 0.6, "marker": "", "alpha": 0.8})
            mean = [sum(column) / len(column) for column in zip(*values)]
            marker = {} if axis is right else {"marker": ""}
            axis.plot(x, mean, label=name, **look | {"linewidth": 2.0} | marker)
    loss.set_ylabel("training loss, nats")
    right.set_ylabel("validation accuracy, %")
    right.set_xlabel("step")
    right.set_ylim(bottom=0)
    loss.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(losses), fontsize=9)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- gates over photographs
def gates_over_images(images: Tensor, gates: dict[str, Tensor]):
    """Photographs, and below each the same photograph under its gate: the more closed a cell, the larger its cover.

    Args:
        images: [N, h, w, 3] uint8. gates: label -> [N, h', w']; a row's smallest value covers all, its largest nothing.
    """
    count, side = len(images), images.shape[1]
    figure, axes = plt.subplots(1 + len(gates), count, figsize=(6.2, 5.1 * (1 + len(gates)) / count), squeeze=False)
    for axis, image in ((axis, image) for line in axes for axis, image in zip(line, images)):
        axis.imshow(image.cpu().numpy(), interpolation="nearest")
        axis.set_autoscale_on(False)
        _bare(axis)
    for line, (label, maps) in zip(axes[1:], gates.items()):
        low, high = float(maps.min()), float(maps.max())
        for axis, values in zip(line, maps):
            _covers(axis, ((high - values) / max(high - low, 1e-12)).tolist(), side / values.shape[0])
        name = label.replace(", ", "\n")
        line[0].set_ylabel(f"{name}\n{low:.2f} to {high:.2f}", fontsize=9, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    return figure


def _covers(axis, closed: list[list[float]], pixels: float) -> None:
    """A square in each cell, as wide as the cell is closed; `pixels` is the width of a cell."""
    for y, row in enumerate(closed):
        for x, share in enumerate(row):
            wide = share * pixels
            corner = ((x + 0.5) * pixels - 0.5 - wide / 2, (y + 0.5) * pixels - 0.5 - wide / 2)
            axis.add_patch(Rectangle(corner, wide, wide, facecolor="#f4f6f8", edgecolor="#20262d", linewidth=0.3))


# ---------------------------------------------------------------------------------------------- tables
# point, what the abstract says, RMT's code, here, the arm of `ch05_gate_ablation` that takes the other way
POINTS = [
    ("gate", "G1, a sigmoid, after LCE, before W_O", "none", "the abstract's", "no gate"),
    ("granularity", "–", "–", "one score a channel", "one gate score a head"),
    ("input of the gate", "the block input", "–", "u, after the norm", "gate from the block input before its norm"),
    ("bias of the gate", "–", "–", "none, as in chapter 2", "gate with a bias"),
    ("local context (LCE)", "yes; kernel not named", "5x5 on V, whole map", "RMT's", "no LCE"),
    ("decay", "additive, log-space", "the same; its paper: after the softmax", "additive", "no decay"),
    ("rates", "per-head, exponential", "1 - 2^(-2 - r h/H)", "RMT's", "RetNet's decay rates"),
    ("rotation", "no *learned* positions", "on the flat index of the map", "on the index inside the window",
     "no rotation"),
    ("windows", "shifted, adaptive", "none, whole rows and columns", "min(window, side) for each axis", None),
    ("last stage", "–", "one softmax over the map", "decomposed, as the others", None),
    ("skeleton", "–", "see above", "RMT's", None),
    ("widths and depths", "~77-79 M parameters", "four sizes", "128 to 1024; 2, 2, 12, 2", None),
]  # fmt: skip


def readings_table(record: dict | None) -> str:
    """Abstract, RMT's code, here, and what the other way changes when measured, as Markdown.

    Args:
        record: of the experiment `ch05_gate_ablation`, or None where it has not been run; its metric is an accuracy in
            per cent, its first row the model as it is.
    """
    rows = {row["name"]: row["values"] for row in record["rows"]} if record else {}
    lines = ["| point | the abstract | RMT's code | here | the other way, and the change |", "|---|---|---|---|---|"]
    for *words, arm in POINTS:
        change = "not run yet"
        if {arm, "as it is"} <= set(rows):  # over the seeds that both have: the others' luck is no change
            pairs = list(zip(rows[arm], rows["as it is"]))
            mean = sum(a - b for a, b in pairs) / len(pairs)
            change = f"{mean:+.2f}, {'single run' if len(pairs) == 1 else f'{len(pairs)} seeds'}"
        lines.append(f"| {' | '.join(words)} | {f'{arm}: {change}' if arm else 'not measured'} |")
    return "\n".join(lines)
