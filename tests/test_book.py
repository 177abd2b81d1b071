"""`make learn` without the real chapters, the notebooks' execution, and the Makefile's installation."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import nbformat
import pytest
from site_build import ROOT

import execute  # isort: skip  (from book/, whose folder site_build adds)
import learn  # isort: skip
from progress_line import ProgressLine, clock  # isort: skip

GOOD = ["# 1 · Good", "import os\nimport minigated\nprint('scale', os.environ['MINIGATED_SCALE'])", "1 + 1"]
BAD = ["# 2 · Bad", "x = 0", "# a comment\n1 / x"]


def notebook(path: Path, sources: list[str]) -> Path:
    """A notebook whose first cell is text and whose others are code."""
    cells = [nbformat.v4.new_markdown_cell(sources[0]), *map(nbformat.v4.new_code_cell, sources[1:])]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def run_learn(tmp_path, monkeypatch, capsys):
    """Runs `learn.py` on tmp_path/chapters; returns status, standard output and error output."""
    # Only the notebook counts as a source here: someone may be editing the package while the tests run.
    monkeypatch.setattr(learn, "sources_key", lambda path, scale: path.read_text("utf-8"))

    def run() -> tuple[int, str, str]:
        folders = {name: tmp_path / name for name in ("chapters", "build", "site")}
        status = learn.main([f"--{name}={folder}" for name, folder in folders.items()])
        return (status, *capsys.readouterr())

    return run


# ---------------------------------------------------------------------------------------------- make learn
def test_learn_runs_builds_and_resumes(tmp_path, run_learn):
    sources = [notebook(tmp_path / "chapters" / f"0{i}_good.ipynb", GOOD) for i in (1, 2)]
    before = [path.read_bytes() for path in sources]
    status, said, errors = run_learn()
    assert status == 0, errors
    assert f"open {(tmp_path / 'site' / 'index.html').as_uri()}" in said
    assert [path.read_bytes() for path in sources] == before, "the chapters themselves were touched"
    page = (tmp_path / "site" / "chapters" / "01_good.html").read_text("utf-8")
    assert "scale cpu" in page and "your own run" in page
    executed = nbformat.read(tmp_path / "build" / "chapters" / "01_good.ipynb", as_version=4)
    assert executed.cells[2].outputs[0].data["text/plain"] == "2"

    # A second run, with one chapter changed into one that fails: the other is taken over, the site stays.
    notebook(sources[1], BAD)
    status, said, errors = run_learn()
    assert status == 1
    assert "unchanged since the last run: 01_good" in said and "running 02_good" in said
    assert "chapter 02_good, code cell 2 of 2" in errors and "1 / x" in errors
    assert "ZeroDivisionError: division by zero" in errors and "1 of 2 chapters failed" in errors
    assert (tmp_path / "site" / "chapters" / "01_good.html").read_text("utf-8") == page
    assert (tmp_path / "build" / "failed" / "02_good.ipynb").exists()


def test_a_failing_chapter_does_not_stop_the_others(tmp_path, run_learn):
    notebook(tmp_path / "chapters" / "01_bad.ipynb", BAD)
    notebook(tmp_path / "chapters" / "02_good.ipynb", GOOD)
    status, _, errors = run_learn()
    assert status == 1 and "chapter 01_bad, code cell 2 of 2" in errors and "1 of 2 chapters failed" in errors
    assert (tmp_path / "build" / "chapters" / "02_good.ipynb").exists()
    assert not (tmp_path / "build" / "chapters" / "01_bad.ipynb").exists()
    assert not (tmp_path / "site").exists()


def test_a_dying_kernel_is_reported(tmp_path):
    path = notebook(tmp_path / "01_dies.ipynb", ["# D", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"])
    job = execute.execute(execute.Job(path))
    assert "chapter 01_dies, code cell 1 of 1" in job.error and "the kernel died" in job.error


def test_a_folder_without_notebooks_is_wrong_input(tmp_path, capsys):
    assert learn.main(["--chapters", str(tmp_path)]) == 2
    assert f"no notebooks in {tmp_path}" in capsys.readouterr().err


def test_a_broken_site_does_not_replace_the_old_one(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("old")
    trouble = learn.build_site(tmp_path / "build" / "not_chapters", site)
    assert "MINIGATED_CHAPTERS" in trouble
    assert (site / "index.html").read_text() == "old"


def test_changed_sources_are_run_again(tmp_path):
    path = notebook(tmp_path / "01_x.ipynb", GOOD)
    key = execute.sources_key(path, "cpu")
    assert execute.sources_key(path, "gpu") != key
    assert execute.sources_key(notebook(tmp_path / "02_y.ipynb", GOOD), "cpu") == key
    assert execute.sources_key(notebook(path, [*GOOD, "2"]), "cpu") != key


# ---------------------------------------------------------------------------------------------- what is kept of a run
def test_tidy_removes_what_belongs_to_one_run():
    output = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(
        "x",
        metadata={"execution": {"a": "b"}, "tags": ["hide-input"]},
        outputs=[
            output("stream", name="stderr", text="train:  40%|####      | 4/10 [00:01<00:02]\n"),
            output("stream", name="stderr", text=f"{ROOT}/minigated/x.py:1: UserWarning: mind\n"),
            output("stream", name="stdout", text="40% of it\n"),
        ],
    )
    metadata = {"widgets": {}, "kernelspec": {"name": "odd", "display_name": "Odd"}}
    made = nbformat.v4.new_notebook(cells=[cell], metadata=metadata)
    execute.tidy(made)
    assert [o.text for o in made.cells[0].outputs] == ["minigated/x.py:1: UserWarning: mind\n", "40% of it\n"]
    assert made.cells[0].metadata == {"tags": ["hide-input"]}
    assert made.metadata.kernelspec.name == "python3" and "widgets" not in made.metadata


def test_execute_in_place_refuses_what_is_too_heavy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    light = notebook(tmp_path / "01_light.ipynb", ["# L", "print('hi')"])
    assert execute.main([str(light), "--in-place"]) == 0
    kept = nbformat.read(light, as_version=4)
    assert kept.cells[1].outputs[0].text == "hi\n" and kept.metadata.minigated.run.origin == "committed"
    monkeypatch.setattr(execute, "LIMIT", 100)
    before = light.read_bytes()
    assert execute.main([str(light), "--in-place"]) == 1
    assert "accepted: 100 or less" in capsys.readouterr().err and light.read_bytes() == before


# ---------------------------------------------------------------------------------------------- progress
def test_estimates_come_from_the_last_run_or_the_committed_times(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "TIMES", tmp_path / "times.json")
    path = notebook(tmp_path / "01_x.ipynb", GOOD)
    executed = tmp_path / "build"
    assert learn.expectation(path, executed) == [1.0, 1.0]
    learn.TIMES.write_text(json.dumps({"01_x": [2.0, 6.0, 4.0]}))
    assert learn.expectation(path, executed) == [6.0, 6.0]
    learn.TIMES.write_text(json.dumps({"01_x": [2.0, 6.0]}))
    assert learn.expectation(path, executed) == [2.0, 6.0]
    job = execute.Job(path, times=[3.0, 1.0], notebook=nbformat.read(path, as_version=4))
    execute.stamp(job, "reader", "key")
    execute.write(job.notebook, executed / path.name)
    assert learn.expectation(path, executed) == [3.0, 1.0]
    learn.save_times(executed)
    assert json.loads(learn.TIMES.read_text()) == {"01_x": [3.0, 1.0]}


class Terminal(list):
    """A stream that takes lines and says whether it is a terminal."""

    def __init__(self, terminal: bool):
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def flush(self):
        pass

    write = list.append


def test_progress_names_chapters_and_time_left(tmp_path):
    line = ProgressLine({"01_a": [10.0, 20.0], "02_b": [30.0]}, workers=2, stream=Terminal(True))
    assert line.left() == 30.0
    line.jobs = [
        execute.Job(tmp_path / "01_a.ipynb", cell=2, cells=2, times=[10.0], started=time.monotonic() - 5),
        execute.Job(tmp_path / "02_b.ipynb", cell=1, cells=1, started=time.monotonic() - 1000),
    ]
    done, total = line.shares()
    assert total == 60.0 and done == pytest.approx(10 + 5 + 0.95 * 30, abs=0.5)
    assert line.text().startswith("01_a (cell 2/2), 02_b (cell 1/1); about ")
    line.tick()
    line.close()
    assert "01_a (cell 2/2)" in "".join(line.stream)
    assert [clock(s) for s in (0, 59.4, 60, 200)] == ["1 s", "59 s", "1 min 00 s", "3 min 20 s"]


def test_progress_in_a_log_is_lines(tmp_path):
    line = ProgressLine({"01_a": [10.0]}, workers=1, stream=Terminal(False))
    line.jobs = [execute.Job(tmp_path / "01_a.ipynb", cell=1, cells=1, started=time.monotonic())]
    line.tick()
    assert not line.stream
    line.spoken -= 60
    line.tick()
    assert "\r" not in "".join(line.stream) and "01_a (cell 1/1)" in "".join(line.stream)


# ---------------------------------------------------------------------------------------------- Makefile
FAKE = """#!/bin/sh
# stands for a Python: creates an environment with itself as interpreter, notes what it is asked to do
case "$1 $2" in
  "-c "*) exit ${OLD:-0} ;;
  "--version ") echo Python 3.9.1 ;;
  "-m venv") [ -n "$NO_VENV" ] && { mkdir -p .venv/bin; exit 1; }; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *) echo "$@" >> log; case "$*" in *"pip install"*) exit ${PIP:-0} ;; esac ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder with the project's Makefile and a Python that only takes notes."""
    if not shutil.which("make"):
        pytest.skip("no make here")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def run(target: str, **env: str) -> tuple[int, str, list[str]]:
        """(status, what was said, installations so far)."""
        env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")} | env
        done = subprocess.run(
            ["make", target], cwd=tmp_path, env={"PYTHON": str(fake), **env}, capture_output=True, text=True
        )
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        return done.returncode, done.stdout + done.stderr, [line for line in log if "pip install" in line]

    run.folder = tmp_path
    return run


