"""Figures of chapter 8: what each scaling does to each pair, and one trained model far beyond its trained length.

Each function returns the figure and its alternative text, so that `show(*frequency_figure(...), caption)` draws it.
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from minigated.plots import INK, style
from minigated.plots_attention import CELLS
from minigated.plots_gates import ARM_NAMES
from minigated.rope import rotary_frequencies, scaled_frequencies, yarn_ramp, yarn_ramp_by_index

NAMES = {"none": "unscaled", "base": "larger base", "interpolation": "interpolation", "yarn": "YaRN"}


# ---------------------------------------------------------------------------------------------- frequencies
def clock_figure(frequencies: Sequence[float], trained: int, length: int):
    """The ways of some clock hands, a row each: angles met in training (thick) and beyond it for the first time (thin).

    Args:
        frequencies: radians a position, fast hands first. trained: length of training. length: how far hands go on.
    """
    figure, axes = plt.subplots(1, len(frequencies), figsize=(5.4, 1.9), subplot_kw={"projection": "polar"})
    told = []
    for axis, theta in zip(axes, frequencies):
        met, new = (min(theta * (n - 1), 2 * math.pi) for n in (trained, length))
        for start, end, look in ((0, met, style(0)), (met, new, style(1))):
            arc = [start + (end - start) * i / 60 for i in range(61)]
            wide = {"linewidth": 6 if look == style(0) else 2, "marker": "", "solid_capstyle": "butt"}
            axis.plot(arc, [1.0] * 61, **look | wide)
        axis.set_theta_zero_location("N")
        axis.set_theta_direction(-1)
        axis.grid(False)
        axis.set(ylim=(0, 1.15), xticks=[0, math.pi / 2, math.pi, 3 * math.pi / 2], xticklabels=[], yticks=[])
        turns = trained * theta / (2 * math.pi)
        axis.set_title(f"{turns:.2g} turns", fontsize=9, color=INK)
        told.append(f"{turns:.2g} turns: {100 * met / (2 * math.pi):.0f} %, then {100 * new / (2 * math.pi):.0f} %")
    figure.tight_layout()
    return figure, f"Dials of {len(told)} hands, share seen within {trained} and {length} positions. {'; '.join(told)}."


def frequency_figure(width: int, base: float, factor: float, trained: int):
    """How many times slower each pair turns under each scaling, above YaRN's two ramps.

    Args:
        width: D. base, factor, trained: see `scaled_frequencies`.
    """
    plain = rotary_frequencies(width, base)
    turns = (trained * plain / (2 * math.pi)).tolist()
    figure, (slower, ramp) = plt.subplots(2, 1, figsize=(5.4, 6.4), sharex=True)
    for index, (scaling, label) in enumerate(NAMES.items()):
        scaled = scaled_frequencies(width, base, scaling, 1.0 if scaling == "none" else factor, trained)
        slower.plot(turns, (plain / scaled).tolist(), label=label, **style(index) | {"markersize": 3.5})
    ramps = {
        "straight in turns (paper)": yarn_ramp(plain, trained),
        "straight in pairs (released code)": yarn_ramp_by_index(width, base, trained),
    }
    for index, (label, gamma) in enumerate(ramps.items()):
        ramp.plot(turns, gamma.tolist(), label=label, **style(3 + index) | {"markersize": 3.5})
    for axis in (slower, ramp):
        axis.set_xscale("log")
        for end in (1, 32):
            axis.axvline(end, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    slower.legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ramp.legend(fontsize=9)
    ramp.invert_xaxis()  # shared: fast pairs at the left, as pair 0 is the fastest
    ramp.set_xlabel(f"turns of the pair within {trained} positions")
    ramp.set_ylabel(r"YaRN's ramp $\gamma$")
    slower.set_ylabel("times slower")
    figure.tight_layout()
    alt = (
        f"Two panels over the turns of each of {width // 2} pairs within {trained} positions, fast pairs at the left. "
        f"Above, how many times slower a pair turns: interpolation {factor:g} times for every pair, a larger base from "
        f"1 at the fastest to {factor:g} at the slowest, YaRN 1 above 32 turns and {factor:g} below one turn. Below, "
        f"YaRN's ramp from 1 at 32 turns to 0 at one turn, in the paper's form under that of the released code."
    )
    return figure, alt


# ---------------------------------------------------------------------------------------------- one model, measured
def position_figure(losses: dict[str, Sequence[dict]], trained: int, limit: float | None = None):
    """Loss by position, a curve a model or scaling; a dashed line ends the trained length.

    Args:
        losses: label -> result of `minigated.long_context.loss_by_position`. trained: length of training.
        limit: top of the axis in nats; a curve that leaves it has failed.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    for index, (label, rows) in enumerate(losses.items()):
        middles = [(row["start"] + row["end"]) / 2 for row in rows]
        axis.plot(middles, [row["nats"] for row in rows], label=label, **style(index))
    _length_axis(axis, trained)
    axis.set_xlabel("position")
    axis.set_ylabel("nats a byte")
    axis.set_ylim(top=limit)
    axis.legend(fontsize=9)
    figure.tight_layout()
    ends = "; ".join(f"{label}: {rows[0]['nats']:.2f} to {rows[-1]['nats']:.2f}" for label, rows in losses.items())
    return figure, f"Loss in nats a byte by position, trained length {trained}. First to last positions: {ends}."


