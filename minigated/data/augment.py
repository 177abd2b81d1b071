"""Augmentation of whole batches on the device that trains: uint8 images in, normalised floats and soft labels out.

Random numbers and their use are two steps. `Augment.draw` gives a small table of numbers for a batch, a pure function
of (seed, step) made on the CPU; `Augment.transform` is a pure function of images, labels and that table, without any
state, loop over images or look at a value on the device. So a resumed run needs no state, the same table gives the
same images on every device, and `torch.compile` takes `transform` as a whole.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from minigated.data.augment_config import AugmentConfig
from minigated.data.augment_parts import below, beta_quantiles, box, noise, numbers, quantile
from minigated.data.rand_augment import NONE, OPERATIONS, apply_operations
from minigated.data.streams import draws
from minigated.errors import InputError

COLUMNS = ("top", "left", "flip", "partner", "mix", "cut", "share", "box_y", "box_x",
           "erase", "erase_area", "erase_shape", "erase_y", "erase_x", "erase_key")  # fmt: skip
RAND_COLUMNS = ("operation", "chance", "level", "sign")  # as often as there are layers
STREAM = 16  # of the draws; a process adds its rank
AREA, SHAPE = (0.02, 1 / 3), (0.3, 3.3)  # of an erased rectangle: share of the image, height over width


def normalise(images: Tensor, mean: Tensor | tuple, std: Tensor | tuple) -> Tensor:
    """[B, h, w, 3] uint8 -> [B, 3, h, w] float32 in channels_last memory, less `mean`, over `std` (for values 0 to 1).

    Raises:
        InputError: images of another shape or type.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise InputError(f"images are {images.dtype} of shape {tuple(images.shape)}; accepted: uint8, [B, h, w, 3]")
    mean, std = (torch.as_tensor(x, dtype=torch.float32, device=images.device) for x in (mean, std))
    return _channels_first((images.float() - 255 * mean) / (255 * std))


