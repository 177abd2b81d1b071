"""Mini-ImageNet as a plain 100-way classification: from a packed copy at 64 x 64, or from its public copy.

The 60,000 images are 600 of each class; here 450 train, 50 are held out of train to choose by, and 100 are read once,
as the test. Both sources put the 100 held-out images apart and name the classes by WordNet number in the same order,
so labels agree. Their pixels do not: the packed copy was scaled to 84 x 84 once before. `ImageSet.origin` says which
one was read.

Seven pairs of images have the same pixels and two different labels; no model gets both of a pair right.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minigated.data.download import fetch
from minigated.data.folders import make_folder
from minigated.data.image_cache import Reading
from minigated.data.pictures import BLOCK, decode, decode_blocks
from minigated.data.splits import TEST, TRAIN, hold_out
from minigated.errors import InputError

SIZE = 64  # of the packed copy, and what is loaded without a size
CLASSES = 100
COUNTS = {"train": 50_000, "held out": 10_000}
HELD_OUT = 50  # of each class, out of train
PACKED = "mini-imagenet-64"
HUB = "https://huggingface.co"
REPOSITORY, REVISION = "timm/mini-imagenet", "bd8779f9d33c061ea6e75fdd3bce4e43dd679060"
HUB_PARTS = {"train": TRAIN, "validation": TEST}  # its own "test", 5,000 images of ImageNet's validation, is left


def read_packed(folder: Path) -> Reading:
    """The packed copy: WebP files end to end in ``images_NN.bin``, found through ``index.npz``, and ``classes.csv``.

    Raises:
        InputError: a file missing or damaged, another number of images, labels or classes; on reading, the first
            damaged picture by its name.
    """
    index = _index(folder)
    labels = index["label"].astype(np.int64)
    parts = np.where(index["split"] == "train", TRAIN, TEST).astype(np.uint8)
    shards = [_bytes(folder / f"images_{number:02d}.bin") for number in range(int(index["shard"].max()) + 1)]
    start, stop = index["offset"].astype(np.int64), index["offset"].astype(np.int64) + index["length"]
    for number, shard in enumerate(shards):
        end = int(stop[index["shard"] == number].max(initial=0))
        if len(shard) != end:
            raise InputError(f"{folder / f'images_{number:02d}.bin'} has {len(shard):,} bytes, expected {end:,}")

    def read(row: int) -> np.ndarray:
        shard = int(index["shard"][row])
        name = f"{index['name'][row]} (images_{shard:02d}.bin in {folder}, from byte {start[row]:,})"
        picture = decode(shards[shard][start[row] : stop[row]].tobytes(), name)
        if picture.shape != (SIZE, SIZE, 3):
            raise InputError(f"{name} is {picture.shape[1]} x {picture.shape[0]}, expected {SIZE} x {SIZE}")
        return picture

    classes = _class_names(folder / "classes.csv")
    _check_counts(folder, labels, parts, classes)
    parts = hold_out(labels, parts, HELD_OUT)
    blocks = lambda: decode_blocks(range(len(labels)), len(labels), read, PACKED)
    return Reading("a packed copy", classes, SIZE, labels, parts, blocks)


def read_hub(folder: Path, size: int) -> Reading:
    """The public copy with ImageNet's own pixels, parquet files of 6.8 GB in all, kept in `folder`.

    The shorter side is scaled to `size`, the middle square cut out. The files may go once the cache is built.

    Raises:
        InputError: pyarrow is not installed, the download failed, or the files are not what they should be.
    """
    parquet = _parquet()
    make_folder(folder)
    paths = [(part, path) for split, part in HUB_PARTS.items() for path in _hub_files(folder, split)]
    labels, parts, classes = [], [], []
    for part, path in paths:
        file = _opened(parquet, path)
        classes = classes or _hub_classes(file, path)
        column = file.read(columns=["label"]).column("label").to_numpy().astype(np.int64)
        labels.append(column)
        parts.append(np.full(len(column), part, dtype=np.uint8))
    labels, parts = np.concatenate(labels), np.concatenate(parts)
    _check_counts(folder, labels, parts, classes)

    def pictures() -> Iterator[tuple[bytes, str]]:
        for _, path in paths:
            for batch in _opened(parquet, path).iter_batches(BLOCK, columns=["image"]):
                yield from ((row["bytes"], f"{row['path']} in {path}") for row in batch.column("image").to_pylist())

    blocks = lambda: decode_blocks(pictures(), len(labels), lambda item: decode(*item, size), "mini-imagenet")
    return Reading("the public copy", classes, size, labels, hold_out(labels, parts, HELD_OUT), blocks)


def _check_counts(folder: Path, labels: np.ndarray, parts: np.ndarray, classes: list[str]) -> None:
    found = {"train": int((parts == TRAIN).sum()), "held out": int((parts == TEST).sum())}
    if found != COUNTS:
        raise InputError(f"{folder} has {found} images, expected {COUNTS}")
    if len(classes) != CLASSES or labels.min() < 0 or labels.max() >= CLASSES:
        span = f"{labels.min()} .. {labels.max()}"
        raise InputError(f"{folder} has {len(classes)} classes and labels {span}, expected {CLASSES} classes")
    if (smallest := np.bincount(labels[parts == TRAIN], minlength=CLASSES).min()) <= HELD_OUT:
        raise InputError(f"{folder} has a class of {smallest} train images; accepted: more than {HELD_OUT}")


def _index(folder: Path) -> dict[str, np.ndarray]:
    from zipfile import BadZipFile

    path = folder / "index.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in ("shard", "offset", "length", "label", "split", "name")}
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    lengths = {name: len(column) for name, column in index.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"{path} has columns of different lengths: {lengths}")
    if odd := set(np.unique(index["split"]).tolist()) - {"train", "val"}:
        raise InputError(f"{path} has the split {sorted(odd)[0]!r}; accepted: train, val")
    return index


def _bytes(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except ValueError:  # an empty file cannot be mapped
        raise InputError(f"{path} is empty") from None


def _class_names(path: Path) -> list[str]:
    import csv

    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [row["words"].split(",")[0] for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}); accepted: columns label, wnid, words") from None


def _parquet():
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            "the public copy of mini-imagenet is in parquet files, which need pyarrow; accepted: "
            f"python -m pip install pyarrow, or a packed copy ({SIZE} x {SIZE}) in {PACKED} under the data folder"
        ) from None
    return parquet


def _hub_files(folder: Path, split: str) -> list[Path]:
    """Downloads what the public copy lists for `split`, each file held to the hash listed with it."""
    listing = fetch(f"{HUB}/api/datasets/{REPOSITORY}/tree/{REVISION}/data", folder / "files.json", progress=False)
    try:
        entries = [(Path(entry["path"]).name, entry["lfs"]["oid"]) for entry in json.loads(listing.read_text())]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{listing} is no list of files ({error}); delete it to download it again") from None
    names = sorted((name, sha256) for name, sha256 in entries if name.startswith(f"{split}-"))
    if not names:
        raise InputError(f"{listing} names no file of {split}; delete it to download it again")
    address = f"{HUB}/datasets/{REPOSITORY}/resolve/{REVISION}/data"
    return [fetch(f"{address}/{name}", folder / name, sha256) for name, sha256 in names]


def _opened(parquet, path: Path):
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}); delete it to download it again") from None


def _hub_classes(file, path: Path) -> list[str]:
    """The label names that the data set's own library writes beside the columns."""
    try:
        note = json.loads(file.schema_arrow.metadata[b"huggingface"])
        return list(note["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} does not name its classes; accepted: the files of {REPOSITORY}") from None
