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


def listed(section: str, state: str = "now", page: str | None = None) -> set[str]:
    """The names in the list of that state, in the section that starts with a line `section`."""
    text = page if page is not None else (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    body = re.split(rf"^(?:## )?{re.escape(section)}$", text, maxsplit=1, flags=re.M)[1]
    body = re.split(r"^## ", body, maxsplit=1, flags=re.M)[0]
    found = re.search(rf"^- {state}: ((?:.*\n(?:  )?)*?)(?=\n|- |\Z)", body, flags=re.M)
    return set(re.findall(r"`([^`]+)`", found[1])) if found else set()


def commands() -> set[str]:
    actions = [a for a in build_parser()._actions if a.choices and a.dest == "command"]
    return set(actions[0].choices)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M)) - {"help", "install"}


def notebooks() -> set[str]:
    return {path.stem for path in (ROOT / "chapters").glob("*.ipynb")}


@pytest.mark.parametrize(
    ("section", "real"),
    [
        ("Commands", commands), ("Data sets", lambda: set(DATA_NAMES)), ("Make", make_targets),
        ("Gate variants", lambda: set(VARIANTS)), ("Models", lambda: {*LM_SIZES, *VIT_SIZES}), ("Notebooks", notebooks),
        ("Records", lambda: set(EXPERIMENTS)),
    ],
)  # fmt: skip
def test_names_are_those_of_the_code(section, real):
    assert listed(section) == real()
    assert not listed(section, "to come") & real(), "a name to come is there already: move it to `now`"


def test_the_reader_of_the_page_sees_a_wrong_name():
    page = "## Models\n- now: `lm_nano` `lm_smal`\n  `lm_medium`\n- to come: `x`\n\n## Other\n- now: `y`\n"
    assert listed("Models", page=page) == {"lm_nano", "lm_smal", "lm_medium"}
    assert listed("Models", "to come", page) == {"x"}


def test_exercise_files_named_on_the_page_are_there():
    for number in ("01", "02", "03", "04", "05", "06", "07", "08", "09"):
        for folder in ("", "checks", "solutions", "mutants"):
            assert (ROOT / "exercises" / folder / f"ch{number}.py").exists(), (folder, number)
