"""`make learn`: runs every chapter on this machine and builds the site from what it gave.

Copies of the notebooks are executed under build/chapters/, at CPU scale unless --scale says otherwise; the committed
ones are never touched. A chapter whose sources have not changed since the last run is taken from there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  started by hand, before any installation has checked it
    sys.exit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")

import nbformat
from execute import ROOT, Job, execute, sources_key, stamp, write
from progress_line import ProgressLine, clock

TIMES = ROOT / "book" / "times.json"  # seconds of each code cell at CPU scale, for the first estimate


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_run(path: Path) -> dict:
    """What an executed copy says about its run; empty where there is none, or it cannot be read."""
    try:
        return nbformat.read(path, as_version=4).metadata["minigated"]["run"]
    except (OSError, KeyError, ValueError, nbformat.reader.NotJSONError):
        return {}


def expectation(path: Path, executed: Path) -> list[float]:
    """Seconds of each code cell: as in the last run, else as on the machine of times.json, else a second each."""
    count = sum(cell.cell_type == "code" for cell in nbformat.read(path, as_version=4).cells)
    committed = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    for known in (last_run(executed / path.name).get("cell_seconds"), committed.get(path.stem)):
        if known and len(known) == count:
            return known
        if known:  # the chapter has other cells now: spread the time it took
            return [sum(known) / max(count, 1)] * count
    return [1.0] * count


def plan(chapters: list[Path], executed: Path, scale: str, fresh: bool) -> tuple[dict[Path, str], list[Path]]:
    """(chapters to run with the key of their sources, chapters to take from the last run)."""
    keys = {path: sources_key(path, scale) for path in chapters}
    kept = [p for p, key in keys.items() if not fresh and last_run(executed / p.name).get("key") == key]
    return {path: key for path, key in keys.items() if path not in kept}, kept


def run_all(todo: dict[Path, str], executed: Path, scale: str, workers: int) -> list[Job]:
    """Executes the chapters, longest first; each finished one is written at once."""
    expected = {path.stem: expectation(path, executed) for path in todo}
    order = sorted(todo, key=lambda path: -sum(expected[path.stem]))
    threads = None if scale == "gpu" else max(1, min(cores(), 8) // workers)
    line = ProgressLine(expected, workers)
    stopping = False

    def work(job: Job) -> Job:
        if stopping:
            job.error = "not started"
            return job
        line.jobs.append(job)
        execute(job)
        if job.error is None:
            stamp(job, "reader", todo[job.path])
            write(job.notebook, executed / job.path.name)
            line.say(f"{job.name}: done in {clock(sum(job.times))}")
        elif not stopping:
            write(job.notebook, executed.parent / "failed" / job.path.name)
            line.say(f"{job.name}: FAILED in code cell {job.cell}")
        return job

    jobs = [Job(path, scale, threads) for path in order]
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, job) for job in jobs}
        try:
            while wait(futures, timeout=0.5).not_done:
                line.tick()
        except KeyboardInterrupt:
            stopping = True
            for job in jobs:
                job.stop()
            raise
        finally:
            line.close()
    return [future.result() for future in futures]


def build_site(executed: Path, site: Path) -> str | None:
    """Builds into a new folder and puts it in place of the old one when it is complete; returns what went wrong."""
    fresh = executed.parent / "site"
    env = {**os.environ, "MINIGATED_CHAPTERS": str(executed), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(fresh)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
    old = site.with_name(site.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    site.parent.mkdir(parents=True, exist_ok=True)
    if site.exists():
        site.rename(old)
    shutil.move(fresh, site)
    shutil.rmtree(old, ignore_errors=True)
    return None


def save_times(executed: Path) -> None:
    """Keeps the seconds of each cell for the estimates of others."""
    times = {path.stem: last_run(path).get("cell_seconds") for path in sorted(executed.glob("*.ipynb"))}
    lines = (f" {json.dumps(name)}: {json.dumps(seconds)}" for name, seconds in times.items())  # a chapter a line
    TIMES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="learn.py", description="Runs every chapter, builds the site, says where.")
    parser.add_argument("--fresh", action="store_true", help="run every chapter again, changed or not")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="size of the runs inside the chapters")
    parser.add_argument("--chapters", type=Path, default=ROOT / "chapters", help="folder of notebooks")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder for the executed copies")
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="folder for the site")
    parser.add_argument("--save-times", action="store_true", help="keep the times for the estimates in book/times.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.monotonic()
    chapters = sorted(options.chapters.resolve().glob("[0-9][0-9]_*.ipynb"))
    if not chapters:
        print(f"error: no notebooks in {options.chapters}", file=sys.stderr)
        return 2
    executed = options.build.resolve() / "chapters"
    executed.mkdir(parents=True, exist_ok=True)
    for stale in set(executed.glob("*.ipynb")) - {executed / path.name for path in chapters}:
        stale.unlink()
    todo, kept = plan(chapters, executed, options.scale, options.fresh)
    if kept:
        print(f"unchanged since the last run: {', '.join(p.stem for p in kept)} (--fresh runs all again)", flush=True)
    workers = 1 if options.scale == "gpu" else max(1, min(2, cores(), len(todo)))
    if todo:
        print(f"running {', '.join(path.stem for path in todo)} at {options.scale} scale", flush=True)
    try:
        failed = [job for job in run_all(todo, executed, options.scale, workers) if job.error] if todo else []
    except KeyboardInterrupt:
        print("\nstopped; finished chapters are kept, the next run goes on from there", file=sys.stderr)
        return 130
    if options.save_times and not failed:
        save_times(executed)
    for job in failed:
        print(f"\nerror: {job.error}\n  as far as it ran: {options.build / 'failed' / job.path.name}", file=sys.stderr)
    if failed:
        print(f"\n{len(failed)} of {len(chapters)} chapters failed; the site was left as it was", file=sys.stderr)
        return 1
    print("building the site ...", flush=True)
    if trouble := build_site(executed, options.site.resolve()):
        print(f"error: the site could not be built and was left as it was:\n{trouble}", file=sys.stderr)
        return 1
    print(f"\nopen {(options.site.resolve() / 'index.html').as_uri()}\nready after {clock(time.monotonic() - begin)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
