"""Each case runs in a fresh interpreter with its own small torchvision: an import cannot be taken back."""

import subprocess
import sys

REPORT = """
import sys, torch
from minigated.torchvision_cpu import prepare_torchvision
declared = prepare_torchvision()
again = prepare_torchvision()
print(declared, again, hasattr(torch.ops.torchvision, "nms"), "torchvision" in sys.modules)
"""
WORKS = "answer = 42\n"
NEEDS_OPERATORS = """
import torch
import torchvision.part  # stays in sys.modules when the lines below fail
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: dets)
"""
FAILS_OTHERWISE = "raise RuntimeError('another build problem')\n"


def run(folder, code, source=None):
    if source is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(source)
        (folder / "torchvision" / "part.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_declares_the_operators_where_the_import_fails_for_want_of_them(tmp_path):
    broken = run(tmp_path, "import torchvision", NEEDS_OPERATORS)
    assert "operator torchvision::nms does not exist" in broken.stderr  # fails as the real one does
    assert run(tmp_path, REPORT).stdout.split() == ["True", "False", "True", "True"]


def test_does_nothing_where_torchvision_imports_by_itself(tmp_path):
    assert run(tmp_path, REPORT, WORKS).stdout.split() == ["False", "False", "False", "True"]


def test_leaves_other_failures_alone(tmp_path):
    done = run(tmp_path, REPORT, FAILS_OTHERWISE)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("RuntimeError: another build problem")


def test_the_installed_torchvision_transforms_an_image_afterwards(tmp_path):
    code = """
from minigated.torchvision_cpu import prepare_torchvision
prepare_torchvision()
import torch
from torchvision.transforms import v2
print(tuple(v2.Resize((4, 6))(torch.zeros(3, 8, 8)).shape))
"""
    done = run(tmp_path, code)
    assert done.stdout.strip() == "(3, 4, 6)", done.stderr[-2000:]
