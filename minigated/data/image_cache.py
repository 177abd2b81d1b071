"""Decoded images in a file that is mapped into memory: built once, whole or not at all, opened in an instant."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigated.data.folders import make_folder, one_at_a_time
from minigated.data.splits import PARTS, TRAIN
from minigated.errors import InputError

FORMAT = 1  # of the cache; another number has it made again
IMAGES, LABELS, NOTE = "images.npy", "labels.npy", "images.json"


@dataclass
class Reading:
    """What a source offers: labels at once, pictures block by block in the same order.

    Attributes:
        origin: what kind of place the pictures come from, for people.
        classes: names, by label.
        size: side of the square pictures.
        labels: [N] int64.
        parts: [N], see `minigated.data.splits`.
        blocks: starts reading; yields [any, size, size, 3] uint8, N in all.
    """

    origin: str
    classes: list[str]
    size: int
    labels: np.ndarray
    parts: np.ndarray
    blocks: Callable[[], Iterator[np.ndarray]]


def cached(
    folder: Path, name: str, read: Callable[[], Reading], stamp: str = ""
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Opens the cache in `folder`, after building it if it is not there, of another format, or of another stamp.

    The pictures lie in the order train, validation, test, inside a part in the order of their source. The note
    ``images.json``, written last, says name, origin, classes, size, counts, mean and deviation of the train part,
    and the hash.

    Args:
        folder: of this cache alone.
        name: of the data set.
        read: called only if the cache has to be built.
        stamp: state of the source; another one than the note's has the cache built again.

    Returns:
        the note; images [N, size, size, 3] uint8, mapped (what is written to it stays in memory); labels [N] int64.

    Raises:
        InputError: what `read` raises, or a folder or disk that cannot take the cache.
    """
    note = _ready(folder, stamp)
    if note is None:
        make_folder(folder)
        with one_at_a_time(folder):
            note = _ready(folder, stamp) or _build(folder, name, read(), stamp)
    return note, np.load(folder / IMAGES, mmap_mode="c"), np.load(folder / LABELS)


def hash_of(images: Iterable[np.ndarray], labels: Iterable[np.ndarray]) -> str:
    """SHA-256 of the pixels of all images, then the labels as 64-bit integers, lowest byte first.

    Args:
        images: arrays that are taken one after the other, as are those of `labels`.
    """
    digest = hashlib.sha256()
    for part in images:
        for start in range(0, len(part), 4096):
            digest.update(np.ascontiguousarray(part[start : start + 4096]))
    for part in labels:
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


class Statistics:
    """Mean and deviation of each channel over many pictures, exact: from counts of the 256 values."""

    def __init__(self):
        self.counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, pictures: np.ndarray) -> None:
        for channel in range(3):
            self.counts[channel] += np.bincount(pictures[..., channel].ravel(), minlength=256)

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Of values 0 to 1, each rounded to six digits."""
        share, value = self.counts / self.counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ value
        deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        return [round(float(x), 6) for x in mean], [round(float(x), 6) for x in deviation]


def _ready(folder: Path, stamp: str) -> dict | None:
    try:
        note = json.loads((folder / NOTE).read_text())
        same = note["format"] == FORMAT and note["stamp"] == stamp
        whole = same and all((folder / file).stat().st_size == size for file, size in note["bytes"].items())
        return note if whole and set(note["bytes"]) == {IMAGES, LABELS} else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or cut short: made again
        return None


def _build(folder: Path, name: str, reading: Reading, stamp: str) -> dict:
    parts = {file: folder / f"{file}.part" for file in (IMAGES, LABELS, NOTE)}
    need, free = len(reading.labels) * (3 * reading.size**2 + 8), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"the decoded images take {need / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free; "
            "choose another folder with --root or MINIGATED_DATA"
        )
    try:
        (folder / NOTE).unlink(missing_ok=True)  # from here on the old cache no longer counts
        facts = _write(name, reading, parts[IMAGES], parts[LABELS])
        sizes = {file: parts[file].stat().st_size for file in (IMAGES, LABELS)}
        note = {"format": FORMAT, "name": name, "stamp": stamp, **facts, "bytes": sizes}
        parts[NOTE].write_text(json.dumps(note, indent=1) + "\n")
        for file, part in parts.items():  # the note last: it says that all is there
            os.replace(part, folder / file)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or parts[IMAGES]}: {error.strerror or error}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return note


def _write(name: str, reading: Reading, images: Path, labels: Path) -> dict:
    """Writes both arrays and returns what the note says of them.

    With write() and not through a map: on a full disk that is an error to report, where a map kills the process.
    """
    count, size = len(reading.labels), reading.size
    order = np.argsort(reading.parts, kind="stable")
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    statistics, done = Statistics(), 0
    with open(images, "wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, shape)
        start = file.tell()
        for block in reading.blocks():
            done += len(block)
            if done > count:
                break
            rows = slice(done - len(block), done)
            for position, picture in zip(place[rows].tolist(), block):
                file.seek(start + position * picture.nbytes)
                file.write(np.ascontiguousarray(picture))
            statistics.add(block[reading.parts[rows] == TRAIN])
        file.flush()
        os.fsync(file.fileno())
    if done != count:
        found = f"{done:,} images or more" if done > count else f"{done:,} images"
        raise InputError(f"{name} ({reading.origin}) has {found} but {count:,} labels; accepted: as many of both")
    with open(labels, "wb") as file:
        np.save(file, reading.labels[order])
        file.flush()
        os.fsync(file.fileno())
    mean, deviation = statistics.mean_and_deviation()
    return {
        "origin": reading.origin,
        "classes": reading.classes,
        "size": size,
        "counts": [int((reading.parts == part).sum()) for part in range(len(PARTS))],
        "mean": mean,
        "std": deviation,
        "sha256": hash_of([np.load(images, mmap_mode="r")], [reading.labels[order]]),
    }
