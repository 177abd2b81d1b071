"""What a reader sees of an exercise: statement, steps of hints and solution, taken from the solution file.

The solution file is the one source: its docstrings are the statements, its bodies the solutions; the stubs
that readers fill in are made from both.
"""

import ast
import html
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from minigated.errors import InputError


@dataclass(frozen=True)
class Source:
    """One top-level function of a file, in parts.

    Attributes:
        head: the lines from `def` to the end of the docstring.
        statement: the docstring, without its indentation.
        signature: the lines of `def` alone.
        body: everything after the docstring.
    """

    head: str
    statement: str
    signature: str
    body: str


def read_functions(path: Path) -> dict[str, Source]:
    """The documented top-level functions of a Python file, by name."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and (statement := ast.get_docstring(node)):
            first = node.body[0]
            found[node.name] = Source(
                head="\n".join(lines[node.lineno - 1 : first.end_lineno]),
                statement=statement,
                signature="\n".join(lines[node.lineno - 1 : first.lineno - 1]),
                body="\n".join(lines[first.end_lineno : node.end_lineno]),
            )
    return found


def read_function(path: Path, name: str) -> Source:
    """One documented function of a file; InputError when it is not there."""
    found = read_functions(path)
    if name not in found:
        raise InputError(f"{path.name} has no documented function {name!r}; it has: {', '.join(found)}")
    return found[name]


# ---------------------------------------------------------------------------------------------- HTML
def exercise_html(exercise, source: Source) -> str:
    """Title, facts, statement and folded hints of one exercise, as HTML that needs no script."""
    dots = "●" * exercise.difficulty + "○" * (5 - exercise.difficulty)
    facts = (
        f"{exercise.kind} · <span aria-hidden='true'>{dots}</span> difficulty {exercise.difficulty} of 5 · "
        f"about {exercise.minutes} minutes · <code>pytest exercises -k {exercise.id.replace('.', '_')}</code>"
    )
    return (
        f'<section class="exercise" id="exercise-{exercise.id.replace(".", "-")}">\n'
        f"<h4>{exercise.id} {_inline(exercise.title)}</h4>\n"
        f'<p class="exercise-facts">{facts}</p>\n'
        f"{_code(source.signature)}\n{_paragraphs(source.statement)}\n"
        f"{details_html(exercise, source)}\n</section>"
    )


def details_html(exercise, source: Source) -> str:
    """Hint, pseudo-code and solution, each folded. Holds no blank line: Markdown would end there."""
    steps = (
        ("Hint", _paragraphs(exercise.hint)),
        ("Pseudo-code", _code(exercise.pseudo, "")),
        ("Solution", _code(source.body)),
    )
    return "\n".join(
        f"<details>\n<summary>{title} for {exercise.id}</summary>\n{body}\n</details>"
        for title, body in steps
    )


def _paragraphs(text: str) -> str:
    """Prose to <p>, indented blocks and the sections Args, Returns and Raises to <pre>."""
    return "\n".join(
        _code(block, "") if _is_block(block) else f"<p>{_inline(' '.join(block.split()))}</p>"
        for block in re.split(r"\n\s*\n", dedent(text).strip("\n"))
    )


def _is_block(block: str) -> bool:
    return block.startswith("    ") or bool(re.match(r"(Args|Returns|Raises):", block))


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*([^\s*](?:[^*]*[^\s*])?)\*", r"<em>\1</em>", text)  # not the spaced * of a product


def _code(text: str, language: str = ' class="language-python"') -> str:
    escaped = html.escape(dedent(text).strip("\n"), quote=False)
    # A character reference in place of an empty line: Markdown would end the HTML block there.
    return f"<pre><code{language}>{escaped}</code></pre>".replace("\n\n", "\n&#10;")
