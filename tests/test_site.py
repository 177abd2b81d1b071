"""The built site: strict, light, complete, and on its own."""

import itertools
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import sample_notebook
import site_build
from bs4 import BeautifulSoup
from site_build import ROOT

import drawing  # isort: skip  (from book/, whose folder site_build adds)
import generated  # isort: skip
import hooks  # isort: skip
import notebook_page  # isort: skip
import record_figures  # isort: skip
import record_pages  # isort: skip
import record_tables  # isort: skip
import record_words  # isort: skip
from docstring_lines import one_argument_a_line  # isort: skip
from minigated import records
from minigated.experiments import EXPERIMENTS

LIMIT = 150 * 1024
SMALL = """
site_name: small
nav: [Home: index.md, Chapters: []]
plugins: [mkdocs-jupyter: {{include: ["*.ipynb"], cache: false}}]
hooks: [{hooks}]
validation: {{links: {{not_found: warn, anchors: warn}}}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    return site_build.build(tmp_path_factory)


@pytest.fixture(scope="module")
def site(built) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def pages(site) -> dict[str, BeautifulSoup]:
    """Every page by address, parsed."""
    found = sorted(site.rglob("*.html"))
    return {p.relative_to(site).as_posix(): BeautifulSoup(p.read_text("utf-8"), "html.parser") for p in found}


@pytest.fixture(scope="module")
def sample(pages) -> BeautifulSoup:
    return pages["chapters/99_sample.html"]


def text(node) -> str:
    return " ".join(node.get_text().split())


# ---------------------------------------------------------------------------------------------- the build
def test_build_says_nothing_alarming(built):
    assert not re.findall(r"^(?:WARNING|ERROR).*", built[1], re.MULTILINE)


def test_dead_links_in_a_notebook_stop_the_build(tmp_path):
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A\n[gone](nowhere.md) and [no such place](#nowhere)")]
    )
    nbformat.write(notebook, chapters / "98_links.ipynb")
    small = tmp_path / "mkdocs.yml"
    small.write_text(SMALL.format(hooks=ROOT / "book" / "hooks.py"), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n", encoding="utf-8")
    done = site_build.mkdocs(chapters, tmp_path / "site", "--config-file", str(small))
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr and "'#nowhere'" in done.stderr


def test_a_cell_that_failed_is_refused(tmp_path):
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="bad value", traceback=[])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("f()", outputs=[error])])
    nbformat.write(notebook, tmp_path / "01_x.ipynb")
    area = '<div class="jp-OutputArea-child"><div class="jp-OutputArea-output">x</div></div>'
    area = f'<div class="jp-CodeCell">{area}</div>'
    with pytest.raises(notebook_page.PageError, match="01_x.ipynb.*ValueError: bad value"):
        notebook_page.build(tmp_path / "01_x.ipynb", area)
    with pytest.raises(notebook_page.PageError, match="1 code cells, but 2 were converted"):
        notebook_page.build(tmp_path / "01_x.ipynb", area * 2)


def test_a_lost_output_is_noticed():
    page = notebook_page.NotebookPage(outputs=["<p>one</p>", "<p>two</p>"])
    slots = [notebook_page.SLOT.format(number) for number in (0, 1)]
    assert page.fill("".join(slots)) == "<p>one</p><p>two</p>"
    with pytest.raises(notebook_page.PageError, match="expected 2"):
        page.fill(slots[0])


# ---------------------------------------------------------------------------------------------- every page
def test_pages_are_light(site):
    heavy = {p.name: p.stat().st_size for p in site.rglob("*.html") if p.stat().st_size > LIMIT}
    assert not heavy


def test_pages_hold_no_pictures_as_data(pages):
    assert not [(a, t["src"][:40]) for a, s in pages.items() for t in s.select("img[src^='data:']")]


def test_nothing_is_fetched_from_elsewhere(site, pages):
    fetched = [
        (address, tag.get("src") or tag.get("href"))
        for address, soup in pages.items()
        for tag in soup.select("link[href], script[src], img[src], iframe[src], source[src], object[data]")
    ]
    assert fetched
    assert not [f for f in fetched if urlsplit(f[1]).scheme in ("http", "https") or f[1].startswith("//")]
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s)[\"']?(?:https?:)?//[^)]*", sheet.read_text("utf-8")), sheet


def test_links_and_anchors_lead_somewhere(site, pages):
    ids = {
        a: {t.get("id") for t in s.select("[id]")} | {t["name"] for t in s.select("a[name]")} for a, s in pages.items()
    }
    dead = []
    for address, soup in pages.items():
        for link in soup.select("a[href], link[href], script[src], img[src]"):
            parts = urlsplit(link.get("href") or link.get("src"))
            if parts.scheme or not (parts.path or parts.fragment) or address == "404.html":
                continue
            target = (site / address).parent / unquote(parts.path) if parts.path else site / address
            target = target / "index.html" if target.is_dir() else target
            name = target.resolve().relative_to(site.resolve()).as_posix()
            anchor = unquote(parts.fragment)
            own = {"__codelineno", "only-", "__"}  # made by the theme or read by its style sheet
            if not target.exists():
                dead.append((address, link.get("href") or link.get("src")))
            elif anchor and name in ids and anchor not in ids[name] and not anchor.startswith(tuple(own)):
                dead.append((address, f"{name}#{anchor}"))
    assert not dead


def test_each_page_is_a_document(pages):
    for address, soup in pages.items():
        if address == "404.html":
            continue
        assert len(soup.select("article h1")) == 1, address
        assert soup.html["lang"] == "en"
        skip = soup.select_one("a.md-skip")["href"]
        assert soup.find(id=unquote(skip.removeprefix("#"))), f"{address}: skip to content leads to {skip}"
        ids = [tag["id"] for tag in soup.select("article [id]")]
        assert len(ids) == len(set(ids)), (address, [i for i in ids if ids.count(i) > 1])


def test_pictures_have_words(pages):
    silent = [(a, i["src"]) for a, s in pages.items() for i in s.select("article img") if not i.get("alt", "").strip()]
    assert not [s for s in silent if not s[1].startswith("figures/99_sample")]  # the sample shows a bare plt.show()


def test_no_dollar_is_left_in_the_text(pages):
    for address, soup in pages.items():
        article = BeautifulSoup(str(soup.article), "html.parser")
        for part in article.select("pre, code, .arithmatex, .doc-signature"):
            part.decompose()
        assert not re.findall(r"\$[^$\n]{1,80}\$", article.get_text()), address


# ---------------------------------------------------------------------------------------------- notebooks
def test_sample_page_lost_nothing(sample):
    shown = text(sample.article)
    for marker in sample_notebook.MARKERS:
        assert shown.count(marker) == 1, marker
    assert text(sample.select_one("caption")) == "marker-html-table"
    output = [pre for pre in sample.select(".nb-output pre") if "after two" in pre.get_text()]
    assert "\n\n\nafter two blank lines <b>&</b>" in output[0].get_text()


@pytest.mark.parametrize("path", sorted((ROOT / "chapters").glob("*.ipynb")), ids=lambda p: p.stem)
def test_chapter_page_lost_nothing(path, pages):
    notebook = nbformat.read(path, as_version=4)
    page = pages[f"chapters/{path.stem}.html"]
    code = [text(pre) for pre in page.select("article .highlight pre")]
    outputs = text(page.article)
    for cell in notebook.cells:
        if cell.cell_type != "code" or {"remove-cell", "remove-input"} & set(cell.metadata.get("tags", [])):
            continue
        assert not cell.source.strip() or " ".join(cell.source.split()) in code
        for output in cell.outputs:
            if output.output_type == "stream":
                assert " ".join(output.text.split()) in outputs
    captions = [text(c) for c in page.select("figure figcaption")]
    assert len(captions) == sum(str(c.get("outputs")).count("<figcaption>") for c in notebook.cells)


def test_markdown_of_notebooks_is_rendered(sample):
    article = sample.article
    assert text(article.select_one(".admonition.note .admonition-title")) == "Note"
    assert text(article.select_one(".admonition.note strong")) == "bold"
    assert text(article.select_one(".admonition.warning code")) == "code"
    assert text(article.select_one("details summary")) == "A folded hint"
    assert text(article.select_one("details em")) == "until"
    assert [text(i) for i in article.select("ul > li > ul > li")] == ["a nested item indented by two"]
    assert len(article.select("div.arithmatex")) == 1 and len(article.select("span.arithmatex")) == 5 + 1
    assert len(article.select("table")) == 2
    assert "!!!" not in text(article) and "[!" not in text(article)
    assert article.select_one("a[href='../notation.html']") and article.select_one("a[href='../api/attention.html']")
    assert "the run kept in the repository: a GPU, gpu scale, torch 2.11.0, 3.3 minutes" in text(
        article.select_one(".nb-run")
    )


def test_figures_become_files_for_light_and_dark(site, sample):
    images = sample.select("article img")
    assert [i["src"] for i in images] == [
        "figures/99_sample-03-01-light.svg#only-light",
        "figures/99_sample-03-01-dark.svg#only-dark",
        "figures/99_sample-04-01.png",
        "figures/99_sample-05-01.png",
    ]
    light, dark = ((site / "chapters" / i["src"].split("#")[0]).read_text("utf-8") for i in images[:2])
    assert light != dark and "#7a7f87" not in light + dark and "#0072b2" in light.lower() and "#0072b2" in dark.lower()
    assert all(int(i["width"]) > 200 and i["loading"] == "lazy" for i in images)
    assert ["nb-opaque" in i.get("class", []) for i in images] == [False, False, False, True]


def test_search_finds_each_code_cell_once(site):
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    everything = "\n".join(entry["title"] + entry["text"] for entry in index["docs"])
    for word in ("unique_code_word_one", "unique_code_word_two", "marker-text-cell", "marker-caption"):
        assert everything.count(word) == 1, word
    assert "marker-stream" not in everything  # what cells print is no text to search
    assert (site / "search" / "search_index.js").exists()  # search from disk reads this one


def test_notebook_can_be_downloaded(site, sample):
    link = sample.select_one(".nb-run a[download]")["href"]
    assert nbformat.read(site / "chapters" / link, as_version=4).cells


# ---------------------------------------------------------------------------------------------- generated parts
def test_home_announces_every_chapter(pages):
    rows = [text(row) for row in pages["index.html"].select("article table tbody tr")]
    assert len(rows) == 9
    ready = [chapter for chapter, row in zip(generated.PLAN, rows) if "in preparation" not in row]
    assert [c.name for c in ready] == [
        c.name for c in generated.PLAN if (ROOT / "chapters" / f"{c.name}.ipynb").exists()
    ]


def test_every_module_has_its_page(site):
    missing = [
        path
        for path in (ROOT / "minigated").rglob("*.py")
        if not path.name.startswith("_")
        and not (site / "api" / path.relative_to(ROOT / "minigated").with_suffix(".html")).exists()
    ]
    assert not missing


def test_arguments_that_share_a_line_are_listed_one_by_one(pages):
    given = "Sums.\n\nArgs:\n    q: [T]. k: [S]; sorted. note: stays.\n    a, b: sizes.\n        More.\n\nAlso q: no."
    made = one_argument_a_line(given, {"q", "k", "a", "b"})
    assert made.splitlines()[3:6] == ["    q: [T].", "    k: [S]; sorted. note: stays.", "    a: sizes."]
    assert made.splitlines()[6:] == ["    b: sizes.", "        More.", "", "Also q: no."]
    listed = [text(item) for item in pages["api/attention.html"].select("li.doc-section-item")]
    for name in ("batch", "capacity", "shape", "device", "dtype"):  # KVCache, whose docstring has two lines of them
        assert any(item.startswith(name) and "capacity:" not in item for item in listed), name


def test_picture_shows_the_numbers_of_the_table():
    assert drawing.TARGET.read_text("utf-8") == drawing.draw(), "run: python book/drawing.py"
    assert "0.265" in drawing.draw() and "0.048" in drawing.alt()


def a_record(**changes) -> dict:
    rows = [records.row("none", [1.5, 1.7], 6.026), records.row("g1_elementwise", [1.25, 1.5], 5.761)]
    fields = {
        "id": "ch02_sink_lm", "chapter": 2, "claim": "a gate | helps", "command": "python -m minigated run x",
        "config": {}, "seeds": [0, 1], "metric": {"name": "nats a byte", "split": "test", "better": "lower"},
        "rows": rows, "verdict": "direction only", "data": {"name": "books", "sha256": "0" * 64}, "seconds": 12.0,
        "note": "A short run.",
    }  # fmt: skip
    return records.make(files=["minigated/gates.py"], **{**fields, **changes})


def test_records_become_tables(tmp_path):
    record = a_record()
    records.write(record, tmp_path)
    made = record_pages.sections(tmp_path)
    assert "| no gate<br>`none` | 1.6000\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.1414 | 6.026 |" in made
    assert "score per channel<br>`g1_elementwise` | 1.3750" in made and records.caption(record)[1:] in made
    assert "|  | nats a byte | paper: perplexity |" in made and "**nats a byte**: mean negative log" in made
    assert "| g1_elementwise | 1.2500 | 1.5000 |" in made and "A short run." in made
    assert "`python -m minigated run ch02_gate_table`" in made  # has no record here
    verdicts = record_pages.verdicts(tmp_path)
    assert r"| **a gate \| helps** |  | [direction only](#ch02_sink_lm) |" in verdicts


def test_results_page_lists_the_planned_records(pages):
    shown = {tag["id"] for tag in pages["results.html"].select("h3[id]")}
    there = {path.stem for path in (ROOT / "docs" / "results").glob("*.json")}
    assert shown == set(record_pages.PLANNED) | there
    rows = [text(row) for row in pages["results.html"].select("article table")[0].select("tbody tr")]
    judged = [c for r in records.all_records() for c in r["config"].get("claims", ())]
    assert len(rows) == len({name for name in shown if not name.endswith("_cpu")}) + len(judged)
    benches = {tag["id"] for tag in pages["speed.html"].select("h3[id]")}
    assert benches == {name for name in there if record_pages.is_bench(name)}
    said = text(pages["speed.html"].select_one("article")).partition("Not recorded on a GPU yet:")[2]
    missing = [name for name in shown - there if record_pages.is_bench(name)]
    assert all(name.removeprefix("ch09_bench_") in said.split(". ")[0] for name in missing)


def test_speeds_of_a_gpu_are_drawn(site, pages):
    for record in filter(lambda r: record_pages.is_bench(r["id"]), records.all_records()):
        following = pages["results.html"].find(id=record["id"]).find_next_siblings()
        drawn = [f for f in itertools.takewhile(lambda t: t.name not in ("h2", "h3"), following) if f.name == "figure"]
        if record["id"].endswith("_cpu"):
            assert not drawn
            continue
        roofline = record["id"] != record_figures.ROOFLESS and any(row["extra"]["intensity"] for row in record["rows"])
        captions = [text(figure.figcaption) for figure in drawn]
        assert len(drawn) == 1 + roofline and all(records.made(record) in caption for caption in captions), record["id"]
        assert captions[0].startswith(record_figures.TELLING[record["id"].removeprefix("ch09_bench_")] + ": ")
        assert all("under the measured roof" in caption for caption in captions[1:])
        for figure, start in zip(drawn, ("Bars, milliseconds: ", "A roof that rises ")):
            images = figure.select("img")
            assert all(i["alt"].startswith(start) and i["src"].startswith("figures/results-") for i in images)
            assert [i["src"].split("-", 3)[3] for i in images] == ["light.svg#only-light", "dark.svg#only-dark"]
            light, dark = ((site / i["src"].split("#")[0]).read_text("utf-8") for i in images)
            assert light != dark and all(int(i["width"]) < 560 for i in images)  # a phone shows 0.7 of it


def test_a_record_of_another_machine_shows_its_first_case():
    record = records.load("ch09_bench_generate")
    record["rows"] = [row for row in record["rows"] if row["extra"]["case"] != "decoding, 350 M"]
    bars, roofline = record_figures.drawn(record)
    assert "<figcaption>decoding, 1.7 B: " in bars and "dashed what the measured limits allow" in bars
    for row in record["rows"]:
        row["extra"] |= {"bytes": None, "intensity": None}
    (bars,) = record_figures.drawn(record)
    assert "dashed" not in bars and "limit would" not in bars


def test_every_experiment_is_planned():
    assert set(record_pages.PLANNED) == set(EXPERIMENTS)
    assert set(record_words.EXTRAS) | {"ch08_length"} == set(EXPERIMENTS)  # its columns are lengths


def test_no_two_columns_have_one_heading():
    for record in records.all_records():
        for table in record_tables.tables(record):
            heads = table.splitlines()[0].split(" | ")[1:]
            assert len(heads) == len(set(heads)), (record["id"], heads)


def test_speeds_are_grouped_by_case(tmp_path):
    def row(case, contender, times, **extra):
        extra |= {"case": case, "contender": contender, "unit": "maps", "against_first": 4 / sum(times)}
        extra |= {"median_ms": times[0], "quartiles_ms": times[:1] * 2, "flops": None, "bytes": None, "intensity": None}
        return records.row(f"{case}: {contender}", times, **extra)

    rows = [row("window 4", "loop", [4.0, 4.0, 6.0], byte_share=0.416), row("window 4", "fused", [1.0, 1.5, 2.0])]
    gone = {"case": "window 4", "row": "kernel", "state": "absent", "reason": "no GPU"}
    limits = {"bfloat16": 1e12, "float32": 1e12, "copy": 1e11}
    metric = {"name": "milliseconds a call", "split": "repetitions", "better": "lower"}
    config = {"not_timed": [gone, gone | {"case": "window 8"}], "ceilings": limits}
    rows += [row("window 7", "loop", [1e3])]
    record = a_record(id="ch09_bench_retention", rows=rows, metric=metric, config=config)
    records.write(record, tmp_path)
    made = record_pages.speeds(tmp_path)
    assert made.count("**Window 4**") == 1 and made.count("| median, ms | quartiles |") == 2
    assert "| loop | 4.00 | 4.00–5.00 | 0.29 | 42% |" in made and "| **fused** | 1.50 | 1.25–1.75 | 0.89 | – |" in made
    assert "Not timed: kernel (absent: no GPU)." in made and "Nothing was timed of window 8: no GPU." in made
    assert "copy 100 GB/s." in made and "every value</summary>" not in made
    assert "(speed.md#ch09_bench_retention)" in record_pages.sections(tmp_path)


def test_lengths_become_columns():
    rows = [
        records.row(f"{arm}, yarn, {n} T", [10.0 * n], 61.23 if n == 2 else None, arm=arm, setting="yarn")
        for arm in ("none", "g1_elementwise")
        for n in (1, 2)
    ]
    metric = {"name": "passkey digits right, %", "split": "test", "better": "higher"}
    (table,) = record_tables.tables(a_record(id="ch08_length", rows=rows, metric=metric))
    assert table.splitlines()[0] == "|  |  | 1 T | 2 T |"
    assert table.splitlines()[2] == "| YaRN<br>`yarn` | no gate<br>`none` | 10.0 | 20.0<br>paper: 61.2 |"


def test_a_claim_on_accuracy_counts_points():
    claim = {"claim": "x", "difference": 0.5, "standard_error": 0.123, "verdict": "reproduced"}
    assert record_pages.difference(claim) == "+0.50\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.12 points"
    for none in (0.0, 1e-16):
        assert record_pages.difference(claim | {"standard_error": none}) == "+0.5 points"


def test_bars_in_names_of_rows_are_escaped(tmp_path):
    rows = [records.row("distance: |i - j| in the slopes", [18.0, 19.0], parameters=730_000)]
    metric = {"name": "top-1 accuracy in %", "split": "test", "better": "higher"}
    records.write(a_record(id="ch06_swat_readings", rows=rows, metric=metric), tmp_path)
    made = record_pages.sections(tmp_path)
    assert (
        r"| distance: \|i - j\| in the slopes | 18.50" in made and r"\|i - j\| in the slopes | 18.00 | 19.00 |" in made
    )


def test_single_claims_of_a_record_are_listed(tmp_path):
    claim = {"claim": "G1 wins", "measure": "loss", "verdict": "reproduced"}
    claim |= {"difference": -0.01, "standard_error": 0.004}
    records.write(a_record(config={"claims": [claim]}), tmp_path)
    made = record_pages.verdicts(tmp_path)
    spread = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"
    assert f"| G1 wins | -0.0100{spread}0.0040 nats a byte | [reproduced](#ch02_sink_lm) |" in made


def test_white_space_is_squeezed_but_not_where_it_counts():
    html = "<nav>\n   <a>x</a>\n\n</nav> <b>y  z</b>\n <pre>\n  a\n</pre>\n\n<script>\n  s\n</script>"
    kept = "<pre>\n  a\n</pre>\n<script>\n  s\n</script>"
    assert hooks.squeezed(html) == "<nav>\n<a>x</a>\n</nav> <b>y  z</b>\n" + kept
