"""What every committed notebook of the book keeps to. A rule lists what is wrong; each rule is shown to fail."""

import re
import statistics
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
NOTEBOOKS = sorted(CHAPTERS.glob("*.ipynb"))
MEDIAN_LINES, MOST_LINES, WORDS, KILOBYTES, ALT = 8, 40, (1500, 3500), 600, 20

DATA_URI = re.compile(r"data:[\w/+.-]+(?:;[\w=-]+)*,[^\"')\s]*")
MACHINE_PATH = re.compile(
    r"(?<![\w/.:~-])/(?:work|home|root|tmp|var|usr|opt|mnt|srv|Users|private)/[\w.-]+|\b[A-Z]:\\\w+"
)
OFF_SITE = re.compile(
    r"<(?:script|img|iframe|link|source|video|audio)\b[^>]*\b(?:src|href)\s*=\s*[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|@import\s+[^;]*https?://\S+|url\(\s*[\"']?https?://[^)]+|!\[[^\]]*\]\(\s*https?://[^)]+"
    r"|https?://(?:cdn\.|cdnjs\.|unpkg\.com|fonts\.g)\S*",
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------- reading a notebook
def cells(notebook, kind: str) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def prose(notebook) -> str:
    return "\n\n".join(cell.source for cell in cells(notebook, "markdown"))


def shown(notebook, kinds=("text/html", "text/markdown", "text/plain")) -> list[str]:
    """The text of every output."""
    found = []
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            found += [output.data[kind] for kind in kinds if kind in output.get("data", {})]
            found += [output.text] if "text" in output else []
    return found


def words(text: str) -> int:
    """Words of running text: no code, no displayed equations, no tags."""
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"<[^>]+>", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return len(re.findall(r"[^\W\d_][\w'’-]*", re.sub(r"\$[^$\n]+\$", "x", text)))


# ---------------------------------------------------------------------------------------------- the rules
def cells_are_short(notebook) -> list[str]:
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells(notebook, "code")]
    wrong = [f"a code cell has {count} lines, at most {MOST_LINES}" for count in lines if count > MOST_LINES]
    if statistics.median(lines) > MEDIAN_LINES:
        wrong.append(f"the median code cell has {statistics.median(lines)} lines, at most {MEDIAN_LINES}")
    return wrong


def is_one_sitting(notebook) -> list[str]:
    count = words(prose(notebook))
    return [] if WORDS[0] <= count <= WORDS[1] else [f"{count} words, accepted: {WORDS[0]} to {WORDS[1]}"]


def ran_top_to_bottom(notebook) -> list[str]:
    counts = [cell.execution_count for cell in cells(notebook, "code")]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"cells were executed in the order {counts}"]


def ended_without_error(notebook) -> list[str]:
    outputs = [output for cell in cells(notebook, "code") for output in cell.outputs]
    return [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]


def figures_have_words(notebook) -> list[str]:
    """Every picture has alternative text of some length, and pictures of outputs have a caption."""
    wrong = []
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
            wrong += [f"an output is bare {kind}; use minigated.plots.show" for kind in kinds]
    for text in [*shown(notebook, ("text/html",)), prose(notebook)]:
        for tag in re.findall(r"<img\b[^>]*>", text):
            alt = re.search(r'\balt="([^"]*)"', tag)
            if alt is None or len(alt[1].strip()) < ALT:
                wrong.append(f"a picture has the alternative text {alt and alt[1]!r}")
        captions = re.findall(r"<figcaption>\s*\S", text)
        if len(captions) < len(re.findall(r"<figure\b", text)):
            wrong.append("a figure has no caption")
    for alt in re.findall(r"!\[([^\]]*)\]\(", prose(notebook)):
        if len(alt.strip()) < ALT:
            wrong.append(f"a picture in the text has the alternative text {alt!r}")
    return wrong


def names_no_machine(notebook) -> list[str]:
    found = []
    for text in [*(cell.source for cell in notebook.cells), *shown(notebook)]:
        found += MACHINE_PATH.findall(DATA_URI.sub("", text))
    return [f"path of a machine: {path}" for path in found]


def asks_nothing_off_the_site(notebook) -> list[str]:
    found = []
    for text in [*(cell.source for cell in notebook.cells), *shown(notebook)]:
        found += OFF_SITE.findall(DATA_URI.sub("", text))
    return [f"loaded from elsewhere: {address}" for address in found]


def has_its_sections(notebook) -> list[str]:
    headings = " / ".join(re.findall(r"^#{2,3} (.+)$", prose(notebook), re.MULTILINE)).lower()
    wrong = [f"no section {part!r}" for part in ("recorded", "exercises", "mistakes", "next") if part not in headings]
    if not any('class="exercise"' in text for text in shown(notebook)):
        wrong.append("no exercise is shown; use minigated.check.show_exercises")
    return wrong


