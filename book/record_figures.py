"""Bars and roofline of a bench record for its place on the page of claims, as HTML that holds its pictures.

On the site they become files (`figures.beside`), like those of the chapters.
"""

from minigated import records
from minigated.plots import as_html
from minigated.plots_bench import cases_of, limit_ms, record_bars, record_roofline

# Of each suite the case whose bars are drawn; a record without it (another machine's) shows its first.
TELLING = {
    "attention": "layer, training",
    "retention": "retention window 8 training",
    "vit": "224 px, small, training",
    "moe": "model, 16 experts, training",
    "lm": "training, 110 M",
    "generate": "decoding, 350 M",
}
ROOFLESS = "ch09_bench_moe"  # its fastest counted rows are the dense layers, not what it is about


def drawn(record: dict) -> list[str]:
    """The bars of one telling case, and the roofline where bytes are counted."""
    source = records.made(record) + records.changed_since(record)
    cases, case = cases_of(record), TELLING.get(record["id"].removeprefix("ch09_bench_"))
    case = case if case in cases else next(iter(cases))
    limited = limit_ms(cases[case][0]["extra"], record["config"]["ceilings"])
    dashed = ", dashed what the measured limits allow" if limited else ""
    said = f"{case}: the median of a call, the quartiles as a thin line{dashed}. {source}"
    parts = [as_html(*record_bars(record, case), said)]
    if record["id"] != ROOFLESS and any(row["extra"]["intensity"] for row in record["rows"]):
        said = f"Of each case the fastest row whose bytes are counted, under the measured roof. {source}"
        parts.append(as_html(*record_roofline(record), said))
    return parts
