"""Markdown as notebooks write it, for the site."""

import markdown
import pytest
import site_build  # noqa: F401  adds book/ to the path

from notebook_markdown import fenced, for_site, site_link  # isort: skip

EXTENSIONS = ["tables", "md_in_html", "admonition", "pymdownx.superfences", "pymdownx.arithmatex"]
OPTIONS = {"pymdownx.arithmatex": {"generic": True}}


def html(source: str) -> str:
    return markdown.markdown(for_site(source), extensions=EXTENSIONS, extension_configs=OPTIONS).replace("\n", "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Text:\n- one\n- two", "<p>Text:</p><ul><li>one</li><li>two</li></ul>"),
        ("Text:\n1. one\n2. two", "<p>Text:</p><ol><li>one</li><li>two</li></ol>"),
        ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
        ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- a long\n  item\n- b", "<ul><li>a long    item</li><li>b</li></ul>"),
        ("Text\n- a\n\nMore\n- b", "<p>Text</p><ul><li>a</li></ul><p>More</p><ul><li>b</li></ul>"),
        ("Text\n$$\nx\n$$\nmore", '<p>Text</p><div class="arithmatex">\\[x\\]</div><p>more</p>'),
        ("Text\n$$x$$\nmore", '<p>Text</p><div class="arithmatex">\\[x\\]</div><p>more</p>'),
        (
            "a\n> [!TIP]\n> do\n> this\n\nb",
            '<p>a</p><div class="admonition tip"><p class="admonition-title">Tip</p><p>dothis</p></div><p>b</p>',
        ),
        (
            "<details>\n<summary>S</summary>\n\n**x**\n\n</details>",
            "<details><summary>S</summary><p><strong>x</strong></p></details>",
        ),
        ("2 - 1\nis one", "<p>2 - 1is one</p>"),
    ],
)  # fmt: skip
def test_habits_of_notebooks(source, expected):
    assert html(source) == expected


def test_table_right_behind_a_sentence():
    assert "<p>Rows:</p><table>" in html("Rows:\n| a | b |\n|---|---|\n| 1 | 2 |")


def test_code_is_left_alone():
    source = "```text\nText\n- one\n$$\n<div>\n[a](../docs/x.md)\n```\n~~~\n```\n- x\n~~~"
    assert for_site(source) == source
    assert for_site("see `[a](../docs/x.md)` and `<div>`") == "see `[a](../docs/x.md)` and `<div>`"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("../docs/notation.md#a", "../notation.md#a"),
        ("../docs/results/x.json", "../results/x.json"),
        ("../minigated/gates.py", "../api/gates.md"),
        ("../minigated/data/text.py", "../api/data/text.md"),
        ("../minigated/kernels/__init__.py", "../api/kernels.md"),
        ("../exercises/ch02.py", "../exercises.md"),
        ("../LICENSE", "../licence.md"),
        ("02_gated_attention.ipynb#x", "02_gated_attention.ipynb#x"),
        ("https://arxiv.org/abs/2505.06708", "https://arxiv.org/abs/2505.06708"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(target, expected):
    assert site_link(target) == expected
    assert for_site(f"a [b]({target}) c") == f"a [b]({expected}) c"
    assert for_site(f"[b]: {target}") == f"[b]: {expected}"


def test_fence_is_longer_than_any_inside():
    assert fenced("x = '''\n````\n'''").startswith("`````python\n")
    assert fenced("x") == "```python\nx\n```"
