"""Reads a released model's folder: config.json, weights, tokenizer. Nothing in it can run code."""

import json
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minigated.errors import InputError
from minigated.interop.qwen import from_qwen3, from_qwen3_next, from_qwen_gated
from minigated.lm import LanguageModel

LOADERS = {"qwen2": from_qwen_gated, "qwen3": from_qwen_gated, "qwen3_moe": from_qwen3, "qwen3_next": from_qwen3_next}
SINGLE = ("model.safetensors", "pytorch_model.bin")
# the first that is there is read
WEIGHT_FILES = (SINGLE[0], f"{SINGLE[0]}.index.json", SINGLE[1], f"{SINGLE[1]}.index.json")


def load_checkpoint_folder(path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """Loads a local folder with a released Qwen model into this package.

    Args:
        path: a folder with config.json and one of `WEIGHT_FILES`. `model_type` "qwen2" and "qwen3" are read
            in the layout of the gated-attention release (which calls itself "qwen2", and whose baseline is
            plain Qwen3), "qwen3_next" in that of transformers.
        dtype: of the model; as stored (bfloat16 in the release) unless given.

    Returns:
        The model; `model.config.variant` is "none", "g1_headwise" or "g1_elementwise".

    Raises:
        InputError: for a missing or damaged file, a pickle of more than tensors, weights that do not fit.
    """
    config = read_config(path)
    family = config.get("model_type")
    if family not in LOADERS:
        raise InputError(f"{path}/config.json has model_type {family!r}; accepted: {', '.join(LOADERS)}")
    return LOADERS[family](read_weights(path), config, dtype)


def read_config(path: str | Path) -> dict:
    """config.json of the folder."""
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder")
    return _read_json(Path(path) / "config.json")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The folder's state dict on the CPU, memory-mapped where the format allows it."""
    folder = Path(path)
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{path} holds no weights; accepted: {', '.join(WEIGHT_FILES)}")
    if found in SINGLE:
        return _read_tensors(folder / found)
    shards = _read_json(folder / found).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{folder / found} has no weight_map from weights to files")
    state = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:  # the index is data: it may not point outside its folder
            raise InputError(f"{folder / found} names {name!r}; a file beside it is accepted")
        state |= _read_tensors(folder / name)
    return state


def load_tokenizer(path: str | Path):
    """The folder's tokenizer.json as a `tokenizers.Tokenizer`, for commands that read text."""
    try:
        from tokenizers import Tokenizer  # optional: only released models need it
    except ImportError as error:
        raise InputError("reading tokenizer.json needs a package: pip install tokenizers") from error
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the library raises the bare class
        raise InputError(f"{file} is not a tokenizer: {_first_line(error)}") from error


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # wrong JSON and wrong UTF-8 alike
        raise InputError(f"{file} is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}; a JSON object is accepted")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"{file} is missing")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only refuses everything but what rebuilds tensors; mapping memory needs the zip format
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} was refused: it is no plain file of tensors, and unpickling it could run code; "
            "safetensors, or a dict of tensors written by torch.save, is accepted"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{file} cannot be read: {_first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds other things than tensors; a state dict is accepted")
    return state


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
