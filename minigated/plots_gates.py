"""Figures of chapter 2: two ways to say nothing, the toy task, the five positions, the recorded runs."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from minigated.plots import COLORS, INK, style
from minigated.plots_attention import CELLS

ARM_NAMES = {"none": "no gate", "g1_elementwise": "G1 elementwise", "g1_headwise": "G1 headwise"}


# ---------------------------------------------------------------------------------------------- one silent token
def two_ways(shares: dict[str, Sequence[float]], outputs: dict[str, Sequence[float]], tokens: Sequence[str]):
    """Where a silent token's attention goes, one panel a head, and what reaches the stream.

    Args:
        shares: title -> attention weight on each token. outputs: title -> (before the gate, after the gate).
        tokens: labels.
    """
    figure, axes = plt.subplots(len(shares), 1, figsize=(5.4, 1.75 * len(shares)), sharex=True)
    for index, (axis, (title, values)) in enumerate(zip(axes, shares.items())):
        bars = axis.bar(range(len(values)), values, color=COLORS[index], width=0.6)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], color=INK, fontsize=10)
        before, after = outputs[title]
        axis.set_title(f"{title}: average {before:.2f}, out goes {after:.2f}", color=INK, fontsize=11, loc="left")
        axis.set_ylim(0, 1.2)
        axis.set_ylabel("share")
        axis.set_xticks(range(len(tokens)), tokens)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- the toy task
def backcopy_figure(histories: dict[str, list[dict]]):
    """Share on BOS, value norm at BOS and gate scores over training, one curve a model.

    Args:
        histories: label -> results of `experiments.backcopy.look`, each with its "step".
    """
    figure, (share, value, gate) = plt.subplots(3, 1, figsize=(5.4, 8.4), sharex=True)
    for index, (label, history) in enumerate(histories.items()):
        steps, look = [h["step"] for h in history], style(index)
        share.plot(steps, [h["share_other"] for h in history], label=label, **look)
        share.plot(steps, [h["share_trigger"] for h in history], **look | {"linewidth": 0.8, "markersize": 3})
        value.plot(steps, [h["value_ratio"] for h in history], **look)
        if "gate_other" in history[0]:
            gate.plot(steps, [h["gate_trigger"] for h in history], **look)
            gate.plot(steps, [h["gate_other"] for h in history], **look | {"markerfacecolor": "none"})
    first = next(iter(histories.values()))[0]
    share.axhline(first["uniform"], color=INK, linewidth=1, linestyle=(0, (2, 2)))
    share.annotate("uniform", (1.0, first["uniform"]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    share.set_ylim(-0.03, 1)
    share.set_ylabel("share on BOS")
    value.set_ylim(bottom=0)
    value.set_ylabel("value norm, BOS / others")
    gate.set_ylim(0, 1)
    gate.set_ylabel("gate score")
    gate.set_xlabel("step")
    share.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(histories), fontsize=9, handlelength=2.6)
    figure.tight_layout()
    return figure


def character_maps(
    maps: dict[str, Tensor], text: str, triggers: Sequence[bool], gates: dict[str, Tensor], size: float = 4.6
):
    """Attention maps of one sequence, its characters on both axes, each query's gate as a bar at the right.

    Args:
        maps: title -> weights [T, T]. text: the T characters. triggers: which of them are.
        gates: title -> scores [T]; titles without one show no bars.
        size: inches of one map.
    """
    figure, axes = plt.subplots(
        len(maps), 2, figsize=(size * 1.25, size * len(maps)), squeeze=False, gridspec_kw={"width_ratios": (4, 1)}
    )
    rows = [f"▸ {c}" if t else c for c, t in zip(text, triggers)]
    for (left, right), (title, weights) in zip(axes, maps.items()):
        shown = weights.float().masked_fill(weights.new_ones(weights.shape).triu(1).bool(), float("nan"))
        left.imshow(shown.tolist(), cmap=CELLS, vmin=0, vmax=1)
        left.set_title(title, color=INK, fontsize=12, loc="left")
        left.set_xticks(range(len(text)), list(text))
        left.set_yticks(range(len(text)), rows)
        left.set_ylabel("query (▸ trigger)")
        left.set_xlabel("key")
        right.set_ylim(left.get_ylim())
        for axis in (left, right):
            axis.grid(False)
            axis.tick_params(length=0, labelsize=9)
        if title not in gates:
            right.set_axis_off()
            continue
        scores = gates[title].tolist()
        right.barh(range(len(text)), scores, color=[COLORS[1] if t else COLORS[0] for t in triggers], height=0.7)
        right.set_xlim(0, 1)
        right.set_xlabel("gate")
        right.set_yticks([])
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- the five positions
def positions_figure():
    """One attention layer as boxes from bottom (X) to top (the stream), the five gates on its arrows."""
    figure, axis = plt.subplots(figsize=(5.4, 6.0))
    boxes = {
        "X": (1.5, 0.0, "X, normalised"), "q": (0, 1.3, "$W_Q$"), "k": (1.5, 1.3, "$W_K$"), "v": (3, 1.3, "$W_V$"),
        "norm": (0.75, 3.0, "QK-norm, RoPE"), "sdpa": (1.5, 4.3, "softmax$(QK^T)\\,V$"), "o": (1.5, 5.9, "$W_O$"),
        "add": (1.5, 7.5, "add to the stream"),
    }  # fmt: skip
    wide = {"X": 1.7, "norm": 2.2, "sdpa": 2.6, "add": 2.2}
    for name, (x, y, label) in boxes.items():
        w = wide.get(name, 0.8)
        box = FancyBboxPatch((x - w / 2, y - 0.25), w, 0.5, boxstyle="round,pad=0.05", fc="none", ec=INK, lw=1.3)
        axis.add_patch(box)
        axis.text(x, y, label, ha="center", va="center", fontsize=11)
    arrows = [((1.2, 0.3), (0, 0.98)), ((1.5, 0.3), (1.5, 0.98)), ((1.8, 0.3), (3, 0.98)), ((0, 1.6), (0, 2.68)),
              ((1.5, 1.6), (1.5, 2.68)), ((0.75, 3.3), (1.1, 3.98)), ((3, 1.6), (2.4, 3.98)), ((1.5, 4.6), (1.5, 5.58)),
              ((1.5, 6.2), (1.5, 7.18))]  # fmt: skip
    for start, end in arrows:
        axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.2))
    gates = {"G4": (0, 2.1, 0), "G3": (1.5, 2.1, 0), "G2": (2.82, 2.1, 1), "G1": (1.5, 5.05, 1), "G5": (1.5, 6.65, 0)}
    for name, (x, y, works) in gates.items():
        look = {"facecolor": COLORS[1] if works else "white", "edgecolor": COLORS[1], "linewidth": 2}
        axis.scatter([x], [y], s=620, marker="o" if works else "s", zorder=3, **look)
        color = "white" if works else "#333333"
        axis.text(x, y, name, ha="center", va="center", color=color, fontsize=11, fontweight="bold", zorder=4)
    notes = {"G4": (-0.45, 2.1, "right"), "G1": (2.05, 5.05, "left"), "G2": (3.3, 2.1, "left"),
             "G5": (2.05, 6.65, "left")}  # fmt: skip
    words = {"G4": "queries", "G1": "after the sum:\nscores of the query's token",
             "G2": "before the sum:\nscores of each\nvalue's token", "G5": "after the\nheads are mixed"}  # fmt: skip
    for name, (x, y, side) in notes.items():
        axis.text(x, y, words[name], ha=side, va="center", fontsize=10)
    axis.text(1.0, 2.1, "keys", ha="right", va="center", fontsize=10)
    axis.set_xlim(-1.3, 4.9)
    axis.set_ylim(-0.4, 7.9)
    axis.set_axis_off()
    return figure


# ---------------------------------------------------------------------------------------------- language models
def pair_figure(losses: dict[str, Sequence[float]], measures: dict[str, dict], every: int = 5):
    """A gated and an ungated model: training loss, first-token share and gate score by layer.

    Args:
        losses: variant -> loss at each step. measures: variant -> result of `measure`. every: steps a point.
    """
    figure, (loss, share, gate) = plt.subplots(3, 1, figsize=(5.4, 8.0))
    for index, (name, values) in enumerate(losses.items()):
        look, found = style(index), measures[name]
        steps = range(every - 1, len(values), every)
        smooth = [sum(values[s - every + 1 : s + 1]) / every for s in steps]
        loss.plot(steps, smooth, label=ARM_NAMES.get(name, name), **look | {"marker": ""})
        layers = range(1, len(found["first_token_share"]) + 1)
        share.plot(layers, found["first_token_share"], label=ARM_NAMES.get(name, name), **look)
        if found["gate"]:
            bars = gate.bar(layers, found["gate"]["mean"], color=look["color"], width=0.5)
            gate.bar_label(bars, fmt="%.2f", color=INK, fontsize=10)
    uniform = next(iter(measures.values()))["uniform_share"]
    share.axhline(uniform, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    share.annotate("uniform", (1.0, uniform), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    share.set_ylim(bottom=0)
    gate.set_ylim(0, 1)
    for axis in (share, gate):
        axis.set_xticks(list(layers))
        axis.set_xlabel("layer")
    loss.set_xlabel("step")
    loss.set_ylabel("nats a byte")
    share.set_ylabel("first-token share")
    gate.set_ylabel("mean gate score")
    loss.legend()
    figure.tight_layout()
    return figure


def order_figure(record: dict):
    """Every row of a gate table: our mean with its deviation against the paper's perplexity, numbered."""
    rows = sorted(record["rows"], key=lambda row: row["paper"])
    figure, axis = plt.subplots(figsize=(5.4, 4.2))
    for number, row in enumerate(rows, start=1):
        family = 1 if row["name"].startswith("g1") else 2 if row["name"].startswith("g2") else 0
        look = style(family) | {"linestyle": "none", "markersize": 7}
        axis.errorbar(row["paper"], row["mean"], yerr=row["std"] or 0, capsize=2, elinewidth=1, **look)
        axis.annotate(str(number), (row["paper"], row["mean"]), (5, 4), textcoords="offset points", fontsize=9)
    for family, label in enumerate(("no gate, G3 to G5, more heads", "G1", "G2")):
        axis.plot([], [], label=label, **style(family) | {"linestyle": "none", "markersize": 7})
    axis.set_xlabel("paper: average perplexity")
    axis.set_ylabel(f"here: {record['metric']['name']}")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9, columnspacing=1.0)
    figure.tight_layout()
    return figure, ", ".join(f"{n} {row['name']}" for n, row in enumerate(rows, start=1))


