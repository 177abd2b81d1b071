"""Figures of chapter 6: weights that need not sum to one, where heads look, growth, a trained pair, value gates."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from torch import Tensor

from minigated.plots import COLORS, INK, style
from minigated.plots_attention import CELLS
from minigated.statistics import paired_difference
from minigated.swat_options import SwatOptions


# ---------------------------------------------------------------------------------------------- two activations
def situations_figure(weights: dict[str, dict[str, Sequence[float]]], keys: Sequence[str]):
    """Bars of softmax and sigmoid weights side by side, one panel a situation, each with its sum.

    Args:
        weights: situation -> {activation: weight on each key}. keys: labels.
    """
    figure, axes = plt.subplots(len(weights), 1, figsize=(5.4, 1.75 * len(weights)), sharex=True)
    width = 0.36
    for axis, (situation, found) in zip(axes, weights.items()):
        for index, (name, values) in enumerate(found.items()):
            places = [i + (index - 0.5) * (width + 0.04) for i in range(len(values))]
            hatch = {} if index == 0 else {"hatch": "///", "edgecolor": "white", "linewidth": 0}
            bars = axis.bar(places, values, width, color=COLORS[index], label=f"{name}, sum {sum(values):.2f}", **hatch)
            axis.bar_label(bars, [f"{v:.2f}" for v in values], color=INK, fontsize=10)
        axis.set_title(situation, color=INK, fontsize=11, loc="left", pad=20)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.97), ncols=2, fontsize=9, borderaxespad=0.1)
        axis.set_ylim(0, 1.18)
        axis.set_ylabel("weight")
        axis.set_xticks(range(len(keys)), keys)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- where heads look
def map_grid(maps: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str], cell=None):
    """A grid of maps, each shaded on its own scale from 0 to its largest value, which stands below it.

    Args:
        maps: rows of tensors [h, w], none negative. rows, columns: labels.
        cell: (row, column) of a cell to mark with a cross, or None.
    """
    size = 5.4 / len(columns)
    figure, axes = plt.subplots(len(maps), len(columns), figsize=(5.4, (size + 0.28) * len(maps) + 0.3), squeeze=False)
    for index, (line, values, label) in enumerate(zip(axes, maps, rows)):
        for axis, value, title in zip(line, values, columns):
            shown = value.detach().float().cpu()
            axis.imshow(shown.tolist(), cmap=CELLS, vmin=0, vmax=max(float(shown.max()), 1e-12))
            if cell is not None:
                axis.scatter([cell[1]], [cell[0]], marker="x", s=42, color="white", linewidths=2.6)
                axis.scatter([cell[1]], [cell[0]], marker="x", s=34, color=COLORS[1], linewidths=1.5)
            axis.set_xlabel(f"largest {float(shown.max()):.2f}", fontsize=9, labelpad=2)
            if index == 0:
                axis.set_title(title, color=INK, fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        line[0].set_ylabel(label, fontsize=10)
    figure.tight_layout(h_pad=0.6, w_pad=0.4)
    return figure


# ---------------------------------------------------------------------------------------------- growth
def growth_figure(agreement: Sequence[float], lines: dict[str, Sequence[float]], points: dict[str, Sequence[float]]):
    """Scale of the output over the scale of the values, against how much the values agree.

    Args:
        agreement: shares of the values' variance that all cells have in common. lines: label -> predicted growth.
        points: label -> measured growth; a label of `lines` gets its look.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.5))
    looks = {label: style(index) for index, label in enumerate(lines)}
    for label, values in lines.items():
        axis.plot(agreement, values, **looks[label] | {"marker": ""})
    for label, values in points.items():
        look = looks.setdefault(label, style(len(looks)))
        axis.plot(agreement, values, label=label, **look | {"linestyle": "none", "markersize": 6})
    axis.set_xlabel("share of the values that all cells have in common")
    axis.set_ylabel("output scale / value scale")
    axis.set_yscale("log")
    axis.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- a trained pair
def training_figure(losses: dict[str, Sequence[float]], accuracy: dict[str, list[tuple[int, float]]], every: int = 5):
    """Training loss and validation accuracy over the steps, one curve a model.

    Args:
        losses: model -> loss of each step. accuracy: model -> (step, share correct). every: steps a point.
    """
    figure, (loss, right) = plt.subplots(2, 1, figsize=(5.4, 5.4), sharex=True)
    for index, (name, values) in enumerate(losses.items()):
        steps = range(every, len(values) + 1, every)
        smooth = [sum(values[s - every : s]) / every for s in steps]
        loss.plot(steps, smooth, label=name, **style(index) | {"marker": ""})
        right.plot(*zip(*accuracy[name]), label=name, **style(index))
    loss.set_ylabel("training loss, nats")
    right.set_ylabel("validation accuracy")
    right.set_xlabel("step")
    right.set_ylim(bottom=0)
    loss.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(losses), fontsize=9)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- gates over images
