"""README's numbers are the records', and its commands are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from minigated.__main__ import build_parser

ROOT = Path(__file__).resolve().parent.parent


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, "book/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"README.md is out of date; run: python book/readme.py\n{done.stderr}"


def test_commands_of_the_readme_parse():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m minigated ([^#\n]+)", text, flags=re.M)
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(shlex.split(command))
    for target in re.findall(r"`?make ([a-z]+)`?", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M) or target in ("and",), target


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(
        r"`((?:exercises|docs|book|minigated|tests|chapters)/[\w/.]*)`", text
    ):
        assert (ROOT / link).exists(), link
