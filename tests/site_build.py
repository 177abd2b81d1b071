"""Builds the site once for all tests that look at it: the chapters that are there and the sample notebook."""

import fcntl
import os
import shutil
import subprocess
import sys
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


def build(tmp_path_factory) -> tuple[Path, str]:
    """(folder of the site, what the build said); fails with its last lines if it fails.

    Test processes of one run share it: the first one builds, the others wait for it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "built-site"
    folder.mkdir(exist_ok=True)
    said = folder / "said.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            done = mkdocs(gather(folder / "chapters"), folder / "site")
            said.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}", encoding="utf-8")
    status, _, words = said.read_text(encoding="utf-8").partition("\n")
    assert status == "0", words[-3000:]
    return folder / "site", words


def gather(chapters: Path) -> Path:
    """The notebooks to build: those of the book and the sample."""
    chapters.mkdir()
    for path in (ROOT / "chapters").glob("*.ipynb"):
        shutil.copy(path, chapters)
    nbformat.write(sample_notebook.sample(), chapters / "99_sample.ipynb")
    return chapters
