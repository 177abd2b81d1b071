"""Compiles a suite's rows in several processes at once, so that the rows, timed alone afterwards, find their kernels.

A compiler keeps about one processor core busy a row, and what it made lies in its cache on disk. A row that fails
here, e.g. because the others left no memory, is compiled when its turn comes.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from itertools import zip_longest

from tqdm import tqdm

from minigated.bench.plan import choose_cases
from minigated.device import choose_device

MARKS = ("compiled", "static cache")  # in the name of a row that a compiler takes long for
TOGETHER = 2  # rows of one case in one process, since each process has torch to import


def jobs(suites: Sequence[str], scale: str, device: str, only: tuple[str, ...] | None) -> list[tuple[str, list[str]]]:
    """(suite, names of rows for `--only`, each with those that begin so): all that compile, a few of a case at once.

    Cases come in turns, the first rows of each and then the next ones, because rows of one case are of one size and
    large ones side by side would fill the memory.
    """
    found: list[list[tuple[str, list[str]]]] = []
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    for suite in suites:
        for case in choose_cases(import_module(f"minigated.bench.suite_{suite}").cases(scale, chosen), only):
            names = [f"{case.name}: {row.name}" for row in case.rows if any(mark in row.name for mark in MARKS)]
            names = [name for name in names if not any(name != n and name.startswith(n) for n in names)]
            found.append([(suite, names[i : i + TOGETHER]) for i in range(0, len(names), TOGETHER)])
    return [job for turn in zip_longest(*found) for job in turn if job]


def compile_ahead(suites: Sequence[str], scale: str, device: str, only, workers: int) -> int:
    """Runs every job with a single sample a row, `workers` at once; how many of them failed."""
    plan, failed = jobs(suites, scale, device, only), 0
    share = str(max(1, (os.cpu_count() or 1) // workers))
    settings = os.environ | {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        running: list[subprocess.Popen] = []
        over = threading.Event()

        def run(number: int, suite: str, names: list[str]) -> bool:
            words = [part for name in names for part in ("--only", name)]
            out = ["--seeds", "1", "--out", f"{folder}/{number}", "--device", device]
            command = [sys.executable, "-m", "minigated", "bench", suite, "--scale", scale, *out, *words]
            process = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.append(process)
            if over.is_set():  # while this one started
                process.kill()
            return process.wait() == 0

        try:
            waiting = [pool.submit(run, i, *job) for i, job in enumerate(plan)]
            for done in tqdm(as_completed(waiting), total=len(plan), desc=f"compiling, {workers} at once", unit="job"):
                failed += not done.result()
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.kill()
            raise
    return failed
