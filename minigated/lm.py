"""The decoder language model of *Gated Attention for Large Language Models* (arXiv 2505.06708), dense form.

Pre-norm RMSNorm, rotary positions, QK-norm, SwiGLU, grouped key/value heads, no biases (chapter 2).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import Attention, AttentionShape, KVCache
from minigated.errors import InputError, one_of
from minigated.layers import Clip, RMSNorm, SwiGLU
from minigated.rope import RotaryTable
from minigated.variants import get_variant, parameters


@dataclass(frozen=True)
class LMConfig:
    """Sizes and options of a language model; everything needed to build it again.

    Attributes:
        vocabulary: number of tokens; 256 for bytes.
        width: C. layers: L. heads: H. kv_heads: K. head_width: D. ffn_width: hidden width of the feed-forward.
        context: positions of the rotary table, the longest sequence.
        variant: a name of `minigated.variants.VARIANTS`.
        match_parameters: narrow the feed-forward until a variant has the baseline's number of parameters, as the
            paper does for its dense models.
        ffn_multiple: the narrowed width is rounded to a multiple of this.
        qk_norm, tied, rope_base, norm_eps, initializer_range: as in Qwen3.
        qk_order, shared_mean, head_norm: open points of the paper, see `Attention` and `Variant.attention`.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    vocabulary: int = 256
    context: int = 512
    variant: str = "none"
    match_parameters: bool = False
    ffn_multiple: int = 16
    qk_norm: bool = True
    tied: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    qk_order: tuple[str, ...] = ("gate", "norm", "rope")
    shared_mean: str = "score"
    head_norm: str = "shared"

    def __post_init__(self):
        object.__setattr__(self, "qk_order", tuple(self.qk_order))  # a list after a trip through JSON
        for name in ("layers", "ffn_width", "vocabulary", "context", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        one_of("head_norm", self.head_norm, ("shared", "per_head"))
        get_variant(self.variant).shape(self.shape)  # refuses impossible head counts before anything is built

    @property
    def shape(self) -> AttentionShape:
        """The baseline's attention shape, before the variant changes it."""
        return AttentionShape(self.width, self.heads, self.kv_heads, self.head_width)

    def attention(self, variant: str | None = None) -> Attention:
        """One attention layer of this config (of another variant, if given)."""
        return get_variant(variant or self.variant).attention(
            self.shape,
            self.shared_mean,
            self.head_norm,
            qk_norm=self.qk_norm,
            qk_order=self.qk_order,
            eps=self.norm_eps,
        )

    def matched(self) -> "LMConfig":
        """This config with `ffn_width` narrowed so that the variant's parameters equal the baseline's."""
        if not self.match_parameters:
            return self
        with torch.device("meta"):
            extra = parameters(self.attention()) - parameters(self.attention("none"))
        if get_variant(self.variant).sandwich:
            extra += 2 * self.width
        exact = self.ffn_width - extra / (3 * self.width)
        width = round(exact / self.ffn_multiple) * self.ffn_multiple
        if width < self.ffn_multiple:
            raise InputError(
                f"variant {self.variant!r} adds more than the feed-forward of {self.ffn_width} can give back"
            )
        return replace(self, ffn_width=width, match_parameters=False)


SIZES: dict[str, LMConfig] = {
    "lm_nano": LMConfig(
        width=128, layers=4, heads=4, kv_heads=2, head_width=32, ffn_width=384, context=256, ffn_multiple=4
    ),
    "lm_small": LMConfig(width=512, layers=8, heads=8, kv_heads=2, head_width=64, ffn_width=1536),
    "lm_medium": LMConfig(width=768, layers=12, heads=12, kv_heads=4, head_width=64, ffn_width=2048),
    "1.7B-28L": LMConfig(
        width=2048,
        layers=28,
        heads=16,
        kv_heads=8,
        head_width=128,
        ffn_width=6144,
        vocabulary=152_064,
        context=4096,
        tied=True,
    ),
    "1.7B-48L": LMConfig(
        width=1536,
        layers=48,
        heads=16,
        kv_heads=8,
        head_width=128,
        ffn_width=4608,
        vocabulary=152_064,
        context=4096,
        tied=True,
    ),
}


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
        self.ffn = SwiGLU(config.width, config.ffn_width)
        self.ffn_end = branch_end()

    def forward(self, x: Tensor, rotary, cache: KVCache | None = None, probe=None) -> Tensor:
        """[B, T, C] -> [B, T, C]. The probe sees the four taps of the paper's figure 6."""
        attended = self.attention_end(self.attention(self.attention_norm(x), rotary, cache, probe))
        middle = x + attended
        fed = self.ffn_end(self.ffn(self.ffn_norm(middle)))
        out = middle + fed
        if probe is not None:
            taps = {"attention_output": attended, "attention_residual": middle, "ffn_output": fed, "ffn_residual": out}
            for name, value in taps.items():
                probe(name, value)
        return out


class LanguageModel(nn.Module):
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
        self.rotary = RotaryTable(config.context, config.head_width, config.rope_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(self._initialize)
        if config.tied:
            self.head.weight = self.embedding.weight

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """One empty cache a layer, on the model's device and in its dtype, for sequences up to `capacity`."""
        weight, shape = self.embedding.weight, self.blocks[0].attention.shape
        return [KVCache(batch, capacity, shape, weight.device, weight.dtype) for _ in self.blocks]

    def forward(self, tokens: Tensor, cache: list[KVCache] | None = None, probe=None) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: [B, T] int64.
            cache: from `new_cache`; `tokens` then continue what it holds.
            probe: called as probe(layer, name, value); see `minigated.measure`.

        Returns:
            [B, T, vocabulary].

        Raises:
            InputError: if the sequence is longer than the context or the cache.
        """
        start = cache[0].length if cache else 0
        rotary = self.rotary(start, tokens.shape[1])
        x = self.embedding(tokens)  # [B, T, C]
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                rotary,
                cache[layer] if cache else None,
                partial(probe, layer) if probe is not None else None,
            )
        return self.head(self.norm(x))  # [B, T, V]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, in float32. logits [B, T, V], targets [B, T] -> scalar."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """`next_token_loss` of windows [B, T + 1]: inputs are all but the last token, targets all but the first."""
    return next_token_loss(model(batch[:, :-1]), batch[:, 1:])


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


def model_rows() -> list[dict]:
    """Every named language model with its sizes and its exact parameter count, counted on the meta device."""
    rows = []
    for name, config in SIZES.items():
        sizes = {
            n: getattr(config, n)
            for n in ("layers", "width", "heads", "kv_heads", "head_width", "ffn_width", "vocabulary", "tied")
        }
        rows.append({"name": name, "parameters": parameters(build_lm(config, "meta")), **sizes})
    return rows
