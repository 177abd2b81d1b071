"""Rotary position embedding (RoFormer, arXiv 2104.09864), the rotate-half layout that Llama and Qwen use."""

import torch
from torch import Tensor, nn

from minigated.errors import InputError


def rotary_angles(length: int, width: int, base: float = 10_000.0) -> Tensor:
    """Angle of every position for every pair of channels: position * base^(-2i / width).

    Args:
        length: number of positions.
        width: channels that are rotated, an even number.
        base: the wavelength base; 10,000 in the papers.

    Returns:
        Float32 tensor [length, width / 2], radians.
    """
    if width % 2:
        raise InputError(f"rotary positions need an even head width, got {width}")
    frequency = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)  # [width/2]
    return torch.outer(torch.arange(length, dtype=torch.float32), frequency)  # [length, width/2]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + D/2) of `x` by the angle of their position.

    Args:
        x: queries or keys, [B, T, H, D].
        cos: cosines, [T, D/2], float32.
        sin: sines, [T, D/2], float32.

    Returns:
        [B, T, H, D] in the dtype of `x`; the rotation itself runs in float32.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, D/2]
    first, second = x.chunk(2, dim=-1)  # [B, T, H, D/2] each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # [B, T, H, D]
    return rotated.to(x.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines for positions 0 .. length-1, built once and never trained."""

    def __init__(self, length: int, width: int, base: float = 10_000.0):
        super().__init__()
        self.length, self.width, self.base = length, width, base
        self.register_buffer("cos", torch.empty(length, width // 2), persistent=False)
        self.register_buffer("sin", torch.empty(length, width // 2), persistent=False)
        self._fill(self.cos.device)

    def _fill(self, device: torch.device) -> None:
        with torch.device(device):
            angles = rotary_angles(self.length, self.width, self.base)
        self.cos, self.sin = angles.cos(), angles.sin()  # [length, width/2]

    def _apply(self, function, recurse=True):
        # model.to(torch.bfloat16) would round the angles of far positions to whole turns: make the table anew
        super()._apply(function, recurse)
        if self.cos.dtype != torch.float32:
            self._fill(self.cos.device)
        return self

    def forward(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start .. start+count-1, [count, width/2] each."""
        if start + count > self.length:
            raise InputError(
                f"{start + count} positions are longer than the rotary table of {self.length}; "
                f"build the model with context={start + count} or more, or shorten the input"
            )
        return self.cos[start : start + count], self.sin[start : start + count]
