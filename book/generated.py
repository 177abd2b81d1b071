"""Parts of pages that are made from what is there: chapters, records, modules. Markers in docs/ name them.

A marker is an HTML comment on its own line, `<!-- generated: chapters -->`; `MARKERS` lists the names.
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "book"))
import figures  # noqa: E402
import memory_pages  # noqa: E402
import record_pages  # noqa: E402
from record_pages import cell  # noqa: E402

INKS = {"light": figures.INK_LIGHT, "dark": figures.INK_DARK}
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Chapter:
    """A chapter of the plan: notebook name, title, and the question it answers."""

    name: str
    title: str
    question: str


PLAN = (
    Chapter("01_naive_attention", "Naive attention", "What does attention compute, and what does it cost?"),
    Chapter("02_gated_attention", "Gated attention", "Where does a gate belong, and what becomes of the sink?"),
    Chapter("03_manhattan_decay", "Manhattan decay", "How can distance on a grid enter attention without a table?"),
    Chapter("04_shifted_windows", "Shifted windows", "How do windows exchange what they see?"),
    Chapter("05_retention_vit", "Gated-SwinRMT-Retention", "What does the gate add to a vision backbone?"),
    Chapter("06_swat_vit", "Gated-SwinRMT-SWAT", "What if the softmax itself is replaced by a sigmoid?"),
    Chapter("07_moe_llm", "Mixture of experts", "Does the gate help where the paper measured it?"),
    Chapter("08_long_context", "Long context", "Does a model without a sink stretch further?"),
    Chapter("09_fast_path", "The fast path", "How fast can all this run?"),
)
# Modules in reading order; what is not listed comes last, under "Further modules".
GROUPS = {
    "Language models": (
        *("errors", "rope", "layers", "attention", "gates", "variants", "moe", "dispatch", "balance"),
        *("lm_config", "lm", "long_context", "generate", "static_cache"),
    ),
    "Vision models": (
        *("tables", "decay", "decay_passes", "windows", "swin", "retention", "swat", "swat_options", "swat_tables"),
        *("vit_parts", "vit_mixers", "vit", "vit_sizes", "model_table"),
    ),
    "Measures and cost": ("measure", "cost", "statistics", "bench"),
    "Speed and memory": (
        *("kernels", "stacked", "cuda_graph", "captured", "compiled_parts", "fused_step", "recompute"),
        *("chunked_loss", "memory", "vit_memory", "step_memory", "gpu_stand_ins"),
    ),
    "Data": ("data",),
    "Training": (
        *("recipe", "train", "optimizer", "checkpoint", "resume", "distributed", "sharded", "sharded_files", "device"),
    ),
    "Weights from elsewhere": ("interop",),
    "Records and figures": (
        *("records", "experiments", "plots", "plots_attention", "plots_gates", "plots_decay", "plots_windows"),
        *("plots_vit", "plots_swat", "plots_moe", "plots_length", "plots_bench"),
    ),
    "Exercises": ("check", "grader", "expectations"),
}


def fill(markdown: str, **given) -> str:
    """Replaces each marker by what the function of that name makes."""
    return MARKER.sub(lambda m: MARKERS[m[1]](**given), markdown)


# ---------------------------------------------------------------------------------------------- chapters
def chapter_table(chapters: Path, **_) -> str:
    """One row a chapter: question, and how long its notebook ran on what."""
    lines = ["| Chapter | The question | Its page ran for |", "|---|---|---|"]
    for number, chapter in enumerate(PLAN, start=1):
        path = chapters / f"{chapter.name}.ipynb"
        title, status = chapter.title, "in preparation"
        if path.exists():
            title, status = f"[{chapter.title}](chapters/{path.name})", _ran(path)
        lines.append(f"| {number} · {title} | {chapter.question} | {status} |")
    return "\n".join(lines)


def _ran(path: Path) -> str:
    run = nbformat.read(path, as_version=4).metadata.get("minigated", {}).get("run", {})
    if not run.get("seconds"):
        return "not yet"
    return f"{run['seconds']:.0f} s on {run.get('device', 'an unnamed device').split(' (')[0]}"


def results(**_) -> str:
    """The results that README opens with, and its picture."""
    sys.path.append(str(ROOT / "book"))  # MkDocs takes it off again after loading the hooks
    import readme  # which imports this module

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    alt = re.search(r"!\[(.+?)\]\(docs/assets/sink\.svg\)", text, re.DOTALL)[1].replace("\n", " ")
    pictures = (f"![{alt}](assets/sink-{colours}.svg#only-{colours}){{ .wide }}" for colours in INKS)
    return "\n".join([readme.results(), "", *pictures])


def picture_files() -> dict[str, str]:
    """That picture for light and for dark pages, by address."""
    text = (ROOT / "docs" / "assets" / "sink.svg").read_text(encoding="utf-8")
    return {f"assets/sink-{colours}.svg": text.replace(figures.INK, ink) for colours, ink in INKS.items()}


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
        rows = [f"| [`minigated.{name}`]({name}.md) | {cell(summary(name))} |" for name in names]
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
        rows = [f"| [`minigated.{name}.{m}`]({name}/{m}.md) | {cell(summary(f'{name}/{m}'))} |" for m in inner]
        own = ""
        if (folder / "__init__.py").exists():  # what it hands on is described on the page of its module
            own = f"::: minigated.{name}\n    options:\n      members: false"
        table = "\n".join(["| Module | What it holds |", "|---|---|", *rows])
        pages[f"{name}.md"] = f"# minigated.{name}\n\n{own}\n\n## Modules\n\n{table}\n"
        pages |= {f"{name}/{m}.md": f"# minigated.{name}.{m}\n\n::: minigated.{name}.{m}\n" for m in inner}
    return pages


def drawing(**_) -> str:
    """The gate's five places, drawn inside the page so that lines and letters take the page's own colour."""
    text = (ROOT / "docs" / "assets" / "gate-positions.svg").read_text(encoding="utf-8")
    return f'<figure class="drawing">{text[text.index("<svg") :].replace(figures.INK, "currentColor")}</figure>'


MARKERS = {
    "chapters": chapter_table,
    "results": results,
    "verdicts": record_pages.verdicts,
    "records": record_pages.sections,
    "speeds": record_pages.speeds,
    "memory": memory_pages.peaks,
    "modules": api_index,
    "drawing": drawing,
}
