"""A folder of images sorted into class folders."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minigated.data.image_cache import Reading
from minigated.data.pictures import decode, decode_blocks
from minigated.data.splits import PARTS, TEST, TRAIN, VALIDATION, hold_out
from minigated.errors import InputError

SPLIT_FOLDERS = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION, "test": TEST}


@dataclass
class Listing:
    """The image files of a folder, not opened yet: one row a file."""

    folder: Path
    classes: list[str]
    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def stamp(self) -> str:
        """Changes when a file comes, goes, or is written again."""
        digest = hashlib.sha256()
        for path in self.files:
            try:
                state = path.stat()
            except FileNotFoundError:
                raise InputError(f"{path} is missing: a link that leads nowhere") from None
            digest.update(f"{path.relative_to(self.folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def list_folder(folder: Path) -> Listing:
    """Finds the classes and files of `folder`.

    Two layouts: ``CLASS/FILE``, or ``train/CLASS/FILE`` beside ``test``, ``validation`` (or ``val``) with the same
    classes. Classes and files are taken in the order of their names; names that begin with a dot do not count.

    Raises:
        InputError: fewer than two classes, a class without images in some split, a file among the classes or a
            folder among the images.
    """
    names = {path.name for path in _visible(folder)}
    if "train" not in names:
        classes = _classes(folder)
        listing = Listing(folder, classes)
        _add(listing, folder, TRAIN)
        return listing
    if stray := sorted(names - set(SPLIT_FOLDERS)):
        raise InputError(f"{folder / stray[0]} stands beside train; accepted there: {', '.join(SPLIT_FOLDERS)}")
    if {"validation", "val"} <= names:
        raise InputError(f"{folder} has both validation and val; accepted: one of them")
    if names == {"train"}:
        raise InputError(f"{folder} has train alone; accepted: train with test or validation, or classes without train")
    listing = Listing(folder, _classes(folder / "train"))
    for name in (name for name in SPLIT_FOLDERS if name in names):
        found = _classes(folder / name)
        if found != listing.classes:
            odd = sorted(set(found) ^ set(listing.classes))[0]
            raise InputError(f"class {odd!r} is in only one of {folder / 'train'} and {folder / name}")
        # As in ImageNet, a held-out part without a third one beside it is the test.
        part = SPLIT_FOLDERS[name] if "test" in names or name == "train" else TEST
        _add(listing, folder / name, part)
    return listing


def read_folder(listing: Listing, size: int) -> Reading:
    """The images at `size` x `size`: the shorter side scaled to it, the middle cut out.

    A part that the folder does not name is held out of train: a tenth of every class, at least one image.

    Raises:
        InputError: a class too small to be split; on reading, the first damaged file by name.
    """
    labels, parts = np.array(listing.labels, dtype=np.int64), np.array(listing.parts, dtype=np.uint8)
    counts = np.bincount(labels[parts == TRAIN])
    missing = [part for part in (TEST, VALIDATION) if part not in parts]
    small, need = int(counts.argmin()), len(missing) + 1
    if counts[small] < need:
        held = " and ".join(PARTS[part] for part in missing)
        images = f"{counts[small]} image{'s' if counts[small] > 1 else ''}"
        raise InputError(
            f"class {listing.classes[small]!r} of {listing.folder} has only {images}; accepted: {need} or more, "
            f"since {held} are held out of train"
        )
    for part in missing:
        parts = hold_out(labels, parts, np.maximum(1, counts // 10), part)
    files = listing.files
    read = lambda path: decode(path, str(path), size)
    blocks = lambda: decode_blocks(files, len(files), read, listing.folder.name)
    return Reading("a folder of images", listing.classes, size, labels, parts, blocks)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder} ({error.strerror})") from None


def _classes(folder: Path) -> list[str]:
    for path in (paths := _visible(folder)):
        if not path.is_dir():
            raise InputError(f"{path} is no folder; accepted in {folder}: a folder for each class, nothing else")
    if len(paths) < 2:
        there = f"only the class {paths[0].name!r}" if paths else "no class folders"
        raise InputError(f"{folder} has {there}; accepted: two or more")
    return [path.name for path in paths]


def _add(listing: Listing, folder: Path, part: int) -> None:
    for label, name in enumerate(listing.classes):
        files = _visible(folder / name)
        if not files:
            raise InputError(f"class folder {folder / name} has no images; accepted: at least one")
        for path in files:
            if path.is_dir():
                raise InputError(f"{path} is a folder; accepted in a class folder: image files, nothing else")
        listing.files += files
        listing.labels += [label] * len(files)
        listing.parts += [part] * len(files)
