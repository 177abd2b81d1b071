"""Parts of the augmentation: random numbers in other forms, and rectangles."""

import math

import torch
from torch import Tensor

BETA_POINTS = 1025


def beta_quantiles(a: float) -> Tensor:
    """The quantiles of Beta(a, a) at 0, 1/1024, .. 1, by integrating its density; ones for a = 0 (no mixing).

    With t = x^p, p = min(a, 1), the density times dx is t^(a/p - 1) (1 - t^(1/p))^(a - 1) dt, which has no pole on
    x <= 1/2; the other half is the mirror image.

    Returns:
        [1025] float32.
    """
    if a == 0:
        return torch.ones(BETA_POINTS)
    power = min(a, 1.0)
    t = torch.linspace(0, 1, 1 << 14, dtype=torch.float64) * 0.5**power
    density = t ** (a / power - 1) * (1 - t ** (1 / power)) ** (a - 1)
    mass = torch.cat((torch.zeros(1, dtype=torch.float64), ((density[1:] + density[:-1]) / 2).cumsum(0)))
    wanted = torch.linspace(0, 1, BETA_POINTS // 2 + 1, dtype=torch.float64) * mass[-1]
    above = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    within = (wanted - mass[above - 1]) / (mass[above] - mass[above - 1])
    lower = (t[above - 1] + within * (t[above] - t[above - 1])) ** (1 / power)
    return torch.cat((lower, 1 - lower.flip(0)[1:])).float()


def quantile(table: Tensor, share: Tensor) -> Tensor:
    position = share * (len(table) - 1)
    cell = position.long()
    return torch.lerp(table[cell], table[cell + 1], position - cell)


def noise(shape: tuple[int, ...], key: Tensor) -> Tensor:
    """Values of mean 0 and deviation 1 (uniform), a function of the image's key and the place: an integer hash."""
    place = torch.arange(math.prod(shape[1:]), device=key.device).view(1, *shape[1:])
    bits = (place * 0x9E3779B1 + key[:, None, None, None] * 0x85EBCA6B) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return (bits.float() * 2.0**-32 - 0.5) * math.sqrt(12)


def box(like: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[B, h, w] bool, True from `top` to before `bottom` and from `left` to before `right`, each [B]."""
    _, height, width, _ = like.shape
    rows, columns = numbers(height, like), numbers(width, like)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return inside_rows[:, :, None] & inside_columns[:, None]


def below(uniform: Tensor, limit: int | Tensor) -> Tensor:
    """Uniform on [0, 1) to whole numbers 0 .. limit - 1."""
    return (uniform * limit).long()


def numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)
