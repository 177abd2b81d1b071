"""Runs a suite: the machine's ceilings, then case by case, each logged as it comes; then a table and a record."""

import shlex
import time

import torch
from tqdm import tqdm

from minigated import records
from minigated.bench import report
from minigated.bench.ceilings import measure_ceilings
from minigated.bench.plan import Plan, plan_suites, record_id
from minigated.bench.rows import measure_case, untimed
from minigated.device import allow_graphs, reset_compilation


def run_suite(suite: str, **options) -> dict | None:
    """Runs one suite and writes its record; options and record are those of `plan_suites` and `run_plan`."""
    (plan,) = plan_suites([suite], **options)
    return run_plan(plan)


def run_plan(plan: Plan) -> dict | None:
    """Runs a suite and writes its record; None if there was nothing to time."""
    start, log, settings = time.perf_counter(), plan.log, plan.settings
    if log.others:
        print(f"bench {plan.suite}: {log.others} runs in the log are of other code, which is measured again")
    if log.find(part="ceilings") is None:
        print(f"bench {plan.suite}: measuring what this machine can do at best", flush=True)
    ceilings = log.get(lambda: measure_ceilings(plan.timer, settings["scale"]), part="ceilings")["result"]
    results = _run_cases(plan, start + (plan.seconds or float("inf")))
    record = _record(plan, results, ceilings, time.perf_counter() - start)
    print(report.table(plan.suite, results, ceilings))
    if record is None:
        return None
    record = log.as_made(record) | {"hardware": plan.machine}
    print(f"wrote {records.write(record, plan.folder)}")
    return record


def _run_cases(plan: Plan, end: float) -> list[dict]:
    """All rows' results. A case is in the log as a whole, since its rows took turns; one with a failed row is not."""
    results, log, share = [], plan.log, plan.settings["sampling_seconds"] / max(1, len(plan.cases))
    allow_graphs()
    with tqdm(total=sum(len(case.rows) for case in plan.cases), desc=f"bench {plan.suite}", unit="row") as bar:
        for case in plan.cases:
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
            made = measure_case(case, plan.timer, plan.settings["samples"], share, lambda name: bar.update())
            if all(result["state"] != "failed" for result in made):
                log.get(lambda made=made: {"rows": made}, **key)
            results += made
    return results


def _record(plan: Plan, results: list[dict], ceilings: dict, seconds: float) -> dict | None:
    suite, settings = plan.suite, plan.settings
    timed = [result for result in results if result["times"]]
    if not timed:
        return None
    first = {result["case"]: result for result in reversed(timed)}
    rows = [record_row(result, first[result["case"]], ceilings) for result in timed]
    untimed = [{key: r[key] for key in ("case", "row", "state", "reason")} for r in results if not r["times"]]
    only = "".join(f" --only {shlex.quote(name)}" for name in plan.names or ())
    return records.make(
        files=[],
        id=record_id(suite, settings["scale"]),
        chapter=9,
        claim=plan.module.CLAIM,
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
