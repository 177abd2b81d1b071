"""Sampling: the distribution by hand, cached against uncached token by token, stopping, and input it refuses."""

import itertools

import pytest
import torch

from minigated.attention import Attention, KVCache
from minigated.errors import InputError
from minigated.generate import generate, sampling_probabilities
from minigated.lm import LMConfig, build_lm
from minigated.rope import RotaryTable

TINY = LMConfig(width=24, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=20, vocabulary=31, context=24)
CACHED = ["none", "g1_elementwise", "g2_elementwise", "g3_elementwise"]
KNOWN = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625])


def tiny(variant: str = "none", **overrides):
    """Weights large enough that the past matters for the next token."""
    torch.manual_seed(0)
    return build_lm(TINY, variant=variant, **{"initializer_range": 0.4, **overrides})


def prompts(length: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def run(model, tokens, seed: int = 0, **options) -> torch.Tensor:
    """[B, new tokens]."""
    return torch.stack(list(generate(model, tokens, generator=torch.Generator().manual_seed(seed), **options)), dim=1)


# ------------------------------------------------------------------------------------ the distribution
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.125, 0.5, 0.25, 0.0625, 0.0625]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [4 / 86, 64 / 86, 16 / 86, 1 / 86, 1 / 86]),  # squares, rescaled
        ({"temperature": 5e-324}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 4}, [2 / 15, 8 / 15, 4 / 15, 1 / 15, 0]),  # of two equal ones the first
        ({"top_k": 99}, [0.125, 0.5, 0.25, 0.0625, 0.0625]),
        ({"top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.75}, [0, 2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.001}, [0, 1, 0, 0, 0]),  # the likeliest token always stays
        ({"top_p": 1.0}, [0.125, 0.5, 0.25, 0.0625, 0.0625]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # 2/3 of what top_k left, though 1/2 of everything
        ({"temperature": 0.5, "top_p": 0.75}, [0, 0.8, 0.2, 0, 0]),  # after the temperature: 64/86 is under 0.75
        ({"temperature": 0.5, "top_p": 0.74}, [0, 1, 0, 0, 0]),
    ],
)
def test_the_distribution_by_hand(options, expected):
    found = sampling_probabilities(KNOWN.double().log(), **options)
    assert found.dtype == torch.float64
    # sums of these powers of two are exact, so a cut at the sum itself (0.5, 0.75) is decided, not left to rounding
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rows_are_cut_each_for_itself_and_the_logits_stay():
    logits = torch.stack((KNOWN.log(), KNOWN.flip(0).log()))
    before = logits.clone()
    found = sampling_probabilities(logits, top_k=3)
    torch.testing.assert_close(found[0], found[1].flip(0))
    torch.testing.assert_close(found[0], sampling_probabilities(logits[0], top_k=3), rtol=0, atol=0)
    assert (found > 0).sum(-1).tolist() == [3, 3] and torch.equal(logits, before)


def test_of_equal_tokens_exactly_k_are_kept():
    found = sampling_probabilities(torch.zeros(2, 500), top_k=7)
    assert torch.equal(found[:, :7], torch.full((2, 7), 1 / 7, dtype=torch.float64)) and not found[:, 7:].any()
    assert sampling_probabilities(torch.zeros(500), temperature=0).argmax() == 0


def test_no_token_is_lost_with_top_p_1():
    logits = torch.tensor([0.0, -40.0, -41.0])  # the first one's probability is 1 as far as float64 can tell
    assert (sampling_probabilities(logits, top_p=1.0) > 0).all()
    assert (sampling_probabilities(logits, top_p=0.999) > 0).tolist() == [True, False, False]


def test_excluded_tokens_may_be_minus_infinity():
    found = sampling_probabilities(torch.tensor([0.0, float("-inf"), 0.0]))
    assert found.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("bad", [[0.0, float("nan")], [0.0, float("inf")], [float("-inf")] * 2])
def test_spoilt_logits_are_refused(bad):
    with pytest.raises(InputError, match="no token can be drawn"):
        sampling_probabilities(torch.tensor(bad), temperature=0)


def test_tokens_are_drawn_as_often_as_their_probability():
    """The counts of 2,000 rows against the distribution; 5 sigma."""
    model, prompt = tiny(), prompts(batch=1)
    expected = sampling_probabilities(model(prompt)[0, -1].detach(), 1.3, 6, 0.9)
    drawn = run(model, prompt.expand(2000, -1), new_tokens=1, temperature=1.3, top_k=6, top_p=0.9)[:, 0]
    counts = drawn.bincount(minlength=31)
    assert ((counts - 2000 * expected).abs() <= 5 * (2000 * expected * (1 - expected)).sqrt() + 1e-9).all()
    assert 2 <= (expected > 0).sum() <= 6


# ------------------------------------------------------------------------------------ cached equals uncached
def both(variant: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"temperature": 0.8, "new_tokens": 19, **options}
    model = tiny(variant)
    return run(model, prompts(), cache=True, **options), run(model, prompts(), cache=False, **options)


@pytest.mark.parametrize("variant", CACHED)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_cached_equals_uncached_token_by_token(variant, temperature):
    cached, plain = both(variant, temperature=temperature)
    assert torch.equal(cached, plain) and cached.shape == (2, 19)


def test_cached_equals_uncached_with_experts():
    model = tiny("g1_elementwise", experts=4, top_k=2)
    assert torch.equal(run(model, prompts(), new_tokens=12), run(model, prompts(), new_tokens=12, cache=False))


def keep_ungated(monkeypatch, position: str):
    """The step sees gated values (g2) or keys (g3); what is kept for later steps is ungated."""
    raw, gate, prepare, append = {}, Attention._gate, Attention._prepare_qk, KVCache.append

    def gate_and_note(self, where, y, x, probe):
        raw[where] = y.transpose(1, 2)
        return gate(self, where, y, x, probe)

    def prepare_and_note(self, q, k, x, rotary, probe):
        gates, self.gates = self.gates, torch.nn.ModuleDict()
        raw["k"] = prepare(self, q, k, x, rotary, probe)[1].transpose(1, 2)
        self.gates = gates
        return prepare(self, q, k, x, rotary, probe)

    def append_ungated(self, k, v):
        keys, values = (kept.clone() for kept in append(self, k, v))
        start = self.length - k.shape[2]
        (self.v if position == "g2" else self.k)[:, :, start : self.length] = raw["g2" if position == "g2" else "k"]
        return keys, values

    monkeypatch.setattr(Attention, "_gate", gate_and_note)
    monkeypatch.setattr(Attention, "_prepare_qk", prepare_and_note)
    monkeypatch.setattr(KVCache, "append", append_ungated)


def start_positions_again(monkeypatch):
    """Every new token is rotated as if it stood at position 0."""
    forward = RotaryTable.forward
    monkeypatch.setattr(RotaryTable, "forward", lambda self, start, count: forward(self, 0, count))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("position", ["g2", "g3"])
def test_a_cache_of_ungated_values_or_keys_shows(position, temperature, monkeypatch):
    keep_ungated(monkeypatch, position)
    cached, plain = both(f"{position}_elementwise", temperature=temperature)
    assert torch.equal(cached[:, 0], plain[:, 0]), "the first token uses nothing that was kept"
    assert not torch.equal(cached, plain)


def test_a_gate_at_g1_has_nothing_in_the_cache(monkeypatch):
    keep_ungated(monkeypatch, "g2")  # what is kept was never gated, so the planted bug changes nothing
    cached, plain = both("g1_elementwise")
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("variant", CACHED)
def test_forgotten_positions_show(variant, monkeypatch):
    start_positions_again(monkeypatch)
    assert not torch.equal(*both(variant))


def test_a_cached_step_computes_one_position():
    model, lengths = tiny(), []
    model.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    run(model, prompts(), new_tokens=4)
    run(model, prompts(), new_tokens=4, cache=False)
    assert lengths == [5, 1, 1, 1] + [5, 6, 7, 8]


# ------------------------------------------------------------------------------------ the loop
def test_greedy_follows_the_largest_logit():
    model, sequence = tiny("g1_elementwise"), prompts()
    for token in generate(model, sequence.clone(), 6, temperature=0):
        assert token.dtype == torch.int64 and torch.equal(token, model(sequence)[:, -1].argmax(-1))
        sequence = torch.cat((sequence, token[:, None]), dim=1)


def test_a_seed_repeats_and_another_differs():
    model = tiny()
    assert torch.equal(run(model, prompts(), 3, new_tokens=8), run(model, prompts(), 3, new_tokens=8))
    assert not torch.equal(run(model, prompts(), 3, new_tokens=8), run(model, prompts(), 4, new_tokens=8))


def test_greedy_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    list(generate(tiny(), prompts(), 3, temperature=0, generator=generator))
    assert torch.equal(generator.get_state(), before)


def test_tokens_come_one_at_a_time_and_the_models_mode_is_given_back():
    model, calls = tiny().train(), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(module.training))
    stream = generate(model, prompts(), 10)
    assert calls == []
    next(stream)
    next(stream)
    assert calls == [False, False]
    stream.close()
    assert model.training


