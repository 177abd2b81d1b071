"""The weights of a model in one safetensors file, in which a tied weight stands once."""

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minigated.errors import InputError


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state dict; the names left out because they are tied stand in the file's metadata."""
    unique, tied = split_tied(model)
    save_file(unique, path, metadata={"format": "pt", "tied": json.dumps(tied)})


def split_tied(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict with each shared tensor once, and {name left out: name that holds it}."""
    first, unique, tied = {}, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        spread = hasattr(tensor, "to_local")  # its share may be empty, so the tensor itself says what is tied
        place = id(tensor) if spread else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            whole = spread or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            unique[name] = tensor.detach().contiguous() if whole else tensor.detach().clone()
    return unique, tied


def fitting_weights(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict that `model` can load as it is; the model is not touched.

    Raises:
        InputError: the file cannot be read, or it holds another model; names the first
            parameter that differs.
    """
    try:
        weights = load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    unique, own_ties = split_tied(model)
    for name, tensor in unique.items():
        here = f"{path} holds another model: {name} is {list(tensor.shape)} here"
        if name in tied:
            raise InputError(f"{here} and tied to {tied[name]} in the file")
        if name not in weights:
            raise InputError(f"{here} and missing in the file")
        if weights[name].shape != tensor.shape:
            raise InputError(f"{here} and {list(weights[name].shape)} in the file")
    for name in weights:
        if name not in unique:
            there = f"tied to {own_ties[name]}" if name in own_ties else "missing"
            shape = list(weights[name].shape)
            raise InputError(f"{path} holds another model: {name} is {shape} in the file and {there} here")
    if tied != own_ties:
        raise InputError(f"{path} holds another model: tied are {tied} in the file and {own_ties} here")
    return {**weights, **{name: weights[kept] for name, kept in tied.items()}}
