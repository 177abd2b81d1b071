"""The gates of *Gated Attention for Large Language Models* (arXiv 2505.06708, chapter 2).

Eq. (5): Y' = Y (.) sigma(X W_theta). A gate is two choices that do not know each other: where the scores come from
(`Scores` and its relatives) and how they meet Y (`multiply` or `add`). Where Y is taken, positions G1 to G5, is the
business of `minigated.attention.Attention`; which gate belongs to which row of the paper's tables, of
`minigated.variants`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import AttentionShape
from minigated.errors import InputError, one_of
from minigated.layers import RMSNorm


def ns_sigmoid(x: Tensor) -> Tensor:
    """Non-sparse sigmoid, eq. (9): 0.5 + 0.5 sigmoid(x), so no score falls under one half."""
    return 0.5 + 0.5 * torch.sigmoid(x)


def identity(x: Tensor) -> Tensor:
    """No activation at all."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": identity,
    "ns_sigmoid": ns_sigmoid,
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"multiply": torch.mul, "add": torch.add}
GRANULARITIES = ("elementwise", "headwise", "shared", "constant")
POSITIONS = ("g1", "g2", "g3", "g4", "g5")
SHARED_MEANS = ("score", "logit")


# ---------------------------------------------------------------------------------------------- scores
class Scores(nn.Module):
    """sigma(X W_theta): scores read from the token that is gated. [B, T, C] -> [B, T, *sizes].

    Args:
        width: C.
        sizes: trailing shape of the scores: (heads, D) elementwise, (heads, 1) headwise, (C,) at position G5.
        activation: sigma.
    """

    def __init__(self, width: int, sizes: tuple[int, ...], activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.sizes, self.activation = sizes, activation
        self.linear = nn.Linear(width, math.prod(sizes), bias=False)

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, self.sizes)  # [B, T, *sizes]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.logits(x))


class SharedScores(Scores):
    """Head-shared scores: the mean over heads, the same for every head. [B, T, C] -> [B, T, 1, D].

    The paper averages "scores", which are sigma(X W_theta): the mean is taken after the activation. With
    `mean_of="logit"` it is taken before; then the heads' rows of W_theta act as one matrix.
    """

    def __init__(self, width, sizes, activation, mean_of: str = "score"):
        super().__init__(width, sizes, activation)
        one_of("shared_mean", mean_of, SHARED_MEANS)
        self.mean_of = mean_of

    def forward(self, x: Tensor) -> Tensor:
        if self.mean_of == "logit":
            return self.activation(self.logits(x).mean(-2, keepdim=True))
        return super().forward(x).mean(-2, keepdim=True)


