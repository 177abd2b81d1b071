"""The open readings of Gated-SwinRMT-SWAT, each a small function or module chosen by name (chapter 6).

The paper's abstract (arXiv 2604.06014) names the parts of this mixer, not how they meet. Wherever more than one way
fits its words, all of them stand here and `SwatOptions` picks; `minigated.swat` knows none of the names. Equation
numbers (6.x) are those of chapter 6; SWAT is arXiv 2502.18845.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.errors import InputError, one_of
from minigated.layers import RMSNorm


# ---------------------------------------------------------------------------------------------- slopes
def _halves(magnitude: Callable[[Tensor, int], Tensor], heads: int, dtype: torch.dtype) -> Tensor:
    if heads < 2 or heads % 2:
        raise InputError(f"balanced slopes need an even number of heads, half of each sign; got {heads}")
    size = magnitude(torch.arange(1, heads // 2 + 1, dtype=dtype), heads // 2)  # [H/2]
    return torch.cat((size, -size))  # [H]


def _one_sided(heads: int, dtype: torch.dtype) -> Tensor:
    if heads < 1:
        raise InputError(f"slopes need at least one head, got {heads}")
    return -torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=dtype) / heads)


SLOPES: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "swat": partial(_halves, lambda k, half: torch.exp2(-k)),  # SWAT's eq. (4)
    "alibi": partial(_halves, lambda k, half: torch.exp2(-8.0 * k / half)),
    "one_sided": _one_sided,  # what SWAT's released code does
}


def balanced_slopes(heads: int, form: str = "swat", dtype: torch.dtype = torch.float32) -> Tensor:
    """ALiBi slopes of both signs: the first half of the heads positive, the second half negative.

    Args:
        heads: H, even.
        form: "swat", 2^-k for k = 1 .. H/2 (eq. (4) of SWAT); "alibi", 2^(-8k / (H/2)); "one_sided",
            -2^(-8k/H) for k = 1 .. H, unbalanced, as in SWAT's released code; any number of heads.
        dtype: of the result; computed in float64.

    Returns:
        [H].

    Raises:
        InputError: odd heads for a balanced form.
    """
    one_of("slopes", form, SLOPES)
    return SLOPES[form](heads, torch.float64).to(dtype)


PASS_SIGNS: dict[str, Callable[[Tensor], Tensor]] = {  # slopes of the height pass from those of the width pass
    "same": lambda slopes: slopes,
    "opposed": lambda slopes: -slopes,
    "quadrants": lambda slopes: slopes * (-1.0) ** torch.arange(len(slopes), device=slopes.device),
}
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {  # from the offset i - j
    "signed": lambda offset: offset,
    "absolute": torch.abs,
}
# (slopes [H, 1, 1], log-decay [H, 1, 1], delta [W, W], |i - j| [W, W]) -> inside the sigmoid, log of the factor outside
ALIBI: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "both": lambda slopes, rates, delta, far: (slopes * delta, rates * far),
    "outer": lambda slopes, rates, delta, far: (0 * slopes * far, slopes * far),
    "magnitude": lambda slopes, rates, delta, far: (0 * slopes * far, -slopes.abs() * far),
    "none": lambda slopes, rates, delta, far: (0 * rates * far, rates * far),
}


# ---------------------------------------------------------------------------------------------- values
class SwigluValue(nn.Module):
    """V = SiLU(u W_1) (.) (u W_2): the first two factors of SwiGLU. Raw value: u W_2."""

    parts = 2  # how many C-wide projections of u it takes

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(gated value, raw value, what the gate multiplied by or None), [B, h, w, C] each."""
        factor = F.silu(gate)
        return factor * value, value, factor


class SelfGatedValue(nn.Module):
    """V' = V (.) SiLU(V W), V = u W_V: the gate reads the value instead of the block input."""

    parts = 1

    def __init__(self, channels: int):
        super().__init__()
        self.gate_proj = nn.Linear(channels, channels)

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        factor = F.silu(self.gate_proj(value))
        return value * factor, value, factor


class MlpValue(SwigluValue):
    """V = (SiLU(u W_1) (.) (u W_2)) W_3: a whole SwiGLU of hidden width C."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.down_proj = nn.Linear(channels, channels)

    def forward(self, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gated, raw, factor = super().forward(gate, value)
        return self.down_proj(gated), raw, factor


class PlainValue(nn.Module):
    """V = u W_V, no gate."""

    parts = 1

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return value, value, None


VALUES: dict[str, type[nn.Module]] = {
    "swiglu": SwigluValue,
    "self": SelfGatedValue,
    "mlp": MlpValue,
    "plain": PlainValue,
}


# ---------------------------------------------------------------------------------------------- norms
class HeadNorm(nn.Module):
    """Mean 0 and deviation 1 over the D channels of each head, RetNet's group norm. [..., C] -> [..., C]."""

    def __init__(self, channels: int, heads: int, eps: float = 1e-6):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        split = x.unflatten(-1, (self.heads, -1))  # [..., H, D]
        return F.layer_norm(split, split.shape[-1:], eps=self.eps).flatten(-2) * self.weight + self.bias


