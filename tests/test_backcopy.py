"""The toy run of chapter 2: a sink grows without a gate, a gate opens on triggers; without the rule neither shows."""

import pytest
import torch

from minigated.data.toys import BackcopyTask
from minigated.experiments.backcopy import BackcopyModel, backcopy_loss, look, train_backcopy
from minigated.recipe import TrainConfig
from minigated.train import Trainer

STEPS = 150


def train_without_the_rule(gate: str | None, seed: int = 0) -> dict[str, float]:
    """`train_backcopy` with broken targets: what follows is another sequence's, so nothing can be copied."""
    task = BackcopyTask(seed=seed)
    fresh = task.fresh(256, seed=seed + 1)
    torch.manual_seed(seed)
    model = BackcopyModel(task.vocabulary, task.tokens.shape[1] - 1, gate)

    def broken_loss(model, sequences):
        logits = model(sequences[:, :-1])[:, 1:]  # [B, T - 1, V]
        strangers = sequences[:, 2:].roll(1, dims=0)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), strangers.flatten())

    config = TrainConfig(
        steps=1500, rate=3e-3, betas=(0.9, 0.98), warmup=50, final_ratio=0.0, clip=0.0, device="cpu", progress=False
    )
    Trainer(model, broken_loss, task.batch_at, config).run(until=STEPS)
    return look(model, task, fresh)


def has_sink(found: dict[str, float]) -> bool:
    """Silent queries look at BOS far more than uniform attention would, trigger queries do not."""
    return found["share_other"] > 5 * found["uniform"] and found["share_trigger"] < found["uniform"]


def gate_tells_triggers(found: dict[str, float]) -> bool:
    """The gate stands clearly wider open at triggers than elsewhere."""
    return found["gate_trigger"] > found["gate_other"] + 0.2


@pytest.fixture(scope="module")
def plain() -> list[dict]:
    return train_backcopy(None, steps=STEPS, every=STEPS, progress=False)[1]


@pytest.fixture(scope="module")
def gated() -> list[dict]:
    return train_backcopy("headwise", steps=STEPS, every=STEPS, progress=False)[1]


@pytest.fixture(scope="module")
def broken() -> dict[str, float]:
    return train_without_the_rule("headwise")


def test_a_sink_grows_without_a_gate(plain):
    assert not has_sink(plain[0])
    assert has_sink(plain[-1])
    assert plain[-1]["value_ratio"] < 0.8 * plain[0]["value_ratio"]


def test_the_rule_is_learnt(plain, gated):
    for history in (plain, gated):
        assert history[-1]["loss_trigger"] < 0.25 * history[0]["loss_trigger"]


def test_the_gate_opens_on_triggers(gated):
    assert not gate_tells_triggers(gated[0])
    assert gate_tells_triggers(gated[-1])


def test_the_value_at_bos_shrinks_less_with_a_gate(plain, gated):
    assert gated[-1]["value_ratio"] > plain[-1]["value_ratio"]


def test_broken_targets_show_none_of_it(broken):
    assert not has_sink(broken)
    assert not gate_tells_triggers(broken)
    assert broken["loss_trigger"] > 1


def test_look_names_the_uniform_reference():
    task = BackcopyTask(sequences=4)
    torch.manual_seed(0)
    model = BackcopyModel(task.vocabulary, 64)
    for weight in (model.attention.q_proj.weight, model.attention.k_proj.weight):
        weight.data.zero_()  # all scores equal: every query looks at everything it sees
    found = look(model, task, task.fresh(64, seed=1))
    tokens = torch.arange(4, 64)
    assert found["uniform"] == pytest.approx((1 / (tokens + 1)).mean().item(), rel=1e-6)
    assert found["share_other"] == pytest.approx(found["uniform"], rel=0.1)
    assert "gate_other" not in found


def test_the_loss_leaves_out_the_first_target():
    task = BackcopyTask(sequences=4)
    torch.manual_seed(0)
    model, sequences = BackcopyModel(task.vocabulary, 64), task.fresh(2, seed=1)
    logits = model(sequences[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), task.targets(sequences).flatten())
    assert backcopy_loss(model, sequences).item() == pytest.approx(expected.item(), rel=1e-5)
