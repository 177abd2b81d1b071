"""Makes the embedded sample from the full CIFAR-10: ``python -m minigated.data.sample_images [--write]``.

Of every class the first 180 train, 20 validation and 50 test images of `load_images("cifar10")` are taken, in that
order, the classes in turn. So the sample's splits lie within those of the full set, and a model trained on either has
seen neither test. Without ``--write`` the picture made is compared with the one in the package, pixel by pixel; the
bytes of the file may differ between versions of the WebP library, its pixels may not.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np

from minigated.data.cifar import pack_grid
from minigated.data.image_cache import hash_of
from minigated.data.image_sample import COUNTS, FILE, GRID, SHA256
from minigated.data.images import ImageSet, load_images
from minigated.data.pictures import pillow
from minigated.errors import InputError


def choose(images: ImageSet, counts: tuple[int, int, int] = COUNTS) -> tuple[np.ndarray, np.ndarray]:
    """The sample's images [N, h, w, 3] uint8 and labels [N]: train, validation, test, in each the classes in turn.

    Raises:
        InputError: a class has too few images.
    """
    classes, chosen_images, chosen_labels = len(images.classes), [], []
    for split, count in zip((images.train, images.validation, images.test), counts):
        each, labels = count // classes, split.labels.numpy()
        rows = [np.flatnonzero(labels == label)[:each] for label in range(classes)]
        for name, some in zip(images.classes, rows):
            if len(some) < each:
                raise InputError(f"class {name!r} of {images.name} has {len(some)} images; accepted: {each} or more")
        rows = np.stack(rows, 1).ravel()  # the first of each class, then the second of each
        chosen_images.append(split.images.numpy()[rows])
        chosen_labels.append(labels[rows])
    return np.concatenate(chosen_images), np.concatenate(chosen_labels)


def encode(images: np.ndarray, rows: int, columns: int) -> bytes:
    """The images as one lossless WebP picture."""
    file = io.BytesIO()
    picture = pillow().fromarray(pack_grid(images, rows, columns))
    picture.save(file, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return file.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Compares, or with ``--write`` writes. Returns 0 if the pixels are the package's, 1 if not, 2 on wrong input."""
    parser = argparse.ArgumentParser(prog="python -m minigated.data.sample_images", description=main.__doc__)
    parser.add_argument("--root", default=None, help="data folder; MINIGATED_DATA or a per-user cache otherwise")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} into the package")
    args = parser.parse_args(arguments)
    try:
        images, labels = choose(load_images("cifar10", args.root))
        found = hash_of([images], [labels])
        if args.write:
            Path(FILE).write_bytes(data := encode(images, GRID, GRID))
            print(f"{FILE}: {len(data):,} bytes")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sha256 of the pixels {found}, {'as' if found == SHA256 else 'NOT as'} in the package")
    return 0 if found == SHA256 else 1


if __name__ == "__main__":
    sys.exit(main())
