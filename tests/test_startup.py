"""Start-up: what `import minigated` costs beyond torch, and that nothing wakes the GPU before it is asked for.

test_cli.py holds that heavy libraries stay out of an import; this file holds the clock to it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.5  # seconds beyond torch's own import
MODELS = "import minigated, minigated.lm, minigated.vit_sizes"


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def seconds_beyond_torch(statement: str, runs: int = 3) -> float:
    """Least of some fresh processes, the processor's time: what else the machine does is not counted as ours."""
    code = f"import time; import torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    return min(float(said(code)) for _ in range(runs))


@pytest.mark.parametrize("statement", ["import minigated", MODELS])
def test_the_package_is_there_soon_after_torch(statement):
    assert seconds_beyond_torch(statement) < LIMIT


def test_a_slow_import_would_be_seen():
    busy = "exec('while time.process_time() < start + 1.6: pass'); import minigated"
    assert seconds_beyond_torch(busy, runs=1) > LIMIT


WATCHED = (  # a machine without CUDA never initialises it, so the attempt is what is watched
    "import torch; tried = []; torch.cuda._lazy_init = lambda: tried.append(1); {what}; "
    "print(tried, torch.cuda.is_initialized())"
)


@pytest.mark.parametrize(
    "what",
    [
        "import minigated",
        MODELS,
        "import minigated.generate, minigated.static_cache, minigated.train, minigated.kernels",
        "from minigated.__main__ import main; main(['models'])",
        "from minigated.__main__ import main; main(['variants', '--json'])",
    ],
)
def test_cuda_is_left_alone(what):
    assert said(WATCHED.format(what=what)) == "[] False"


def test_an_awakened_gpu_would_be_seen():
    assert said(WATCHED.format(what="torch.cuda._lazy_init()")) == "[1] False"


def test_the_command_itself_runs():
    done = subprocess.run([sys.executable, "-m", "minigated", "models"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "lm_nano" in done.stdout and "swin_nano" in done.stdout, done.stderr
