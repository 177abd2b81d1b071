"""Parts of pages that are made from what is there: chapters, records, modules. Markers in docs/ name them.

A marker is an HTML comment on its own line, `<!-- generated: chapters -->`; `MARKERS` lists the names.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from minigated import records

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Chapter:
    """A chapter of the plan: notebook name, title, and the question it answers."""

    name: str
    title: str
    question: str


PLAN = (
    Chapter("01_naive_attention", "Naive attention", "What does attention compute, and what does it cost?"),
    Chapter("02_gated_attention", "Gated attention", "Where does a gate belong, and why does it remove the sink?"),
    Chapter("03_manhattan_decay", "Manhattan decay", "How can distance on a grid enter attention without a table?"),
    Chapter("04_shifted_windows", "Shifted windows", "How do windows exchange what they see?"),
    Chapter("05_retention_vit", "Gated-SwinRMT-Retention", "What does the gate add to a vision backbone?"),
    Chapter("06_swat_vit", "Gated-SwinRMT-SWAT", "What if the softmax itself is replaced by a sigmoid?"),
    Chapter("07_moe_llm", "Mixture of experts", "Does the gate help where the paper measured it?"),
    Chapter("08_long_context", "Long context", "Why does a model without a sink stretch further?"),
    Chapter("09_fast_path", "The fast path", "How fast can all this run?"),
)
# Records that the book plans, by the chapter that shows them. A record may exist without being listed.
RECORDS = {
    1: ("ch01_attention_cost",),
    2: ("ch02_gate_table", "ch02_sink_lm"),
}
# Modules in reading order; what is not listed comes last, under "Further modules".
GROUPS = {
    "Models": ("rope", "layers", "attention", "gates", "variants", "lm"),
    "Measures and cost": ("measure", "cost", "statistics"),
    "Data": ("data",),
    "Training": ("recipe", "train", "optimizer", "checkpoint", "distributed", "device"),
    "Weights from elsewhere": ("interop",),
    "Records and figures": ("records", "experiments", "plots"),
    "Exercises": ("check", "grader", "expectations"),
}


def fill(markdown: str, **given) -> str:
    """Replaces each marker by what the function of that name makes."""
    return MARKER.sub(lambda m: MARKERS[m[1]](**given), markdown)


# ---------------------------------------------------------------------------------------------- chapters
def chapter_table(chapters: Path, **_) -> str:
    """One row a chapter: question, status, and how long its notebook ran."""
    lines = ["| | Chapter | The question | Status |", "|---|---|---|---|"]
    for number, chapter in enumerate(PLAN, start=1):
        path = chapters / f"{chapter.name}.ipynb"
        title, status = chapter.title, "in preparation"
        if path.exists():
            title, status = f"[{chapter.title}](chapters/{path.name})", _ran(path)
        lines.append(f"| {number} | {title} | {chapter.question} | {status} |")
    return "\n".join(lines)


def _ran(path: Path) -> str:
    run = nbformat.read(path, as_version=4).metadata.get("minigated", {}).get("run", {})
    if not run.get("seconds"):
        return "ready"
    return f"ready; ran {run['seconds']:.0f} s on {run.get('device', 'an unnamed device')}"


# ---------------------------------------------------------------------------------------------- records
def _known(results: Path) -> dict[str, dict | None]:
    """Planned and existing records by id; None where there is no file yet."""
    known: dict[str, dict | None] = {name: None for names in RECORDS.values() for name in names}
    return known | {record["id"]: record for record in records.all_records(results)}


def verdicts(results: Path, **_) -> str:
    """Claim, verdict and the record behind it, one row each."""
    lines = ["| Claim | Verdict | Record |", "|---|---|---|"]
    for name, record in _known(results).items():
        if record is None:
            lines.append(f"| | no record yet | [`{name}`](#{name}) |")
            continue
        verdict = record["verdict"] or "measured; no claim of order"
        lines.append(f"| {_cell(record['claim'])} | {verdict} | [`{name}`](#{name}) |")
    return "\n".join(lines)


def record_sections(results: Path, **_) -> str:
    """Every record with its table, caption and command; for a missing one the command that makes it."""
    return "\n\n".join(_section(name, record) for name, record in _known(results).items())


def _section(name: str, record: dict | None) -> str:
    if record is None:
        head = f"### {name} {{ #{name} }}\n\n"
        return f"{head}No record yet; the command that makes it is `python -m minigated run {name}`."
    metric = record["metric"]["name"]
    seeds = max(len(row["values"]) for row in record["rows"])
    parts = [f"### {name} {{ #{name} }}", record["claim"], records.table(record), f"*{records.caption(record)}*"]
    if record["note"]:
        parts.append(record["note"])
    if seeds > 1:
        heads = "| | " + " | ".join(f"value {i + 1}" for i in range(seeds)) + " |"
        rows = [f"| {row['name']} | " + " | ".join(_values(row, seeds)) + " |" for row in record["rows"]]
        table = "\n".join([heads, "|---" * (seeds + 1) + "|", *rows])
        parts.append(f'<details markdown="1"><summary>{metric}, every value</summary>\n\n{table}\n\n</details>')
    parts.append(
        f"Made by `{record['command']}` in {record['seconds']:,.0f} s. [The record itself](results/{name}.json) holds "
        f"the whole configuration, seeds, versions and the hashes of the files that made it."
    )
    return "\n\n".join(parts)


def _values(row: dict, count: int) -> list[str]:
    shown = [records.number(value) for value in row["values"]]
    return shown + ["–"] * (count - len(shown))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


# ---------------------------------------------------------------------------------------------- the package
def modules() -> dict[str, list[str]]:
    """Public modules and packages of `minigated` by group, those that exist."""
    package = ROOT / "minigated"
    there = {p.stem for p in package.glob("[a-z]*.py")} | {
        p.name for p in package.glob("[a-z]*/") if any(p.glob("*.py"))
    }
    groups = {title: [name for name in names if name in there] for title, names in GROUPS.items()}
    groups["Further modules"] = sorted(there - {name for names in groups.values() for name in names})
    return {title: names for title, names in groups.items() if names}


def summary(name: str) -> str:
    """First paragraph of a module's docstring, on one line."""
    path = ROOT / "minigated" / f"{name}.py"
    path = path if path.exists() else ROOT / "minigated" / name / "__init__.py"
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "") if path.exists() else ""
    return " ".join(text.split("\n\n")[0].split())


