"""docs/names.md says what others rely on; this holds it to the code, in both directions."""

import re
from pathlib import Path

import pytest

from minigated.__main__ import build_parser
from minigated.data.catalogue import NAMES as DATA_NAMES
from minigated.experiments import EXPERIMENTS
from minigated.lm import SIZES as LM_SIZES
from minigated.variants import VARIANTS
from minigated.vit_sizes import SIZES as VIT_SIZES

ROOT = Path(__file__).resolve().parent.parent


def names_page() -> str:
    return (ROOT / "docs" / "names.md").read_text(encoding="utf-8")


def listed(section: str, page: str) -> set[str]:
    """The names in the list of that section."""
    body = re.split(rf"^## {re.escape(section)}$", page, maxsplit=1, flags=re.M)[1]
    body = re.split(r"^## ", body, maxsplit=1, flags=re.M)[0]
    return set(re.findall(r"`([^`]+)`", re.search(r"^- ((?:.*\n(?:  )?)*?)(?=\n|- |\Z)", body, flags=re.M)[1]))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M)) - {"help", "install"}


def notebooks() -> set[str]:
    return {path.stem for path in (ROOT / "chapters").glob("*.ipynb")}


@pytest.mark.parametrize(
    ("section", "real"),
    [
        ("Data sets", lambda: set(DATA_NAMES)), ("Make", make_targets),
        ("Gate variants", lambda: set(VARIANTS)), ("Models", lambda: {*LM_SIZES, *VIT_SIZES}), ("Notebooks", notebooks),
        ("Records", lambda: set(EXPERIMENTS)),
    ],
)  # fmt: skip
def test_names_are_those_of_the_code(section, real):
    assert listed(section, names_page()) == real()


def test_the_reader_of_the_page_sees_a_wrong_name():
    page = "## Models\n- `lm_nano` `lm_smal`\n  `lm_medium`\n\n## Other\n- `y`\n"
    assert listed("Models", page) == {"lm_nano", "lm_smal", "lm_medium"}


def test_the_page_has_every_flag_of_every_command():
    usage = re.search(r"```\n(.*?)```", names_page(), re.DOTALL)[1].replace("\n      ", " ").splitlines()
    page = {line.split()[0]: set(re.findall(r"--[a-z-]+", line)) for line in usage}
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    code = {
        name: {flag for action in parser._actions if action.dest != "help" for flag in action.option_strings}
        for name, parser in commands.items()
    }
    assert page == code


def test_exercise_files_named_on_the_page_are_there():
    for number in ("01", "02", "03", "04", "05", "06", "07", "08", "09"):
        for folder in ("", "checks", "solutions", "mutants"):
            assert (ROOT / "exercises" / folder / f"ch{number}.py").exists(), (folder, number)
