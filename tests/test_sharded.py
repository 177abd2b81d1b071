"""Training spread over two and four real processes, and what its checkpoints are good for."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_worker import clipped, evaluate, moe_trainer, still_model
from torch.utils._pytree import tree_map
from toy_training import ToyModel, toy_trainer

from minigated import checkpoint, commands
from minigated.__main__ import main
from minigated.checkpoint import list_checkpoints, load_model, newest_good
from minigated.device import micro_batches
from minigated.errors import InputError
from minigated.sharded import hand_on_lists
from minigated.sharded_files import ShareReader, load_shares

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Path:
    """The folder in which worlds of two and four gloo processes left their results; one launch for all tests."""
    out = tmp_path_factory.mktemp("worlds")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, str(TESTS / "sharded_worker.py"), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    (out / "stdout").write_text(run.stdout)
    (out / "stderr").write_text(run.stderr)
    return out


def trained(trainer) -> tuple:
    return trainer.run(), trainer.model.state_dict()


@pytest.fixture(scope="module")
def alone():
    """The same ten steps in this process."""
    return trained(toy_trainer(still_model(), evaluate=evaluate, eval_every=5))


def left(folder: Path, name: str) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}_[0-9].pt"))]


def difference(held: dict, result, weights) -> float:
    """The largest difference in losses and weights."""
    assert len(held["losses"]) == len(result.losses) and held["weights"].keys() == weights.keys()
    apart = [(held["weights"][name] - value).abs().max().item() for name, value in weights.items()]
    return max(apart + [abs(a - b) for a, b in zip(held["losses"], result.losses)])


# ------------------------------------------------------------------------------------------------- the same training
@pytest.mark.parametrize("name, processes", [("two", 2), ("four", 4), ("two_parts", 2), ("two_ddp_parts", 2)])
def test_spread_or_in_parts_trains_as_one_process_does(worlds, alone, name, processes):
    assert len(left(worlds, name)) == processes
    for held in left(worlds, name):
        assert difference(held, *alone) < 1e-5
        assert held["evals"] == left(worlds, name)[0]["evals"]
        assert held["evals"][-1]["loss"] == pytest.approx(alone[0].evals[-1]["loss"], abs=1e-4)


def test_the_norm_that_clips_is_that_of_all_shares(worlds):
    """By gradients: AdamW's step hardly knows their scale, so training would not show it."""
    expected = clipped(toy_trainer(still_model()))
    assert expected["norm"] > 0.1
    for held in left(worlds, "two_clipped"):
        torch.testing.assert_close(held["norm"], expected["norm"], atol=1e-6, rtol=0)
        torch.testing.assert_close(held["grads"], expected["grads"], atol=1e-6, rtol=0)


def test_a_tied_weight_stays_one_weight(worlds):
    tied = trained(toy_trainer(still_model(tied=True)))
    for held in left(worlds, "two_tied"):
        assert difference(held, *tied) < 1e-5
        assert torch.equal(held["weights"]["head.weight"], held["weights"]["embedding.weight"])


def test_buffers_end_as_the_leaders(worlds):
    assert [held["weights"]["seen"].tolist() for held in left(worlds, "two_counting")] == [[1.0, 1.0]] * 2


def test_a_list_to_be_filled_is_not_lost_in_a_copy():
    """Some versions of torch copy the arguments of a spread module; here a hook does, whatever the version."""

    class Fills(torch.nn.Module):
        def forward(self, x, found, also):
            found.append(x)
            also.append(x)
            return x

    def lengths(module) -> list[int]:
        module.register_forward_pre_hook(lambda _, *given: tree_map(lambda value: value, given), with_kwargs=True)
        found, also = [], []
        (hand_on_lists(module) if kept else module)(torch.ones(1), found, also=also)
        return [len(found), len(also)]

    for kept in (False, True):
        assert lengths(Fills()) == [kept, kept]


@pytest.mark.parametrize("name", ["moe_ddp", "moe_fsdp"])
def test_balance_over_two_processes_is_that_of_the_whole_batch(worlds, name):
    whole = trained(moe_trainer())
    assert difference(left(worlds, name)[0], *whole) < 1e-5
    assert difference(left(worlds, "moe_apart")[0], *whole) > 1e-4  # each by itself is another loss


# ------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name", ["two_to_four", "four_to_two", "ddp_to_four"])
def test_another_number_of_processes_goes_on(worlds, alone, name):
    for held in left(worlds, name):
        assert difference(held, *alone) < 1e-5
        assert [row["step"] for row in held["evals"]] == [5, 10]
    assert (worlds / "stdout").read_text().count(f"resuming {worlds / name}") == 1


def test_one_process_goes_on_from_four(worlds, alone, tmp_path, capsys):
    shutil.copytree(worlds / "four_to_one", tmp_path, dirs_exist_ok=True)
    trainer = toy_trainer(ToyModel(seed=3), out=tmp_path, resume=True)
    for block in trainer.model.blocks:
        block.dropout.p = 0.0
    result, weights = trained(trainer)
    assert trainer.saved.name == "step_000010" and (trainer.saved / "model.safetensors").exists()
    assert difference({"losses": result.losses, "weights": weights}, *alone) < 1e-5
    assert "processes 4, fsdp and goes on on cpu, float32, compile none, processes 1" in capsys.readouterr().out


