"""RandAugment for whole batches (Cubuk et al., arXiv:1909.13719): tensor operations only, no loop over images.

Every image gets its own operation and strength, yet all images take the same path: what differs between them is held
in tables. Eight operations map each value of a channel to another one, so one table [B, 3, 256] carries all of them;
five move pixels, so one affine map an image carries those; colour and sharpness blend the image with a second one.
Images that are not concerned are kept by `torch.where`. That computes things in vain, but on a GPU it is far cheaper
than sorting the images by operation, it compiles into a few kernels, and the CPU never waits for the device. On a CPU
each of the three families takes only its own images.

Strengths follow the recipe "rand-m9-mstd0.5-inc1" that vision transformers are trained with: a level of 0 (nothing)
to 10, and every operation grows with it. Shear turns about the middle of the image, not its corner.

| operation | at level m of 10 |
|---|---|
| autocontrast, equalize, invert | no strength |
| rotate, shear, translate | up to 30 degrees, 0.3, 45 % of the side, either way |
| posterize | keeps 8 bits at level 0, 4 - int(0.4 m) of them above |
| solarize | inverts values from 256 - 25.6 m on |
| solarize_add | adds 11 m to values below 128 |
| color, contrast, brightness, sharpness | factor 1 + 0.09 m or 1 - 0.09 m |
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "contrast", "brightness")
BLEND = ("color", "sharpness")
MOVE = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = TABLE + BLEND + MOVE
NONE = -1
GREY = (0.299, 0.587, 0.114)


def apply_operations(
    images: Tensor, operation: Tensor, level: Tensor, sign: Tensor, fill: Tensor, select: bool | None = None
) -> Tensor:
    """One operation to each image.

    Args:
        images: [B, h, w, 3] uint8.
        operation: [B] int64, number in `OPERATIONS`, or `NONE`.
        level: [B] float, 0 to 1.
        sign: [B] float, 1 or -1; for the operations that go either way.
        fill: [3] float, 0 to 255; colour of what moves in from outside.
        select: whether only the images concerned are computed, the way of a CPU; by default on a CPU, not compiled.

    Returns:
        [B, h, w, 3] uint8.
    """
    if select is None:
        select = images.device.type == "cpu" and not torch.compiler.is_compiling()
    first_blend, first_move = len(TABLE), len(TABLE) + len(BLEND)
    families = (
        ((operation >= 0) & (operation < first_blend), _by_table),
        ((operation >= first_blend) & (operation < first_move), _blend),
        (operation >= first_move, functools.partial(_move, fill=fill)),
    )
    changed = images
    for concerned, change in families:
        if select:
            rows = concerned.nonzero()[:, 0]
            changed = changed.index_copy(0, rows, change(images[rows], operation[rows], level[rows], sign[rows]))
        else:
            changed = torch.where(_wide(concerned), change(images, operation, level, sign), changed)
    return changed


def tables(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """What the operations of `TABLE` make of each value of each channel; the identity for all others.

    Returns:
        [B, 3, 256] uint8.
    """
    value = torch.arange(256, device=images.device, dtype=torch.float32).expand(len(images), 3, 256)
    factor, level = (1 + sign * 0.9 * level)[:, None, None], level[:, None, None]
    step = 2 ** (8 - _kept_bits(level))
    grey = _grey(images).mean((1, 2)).round()[:, None, None]
    made = {
        "autocontrast": _autocontrast(images, value),
        "equalize": _equalize(images),
        "invert": 255 - value,
        "posterize": (value / step).floor() * step,
        "solarize": torch.where(value < 256 - (256 * level).floor(), value, 255 - value),
        "solarize_add": torch.where(value < 128, value + (110 * level).floor(), value),
        "contrast": grey + factor * (value - grey),
        "brightness": factor * value,
    }
    table = value
    for number, name in enumerate(TABLE):
        table = torch.where((operation == number)[:, None, None], made[name], table)
    return _whole(table)


def _by_table(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return tables(images, operation, level, sign).flatten()[_cells(images)]


def _cells(images: Tensor) -> Tensor:
    """[B, h, w, 3] int64: where a table [B, 3, 256], flattened, has each value of each channel of each image."""
    row = torch.arange(3 * len(images), device=images.device).view(-1, 1, 1, 3)
    return row * 256 + images


def _kept_bits(level: Tensor) -> Tensor:
    return torch.where(level > 0, 4 - (4 * level).floor(), 8)


def _autocontrast(images: Tensor, value: Tensor) -> Tensor:
    low, high = (bound.float()[..., None] for bound in (images.amin((1, 2)), images.amax((1, 2))))  # [B, 3, 1]
    return torch.where(high > low, (value - low) * 255 / (high - low).clamp(min=1), value)


def _equalize(images: Tensor) -> Tensor:
    """Pillow's rule: the count of all smaller values, in steps of a 255th of the count without the largest one's."""
    batch, height, width, _ = images.shape
    cells = _cells(images).flatten()
    counts = torch.zeros(batch * 3 * 256, device=images.device, dtype=torch.int64)  # whole: their order cannot matter
    counts = counts.scatter_add_(0, cells, torch.ones_like(cells)).view(batch, 3, 256)
    largest = counts.gather(2, images.amax((1, 2))[..., None].long())  # [B, 3, 1]
    step = ((height * width - largest) / 255).floor()
    before = counts.cumsum(2) - counts
    value = torch.arange(256, device=images.device, dtype=torch.float32)
    return torch.where(step > 0, ((before + (step / 2).floor()) / step.clamp(min=1)).floor(), value).clamp(max=255)


def _blend(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Towards (factor below 1) or away from the grey image, or the smoothed one."""
    pixels = images.float()
    grey = _grey(images).round()[..., None]  # [B, h, w, 1]
    other = torch.where(_wide(operation == len(TABLE)), grey, _smooth(pixels))
    return _whole(other + _wide(1 + sign * 0.9 * level) * (pixels - other))


