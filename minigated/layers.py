"""Small parts that every model of the book shares. Feature maps are channel-last: [B, h, w, C]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated import kernels
from minigated.errors import InputError


def follow_weights(model: nn.Module, _) -> None:
    """After `load_state_dict(..., assign=True)` into a model on meta: what is never saved goes to the weights' device.

    A post-hook of loading. The parts that keep such tensors write their numbers anew when they are moved.
    """
    device = next(model.parameters()).device
    for part in model.modules():
        if device.type != "meta" and any(b.is_meta for b in part.buffers(recurse=False)) and not part.state_dict():
            part.to_empty(device=device, recurse=False)


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


# ---------------------------------------------------------------------------------------------- vision
def check_map(x: Tensor, channels: int) -> None:
    """Refuses what is no map of so many channels, before a product says it in its own words."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise InputError(f"map of shape {list(x.shape)}; accepted: [batch, height, width, {channels}]")


class DepthwiseConv(nn.Module):
    """One k x k filter a channel, zero padding, with bias. [B, h, w, C] -> [B, h, w, C].

    Where the map is channel-last in memory too, `permute` only renames its axes, and torch's channels-last kernels
    work on it without a copy.
    """

    def __init__(self, channels: int, kernel: int = 3):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"a depth-wise kernel that keeps the size has an odd side, got {kernel}")
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x):
            return kernels.depthwise(x, self.conv.weight, self.conv.bias)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, h, w, C]


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, as in Swin. [..., C] -> [..., C]."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvFeedForward(nn.Module):
    """RMT's feed-forward: y = GELU(fc1(x)), then fc2(y + DWConv3x3(y)). [B, h, w, C] -> [B, h, w, C]."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(x))  # [B, h, w, hidden]
        return self.fc2(y + self.dwconv(y))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a whole branch is left out for a share of the images.

    What stays is divided by the share that stays, so that the expected value is unchanged.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise InputError(f"drop path rate must be at least 0 and under 1, got {rate}")
        self.rate, self.active = rate, rate > 0
        # A tensor, as a number would be part of the graph: blocks that differ in it alone share one (chapter 9).
        self.register_buffer("share", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.active:
            return x
        drawn = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device)
        return x * ((drawn < self.share) / self.share).to(x.dtype)

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        self.share.fill_(1.0 - self.rate)  # anew: a model made on meta comes to its device without numbers
        return self

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class LayerScale(nn.Module):
    """One learned factor a channel, small at the start (arXiv 2103.17239). [..., C] -> [..., C]."""

    def __init__(self, channels: int, initial: float = 1e-6):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