def gate_overlays(images: Tensor, gates: dict[str, Tensor]):
    """Pictures, and below each the map of a gate.

    Args:
        images: [N, h, w, 3] uint8. gates: label -> [N, h', w'], shaded from a label's smallest to its largest value.
    """
    figure, axes = plt.subplots(
        1 + len(gates), len(images), figsize=(5.4, 5.4 * (1 + len(gates)) / len(images)), squeeze=False
    )
    for column, image in enumerate(images):
        axes[0, column].imshow(image.cpu().numpy(), interpolation="nearest")
    for row, (label, maps) in enumerate(gates.items(), start=1):
        low, high = float(maps.min()), float(maps.max())
        for column, values in enumerate(maps):
            axes[row, column].imshow(values.detach().float().cpu().tolist(), cmap=CELLS, vmin=low, vmax=high)
        axes[row, 0].set_ylabel(f"{label}\n{low:.2f} to {high:.2f}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    figure.tight_layout(pad=0.3)
    return figure


# ---------------------------------------------------------------------------------------------- tables
# point, what the abstract says, SWAT's paper and code (RMT's where SWAT has no such part), here, other readings
POINTS = [
    ("activation", "sigmoid in place of softmax", "paper: sigmoid; code: softmax", "sigmoid", ()),
    ("slopes", "balanced ALiBi", "paper: 2^-k, half of each sign; code: 2^(-8k/H), one sign", "the paper's",
     ("slopes=alibi", "slopes=one_sided")),
    ("what a slope multiplies", "–", "m - n; causal, so never negative", "i - j with its sign", ("distance=absolute",)),
    ("slopes of the two passes", "–", "one direction only", "the same", ("pass_signs=opposed", "pass_signs=quadrants")),
    ("slopes and decay", "balanced slopes *with* decay after the activation", "no decay", "slope inside, decay outside",
     ("alibi=outer", "alibi=magnitude", "alibi=none", "decay=False")),
    ("rates of the decay", "per-head, exponential", "RMT's code: 1 - 2^(-2 - r h/H)", "RMT's", ()),
    ("value", "gated via SwiGLU", "no gate", "SiLU(uW_1) * uW_2", ("value=self", "value=mlp", "value=plain")),
    ("norm", "the normalised output", "none", "LayerNorm of Z over C",
     ("norm=rms", "norm=head", "norm=row_sum", "norm=window", "norm=log_window", "norm=none")),
    ("norm and LCE", "–", "no LCE", "norm before LCE is added", ("norm_place=after_lce",)),
    ("local context (LCE)", "only with the other variant", "RMT's code: 5x5 on V, whole map", "kept, on the gated V",
     ("lce=raw", "lce=none", "lce_place=window")),
    ("rotation", "no learned positions", "paper: RoPE; RMT's code: on the flat index", "RMT's, inside the window",
     ("rotation=False",)),
    ("output gate", "none named", "none", "none", ()),
]  # fmt: skip


def readings_table(record: dict | None) -> str:
    """Abstract, SWAT, here, and what each other reading changes, as Markdown.

    A change is the mean over the seeds that a reading and the defaults both have, with their number.

    Args:
        record: of the experiment `ch06_swat_readings`, whose rows hold their `SwatOptions` under "options" and a value
            for each of the seeds 0, 1, ...; None where it has not been run. Its metric is an accuracy in per cent.
    """
    rows = {_reading(row): row for row in record["rows"]} if record else {}
    lines = [
        "| point | the abstract | SWAT (or RMT) | here | other readings, and the change |",
        "|---|---|---|---|---|",
    ]
    for *words, readings in POINTS:
        changes = [
            f"`{name}` {_change(rows[name], rows['default'])}"
            for name in readings
            if name in rows and "default" in rows
        ]
        if missing := [f"`{name}`" for name in readings if name not in rows]:
            changes.append(f"{', '.join(missing)}: not run yet")
        lines.append(f"| {' | '.join(words)} | {'; '.join(changes) or '–'} |")
    if "default" in rows:
        mean, std = rows["default"]["mean"], rows["default"]["std"]
        spread = "" if std is None else f" ± {std:.2f} over seeds"
        lines.append(f"| our model as it is | – | – | {mean:.2f}{spread} | – |")
    return "\n".join(lines)


def _change(row: dict, default: dict) -> str:
    """Mean difference over the seeds of both rows, and how many these are; other seeds' luck is no change."""
    pairs = min(len(row["values"]), len(default["values"]))
    mean, _ = paired_difference(row["values"][:pairs], default["values"][:pairs])
    return f"{mean:+.2f} ({'single run' if pairs == 1 else f'{pairs} seeds'})"


def _reading(row: dict) -> str:
    """How a row differs from the defaults: "default", or "option=value"."""
    default, options = vars(SwatOptions()), (row["extra"].get("options") or {}).get("swat") or {}
    return " ".join(f"{name}={value}" for name, value in options.items() if value != default[name]) or "default"
