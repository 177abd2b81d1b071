"""Small parts that every model of the book shares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (arXiv 1910.07467): x / rms(x) * weight.

    The statistics run in float32 (float64 stays float64) and the weight is multiplied after the cast back, as
    Llama and Qwen3 do.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(SiLU(gate(x)) * up(x)), no biases. [..., C] -> [..., C]."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Clip(nn.Module):
    """Clamps every value to (-limit, limit): the clipping baseline of 2505.06708, appendix A.6."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-self.limit, self.limit)

    def extra_repr(self) -> str:
        return f"limit={self.limit}"
