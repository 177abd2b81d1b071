"""Started from test_sharded.py: trains small models in worlds of two and four processes, results into a folder."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401 - once, before forking
from forked_ranks import run_world
from torch.distributed.checkpoint.api import CheckpointException
from toy_training import ToyModel, toy_batch, toy_config, toy_loss, toy_trainer

from minigated import sharded_files
from minigated.__main__ import main as command
from minigated.lm import TrainingLoss, build_lm
from minigated.optimizer import clip_gradients
from minigated.sharded import whole
from minigated.train import Trainer

MOE = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "ffn_width": 8, "experts": 4, "top_k": 2}
MOE |= {"vocabulary": 16, "context": 8, "balance_weight": 1.0}


def still_model(seed: int = 0, **options) -> ToyModel:
    """The toy model without dropout."""
    model = ToyModel(seed=seed, **options)
    for block in model.blocks:
        block.dropout.p = 0.0
    return model


def moe_trainer(seed: int = 0, balance_scope: str = "global", **settings) -> Trainer:
    """A small mixture of experts, balanced over all processes' tokens unless told otherwise."""
    torch.manual_seed(seed)
    model = build_lm("moe_nano", **MOE, balance_scope=balance_scope)
    loss = TrainingLoss(settings.get("accumulate", 1))
    return Trainer(model, loss, toy_batch, toy_config(steps=3, **settings))


def leave(trainer: Trainer, path: Path, until: int | None = None) -> None:
    """Trains; every process then writes what it ended with."""
    result = trainer.run(until)
    weights = {name: whole(value).detach().clone() for name, value in trainer.model.state_dict().items()}
    held = {"losses": result.losses, "evals": result.evals, "weights": weights}
    torch.save(held, path.with_name(f"{path.name}_{trainer.world.rank}.pt"))


def clipped(trainer: Trainer) -> dict:
    """The first step's gradient norm, and the gradients after clipping."""
    trainer.objective(toy_batch(0, trainer.world.rank, trainer.world.size)).backward()
    norm = clip_gradients(trainer.model, 0.05)
    return {"norm": norm, "grads": [whole(p.grad).clone() for p in trainer.model.parameters()]}


def counting(rank: int) -> Trainer:
    """A model with a buffer that each process fills with something of its own."""
    model = still_model()
    model.register_buffer("seen", torch.zeros(2))

    def loss_fn(model, batch):
        model.seen.fill_(rank + 1.0)
        return toy_loss(model, batch)

    return toy_trainer(model, loss_fn=loss_fn, parallel="fsdp")


def evaluate(model) -> dict:
    return {"loss": model(toy_batch(99)).square().mean()}


def straight(rank: int, folder: Path, name: str, **settings) -> None:
    """Ten steps; the leader's weights must win over the others'."""
    settings = {"parallel": "fsdp", "evaluate": evaluate, "eval_every": 5, **settings}
    leave(toy_trainer(still_model(seed=rank), **settings), folder / name)


def two(rank: int, out: Path) -> None:
    """What two processes do."""
    straight(rank, out, "two", out=out / "from_two", save_every=5)
    straight(rank, out, "two_parts", accumulate=2)
    straight(rank, out, "two_ddp_parts", parallel="ddp", accumulate=2)
    torch.save(clipped(toy_trainer(still_model(seed=rank), parallel="fsdp")), out / f"two_clipped_{rank}.pt")
    leave(toy_trainer(still_model(seed=rank, tied=True), parallel="fsdp"), out / "two_tied")
    leave(counting(rank), out / "two_counting")
    leave(moe_trainer(seed=rank), out / "moe_ddp")
    leave(moe_trainer(seed=rank, parallel="fsdp", out=out / "moe"), out / "moe_fsdp")
    leave(moe_trainer(seed=rank, balance_scope="batch"), out / "moe_apart")
    straight(rank, out, "ddp", parallel="ddp", out=out / "from_ddp", save_every=5)


def four(rank: int, out: Path) -> None:
    """What four processes do after two: the same run, and the second half of theirs."""
    straight(rank, out, "four", out=out / "from_four", save_every=5)
    straight(rank, out, "two_to_four", out=out / "two_to_four", resume=True)
    straight(rank, out, "ddp_to_four", out=out / "ddp_to_four", resume=True)


def two_again(rank: int, out: Path) -> None:
    """What two processes do after four."""
    straight(rank, out, "four_to_two", out=out / "four_to_two", resume=True)
    spoilt_saving(rank, out)


def spoilt_saving(rank: int, out: Path) -> None:
    """Process 1 cannot write its share of the second checkpoint."""

    def full(writer, *plan):
        raise OSError("the disk is full")

    trainer = toy_trainer(still_model(), parallel="fsdp", out=out / "full", save_every=5)
    trainer.run(until=5)
    if rank == 1:
        sharded_files.ShareWriter.write_data = full
    try:
        trainer.run()
    except CheckpointException as error:
        (out / f"full_{rank}").write_text(str(error))


def disagreeing(rank: int, settings: list[dict], widths: list[int]) -> None:
    toy_trainer(ToyModel(widths[rank]), parallel="fsdp", **settings[rank])


def disagreeing_command(rank: int, batches: list[int]) -> None:
    """A Trainer is given batches and not their size, so the command must ask."""
    command(["train", "moe_nano", "--device", "cpu", "--batch", str(batches[rank])])


def first_half(out: Path, name: str, copy: str) -> None:
    """A folder with the run of another as it was after five steps."""
    for folder in (out / name / "checkpoints").glob("step_*5"):
        shutil.copytree(folder, out / copy / "checkpoints" / folder.name)


def main(out: Path) -> None:
    assert run_world(2, two, out) == [0, 0]
    first_half(out, "from_two", "two_to_four")
    first_half(out, "from_ddp", "ddp_to_four")
    assert run_world(4, four, out) == [0] * 4
    first_half(out, "from_four", "four_to_two")
    first_half(out, "from_four", "four_to_one")
    assert run_world(2, two_again, out) == [0, 0]
    for settings, widths in (([{"rate": 0.5}, {"rate": 0.25}], [8, 8]), ([{}, {}], [8, 6])):
        print("statuses", run_world(2, disagreeing, settings, widths), file=sys.stderr, flush=True)
    print("statuses", run_world(2, disagreeing_command, [4, 8]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
