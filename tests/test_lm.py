"""The language model: sizes, options, cache, loss, probe, precision, and input it refuses."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from minigated.attention import Attention, AttentionShape
from minigated.errors import InputError
from minigated.lm import SIZES, LanguageModel, LMConfig, build_lm, lm_loss, model_rows, next_token_loss
from minigated.rope import RotaryTable
from minigated.variants import VARIANTS, parameters

TINY = LMConfig(width=24, layers=2, heads=4, kv_heads=2, head_width=8, ffn_width=20, vocabulary=31, context=16)
DENSE = [name for name, variant in VARIANTS.items() if variant.dense]


def tiny(variant: str = "none", **overrides) -> LanguageModel:
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    return build_lm(TINY, variant=variant, **{"initializer_range": 0.3, **overrides})


def tokens(length: int = 11, batch: int = 2) -> torch.Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ parameters
def by_formula(c: LMConfig) -> int:
    attention = 2 * c.width * c.heads * c.head_width + 2 * c.width * c.kv_heads * c.head_width + 2 * c.head_width
    feed_forwards = max(c.experts, 1) * 3 * c.width * c.ffn_width + c.experts * c.width  # and the router
    layer = attention + feed_forwards + 2 * c.width
    return c.vocabulary * c.width * (1 if c.tied else 2) + c.layers * layer + c.width


@pytest.mark.parametrize("size", SIZES)
def test_parameters_by_formula(size):
    assert parameters(build_lm(size, device="meta")) == by_formula(SIZES[size])


@pytest.mark.parametrize("size, millions", [("1.7B-28L", 1720.8), ("1.7B-48L", 1705.9), ("15A2B", 15577.8)])
def test_the_papers_models_have_the_released_totals(size, millions):
    count = parameters(build_lm(size, device="meta"))
    assert round(count / 1e6, 1) == millions
    assert count == {"1.7B-28L": 1_720_837_120, "1.7B-48L": 1_705_932_288, "15A2B": 15_577_751_552}[size]


@pytest.mark.parametrize("size, added", [("1.7B-28L", 117.4), ("1.7B-48L", 151.0)])
def test_the_dense_gate_adds_what_the_facts_say(size, added):
    gated = parameters(build_lm(size, device="meta", variant="g1_elementwise"))
    assert round((gated - parameters(build_lm(size, device="meta"))) / 1e6, 1) == added


def test_tied_heads_share_one_matrix():
    model = tiny(tied=True)
    assert model.head.weight is model.embedding.weight
    assert parameters(tiny()) - parameters(model) == 31 * 24


def test_no_biases_anywhere():
    assert not [name for name, _ in tiny("g1_elementwise").named_parameters() if "bias" in name]


def test_weights_start_normal_with_the_configs_deviation_and_gates_half_open():
    torch.manual_seed(0)
    model = build_lm("lm_nano", variant="g1_elementwise", initializer_range=0.05)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert abs(weight.std() / 0.05 - 1) < 0.05 and abs(weight.mean()) < 0.002, name
        else:
            assert (weight == 1).all(), name
    scores = []
    batch = torch.randint(256, (2, 16))
    build_lm("lm_nano", variant="g1_elementwise")(
        batch, probe=lambda layer, name, value: scores.append(value[1]) if name == "gate_score" else None
    )
    assert len(scores) == 4 and all(abs(s.mean() - 0.5) < 0.02 and s.std() < 0.1 for s in scores)


# ------------------------------------------------------------------------------------ config
def test_a_config_survives_json():
    config = LMConfig(**{**asdict(TINY), "variant": "g1_shared", "qk_order": ("norm", "gate", "rope")})
    again = LMConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and isinstance(again.qk_order, tuple)
    assert build_lm(again).state_dict().keys() == build_lm(config).state_dict().keys()


def test_model_config_is_what_was_built():
    model = tiny("g1_elementwise", ffn_width=40, match_parameters=True, ffn_multiple=1)
    assert model.config.ffn_width == model.blocks[0].ffn.gate_proj.out_features == 29  # 40 - 24*32 / (3*24), rounded
    assert not model.config.match_parameters
    assert LanguageModel(model.config).state_dict().keys() == model.state_dict().keys()


def test_options_reach_the_layers():
    model = tiny(qk_norm=False, norm_eps=1e-3, rope_base=500.0, qk_order=("norm", "rope", "gate"))
    block = model.blocks[1]
    assert isinstance(block.attention.q_norm, torch.nn.Identity) and block.attention.qk_order[2] == "gate"
    assert block.attention_norm.eps == block.ffn_norm.eps == model.norm.eps == 1e-3
    assert torch.equal(model.rotary.cos, RotaryTable(16, 8, 500.0).cos)
    assert tiny("g1_shared", shared_mean="logit").blocks[0].attention.gates["g1"].scores.mean_of == "logit"
    assert tiny("g1_rmsnorm", head_norm="per_head").blocks[0].attention.gates["g1"].norm.weight.shape == (4, 8)
    assert tiny(norm_eps=1e-3).blocks[0].attention.q_norm.eps == 1e-3


def test_model_rows_count_exactly():
    rows = {row["name"]: row for row in json.loads(json.dumps(model_rows()))}
    assert set(SIZES) <= set(rows)
    assert rows["1.7B-28L"]["parameters"] == 1_720_837_120


# ------------------------------------------------------------------------------------ loss
def test_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [1.0, 1.0]]])
    assert next_token_loss(logits, torch.tensor([[1, 0]])).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_lm_loss_predicts_the_next_token():
    model, batch = tiny(), tokens()
    logits = model(batch[:, :-1])
    wanted = [-logits[b, t].log_softmax(-1)[batch[b, t + 1]] for b in range(2) for t in range(10)]
    assert lm_loss(model, batch).item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)


def test_loss_is_float32_whatever_the_logits():
    logits = torch.randn(2, 3, 5).bfloat16()
    loss = next_token_loss(logits, torch.zeros(2, 3, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_token_loss(logits.float(), torch.zeros(2, 3, dtype=torch.long)))


# ------------------------------------------------------------------------------------ cache
CHUNKS = [(1,) * 11, (11,), (5, 1, 1, 4), (1, 7, 3)]


@torch.no_grad()
def cache_error(model: LanguageModel, chunks) -> float:
    """Largest difference between logits of the whole sequence and of its chunks through a cache."""
    batch, cache, parts = tokens(), model.new_cache(2, 13), []
    for chunk in batch.split(chunks, dim=1):
        parts.append(model(chunk, cache=cache))
    return (torch.cat(parts, dim=1) - model(batch)).abs().max().item()


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("variant", DENSE)
def test_cached_equals_uncached(variant, chunks):
    assert cache_error(tiny(variant), chunks) < 1e-5


def positions_start_again(model, monkeypatch):
    monkeypatch.setattr(RotaryTable, "forward", lambda self, start, count: (self.cos[:count], self.sin[:count]))


def mask_aligned_at_the_start(model, monkeypatch):
    def wrong(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    monkeypatch.setattr("minigated.attention.attention_sdpa", wrong)


def values_cached_ungated(model, monkeypatch):
    """Only the newest values are gated: what a cache in front of the gate would give."""
    for block in model.blocks:
        attention, gate = block.attention, block.attention.gates["g2"]
        attention.gates = torch.nn.ModuleDict()
        attention.v_proj.register_forward_hook(lambda m, a, out, gate=gate: gate_last(gate, out, a[0]))


def gate_last(gate, out, x):
    gated = gate(out.unflatten(-1, (2, 8)), x).flatten(2)
    return torch.cat((out[:, :-1], gated[:, -1:]), dim=1)


@pytest.mark.parametrize("plant", [positions_start_again, mask_aligned_at_the_start, values_cached_ungated])
def test_a_bug_planted_in_the_cache_shows(plant, monkeypatch):
    model = tiny("g2_elementwise")
    plant(model, monkeypatch)
    assert cache_error(model, (5, 1, 1, 4)) > 1e-3


@torch.no_grad()
def test_cached_sequences_do_not_mix():
    """Each row of the batch gives what it gives alone."""
    model, batch = tiny("g3_elementwise"), tokens(batch=3)
    cache = model.new_cache(3, 11)
    together = torch.cat([model(part, cache=cache) for part in batch.split(4, dim=1)], dim=1)
    for row in range(3):
        torch.testing.assert_close(together[row], model(batch[row : row + 1])[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ probe
def test_the_probe_sees_every_layer_and_changes_nothing():
    model, batch, seen = tiny("g1_headwise"), tokens(), {}
    plain = model(batch)
    probed = model(batch, probe=lambda layer, name, value: seen.setdefault(name, {}).__setitem__(layer, value))
    assert torch.equal(plain, probed)
    taps = {"attention_output", "attention_residual", "ffn_output", "ffn_residual"}
    assert set(seen) == taps | {"qk", "sdpa", "sdpa_gated", "gate_form", "gate_score"}
    assert all(set(layers) == {0, 1} for layers in seen.values())
    q, k = seen["qk"][1]
    assert q.shape == (2, 4, 11, 8) and k.shape == (2, 2, 11, 8)
    position, scores = seen["gate_score"][0]
    torch.testing.assert_close(seen["sdpa_gated"][0], seen["sdpa"][0] * scores)
    torch.testing.assert_close(seen["ffn_residual"][0], seen["attention_residual"][0] + seen["ffn_output"][0])
    torch.testing.assert_close(model.head(model.norm(seen["ffn_residual"][1])), plain)


# ------------------------------------------------------------------------------------ precision and device
SMOOTH = ["none", "g1_elementwise", "g2_headwise", "g1_input_independent", "switch_kv_4top4"]  # no top-k to flip


@pytest.mark.parametrize("variant", SMOOTH)
def test_precisions_agree_with_float64(variant, device):
    model, batch = tiny(variant).double(), tokens()
    exact = model(batch)
    model.to(device)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        logits = model.to(dtype)(batch.to(device))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.cpu().double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", ["none", "g1_elementwise", "switch_kv_4top4"])
def test_training_under_autocast(variant, device):
    """bfloat16 autocast: finite float32 gradients that point where the exact ones do."""
    model, batch = tiny(variant).to(device), tokens().to(device)
    lm_loss(model, batch).backward()
    exact = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        loss = lm_loss(model, batch)
    loss.backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert loss.dtype == found.dtype == torch.float32
    assert torch.cosine_similarity(found, exact, dim=0) > 0.98


# ------------------------------------------------------------------------------------ wrong input
def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny()
    assert model(tokens(16)).shape == (2, 16, 31)
    with pytest.raises(InputError, match="17 positions are longer than the rotary table of 16; .*context=17"):
        model(tokens(17))


@torch.no_grad()
def test_a_full_cache_is_refused_and_stays_usable():
    model, batch = tiny("g2_headwise"), tokens()
    cache = model.new_cache(2, 10)
    model(batch[:, :8], cache=cache)
    with pytest.raises(InputError, match="the cache holds 10 tokens; 11 were given"):
        model(batch[:, 8:], cache=cache)
    after = model(batch[:, 8:10], cache=cache)
    torch.testing.assert_close(after, model(batch[:, :10])[:, 8:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_larger_than_the_context_ends_at_the_context():
    model = tiny()
    cache = model.new_cache(2, 20)
    model(tokens(16), cache=cache)
    with pytest.raises(InputError, match="17 positions are longer than the rotary table of 16"):
        model(tokens(1), cache=cache)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"ffn_width": -3}, "ffn_width must be at least 1, got -3"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"heads": 5}, "5 query heads cannot share 2"),
        ({"head_width": 7}, "even head width, got 7"),
        ({"head_norm": "each"}, "unknown head_norm 'each'; accepted: shared, per_head"),
        ({"shared_mean": "max", "variant": "g1_shared"}, "unknown shared_mean 'max'; accepted: score, logit"),
        ({"qk_order": ("norm", "rope")}, "qk_order must hold gate, norm and rope once each"),
        ({"hidden": 3}, "unknown option 'hidden'; accepted: width, layers"),
    ],
)
def test_impossible_configs_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        build_lm(TINY, **change)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shared_mean": "nonsense"}, "unknown shared_mean 'nonsense'; accepted: score, logit"),
        ({"qk_order": ("norm", "rope")}, "qk_order must hold gate, norm and rope once each, got .*'norm', 'rope'"),
        ({"qk_order": ["gate", "norm", 3]}, "qk_order must hold gate, norm and rope once each, got .*3"),
        ({"rope_scaling": "ntk"}, "unknown rope scaling 'ntk'; accepted: none, base"),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, "yarn needs the trained length"),
        ({"rope_factor": 4.0}, "rope factor 4 has no effect without a scaling"),
    ],
)
def test_a_config_that_no_model_could_have_is_refused_before_any_model(change, said):
    with pytest.raises(InputError, match=said):
        replace(TINY, **change)


def test_unknown_sizes_are_refused():
    with pytest.raises(InputError, match="unknown model 'lm_huge'; accepted: lm_nano, lm_small"):
        build_lm("lm_huge")


def test_rotary_table_stays_float32_when_the_model_changes_type():
    model = build_lm("lm_nano")
    before = model.rotary.cos.clone()
    model.to(torch.bfloat16)
    assert model.rotary.cos.dtype == torch.float32 and torch.equal(model.rotary.cos, before)


def test_cache_of_another_batch_is_refused():
    model = build_lm("lm_nano")
    with pytest.raises(InputError, match="batch of 2; a batch of 1"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=model.new_cache(2, 8))


def test_variant_that_does_not_fit_the_heads_is_named():
    with pytest.raises(InputError, match="kv_heads_doubled.*12 query and 4 key/value heads"):
        build_lm("lm_medium", variant="kv_heads_doubled")


def test_a_model_brought_down_from_meta_has_its_positions():
    one, other = build_lm("lm_nano", layers=1), build_lm("lm_nano", "meta", layers=1).to_empty(device="cpu")
    other.load_state_dict(one.state_dict())
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(one(tokens), other(tokens))


def test_matching_changes_nothing_where_a_variant_adds_nothing():
    config = replace(TINY, ffn_width=36, ffn_multiple=16, match_parameters=True)
    assert config.matched() == replace(config, match_parameters=False)


def test_every_norm_has_the_models_epsilon():
    model = build_lm("lm_nano", layers=1, variant="g1_rmsnorm", norm_eps=1e-3)
    assert {module.eps for module in model.modules() if type(module).__name__ == "RMSNorm"} == {1e-3}


def test_the_loss_is_as_wide_as_a_wide_model():
    model, batch = build_lm("lm_nano", layers=1).double(), torch.randint(256, (2, 9))
    assert lm_loss(model, batch).dtype == torch.float64
    torch.testing.assert_close(lm_loss(model, batch), lm_loss(model, batch, chunk=4), rtol=1e-12, atol=0)


def test_a_cache_made_in_inference_mode_serves_outside():
    model, tokens = build_lm("lm_nano", layers=1), torch.randint(256, (1, 4))
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
    with torch.no_grad():
        assert torch.equal(model(tokens, cache=cache), model(tokens))


def test_a_misspelt_position_of_a_gate_is_refused():
    with pytest.raises(InputError, match="position of a gate 'G1'; accepted: g1, g2"):
        Attention(AttentionShape(8, 2, 2, 4), gates={"G1": torch.nn.Identity()})


def test_weights_assigned_on_meta_bring_the_model_down():
    full, tokens = build_lm("lm_nano"), torch.arange(24).view(2, 12)
    model = build_lm("lm_nano", device="meta")
    model.load_state_dict(full.state_dict(), assign=True)
    torch.testing.assert_close(model(tokens), full(tokens), rtol=0, atol=0)
    torch.testing.assert_close(model.to("cpu").rotary.cos, full.rotary.cos, rtol=0, atol=0)
