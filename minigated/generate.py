"""Text from a language model, one token at a time, with the keys and values of the past kept (chapter 7).

A new token needs the keys and values of every earlier token and nothing else of them. Without a cache each step runs
the whole sequence again; with one it runs a single position. The gate at G1 multiplies the attention output of the
position at hand, so it needs nothing from the past; G2 and G3 gate values and keys *before* they are kept.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.errors import InputError
from minigated.lm import LanguageModel
from minigated.static_cache import StaticCache, likeliest, refuse_unknown

SPOILT = "the logits hold NaN or infinity, so no token can be drawn; the model's weights are spoilt"


# ---------------------------------------------------------------------------------------------- the distribution
def sampling_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What the next token is drawn from: softmax(logits / temperature), cut to its likeliest tokens and rescaled.

    The cuts come after the temperature and one after the other: `top_k` first, `top_p` on what that leaves. Of equally
    likely tokens the one with the smaller number goes first, so exactly k are kept.

    Args:
        logits: [..., V].
        temperature: under 1 sharpens, over 1 flattens; 0 puts everything on the likeliest token.
        top_k: tokens to keep; all by default.
        top_p: keep the fewest likeliest tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751); all by default.

    Returns:
        [..., V] float64, rows that sum to 1. In float64, because the cut at `top_p` compares sums.

    Raises:
        InputError: a setting out of its range, or logits that give no distribution (NaN, infinity).
    """
    refuse_settings(temperature, top_k, top_p)
    logits = logits.double()
    if not (logits.amax(-1).isfinite().all() and not logits.isnan().any()):
        raise InputError(SPOILT)
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)  # [..., V]
    if temperature == 0:
        kept = torch.zeros_like(ordered)
        kept[..., 0] = 1.0
    else:
        # the largest logit first becomes 0, or a tiny temperature would turn it into infinity
        kept = torch.softmax((ordered - ordered[..., :1]) / temperature, -1)
        if top_k is not None:
            kept[..., top_k:] = 0.0
            kept = kept / kept.sum(-1, keepdim=True)
        if top_p is not None and top_p < 1:
            before = F.pad(kept.cumsum(-1)[..., :-1], (1, 0))  # probability of the tokens ahead of this one
            kept = kept.masked_fill(before >= top_p, 0.0)
            kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def refuse_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuses sampling settings out of range, naming the value and what is accepted."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature:g}; accepted: 0 (the likeliest token) or a number above it")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; accepted: 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p:g}; accepted: above 0, up to 1")


# ---------------------------------------------------------------------------------------------- the loop
def generate(
    model: LanguageModel,
    tokens: Tensor,
    new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    cache: bool | StaticCache = True,
) -> Iterator[Tensor]:
    """Continues token sequences, one token of every row at a time.

    Args:
        model: any language model; in evaluation mode while the iterator runs.
        tokens: the prompts, [B, T] of whole numbers, all of one length.
        new_tokens: tokens to add at most; as many as the context has room for by default.
        temperature, top_k, top_p: see `sampling_probabilities`.
        stop: tokens that end a row. A row repeats its own until all rows have ended; then the iterator ends too.
        generator: of the draws, on the CPU, where the tokens are drawn: a seed gives the same text on every device, as
            far as rounding allows. PyTorch's own by default.
        cache: keep keys and values; without, every step runs the whole sequence again (the reference form). A
            `StaticCache` of this model, made once for many texts, runs one compiled step for every token.

    Returns:
        An iterator of [B] int64 on the CPU: the next token of each row.

    Raises:
        InputError: at once, before anything is computed: a prompt that is empty, too long or holds an unknown token,
            more new tokens than the context or the static cache has room for, a static cache made for another model
            or another number of rows, a setting out of its range.
    """
    refuse_settings(temperature, top_k, top_p)
    room = _room(model, tokens)
    if isinstance(cache, StaticCache):
        room = _room_in(cache, model, tokens, room, new_tokens)
    if new_tokens is not None and new_tokens < 1:
        raise InputError(f"{new_tokens} new tokens are too few; accepted: 1 or more")
    if new_tokens is not None and new_tokens > room:
        raise InputError(
            f"{tokens.shape[1]} tokens of prompt and {new_tokens} new ones are longer than the context of "
            f"{model.config.context}; accepted: {room} new tokens at most"
        )
    for token in stop:
        if not 0 <= token < model.config.vocabulary:
            raise InputError(f"stop token {token} is unknown; accepted: 0 to {model.config.vocabulary - 1}")
    draw = lambda logits: _draw(logits, temperature, top_k, top_p, generator)
    tokens, count = tokens.long(), room if new_tokens is None else new_tokens
    if not isinstance(cache, StaticCache):
        source = _drawn(model, tokens, count, draw, cache)
    else:
        source = cache.greedy(tokens, count) if temperature == 0 else _drawn_static(cache, tokens, count, draw)
    return _continue(model, source, tuple(stop))


