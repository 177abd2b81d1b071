"""The training loop: recipe, resume, interruption, numbers that are not finite, what is shown."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_training import ToyModel, same_weights, toy_batch, toy_config, toy_loss, toy_trainer

from minigated import device
from minigated.errors import InputError
from minigated.lm import build_lm, lm_loss
from minigated.optimizer import clip_gradients, parameter_groups
from minigated.recipe import TrainConfig
from minigated.train import Trainer, learning_rate


# ------------------------------------------------------------------------------------------------- the recipe
def test_rate_rises_linearly_then_falls_by_a_cosine_to_the_final_ratio():
    config = TrainConfig(steps=101, rate=1.0, warmup=20, final_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(1 / 20) and rates[9] == pytest.approx(0.5)
    assert rates[19] == rates[20] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half of the way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_rate_without_warm_up_starts_at_the_peak_and_with_warm_up_alone_ends_there():
    assert learning_rate(0, TrainConfig(steps=5, rate=3.0, warmup=0)) == 3.0
    assert learning_rate(4, TrainConfig(steps=5, rate=3.0, warmup=5)) == 3.0


def test_only_matrices_decay_and_a_tied_one_stands_once():
    decayed, spared = parameter_groups(ToyModel(tied=True), 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) == 3 and all(p.ndim == 2 for p in decayed["params"])
    assert len(spared["params"]) == 4 and all(p.ndim == 1 for p in spared["params"])


def test_clipping_bounds_the_global_norm_and_zero_switches_it_off():
    for clip, expected in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        model = nn.Linear(1, 1)
        model.weight.grad, model.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), 4.0)
        assert clip_gradients(model, clip).item() == pytest.approx(5.0)
        after = torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm().item()
        assert after == pytest.approx(expected, rel=1e-4)


def test_loop_equals_the_same_steps_written_out():
    config = toy_config(steps=4, rate=0.05, clip=0.5)
    trained, plain = ToyModel().eval(), ToyModel().eval()
    for model in (trained, plain):
        for block in model.blocks:
            block.dropout.p = 0.0
    result = Trainer(trained, toy_loss, toy_batch, config).run()
    groups = parameter_groups(plain, config.weight_decay)
    optimizer, losses = torch.optim.AdamW(groups, lr=1.0, betas=config.betas), []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.zero_grad()
        loss = toy_loss(plain, toy_batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), config.clip)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-6)
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, ["steps", "0", "at least 1"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"rate": 0.0}, ["rate", "0.0", "above 0"]),
        ({"rate": float("nan")}, ["rate", "nan"]),
        ({"betas": (0.9, 1.0)}, ["betas", "1.0"]),
        ({"warmup": 11}, ["warmup", "11", "10"]),
        ({"final_ratio": 1.5}, ["final_ratio", "1.5", "0 to 1"]),
        ({"clip": -1}, ["clip", "-1"]),
        ({"precision": "fp8"}, ["precision", "fp8", "float32"]),
        ({"compile": "all"}, ["compile", "all", "blocks"]),
        ({"save_every": 5}, ["save_every=5", "out"]),
        ({"resume": True}, ["resume", "out"]),
        ({"device": "tpu"}, ["device", "tpu", "cuda:N"]),
    ],
)
def test_impossible_settings_are_named_with_what_is_accepted(settings, words):
    with pytest.raises(InputError) as refused:
        toy_trainer(**settings)
    assert all(word in str(refused.value) for word in words), refused.value


def test_absent_gpu_is_refused_with_what_is_there():
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(InputError, match=f"{absent}.*there is: cpu"):
        toy_trainer(device=absent)


def test_blocks_without_blocks_and_loss_that_is_no_scalar_are_refused():
    with pytest.raises(InputError, match="Linear has none"):
        Trainer(nn.Linear(2, 2), toy_loss, toy_batch, toy_config(compile="blocks"))
    with pytest.raises(InputError, match=r"scalar, got shape \[8, 7\]"):
        toy_trainer(loss_fn=lambda model, batch: batch.float()).run()


# ------------------------------------------------------------------------------------------------- results
def test_result_counts_tokens_evaluations_and_rates():
    calls = []

    def evaluate(model):
        calls.append((model.training, torch.is_grad_enabled()))
        return {"validation": torch.tensor(0.5)}

    trainer = toy_trainer(eval_every=4, evaluate=evaluate)
    result = trainer.run()
    assert [row["step"] for row in result.evals] == [4, 8, 10]
    assert result.evals[0] == {"step": 4, "validation": 0.5} and calls == [(False, False)] * 3
    assert len(result.losses) == len(result.rates) == 10 and result.losses[-1] < result.losses[0]
    assert result.tokens_per_second * result.seconds == pytest.approx(9 * 8 * 7)  # not the first step
    assert result.compile_seconds > 0 and result.stopped is None and result.checkpoint is None
    assert (result.precision, result.compile, result.device, result.world) == ("float32", "none", "cpu", 1)
    assert trainer.model.training
    json.dumps(dataclasses.asdict(result))


def test_training_leaves_the_callers_random_state_alone_and_seeds_its_own():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = toy_trainer(), toy_trainer(), toy_trainer(seed=1)
    runs = [trainer.run().losses for trainer in (first, second, other)]
    assert torch.equal(torch.rand(3), expected)
    assert runs[0] == runs[1] != runs[2]  # dropout


def test_validation_does_not_change_training():
    evaluate = lambda model: {"noise": torch.rand(()).item()}
    quiet, asked = toy_trainer(), toy_trainer(eval_every=1, evaluate=evaluate)
    assert quiet.run().losses == asked.run().losses and same_weights(quiet.model, asked.model)


def test_language_model_learns_through_the_loop():
    model = build_lm("lm_nano", layers=1, width=32, ffn_width=32)
    result = Trainer(model, lm_loss, toy_batch, toy_config(steps=20, rate=0.01)).run()
    assert result.losses[-1] < 0.9 * result.losses[0]


def test_batches_may_be_tuples_and_dicts():
    for form in (lambda b: (b, b[:, 0]), lambda b: {"tokens": b, "first": b[:, 0]}):
        batch_at = lambda *where, form=form: form(toy_batch(*where))
        key = 0 if isinstance(form(toy_batch(0)), tuple) else "tokens"
        loss = lambda model, batch, key=key: toy_loss(model, batch[key])
        assert toy_trainer(batch_at=batch_at, loss_fn=loss).run().losses == toy_trainer().run().losses


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
def spoiling(step, factor):
    """A loss that is multiplied by `factor` at the given step."""
    count = iter(range(1000))
    return lambda model, batch: toy_loss(model, batch) * (factor if next(count) == step else 1.0)


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


# ------------------------------------------------------------------------------------------------- what is shown
def test_log_gets_a_line_every_tenth_and_silence_is_silent(capsys):
    toy_trainer(progress=True, steps=40, name="toy").run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy: step ")]
    assert len(lines) == 10 and lines[0].startswith("toy: step 4/40 · loss ") and "step 40/40" in lines[-1]
    assert "tokens/s" in lines[-1] and lines[-1].endswith("0:00 left")
    toy_trainer().run()
    silence = capsys.readouterr()
    assert silence.out == silence.err == ""


def test_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    toy_trainer(progress=True, name="toy", evaluate=lambda model: {"validation": 0.25}, eval_every=5).run()
    shown = capsys.readouterr()
    assert "10/10" in shown.err and "loss" in shown.err and "toy: step 5, validation 0.25" in shown.out


# ------------------------------------------------------------------------------------------------- compilation
def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_and_seeds_share_one_graph_and_another_structure_starts_anew():
    device.reset_compilation()
    counts = []
    for width, seed in ((8, 0), (8, 1), (12, 0)):
        before, model = graphs(), ToyModel(width=width, seed=seed)
        names, batch = list(model.state_dict()), toy_batch(0)
        with device.compiled(model, "blocks", backend="eager"):
            toy_loss(model, batch).backward()
            assert list(model.state_dict()) == names
            with device.plain(model):
                model(batch[:3])
        model(batch[:2])  # plain again: no graph for another batch size
        counts.append(graphs() - before)
    assert counts == [1, 0, 1]


def test_many_variants_in_one_process_stay_compiled():
    device.reset_compilation()
    for width in range(2, 24):
        before, model = graphs(), ToyModel(width=width)
        with device.compiled(model, "blocks", backend="eager"):
            model(toy_batch(0))
        assert graphs() - before == 1


def test_whole_model_compiles_under_its_own_names():
    model = ToyModel()
    names, before = list(model.state_dict()), graphs()
    with device.compiled(model, "whole", backend="eager"):
        loss = toy_loss(model, toy_batch(0))
    assert graphs() == before + 1 and list(model.state_dict()) == names and loss.isfinite()


# ------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_step_never_waits_for_the_host():
    def batch_at(step, *where):
        if step in (2, 6):
            torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        return toy_batch(step, *where)

    try:
        result = toy_trainer(device="cuda", compile="none", batch_at=batch_at, steps=30).run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(result.losses) == 30 and result.peak_memory > 0 and result.precision == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_trains_as_the_cpu_does_and_stops_on_nan():
    here, there = ToyModel(), ToyModel()
    for model in (here, there):
        for block in model.blocks:
            block.dropout.p = 0.0
    settings = {"steps": 30, "precision": "float32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        losses = toy_trainer(there, device="cuda", **settings).run().losses
    assert losses == pytest.approx(toy_trainer(here, **settings).run().losses, rel=1e-3)
    spoilt = toy_trainer(device="cuda", loss_fn=spoiling(13, float("nan")), steps=200, compile="none").run()
    assert spoilt.stopped == "not finite" and len(spoilt.losses) == 13
