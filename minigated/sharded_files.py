"""Checkpoints of a model that is spread over processes, by `torch.distributed.checkpoint`.

    out/checkpoints/step_000100/shares/__0_0.distcp   what process 0 held: weights and moments; one file a process
                                shares/.metadata      which rows of which tensor stand where
                                training.pt, config.json   as in `minigated.checkpoint`

Every process writes what it holds, and no process ever holds everything. As tensors are found by name and row, another
number of processes can go on from it, one included. The folder must be one that all processes see.
"""

import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as layout
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from minigated import checkpoint
from minigated.distributed import World, from_all, leader_does
from minigated.errors import InputError

FOLDER = Path(checkpoint.SHARES).parent


# ----------------------------------------------------------------------------------------------------- saving
def save_shares(
    out: str | Path, step: int, model: nn.Module, optimizer, train: dict, training: dict, world: World
) -> Path:
    """`checkpoint.save_checkpoint` by all processes together; the optimizer's state goes into the shares too.

    The folder gets its name from process 0 when all have written all. Until then the older checkpoints are untouched,
    and an error in any process leaves them as they were.
    """
    config = {"step": step, **checkpoint.describe(model), "train": train}
    partial = leader_does(lambda: checkpoint.begin(out, step), world)
    try:
        _, weights, moments = _state(model, optimizer)
        writer = ShareWriter(partial / FOLDER, single_file_per_rank=True, sync_files=True)
        dcp.save({**weights, **moments}, storage_writer=writer)  # an error in one process is raised in all
        own = checkpoint.hashes(partial, f"{FOLDER}/__{world.rank}_*")  # each its own: nobody reads everything
        files = {name: file for part in from_all(own, world) for name, file in part.items()}
        return leader_does(
            lambda: checkpoint.finish(
                partial, config, training, {**files, **checkpoint.hashes(partial, checkpoint.SHARES)}
            ),
            world,
        )
    except BaseException:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _state(model: nn.Module, optimizer) -> tuple[dict, dict, dict]:
    """The optimizer's state dict as torch nests it, then weights and moments under flat names."""
    weights, nested = get_state_dict(model, optimizer)
    moments = {
        f"optimizer.{name}.{what}": value
        for name, values in nested["state"].items()
        for what, value in values.items()
    }
    return nested, {f"model.{name}": value for name, value in weights.items()}, moments


# ---------------------------------------------------------------------------------------------------- reading
def load_shares(model: nn.Module, folder: Path, optimizer=None) -> None:
    """Fills `model`, and `optimizer` where given, from a checkpoint in shares; either may be spread or not.

    Raises:
        InputError: the shares cannot be read, or are those of another model; names the first parameter that differs.
    """
    reader = ShareReader(folder / FOLDER)
    _refuse_other_weights(model, reader.read_metadata(), folder)
    if optimizer is None:
        _read({f"model.{name}": value for name, value in model.state_dict().items()}, reader, folder)  # in place
        return
    nested, weights, moments = _state(model, optimizer)
    _read({**weights, **moments}, reader, folder)
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=nested)


def _read(state: dict, reader: "ShareReader", folder: Path) -> None:
    try:
        with warnings.catch_warnings():  # that one process may read alone is meant
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, OSError, dcp.api.CheckpointException) as error:
        raise InputError(f"{folder / FOLDER} cannot be read: {str(error).splitlines()[0]}") from error


def _refuse_other_weights(model: nn.Module, found: layout.Metadata, folder: Path) -> None:
    there = {
        name.removeprefix("model."): list(value.size)
        for name, value in found.state_dict_metadata.items()
        if name.startswith("model.")
    }
    here = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            shapes = [held.get(name, "missing") for held in (there, here)]
            raise InputError(f"{folder} holds another model: {name} is {shapes[0]} in the files and {shapes[1]} here")


class ShareWriter(dcp.FileSystemWriter):
    """Leaves out where the files were first written: the folder gets another name, and Python's versions write paths
    in different ways."""

    def storage_meta(self) -> layout.StorageMeta:
        """Of the .metadata file."""
        return layout.StorageMeta()


class ShareReader(dcp.FileSystemReader):
    """Reads shares without running code from them.

    torch's own reader unpickles whatever stands in .metadata, and values that are not tensors. This one makes objects
    of a few classes that only hold data, and takes tensors alone.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.file = path / ".metadata"

    def read_metadata(self, *args, **kwargs) -> layout.Metadata:
        """Which rows of which tensor stand where."""
        try:
            with open(self.file, "rb") as stream:
                found = _DataOnly(stream).load()
            fine = all(isinstance(v, layout.TensorStorageMetadata) for v in found.state_dict_metadata.values())
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
            raise InputError(f"{self.file} cannot be read: {error}") from error
        if not fine:
            raise InputError(f"{self.file} cannot be read: it lists something that is no tensor")
        found.storage_meta = found.storage_meta or layout.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _DataOnly(pickle.Unpickler):
    """Knows the classes of a .metadata file and no function."""

    names = {
        "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
        "torch.serialization": {"_get_layout"},
        layout.__name__: {
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
            *("StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }

    def find_class(self, module: str, name: str):
        if name not in self.names.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


# ------------------------------------------------------------------------------------- from one process's file
def load_into_shares(model: nn.Module, optimizer, weights: dict, moments: dict) -> None:
    """Fills a spread model and its optimizer from what one process had saved whole.

    Args:
        weights: {name: tensor}.
        moments: the "state" of the optimizer's own state dict, by the parameters' numbers.
    """
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=whole)
    names = {id(value): name for name, value in model.named_parameters()}
    numbered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    nested = get_optimizer_state_dict(model, optimizer)
    nested["state"] = {numbered[number]: values for number, values in moments.items()}
    set_optimizer_state_dict(model, optimizer, nested, options=whole)
