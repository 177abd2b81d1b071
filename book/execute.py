"""Executes notebooks with the running interpreter: `python book/execute.py NOTEBOOK... [--scale gpu] [--in-place]`.

`--in-place` writes the outputs back: this is how the committed outputs are made on a machine with a GPU. Without it the
executed copies go to build/executed/. `book/learn.py` uses the functions below for all chapters at once.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    import nbformat
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install first: {sys.executable} -m pip install -r requirements.txt -e .")

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600_000  # bytes of a committed notebook
PROGRESS_BAR = re.compile(r"\d+%\||\d+(?:it|batch)?/\S+ \[\d+:\d+")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
KEPT_METADATA = ("tags", "jupyter")


class ThisInterpreter(KernelSpecManager):
    """The kernel is the Python that runs this file, whatever kernels are registered on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class Client(NotebookClient):
    """nbclient with that kernel, spoken to through files in `folder` where the system can (no ports to collide)."""

    folder = ""

    def create_kernel_manager(self):
        self.km = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
        if os.name == "posix" and len(self.folder) < 80:  # the system limits the length of such addresses
            self.km.transport, self.km.ip = "ipc", os.path.join(self.folder, "kernel")
        return self.km


@dataclass
class Job:
    """One notebook on its way.

    Attributes:
        path: the notebook; it is not changed. scale: "cpu" or "gpu", given to it as MINIGATED_SCALE.
        threads: OMP_NUM_THREADS of its kernel, or None for the library's own choice.
        cell: number of the code cell that runs, from 1; 0 before the first. cells: how many there are.
        times: seconds of each code cell done. started: time of the start of the running cell.
        notebook: the executed copy. error: what went wrong, in words.
    """

    path: Path
    scale: str = "cpu"
    threads: int | None = None
    cell: int = 0
    cells: int = 0
    times: list[float] = field(default_factory=list)
    started: float = 0.0
    notebook: nbformat.NotebookNode | None = None
    error: str | None = None
    client: Client | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    def stop(self) -> None:
        """Ends the kernel at once."""
        manager = self.client.km if self.client else None
        process = getattr(getattr(manager, "provisioner", None), "process", None)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


def environment(job: Job, settings: str) -> dict[str, str]:
    """Environment of a kernel; `settings` is an empty folder, so that no personal IPython profile takes part."""
    env = {**os.environ, "MINIGATED_SCALE": job.scale, "IPYTHONDIR": settings, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if job.threads is not None:
        env |= {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        env["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads of two kernels would fight for the cores
    return env


def execute(job: Job) -> Job:
    """Runs the notebook from top to bottom in a fresh kernel; fills `job` and stops at the first error."""
    job.notebook = nbformat.read(job.path, as_version=4)
    code = [(i, c) for i, c in enumerate(job.notebook.cells) if c.cell_type == "code"]
    job.cells = len(code)
    for _, cell in code:
        cell.outputs, cell.execution_count = [], None
    job.client = Client(
        job.notebook,
        timeout=None,
        startup_timeout=120,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(job.path.parent)}},
    )
    with tempfile.TemporaryDirectory(prefix="minigated-") as settings:
        job.client.folder = settings
        try:
            with job.client.setup_kernel(env=environment(job, settings), cleanup_kc=True):
                for number, (index, cell) in enumerate(code, start=1):
                    job.cell, job.started = number, time.monotonic()
                    if cell.source.strip():
                        job.client.execute_cell(cell, index, execution_count=number)
                    job.times.append(time.monotonic() - job.started)
        except CellExecutionError as error:
            job.error = _say(job, code[job.cell - 1][1].source, error.ename, error.evalue)
        except (DeadKernelError, RuntimeError) as error:
            source = code[job.cell - 1][1].source if job.cell else ""
            job.error = _say(job, source, "the kernel died", f"{error} (killed, or out of memory?)")
    tidy(job.notebook)
    return job


def _say(job: Job, source: str, kind: str, value: str) -> str:
    lines = source.strip().splitlines()
    shown = "\n".join(f"    {line}" for line in lines[:12]) + ("\n    ..." if len(lines) > 12 else "")
    value = ESCAPES.sub("", value).strip()
    return f"chapter {job.name}, code cell {job.cell} of {job.cells}:\n{shown}\n  {kind}: {value}"


# ---------------------------------------------------------------------------------------------- what is kept
def tidy(notebook: nbformat.NotebookNode) -> None:
    """Removes what changes from run to run or belongs to one machine: timings, progress bars, paths."""
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in KEPT_METADATA})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                _without_paths(output)
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    kept = {k: v for k, v in notebook.metadata.items() if k in ("jupytext", "minigated")}
    notebook.metadata = nbformat.from_dict({**kept, "kernelspec": kernel, "language_info": language})


