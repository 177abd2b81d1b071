"""Decoding with shapes that never change: one compiled step, on a GPU one CUDA graph, for every token (chapter 9).

A `KVCache` hands attention the keys so far, one more at every token, so each step has other shapes. Here a step always
sees the whole cache; a mask hides what is not written yet, and the position is a number on the device. Then the step
compiles once, and a GPU replays its recording: the host starts one thing instead of hundreds.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.cuda_graph import recorded
from minigated.device import allow_graphs
from minigated.errors import InputError, one_of
from minigated.fused_step import decode_fused, unserved
from minigated.lm import LanguageModel

BACKEND = "inductor"
WAYS = ("eager", "compiled", "fused")
SHORT = 16  # tokens of a prompt that a recorded step reads one by one, sooner than the model reads them at once


def likeliest(logits: Tensor) -> Tensor:
    """The token with the largest logit, of equal ones the first; -1 where NaN or infinity leave none.

    Args:
        logits: [B, V].

    Returns:
        [B] int64. Nothing is read back from the device.
    """
    return torch.where(logits.amax(-1).isfinite(), logits.argmax(-1), -1)  # NaN is the largest of its row


class StepCache:
    """A layer's `KVCache` as one step of fixed shapes sees it. Takes the place of a `KVCache` in `Attention`.

    Args:
        k, v: the cache's tensors, [B, K, capacity, D].
        length: tokens held before this one, int64 [1] on their device. seen: bool [1, capacity], true up to this one.
    """

    def __init__(self, k: Tensor, v: Tensor, length: Tensor, seen: Tensor):
        self.k, self.v, self.length, self.seen = k, v, length, seen

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one token, [B, K, 1, D], at its place; returns the whole cache, [B, K, capacity, D]."""
        self.k.index_copy_(2, self.length, k.to(self.k.dtype))  # of another one under autocast
        self.v.index_copy_(2, self.length, v.to(self.v.dtype))
        return self.k, self.v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query a head, [B, H, 1, D] -> [B, H, 1, D].

        The heads of a group stand as queries beside each other, so that keys and values are read once a group.
        """
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, K, H/K, D]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.seen).reshape(q.shape)


def decode(model: LanguageModel, tokens: Tensor, position: Tensor, held: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One step: writes the tokens' keys and values into the cache and returns what follows.

    Args:
        model: in evaluation mode.
        tokens: [B] int64; -1 (see `likeliest`) is read as 0. position: int64 [1], where they stand.
        held: (k, v) of each layer, [B, K, capacity, D]; written to.

    Returns:
        Logits [B, V].
    """
    capacity = held[0][0].shape[2]
    seen = torch.arange(capacity, device=position.device)[None] <= position  # [1, capacity], one for all layers
    caches = [StepCache(k, v, position, seen) for k, v in held]
    return model(tokens.clamp(min=0)[:, None], caches)[:, -1]


def refuse_unknown(tokens: Tensor, vocabulary: int) -> None:
    """Reads the tokens back, which a GPU would have to wait for."""
    if tokens.is_floating_point():
        raise InputError(f"tokens are {tokens.dtype}; accepted: whole numbers")
    tokens = tokens.long()  # in uint8 a comparison with 256 is one with 0
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(unknown):
        raise InputError(f"token {unknown[0].item()} is unknown; accepted: 0 to {vocabulary - 1}")