def test_a_spread_run_leaves_a_model_that_loads(worlds):
    weights = left(worlds, "moe_fsdp")[0]["weights"]
    assert sorted(p.name for p in list_checkpoints(worlds / "moe")[-1].iterdir()) == [
        "config.json", "shares", "training.pt"
    ]  # fmt: skip
    model = load_model(worlds / "moe")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_share_that_cannot_be_written_spares_the_older_checkpoint(worlds):
    for rank in (0, 1):
        assert "the disk is full" in (worlds / f"full_{rank}").read_text()
    assert [p.name for p in (worlds / "full" / "checkpoints").iterdir()] == ["step_000005"]
    load_shares(still_model(), list_checkpoints(worlds / "full")[-1])


def test_a_damaged_share_is_set_aside(worlds, tmp_path):
    shutil.copytree(worlds / "from_two", tmp_path, dirs_exist_ok=True)
    share = tmp_path / "checkpoints" / "step_000010" / "shares" / "__1_0.distcp"
    share.write_bytes(share.read_bytes()[:-1])
    said = []
    assert newest_good(tmp_path, said.append).name == "step_000005"
    assert "__1_0.distcp is damaged" in said[0]


def test_shares_of_another_model_are_refused(worlds):
    folder = list_checkpoints(worlds / "from_two")[-1]
    with pytest.raises(InputError, match=r"embedding.weight is \[11, 8\] in the files and \[11, 6\] here"):
        load_shares(ToyModel(6), folder)


def test_nothing_in_the_shares_can_run(worlds, tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(InputError, match=r"\.metadata cannot be read: it asks for \w+.system"):
        ShareReader(tmp_path).read_metadata()
    found = ShareReader(list_checkpoints(worlds / "from_two")[-1] / "shares").read_metadata()
    found.state_dict_metadata["extra"] = {"not": "a tensor"}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(InputError, match="no tensor"):
        ShareReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------- disagreement
def test_processes_that_disagree_leave_with_one_line_and_status_two(worlds):
    lines = (worlds / "stderr").read_text().splitlines()
    assert lines.count("statuses [2, 2]") == 3
    said = [line for line in lines if not line.startswith("statuses")]
    assert said == [
        f"error: the processes disagree: {what}; give all of them the same settings"
        for what in (
            "rate is 0.5 in process 0 and 0.25 in process 1",
            "the shape of embedding.weight is [11, 8] in process 0 and [11, 6] in process 1",
            "batch is 4 in process 0 and 8 in process 1",
        )
    ]


# ------------------------------------------------------------------------------------------------- micro-batches
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_train_as_the_whole_batch_does(parts):
    whole, cut = (trained(toy_trainer(still_model(), accumulate=n)) for n in (1, parts))
    assert difference({"losses": cut[0].losses, "weights": cut[1]}, *whole) < 1e-6


def test_gradients_of_micro_batches_are_those_of_the_whole_batch():
    grads = []
    for parts in (1, 4):
        trainer, seen = toy_trainer(still_model(), accumulate=parts, clip=0.0), []
        parameters = list(trainer.model.parameters())
        look = lambda *_, seen=seen, parameters=parameters: seen.extend(p.grad.clone() for p in parameters)
        trainer.optimizer.register_step_pre_hook(look)
        trainer.run(until=1)
        grads.append(seen)
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(whole, cut, atol=1e-6, rtol=0)


def test_experts_are_balanced_over_the_micro_batches_so_far():
    """An approximation, so near to the whole batch and not equal to it; the last micro-batch sees all counts."""
    whole, cut = (trained(moe_trainer(accumulate=n))[0].losses for n in (1, 2))
    assert whole[0] == pytest.approx(cut[0], rel=0.02) and whole[0] != cut[0]


def test_the_command_counts_over_its_micro_batches(monkeypatch):
    losses = []

    def trainer(model, loss, *rest):
        losses.append(loss)
        raise InputError("seen")

    monkeypatch.setattr(commands, "Trainer", trainer)
    assert main(["train", "moe_nano", "--context", "16", "--batch", "4", "--accumulate", "2", "--device", "cpu"]) == 2
    assert losses[0].running.micro_batches == 2


def test_micro_batches_keep_the_form_of_a_batch_and_refuse_a_bad_cut():
    rows, labels = torch.arange(12).view(6, 2), torch.arange(6)
    first, second = micro_batches({"x": rows, "y": (labels, labels)}, 2)
    assert torch.equal(first["x"], rows[:3]) and torch.equal(second["y"][1], labels[3:])
    with pytest.raises(InputError, match="accumulate is 4 and this process has 6 rows .*; accepted: 1, 2, 3, 6"):
        micro_batches(rows, 4)
    with pytest.raises(InputError, match=r"one tensor is \[2\] where the first has 6 rows"):
        micro_batches((rows, labels[:2]), 2)
    with pytest.raises(InputError, match="accumulate is 0"):
        toy_trainer(accumulate=0)
    with pytest.raises(InputError, match="parallel training 'zero'; accepted: ddp, fsdp"):
        toy_trainer(parallel="zero")


def test_a_run_from_before_these_settings_can_be_resumed(tmp_path):
    toy_trainer(out=tmp_path).run(until=5)
    path = list_checkpoints(tmp_path)[0] / checkpoint.CONFIG
    config = json.loads(path.read_text())
    del config["train"]["accumulate"], config["train"]["parallel"]
    path.write_text(json.dumps(config))
    assert toy_trainer(out=tmp_path, resume=True, parallel="fsdp").step == 5
    with pytest.raises(InputError, match="accumulate was 1 in the saved run and is 2 now"):
        toy_trainer(out=tmp_path, resume=True, accumulate=2)
