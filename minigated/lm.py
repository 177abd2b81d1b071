"""The decoder language model of *Gated Attention for Large Language Models* (arXiv 2505.06708).

Pre-norm RMSNorm, rotary positions, QK-norm, grouped key/value heads, no biases; a SwiGLU (chapter 2) or a mixture of
experts (chapter 7) in every block.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import KVCache
from minigated.balance import RunningCounts, assignment_counts, balance_loss, over_processes, z_loss
from minigated.chunked_loss import chunked_cross_entropy
from minigated.errors import InputError, one_of
from minigated.layers import Clip, RMSNorm, follow_weights
from minigated.lm_config import SIZES, LMConfig
from minigated.moe import Experts, MoE, Routing
from minigated.recompute import Checkpointing, recomputed
from minigated.rope import RotaryTable
from minigated.variants import get_variant, parameters


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); the variant may norm or clip what is added."""

    def __init__(self, config: LMConfig):
        super().__init__()
        variant = get_variant(config.variant)

        def branch_end() -> nn.Module:
            if variant.sandwich:
                return RMSNorm(config.width, config.norm_eps)
            return Clip(variant.clip) if variant.clip else nn.Identity()

        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = config.attention()
        self.attention_end = branch_end()
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = config.feed_forward()
        self.ffn_end = branch_end()

    def forward(self, x: Tensor, rotary, cache: KVCache | None = None, probe=None, routings=None) -> Tensor:
        """[B, T, C] -> [B, T, C]. The probe sees the four taps of the paper's figure 6."""
        attended = self.attention_end(self.attention(self.attention_norm(x), rotary, cache, probe))
        middle = x + attended
        normed = self.ffn_norm(middle)
        fed = self.ffn_end(self.ffn(normed, routings) if isinstance(self.ffn, MoE) else self.ffn(normed))
        out = middle + fed
        if probe is not None:
            taps = {"attention_output": attended, "attention_residual": middle, "ffn_output": fed, "ffn_residual": out}
            for name, value in taps.items():
                probe(name, value)
        return out


def run_block(block: Block, x: Tensor, rotary, cache, probe, routed: bool) -> tuple:
    """One block: its output [B, T, C], and if `routed` the `Routing` of its mixture of experts where it has one.

    The list that the block fills is a fresh one: one that grows would compile anew in every layer, and a checkpointed
    block fills it twice.
    """
    found = [] if routed else None
    return (block(x, rotary, cache, probe, found), *(found or ()))


