"""One trained model beyond its trained length: other rotary tables without training, loss and sink by position."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.data.text import TextBatches
from minigated.device import autocast
from minigated.errors import InputError
from minigated.measure import measure, summary
from minigated.rope import RotaryTable, scaled_frequencies


def with_rope(
    model,
    scaling: str = "none",
    factor: float = 1.0,
    context: int | None = None,
    base: float | None = None,
    trained: int | None = None,
):
    """The same model with another rotary table, without training.

    Args:
        model: a `LanguageModel`; it stays as it was.
        scaling, factor: see `minigated.rope.scaled_frequencies`.
        context: positions of the table; `factor` times the model's own by default.
        base: of the frequencies, the model's own by default; 1,000,000 is the paper's, before it trains on.
        trained: length of training, the model's context by default; "yarn" needs to know it.

    Returns:
        A model that shares every weight with `model`: training one trains both.

    Raises:
        InputError: an unknown scaling, or a factor that is below 1 or has no effect.
    """
    config = model.config
    trained, base = trained or config.context, base or config.rope_base
    scaled_frequencies(config.head_width, base, scaling, factor, trained)  # refuses what makes no sense
    context = context or int(config.context * factor)
    if context < 1:
        raise InputError(f"context {context}; accepted: at least 1")
    table = RotaryTable(context, config.head_width, base, scaling=scaling, factor=factor, trained=trained)
    other = copy.copy(model)
    other._modules = dict(model._modules)  # a shallow copy would put the table into the first model too
    other.rotary = table.to(model.rotary.cos.device)
    other.config = replace(
        config, context=context, rope_base=base, rope_scaling=scaling, rope_factor=factor, trained_context=trained
    )
    return other


@torch.no_grad()
def loss_by_position(
    model, windows: Iterable[Tensor], bins: Sequence[int], precision: str = "float32"
) -> list[dict[str, float]]:
    """Loss by how far into the sequence a token is predicted, in nats a token; exp of it is the perplexity.

    Args:
        model: tokens [B, T] -> logits [B, T, V].
        windows: tensors [B, T + 1] of one length; inputs are all but the last token, targets all but the first.
        bins: edges, increasing, from 0 to T: bin i holds the positions bins[i] .. bins[i + 1] - 1 of the inputs.
        precision: see `minigated.device.autocast`.

    Returns:
        For each bin: start, end (not included), nats.

    Raises:
        InputError: no windows, or edges that do not increase or reach beyond them.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total, rows = 0.0, 0
    try:
        for batch in windows:
            tokens = batch.to(device)
            with autocast(device, precision):
                logits = model(tokens[:, :-1])  # [B, T, V]
            losses = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")  # [B, T]
            total, rows = total + losses.double().sum(0), rows + len(tokens)
    finally:
        model.train(was_training)
    if not rows:
        raise InputError("no window was given, so there is no loss to measure")
    length = len(total)
    if len(bins) < 2 or bins[0] < 0 or bins[-1] > length or any(a >= b for a, b in zip(bins, bins[1:])):
        raise InputError(f"edges of bins are {list(bins)}; accepted: two or more, increasing, from 0 to {length}")
    means = (total / rows).cpu()  # [T]
    return [{"start": a, "end": b, "nats": means[a:b].mean().item()} for a, b in zip(bins, bins[1:])]


def share_by_length(
    model, tokens: Tensor, lengths: Sequence[int], count: int = 8, batch: int = 4, precision: torch.dtype | None = None
) -> list[dict[str, float]]:
    """First-token share of sequences of several lengths, beside what uniform attention would give.

    Args:
        model: any model that takes `probe`. tokens: a held-out text, [length] uint8.
        lengths: tokens a sequence, BOS included. count: sequences of each length. batch: sequences a pass.
        precision: autocast dtype, see `minigated.measure.measure`.

    Returns:
        For each length: length, f_attn (mean over layers and heads, query 0 left out), uniform, m_act.
    """
    rows = []
    for length in lengths:
        passes = -(-count // batch)
        size = -(-count // passes)
        text = TextBatches(tokens, context=length, batch=size)
        sizes = [size] * (passes - 1) + [count - size * (passes - 1)]
        windows = [w[:n, :-1] for w, n in zip(text.sequential(passes), sizes)]
        found = summary(measure(model, windows, precision))
        rows.append({"length": length} | {name: found[name] for name in ("f_attn", "uniform", "m_act")})
    return rows
