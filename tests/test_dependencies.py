"""Dependencies point one way: to the same or an earlier chapter, and never to the book or its exercises."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "minigated"
CHAPTERS = {
    "attention": 1, "gates": 2, "variants": 2, "decay": 3, "decay_passes": 3, "windows": 4, "swin": 4,
    "retention": 5, "swat": 6, "swat_options": 6, "swat_tables": 6, "vit_parts": 6, "vit_mixers": 6, "vit": 6,
    "vit_sizes": 6, "moe": 7, "dispatch": 7, "balance": 7, "lm_config": 7, "lm": 7,
}  # fmt: skip
SHARED = {"rope", "layers", "errors", "tables", "kernels", "recompute", "chunked_loss"}  # used by any chapter
# Chapter 2 shows the dense half of lm.py; chapter 7 completes it.


def imported(source: str) -> set[str]:
    """Top-level packages, and for this package its modules as "minigated.x", that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.add("minigated" + "." * bool(node.module) + (node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            names |= {f"minigated.{a.name}" for a in node.names} if node.module == "minigated" else {node.module}
    return {".".join(name.split(".")[:2]) if name.startswith("minigated") else name.split(".")[0] for name in names}


def offences(name: str, source: str) -> set[str]:
    """What a module of the package imports against the rule."""
    used = imported(source)
    wrong = used & {"chapters", "exercises", "docs", "book", "tests"}
    if name in CHAPTERS:
        own = {module.removeprefix("minigated.") for module in used if module.startswith("minigated.")}
        wrong |= {module for module in own - SHARED if CHAPTERS.get(module, 99) > CHAPTERS[name]}
    if name in SHARED:
        wrong |= {m for m in used if m.startswith("minigated.") and m.removeprefix("minigated.") not in SHARED}
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_dependencies_point_one_way(path):
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert not offences(name, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("attention", "from minigated.gates import SigmoidGate", {"gates"}),
        ("attention", "def f():\n    from minigated import lm", {"lm"}),
        ("gates", "import minigated.train", {"train"}),
        ("gates", "from .moe import Router", {"moe"}),
        ("rope", "from minigated.attention import Attention", {"minigated.attention"}),
        ("train", "from exercises.checks import ch01", {"exercises"}),
        (
            "lm",
            "from minigated.rope import RotaryTable\nfrom minigated.attention import Attention\nimport torch",
            set(),
        ),
        ("train", "from minigated.lm import build_lm", set()),
    ],
)
def test_the_rule_sees_offenders(name, source, expected):
    assert offences(name, source) == expected