def unchanged(x: Tensor) -> Tensor:
    """What it is given."""
    return x


def by_row_sum(weights: Tensor, eps: float = 1e-6) -> Tensor:
    """Weights divided by the sum over their last axis, the keys."""
    return weights / (weights.sum(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class NormReading:
    """Where "the normalized output" may be normalised.

    Attributes:
        module: (C, H) -> the norm of Z before W_O.
        weights: applied to the weights [..., keys] of a pass, after the decay.
        bias, factor: of the window W; added inside the sigmoid, multiplied outside.
    """

    module: Callable[[int, int], nn.Module] = lambda channels, heads: nn.Identity()
    weights: Callable[[Tensor], Tensor] = unchanged
    bias: Callable[[int], float] = lambda window: 0.0
    factor: Callable[[int], float] = lambda window: 1.0


NORMS: dict[str, NormReading] = {
    "layer": NormReading(module=lambda channels, heads: nn.LayerNorm(channels, eps=1e-6)),
    "rms": NormReading(module=lambda channels, heads: RMSNorm(channels)),
    "head": NormReading(module=HeadNorm),
    "row_sum": NormReading(weights=by_row_sum),
    "window": NormReading(factor=lambda window: 1.0 / window),
    "log_window": NormReading(bias=lambda window: -math.log(window)),
    "none": NormReading(),
}


def before_lce(norm: nn.Module, z: Tensor, local: Tensor) -> Tensor:
    """Norm(Z) + LCE(V), eq. (6.4)."""
    return norm(z) + local


def after_lce(norm: nn.Module, z: Tensor, local: Tensor) -> Tensor:
    """Norm(Z + LCE(V))."""
    return norm(z + local)


NORM_PLACES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "before_lce": before_lce,
    "after_lce": after_lce,
}
LCE = ("gated", "raw", "none")
LCE_PLACES = ("map", "window")


# ---------------------------------------------------------------------------------------------- the choice
@dataclass(frozen=True)
class SwatOptions:
    """One reading of the abstract. The defaults are this project's; the alternatives are measured beside them.

    Attributes:
        alibi: "both", slopes inside the sigmoid and decay outside; "outer", the slopes are the decay,
            exp(s |i-j|), rising for positive ones; "magnitude", exp(-|s| |i-j|); "none", decay without slopes.
        distance: what a slope inside the sigmoid multiplies: "signed" i - j, so that heads look to one side, or
            "absolute", so that half the heads look near and half look far. The outer forms know |i - j| only.
        pass_signs: slopes of the height pass: the "same" as in the width pass, "opposed", or "quadrants", every second
            head opposed, so that four heads look into four directions.
        slopes: see `balanced_slopes`.
        norm: "layer", "rms" (over C) or "head" (over D) on Z; "row_sum", weights divided by their sum; "window",
            divided by W; "log_window", log W taken from the scores; "none".
        norm_place: "before_lce", Norm(Z) + LCE(V), or "after_lce", Norm(Z + LCE(V)).
        value: "swiglu" SiLU(uW_1) (.) uW_2, "self" V (.) SiLU(VW), "mlp" a SwiGLU with its third matrix, "plain" uW_V.
        lce: what the depth-wise convolution reads: the "gated" value, the "raw" one, or "none": no convolution.
        lce_place: the "map" as it lies, or each "window" by itself, zeros around it.
        rotation: whether queries and keys are rotated, as in RMT.
        decay: whether distance dims the weights; only "both" and "none" of `alibi` can do without.
    """

    alibi: str = "both"
    distance: str = "signed"
    pass_signs: str = "same"
    slopes: str = "swat"
    norm: str = "layer"
    norm_place: str = "before_lce"
    value: str = "swiglu"
    lce: str = "gated"
    lce_place: str = "map"
    rotation: bool = True
    decay: bool = True

    def __post_init__(self):
        for name, accepted in READINGS.items():
            one_of(f"swat {name}", getattr(self, name), accepted)
        if not self.decay and self.alibi in ("outer", "magnitude"):
            raise InputError(f"alibi {self.alibi!r} makes the decay out of the slopes; decay=False needs both or none")

    def signs(self, heads: int) -> tuple[Tensor, Tensor]:
        """Slopes of the height and of the width pass, float64 [H] each; zeros where no slope is used."""
        if self.alibi == "none":
            return (torch.zeros(heads, dtype=torch.float64),) * 2
        slopes = balanced_slopes(heads, self.slopes, torch.float64)
        return PASS_SIGNS[self.pass_signs](slopes), slopes


READINGS: dict[str, tuple] = {
    "alibi": tuple(ALIBI),
    "distance": tuple(DISTANCES),
    "pass_signs": tuple(PASS_SIGNS),
    "slopes": tuple(SLOPES),
    "norm": tuple(NORMS),
    "norm_place": tuple(NORM_PLACES),
    "value": tuple(VALUES),
    "lce": LCE,
    "lce_place": LCE_PLACES,
    "rotation": (True, False),
    "decay": (True, False),
}
