"""The embedded sample of CIFAR-10: 2,500 images, 250 of each class, without a network and without torchvision.

One lossless picture holds them in a grid of 50 x 50, row by row, and the label of an image is its number modulo 10:
each column of the grid has one class. Rows 0 to 35 are train, 36 to 39 validation, 40 to 49 test, each taken from the
same split of the full set; `minigated.data.sample_images` makes the file.
"""

from pathlib import Path

import numpy as np

from minigated.data.cifar import CLASSES, unpack_grid
from minigated.data.image_cache import Statistics, hash_of
from minigated.data.pictures import decode
from minigated.errors import InputError

SAMPLE = "cifar10-sample"
FILE = Path(__file__).parent / "files" / "cifar10_sample.webp"
GRID = 50
COUNTS = (1800, 200, 500)  # train, validation, test
SHA256 = "3e5d889754c369bd7a0a483b77b408897ac6000af1c958d24714190ba74c6670"


def sample_arrays(path: Path = FILE) -> tuple[dict, np.ndarray, np.ndarray, Path]:
    """What `minigated.data.image_cache.cached` gives for the other sets, and the file.

    Raises:
        InputError: no Pillow, or one without WebP; the file is damaged or its pixels are not those of the sample.
    """
    _check_webp()
    picture = decode(path, str(path))
    if picture.shape != (GRID * 32, GRID * 32, 3):
        raise InputError(f"{path} has shape {picture.shape}, expected {(GRID * 32, GRID * 32, 3)}; restore the file")
    images, labels = unpack_grid(picture, GRID, GRID), np.arange(GRID**2) % len(CLASSES)
    if (found := hash_of([images], [labels])) != SHA256:
        raise InputError(f"{path} has pixels of sha256 {found}, expected {SHA256}; restore the file")
    statistics = Statistics()
    statistics.add(images[: COUNTS[0]])
    mean, deviation = statistics.mean_and_deviation()
    origin = "the package"
    note = {"name": SAMPLE, "origin": origin, "classes": list(CLASSES), "counts": COUNTS, "mean": mean}
    return note | {"std": deviation, "sha256": SHA256}, images, labels, path


def _check_webp() -> None:
    from minigated.data.pictures import pillow

    pillow()
    from PIL import features

    if not features.check("webp"):
        raise InputError(
            "this Pillow was built without WebP, which the sample needs; accepted: python -m pip install pillow"
        )
