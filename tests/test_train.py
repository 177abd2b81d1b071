"""The training loop: what it returns, what it shows, and the same on a GPU."""

import dataclasses
import json
import sys

import pytest
import torch
from toy_training import ToyModel, same_weights, spoiling, toy_batch, toy_config, toy_loss, toy_trainer

from minigated.lm import build_lm, lm_loss
from minigated.train import Trainer


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
    losses = toy_trainer(there, device="cuda", **settings).run().losses
    assert losses == pytest.approx(toy_trainer(here, **settings).run().losses, rel=1e-3)
    spoilt = toy_trainer(device="cuda", loss_fn=spoiling(13, float("nan")), steps=200, compile="none").run()
    assert spoilt.stopped == "not finite" and len(spoilt.losses) == 13
