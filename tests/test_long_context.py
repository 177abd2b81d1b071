"""One model under several rotary tables, loss by position, first-token share by length."""

import math

import pytest
import torch
from torch import nn

from minigated import long_context
from minigated.data import TextBatches, load_text
from minigated.errors import InputError
from minigated.lm import build_lm, lm_loss
from minigated.long_context import loss_by_position, share_by_length, with_rope
from minigated.rope import RotaryTable, apply_rope

TEXT = load_text("shakespeare").validation
SMALL = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "ffn_width": 32}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_lm("lm_nano", context=32, **SMALL).eval()


def tokens(length, batch=2):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- another table
@pytest.mark.parametrize("scaling", ["none", "base", "interpolation", "yarn"])
def test_the_other_model_has_the_other_table_and_the_same_weights(model, scaling):
    before = model(tokens(32))
    factor = 1.0 if scaling == "none" else 4.0
    other = with_rope(model, scaling, factor, context=128)
    expected = RotaryTable(128, 16, 10_000.0, scaling, factor, 32)
    assert torch.equal(other.rotary.cos, expected.cos) and torch.equal(other.rotary.sin, expected.sin)
    assert other(tokens(128)).shape == (2, 128, 256) and other.config.context == 128
    assert torch.equal(build_lm(other.config).rotary.cos, expected.cos)  # a checkpoint of it would be built again
    assert [a is b for a, b in zip(model.parameters(), other.parameters(), strict=True)].count(False) == 0
    assert model.rotary.length == model.config.context == 32 and torch.equal(model(tokens(32)), before)
    assert torch.equal(other(tokens(32)), before) == (scaling == "none")


def test_training_one_trains_both(model):
    other = with_rope(model, "interpolation", 2.0)
    with torch.no_grad():
        other.head.weight.mul_(2.0)
    plain = with_rope(other, base=10_000.0, context=32)
    assert torch.equal(plain(tokens(32)), model(tokens(32)))


def test_a_new_base_is_that_base(model):
    other = with_rope(model, base=1e6, context=64)
    assert torch.equal(other.rotary.cos, RotaryTable(64, 16, 1e6).cos) and other.config.rope_base == 1e6
    again = with_rope(other, "yarn", 4.0)  # 64 is now the trained length
    assert torch.equal(again.rotary.cos, RotaryTable(256, 16, 1e6, "yarn", 4.0, 64).cos)


def test_interpolation_puts_position_2p_where_p_was(model):
    slow, x = with_rope(model, "interpolation", 2.0), torch.randn(1, 3, 1, 16)
    far = apply_rope(x, *(t[[0, 10, 30]] for t in slow.rotary(0, 64)))
    assert torch.allclose(far, apply_rope(x, *(t[[0, 5, 15]] for t in model.rotary(0, 32))), atol=1e-6)


def test_a_cached_step_equals_the_full_pass_under_yarn(model):
    other, x = with_rope(model, "yarn", 4.0), tokens(100)
    cache, full = other.new_cache(2, 100), other(x)
    steps = torch.cat([other(part, cache) for part in x.split([90, 1, 9], dim=1)], dim=1)
    assert torch.allclose(steps, full, atol=1e-5)


# ---------------------------------------------------------------------------------------------- loss by position
class Surprised(nn.Module):
    """Gives the right next token of `windows` probability 1 / (position + 1), the rest to token 255."""

    def __init__(self, windows):
        super().__init__()
        self.weight, self.targets = nn.Parameter(torch.zeros(1)), windows[:, 1:]

    def forward(self, x):
        right = 1 / (torch.arange(x.shape[1]).float() + 1)
        probabilities = torch.zeros(*x.shape, 256)
        probabilities.scatter_(2, self.targets[..., None], right[None, :, None].expand(*x.shape, 1))
        probabilities[..., 255] = 1 - right
        return probabilities.log()


def test_losses_stand_in_their_bins():
    windows = tokens(13, batch=3).clamp(max=254)
    rows = loss_by_position(Surprised(windows), [windows], [0, 1, 4, 12])
    assert [(row["start"], row["end"]) for row in rows] == [(0, 1), (1, 4), (4, 12)]
    for row in rows:
        expected = sum(math.log(p + 1) for p in range(row["start"], row["end"])) / (row["end"] - row["start"])
        assert row["nats"] == pytest.approx(expected, abs=1e-5)


def test_bins_together_are_the_loss(model):
    windows = list(TextBatches(TEXT, 32, 4).sequential(3))
    rows = loss_by_position(model, windows, [0, 8, 32])
    whole = sum(lm_loss(model, window).item() for window in windows) / 3
    assert rows[0]["nats"] * 0.25 + rows[1]["nats"] * 0.75 == pytest.approx(whole, abs=1e-5)


def test_batches_of_unequal_size_weigh_by_their_rows(model):
    windows = next(TextBatches(TEXT, 32, 5).sequential(1))
    (whole,), (parts,) = (loss_by_position(model, list(windows.split(n)), [0, 32]) for n in (5, 4))
    assert whole["nats"] == pytest.approx(parts["nats"], abs=1e-6)


# ---------------------------------------------------------------------------------------------- sink by length
def test_shares_of_an_untrained_model_are_near_uniform(model):
    rows = share_by_length(with_rope(model, "yarn", 4.0), TEXT, (32, 128), count=8)
    assert [row["length"] for row in rows] == [32, 128]
    assert rows[0]["uniform"] > 2 * rows[1]["uniform"]
    assert all(abs(row["f_attn"] / row["uniform"] - 1) < 0.3 and row["m_act"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("bins", "said"),
    [([0], "two or more"), ([0, 8, 8], "increasing"), ([-1, 8], "from 0 to 16"), ([0, 17], "from 0 to 16")],
)
def test_wrong_bins_are_refused(model, bins, said):
    with pytest.raises(InputError, match=said):
        loss_by_position(model, [tokens(17)], bins)


def test_nothing_to_measure_is_said(model):
    with pytest.raises(InputError, match="no window"):
        loss_by_position(model, [], [0, 1])


def test_a_text_beyond_the_table_is_refused(model):
    with pytest.raises(InputError, match="128 positions are longer than the rotary table of 64"):
        share_by_length(with_rope(model, "yarn", 2.0), TEXT, (128,))


def test_a_model_whose_loss_could_not_be_measured_keeps_its_mode(model):
    model.train()
    with pytest.raises(InputError):
        loss_by_position(model, [tokens(70)], [0, 1])
    assert model.training


@pytest.mark.parametrize(("count", "batch"), [(8, 3), (2, 4), (5, 4), (4, 4), (1, 1)])
def test_as_many_sequences_as_asked_are_measured(model, monkeypatch, count, batch):
    seen = []
    real = long_context.measure
    monkeypatch.setattr(long_context, "measure", lambda m, w, p: seen.extend(map(len, w)) or real(m, w, p))
    share_by_length(model, TEXT, (8,), count=count, batch=batch)
    assert sum(seen) == count and max(seen) <= batch and min(seen) > 0


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0.5])
def test_a_factor_without_sense_is_refused(model, factor):
    with pytest.raises(InputError, match="rope factor"):
        with_rope(model, "yarn", factor)
    with pytest.raises(InputError, match="context -4"):
        with_rope(model, "yarn", 2.0, context=-4)
