"""Markdown as notebooks write it, made ready for the site's Markdown processor.

Jupyter reads CommonMark, the site reads Python-Markdown. They differ in a few habits: a list, a table or a displayed
equation may follow a line of text without a blank line in one and not in the other, nested lists are indented by two
or by four, and text inside `<details>` or `<div>` is Markdown in one and not in the other. Links are written as they
work in the repository and become links of the site.
"""

import re
from collections.abc import Callable, Iterator

FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
ITEM = re.compile(r"^( *)([-*+]|\d{1,3}[.)])( +)\S")
TABLE_RULE = re.compile(r"^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$")
ALERT = re.compile(r"^>\s*\[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]\s*$")
OPENING = re.compile(r"<(details|summary|div|figure|figcaption)(?=[\s>])(?![^>]*\bmarkdown=)", re.IGNORECASE)
LINK = re.compile(r"(\]\(\s*<?)([^)\s>]+)")
REFERENCE = re.compile(r"^( {0,3}\[[^\]]+\]:\s*<?)(\S+?)(>?\s*)$")
# where a file of the repository is found on the site, seen from chapters/
REPOSITORY = (
    (re.compile(r"^\.\./docs/(.+)$"), r"../\1"),
    (re.compile(r"^\.\./minigated/(\w+)/__init__\.py(#.*)?$"), r"../api/\1.md\2"),
    (re.compile(r"^\.\./minigated/(\w+)/(\w+)\.py(#.*)?$"), r"../api/\1/\2.md\3"),
    (re.compile(r"^\.\./minigated/(\w+)\.py(#.*)?$"), r"../api/\1.md\2"),
    (re.compile(r"^\.\./exercises(/.*)?$"), r"../exercises.md"),
    (re.compile(r"^\.\./LICENSE$"), r"../licence.md"),
    (re.compile(r"^\.\./README\.md$"), r"../index.md"),
)


def split_fences(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Yields runs of lines, each with whether it lies inside a fenced code block (fences included)."""
    run, fence = [], None
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence is None and mark:
            yield False, run
            run, fence = [line], mark[1]
        elif fence is not None and mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            yield True, [*run, line]
            run, fence = [], None
        else:
            run.append(line)
    yield fence is not None, run


def site_link(target: str) -> str:
    """The site's address for a link that works in the repository; other links come back as they are."""
    for pattern, replacement in REPOSITORY:
        if pattern.match(target):
            return pattern.sub(replacement, target)
    return target


def _outside_code(line: str, change: Callable[[str], str]) -> str:
    """Applies `change` to a line but not to `code spans` in it."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _links(line: str) -> str:
    line = _outside_code(line, lambda s: LINK.sub(lambda m: m[1] + site_link(m[2]), s))
    return REFERENCE.sub(lambda m: m[1] + site_link(m[2]) + m[3], line)


def _alerts(lines: list[str]) -> list[str]:
    """`> [!NOTE]` blocks become admonitions."""
    out, inside = [], False
    for line in lines:
        if mark := ALERT.match(line):
            kind = {"important": "info", "caution": "danger"}.get(mark[1].lower(), mark[1].lower())
            out += ["", f'!!! {kind} "{mark[1].capitalize()}"', ""]
            inside = True
        elif inside and line.startswith(">"):
            out.append(("    " + line[1:].removeprefix(" ")).rstrip())
        else:
            if inside:
                out.append("")
            out.append(line)
            inside = False
    return out


def _nested_lists(lines: list[str]) -> list[str]:
    """Indents nested list items by four a level, as Python-Markdown wants them."""
    out, levels = [], []  # levels: the columns at which the open items begin
    for line in lines:
        indent = len(line) - len(line.lstrip(" "))
        item = ITEM.match(line)
        if not line.strip():
            out.append(line)
            continue
        if item:
            while levels and indent < levels[-1]:
                levels.pop()
            if not levels or indent > levels[-1] + 1:
                levels.append(indent)
            out.append("    " * (len(levels) - 1) + line.lstrip(" "))
            continue
        if levels and indent > levels[0]:  # continues an item
            depth = sum(indent > level for level in levels)
            out.append("    " * depth + line.lstrip(" "))
            continue
        if levels and out and not out[-1].strip():
            levels = []  # a paragraph at the margin after a blank line ends the list
        out.append(line)
    return out


def _blank_lines(lines: list[str]) -> list[str]:
    """Sets lists, tables and displayed equations apart by blank lines."""
    out, equation, listing = [], False, False
    for i, line in enumerate(lines):
        before = out[-1] if out else ""
        text = line.strip()
        following = lines[i + 1] if i + 1 < len(lines) else ""
        item = bool(ITEM.match(line))
        starts = (
            (text.startswith("$$") and not equation)
            or (item and not listing)
            or ("|" in line and TABLE_RULE.match(following) and "|" in following)
        )
        if starts and before.strip():
            out.append("")
        out.append(line)
        listing = item or (listing and (not text or line.startswith(" ") or bool(before.strip())))
        if text.startswith("$$") or equation:
            closes = text.endswith("$$") and (equation or len(text) > 2)
            opens = not closes
            if closes and following.strip():
                out.append("")
            equation = opens
    return out


def for_site(source: str) -> str:
    """Markdown of one notebook cell as the site's processor wants it. Code blocks in it stay untouched."""
    done = []
    for code, lines in split_fences(source):
        if not code:
            lines = [_links(line) for line in lines]
            lines = [_outside_code(line, lambda s: OPENING.sub(r'<\1 markdown="1"', s)) for line in lines]
            lines = _blank_lines(_nested_lists(_alerts(lines)))
        done += lines
    return "\n".join(done)


def fenced(source: str, language: str = "python") -> str:
    """A fenced code block whose fence is longer than any in the source."""
    longest = max((len(m) for m in re.findall(r"`{3,}", source)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{source.rstrip()}\n{fence}"
