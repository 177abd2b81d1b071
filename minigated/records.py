"""Records: a published number, what made it, and the tables and captions made from it.

A record is `docs/results/<id>.json`; its fields are in `SCHEMA` below and every page takes its numbers from there.
"""

import datetime
import json
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

from minigated.codehash import code_hash
from minigated.errors import InputError, one_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results"
VERDICTS = ("reproduced", "direction only", "not at this scale", None)
SCHEMA: dict[str, tuple] = {
    "id": (str,),
    "chapter": (int,),
    "claim": (str,),
    "command": (str,),
    "config": (dict,),
    "seeds": (list,),
    "metric": (dict,),
    "rows": (list,),
    "verdict": (str, type(None)),
    "data": (dict,),
    "hardware": (dict,),
    "software": (dict,),
    "code": (dict,),
    "seconds": (int, float),
    "utc": (str,),
    "note": (str,),
}
ROW = {
    "name": (str,),
    "values": (list,),
    "mean": (int, float),
    "std": (int, float, type(None)),
    "paper": (int, float, type(None)),
    "extra": (dict,),
}


# ---------------------------------------------------------------------------------------------- making one
def file_hashes(files: list[str]) -> dict[str, str]:
    """Hash of the code of package files, given relative to the repository, e.g. "minigated/gates.py"."""
    return {name: code_hash(ROOT / name) for name in sorted(files)}


def commit() -> str | None:
    """MINIGATED_COMMIT if that is set, as where a copy runs; else the commit of the checkout; None if unknown."""
    if given := os.environ.get("MINIGATED_COMMIT"):
        return given
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict:
    """Name and count of the device that runs: the GPU if there is one, else the processor's cores."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "count": 1}
    return processor()


def processor() -> dict:
    """The processor and the threads torch uses on it."""
    threads = torch.get_num_threads()
    return {"device": f"CPU ({platform.machine()}), {threads} thread{'s' if threads > 1 else ''}", "count": 1}


def software() -> dict:
    """Versions that a number may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__.split("+")[0], "cuda": torch.version.cuda}


