"""Records as the page of claims and verdicts."""

import math
from pathlib import Path

from record_figures import drawn
from record_tables import PLUS_MINUS, legend, markdown, measure, tables, timed
from record_words import MEASURES, PLANNED

from minigated import records
from minigated.bench.outcomes import outcome
from minigated.bench.report import ceilings_line
from minigated.bench.targets import tally

WIDEST = 6  # more values a row than this are left to the file


def known(results: Path) -> dict[str, dict | None]:
    """Planned and existing records by id; None where there is no file yet."""
    there = {record["id"]: record for record in records.all_records(results)}
    return {name: there.pop(name, None) for name in PLANNED} | there


# ---------------------------------------------------------------------------------------------- verdicts
def verdicts(results: Path, **_) -> str:
    """Claim, what was measured and verdict, one row each, linked to the record; a record may judge several claims."""
    lines = ["| Claim | Measured | Verdict |", "|---|---|---|"]
    for name, record in known(results).items():
        if name.endswith("_cpu"):  # the claims are a GPU's
            continue
        if record is None:
            lines.append(f"| {cell(PLANNED[name][1])} | | [no record yet](#{name}) |")
            continue
        verdict = record["verdict"] or (is_bench(name) and tally(record)) or "measured, nothing to judge"
        lines.append(f"| **{cell(record['claim'])}** | {outcome(record)} | [{verdict}](#{name}) |")
        for claim in record["config"].get("claims", ()):
            lines.append(f"| {cell(claim['claim'])} | {difference(claim)} | [{claim['verdict']}](#{name}) |")
    return "\n".join(lines)


def difference(claim: dict) -> str:
    """Mean difference ± standard error, to the error's second digit, with its unit."""
    mean, error, measure = claim["difference"], claim["standard_error"], claim.get("measure", "accuracy")
    if error and error > 1e-9:  # less is rounding
        places = min(5, max(0, 1 - math.floor(math.log10(error))))
        text = f"{mean:+.{places}f}{PLUS_MINUS}{error:.{places}f}"
    else:
        text = f"{mean:+.2g}" + (" (single pair)" if error is None else "")
    return f"{text} {MEASURES.get(measure, measure)}"


# ---------------------------------------------------------------------------------------------- records
def sections(results: Path, **_) -> str:
    """Every record with its table, caption and command; of a record of speeds the way to them."""
    return "\n\n".join((pointer if is_bench(one[0]) else section)(*one) for one in known(results).items())


def speeds(results: Path, **_) -> str:
    """The records of speeds in full: with 190 rows they have a page of their own."""
    found = {name: record for name, record in known(results).items() if is_bench(name)}
    there = {name: record for name, record in found.items() if record}
    if not there:
        return "There are none yet; `python -m minigated bench` makes them."
    missing = [f"`{name.removeprefix('ch09_bench_')}`" for name in found if name not in there]
    parts = [legend(max(there.values(), key=lambda record: len(legend(record))))]
    parts += [f"Not recorded on a GPU yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join([*parts, *(section(*one) for one in there.items())])


def is_bench(name: str) -> bool:
    """Whether a record was made by a suite of `python -m minigated bench`."""
    return name.startswith("ch09_bench_")


def claim_of(record: dict) -> str:
    """The record's claim and what was measured; that of a suite which ran on a CPU is yet to be tested."""
    waiting = is_bench(record["id"]) and record["id"].endswith("_cpu")
    found = f" Measured: {outcome(record)}." if outcome(record) else ""
    return (f"To be tested on a GPU: {record['claim']}." if waiting else sentence(record["claim"])) + found


def heading(name: str) -> str:
    """Title of a record, its id as anchor."""
    planned, where = name.removesuffix("_cpu"), ", on a CPU" if name.endswith("_cpu") else ""
    return f"### {PLANNED.get(planned, (planned,))[0]}{where} {{ #{name} }}"


def pointer(name: str, record: dict | None) -> str:
    """A record's claim and the way to its tables; what a GPU took is drawn."""
    if record is None:
        return section(name, record)
    said = " ".join([f"`{name}` · {claim_of(record)}", *([f"{tally(record)}."] if tally(record) else [])])
    said += f" [Its tables](speed.md#{name}) stand on the page of speeds."
    return "\n\n".join([heading(name), said, *([] if name.endswith("_cpu") else drawn(record))])


def section(name: str, record: dict | None) -> str:
    """A record in full; for a missing one the command that makes it."""
    if record is None:
        said = f"`{name}`: no record yet; the command that makes it is `python -m minigated run {name}`."
        return f"{heading(name)}\n\n{said}"
    explained = [] if is_bench(name) else [legend(record)]  # the page of speeds says it once
    parts = [heading(name), f"`{name}` · {claim_of(record)}", *explained, *tables(record)]
    parts.append(f"*{sentence(records.caption(record))}*")
    uniform = {row["extra"].get("uniform") for row in record["rows"]} - {None}
    if len(uniform) == 1:
        parts.append(f"Uniform attention would give the first token {uniform.pop():.4f}.")
    parts += notes(record)
    count = max(len(row["values"]) for row in record["rows"])
    if 1 < count <= WIDEST and not timed(record):
        parts.append(every_value(record, count))
    parts.append(
        f"Made by `{record['command']}` in {record['seconds']:,.0f} s. [The record itself](results/{name}.json) holds "
        f"every value, the whole configuration, versions, and the hashes of the files that made it."
    )
    return "\n\n".join(part for part in parts if part)


def notes(record: dict) -> list[str]:
    """The record's note; of a bench record its limits, since the tables show the fastest row and what is missing."""
    said = ceilings_line(limits) if (limits := record["config"].get("ceilings")) else record["note"]
    return [sentence(said)] if said else []


def every_value(record: dict, count: int) -> str:
    """A folded table with a column for each seed, its rows by their names in the file."""
    form, made = measure(record).form, [["", *(f"value {i + 1}" for i in range(count))]]
    for row in record["rows"]:
        values = [form(value) for value in row["values"]] + ["–"] * (count - len(row["values"]))
        made.append([row["name"], *values])
    title = f"{record['metric']['name']}, every value"
    return f'<details markdown="1"><summary>{title}</summary>\n\n{markdown(made)}\n\n</details>'


def sentence(text: str) -> str:
    """With a capital at the start and a full stop at the end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def cell(text: str) -> str:
    """Text on one line, its bars escaped."""
    return " ".join(text.replace("|", r"\|").split())