def test_installation_happens_once(make):
    status, said, calls = make("learn")
    assert status == 0 and said.count("installing") == 1
    assert len(calls) == 1 and calls[0].endswith("-r requirements.txt -e .")
    status, said, calls = make("test")
    assert status == 0 and len(calls) == 1 and "installing" not in said
    assert (make.folder / "log").read_text().splitlines()[-1].startswith("-m pytest tests -n 2")
    os.utime(make.folder / ".venv" / ".installed", (1, 1))  # as if requirements.txt had changed since
    assert len(make("exercises")[2]) == 2
    calls = make("lab")[2]
    assert len(calls) == 3 and calls[-1].endswith("-e .[lab]")
    assert len(make("lab")[2]) == 3


def test_half_an_installation_is_none(make):
    assert make("learn", PIP="1")[0] != 0
    assert not (make.folder / ".venv" / ".installed").exists()
    status, _, calls = make("learn")
    assert status == 0 and len(calls) == 2


def test_an_old_python_or_one_without_venv_is_refused_clearly(make):
    status, said, calls = make("learn", OLD="1")
    assert status != 0 and "Python 3.11 or newer is needed" in said and "Python 3.9.1" in said and not calls
    status, said, calls = make("learn", NO_VENV="1")
    assert status != 0 and "python3-venv" in said and not calls
    assert not (make.folder / ".venv").exists(), "the next run would stumble on it"
    assert make("learn")[0] == 0


def test_make_has_the_promised_targets(make):
    status, said, calls = make("help")
    assert status == 0 and not calls
    assert all(f"make {name} " in said for name in ("learn", "test", "serve", "exercises", "lab", "clean"))