def sink_figure(record: dict):
    """First-token share of each arm over training and, at the end, by layer; the uniform reference dotted."""
    figure, (time, layer) = plt.subplots(2, 1, figsize=(5.4, 6.0))
    for index, row in enumerate(record["rows"]):
        label, look = ARM_NAMES.get(row["name"], row["name"]), style(index)
        points = row["extra"]["followed"]
        time.plot([p["step"] for p in points], [p["f_attn"] for p in points], label=label, **look)
        shares = row["extra"]["measures"]["first_token_share"]
        layer.plot(range(1, len(shares) + 1), shares, label=label, **look)
    for axis in (time, layer):
        axis.axhline(record["rows"][0]["extra"]["uniform"], color=INK, linewidth=1, linestyle=(0, (2, 2)))
        axis.set_ylabel("first-token share")
        axis.set_ylim(bottom=0)
    layer.set_xticks(range(1, len(shares) + 1))
    time.set_xlabel("step")
    layer.set_xlabel("layer")
    time.legend()
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- tables
def claims_table(record: dict) -> str:
    """The claims of a gate table as Markdown: what was measured, difference, its standard error, verdict."""
    units = {"loss": record["metric"]["name"], "m_act": "largest activation", "f_attn": "first-token share"}
    lines = ["| the paper's claim | measured | difference | standard error | verdict |", "|---|---|---:|---:|---|"]
    for item in record["config"]["claims"]:
        error = item["standard_error"]
        shown = "–" if error is None else f"{error:.2g}"
        measured = units.get(item["measure"], item["measure"])
        lines.append(f"| {item['claim']} | {measured} | {item['difference']:+.3g} | {shown} | {item['verdict']} |")
    return "\n".join(lines)


def claims_told(record: dict) -> str:
    """The claims that seeds can judge, gathered under their verdicts, as Markdown; single runs judge nothing."""
    told: dict[str, list[str]] = {}
    for item in record["config"]["claims"]:
        if item["standard_error"] is not None:
            told.setdefault(item["verdict"], []).append(item["claim"])
    return "\n\n".join(f"**{verdict}**: {'; '.join(claims)}." for verdict, claims in told.items())
