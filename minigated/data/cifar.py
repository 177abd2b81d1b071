"""CIFAR-10: from its public home through torchvision, or from a packed copy; both held to the official release."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigated.data.download import fetch
from minigated.data.folders import make_folder
from minigated.data.image_cache import Reading
from minigated.data.pictures import decode
from minigated.data.splits import TEST, TRAIN, hold_out
from minigated.errors import InputError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE = 32
GRID = 100  # a packed batch is one picture of GRID x GRID images, row by row
HELD_OUT = 500  # of each class, out of train
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# MD5 sums of the six files of the official binary release: for each image a byte of label, then three planes.
BINARY_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
LABEL_FILES = ("train_labels.npy", "test_labels.npy")


def read_cifar10(folder: Path) -> Reading:
    """All 60,000 images, train batches first; 500 of each class are held out of train for validation.

    Where `folder` has a packed copy it is used: each of the six batches as one lossless picture of 3200 x 3200, a
    grid of 100 x 100 images row by row (``data_batch_1.webp`` .. ``data_batch_5.webp``, ``test_batch.webp``), and
    the labels in the same order (``train_labels.npy``, ``test_labels.npy``, uint8). Otherwise torchvision's
    `CIFAR10` is used there, after a download of 170 MB if need be.

    Raises:
        InputError: files missing or damaged, pixels or labels that are not those of the official release, no
            torchvision, or a failed download.
    """
    packed = any((folder / f"{batch}.webp").exists() for batch in BINARY_MD5)
    if packed:
        origin, labels, batches = "a packed copy", _packed_labels(folder), _packed_batches(folder)
    else:
        origin, (labels, batches) = "torchvision's copy", _torchvision_arrays(folder)
    test = np.arange(len(labels)) >= 5 * GRID**2
    parts = hold_out(labels, np.where(test, TEST, TRAIN).astype(np.uint8), HELD_OUT)
    return Reading(origin, list(CLASSES), SIDE, labels, parts, lambda: _checked(batches, labels, folder))


def unpack_grid(picture: np.ndarray, rows: int, columns: int, side: int = SIDE) -> np.ndarray:
    """[rows * side, columns * side, 3] -> [rows * columns, side, side, 3], row by row."""
    cells = picture.reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # [rows, columns, side, side, 3]
    return cells.reshape(rows * columns, side, side, 3)


def pack_grid(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The other way."""
    side = images.shape[1]
    return images.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def binary_md5(images: np.ndarray, labels: np.ndarray) -> str:
    """MD5 of the images as the binary release writes them: the label, then the red, green and blue planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return hashlib.md5(np.column_stack((labels.astype(np.uint8), planes)).tobytes()).hexdigest()


def _checked(batches: Iterator[np.ndarray], labels: np.ndarray, folder: Path) -> Iterator[np.ndarray]:
    from tqdm import tqdm

    start = 0
    with tqdm(desc="cifar10", total=len(labels), unit="image", disable=None) as bar:
        for (name, md5), images in zip(BINARY_MD5.items(), batches):
            found = binary_md5(images, labels[start : start + len(images)])
            if found != md5:
                raise InputError(
                    f"{folder / name} has MD5 {found} in the official binary form, expected {md5}; "
                    "replace the files of this folder, or delete them to download the set"
                )
            yield images
            start += len(images)
            bar.update(len(images))


def _packed_labels(folder: Path) -> np.ndarray:
    labels = []
    for file, count in zip(LABEL_FILES, (5 * GRID**2, GRID**2)):
        try:
            values = np.load(folder / file, allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"{folder / file} is missing; accepted: the six pictures with both label files") from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{folder / file} is damaged ({error})") from None
        if values.shape != (count,):
            raise InputError(f"{folder / file} has labels of shape {values.shape}, expected ({count},)")
        if values.dtype.kind not in "ui" or values.min() < 0 or values.max() >= len(CLASSES):
            raise InputError(f"{folder / file} has labels outside 0 .. {len(CLASSES) - 1}")
        labels.append(values.astype(np.int64))
    return np.concatenate(labels)


def _packed_batches(folder: Path) -> Iterator[np.ndarray]:
    for name in BINARY_MD5:
        path = folder / f"{name}.webp"
        picture, side = decode(path, str(path)), GRID * SIDE
        if picture.shape != (side, side, 3):
            height, width, _ = picture.shape
            raise InputError(f"{path} is a picture of {width} x {height}, expected {side} x {side}")
        yield unpack_grid(picture, GRID, GRID)


def _torchvision_arrays(folder: Path) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    from minigated.torchvision_cpu import prepare_torchvision

    prepare_torchvision()
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise InputError(
            "cifar10 needs torchvision; accepted: python -m pip install torchvision, "
            "or the sample cifar10-sample, which needs only Pillow"
        ) from None
    make_folder(folder)
    try:
        try:
            train, test = (CIFAR10(folder, train=train) for train in (True, False))
        except RuntimeError:  # not there, or damaged
            # torchvision would download by itself, but from the start again whenever the line is cut.
            fetch(CIFAR10.url, folder / CIFAR10.filename, ARCHIVE_SHA256)
            train, test = (CIFAR10(folder, train=train, download=True) for train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"torchvision cannot make CIFAR-10 ready in {folder} ({reason})") from None
    labels = np.array(train.targets + test.targets, dtype=np.int64)
    return labels, (half for whole in (train.data, test.data) for half in np.split(whole, len(whole) // GRID**2))
