"""Settings, learning rate, optimizer, and the loop against the same steps written out."""


import pytest
import torch
from torch import nn
from toy_training import ToyModel, toy_batch, toy_config, toy_loss, toy_trainer

from minigated.errors import InputError
from minigated.optimizer import clip_gradients, parameter_groups
from minigated.recipe import TrainConfig
from minigated.train import Trainer, learning_rate


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


def test_the_last_update_takes_the_final_rate_or_the_peak_if_warm_up_leaves_one_update_or_none():
    for warmup in range(6):
        config = TrainConfig(steps=5, rate=3.0, warmup=warmup, final_ratio=0.1)
        assert learning_rate(4, config) == (3.0 if warmup >= 4 else pytest.approx(0.3))


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
        ({"seed": -1}, ["seed", "-1", "from 0 to 2**63 - 1"]),
        ({"seed": 2**63}, ["seed", str(2**63), "from 0 to 2**63 - 1"]),
        ({"seed": 2**64}, ["seed", str(2**64), "from 0 to 2**63 - 1"]),
        ({"seed": 1.0}, ["seed", "1.0", "whole number"]),
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