class StaticCache:
    """Keys and values of a fixed number of tokens, allocated once, and the step that continues them.

    One object serves any number of texts, one after the other; `minigated.generate.generate(..., cache=it)` uses it.
    Moving the model or changing its dtype afterwards would leave the recording with the old weights: make a new one.

    Args:
        model: a language model, on its device.
        batch: B, rows of every text. length: tokens that fit, prompt and new; the model's context by default.
        way: how a step runs: "eager", operation by operation; "compiled"; or "fused", by `minigated.fused_step`. The
            last two are recorded on a GPU. By default fused where that serves, compiled elsewhere.

    Attributes:
        tokens: int64 [B], on the device: after `start` and each step, the likeliest next token.
        logits: [B, V] of the last step; the next one may write over them.

    Raises:
        InputError: no row, more tokens than the context has positions, an unknown way, or "fused" where that does not
            serve; the message says why.
    """

    @torch.inference_mode(False)  # the tensors are written to at every step, in whatever mode that is
    def __init__(
        self,
        model: LanguageModel,
        batch: int = 1,
        length: int | None = None,
        way: str | None = None,
    ):
        context = model.config.context
        length = context if length is None else length
        if batch < 1:
            raise InputError(f"a batch of {batch}; accepted: 1 or more")
        if not 2 <= length <= context:
            raise InputError(f"a static cache of {length} tokens; accepted: 2 to {context}, the context")
        why = unserved(model, batch)
        self.way = way or ("compiled" if why else "fused")
        one_of("way of a static cache", self.way, WAYS)
        if self.way == "fused" and why:
            raise InputError(f"the fused step {why}")
        self.model, self.batch, self.length = model, batch, length
        self.caches = model.new_cache(batch, length)
        self.held = [(cache.k, cache.v) for cache in self.caches]
        self.tables = model.rotary.cos, model.rotary.sin  # a recording reads these, should the model make new ones
        self.device = device = self.held[0][0].device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.host = torch.zeros(batch, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.decode = _compiled(device) if self.way == "compiled" else decode
        self.ready = self.way == "eager"
        self.advance, self.recorded, self.logits = self._advance, False, None

    @torch.no_grad()
    def start(self, tokens: Tensor) -> Tensor:
        """Forgets what it holds and reads prompts.

        Args:
            tokens: [B, T] int64.

        Returns:
            Logits of the next token, [B, V].

        Raises:
            InputError: prompts of another shape or too long, or an unknown token.
        """
        if tokens.ndim != 2 or len(tokens) != self.batch or not 0 < tokens.shape[1] < self.length:
            raise InputError(
                f"prompts of shape {list(tokens.shape)}; this static cache takes {self.batch} rows of 1 to "
                f"{self.length - 1} tokens"
            )
        refuse_unknown(tokens, self.model.config.vocabulary)
        self.prepare()
        for cache in self.caches:
            cache.length = 0
            cache.k.zero_()
            cache.v.zero_()  # what a mask hides is multiplied by 0, which an infinity from the last text would survive
        if self.recorded and tokens.shape[1] <= SHORT:
            self.position.zero_()
            for column in tokens.to(self.device).unbind(1):
                self.step(column)
            return self.logits
        self.logits = self.model(tokens.to(self.device, torch.int64), self.caches)[:, -1]  # all at once, as ever
        self.tokens.copy_(likeliest(self.logits))
        self.position.fill_(tokens.shape[1])
        return self.logits

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Adds a token to every row.

        Args:
            tokens: [B] int64; the likeliest ones of the step before by default.

        Returns:
            Logits of the next token, [B, V].

        Raises:
            InputError: a full cache, tokens of another shape, or an unknown token; on a GPU tokens are not looked at.
        """
        if self.caches[0].length >= self.length:
            raise InputError(f"the cache holds {self.length} tokens; {self.length + 1} were given")
        if tokens is not None and tokens.shape != self.tokens.shape:
            raise InputError(f"tokens of shape {list(tokens.shape)}; accepted: [{self.batch}], one a row")
        if tokens is not None and tokens.device.type == "cpu":
            refuse_unknown(tokens, self.model.config.vocabulary)
        self.prepare()
        for cache in self.caches:
            cache.length += 1
        if tokens is not None:
            self.tokens.copy_(tokens)
        self.logits = self.advance()
        return self.logits

    def greedy(self, tokens: Tensor, count: int) -> Iterator[Tensor]:
        """Continues prompts [B, T] by their likeliest tokens: yields [B] int64 on the CPU, `count` times.

        On a GPU the next step starts before a token is looked at, so the device never waits for the host.
        """
        self.start(tokens)
        ahead = self.device.type == "cuda"
        for number in range(count):
            if number and not ahead:
                self.step()
            self.host.copy_(self.tokens, non_blocking=True)
            copied = torch.cuda.current_stream(self.device).record_event() if ahead else None
            if ahead and number + 1 < count:
                self.step()
            if ahead:
                copied.synchronize()
            yield self.host.clone()

    @torch.no_grad()
    def prepare(self) -> None:
        """Compiles and records the step, once; the first `start` does so unless it was done before."""
        if self.ready:
            return
        if self.device.type == "cuda":
            self.advance, self.recorded = recorded(self._advance, self.device, before=self.position.zero_), True
        else:
            self.advance()
        self.tokens.zero_()
        self.position.zero_()
        self.ready = True

    def _advance(self) -> Tensor:
        """What a step does on the device, and what a CUDA graph records of it; the logits, [B, V]."""
        if self.way == "fused":
            return decode_fused(self.model, self.tokens, self.position, self.held, move=True)
        logits = self.decode(self.model, self.tokens, self.position, self.held)
        self.tokens.copy_(likeliest(logits))
        self.position.add_(1)
        return logits


def _compiled(device: torch.device):
    """`decode` as one graph. One row makes every product a sum over a weight's rows: reductions that fuse with norms
    and gates around them, which is what coordinate descent tuning turns them into on a GPU.
    """
    allow_graphs()
    options = {"coordinate_descent_tuning": True} if device.type == "cuda" else None
    return torch.compile(decode, backend=BACKEND, fullgraph=True, dynamic=False, options=options)