def test_without_a_number_it_runs_to_the_end_of_the_context():
    assert run(tiny(), prompts()).shape == (2, TINY.context - 5)


def test_a_stop_token_ends_its_row_and_the_last_row_ends_all():
    model = tiny()
    free = run(model, prompts(), new_tokens=19)
    first, second = free[0, 2].item(), free[1, 7].item()
    ends = [min(row.index(s) for s in (first, second) if s in row) for row in free.tolist()]
    stopped = run(model, prompts(), new_tokens=19, stop=(first, second))
    assert stopped.shape[1] == max(ends) + 1 < 19 and ends[0] != ends[1]
    for row, (end, values) in enumerate(zip(ends, stopped.tolist(), strict=True)):
        assert values[: end + 1] == free[row, : end + 1].tolist()
        assert set(values[end:]) == {values[end]}


def test_a_stop_token_in_the_prompt_is_no_end():
    model, prompt = tiny(), prompts(batch=1)
    free = run(model, prompt, new_tokens=6)
    unseen = next(t for t in prompt[0].tolist() if t not in free[0].tolist())
    assert torch.equal(run(model, prompt, new_tokens=6, stop=(unseen,)), free)


def test_a_gpu_gives_what_the_cpu_gives(device):
    model = tiny("g1_elementwise")
    there = run(model, prompts(), new_tokens=10, temperature=0)
    assert torch.equal(run(model.to(device), prompts(), new_tokens=10, temperature=0), there)


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
        ({"tokens": torch.zeros(5, dtype=torch.long)}, r"shape \[5\]; accepted: whole numbers \[B, T\]"),
        ({"tokens": torch.zeros(1, 5)}, "tokens are torch.float32"),
        ({"tokens": prompts(24)}, "24 tokens, which leaves no room in the context of 24; accepted: 23 at most"),
        ({"tokens": torch.tensor([[3, 31]])}, "token 31 is unknown; accepted: 0 to 30"),
        ({"tokens": torch.tensor([[3, -1]])}, "token -1 is unknown"),
        ({"new_tokens": 20}, "5 tokens of prompt and 20 new ones .* context of 24; accepted: 19 new tokens at most"),
        ({"new_tokens": 0}, "0 new tokens are too few"),
        ({"temperature": -0.5}, "temperature is -0.5; accepted: 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; accepted: 1 or more"),
        ({"top_p": 0.0}, "top_p is 0; accepted: above 0, up to 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"stop": (31,)}, "stop token 31 is unknown; accepted: 0 to 30"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_computed(options, said):
    model = tiny()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(InputError, match=said) as refused:
        generate(model, **{"tokens": prompts(), **options})
    assert "\n" not in str(refused.value)


def test_a_prompt_of_bytes_fits_a_vocabulary_of_256():
    prompt = torch.tensor([[0, 255, 82]])
    model = tiny(vocabulary=256)
    assert torch.equal(run(model, prompt.to(torch.uint8), new_tokens=3), run(model, prompt, new_tokens=3))


def test_the_last_accepted_sizes_run():
    assert len(list(generate(tiny(), prompts(23)))) == 1
    assert len(list(itertools.islice(generate(tiny(), prompts(), 19, top_p=1, top_k=1), 30))) == 19
