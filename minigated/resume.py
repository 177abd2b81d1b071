"""How a run leaves its state in a folder and takes it up again: the bridge from `Trainer` to checkpoints."""

import dataclasses
from pathlib import Path

from minigated import checkpoint, device
from minigated.distributed import from_all, leader_does
from minigated.errors import InputError
from minigated.progress import Clock
from minigated.recipe import refuse_changes
from minigated.weights import fitting_weights


def open_folder(trainer) -> None:
    """Makes sure the output folder can be used, and takes up the run in it if that is asked for.

    Raises:
        InputError: not writable; a run is in it and nobody asked to resume; what is in it does not fit.
    """
    config = trainer.config
    found = leader_does(lambda: _prepare(trainer), trainer.world)
    if found is not None:
        restore(trainer, found)
    elif config.resume:
        trainer.progress.say(f"no checkpoint in {config.out} to resume from: starting from step 0")


def _prepare(trainer) -> Path | None:
    """The leader's part of `open_folder`: the checkpoint to go on from, None to start."""
    config = trainer.config
    there = checkpoint.list_checkpoints(config.out)
    if there and not config.resume:
        raise InputError(f"{config.out} already holds a run ({there[-1].name}); resume it, or choose another folder")
    checkpoint.require_writable(config.out)
    return checkpoint.newest_good(config.out, trainer.progress.say) if config.resume else None


def save(trainer) -> Path:
    """Writes a checkpoint of the run as it stands after `trainer.step` steps.

    The leading process writes; with parallel="fsdp" each writes what it holds.
    """
    training = {
        "losses": trainer.losses,
        "evals": trainer.evals,
        "tokens": trainer.tokens,
        "seconds": trainer.clock.read(),
        "eval_seconds": trainer.eval_seconds,
        "random": from_all(device.random_state(trainer.device), trainer.world),  # of every process, by rank
        "place": place(trainer),
    }
    where, model, train = (trainer.config.out, trainer.step), trainer.model, dataclasses.asdict(trainer.config)
    if trainer.sharded:
        from minigated.sharded_files import save_shares

        return save_shares(*where, model, trainer.optimizer, train, training, trainer.world)
    training["optimizer"] = trainer.optimizer.state_dict()["state"]
    return leader_does(lambda: checkpoint.save_checkpoint(*where, model, train, training), trainer.world)


def restore(trainer, folder: Path) -> None:
    """Puts a new trainer to where `folder` was saved; refuses another model or another recipe."""
    saved, in_shares = checkpoint.read_config(folder, verify=trainer.world.leads), checkpoint.is_sharded(folder)
    training = checkpoint.read_training(folder)
    if in_shares or trainer.sharded:
        from minigated import sharded_files  # a second to import, for those who need it
    if not in_shares:
        weights = fitting_weights(trainer.model, folder / checkpoint.WEIGHTS)
    checkpoint.refuse_other_model(trainer.model, folder, saved)
    refuse_changes(saved["train"], trainer.config)
    if in_shares:
        sharded_files.load_shares(trainer.model, folder, trainer.optimizer)
    elif trainer.sharded:
        sharded_files.load_into_shares(trainer.model, trainer.optimizer, weights, training["optimizer"])
    else:
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
    spread = ", fsdp" if trainer.sharded else ""
    return f"{kind}, {trainer.precision}, compile {trainer.compile}, processes {processes}{spread}"