def api_index(**_) -> str:
    """Modules by group with their summaries."""
    parts = []
    for title, names in modules().items():
        rows = [f"| [`minigated.{name}`]({name}.md) | {_cell(summary(name))} |" for name in names]
        parts.append("\n".join([f"## {title}", "", "| Module | What it holds |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def api_pages() -> dict[str, str]:
    """Reference pages by address under api/: one a module; a package has a page and one for each of its modules."""
    pages = {}
    for name in (name for names in modules().values() for name in names):
        folder = ROOT / "minigated" / name
        if not folder.is_dir():
            pages[f"{name}.md"] = f"# minigated.{name}\n\n::: minigated.{name}\n"
            continue
        inner = sorted(path.stem for path in folder.glob("[a-z]*.py"))
        rows = [f"| [`minigated.{name}.{m}`]({name}/{m}.md) | {_cell(summary(f'{name}/{m}'))} |" for m in inner]
        own = f"::: minigated.{name}" if (folder / "__init__.py").exists() else ""
        table = "\n".join(["| Module | What it holds |", "|---|---|", *rows])
        pages[f"{name}.md"] = f"# minigated.{name}\n\n{own}\n\n## Modules\n\n{table}\n"
        pages |= {f"{name}/{m}.md": f"# minigated.{name}.{m}\n\n::: minigated.{name}.{m}\n" for m in inner}
    return pages


def drawing(**_) -> str:
    """The picture of the home page, inside the page so that it takes the page's own colour."""
    text = (ROOT / "docs" / "assets" / "gate-positions.svg").read_text(encoding="utf-8")
    return f'<figure class="drawing">{text[text.index("<svg") :].replace("#7a7f87", "currentColor")}</figure>'


MARKERS = {
    "chapters": chapter_table,
    "verdicts": verdicts,
    "records": record_sections,
    "modules": api_index,
    "drawing": drawing,
}