def _is_progress(output) -> bool:
    lines = [line for line in output.get("text", "").splitlines() if line.strip()]
    return output.get("name") == "stderr" and all(PROGRESS_BAR.search(line) for line in lines)


def _without_paths(output) -> None:
    folders = (f"{ROOT}{os.sep}", f"{Path(sys.prefix)}{os.sep}", f"{Path.home()}{os.sep}")
    data = output.get("data", {})
    holders = [(output, "text"), *((data, kind) for kind in data if kind.startswith("text/"))]
    for holder, key in holders:
        for folder in folders:
            if key in holder and folder != os.sep:
                holder[key] = holder[key].replace(folder, "")


def stamp(job: Job, origin: str, key: str | None = None) -> None:
    """Notes in the notebook which run its outputs come from; the site prints it under the title."""
    run = {
        "origin": origin,
        "device": device(job),
        "scale": job.scale,
        "torch": importlib.metadata.version("torch").split("+")[0],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(sum(job.times), 1),
    }
    if key:
        run |= {"key": key, "cell_seconds": [round(t, 2) for t in job.times]}
    job.notebook.metadata["minigated"] = {**job.notebook.metadata.get("minigated", {}), "run": run}


def device(job: Job) -> str:
    """The device's name; a GPU is looked for only where the run may use one."""
    if job.scale == "gpu":
        import torch  # seconds to import, so only here

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    threads = job.threads or os.cpu_count()
    return f"CPU ({platform.machine()}), {threads} thread{'s' if threads != 1 else ''}"


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Writes atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def sources_key(path: Path, scale: str) -> str:
    """Hash of everything that a chapter's outputs depend on: its cells, the package, records, exercises, versions."""
    digest = hashlib.sha256()
    for cell in nbformat.read(path, as_version=4).cells:
        digest.update(f"{cell.cell_type}\0{cell.source}\0".encode())
    files = [*ROOT.glob("minigated/**/*.py"), *ROOT.glob("docs/results/*.json"), *ROOT.glob("exercises/*/*.py")]
    for file in sorted(files):
        digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    digest.update(f"{scale} {platform.python_version()} {importlib.metadata.version('torch')}".encode())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--in-place", action="store_true", help="write the outputs back (refused above 600 KB)")
    options = parser.parse_args(arguments)
    failed = 0
    for path in options.notebooks:
        print(f"{path.stem} ...", flush=True)
        job = execute(Job(path.resolve(), options.scale))
        stamp(job, "committed")
        size = len(nbformat.writes(job.notebook).encode())
        if not job.error and options.in_place and size > LIMIT:
            job.error = f"{path} would weigh {size:,} bytes with its outputs; accepted: {LIMIT:,} or less"
        if job.error:
            failed += 1
            print(f"error: {job.error}", file=sys.stderr)
        target = path if options.in_place and not job.error else ROOT / "build" / "executed" / path.name
        write(job.notebook, target)
        print(f"{path.stem}: {sum(job.times):.0f} s, {size / 1000:.0f} KB, written to {target}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
