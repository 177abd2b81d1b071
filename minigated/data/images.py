"""Images for the vision models: a set in three splits, and batches that are a function of (seed, step)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minigated.data import cifar, mini_imagenet
from minigated.data.folders import data_root
from minigated.data.image_cache import cached, hash_of
from minigated.data.image_folder import list_folder, read_folder
from minigated.data.image_sample import SAMPLE, sample_arrays
from minigated.data.sources import VISION
from minigated.data.streams import draws, share
from minigated.errors import InputError

ORDER_STREAM = 2  # of the draws that put an epoch in order
FOLDER_SIZE = 64


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images with their labels.

    Attributes:
        images: [N, h, w, 3] uint8, red, green, blue. Mapped from the cache: pages are read as they are used.
        labels: [N] int64.

    Raises:
        InputError: another shape or type, or not as many labels as images.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[3] != 3:
            raise InputError(f"images are {self.images.dtype} of shape {shape}; accepted: uint8, [N, h, w, 3]")
        if self.labels.dtype != torch.int64 or tuple(self.labels.shape) != shape[:1]:
            found = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise InputError(f"labels are {found}; accepted: int64, one for each of the {shape[0]} images")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> "ImageSplit":
        """The split in that device's memory; batches are then made there too."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in three splits.

    Attributes:
        name: the name it was asked for by, or the folder's.
        classes: names, by label.
        train, validation, test: choices are made on validation; test is read once.
        mean, std: of the train split's red, green and blue, for values 0 to 1.
        sha256: of all pixels and labels, see `minigated.data.image_cache.hash_of`.
        origin: what kind of place the pictures came from.
        place: file or folder that they are read from.
    """

    name: str
    classes: list[str]
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    origin: str
    place: Path

    @property
    def size(self) -> int:
        """Side of the square images."""
        return self.train.images.shape[1]


def load_images(
    name_or_folder: str | os.PathLike, root: str | os.PathLike | None = None, size: int | None = None
) -> ImageSet:
    """Loads a set of images by name, or a folder of them.

    ``cifar10-sample`` is embedded in the package. ``cifar10`` and ``mini-imagenet`` are taken from a packed copy
    (``ROOT/cifar10``, ``ROOT/mini-imagenet-64``) where there is one, and downloaded otherwise. A path names a folder
    with a folder of images for each class (`minigated.data.image_folder`). All but the sample are decoded once, into
    ``ROOT/images``, and mapped from there.

    Args:
        name_or_folder: one of `minigated.data.sources.VISION`, or a path.
        root: folder for downloads and caches; see `minigated.data.data_root`.
        size: side of the images: any for a folder or mini-imagenet (64 by default), 32 for CIFAR-10.

    Raises:
        InputError: unknown name and no such folder, files that cannot be used, a download that failed, or a size
            under 1.
    """
    name = os.fspath(name_or_folder)
    if size is not None and size < 1:
        raise InputError(f"size {size} is too small; accepted: 1 or more")
    if name in ("cifar10", SAMPLE) and size not in (None, cifar.SIDE):
        raise InputError(f"{name} has images of {cifar.SIDE} x {cifar.SIDE}, not {size}; accepted: {cifar.SIDE}")
    if name == SAMPLE:
        return _sample()
    folder, stamp = data_root(root), ""
    if name == "cifar10":
        size, read = cifar.SIDE, lambda: cifar.read_cifar10(folder / name)
    elif name == "mini-imagenet":
        size = size or mini_imagenet.SIZE
        read = lambda: _read_mini_imagenet(folder, size)
    elif Path(name).expanduser().is_dir():
        listing, size = list_folder(Path(name).expanduser().resolve()), size or FOLDER_SIZE
        name, stamp = listing.folder.name, listing.stamp()
        read = lambda: read_folder(listing, size)
    else:
        kind = "is a file, no folder" if Path(name).expanduser().exists() else "is no folder and no known set of images"
        raise InputError(f"{name!r} {kind}; accepted: {', '.join(VISION)}, or a folder of class folders")
    key = f"{name}-{sha256(str(listing.folder).encode()).hexdigest()[:8]}" if stamp else name
    place = folder / "images" / f"{key}-{size}"
    return _image_set(place, *cached(place, name, read, stamp))


def damage(images: ImageSet) -> str | None:
    """Reads every pixel and says in one line what is wrong with them; None if all is well."""
    splits = (images.train, images.validation, images.test)
    found = hash_of([split.images.numpy() for split in splits], [split.labels.numpy() for split in splits])
    if found == images.sha256:
        return None
    return f"{images.place} has sha256 {found}, expected {images.sha256}; delete the folder to have it made again"


class ImageBatches:
    """Batches of a split, drawn as a pure function of (seed, step).

    Epochs follow each other without a seam: each is a random order of all images, fixed by (seed, epoch), and batch
    after batch is cut from them. So every image comes once an epoch, also where the batch does not divide their
    number; a batch may then hold the end of one epoch and the start of the next.

    Args:
        split: what to draw from; batches are made on the device of its images.
        batch: images of the global batch.
        seed: of the orders.

    Raises:
        InputError: a batch under 1, or an empty split.
    """

    def __init__(self, split: ImageSplit, batch: int = 128, seed: int = 0):
        if batch < 1:
            raise InputError(f"batch {batch} is too small; accepted: 1 or more")
        if len(split) == 0:
            raise InputError("the split has no images; accepted: one or more")
        self.split, self.batch, self.seed = split, batch, seed
        self._orders: dict[int, np.ndarray] = {}  # of the last two epochs asked for: made anew, they are the same

    @property
    def steps_per_epoch(self) -> float:
        """How many batches an epoch has; a fraction where the batch does not divide it."""
        return len(self.split) / self.batch

    def at(self, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """The batch of `step`, or the part of it that belongs to one of `world` processes.

        The parts of all ranks, one after the other, are the batch of a single process.

        Returns:
            images [batch / world, h, w, 3] uint8 and labels [batch / world] int64.

        Raises:
            InputError: `world` does not divide the batch, `rank` is outside 0 .. world - 1, or a negative step.
        """
        return self._take(self.rows(step)[share(self.batch, rank, world)])

    def rows(self, step: int) -> np.ndarray:
        """[batch] int64, which images of the split the batch of `step` has."""
        if step < 0:
            raise InputError(f"step {step} is out of range; accepted: 0 or more")
        position = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, within = np.divmod(position, len(self.split))
        return np.concatenate([self._order(epoch)[within[epochs == epoch]] for epoch in np.unique(epochs).tolist()])

    def sequential(self, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in order, for validation and test; the last batch may be smaller.

        Args:
            count: batches at most; all by default.
        """
        for number, start in enumerate(range(0, len(self.split), self.batch)):
            if count is not None and number >= count:
                return
            stop = start + self.batch
            yield self.split.images[start:stop], self.split.labels[start:stop]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.argsort(draws(self.seed, epoch, len(self.split), ORDER_STREAM), kind="stable")
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        return self._orders[epoch]

    def _take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows).to(self.split.images.device, non_blocking=True)
        return self.split.images.index_select(0, index), self.split.labels.index_select(0, index)


def _read_mini_imagenet(root: Path, size: int):
    packed = root / mini_imagenet.PACKED
    if size == mini_imagenet.SIZE and packed.is_dir():
        return mini_imagenet.read_packed(packed)
    return mini_imagenet.read_hub(root / "mini-imagenet", size)


def _sample() -> ImageSet:
    note, images, labels, place = sample_arrays()
    return _image_set(place, note, images, labels)


def _image_set(place: Path, note: dict, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    cuts = np.cumsum(note["counts"])[:2].tolist()
    pixels, labels = torch.from_numpy(images).tensor_split(cuts), torch.from_numpy(labels).tensor_split(cuts)
    splits = [ImageSplit(*pair) for pair in zip(pixels, labels)]
    mean, std = tuple(note["mean"]), tuple(note["std"])
    return ImageSet(note["name"], note["classes"], *splits, mean, std, note["sha256"], note["origin"], place)
