"""A notebook as a page of the site.

mkdocs-jupyter turns an executed notebook into HTML. Its text cells and code cells are written again here as Markdown,
so that they get what every other page has: admonitions, checked links, mathematics, the copy button, each code cell
once in the search index. Its outputs are kept, without the 600 KB of style sheets that come with them.
"""

import copy
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

import figures
import nbformat
from bs4 import BeautifulSoup, Tag
from notebook_markdown import fenced, for_site

SLOT = '<div class="nb-slot" data-slot="{}"></div>'
SLOTS = re.compile(r'<div class="nb-slot" data-slot="(\d+)"></div>')


class PageError(Exception):
    """A notebook that cannot become a page; the message says which and why."""


@dataclass
class NotebookPage:
    """What becomes of one notebook.

    Attributes:
        markdown: the page, with a numbered slot for each output.
        outputs: the HTML for the slots.
        files: pictures by address relative to the page.
    """

    markdown: str = ""
    outputs: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def fill(self, content: str) -> str:
        """The rendered page with outputs in their slots; complains if one is lost."""
        found = [int(number) for number in SLOTS.findall(content)]
        if found != list(range(len(self.outputs))):
            raise PageError(f"outputs went astray in Markdown: expected {len(self.outputs)}, found {found}")
        return SLOTS.sub(lambda m: self.outputs[int(m[1])], content)


def build(path: Path, converted: str) -> NotebookPage:
    """Puts a page together.

    Args:
        path: the notebook.
        converted: HTML that mkdocs-jupyter made from it.

    Raises:
        PageError: the two do not fit together, or a cell ended in an error.
    """
    notebook = nbformat.read(path, as_version=4)
    soup = BeautifulSoup(converted, "html.parser")
    for unwanted in soup.select("style, script, .jp-InputPrompt, .jp-OutputPrompt"):
        if not unwanted.find_parent(class_="jp-RenderedHTMLCommon"):
            unwanted.decompose()
    areas = [area for area in soup.select("div.jp-CodeCell") if not area.find_parent(class_="jp-CodeCell")]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if len(areas) != len(cells):
        raise PageError(f"{path.name}: {len(cells)} code cells, but {len(areas)} were converted")
    page, parts = NotebookPage(), []
    pending = iter(zip(cells, areas))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(for_site(_attachments(cell)))
        elif cell.cell_type == "code":
            parts += _code_cell(page, *next(pending), where=path.name)
    page.files = _pictures(page, path.stem)
    page.markdown = _insert_after_title("\n\n".join(parts) + "\n", run_note(notebook, path.name))
    return page


def _code_cell(page: NotebookPage, cell, area: Tag, where: str) -> list[str]:
    tags = set(cell.metadata.get("tags", []))
    if "remove-cell" in tags:
        return []
    parts = []
    if cell.source.strip() and "remove-input" not in tags:
        block = fenced(cell.source)
        if "hide-input" in tags:
            block = '??? note "Code"\n\n' + "\n".join("    " + line if line else "" for line in block.split("\n"))
        parts.append(block)
    if "remove-output" in tags:
        return parts
    children = area.select(".jp-OutputArea-child")
    if len(children) != len(cell.outputs):
        raise PageError(f"{where}: {len(cell.outputs)} outputs, but {len(children)} were converted")
    for output, child in zip(cell.outputs, children):
        if output.output_type == "error" and "raises-exception" not in tags:
            raise PageError(f"{where}: a cell ended in {output.ename}: {output.evalue}")
        parts += _output(page, output, child.select_one(".jp-OutputArea-output"))
    return parts


def _output(page: NotebookPage, output, rendered: Tag | None) -> list[str]:
    """The slot for one output, or Markdown where the output is Markdown or TeX."""
    if rendered is None or not rendered.decode_contents().strip():
        return []
    data, classes = output.get("data", {}), rendered.get("class", [])
    if "jp-RenderedMarkdown" in classes or "jp-RenderedLatex" in classes:
        text = data.get("text/markdown") or data.get("text/latex")
        return ['<div class="nb-result" markdown="1">', for_site(text), "</div>"]
    kind, label = "nb-text", ""
    if output.output_type == "error":
        kind, label = "nb-error", "error"
    elif output.get("name") == "stderr":
        kind, label = "nb-error", "on the error stream"
    elif "text/html" in data:
        kind = "nb-html"
    elif any(name.startswith("image/") for name in data):
        kind = "nb-image"
    label = f'<span class="nb-label">{label}</span>' if label else ""
    for table in rendered.select("table"):
        if not table.find_parent(class_="nb-table"):
            table.wrap(rendered_wrapper())
    inner = rendered.decode_contents().strip()
    hidden = " data-search-exclude" if kind in ("nb-text", "nb-error") else ""
    page.outputs.append(f'<div class="nb-output {kind}"{hidden}>{label}{inner}</div>')
    return [SLOT.format(len(page.outputs) - 1)]


def rendered_wrapper() -> Tag:
    """A box in which a wide table scrolls."""
    return BeautifulSoup('<div class="nb-table"></div>', "html.parser").div


def _attachments(cell) -> str:
    """Pictures pasted into a text cell, as data addresses."""
    source = cell.source
    for name, bundle in copy.deepcopy(cell.get("attachments", {})).items():
        kind, data = next(iter(bundle.items()))
        source = source.replace(f"attachment:{name}", f"data:{kind};base64,{data}")
    return source


def _pictures(page: NotebookPage, stem: str) -> dict[str, bytes]:
    files = {}
    for number, output in enumerate(page.outputs):
        if "data:" not in output:
            continue
        soup = BeautifulSoup(output, "html.parser")
        files |= figures.place(soup, f"figures/{stem}-{number:02d}")
        page.outputs[number] = str(soup)
    return files


def _insert_after_title(text: str, note: str) -> str:
    """The note goes below the first heading, or to the top where there is none."""
    title = re.search(r"^# .*$", text, re.MULTILINE)
    if not title:
        return f"{note}\n\n{text}"
    return f"{text[: title.end()]}\n\n{note}\n\n{text[title.end() :]}"


def run_note(notebook, name: str) -> str:
    """One line under the title: which run the outputs come from, and where to get the notebook."""
    run = notebook.metadata.get("minigated", {}).get("run")
    link = f'<a href="{html.escape(name)}" download>Download the notebook</a>'
    if not run:
        return f'<p class="nb-run">These outputs carry no note of the run that made them. {link}.</p>'
    whose = {"reader": "your own run"}.get(run.get("origin"), "the run kept in the repository")
    facts = [run.get("device"), f"{run['scale']} scale" if run.get("scale") else None]
    facts += [f"torch {run['torch']}" if run.get("torch") else None, run.get("date"), _duration(run.get("seconds"))]
    facts = ", ".join(html.escape(str(fact)) for fact in facts if fact)
    return f'<p class="nb-run">Outputs on this page come from <strong>{whose}</strong>: {facts}. {link}.</p>'


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