class LanguageModel(nn.Module, Checkpointing):
    """Tokens in, logits of the next token out.

    Args:
        config: sizes and variant. With `match_parameters` the feed-forward is narrowed here; `model.config` is what
            was built.
    """

    kind = "lm"

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config = config.matched()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.rotary = RotaryTable(
            config.context,
            config.head_width,
            config.rope_base,
            scaling=config.rope_scaling,
            factor=config.rope_factor,
            trained=config.trained_context,
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(self._initialize)
        self.register_load_state_dict_post_hook(follow_weights)
        if config.tied:
            self.head.weight = self.embedding.weight

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Experts):
            module.initialize(self.config.initializer_range)

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """One empty cache a layer, on the model's device and in its dtype, for sequences up to `capacity`."""
        weight, shape = self.embedding.weight, self.blocks[0].attention.shape
        return [KVCache(batch, capacity, shape, weight.device, weight.dtype) for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        cache: list[KVCache] | None = None,
        probe=None,
        routings: list[Routing] | None = None,
        targets: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """Logits of the token after each position, or the loss of given targets.

        Args:
            tokens: [B, T] int64.
            cache: from `new_cache`; `tokens` then continue what it holds.
            probe: called as probe(layer, name, value); see `minigated.measure`.
            routings: a list that gets each layer's `Routing`, [B * T, ...]; only a mixture of experts adds to it.
            targets: [B, T] int64, the next tokens, for `next_token_loss` here and now: the output layer's weight is
                used inside this call only, as data-parallel wrappers ask.
            chunk: tokens whose logits are there at once, see `minigated.chunked_loss`; 0 for all, and needs `targets`
                otherwise.

        Returns:
            [B, T, vocabulary]; with `targets` a scalar.

        Raises:
            InputError: if the sequence is longer than the context or the cache, or for a chunk without targets.
        """
        if chunk and targets is None:
            raise InputError(f"chunk {chunk} without targets; logits are given whole, accepted: 0")
        start = cache[0].length if cache else 0
        rotary = self.rotary(start, tokens.shape[1])
        x = self.embedding(tokens)  # [B, T, C]
        again = self.checkpointing and cache is None and probe is None  # both would see every layer twice
        for layer, block in enumerate(self.blocks):
            held = cache[layer] if cache else None, partial(probe, layer) if probe is not None else None
            x, *found = recomputed(again, run_block, block, x, rotary, *held, routings is not None)
            if routings is not None:
                routings.extend(found)
        x = self.norm(x)
        if chunk:
            return chunked_cross_entropy(x, self.head.weight, targets, chunk)
        logits = self.head(x)  # [B, T, V]
        return logits if targets is None else next_token_loss(logits, targets)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, in float32 or wider. logits [B, T, V], targets [B, T] -> scalar."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten())


def lm_loss(model: nn.Module, batch: Tensor, chunk: int = 0, routings: list[Routing] | None = None) -> Tensor:
    """`next_token_loss` of windows [B, T + 1]: inputs are all but the last token, targets all but the first.

    With `chunk` the loss comes from the model itself and its logits are never there all at once, see
    `minigated.chunked_loss`. `routings`: as in `LanguageModel.forward`.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    given = {} if routings is None else {"routings": routings}
    if chunk:
        return model(inputs, targets=targets, chunk=chunk, **given)
    return next_token_loss(model(inputs, **given), targets)


class TrainingLoss:
    """`lm_loss` plus the router losses of a mixture of experts, weighted by the model's config.

    Args:
        accumulate: micro-batches of one optimizer step; experts are then balanced by `RunningCounts`.
        chunk: tokens whose logits are there at once; 0 for all.
    """

    def __init__(self, accumulate: int = 1, chunk: int = 0):
        self.chunk = chunk
        self.running = RunningCounts(accumulate) if accumulate > 1 else None

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Windows [B, T + 1] -> scalar; what an optimizer sees. Validation uses `lm_loss`."""
        routings: list[Routing] = []
        loss = lm_loss(model, batch, self.chunk, routings)
        config = model.config
        if not routings:
            return loss
        counts = [assignment_counts(r) for r in routings]
        if config.balance_scope == "global":
            counts = list(over_processes(torch.stack(counts)))
        if self.running is not None:
            counts = self.running(counts)
        balance = sum(balance_loss(r, c) for r, c in zip(routings, counts, strict=True))
        return loss + config.balance_weight * balance + config.z_weight * sum(z_loss(r) for r in routings)


def build_lm(size: str | LMConfig, device=None, **overrides) -> LanguageModel:
    """Builds a model by name.

    Args:
        size: a name of `SIZES`, or a config.
        device: where to build it; "meta" costs no memory.
        **overrides: fields of `LMConfig`, most often `variant`.
    """
    if isinstance(size, str):
        one_of("model", size, SIZES)
        size = SIZES[size]
    unknown = set(overrides) - set(LMConfig.__dataclass_fields__)
    if unknown:
        raise InputError(f"unknown option {sorted(unknown)[0]!r}; accepted: {', '.join(LMConfig.__dataclass_fields__)}")
    with torch.device(device or "cpu"):
        return LanguageModel(replace(size, **overrides))


SHOWN = ("layers", "width", "heads", "kv_heads", "head_width", "ffn_width", "experts", "top_k", "vocabulary", "tied")


def model_rows() -> list[dict]:
    """Every named language model with its sizes and its exact parameter counts, counted on the meta device.

    `active` leaves out the experts that one token does not visit.
    """
    rows = []
    for name, config in SIZES.items():
        total = parameters(build_lm(config, "meta"))
        sizes = {field: getattr(config, field) for field in SHOWN}
        rows.append({"name": name, "parameters": total, "active": total - config.idle_parameters, **sizes})
    return rows
