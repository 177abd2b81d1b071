"""Figures of chapter 7: where tokens go, what a router does in training, the gate inside, the records.

Each function returns the figure and its alternative text, so that `show(*use_figure(...), caption)` draws it.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from minigated.plots import INK, style
from minigated.plots_attention import CELLS
from minigated.plots_gates import ARM_NAMES

SHEET = LinearSegmentedColormap.from_list("sheet", ["#dfe6ea", "#c3d0d9", "#0b4f7d", "#06263d"])
RATE_ARMS = {**ARM_NAMES, "sandwich_norm": "sandwich norms", "clip_100": "clip at 100"}


def _sheet(axis, cells, top: float) -> None:
    axis.imshow(cells, cmap=CELLS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def letters(text: str) -> list[str]:
    """Labels for the characters of a text; a space and the end of a line get signs of their own."""
    return [{" ": "␣", "\n": "¶"}.get(character, character) for character in text]


# ---------------------------------------------------------------------------------------------- routing
def paths_figure(text: str, chosen: Tensor, experts: int):
    """Which experts each character visits in one layer: a column a character, a row an expert.

    Args:
        text: T characters. chosen: [T, k], the first choice darker than the others.
        experts: E.
    """
    cells = [[0.0] * len(text) for _ in range(experts)]
    for place, row in enumerate(chosen.tolist()):
        for rank, expert in enumerate(row):
            cells[expert][place] = 0.6 if rank else 1.0
    figure, axis = plt.subplots(figsize=(5.4, 0.17 * experts + 0.8))
    _sheet(axis, cells, 1.0)
    axis.set_xticks(range(len(text)), letters(text), fontsize=10)
    axis.set_yticks(range(0, experts, 5), range(0, experts, 5))
    axis.set_ylabel("expert")
    figure.tight_layout()
    visited = len(set(chosen.flatten().tolist()))
    alt = f"A grid of {experts} experts by {len(text)} characters. Each character visits {chosen.shape[1]} experts; "
    return figure, alt + f"together they visit {visited} of {experts}."


def use_figure(shares: dict[str, Sequence[Sequence[float]]], rows: Sequence[str], least: float = 0.0):
    """Load of each expert, one panel a title: a row a layer (or a kind of token), a column an expert.

    Args:
        shares: title -> rows of shares [E] that sum to 1; the cells show them times E, so 1.0 is an even load.
        rows: their labels. least: loads below this one stay without a number.
    """
    experts, told = len(next(iter(shares.values()))[0]), []
    loads = {title: [[share * experts for share in row] for row in found] for title, found in shares.items()}
    top = max(3.0, *(load for found in loads.values() for row in found for load in row))
    figure, axes = plt.subplots(len(shares), 1, figsize=(5.4, (0.34 * len(rows) + 0.75) * len(shares)), squeeze=False)
    for axis, (title, found) in zip(axes[:, 0], loads.items()):
        _sheet(axis, found, top)
        for i, row in enumerate(found):
            for j, load in enumerate(row):
                ink = "white" if load > 0.62 * top else "#0d161d"
                if load >= least:
                    axis.text(j, i, f"{load:.1f}", ha="center", va="center", color=ink, fontsize=8)
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        axis.set_xticks(range(experts), range(experts), fontsize=9)
        axis.set_yticks(range(len(rows)), rows, fontsize=10)
        told.append(f"{title}: fullest " + ", ".join(f"{max(r):.1f} in {n}" for n, r in zip(rows, found)))
    axes[-1, 0].set_xlabel("expert")
    figure.tight_layout()
    return figure, f"Load of {experts} experts, 1.0 is even. {'; '.join(told)}."


# ---------------------------------------------------------------------------------------------- training
def collapse_figure(shares: dict[str, Sequence[Sequence[float]]], losses: dict[str, Sequence[float]], every: int = 1):
    """Loads over training, a sheet a model with an expert a row, sorted by its load at the end; below, the losses.

    Args:
        shares: label -> at each look, the share of each expert [E]. losses: label -> loss at each look.
        every: steps between looks.
    """
    heights = [1.6] * len(shares) + [2.0]
    figure, axes = plt.subplots(len(heights), 1, figsize=(5.4, sum(heights) + 0.9), height_ratios=heights, sharex=True)
    told = []
    for axis, (label, looks) in zip(axes, shares.items()):
        order = sorted(range(len(looks[-1])), key=lambda e: -looks[-1][e])
        experts, end = len(order), every * len(looks)
        axis.imshow(
            [[look[e] * experts for look in looks] for e in order],
            cmap=SHEET, vmin=0, vmax=4, aspect="auto", interpolation="nearest", extent=(0, end, experts, 0),
        )  # fmt: skip
        axis.grid(False)
        axis.set_yticks([])
        axis.set_ylabel(f"{experts} experts")
        axis.set_title(label, color=INK, fontsize=11, loc="left")
        idle = sum(share < 0.1 / experts for share in looks[-1])
        told.append(f"{label}: fullest {max(looks[-1]) * experts:.1f} times its part, {idle} of {experts} hardly used")
    for index, (label, values) in enumerate(losses.items()):
        steps = [every * (i + 0.5) for i in range(len(values))]
        axes[-1].plot(steps, values, label=label, **style(index) | {"marker": ""})
    axes[-1].set_xlabel("step")
    axes[-1].set_ylabel("loss")
    axes[-1].legend(fontsize=9)
    figure.tight_layout()
    return figure, f"Loads of experts over {end} steps, and the loss. At the end: {'; '.join(told)}."


# ---------------------------------------------------------------------------------------------- the gate
def gate_text_figure(text: str, scores: Tensor):
    """Gate scores along a text: a row a head, grouped by layer, a column a character.

    Args:
        text: T characters. scores: [layers, H, T] in [0, 1], means over a head's channels.
    """
    layers, heads, _ = scores.shape
    figure, axis = plt.subplots(figsize=(5.4, 0.18 * layers * heads + 0.9))
    _sheet(axis, scores.flatten(0, 1).tolist(), scores.max().item())
    for layer in range(1, layers):
        axis.axhline(heads * layer - 0.5, color="white", linewidth=2)
    axis.set_xticks(range(len(text)), letters(text), fontsize=8)
    axis.set_yticks([heads * (i + 0.5) - 0.5 for i in range(layers)], [f"layer {i + 1}" for i in range(layers)])
    bar = figure.colorbar(axis.images[0], ax=axis, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    figure.tight_layout()
    means = ", ".join(f"layer {i + 1} {m:.2f}" for i, m in enumerate(scores.mean((1, 2)).tolist()))
    return figure, f"Gate scores of {heads} heads in {layers} layers along {len(text)} characters. Means: {means}."


# ---------------------------------------------------------------------------------------------- the records
def rate_figure(record: dict):
    """Test loss of each variant at one, two and four times the rate; below, the paper's perplexities."""
    figure, panels = plt.subplots(2, 1, figsize=(5.4, 6.0), sharex=True)
    told = []
    for axis, which, unit in zip(panels, ("mean", "paper"), (record["metric"]["name"], "paper: perplexity")):
        for index, (arm, label) in enumerate(RATE_ARMS.items()):
            rows = [r for r in record["rows"] if r["extra"]["variant"] == arm and r[which] is not None]
            if not rows:
                continue
            times, values = [r["extra"]["times"] for r in rows], [r[which] for r in rows]
            spread = [r["std"] or 0.0 for r in rows] if which == "mean" else None
            axis.errorbar(times, values, yerr=spread, capsize=3, label=label, **style(index))
            told.append(f"{label} ({which}): " + ", ".join(f"{v:.3g} at {n}x" for v, n in zip(values, times)))
        axis.set_ylabel(unit)
        axis.set_xscale("log", base=2)
    ticks = sorted({r["extra"]["times"] for r in record["rows"]})
    panels[1].set_xticks(ticks, [f"{n}x" for n in ticks])
    panels[1].set_xlabel("learning rate")
    panels[0].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure, f"Loss by learning rate, ours above, the paper's below. {'; '.join(told)}."


