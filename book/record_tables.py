"""A record's tables in Markdown: rows in plain words, the paper's number beside ours, a line on what columns mean."""

import statistics
from collections.abc import Callable

from record_words import EXTRAS, FORMS, METRICS, NAMES, SETTINGS, Column, short

PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"


# ---------------------------------------------------------------------------------------------- what is shown
def timed(record: dict) -> bool:
    """Whether the values are times of repetitions, whose median says more than their mean."""
    return record["metric"]["split"] == "repetitions"


def measure(record: dict) -> Column:
    """The column of the record's own metric."""
    name = record["metric"]["name"]
    return METRICS.get(name, Column(name, paper="paper", form=lambda value: short(value, 4)))


def extras(record: dict, rows: list[dict]) -> dict[str, Column]:
    """Further columns, by key of `extra`, that some row has a number for."""
    columns = EXTRAS.get(record["id"].removesuffix("_cpu"), {})
    return {key: column for key, column in columns.items() if any(row["extra"].get(key) for row in rows)}


def legend(record: dict) -> str:
    """What the columns mean, one line; "" where none needs words."""
    columns = [measure(record), *([] if by_length(record) else extras(record, record["rows"]).values())]
    said = [f"**{column.head}**: {column.words}" for column in columns if column.words]
    return "; ".join(said) + "." if said else ""


def row_name(row: dict) -> str:
    """A row in plain words, below them the name that the file has for it if it is another."""
    extra, name = row["extra"], row["name"]
    if "contender" in extra:
        return extra["contender"]
    if extra.get("form") in FORMS:
        return f"{FORMS[extra['form']]}, {extra['tokens']:,} tokens"
    known = name if name in NAMES else name.split(", ")[0]
    if known not in NAMES:
        return name
    rest = f"; {extra['times']} × the rate" if "times" in extra else name.removeprefix(known).replace(", ", "; ", 1)
    return f"{NAMES[known]}{rest}<br>`{name}`"


# ---------------------------------------------------------------------------------------------- tables
def tables(record: dict) -> list[str]:
    """The record's table, or several with a title each where its rows do different work."""
    if by_length(record):
        return [length_table(record)]
    groups: dict[str, list[dict]] = {}
    for row in record["rows"]:
        extra = row["extra"]
        backward = {True: "Forward and backward", False: "Forward"}.get(extra.get("backward"), "")
        groups.setdefault(extra.get("case", backward), []).append(row)
    missing = record["config"].get("not_timed", ())
    parts = []
    for title, rows in groups.items():
        left = [f"{one['row']} ({one['state']}: {one['reason']})" for one in missing if one["case"] == title]
        parts += [f"**{title[:1].upper()}{title[1:]}**"] if title else []
        parts += [table(record, rows), *([f"Not timed: {'; '.join(left)}."] if left else [])]
    gone = {one["case"]: one["reason"] for one in missing if one["case"] not in groups}
    return parts + [f"Nothing was timed of {case}: {reason}." for case, reason in gone.items()]


def table(record: dict, rows: list[dict]) -> str:
    """Name, the record's own number and its spread, the paper's beside it, then the further columns."""
    own, further = measure(record), extras(record, rows)
    papers = {key for key in further if further[key].paper and any(row["extra"].get(f"paper_{key}") for row in rows)}
    with_paper = any(row["paper"] is not None for row in rows)
    heads = ["", own.head, *(["quartiles"] if timed(record) else []), *([own.paper or "paper"] if with_paper else [])]
    for key, column in further.items():
        heads += [column.head.format(unit=rows[0]["extra"].get("unit"))] + ([column.paper] if key in papers else [])
    best = max((row["extra"].get("against_first") or 0 for row in rows), default=0)
    made = [heads]
    for row in rows:
        cells = [row_name(row), *numbers(record, row)]
        cells += [shown(row["paper"], own.paper_form)] if with_paper else []
        for key, column in further.items():
            cells.append(shown(row["extra"].get(key), column.form))
            cells += [shown(row["extra"].get(f"paper_{key}"), column.paper_form)] if key in papers else []
        fastest = best and row["extra"].get("against_first") == best
        made.append([f"**{cells[0]}**", *cells[1:]] if fastest else cells)
    return markdown(made)


def numbers(record: dict, row: dict) -> list[str]:
    """Mean ± deviation; of repetitions the median and the quartiles."""
    form = measure(record).form
    if not timed(record):
        return [form(row["mean"]) + (PLUS_MINUS + form(row["std"]) if row["std"] is not None else "")]
    values = row["values"]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [form(statistics.median(values)), f"{form(lower)}–{form(upper)}"]


def by_length(record: dict) -> bool:
    """Whether rows differ in arm, setting and length: then lengths are columns."""
    return all("setting" in row["extra"] and "arm" in row["extra"] for row in record["rows"])


def length_table(record: dict) -> str:
    """A row for each setting and arm, a column for each length, the paper's number below ours where it has one."""
    lengths = list(dict.fromkeys(row["name"].split(", ")[-1] for row in record["rows"]))
    own, found = measure(record), {}
    for setting in SETTINGS:
        for row in (row for row in record["rows"] if row["extra"]["setting"] == setting):
            paper = "" if row["paper"] is None else f"<br>paper: {own.paper_form(row['paper'])}"
            cells = found.setdefault((setting, row["extra"]["arm"]), {})
            cells[row["name"].split(", ")[-1]] = numbers(record, row)[0] + paper
    names = {"none": "no gate", "g1_elementwise": "gate"}
    made = [["", "", *lengths]]
    for (setting, arm), cells in found.items():
        title = f"{SETTINGS[setting]}<br>`{setting}`"
        made.append([title, f"{names.get(arm, arm)}<br>`{arm}`", *(cells.get(length, "–") for length in lengths)])
    return markdown(made)


def shown(value, form: Callable[[float], str]) -> str:
    """A number in some form; a dash for none."""
    return form(value) if isinstance(value, int | float) else "–"


def markdown(rows: list[list[str]]) -> str:
    """Cells as a table, the first row its heads; bars in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