class ConstantScores(nn.Module):
    """Input-independent scores sigma(theta), theta starting at zero (Table 4, row 6). Any x -> [heads, D]."""

    def __init__(self, sizes: tuple[int, ...], activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.activation = activation
        self.theta = nn.Parameter(torch.zeros(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.theta)


# ---------------------------------------------------------------------------------------------- gates
class Gate(nn.Module):
    """Y' = Y * scores, or Y + scores: eq. (5) and its additive form.

    Called by `Attention` as gate(y, x, probe) with y of shape [B, T, heads, D] (or [B, T, C] at G5) and x the
    normalised block input [B, T, C]. The probe is told ("gate_form", (position, form)), then the scores under
    ("gate_score", (position, scores)).
    """

    def __init__(self, position: str, scores: nn.Module, form: str = "multiply"):
        super().__init__()
        one_of("gate form", form, COMBINE)
        self.position, self.scores, self.form = position, scores, form

    def forward(self, y: Tensor, x: Tensor, probe=None) -> Tensor:
        scores = self.scores(x)
        if probe is not None:
            probe("gate_form", (self.position, self.form))
            probe("gate_score", (self.position, scores.expand_as(y[..., : scores.shape[-1]])))
        return COMBINE[self.form](y, scores).to(y.dtype)

    def extra_repr(self) -> str:
        return f"position={self.position}, form={self.form}"


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head's output instead of a gate (Table 3, row 5). y [B, T, H, D] -> same.

    The paper does not say whether the heads share the weight: `per_head=False` shares it (D weights).
    """

    def __init__(self, heads: int, head_width: int, per_head: bool = False, eps: float = 1e-6):
        super().__init__()
        self.norm = RMSNorm(head_width, eps)
        if per_head:
            self.norm.weight = nn.Parameter(torch.ones(heads, head_width))

    def forward(self, y: Tensor, x: Tensor, probe=None) -> Tensor:
        return self.norm(y)


class HeadSiLU(nn.Module):
    """SiLU of the attention output, a non-linearity without parameters (Table 3, row 6)."""

    def forward(self, y: Tensor, x: Tensor, probe=None) -> Tensor:
        return F.silu(y)


class SwitchProjection(nn.Module):
    """SwitchHead's key or value projection (arXiv 2312.07987): experts per head, mixed by sigmoid router scores.

    Every head owns `experts` projections; a token uses the `top_k` with the largest router score and sums them
    weighted by these scores. With one expert this is the headwise gate at G2. How the paper shares experts under
    grouped heads is not stated; here each key/value head has its own.

    All experts are computed and the unused ones multiplied by zero: right, and plain, at the price of speed.
    """

    def __init__(self, width: int, heads: int, head_width: int, experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise InputError(f"top_k must be between 1 and the {experts} experts, got {top_k}")
        self.top_k = top_k
        self.experts = nn.Linear(width, experts * heads * head_width, bias=False)
        self.router = nn.Linear(width, heads * experts, bias=False)
        self.sizes = (heads, experts, head_width)

    def forward(self, x: Tensor) -> Tensor:
        heads, experts, width = self.sizes
        scores = torch.sigmoid(self.router(x)).unflatten(-1, (heads, experts))  # [B, T, K, E]
        if self.top_k < experts:
            kept = torch.zeros_like(scores).scatter(-1, scores.topk(self.top_k, dim=-1).indices, 1.0)
            scores = scores * kept
        values = self.experts(x).unflatten(-1, (heads, experts, width))  # [B, T, K, E, D]
        return (scores.unsqueeze(-1) * values).sum(-2).flatten(-2)  # [B, T, K*D]


# ---------------------------------------------------------------------------------------------- from words to a gate
@dataclass(frozen=True)
class GateSpec:
    """The paper's five axes in words: where, how fine, how combined, which activation.

    Attributes:
        position: g1 attention output, g2 values, g3 keys, g4 queries, g5 after W_O.
        granularity: elementwise, headwise, shared (elementwise, averaged over heads) or constant (no input).
        form: multiply or add.
        activation: sigmoid, silu, identity or ns_sigmoid.
    """

    position: str
    granularity: str = "elementwise"
    form: str = "multiply"
    activation: str = "sigmoid"

    def __post_init__(self):
        one_of("gate position", self.position, POSITIONS)
        one_of("gate granularity", self.granularity, GRANULARITIES)
        one_of("gate form", self.form, COMBINE)
        one_of("gate activation", self.activation, ACTIVATIONS)
        if self.position == "g5" and self.granularity in ("headwise", "shared"):
            raise InputError(f"position g5 has no heads; granularity {self.granularity!r} is for g1 to g4")


def build_gate(spec: GateSpec, shape: AttentionShape, shared_mean: str = "score") -> Gate:
    """Makes the gate that `spec` describes for an attention layer of `shape`."""
    heads = shape.kv_heads if spec.position in ("g2", "g3") else shape.heads
    sizes = (shape.width,) if spec.position == "g5" else (heads, shape.head_width)
    activation = ACTIVATIONS[spec.activation]
    if spec.granularity == "headwise":
        scores = Scores(shape.width, (heads, 1), activation)
    elif spec.granularity == "shared":
        scores = SharedScores(shape.width, sizes, activation, shared_mean)
    elif spec.granularity == "constant":
        scores = ConstantScores(sizes, activation)
    else:
        scores = Scores(shape.width, sizes, activation)
    return Gate(spec.position, scores, spec.form)
