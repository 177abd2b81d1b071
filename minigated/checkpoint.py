"""Checkpoints that are whole or not there, and that no file can turn into running code.

    out/checkpoints/step_000100/model.safetensors   the weights; a tied weight stands once
                                training.pt         optimizer, losses, random states; tensors and plain values
                                config.json         how to build the model, how it was trained, hashes of both

A run that was spread over processes leaves the weights and the optimizer in shares/ instead: `sharded_files`.
A checkpoint is written into a folder of another name, which is renamed when everything is on the disk.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch import nn

from minigated.errors import InputError, one_of
from minigated.weights import fitting_weights, save_weights

KEPT = 2
WEIGHTS, TRAINING, CONFIG = "model.safetensors", "training.pt", "config.json"
SHARES = "shares/.metadata"  # stands in place of WEIGHTS after training with parallel="fsdp"
PARTIAL = ".partial_"

# How `load_model` builds what it finds: module, config class, model class. A model names its kind as `kind`.
KINDS: dict[str, tuple[str, str, str]] = {
    "lm": ("minigated.lm", "LMConfig", "LanguageModel"),
    "vit": ("minigated.vit", "ViTConfig", "VisionTransformer"),
}


# ---------------------------------------------------------------------------------------------------- folders
def checkpoints_folder(out: str | Path) -> Path:
    """Where the run of folder `out` keeps its checkpoints."""
    return Path(out) / "checkpoints"


def list_checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints of a run by step, oldest first; none if there are none."""
    found = [p for p in checkpoints_folder(out).glob("step_*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def require_writable(out: str | Path) -> None:
    """Makes the folder of a run and refuses, before any training, one that cannot be written."""
    folder = checkpoints_folder(out)
    probe = folder / f"{PARTIAL}probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the output folder {str(out)!r}: {error.strerror}") from error


# ----------------------------------------------------------------------------------------------------- saving
def save_checkpoint(out: str | Path, step: int, model: nn.Module, train: dict, training: dict) -> Path:
    """Writes one checkpoint and deletes all but the last two.

    Args:
        out: folder of the run.
        step: optimizer steps done.
        model: its `config` (a dataclass) and `kind`, where it has them, are written along.
        train: the training settings, JSON-able.
        training: what a resumed run needs; tensors, numbers, strings, lists and dicts only.

    Returns:
        The checkpoint's folder.
    """
    partial = begin(out, step)
    try:
        save_weights(model, partial / WEIGHTS)
        return finish(partial, {"step": step, **describe(model), "train": train}, training, hashes(partial, "*"))
    except BaseException:  # also Ctrl-C: nothing half-written is left behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(out: str | Path, step: int) -> Path:
    """An empty folder beside the checkpoints, to write the one of `step` into."""
    root = checkpoints_folder(out)
    for left_over in root.glob(f"{PARTIAL}*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    partial = root / f"{PARTIAL}step_{step:06d}"
    partial.mkdir(parents=True)
    return partial


def finish(partial: Path, config: dict, training: dict, files: dict) -> Path:
    """Adds the other two files, makes a checkpoint of `partial` by renaming it, and deletes all but the last two.

    Args:
        partial: from `begin`, with the weights in it.
        config: of config.json, without "files".
        training: of training.pt.
        files: `hashes` of what holds the weights.
    """
    torch.save(training, partial / TRAINING)
    config = {**config, "files": {**files, **hashes(partial, TRAINING)}}
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _flush(partial)
    root, target = partial.parent, partial.with_name(partial.name.removeprefix(PARTIAL))
    if target.exists():  # the same step again, after a resume from an earlier one
        target.rename(root / f"{PARTIAL}replaced")
    partial.rename(target)
    shutil.rmtree(root / f"{PARTIAL}replaced", ignore_errors=True)
    for old in list_checkpoints(root.parent)[:-KEPT]:
        shutil.rmtree(old)
    return target


def hashes(folder: Path, pattern: str) -> dict[str, dict]:
    """Size and sha256 of the files in `folder` that match `pattern`, by their names in it."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }


def describe(model: nn.Module) -> dict:
    """The model's kind and config as JSON-able values, None where it has none."""
    config = getattr(model, "config", None)
    known = dataclasses.is_dataclass(config) and not isinstance(config, type)
    fields = json.loads(json.dumps(dataclasses.asdict(config))) if known else None
    return {"kind": getattr(model, "kind", None), "model": fields}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Waits until the folder and its files are on the disk: a rename must not overtake them."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems cannot flush a folder
                os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------- reading
def is_sharded(folder: Path) -> bool:
    """Whether the weights of a checkpoint are in the shares of several processes, see `minigated.sharded_files`."""
    return (folder / SHARES).exists()


def read_config(folder: Path, verify: bool = True) -> dict:
    """config.json of a checkpoint, after all other files were found as they were written.

    Args:
        folder: the checkpoint.
        verify: False leaves the files alone; for processes whose leader has just looked at them.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        recorded = config["files"]
        needed = (SHARES if SHARES in recorded else WEIGHTS, TRAINING)
        files = {name: recorded[name] for name in (*needed, *(name for name in recorded if name not in needed))}
        files = {name: (file["bytes"], file["sha256"]) for name, file in files.items()}
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: not the JSON that a checkpoint holds ({error})") from error
    for name, (written, sha256) in files.items() if verify else ():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing")
        size = path.stat().st_size
        if size != written:
            raise InputError(f"{path} is damaged: {size} bytes, {written} were written")
        if _sha256(path) != sha256:
            raise InputError(f"{path} is damaged: its bytes are not those that were written (sha256 differs)")
    return config


def read_training(folder: Path) -> dict:
    """training.pt on the CPU; loaded as data, so nothing in it can run."""
    path = folder / TRAINING
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def refuse_other_model(model: nn.Module, folder: Path, config: dict) -> None:
    """Refuses a checkpoint whose weights would fit but whose model is another (a variant, a rotary base)."""
    here = describe(model)
    if config.get("kind") != here["kind"]:
        raise InputError(f"{folder} holds a model of kind {config.get('kind')!r}, not {here['kind']!r}")
    for field, value in (here["model"] or {}).items():
        saved = (config.get("model") or {}).get(field)
        if saved != value:
            raise InputError(f"{folder} holds another model: {field} is {saved!r} there and {value!r} here")


def newest_good(out: str | Path, say) -> Path | None:
    """The newest checkpoint of a run that is whole; None where there is none at all.

    A damaged one is not passed over in silence: `say` gets a line, and its folder is renamed to damaged_...,
    so that it neither counts as the newest again nor is lost.

    Raises:
        InputError: there are checkpoints and all of them are damaged.
    """
    damaged = []
    for folder in reversed(list_checkpoints(out)):
        try:
            read_config(folder)
            read_training(folder)
        except InputError as error:
            damaged.append((folder, error))
            continue
        for bad, error in damaged:
            aside = bad.with_name(f"damaged_{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            say(f"{error}; set aside as {aside.name}, going on from {folder}")
        return folder
    if damaged:
        raise InputError(f"{damaged[0][1]}; there is no earlier whole checkpoint to go on from")
    return None


def load_model(folder: str | Path) -> nn.Module:
    """Builds the model of a checkpoint and fills in its weights; on the CPU, in evaluation mode.

    Args:
        folder: of a run (its newest checkpoint is taken) or of one checkpoint.

    Raises:
        InputError: nothing there, damaged, or of a kind this version does not know.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        found = list_checkpoints(folder)
        if not found:
            raise InputError(f"no checkpoint in {str(folder)!r}; give a run's folder or a checkpoint's")
        folder = found[-1]
    config = read_config(folder)
    one_of(f"model kind in {folder / CONFIG}:", config.get("kind"), tuple(KINDS))  # a tuple takes what has no hash
    module, config_class, model_class = KINDS[config["kind"]]
    module = importlib.import_module(module)
    try:
        model = getattr(module, model_class)(getattr(module, config_class)(**config["model"]))
    except TypeError as error:
        kind = config["kind"]
        raise InputError(f"{folder / CONFIG} does not describe a model of kind {kind!r}: {error}") from error
    if is_sharded(folder):
        from minigated.sharded_files import load_shares

        load_shares(model, folder)
    else:
        model.load_state_dict(fitting_weights(model, folder / WEIGHTS))
    return model.eval()
