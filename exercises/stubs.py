"""Makes the stubs that readers fill in from the solutions: same signatures and docstrings, no bodies.

python exercises/stubs.py            writes the chapters that are missing beside this file
python exercises/stubs.py FOLDER     the same in another folder
python exercises/stubs.py --force    starts all chapters afresh: answers written there are lost
"""

import argparse
from pathlib import Path

from minigated.check import load_exercises
from minigated.exercise_text import read_functions

HERE = Path(__file__).resolve().parent
HEADER = '''"""Exercises of chapter {chapter}. Replace a `raise` by your answer, then `pytest exercises -k {first}`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401
'''


def stub_files() -> dict[str, str]:
    """Text of every stub file by its name, ch01.py and so on."""
    files: dict[str, str] = {}
    for item in load_exercises(HERE).values():
        head = HEADER.format(chapter=item.id.split(".")[0], first=item.id.replace(".", "_"))
        source = read_functions(HERE / "solutions" / item.file)[item.name]
        files[item.file] = files.get(item.file, head) + (
            f"\n\n# {item.id} {item.title}: {item.kind}, difficulty {item.difficulty} of 5, "
            f'about {item.minutes} minutes\n{source.head}\n    raise NotImplementedError("{item.id}")\n'
        )
    return files


def write_stubs(folder: Path, force: bool = False) -> list[Path]:
    """Writes the stubs to `folder` and returns what was written; files that exist stay unless `force`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in stub_files().items():
        if force or not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=HERE)
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args()
    for path in write_stubs(arguments.folder, arguments.force) or ["nothing: every chapter is there already"]:
        print("wrote", path)
