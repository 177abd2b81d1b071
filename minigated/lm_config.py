"""Sizes and options of the language models by name (chapters 2 and 7)."""

from dataclasses import dataclass, replace

import torch

from minigated.attention import Attention, AttentionShape, check_qk_order
from minigated.errors import InputError, one_of
from minigated.gates import SHARED_MEANS
from minigated.layers import SwiGLU
from minigated.moe import FORMS, MoE
from minigated.rope import check_scaling
from minigated.variants import get_variant, parameters


@dataclass(frozen=True)
class LMConfig:
    """Sizes and options of a language model; everything needed to build it again.

    Attributes:
        vocabulary: number of tokens; 256 for bytes.
        width: C. layers: L. heads: H. kv_heads: K. head_width: D.
        ffn_width: hidden width of the feed-forward, or of one expert.
        context: positions of the rotary table, the longest sequence.
        variant: a name of `minigated.variants.VARIANTS`.
        match_parameters: narrow the feed-forward until a variant has the baseline's number of parameters, as the
            paper does for its dense models. Its mixtures of experts are not matched and refuse this.
        ffn_multiple: the narrowed width is rounded to a multiple of this.
        qk_norm, tied, rope_base, norm_eps, initializer_range: as in Qwen3.
        qk_order, shared_mean, head_norm: open points of the paper, see `Attention` and `Variant.attention`.
        experts: E experts in place of the feed-forward, 0 for a dense model. top_k: k experts a token.
        renormalise, shared_width, expert_form: see `minigated.moe.MoE`.
        balance_weight, z_weight: of the two router losses, summed over layers. The paper does not state them; these are
            the values of Switch Transformer and of ST-MoE.
        rope_scaling, rope_factor, trained_context: see `minigated.rope.RotaryTable`; for more context than was trained.
        balance_scope: "global" counts experts over all processes, "batch" on each alone.
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
    experts: int = 0
    top_k: int = 0
    renormalise: bool = False
    shared_width: int = 0
    expert_form: str = "auto"
    balance_weight: float = 1e-2
    z_weight: float = 1e-3
    balance_scope: str = "global"
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    trained_context: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "qk_order", tuple(self.qk_order))  # a list after a trip through JSON
        for name in ("layers", "ffn_width", "vocabulary", "context", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_qk_order(self.qk_order)
        one_of("shared_mean", self.shared_mean, SHARED_MEANS)
        one_of("head_norm", self.head_norm, ("shared", "per_head"))
        check_scaling(self.rope_scaling, self.rope_factor, self.trained_context)
        one_of("balance_scope", self.balance_scope, ("global", "batch"))
        one_of("form of the experts", self.expert_form, ("auto", *FORMS))
        get_variant(self.variant).shape(self.shape)  # refuses impossible head counts before anything is built
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts < 0 or self.shared_width < 0:
            raise InputError(f"experts and shared_width must be 0 or more, got {self.experts} and {self.shared_width}")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise InputError(f"top_k must be from 1 to {self.experts}, the number of experts, got {self.top_k}")
        if not self.experts and (self.top_k or self.shared_width):
            raise InputError(f"top_k={self.top_k} and shared_width={self.shared_width} need experts, got experts=0")
        if self.experts and self.match_parameters:
            raise InputError(f"match_parameters narrows a dense feed-forward; this model has {self.experts} experts")
        if not self.experts and get_variant(self.variant).experts_added:
            raise InputError(f"variant {self.variant!r} needs a mixture-of-experts model, e.g. moe_nano")

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

    @property
    def idle_parameters(self) -> int:
        """Weights of the experts that one token does not visit: total minus active parameters."""
        return self.layers * (self.experts - self.top_k) * 3 * self.width * self.ffn_width

    def feed_forward(self) -> SwiGLU | MoE:
        """The feed-forward of one block: dense, or a mixture of experts."""
        if not self.experts:
            return SwiGLU(self.width, self.ffn_width)
        more = get_variant(self.variant).experts_added  # total and active alike
        return MoE(
            self.width,
            self.ffn_width,
            self.experts + more,
            self.top_k + more,
            self.renormalise,
            self.shared_width,
            self.expert_form,
        )

    def matched(self) -> "LMConfig":
        """This config with `ffn_width` narrowed so that the variant's parameters equal the baseline's."""
        if not self.match_parameters:
            return self
        with torch.device("meta"):
            extra = parameters(self.attention()) - parameters(self.attention("none"))
        if get_variant(self.variant).sandwich:
            extra += 2 * self.width
        if not extra:
            return replace(self, match_parameters=False)
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
    "moe_nano": LMConfig(
        width=128,
        layers=4,
        heads=4,
        kv_heads=2,
        head_width=32,
        ffn_width=64,
        context=256,
        ffn_multiple=4,
        experts=16,
        top_k=2,
    ),
    "moe_small": LMConfig(
        width=512, layers=8, heads=8, kv_heads=2, head_width=64, ffn_width=256, experts=32, top_k=4, ffn_multiple=8
    ),
    "moe_medium": LMConfig(
        width=768, layers=12, heads=12, kv_heads=4, head_width=64, ffn_width=256, experts=64, top_k=8, ffn_multiple=8
    ),
    "15A2B": LMConfig(
        width=2048,
        layers=24,
        heads=32,
        kv_heads=4,
        head_width=128,
        ffn_width=768,
        vocabulary=152_064,
        context=4096,
        experts=128,
        top_k=8,
    ),
}