class Augment(nn.Module):
    """Random crop, flip, RandAugment, normalising, erasing, then mixup or cutmix, each image in its own way.

    Args:
        config: what to do; see `AugmentConfig`.
    """

    def __init__(self, config: AugmentConfig):
        super().__init__()
        self.config = config
        constants = {
            "mean": torch.tensor(config.mean),
            "std": torch.tensor(config.std),
            "operations": torch.tensor([OPERATIONS.index(name) for name in config.rand_operations]),
            "mixup_shares": beta_quantiles(config.mixup),
            "cutmix_shares": beta_quantiles(config.cutmix),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor, labels: Tensor, source: torch.Generator | tuple[int, ...]) -> tuple:
        """`draw` and `transform` in one."""
        return self.transform(images, labels, self.draw(len(images), source).to(images.device, non_blocking=True))

    def eval_transform(self, images: Tensor) -> Tensor:
        """[B, h, w, 3] uint8 -> [B, 3, h, w] float32 as the model sees it in validation and test: normalised only."""
        return normalise(images, self.mean, self.std)

    def draw(self, count: int, source: torch.Generator | tuple[int, ...]) -> Tensor:
        """The random numbers for `count` images.

        Every part of the augmentation has columns of its own, there or not: switching one off leaves the others'
        numbers as they are, so runs that differ in one part stay paired.

        Args:
            source: (seed, step) or (seed, step, rank), for the same numbers on every machine; or a generator.

        Returns:
            [count, columns] float32 on [0, 1), on the CPU, or on the generator's device.

        Raises:
            InputError: a source of another kind, or a seed, step or rank out of range.
        """
        columns = len(COLUMNS) + len(RAND_COLUMNS) * self.config.rand_layers
        if isinstance(source, torch.Generator):
            return torch.rand(count, columns, generator=source, device=source.device)
        if not isinstance(source, tuple) or len(source) not in (2, 3):
            raise InputError(f"source is {source!r}; accepted: (seed, step), (seed, step, rank) or a torch.Generator")
        seed, step, rank = (*source, 0)[:3]
        if rank < 0:
            raise InputError(f"rank {rank} is out of range; accepted: 0 or more")
        bits = draws(seed, step, count * columns, STREAM + rank) >> np.uint64(40)  # 24 bits: exact in float32
        return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24)).view(columns, count).T

    def transform(self, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Args:
            images: [B, h, w, 3] uint8.
            labels: [B] int64.
            draws: what `draw` gave, on the same device.

        Returns:
            [B, 3, h, w] float32, normalised, in channels_last memory; [B, classes] float32, shares of the classes.

        Raises:
            InputError: wrong shapes, padding as large as the image, or (on the CPU) labels outside the classes.
        """
        config = self.config
        self._check(images, labels, draws)
        column = dict(zip(COLUMNS, draws.unbind(1)))
        if config.padding or config.flip:
            images = self._crop_and_flip(images, column)
        for layer in range(config.rand_layers):
            images = self._rand_augment(images, draws[:, len(COLUMNS) + len(RAND_COLUMNS) * layer :])
        pixels = (images.float() - 255 * self.mean) / (255 * self.std)  # [B, h, w, 3]
        if config.erase:
            pixels = self._erase(pixels, column)
        classes = torch.arange(config.classes, device=labels.device)
        shares = (labels[:, None] == classes).float()  # [B, classes]
        shares = shares * (1 - config.smoothing) + config.smoothing / config.classes
        if config.mix_chance and (config.mixup or config.cutmix):
            pixels, shares = self._mix(pixels, shares, column)
        return _channels_first(pixels), shares

    def _check(self, images: Tensor, labels: Tensor, draws: Tensor) -> None:
        shape, config = tuple(images.shape), self.config
        if images.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3:
            raise InputError(f"images are {images.dtype} of shape {shape}; accepted: uint8, [B, h, w, 3]")
        if tuple(labels.shape) != shape[:1] or labels.dtype != torch.int64:
            found = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise InputError(f"labels are {found}; accepted: int64, one for each of the {shape[0]} images")
        columns = len(COLUMNS) + len(RAND_COLUMNS) * config.rand_layers
        if tuple(draws.shape) != (shape[0], columns):
            raise InputError(f"draws have shape {tuple(draws.shape)}; accepted: {(shape[0], columns)}, see draw")
        if config.padding >= min(shape[1:3]):
            raise InputError(f"padding {config.padding} for images of {shape[1]} x {shape[2]}; accepted: a smaller one")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
            low, high = labels.aminmax()
            if low < 0 or high >= config.classes:
                raise InputError(f"labels are {low} .. {high}; accepted: 0 .. {config.classes - 1}")
        if self.mean.device != images.device:
            self.to(images.device)

    def _crop_and_flip(self, images: Tensor, column: dict[str, Tensor]) -> Tensor:
        """One gather: which row and column of the image each pixel is taken from."""
        padding = self.config.padding
        batch, height, width, _ = images.shape
        rows = below(column["top"], 2 * padding + 1)[:, None] - padding + numbers(height, images)  # [B, h]
        columns = below(column["left"], 2 * padding + 1)[:, None] - padding + numbers(width, images)  # [B, w]
        if self.config.flip:
            columns = torch.where(column["flip"][:, None] < 0.5, columns, columns.flip(1))
        inside = (_inside(rows, height)[:, :, None] & _inside(columns, width)[:, None])[..., None]
        rows, columns = _reflect(rows, height)[:, :, None], _reflect(columns, width)[:, None]
        cropped = images[numbers(batch, images)[:, None, None], rows, columns]
        return cropped if self.config.padding_mode == "reflect" else cropped * inside

    def _rand_augment(self, images: Tensor, draws: Tensor) -> Tensor:
        config = self.config
        operation, chance, level, sign = draws[:, : len(RAND_COLUMNS)].unbind(1)
        operation = self.operations[below(operation, len(self.operations))]
        operation = torch.where(chance < config.rand_chance, operation, NONE)
        normal = math.sqrt(2) * torch.erfinv(2 * level - 1)
        level = config.rand_magnitude + (config.rand_noise * normal if config.rand_noise else 0 * level)
        sign = torch.where(sign < 0.5, -1.0, 1.0)
        return apply_operations(images, operation, level.clamp(0, 10) / 10, sign, 255 * self.mean)

    def _erase(self, pixels: Tensor, column: dict[str, Tensor]) -> Tensor:
        batch, height, width, _ = pixels.shape
        area = height * width * (AREA[0] + column["erase_area"] * (AREA[1] - AREA[0]))
        shape = (math.log(SHAPE[0]) + column["erase_shape"] * math.log(SHAPE[1] / SHAPE[0])).exp()
        box_height = (area * shape).sqrt().round().clamp(1, height)
        box_width = (area / shape).sqrt().round().clamp(1, width)
        top = below(column["erase_y"], height - box_height + 1)
        left = below(column["erase_x"], width - box_width + 1)
        inside = box(pixels, top, top + box_height, left, left + box_width)
        inside = inside & (column["erase"] < self.config.erase)[:, None, None]
        fill = 0.0 if self.config.erase_fill == "mean" else noise(pixels.shape, below(column["erase_key"], 1 << 24))
        return torch.where(inside[..., None], fill, pixels)

    def _mix(self, pixels: Tensor, shares: Tensor, column: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix are one sum of two images with weights [B, h, w]: even ones, or those of a box."""
        config = self.config
        _, height, width, _ = pixels.shape
        partner = column["partner"].argsort()
        cut = column["cut"] < 0.5 * bool(config.cutmix) + 0.5 * (not config.mixup)
        mixed = (column["mix"] < config.mix_chance)[:, None, None]
        own = torch.where(cut, quantile(self.cutmix_shares, column["share"]),
                          quantile(self.mixup_shares, column["share"]))  # fmt: skip
        half = [(side * (1 - own).sqrt() / 2).floor() for side in (height, width)]
        middle = [below(column[name], side) for name, side in (("box_y", height), ("box_x", width))]
        inside = box(pixels, middle[0] - half[0], middle[0] + half[0], middle[1] - half[1], middle[1] + half[1])
        weight = torch.where(cut[:, None, None], (~inside).float(), own[:, None, None])
        weight = torch.where(mixed, weight, 1.0)[..., None]  # [B, h, w, 1]
        share = weight.mean((1, 2))  # [B, 1]
        pixels = weight * pixels + (1 - weight) * pixels[partner]
        return pixels, share * shares + (1 - share) * shares[partner]


def _channels_first(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _inside(index: Tensor, side: int) -> Tensor:
    return (index >= 0) & (index < side)


def _reflect(index: Tensor, side: int) -> Tensor:
    return (side - 1) - ((side - 1) - index.abs()).abs()
