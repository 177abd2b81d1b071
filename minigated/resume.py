"""How a run leaves its state in a folder and takes it up again: the bridge from `Trainer` to checkpoints."""

import dataclasses
from pathlib import Path

import torch

from minigated import checkpoint, device
from minigated.distributed import from_all, from_leader
from minigated.errors import InputError
from minigated.progress import Clock
from minigated.recipe import refuse_changes
from minigated.weights import fitting_weights


def open_folder(trainer) -> None:
    """Makes sure the output folder can be used, and takes up the run in it if that is asked for.

    Raises:
        InputError: not writable; a run is in it and nobody asked to resume; what is in it does not fit.
    """
    config, found = trainer.config, None
    if trainer.world.leads:
        there = checkpoint.list_checkpoints(config.out)
        if there and not config.resume:
            raise InputError(
                f"{config.out} already holds a run ({there[-1].name}); resume it, or choose another folder"
            )
        checkpoint.require_writable(config.out)
        found = checkpoint.newest_good(config.out, trainer.progress.say) if config.resume else None
    found = from_leader(found, trainer.world)
    if found is not None:
        restore(trainer, found)
    elif config.resume:
        trainer.progress.say(f"no checkpoint in {config.out} to resume from: starting from step 0")


def save(trainer) -> Path:
    """Writes a checkpoint of the run as it stands after `trainer.step` steps; the leading process writes."""
    random = from_all(device.random_state(trainer.device), trainer.world)
    folder = None
    if trainer.world.leads:
        training = {
            "losses": trainer.losses,
            "evals": trainer.evals,
            "tokens": trainer.tokens,
            "seconds": trainer.clock.read(),
            "eval_seconds": trainer.eval_seconds,
            "random": random,  # of every process, by rank
            "optimizer": trainer.optimizer.state_dict()["state"],
            "place": place(trainer),
        }
        train = dataclasses.asdict(trainer.config)
        folder = checkpoint.save_checkpoint(trainer.config.out, trainer.step, trainer.model, train, training)
    return from_leader(folder, trainer.world)


def restore(trainer, folder: Path) -> None:
    """Puts a new trainer to where `folder` was saved; refuses another model or another recipe."""
    saved, training = checkpoint.read_config(folder), checkpoint.read_training(folder)
    weights = fitting_weights(trainer.model, folder / checkpoint.WEIGHTS)
    checkpoint.refuse_other_model(trainer.model, folder, saved)
    refuse_changes(saved["train"], trainer.config)
    trainer.model.load_state_dict(weights)
    # The groups are today's: they say which kernel this device uses.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": training["optimizer"], "param_groups": groups})
    trainer.step, trainer.saved = saved["step"], folder
    trainer.losses, trainer.evals = training["losses"], training["evals"]
    trainer.tokens, trainer.clock = training["tokens"], Clock(training["seconds"])
    trainer.eval_seconds = training["eval_seconds"]
    states = training["random"]
    trainer.random = states[trainer.world.rank] if trainer.world.rank < len(states) else None
    trainer.progress.say(f"resuming {folder} at step {trainer.step} of {trainer.config.steps}")
    if training["place"] != place(trainer):
        trainer.progress.say(
            f"it was saved on {training['place']} and goes on on {place(trainer)}: not bit for bit the same"
        )


def place(trainer) -> str:
    """What must be the same for the same bits."""
    kind, processes = trainer.device.type, trainer.world.size
    return f"{kind}, {trainer.precision}, compile {trainer.compile}, processes {processes}"


def all_finite(model: torch.nn.Module) -> bool:
    """Whether every weight is a finite number; one answer from the device for all of them."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())
