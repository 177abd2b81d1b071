"""Lets `import torchvision` work beside a torch without CUDA.

Some torchvision builds carry operators compiled for a CUDA torch. Beside a CPU-only torch these do not
load, and the import itself fails with "operator torchvision::nms does not exist". Declaring what two
operators look like is enough for transforms, datasets, utilities and classifiers. `torchvision.ops.nms`,
the detection models and `torchvision.io` stay without an implementation and say so when called.
"""

import importlib
import importlib.util
import sys

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("nms", "qnms")


def prepare_torchvision() -> bool:
    """Makes sure that `import torchvision` works, and with it timm and the vision half of transformers.

    Returns:
        True if the declarations were needed and made; False where torchvision imports by itself, was
        imported before, or is not installed: then nothing is touched.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    for operator in OPERATORS:
        torch.library.define(f"torchvision::{operator}", SCHEMA)
    importlib.import_module("torchvision")
    return True
