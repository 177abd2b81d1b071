"""Compiling rows ahead of their turn: which rows, in which order, and what becomes of a job that fails."""

import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch

from minigated.__main__ import main
from minigated.bench import ahead, suite_lm
from minigated.bench.ahead import TOGETHER, compile_ahead, jobs
from minigated.bench.plan import choose_cases


@pytest.fixture
def gpu_sizes(monkeypatch):
    """The plan of a GPU on any machine; nothing of it runs here."""
    monkeypatch.setattr(ahead, "choose_device", lambda name: torch.device("cuda"))


def test_cases_take_turns_a_few_rows_at_once(gpu_sizes):
    plan = jobs(["lm"], "gpu", "auto", None)
    cases = [case.name for case in suite_lm.cases("gpu", torch.device("cuda"))]
    assert all(suite == "lm" and 0 < len(names) <= TOGETHER for suite, names in plan)
    assert [names[0].split(":")[0] for _, names in plan[: len(cases)]] == cases  # no two of a size side by side


def test_every_compiled_row_has_one_job(gpu_sizes):
    """`--only` takes the beginning of a name for the name: "compiled" is also "compiled and recorded"."""
    for suite in ("attention", "lm", "moe", "retention", "vit"):
        plan = jobs([suite], "gpu", "auto", None)
        cases = import_module(f"minigated.bench.suite_{suite}").cases("gpu", torch.device("cuda"))
        ran = [f"{c.name}: {r.name}" for _, names in plan for c in choose_cases(cases, tuple(names)) for r in c.rows]
        assert sorted(ran) == sorted(set(ran)) and all("compiled" in name for name in ran)
        assert set(ran) == {f"{c.name}: {r.name}" for c in cases for r in c.rows if "compiled" in r.name}


def test_words_choose_among_the_jobs(gpu_sizes):
    plan = jobs(["lm", "generate"], "gpu", "auto", ("350 M: minigated",))
    assert {suite for suite, _ in plan} == {"lm", "generate"}
    assert all("350 M: minigated" in name and "eager" not in name for _, names in plan for name in names)


def test_an_error_leaves_no_process_behind(gpu_sizes, monkeypatch):
    """The second start fails; the first process, which would run for a minute, is stopped."""
    popen, started, turns = subprocess.Popen, [], iter(range(99))

    def start(command, **_):
        if next(turns):
            raise OSError("no more processes")
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[0]

    monkeypatch.setattr(ahead.subprocess, "Popen", start)
    begun = time.perf_counter()
    with pytest.raises(OSError, match="no more processes"):
        compile_ahead(["lm"], "gpu", "cuda", None, workers=1 + 1)
    assert started[0].wait(5) != 0 and time.perf_counter() - begun < 20


class Process:
    """Stands for a process; the first of all fails."""

    started: list = []

    def __init__(self, command, env, **_):
        self.started.append((command, env))
        self.failed = len(self.started) == 1

    def wait(self):
        return int(self.failed)


def test_each_job_is_a_run_of_its_own_with_one_sample(gpu_sizes, monkeypatch):
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(ahead.subprocess, "Popen", Process)
    plan = jobs(["lm"], "gpu", "cuda", None)
    assert compile_ahead(["lm"], "gpu", "cuda", None, workers=3) == 1  # and the others ran
    asked = []
    for command, env in Process.started:
        assert command[1:5] == ["-m", "minigated", "bench", "lm"]
        assert command[command.index("--seeds") + 1] == "1" and command[command.index("--device") + 1] == "cuda"
        asked.append([word for flag, word in zip(command, command[1:]) if flag == "--only"])
        assert int(env["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1
    assert sorted(asked) == sorted(names for _, names in plan)
    folders = [command[command.index("--out") + 1] for command, _ in Process.started]
    assert len(set(folders)) == len(plan)  # logs that do not meet


def test_no_worker_is_refused(capsys):
    assert main(["bench", "lm", "--workers", "0"]) == 2
    assert "workers 0; accepted: 1 or more" in capsys.readouterr().err
