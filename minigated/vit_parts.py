"""The parts of a hierarchical backbone around its mixers, in RMT's form and in Swin's (chapter 5).

Feature maps are channel-last, [B, h, w, C]. Sources: RMT (arXiv 2309.11523) and its released code; Swin (arXiv
2103.14030).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated import kernels
from minigated.errors import InputError
from minigated.layers import ConvFeedForward, DepthwiseConv, FeedForward


def channels_first(x: Tensor) -> Tensor:
    """[B, h, w, C] -> [B, C, h, w], a view."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h, w, C], a view."""
    return x.permute(0, 2, 3, 1)


def check_cells(norm: nn.BatchNorm2d, cells: int) -> None:
    """Refuses one cell in all for a batch norm in training, before torch says it in its own words."""
    if norm.training and cells == 1:
        raise InputError(
            "one image whose map is a single cell cannot be normalised over the batch in training; "
            "give two images or more, a larger image, or call model.eval()"
        )


class MapNorm(nn.BatchNorm2d):
    """Batch norm of a channel-last map, [B, h, w, C] -> same, that says in our words when there is only one cell."""

    def forward(self, x: Tensor) -> Tensor:
        check_cells(self, x.shape[:3].numel())
        return channels_last(super().forward(channels_first(x)))


# ---------------------------------------------------------------------------------------------- stems
class ConvStem(nn.Module):
    """RMT's stem: four 3x3 convolutions with batch norm, GELU after the first three. [B, 3, H, W] -> [B, h, w, C].

    Args:
        image_channels: of the picture. channels: C; half of it after the first two convolutions.
        stride: 4 halves the size in the first and in the third convolution, 2 in the first only, 1 never.
    """

    STRIDES = {4: (2, 2), 2: (2, 1), 1: (1, 1)}

    def __init__(self, image_channels: int, channels: int, stride: int = 4, eps: float = 1e-6):
        super().__init__()
        if stride not in self.STRIDES:
            raise InputError(f"stem stride {stride}; accepted: {', '.join(map(str, sorted(self.STRIDES)))}")
        if channels % 2:
            raise InputError(f"the stem's {channels} channels cannot be halved")
        self.stride, (first, third) = stride, self.STRIDES[stride]
        plan = [(image_channels, channels // 2, first), (channels // 2, channels // 2, 1)]
        plan += [(channels // 2, channels, third), (channels, channels, 1)]
        parts: list[nn.Module] = []
        for wide_in, wide_out, step in plan:
            parts += [nn.Conv2d(wide_in, wide_out, 3, step, 1), nn.BatchNorm2d(wide_out), nn.GELU()]
        self.layers = nn.Sequential(*parts[:-1])  # no activation after the last norm

    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        check_cells(self.layers[-1], batch * -(-height // self.stride) * -(-width // self.stride))
        return channels_last(self.layers(images))


class PatchStem(nn.Module):
    """Swin's stem: each patch of stride x stride pixels becomes one vector, then a LayerNorm. Pads at the end."""

    def __init__(self, image_channels: int, channels: int, stride: int = 4, eps: float = 1e-5):
        super().__init__()
        if stride < 1:
            raise InputError(f"stem stride {stride}; accepted: 1 or more")
        self.stride = stride
        self.proj = nn.Conv2d(image_channels, channels, stride, stride)
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        return self.norm(channels_last(self.proj(images)))


# ---------------------------------------------------------------------------------------------- between stages
class ConvDownsample(nn.Module):
    """RMT's: a 3x3 convolution of stride 2, then batch norm. [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), C']."""

    def __init__(self, channels: int, channels_out: int, eps: float = 1e-6):
        super().__init__()
        self.reduction = nn.Conv2d(channels, channels_out, 3, 2, 1)
        self.norm = MapNorm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(channels_last(self.reduction(channels_first(x))))


class PatchMerging(nn.Module):
    """Swin's: the four cells of each 2 x 2 square in one vector, LayerNorm, linear. Odd sides are padded at the end.

    The order within a square is column by column: (0,0), (1,0), (0,1), (1,1); released weights depend on it.
    """

    def __init__(self, channels: int, channels_out: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps)
        self.reduction = nn.Linear(4 * channels, channels_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, channels = x.shape
        squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)  # column, row
        return self.reduction(self.norm(squares.flatten(3)))


# ---------------------------------------------------------------------------------------------- the end
class ConvHead(nn.Module):
    """RMT's last step before the mean: linear to `hidden`, batch norm, SiLU. [B, h, w, C] -> [B, h, w, hidden]."""

    def __init__(self, channels: int, hidden: int, eps: float = 1e-6):
        super().__init__()
        self.features = hidden
        self.proj = nn.Linear(channels, hidden)
        self.norm = MapNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.proj(x)))


class NormHead(nn.Module):
    """Swin's: a LayerNorm. [B, h, w, C] -> same. `hidden` is not used."""

    def __init__(self, channels: int, hidden: int = 0, eps: float = 1e-5):
        super().__init__()
        self.features = channels
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


# ---------------------------------------------------------------------------------------------- x + convolution(x)
def added(x: Tensor, conv: DepthwiseConv) -> Tensor:
    """x + conv(x), [B, h, w, C] -> same; on a GPU one kernel (chapter 9), rounded once."""
    cast = torch.is_autocast_enabled("cuda") and x.dtype != torch.get_autocast_dtype("cuda")
    if kernels.usable(x) and not cast:  # a cast map would give up the digits of the x that is added
        return kernels.depthwise_added(x, conv.conv.weight, conv.conv.bias)
    return x + conv(x)


class AddedFeedForward(ConvFeedForward):
    """`ConvFeedForward` with `added`; the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(added(F.gelu(self.fc1(x)), self.dwconv))


# ---------------------------------------------------------------------------------------------- skeletons
@dataclass(frozen=True)
class Skeleton:
    """Everything of a backbone but its mixers.

    Attributes:
        stem, downsample, feed_forward, head: module classes. position: conditional position, x + DWConv3x3(x), at the
            start of each block. eps: of all LayerNorms.
    """

    stem: Callable[..., nn.Module]
    downsample: Callable[..., nn.Module]
    feed_forward: Callable[[int, int], nn.Module]
    head: Callable[..., nn.Module]
    position: bool
    eps: float


SKELETONS = {
    "rmt": Skeleton(ConvStem, ConvDownsample, AddedFeedForward, ConvHead, position=True, eps=1e-6),
    "swin": Skeleton(PatchStem, PatchMerging, FeedForward, NormHead, position=False, eps=1e-5),
}


def initialize(module: nn.Module) -> None:
    """Linear weights from a normal of deviation 0.02, biases zero, as RMT and Swin do; convolutions keep torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_images(images: Tensor, channels: int, weight: Tensor) -> None:
    """Refuses what is no batch of pictures, before a convolution says it in its own words."""
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        raise InputError(
            f"images of shape {list(images.shape)}; accepted: [batch, {channels}, height, width] with no empty side"
        )
    if not torch.is_floating_point(images):
        raise InputError(f"images of {str(images.dtype).removeprefix('torch.')}; normalise them to floats first")
    if images.dtype == torch.float64 != weight.dtype:  # which autocast leaves alone, too
        dtype = str(weight.dtype).removeprefix("torch.")
        raise InputError(f"images of float64 for weights of {dtype}; accepted: images.to(torch.{dtype})")
