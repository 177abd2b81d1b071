"""Image files into arrays, with Pillow: whatever is damaged is named."""

import io
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from minigated.errors import InputError

BLOCK = 512  # pictures held at a time
Item = TypeVar("Item")
THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside Python's lock


def pillow():
    """The module `PIL.Image`, or one line on how to get it."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            "images need Pillow, which comes with torchvision and matplotlib; accepted: python -m pip install pillow"
        ) from None
    return Image


def decode(picture: Path | bytes, name: str, size: int | None = None) -> np.ndarray:
    """One image file as RGB.

    Grey, palette and CMYK pictures become RGB, transparency is dropped, a camera's rotation note is followed, of a
    moving picture the first frame is used.

    Args:
        picture: a path, or the bytes of the file.
        name: what to call it in an error message.
        size: scale the shorter side to `size` (Lanczos, with antialiasing) and cut the middle square out; the
            picture's own size by default.

    Returns:
        [h, w, 3] uint8, or [size, size, 3].

    Raises:
        InputError: missing, damaged, no image, or pixels of more than eight bits.
    """
    Image = pillow()
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{name} has pixels of kind {image.mode}; accepted: eight bits a channel")
            if size:
                image.draft("RGB", (2 * size, 2 * size))  # JPEG only: decodes at half, a quarter or an eighth
            return _square(image, size) if size else np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} is missing") from None
    except PermissionError:
        raise InputError(f"{name} cannot be read: permission denied") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is damaged or no image ({reason}); accepted: whole image files only") from None


def _square(image, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = image.size
    side = min(width, height)
    if (width, height) == (size, size):
        return np.asarray(image)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def decode_blocks(
    items: Iterable[Item], count: int, read: Callable[[Item], np.ndarray], title: str
) -> Iterator[np.ndarray]:
    """Calls `read` for every item in order, several at a time, with a progress bar on a terminal.

    Args:
        items: what `read` takes, one a picture.
        count: how many.
        read: gives one picture [size, size, 3]; runs in threads.
        title: of the bar.

    Yields:
        [up to `BLOCK`, size, size, 3] uint8.
    """
    from tqdm import tqdm

    items = iter(items)
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=title, total=count, unit="image", disable=None) as bar:
        while some := list(itertools.islice(items, BLOCK)):
            yield np.stack(list(pool.map(read, some)))
            bar.update(len(some))
