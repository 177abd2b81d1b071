"""MkDocs events: chapters from outside docs/, notebooks as pages, pages made from records."""

import os
import posixpath
import re
from pathlib import Path

import figures
import generated
import notebook_page
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PLAIN = re.compile(r'<span class="(?:n|nn|o|ow|p|sa|si|w)">([^<]*)</span>')
KEPT = re.compile(r"(<(pre|script|textarea)\b.*?</\2>)", re.DOTALL)  # where line breaks and indents count
NEIGHBOURS = re.compile(r'(<span class="(\w+)">[^<]*)</span><span class="\2">')
RESULTS = ROOT / "docs" / "results"
_pages: dict[str, notebook_page.NotebookPage] = {}


def chapters_folder() -> Path:
    """Committed notebooks, or the folder named by MINIGATED_CHAPTERS (relative to the repository)."""
    return ROOT / os.environ.get("MINIGATED_CHAPTERS", "chapters")


def on_config(config):
    """Fills "Chapters" and "API" of the navigation, which mkdocs.yml leaves empty."""
    chapters = [f"chapters/{path.name}" for path in notebooks()]
    modules = [f"api/{name}.md" for names in generated.modules().values() for name in names]
    _fill(config.nav, {"Chapters": chapters, "API": ["api/index.md", *modules]})
    return config


def _fill(entries: list, content: dict[str, list]) -> None:
    for entry in entries:
        for title, inner in entry.items() if isinstance(entry, dict) else ():
            if inner == [] and title in content:
                entry[title] = content[title]
            elif isinstance(inner, list):
                _fill(inner, content)


def notebooks() -> list[Path]:
    """The chapters in order."""
    return sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    """Brings the notebooks in under chapters/."""
    folder = chapters_folder()
    if not folder.is_dir() or folder.name != "chapters":  # addresses on the site begin with the folder's name
        raise PluginError(f"MINIGATED_CHAPTERS must name a folder called chapters, got {folder}")
    for path in notebooks():
        files.append(File(f"chapters/{path.name}", str(folder.parent), config.site_dir, config.use_directory_urls))
    for address, text in generated.api_pages().items():
        files.append(File.generated(config, f"api/{address}", content=text))
    for address, text in generated.picture_files().items():
        files.append(File.generated(config, address, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Notebooks: lets mkdocs-jupyter convert, then hands Markdown with slots to the normal rendering."""
    if not page.file.src_uri.endswith(".ipynb"):
        filled = generated.fill(markdown, chapters=chapters_folder(), results=RESULTS)
        filled, pictures = figures.beside(filled, f"figures/{Path(page.file.src_uri).stem}")
        _add(files, page, config, pictures)
        return filled
    page.render(config, files)  # mkdocs-jupyter has put its own method here
    converted = page.content
    for name in ("render", "content", "toc", "title"):
        page.__dict__.pop(name, None)
    page.content, page.toc = None, []
    try:
        made = notebook_page.build(Path(page.file.abs_src_path), converted)
    except notebook_page.PageError as error:
        raise PluginError(str(error)) from error
    _add(files, page, config, made.files)
    _pages[page.file.src_uri] = made
    return made.markdown


def _add(files, page, config, pictures: dict[str, bytes]) -> None:
    """Pictures by address relative to their page become files of the site."""
    for address, data in pictures.items():
        place = posixpath.join(posixpath.dirname(page.file.src_uri), address)
        files.append(File.generated(config, place, content=data))


def on_page_content(content, page, config, files):
    """Puts the outputs into their slots and takes the weight off highlighted code."""
    made = _pages.pop(page.file.src_uri, None)
    try:
        content = made.fill(content) if made else content
    except notebook_page.PageError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
    return lighter(content).replace(" ± ", "\u00a0±\u00a0")  # a number stays beside its deviation


def lighter(content: str) -> str:
    """Drops colour marks from names, punctuation and operators, and joins neighbours: half of a page of code."""
    return NEIGHBOURS.sub(r"\1", PLAIN.sub(r"\1", content))


def on_post_page(output, page, config):
    """Leaves out the indents of the theme's templates."""
    return squeezed(output)


def squeezed(html: str) -> str:
    """One line break for every stretch of white space that holds one, except inside what `KEPT` matches."""
    parts, end = [], 0
    for kept in KEPT.finditer(html):
        parts += [re.sub(r"\s*\n\s*", "\n", html[end : kept.start()]), kept.group()]
        end = kept.end()
    return "".join([*parts, re.sub(r"\s*\n\s*", "\n", html[end:])])
