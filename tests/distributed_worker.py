"""Started by torchrun from test_distributed.py: trains the toy model and leaves results in a folder."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from toy_training import ToyModel, toy_batch, toy_trainer


def without_dropout() -> ToyModel:
    model = ToyModel(seed=dist.get_rank() if dist.is_initialized() else 0)  # the leader's weights must win
    for block in model.blocks:
        block.dropout.p = 0.0
    return model


def leave(trainer, result, path: Path) -> None:
    """Every process writes what it ended with."""
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    held = {"losses": result.losses, "evals": result.evals, "stopped": result.stopped or "", "weights": weights}
    torch.save(held, path.with_name(f"{path.name}_{trainer.world.rank}.pt"))


def main(out: Path) -> None:
    evaluate = lambda model: {"weight": model.head.weight.sum().item()}
    settings = {"evaluate": evaluate, "eval_every": 5}
    trainer = toy_trainer(without_dropout(), out=out / "run", save_every=5, **settings)
    assert trainer.world.size == 2
    leave(trainer, trainer.run(), out / "shares")
    same_share = lambda step, rank, world: toy_batch(step, 0, world)
    trainer = toy_trainer(without_dropout(), batch_at=same_share, **settings)
    leave(trainer, trainer.run(), out / "leaders_share")
    # With dropout, each process has random numbers of its own: they too must come back.
    trainer = toy_trainer()
    leave(trainer, trainer.run(), out / "straight")
    toy_trainer(out=out / "stop").run(until=5)
    trainer = toy_trainer(out=out / "stop", resume=True)
    leave(trainer, trainer.run(), out / "resumed")

    def interrupted(step, rank, world):
        if (step, rank) == (4, 1):  # only one process is asked to stop, both must
            os.kill(os.getpid(), signal.SIGINT)
        return toy_batch(step, rank, world)

    trainer = toy_trainer(batch_at=interrupted, out=out / "interrupted")
    leave(trainer, trainer.run(), out / "asked")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
