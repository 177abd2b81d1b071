"""Runs a suite: the machine's ceilings, then case by case, each logged as it comes; then a table and a record."""

import shlex
import time
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from minigated import records
from minigated.bench import report
from minigated.bench.ceilings import measure_ceilings
from minigated.bench.rows import Case, measure_case, untimed
from minigated.bench.timing import Timer
from minigated.device import allow_graphs, choose_device, reset_compilation
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
    "bench/runner.py",
    "cost.py",
]


def record_id(suite: str, scale: str) -> str:
    """The record's name: a GPU's and a CPU's stand beside each other."""
    return f"ch09_bench_{suite}" + ("_cpu" if scale == "cpu" else "")


def choose_cases(cases: list[Case], only: tuple[str, ...] | None) -> list[Case]:
    """The cases, and in them the rows, whose "case: row" name holds one of the words of `only`.

    Raises:
        InputError: a word that no name holds.
    """
    if not only:
        return cases
    names = [f"{case.name}: {row.name}" for case in cases for row in case.rows]
    for word in only:
        if not any(word in name for name in names):
            raise InputError(f"no row is called {word!r}; there are: {'; '.join(names)}")
    chosen = []
    for case in cases:
        rows = [row for row in case.rows if any(word in f"{case.name}: {row.name}" for word in only)]
        if rows:
            chosen.append(Case(case.name, rows, case.unit, case.dtype))
    return chosen


def run_suite(
    suite: str, scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None, seconds=None
) -> dict | None:
    """Runs one suite and writes its record.

    Args:
        suite: a name of `SUITES`. scale: "cpu" or "gpu", which sizes.
        seeds: how many samples of each row. seconds: start no case after this long; what is left is listed as not run,
            for another call with `resume`.
        out: folder. resume: go on from the log in it. names: words; rows whose name holds one of them.

    Returns:
        The record; None if there was nothing to time.
    """
    one_of("suite", suite, SUITES)
    one_of("scale", scale, tuple(SAMPLES))
    if text is not None:
        raise InputError(f"a benchmark reads no text, got {text!r}")
    for what, value in (("number of samples", seeds), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise InputError(f"{what} {value}; accepted: above 0")
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    module, timer = import_module(f"minigated.bench.suite_{suite}"), Timer(chosen)
    cases = choose_cases(module.cases(scale, chosen), names)
    folder = Path(out or (records.FOLDER if scale == "gpu" else "runs"))
    files = sorted(f"minigated/{name}" for name in {*CORE, f"bench/suite_{suite}.py", *module.FILES})
    machine = records.hardware() if chosen.type == "cuda" else records.processor()
    settings = {
        "scale": scale, "device": machine["device"], "samples": seeds or SAMPLES[scale], "torch": torch.__version__,
        "threads": torch.get_num_threads(), "sampling_seconds": SECONDS[scale],
    }  # fmt: skip
    log = RunLog(folder, record_id(suite, scale), settings, files, resume)
    start = time.perf_counter()
    ceilings = log.get(lambda: measure_ceilings(timer, scale), part="ceilings")["result"]
    results = _run_cases(suite, cases, log, timer, settings, start + (seconds or float("inf")))
    record = _record(suite, module, results, ceilings, settings, time.perf_counter() - start, names)
    print(report.table(suite, results, ceilings))
    if record is None:
        return None
    record = log.as_made(record) | {"hardware": machine}
    print(f"wrote {records.write(record, folder)}")
    return record


def _run_cases(suite: str, cases: list[Case], log: RunLog, timer: Timer, settings: dict, end: float) -> list[dict]:
    """All rows' results. A case is in the log as a whole, since its rows took turns; one with a failed row is not."""
    results, share = [], settings["sampling_seconds"] / max(1, len(cases))
    allow_graphs()
    with tqdm(total=sum(len(case.rows) for case in cases), desc=f"bench {suite}", unit="row") as bar:
        for case in cases:
            bar.set_postfix_str(case.name)
            key = {"case": case.name, "rows": [row.name for row in case.rows]}
            if log.find(**key):
                bar.update(len(case.rows))
                results += log.find(**key)["result"]["rows"]
                continue
            if time.perf_counter() >= end:
                reason = "the time given was over; --resume goes on"
                results += [untimed(case, row) | {"state": "not run", "reason": reason} for row in case.rows]
                continue
            torch.manual_seed(0)
            reset_compilation()
            made = measure_case(case, timer, settings["samples"], share, lambda name: bar.update())
            if all(result["state"] != "failed" for result in made):
                log.get(lambda made=made: {"rows": made}, **key)
            results += made
    return results


def _record(suite, module, results, ceilings, settings, seconds, names) -> dict | None:
    timed = [result for result in results if result["times"]]
    if not timed:
        return None
    first = {result["case"]: result for result in reversed(timed)}
    rows = [record_row(result, first[result["case"]], ceilings) for result in timed]
    untimed = [{key: r[key] for key in ("case", "row", "state", "reason")} for r in results if not r["times"]]
    only = "".join(f" --only {shlex.quote(name)}" for name in names or ())
    return records.make(
        files=[],
        id=record_id(suite, settings["scale"]),
        chapter=9,
        claim=module.CLAIM,
        command=f"python -m minigated bench {suite} --scale {settings['scale']}{only}",
        config={**settings, "ceilings": ceilings, "not_timed": untimed},
        seeds=list(range(max(len(row["values"]) for row in rows))),
        metric={"name": "milliseconds a call", "split": "repetitions", "better": "lower"},
        rows=rows,
        verdict=None,
        data={"name": "random normal", "sha256": ""},
        seconds=seconds,
        note=report.note(results, ceilings),
    )


def record_row(result: dict, first: dict, ceilings: dict[str, float]) -> dict:
    """A record's row of a timed result: milliseconds, and what a roofline needs.

    Extras: `median_ms`, `quartiles_ms`, `per_second` (items), `against_first` (times as fast as the case's first row),
    `flop_rate`, `byte_rate` and their shares of the measured ceilings, `intensity` (operations a byte),
    `ready_seconds` (built, compiled, checked; less where a cache holds the kernels), `held_mib`, `peak_mib`, `state`,
    `error`, `facts`, `profile` (of a GPU); of decoding `before_ms`, how long the prompt and the first token take,
    `token_ms`, each one after it, `weights_ms`, reading the weights alone at the measured copy bandwidth, and
    `against_weights`, token over weights.
    """
    median, flops, moved = result["median"], result["flops"], result["bytes"]
    mebibytes = lambda n: None if n is None else n / 2**20
    return records.row(
        f"{result['case']}: {result['row']}",
        [1e3 * t for t in result["times"]],
        case=result["case"], contender=result["row"], state=result["state"], error=result["error"],
        dtype=result["dtype"], median_ms=1e3 * median,
        quartiles_ms=[1e3 * q for q in result["quartiles"]],
        unit=result["unit"], items=result["items"], per_second=result["items"] / median,
        against_first=report.against(result, first),
        flops=flops, bytes=moved, intensity=flops / moved if flops and moved else None,
        flop_rate=flops and flops / median, flop_share=flops and flops / median / ceilings[result["dtype"]],
        byte_rate=moved and moved / median, byte_share=moved and moved / median / ceilings["copy"],
        ready_seconds=result["prepare_seconds"] + result["first_seconds"],
        held_mib=mebibytes(result["held_bytes"]), peak_mib=mebibytes(result["peak_bytes"]),
        facts=result["facts"], profile=result["profile"],
        before_ms=result["before_seconds"] and 1e3 * result["before_seconds"], **report.weights(result, ceilings),
    )  # fmt: skip
