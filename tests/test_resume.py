"""A run that goes on bit for bit, and all the ways in which it may have ended before."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import ToyModel, same_weights, spoiling, toy_batch, toy_config, toy_loss, toy_trainer

from minigated.errors import InputError


# ------------------------------------------------------------------------------------------------- resume
def check_resume(out, **settings):
    """Ten steps straight, ten with a stop after five, and ten after a crash in the seventh are the same bits."""
    evaluate = lambda model: {"weight": model.head.weight.sum().item()}
    settings = {"eval_every": 2, "evaluate": evaluate, **settings}
    straight = toy_trainer(**settings)
    whole = straight.run()

    toy_trainer(out=out / "stop", **settings).run(until=5)
    stopped = toy_trainer(out=out / "stop", resume=True, **settings)
    assert stopped.step == 5

    def crash(step, *where):
        if step == 7:
            raise OSError("the disk is gone")
        return toy_batch(step, *where)

    with pytest.raises(OSError):
        toy_trainer(batch_at=crash, out=out / "crash", save_every=3, **settings).run()
    crashed = toy_trainer(out=out / "crash", resume=True, save_every=3, **settings)
    assert crashed.step == 6
    for trainer in (stopped, crashed):
        result = trainer.run()
        assert result.losses == whole.losses and result.evals == whole.evals
        assert same_weights(trainer.model, straight.model)


def test_resume_continues_bit_for_bit(tmp_path, capsys):
    check_resume(tmp_path)
    assert "resuming" in capsys.readouterr().out


@pytest.mark.parametrize("compile", ["none", "blocks"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resume_continues_bit_for_bit_on_a_gpu(tmp_path, compile):
    check_resume(tmp_path, device="cuda", deterministic=True, compile=compile)


def test_trainer_goes_on_where_it_stopped():
    whole, parts = toy_trainer(), toy_trainer()
    losses = whole.run().losses
    assert len(parts.run(until=4).losses) == 4
    torch.rand(3)  # what the caller draws in between does not matter
    assert parts.run().losses == losses and same_weights(whole.model, parts.model)


def test_resume_with_nothing_there_says_so_and_starts(tmp_path, capsys):
    result = toy_trainer(out=tmp_path, resume=True).run()
    assert len(result.losses) == 10
    assert f"no checkpoint in {tmp_path} to resume from: starting from step 0" in capsys.readouterr().out


def test_resume_of_a_finished_run_trains_no_more(tmp_path):
    first = toy_trainer(out=tmp_path).run()
    again = toy_trainer(out=tmp_path, resume=True).run()
    assert again.losses == first.losses and again.compile_seconds == 0


def test_changed_recipe_is_refused_on_resume_and_reporting_is_free(tmp_path):
    toy_trainer(out=tmp_path).run(until=5)
    for field, value in (("steps", 12), ("rate", 0.5), ("betas", (0.8, 0.95)), ("clip", 2.0), ("seed", 3)):
        with pytest.raises(InputError) as refused:
            toy_trainer(out=tmp_path, resume=True, **{field: value})
        old = getattr(toy_config(), field)
        old, value = (list(v) if isinstance(v, tuple) else v for v in (old, value))
        assert f"{field} was {old!r}" in str(refused.value) and f"is {value!r} now" in str(refused.value)
    result = toy_trainer(out=tmp_path, resume=True, save_every=2, eval_every=3, name="other").run()
    assert len(result.losses) == 10


def test_folder_with_a_run_is_not_overwritten(tmp_path):
    toy_trainer(out=tmp_path).run()
    with pytest.raises(InputError, match="already holds a run"):
        toy_trainer(out=tmp_path)


def test_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InputError, match="cannot write to the output folder"):
        toy_trainer(out=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "here first"


# ------------------------------------------------------------------------------------------------- Ctrl-C
RUN_UNTIL_INTERRUPTED = """
import sys, time
from toy_training import toy_batch, toy_trainer

def batch_at(step, *where):
    print(f"fetched {step}", flush=True)
    time.sleep(0.05)
    return toy_batch(step, *where)

