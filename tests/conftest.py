"""Fixtures that several test files share."""

import importlib

import pytest
import torch

from minigated.torchvision_cpu import prepare_torchvision

DEVICES = ["cpu"] + ([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """The CPU, and once more the GPU on a machine that has one."""
    return request.param


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's library, imported on first use: it imports torchvision, which may need help first."""
    prepare_torchvision()
    return importlib.import_module("transformers")