def row(name: str, values: list[float], paper: float | None = None, **extra) -> dict:
    """A contender: one value per seed (or repetition), mean and sample deviation worked out here."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return {"name": name, "values": values, "mean": mean, "std": std, "paper": paper, "extra": extra}


def make(*, files: list[str], **fields) -> dict:
    """Completes a record with versions, device, time and code hashes, and validates it."""
    record = {
        **fields,
        "hardware": hardware(),
        "software": software(),
        "code": {"commit": commit(), "files": file_hashes(files)},
        "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    validate(record)
    return record


def write(record: dict, folder: str | Path | None = None) -> Path:
    """Validates and writes atomically; returns the path."""
    validate(record)
    folder = Path(folder or FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=1, allow_nan=False)
        stream.write("\n")
    path = folder / f"{record['id']}.json"
    os.chmod(partial, 0o644)
    os.replace(partial, path)
    return path


# ---------------------------------------------------------------------------------------------- reading and checking
def _types(where: str, value: dict, schema: dict[str, tuple]) -> None:
    if set(value) != set(schema):
        missing, extra = sorted(set(schema) - set(value)), sorted(set(value) - set(schema))
        raise InputError(f"{where}: missing fields {missing}, unknown fields {extra}")
    for name, kinds in schema.items():
        if not isinstance(value[name], kinds) or isinstance(value[name], bool):
            raise InputError(
                f"{where}: {name} is {type(value[name]).__name__}, accepted: {[k.__name__ for k in kinds]}"
            )


def validate(record: dict) -> None:
    """Raises `InputError` naming the field unless the record follows the one schema of the house."""
    name = record.get("id", "?")
    _types(f"record {name}", record, SCHEMA)
    one_of(f"record {name}: verdict", record["verdict"], VERDICTS)
    one_of(f"record {name}: metric.better", record["metric"].get("better"), ("lower", "higher"))
    for part, keys in (
        ("metric", {"name", "split", "better"}),
        ("data", {"name", "sha256"}),
        ("hardware", {"device", "count"}),
    ):
        if set(record[part]) != keys:
            raise InputError(f"record {name}: {part} has fields {sorted(record[part])}, accepted: {sorted(keys)}")
    for entry in record["rows"]:
        where = f"record {name}, row {entry.get('name', '?')}"
        _types(where, entry, ROW)
        again = row(entry["name"], entry["values"])
        if not math.isclose(again["mean"], entry["mean"], rel_tol=1e-9, abs_tol=1e-12):
            raise InputError(f"{where}: mean {entry['mean']} is not the mean of its values, {again['mean']}")
        if (again["std"] is None) != (entry["std"] is None):
            raise InputError(f"{where}: std {entry['std']} does not fit {len(entry['values'])} values")


def load(record_id: str, folder: str | Path | None = None) -> dict:
    """Reads and validates a record; `InputError` names the command that makes a missing one."""
    path = Path(folder or FOLDER) / f"{record_id}.json"
    if not path.exists():
        raise InputError(f"no record {path.name} in {path.parent}; make it with: python -m minigated run {record_id}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    validate(record)
    return record


def all_records(folder: str | Path | None = None) -> list[dict]:
    """Every record of a folder, by chapter and id."""
    found = [load(path.stem, folder) for path in sorted(Path(folder or FOLDER).glob("*.json"))]
    return sorted(found, key=lambda r: (r["chapter"], r["id"]))


def stale_files(record: dict) -> list[str]:
    """Files that made the record and have changed, or gone, since."""
    changed = []
    for name, digest in record["code"]["files"].items():
        path = ROOT / name
        if not path.exists() or code_hash(path) != digest:
            changed.append(name)
    return changed


# ------------------------------------------------------------------------------------------- words made from a record
def seeds_in_words(record: dict) -> str:
    """ "3 seeds", "20 repetitions" for times, or "single run" where there is one."""
    counts = {len(entry["values"]) for entry in record["rows"]}
    if counts == {1}:
        return "single run"
    low, high, what = min(counts), max(counts), "repetitions" if record["metric"]["split"] == "repetitions" else "seeds"
    return f"{low} {what}" if low == high else f"{low} to {high} {what}"


def made(record: dict) -> str:
    """Device, date, seeds and torch, as a sentence."""
    device, day, torch = record["hardware"]["device"], record["utc"][:10], record["software"]["torch"]
    return f"{device}, {day}, {seeds_in_words(record)}, torch {torch}."


def caption(record: dict, named: int | None = 3) -> str:
    """One sentence: metric, device, date, seeds, verdict, and which files changed since: `named` of them, or all."""
    metric = record["metric"]
    text = f"{metric['name']} on {metric['split']} ({metric['better']} is better); {made(record)}"
    if record["verdict"]:
        text += f" Verdict: {record['verdict']}."
    changed = stale_files(record)
    if changed:
        shown = changed[:named]
        more = f" and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
        text += f" Changed since this was measured: {', '.join(f'`{name}`' for name in shown)}{more}."
    return text


def changed_since(record: dict) -> str:
    """ " 2 files changed since.", to stand behind another sentence; "" if none did."""
    changed = len(stale_files(record))
    return f" {changed} file{'s' if changed > 1 else ''} changed since." if changed else ""


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def table(record: dict, extra: dict[str, str] | None = None, paper: str = "paper", digits: int = 4) -> str:
    """A Markdown table of the rows: name, mean ± deviation, chosen extras, the paper's number.

    Args:
        extra: key of `extra` -> heading. paper: heading of the paper's column; dropped if no row has one.
    """
    extra = extra or {}
    with_paper = any(entry["paper"] is not None for entry in record["rows"])
    heads = ["", record["metric"]["name"], *extra.values()] + ([paper] if with_paper else [])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in record["rows"]:
        value = number(entry["mean"], digits) + (f" ± {number(entry['std'], 2)}" if entry["std"] is not None else "")
        cells = [entry["name"], value]
        cells += [number(v) if isinstance(v := entry["extra"].get(k), int | float) else str(v or "–") for k in extra]
        lines.append("| " + " | ".join(cells + ([number(entry["paper"])] if with_paper else [])) + " |")
    return "\n".join(lines)