def opens_with_the_plain_kernel(notebook) -> list[str]:
    name = notebook.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"kernel {name!r}, accepted: python3"]


RULES = [
    cells_are_short, is_one_sitting, ran_top_to_bottom, ended_without_error, figures_have_words, names_no_machine,
    asks_nothing_off_the_site, has_its_sections, opens_with_the_plain_kernel,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- the chapters
def test_chapters_are_numbered_without_gaps():
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", path.stem) for path in NOTEBOOKS]
    assert numbers, f"no notebook in {CHAPTERS.name}"
    assert [match and int(match[1]) for match in numbers] == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter(path, rule):
    wrong = rule(nbformat.read(path, as_version=4))
    assert not wrong, "\n".join([path.name, *wrong])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_file_is_small_and_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < KILOBYTES * 1024, f"{path.name}: {path.stat().st_size:,} bytes"


# ---------------------------------------------------------------------------------------------- the rules can fail
FIGURE = '<figure><img alt="{alt}" src="data:image/png;base64,AAAA">{caption}</figure>'


def html(text: str):
    return new_output("display_data", data={"text/html": text})


def chapter(text: str = "", source: str = "x = 1", outputs=(), kernel: str = "python3"):
    """A notebook that keeps to every rule, plus what is given."""
    headings = "## Recorded\n\n## Common mistakes\n\n## Exercises\n\n## Summary and next\n\n"
    figure = FIGURE.format(alt="a" * ALT, caption="<figcaption>c</figcaption>")
    good = html('<section class="exercise"></section>' + figure)
    notebook = new_notebook(metadata={"kernelspec": {"name": kernel, "display_name": "Python 3", "language": "python"}})
    notebook.cells = [
        new_markdown_cell(headings + "word " * WORDS[0] + "\n\n" + text),
        new_code_cell(source, execution_count=1, outputs=[good, *outputs]),
    ]
    return notebook


def without(notebook, part: str, replacement: str = ""):
    notebook.cells[0].source = notebook.cells[0].source.replace(part, replacement)
    return notebook


def unordered(notebook):
    notebook.cells[1].execution_count = 7
    return notebook


def bare(text: str):
    return new_output("stream", name="stdout", text=text)


LONG_ALT = "a long enough alternative text"
BROKEN = [
    (cells_are_short, chapter(source="x = 1\n" * (MOST_LINES + 1))),
    (cells_are_short, chapter(source="x = 1\n" * (MEDIAN_LINES + 1))),
    (is_one_sitting, without(chapter(), "word ")),
    (is_one_sitting, chapter("word " * WORDS[1])),
    (ran_top_to_bottom, unordered(chapter())),
    (ended_without_error, chapter(outputs=[new_output("error", ename="ValueError", evalue="no", traceback=[])])),
    (figures_have_words, chapter(outputs=[html(FIGURE.format(alt="", caption="<figcaption>c</figcaption>"))])),
    (figures_have_words, chapter(outputs=[html(FIGURE.format(alt=LONG_ALT, caption=""))])),
    (figures_have_words, chapter(outputs=[html('<img src="data:image/png;base64,AAAA">')])),
    (figures_have_words, chapter(outputs=[new_output("display_data", data={"image/png": "AAAA"})])),
    (figures_have_words, chapter("![](picture.svg)")),
    (names_no_machine, chapter(outputs=[bare("wrote /home/somebody/runs")])),
    (names_no_machine, chapter(source='open("/tmp/x")')),
    (names_no_machine, chapter(outputs=[bare("C:\\Users\\somebody")])),
    (asks_nothing_off_the_site, chapter(outputs=[html('<script src="https://example.org/a.js"></script>')])),
    (asks_nothing_off_the_site, chapter(f"![{LONG_ALT}](https://example.org/a.png)")),
    (asks_nothing_off_the_site, chapter("see https://cdn.example.org/katex.js")),
    (asks_nothing_off_the_site, chapter(outputs=[html("<style>@import 'https://example.org/a.css';</style>")])),
    (has_its_sections, without(chapter(), "## Exercises")),
    (has_its_sections, without(chapter(), "## Recorded")),
    (opens_with_the_plain_kernel, chapter(kernel="julia")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_keeps_to_the_rule(rule):
    links = "[a paper](https://arxiv.org/abs/2505.06708), `minigated/attention.py`, https://example.org/home/x"
    assert rule(chapter(links)) == []


@pytest.mark.parametrize(("rule", "notebook"), BROKEN, ids=[rule.__name__ for rule, _ in BROKEN])
def test_a_broken_notebook_is_refused(rule, notebook):
    assert rule(notebook)


def test_words_leaves_out_code_math_and_tags():
    assert words("Two words\n```python\nnot these\n```\n$$not + these \\tag{1}$$ <b>and</b> [one](more.md) $w_i$") == 5


def test_every_rule_has_a_broken_notebook():
    assert {rule for rule, _ in BROKEN} == set(RULES)