def _smooth(pixels: Tensor) -> Tensor:
    """Each pixel averaged with its eight neighbours, itself five times; the outermost pixels stay."""
    if min(pixels.shape[1:3]) < 3:
        return pixels
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = ((box + 4 * pixels[:, 1:-1, 1:-1]) / 13).round()
    inner = torch.cat((pixels[:, 1:-1, :1], inner, pixels[:, 1:-1, -1:]), 2)
    return torch.cat((pixels[:, :1], inner, pixels[:, -1:]), 1)


def _move(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    """Rotation, shear or translation."""
    _, height, width, _ = images.shape
    strength = sign * level
    amount = {name: torch.where(operation == OPERATIONS.index(name), strength, 0 * strength) for name in MOVE}
    angle = amount["rotate"] * math.radians(30)
    # Where each output pixel is taken from, in units of half a side: hence the ratios of the sides.
    y, x = ((2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in (height, width))
    x_by_x, x_by_y = angle.cos(), (0.3 * amount["shear_x"] - angle.sin()) * (height / width)
    y_by_y, y_by_x = angle.cos(), (0.3 * amount["shear_y"] + angle.sin()) * (width / height)
    grid_x = _line(x_by_x, x)[:, None] + _line(x_by_y, y)[:, :, None] + 0.9 * amount["translate_x"][:, None, None]
    grid_y = _line(y_by_x, x)[:, None] + _line(y_by_y, y)[:, :, None] + 0.9 * amount["translate_y"][:, None, None]
    grid = torch.stack((grid_x, grid_y), 3)  # [B, h, w, 2]
    planes = (images - fill).permute(0, 3, 1, 2)  # a view: the channels still lie innermost
    moved = F.grid_sample(planes, grid, padding_mode="zeros", align_corners=False).permute(0, 2, 3, 1)
    return _whole(moved + fill)


def _line(factor: Tensor, values: Tensor) -> Tensor:
    """[B] and [n] -> [B, n]."""
    return factor[:, None] * values


def _grey(images: Tensor) -> Tensor:
    """[B, h, w, 3] uint8 -> [B, h, w] float."""
    red, green, blue = images.float().unbind(3)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _whole(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
