"""Data parallel training with two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import ToyModel, toy_trainer

from minigated.checkpoint import list_checkpoints
from minigated.distributed import World, setup_distributed
from minigated.errors import InputError

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder in which two gloo processes on the loopback interface left their results."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    command += [str(TESTS / "distributed_worker.py"), str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    (out / "stdout").write_text(run.stdout)
    return out


@pytest.fixture(scope="module")
def one_process():
    """The same ten steps in this process."""
    model = ToyModel()
    for block in model.blocks:
        block.dropout.p = 0.0
    evaluate = lambda model: {"weight": model.head.weight.sum().item()}
    trainer = toy_trainer(model, evaluate=evaluate, eval_every=5)
    return trainer.run(), model.state_dict()


def left(folder: Path, name: str) -> list[dict]:
    return [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]


def difference(held: dict, result, weights) -> float:
    """The largest difference in losses and weights over ten steps."""
    apart = [(held["weights"][name] - value).abs().max().item() for name, value in weights.items()]
    assert len(held["losses"]) == len(result.losses) == 10
    return max(apart + [abs(a - b) for a, b in zip(held["losses"], result.losses)])


def test_two_processes_train_as_one(two_processes, one_process):
    for held in left(two_processes, "shares"):
        assert difference(held, *one_process) < 1e-5
        assert [row["step"] for row in held["evals"]] == [5, 10]
        assert held["evals"][-1]["weight"] == pytest.approx(one_process[0].evals[-1]["weight"], abs=1e-4)


def test_two_processes_on_the_same_share_do_not(two_processes, one_process):
    """The twin that shows the test above can fail."""
    assert difference(left(two_processes, "leaders_share")[0], *one_process) > 1e-3


def test_two_processes_resume_bit_for_bit(two_processes):
    for straight, resumed in zip(left(two_processes, "straight"), left(two_processes, "resumed")):
        assert straight["losses"] == resumed["losses"]
        for name, value in straight["weights"].items():
            assert torch.equal(value, resumed["weights"][name])


def test_ctrl_c_in_one_process_stops_both_at_the_same_step(two_processes):
    for held in left(two_processes, "asked"):
        assert held["stopped"] == "interrupted" and len(held["losses"]) == 5
    assert [p.name for p in list_checkpoints(two_processes / "interrupted")] == ["step_000005"]


def test_only_the_leader_speaks_and_saves(two_processes):
    said = (two_processes / "stdout").read_text()
    assert said.count("resuming") == 1
    assert [p.name for p in list_checkpoints(two_processes / "run")] == ["step_000005", "step_000010"]


def test_alone_there_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert setup_distributed("cpu") == World(0, 1, 0) and not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="WORLD_SIZE is None"):
        setup_distributed("cpu")