def passkey_maps(accuracy: dict[str, Sequence[dict]], what: str = "digit"):
    """Passkeys found by depth (rows) and length (columns), one map a model, the percentage in each cell.

    Args:
        accuracy: title -> result of `minigated.data.passkey.passkey_accuracy`. what: "digit" or "exact".
    """
    first = next(iter(accuracy.values()))
    lengths, depths = (sorted({row[name] for row in first}) for name in ("length", "depth"))
    figure, axes = plt.subplots(len(accuracy), 1, figsize=(5.4, 2.9 * len(accuracy)), squeeze=False)
    told = []
    for axis, (title, rows) in zip(axes[:, 0], accuracy.items()):
        share = {(row["depth"], row["length"]): row[what] for row in rows}
        cells = [[share[depth, length] for length in lengths] for depth in depths]
        axis.imshow(cells, cmap=CELLS, vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                ink = "white" if value > 0.62 else "#0d161d"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=10)
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axis.set_ylabel("depth")
        axis.grid(False)
        axis.tick_params(length=0)
        means = [100 * sum(column) / len(column) for column in zip(*cells)]
        told.append(f"{title}: " + ", ".join(f"{m:.0f} % at {n}" for m, n in zip(means, lengths)))
    axes[-1, 0].set_xlabel("length")
    figure.tight_layout()
    unit = "digits" if what == "digit" else "whole keys"
    return figure, f"Percent of {unit} right by depth and length. Means over depths: {'; '.join(told)}."


def share_figure(shares: dict[str, Sequence[dict]], trained: int):
    """First-token share by length, a curve a model, with what uniform attention would give.

    Args:
        shares: label -> result of `minigated.long_context.share_by_length`. trained: length of training.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    for index, (label, rows) in enumerate(shares.items()):
        axis.plot([row["length"] for row in rows], [row["f_attn"] for row in rows], label=label, **style(index))
    rows = next(iter(shares.values()))
    lengths, uniform = ([row[name] for row in rows] for name in ("length", "uniform"))
    axis.plot(lengths, uniform, color=INK, linewidth=1, linestyle=(0, (2, 2)), label="uniform")
    _length_axis(axis, trained, lengths)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("length")
    axis.set_ylabel("first-token share")
    axis.legend(fontsize=9)
    figure.tight_layout()
    ends = "; ".join(f"{label}: {r[0]['f_attn']:.3f} to {r[-1]['f_attn']:.3f}" for label, r in shares.items())
    spread = f"uniform {uniform[0]:.3f} to {uniform[-1]:.3f}"
    return figure, f"First-token share from length {lengths[0]} to {lengths[-1]}. {ends}; {spread}."


# ---------------------------------------------------------------------------------------------- the record
def record_figure(record: dict):
    """Digits right by length, of each arm as trained on (filled) and with YaRN (hollow); below, the paper's RULER."""
    figure, panels = plt.subplots(2, 1, figsize=(5.4, 6.4))
    told = []
    for axis, which, unit in zip(panels, ("mean", "paper"), (record["metric"]["name"], "paper: RULER score")):
        for setting, hollow in (("trained on", False), ("trained on, yarn", True)):
            for index, (arm, label) in enumerate((a, ARM_NAMES[a]) for a in ARM_NAMES):
                rows = [r for r in record["rows"] if (r["extra"]["arm"], r["extra"]["setting"]) == (arm, setting)]
                rows = [r for r in rows if r[which] is not None]
                if not rows:
                    continue
                look = style(index) | ({"markerfacecolor": "none", "linestyle": ":"} if hollow else {})
                name, values = label + (", YaRN" if hollow else ""), [r[which] for r in rows]
                axis.plot([r["extra"]["length"] for r in rows], values, label=name, **look)
                told.append(f"{name} ({which}): " + ", ".join(f"{value:.0f}" for value in values))
        _length_axis(axis, 2 * record["config"]["context"], sorted({r["extra"]["length"] for r in record["rows"]}))
        axis.set_ylim(0, 105)
        axis.set_ylabel(unit)
    panels[0].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[1].set_xlabel("length here (the paper's: 16k to 128k)")
    figure.tight_layout()
    return figure, f"Score by length, ours above, the paper's below. {'; '.join(told)}."


def _length_axis(axis, trained: int, ticks: Sequence[int] | None = None) -> None:
    axis.set_xscale("log", base=2)
    if ticks:
        axis.set_xticks(ticks, ticks)
    else:
        axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.axvline(trained, color=INK, linewidth=1, linestyle="--")
    axis.annotate(" trained", (trained, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=9)