def _room(model: LanguageModel, tokens: Tensor) -> int:
    """New tokens that fit after the prompt; refuses a prompt that cannot be continued."""
    vocabulary, context = model.config.vocabulary, model.config.context
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError(f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; accepted: whole numbers [B, T]")
    if not tokens.numel():
        raise InputError("the prompt is empty; accepted: at least one token")
    if tokens.shape[1] >= context:
        raise InputError(
            f"the prompt has {tokens.shape[1]} tokens, which leaves no room in the context of {context}; "
            f"accepted: {context - 1} at most"
        )
    refuse_unknown(tokens, vocabulary)
    return context - tokens.shape[1]


def _room_in(cache: StaticCache, model: LanguageModel, tokens: Tensor, room: int, new_tokens: int | None) -> int:
    """New tokens that fit into a static cache too; refuses one that was made for something else."""
    batch, length = tokens.shape
    if cache.model is not model:
        raise InputError("the static cache was made for another model; accepted: one made from this model")
    if cache.batch != batch:
        raise InputError(f"the static cache was made for a batch of {cache.batch}; a batch of {batch} was given")
    fits = cache.length - length
    if fits < (new_tokens or 1) and fits < room:
        raise InputError(
            f"{length} tokens of prompt and {new_tokens or 1} new ones do not fit into a static cache of "
            f"{cache.length}; accepted: {cache.length} tokens together"
        )
    return min(room, fits)


def _continue(model: LanguageModel, source: Iterator[Tensor], stop: tuple[int, ...]) -> Iterator[Tensor]:
    """What `source` draws, up to where the last row ends; a row that has ended repeats its last token."""
    was_training, ended, last = model.training, None, None
    model.eval()
    try:
        for drawn in source:  # [B]
            if (drawn < 0).any():
                raise InputError(SPOILT)
            drawn = drawn if last is None else torch.where(ended, last, drawn)
            over = torch.isin(drawn, torch.tensor(stop, dtype=torch.int64))
            ended, last = over if ended is None else ended | over, drawn
            yield drawn
            if ended.all():
                return
    finally:  # also when the caller stops asking
        model.train(was_training)


def _drawn(model: LanguageModel, tokens: Tensor, count: int, draw, cache: bool) -> Iterator[Tensor]:
    """Draws with a growing cache, or with none. Rows do not know of each other: one that has ended may go on here."""
    past = model.new_cache(len(tokens), tokens.shape[1] + count) if cache else None
    sequence = fresh = tokens.to(model.embedding.weight.device)  # [B, T]; `fresh` is what the cache has not seen
    for _ in range(count):
        drawn = draw(_last_logits(model, fresh if cache else sequence, past))  # [B]
        yield drawn
        fresh = drawn[:, None].to(sequence.device)  # [B, 1]
        sequence = torch.cat((sequence, fresh), dim=1)


def _drawn_static(cache: StaticCache, tokens: Tensor, count: int, draw) -> Iterator[Tensor]:
    logits = cache.start(tokens)
    for number in range(count):
        drawn = draw(logits)
        yield drawn
        if number + 1 < count:
            logits = cache.step(drawn)


@torch.inference_mode()
def _last_logits(model: LanguageModel, tokens: Tensor, past) -> Tensor:
    return model(tokens, cache=past)[:, -1]  # [B, V]


def _draw(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token a row, [B] on the CPU."""
    if temperature == 0:
        return likeliest(logits).cpu()  # takes nothing from the generator, and moves B numbers, not B x V
    probabilities = sampling_probabilities(logits.cpu(), temperature, top_k, top_p)  # [B, V]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