def sinks_figure(record: dict, arms: Sequence[str] = ("none", "g1_elementwise", "g1_headwise", "g2_elementwise")):
    """By layer: first-token share with the uniform reference, largest activation, mean gate score."""
    names = {"f_attn": "first-token share", "m_act": "largest activation", "gate": "mean gate score"}
    figure, panels = plt.subplots(3, 1, figsize=(5.4, 8.0), sharex=True)
    chosen = [row for name in arms for row in record["rows"] if row["name"] == name]
    for axis, (what, unit) in zip(panels, names.items()):
        for index, row in enumerate(chosen):
            values = row["extra"][f"{what}_by_layer"]
            if values:
                layers = range(1, len(values) + 1)
                axis.plot(layers, values, label=ARM_NAMES.get(row["name"], row["name"]), **style(index))
        axis.set_ylabel(unit)
        if what == "m_act":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    panels[0].axhline(chosen[0]["extra"]["uniform"], color=INK, linewidth=1, linestyle=(0, (2, 2)))
    panels[0].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[2].set_xlabel("layer")
    panels[2].set_xticks(range(1, len(chosen[0]["extra"]["f_attn_by_layer"]) + 1))
    figure.tight_layout()
    means = ", ".join(f"{row['name']} {row['extra']['f_attn']:.3f} and {row['mean']:.3g}" for row in chosen)
    return figure, f"Three panels by layer. Means of first-token share and of the largest activation: {means}."
