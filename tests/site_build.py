"""Builds the site once for all tests that look at it: the chapters that are there and the sample notebook."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import sample_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))  # the book's tools import one another by their plain names


def mkdocs(chapters: Path, target: Path, *more: str) -> subprocess.CompletedProcess:
    """`mkdocs build --strict` with the notebooks of a folder that must be called chapters."""
    env = {**os.environ, "MINIGATED_CHAPTERS": str(chapters), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target), *more]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@functools.cache
def build() -> tuple[Path, str]:
    """(folder of the site, what the build said); fails with its last lines if it fails."""
    folder = Path(tempfile.mkdtemp(prefix="minigated-site-"))
    chapters = folder / "chapters"
    chapters.mkdir()
    for path in (ROOT / "chapters").glob("*.ipynb"):
        shutil.copy(path, chapters)
    nbformat.write(sample_notebook.sample(), chapters / "99_sample.ipynb")
    done = mkdocs(chapters, folder / "site")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return folder / "site", said


def remove() -> None:
    """Removes what `build` made in this process."""
    if build.cache_info().currsize:
        shutil.rmtree(build()[0].parent, ignore_errors=True)
