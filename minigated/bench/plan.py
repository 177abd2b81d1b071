"""What a bench is about to run: suites, cases and settings, with everything checked that can be known before."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from minigated import records
from minigated.bench.rows import Case
from minigated.bench.timing import Timer
from minigated.device import choose_device
from minigated.errors import InputError, one_of
from minigated.experiments.runlog import RunLog

SUITES = ("attention", "retention", "vit", "moe", "lm", "generate")
SAMPLES = {"cpu": 15, "gpu": 30}
SECONDS = {"cpu": 4.0, "gpu": 20.0}  # of a suite for taking samples, shared by its cases; preparing them is extra
CORE = [
    "bench/timing.py",
    "bench/rows.py",
    "bench/formulas.py",
    "bench/ceilings.py",
    "bench/profile.py",
    "bench/plan.py",
    "bench/runner.py",
    "cost.py",
]


def record_id(suite: str, scale: str) -> str:
    """The record's name: a GPU's and a CPU's stand beside each other."""
    return f"ch09_bench_{suite}" + ("_cpu" if scale == "cpu" else "")


def choose_cases(cases: list[Case], only: tuple[str, ...] | None) -> list[Case]:
    """The cases, and in them the rows, whose "case: row" name holds one of the words of `only`."""
    if not only:
        return cases
    chosen = []
    for case in cases:
        rows = [row for row in case.rows if any(word in f"{case.name}: {row.name}" for word in only)]
        if rows:
            chosen.append(Case(case.name, rows, case.unit, case.dtype))
    return chosen


@dataclass(frozen=True)
class Plan:
    """A suite about to run, its input found good. `names`: the words that chose its cases."""

    suite: str
    module: ModuleType
    cases: list[Case]
    timer: Timer
    machine: dict
    settings: dict
    log: RunLog
    folder: Path
    names: tuple[str, ...] | None
    seconds: float | None


def plan_suites(
    suites: list[str], scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None,
    seconds=None,
) -> list[Plan]:  # fmt: skip
    """Checks everything that can be known before the first suite runs.

    Args:
        suites: names of `SUITES`. scale: "cpu" or "gpu", which sizes.
        seeds: how many samples of each row. seconds: start no case after this long; what is left is listed as not run,
            for another call with `resume`.
        out: folder. resume: go on from the log in it. names: words; rows whose name holds one of them.

    Returns:
        A plan for each suite that has such rows.

    Raises:
        InputError: wrong input, a word that no row holds, a log with runs and no `resume`, or a record with rows that
            `names` leaves out.
    """
    for suite in suites:
        one_of("suite", suite, SUITES)
    one_of("scale", scale, tuple(SAMPLES))
    if text is not None:
        raise InputError(f"a benchmark reads no text, got {text!r}")
    for what, value in (("number of samples", seeds), ("seconds", seconds)):
        if value is not None and not value > 0:
            raise InputError(f"{what} {value}; accepted: above 0")
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    modules = {suite: import_module(f"minigated.bench.suite_{suite}") for suite in suites}
    cases = {suite: module.cases(scale, chosen) for suite, module in modules.items()}
    check_words(names, cases)
    cases = {suite: choose_cases(found, names) for suite, found in cases.items()}
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    machine = records.hardware() if chosen.type == "cuda" else records.processor()
    settings = {
        "scale": scale, "device": machine["device"], "samples": seeds or SAMPLES[scale], "torch": torch.__version__,
        "threads": torch.get_num_threads(), "sampling_seconds": SECONDS[scale],
    }  # fmt: skip
    plans = []
    for suite, module in modules.items():
        if not cases[suite]:
            continue
        if names:
            keep_whole(folder, record_id(suite, scale), cases[suite])
        files = sorted(f"minigated/{name}" for name in {*CORE, f"bench/suite_{suite}.py", *module.FILES})
        log = RunLog(folder, record_id(suite, scale), settings, files, resume, same_files=True)
        plans.append(Plan(suite, module, cases[suite], Timer(chosen), machine, settings, log, folder, names, seconds))
    return plans


def check_words(words: tuple[str, ...] | None, cases: Mapping[str, list[Case]]) -> None:
    """Raises an `InputError` for a word that no row of any suite holds, "case: row" being the name of a row."""
    names = [f"{case.name}: {row.name}" for found in cases.values() for case in found for row in case.rows]
    there = f"there are: {'; '.join(names)}" if len(cases) == 1 else "name one suite to see those that it has"
    for word in words or ():
        if not word.strip() or not any(word in name for name in names):
            raise InputError(f"no row is called {word!r}; {there}")


def keep_whole(folder: Path, name: str, cases: list[Case]) -> None:
    """Raises an `InputError` if a record is there whose rows these cases would not replace: nothing is lost."""
    if not (folder / f"{name}.json").exists():
        return
    chosen = {f"{case.name}: {row.name}" for case in cases for row in case.rows}
    left = [row["name"] for row in records.load(name, folder)["rows"] if row["name"] not in chosen]
    if left:
        raise InputError(
            f"{folder / name}.json holds {len(left)} rows that --only leaves out; choose another folder with --out"
        )
