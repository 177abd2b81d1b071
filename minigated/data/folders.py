"""Where downloaded data lives."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigated.errors import InputError


def data_root(root: str | os.PathLike | None = None, create: bool = False) -> Path:
    """The folder that downloaded data lives in.

    `root` if given, else the environment variable ``MINIGATED_DATA``, else ``minigated`` in the user's cache
    folder (``%LOCALAPPDATA%`` on Windows, ``$XDG_CACHE_HOME`` or ``~/.cache`` elsewhere).

    Raises:
        InputError: with `create`, the folder cannot be made or written to.
    """
    if root is None:
        root = os.environ.get("MINIGATED_DATA") or None
    if root is None:
        cache = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME") or "~/.cache"
        root = Path(cache) / "minigated"
    folder = Path(root).expanduser()
    if create:
        make_folder(folder)
    return folder


def make_folder(folder: Path) -> Path:
    """Makes a folder that can be written to, or says in one line why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        raise InputError(
            f"cannot write to the data folder {folder} ({error.strerror}); choose another with --root or MINIGATED_DATA"
        ) from None
    return folder


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds other processes back from `folder`: torchrun starts several that all want the same data."""
    try:
        import fcntl
    except ImportError:  # Windows: prepare the data with one process first
        yield
        return
    with open(folder / ".lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # goes with the process, however that ends
        yield