result = toy_trainer(batch_at=batch_at, steps=10_000, out=sys.argv[1]).run()
print("result", result.stopped, len(result.losses), flush=True)
sys.exit(130)
"""


def test_ctrl_c_in_a_process_saves_and_returns(tmp_path):
    tests = Path(__file__).parent
    command = [sys.executable, "-c", RUN_UNTIL_INTERRUPTED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **streams)
    for line in process.stdout:
        if line.startswith("fetched 4"):
            process.send_signal(signal.SIGINT)
            break
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Ctrl-C: stopping after this step" in output and "Traceback" not in output
    steps = int(re.search(r"result interrupted (\d+)", output)[1])
    assert 4 <= steps < 100
    assert f"interrupted after {steps} of 10000 steps; resume goes on from {tmp_path}" in output
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    resumed = toy_trainer(steps=10_000, out=tmp_path, resume=True)
    straight = toy_trainer(steps=10_000)
    assert resumed.run(until=steps + 2).losses == straight.run(until=steps + 2).losses


def interrupting(*steps):
    """Batches whose fetch sends this process a SIGINT at the given steps."""

    def batch_at(step, *where):
        if step in steps:
            os.kill(os.getpid(), signal.SIGINT)
        return toy_batch(step, *where)

    return batch_at


def test_first_ctrl_c_ends_the_step_and_puts_the_old_handler_back(capsys):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("old"))
    try:
        result = toy_trainer(batch_at=interrupting(4)).run()
        assert heard == []
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == ["old"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stopped == "interrupted" and len(result.losses) == 4
    assert "nothing saved" in result.message and result.message in capsys.readouterr().out


def test_second_ctrl_c_aborts_at_once():
    before = signal.getsignal(signal.SIGINT)

    def loss_fn(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on after the second signal")

    with pytest.raises(KeyboardInterrupt):
        toy_trainer(loss_fn=loss_fn).run()
    assert signal.getsignal(signal.SIGINT) is before


def test_validation_skipped_by_ctrl_c_is_made_up_on_resume(tmp_path):
    settings = {"eval_every": 4, "evaluate": lambda model: {"weight": model.head.weight.sum().item()}}
    whole = toy_trainer(**settings).run()
    first = toy_trainer(batch_at=interrupting(4), out=tmp_path, **settings).run()
    assert first.stopped == "interrupted" and first.evals == []
    assert toy_trainer(out=tmp_path, resume=True, **settings).run().evals == whole.evals


def test_training_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(toy_trainer().run()))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 10


# ------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("factor, number", [(float("nan"), "nan"), (float("inf"), "inf")])
def test_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path, capsys, factor, number):
    trainer = toy_trainer(loss_fn=spoiling(7, factor), out=tmp_path, save_every=3)
    result = trainer.run()
    assert result.stopped == "not finite" and len(result.losses) == 7
    expected = f"loss is {number} at step 7; the last good checkpoint is {tmp_path}/checkpoints/step_000006; "
    assert result.message.startswith(expected) and "smaller rate" in result.message
    assert result.message in capsys.readouterr().out
    resumed = toy_trainer(out=tmp_path, resume=True, save_every=3)
    assert resumed.step == 6 and all(p.isfinite().all() for p in resumed.model.parameters())
    with pytest.raises(RuntimeError, match="this run is over"):
        trainer.run()


def test_gradient_or_weight_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    class Spoil(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x.clone())
        backward = staticmethod(lambda context, grad: grad * float("nan"))

    count = iter(range(1000))

    def bad_gradient(model, batch):
        loss = toy_loss(model, batch)
        return Spoil.apply(loss) if next(count) == 5 else loss

    result = toy_trainer(loss_fn=bad_gradient, out=tmp_path / "gradient", save_every=2).run()
    assert "gradient norm is nan at step 5" in result.message and "step_000004" in result.message

    def bad_weight(model, batch):
        loss = toy_loss(model, batch)  # the spoilt weight is of no word that the batch holds
        model.unused.data.fill_(float("inf"))
        return loss

    model = ToyModel()
    model.unused = nn.Parameter(torch.zeros(1))
    result = toy_trainer(model, loss_fn=bad_weight, out=tmp_path / "weight", save_every=2).run()
    assert result.stopped == "not finite" and "a weight is not finite after step 1" in result.message
    assert result.checkpoint is None and list((tmp_path / "weight" / "checkpoints").iterdir()) == []
