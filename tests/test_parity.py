"""Logits and gradients equal to Hugging Face transformers, random weights, float32, CPU, eager attention.

Every comparison has twins with one planted bug each; they must be far outside the tolerance.
"""

from types import SimpleNamespace

import pytest
import torch
from qwen_models import EQUAL, GROUPED, NARROW, pack_rows, qwen3, qwen3_next, released, tokens
from torch import nn

from minigated import attention as attention_module
from minigated.attention import AttentionShape
from minigated.gates import Gate
from minigated.interop import (
    from_qwen3,
    from_qwen3_next,
    from_qwen_gated,
    per_group_to_per_head,
    split_per_head,
    to_qwen_gated,
    widen_headwise,
)
from minigated.interop import qwen as qwen_module
from minigated.interop.layouts import split_per_group
from minigated.lm import next_token_loss

TOLERANCE = 1e-5
SHAPES = {"grouped": GROUPED, "narrow": NARROW, "equal": EQUAL}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@torch.no_grad()
def largest_error(ours: nn.Module, theirs: nn.Module) -> float:
    """Largest difference of two models' logits on a batch of two; the logits must be worth comparing."""
    batch = tokens()
    wanted = theirs(batch)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.logits
    assert wanted.std() > 0.5
    return (ours(batch) - wanted).abs().max().item()


def convert(model):
    loader = from_qwen3_next if model.config.model_type == "qwen3_next" else from_qwen3
    return loader(model.state_dict(), model.config.to_dict())


# ------------------------------------------------------------------------------------ logits
@pytest.mark.parametrize("tied", [True, False])
def test_baseline_equals_qwen3(transformers, shape, tied):
    theirs = qwen3(transformers, shape, tied)
    ours = convert(theirs)
    assert ours.config.variant == "none" and ours.config.tied == tied
    assert (ours.head.weight is ours.embedding.weight) == tied
    assert largest_error(ours, theirs) < TOLERANCE


def test_elementwise_gate_equals_qwen3_next(transformers, shape):
    theirs = qwen3_next(transformers, shape)
    ours = convert(theirs)
    assert ours.config.variant == "g1_elementwise"
    assert largest_error(ours, theirs) < TOLERANCE


def headwise_pair(transformers, shape):
    """A headwise model of ours, and the Qwen3-Next whose elementwise gate repeats each head's row D times.

    The rows are written into their `q_proj` one by one, so that no function of the package is on both
    sides.
    """
    state, config = released(shape, "headwise", tied=False)
    ours, theirs = from_qwen_gated(state, config), qwen3_next(transformers, shape)
    renamed, width = theirs.state_dict(), shape["head_width"]
    for name, tensor in state.items():
        renamed[name] = tensor - 1.0 if "norm" in name else tensor
    for layer, block in enumerate(ours.blocks):
        query = block.attention.q_proj.weight
        gate = block.attention.gates["g1"].scores.linear.weight  # [H, C]
        rows = []
        for head in range(shape["heads"]):
            rows += list(query[head * width : (head + 1) * width]) + [gate[head]] * width
        renamed[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.stack(rows)
    theirs.load_state_dict(renamed)
    return ours, theirs


def test_headwise_gate_equals_qwen3_next_with_repeated_rows(transformers, shape):
    ours, theirs = headwise_pair(transformers, shape)
    assert ours.config.variant == "g1_headwise"
    assert largest_error(ours, theirs) < TOLERANCE


def test_released_elementwise_layout_equals_qwen3_next(transformers, shape):
    """The released rows, packed by plain loops from Qwen3-Next's own query and gate rows."""
    theirs = qwen3_next(transformers, shape)
    _, config = released(shape, "elementwise", tied=False)
    state, width = {}, shape["head_width"]
    for name, tensor in theirs.state_dict().items():
        if name.endswith("q_proj.weight"):
            pairs = tensor.split(width)  # q0 g0 q1 g1 ...
            query, gate = torch.cat(pairs[0::2]), torch.cat(pairs[1::2])
            tensor = pack_rows(query, gate, shape["heads"], shape["kv_heads"])
        state[name] = tensor + 1.0 if "norm" in name else tensor
    assert largest_error(from_qwen_gated(state, config), theirs) < TOLERANCE


def test_exported_baseline_loads_into_transformers(transformers, shape):
    """Out through `to_qwen_gated` and into transformers with its own strict loader."""
    state, config = released(shape, None, tied=False)
    ours = from_qwen_gated(state, config)
    exported, exported_config = to_qwen_gated(ours)
    hf_config = transformers.Qwen3Config(**exported_config)
    hf_config._attn_implementation = "eager"
    theirs = transformers.Qwen3ForCausalLM(hf_config)
    theirs.load_state_dict(exported)
    assert largest_error(ours, theirs) < TOLERANCE


# ------------------------------------------------------------------------------------ gradients
def gradients(ours, theirs, names):
    """Gradients of the same loss: theirs under their names, ours under ours, for layer 1."""
    batch = tokens(length=20)
    for model in (ours, theirs):
        out = model(batch[:, :-1])
        next_token_loss(out if isinstance(out, torch.Tensor) else out.logits, batch[:, 1:]).backward()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for their_name, our_name in names.items():
        yield other[their_name].grad, own[our_name].grad


PLAIN = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.layers.1.self_attn.k_proj.weight": "blocks.1.attention.k_proj.weight",
    "model.layers.1.self_attn.o_proj.weight": "blocks.1.attention.o_proj.weight",
    "model.layers.1.self_attn.q_norm.weight": "blocks.1.attention.q_norm.weight",
    "model.layers.1.input_layernorm.weight": "blocks.1.attention_norm.weight",
    "model.layers.0.mlp.down_proj.weight": "blocks.0.ffn.down_proj.weight",
}
PACKED = "model.layers.1.self_attn.q_proj.weight"
GATE = "blocks.1.attention.gates.g1.scores.linear.weight"


def assert_same_gradient(found, wanted):
    assert wanted.abs().max() > 1e-4  # a vanished gradient would equal anything
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
def test_baseline_gradients_equal_qwen3(transformers, shape, tied):
    theirs = qwen3(transformers, shape, tied)
    ours = convert(theirs)
    for wanted, found in gradients(ours, theirs, PLAIN | {PACKED: "blocks.1.attention.q_proj.weight"}):
        assert_same_gradient(found, wanted)


def test_elementwise_gradients_equal_qwen3_next_after_unpacking(transformers, shape):
    theirs = qwen3_next(transformers, shape)
    ours = convert(theirs)
    for wanted, found in gradients(ours, theirs, PLAIN):
        assert_same_gradient(found, wanted)
    query, gate = split_per_head(theirs.get_parameter(PACKED).grad, AttentionShape(**shape))
    assert_same_gradient(ours.get_parameter("blocks.1.attention.q_proj.weight").grad, query)
    assert_same_gradient(ours.get_parameter(GATE).grad, gate)


def test_headwise_gradient_is_the_sum_over_the_repeated_rows(transformers, shape):
    ours, theirs = headwise_pair(transformers, shape)
    list(gradients(ours, theirs, {}))
    _, gate = split_per_head(theirs.get_parameter(PACKED).grad, AttentionShape(**shape))
    assert_same_gradient(ours.get_parameter(GATE).grad, gate.unflatten(0, (shape["heads"], -1)).sum(1))


# ------------------------------------------------------------------------------------ planted bugs
class AfterProjection(nn.Module):
    """The bug: the G1 scores multiply the layer's output instead of the heads' outputs (needs C = H*D)."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, y, x, probe=None):
        return y * self.gate.scores(x).flatten(2)


def gate_after_output_projection(ours, monkeypatch):
    for block in ours.blocks:
        block.attention.gates = nn.ModuleDict({"g5": AfterProjection(block.attention.gates["g1"])})


def gate_from_the_unnormalised_stream(ours, monkeypatch):
    for block in ours.blocks:
        block.attention_norm.register_forward_hook(lambda module, args, out: setattr(module, "raw", args[0]))
        scores = block.attention.gates["g1"].scores
        scores.register_forward_pre_hook(lambda module, args, norm=block.attention_norm: (norm.raw,))


def kv_heads_repeated_as_a_whole(ours, monkeypatch):
    right = attention_module.attention_sdpa

    def wrong(q, k, v, causal=True):
        groups = q.shape[1] // k.shape[1]
        return right(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), causal)

    monkeypatch.setattr(attention_module, "attention_sdpa", wrong)


def rotary_pairs_interleaved(ours, monkeypatch):
    def wrong(x, cos, sin):
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    monkeypatch.setattr(attention_module, "apply_rope", wrong)


def rotary_before_qk_norm(ours, monkeypatch):
    for block in ours.blocks:
        block.attention.qk_order = ("gate", "rope", "norm")


def qk_norms_exchanged(ours, monkeypatch):
    for block in ours.blocks:
        block.attention.q_norm, block.attention.k_norm = block.attention.k_norm, block.attention.q_norm


def block_norms_exchanged(ours, monkeypatch):
    for block in ours.blocks:
        block.attention_norm, block.ffn_norm = block.ffn_norm, block.attention_norm


SHARED_BUGS = [
    kv_heads_repeated_as_a_whole,
    rotary_pairs_interleaved,
    rotary_before_qk_norm,
    qk_norms_exchanged,
    block_norms_exchanged,
]
GATE_BUGS = [gate_after_output_projection, gate_from_the_unnormalised_stream]
FAR = 1000 * TOLERANCE


@pytest.mark.parametrize("plant", SHARED_BUGS)
def test_a_bug_planted_in_the_baseline_shows(transformers, monkeypatch, plant):
    theirs = qwen3(transformers, GROUPED)
    ours = convert(theirs)
    plant(ours, monkeypatch)
    assert largest_error(ours, theirs) > FAR


@pytest.mark.parametrize("plant", SHARED_BUGS + GATE_BUGS)
def test_a_bug_planted_in_the_elementwise_gate_shows(transformers, monkeypatch, plant):
    theirs = qwen3_next(transformers, GROUPED)
    ours = convert(theirs)
    plant(ours, monkeypatch)
    assert largest_error(ours, theirs) > FAR


@pytest.mark.parametrize("plant", [kv_heads_repeated_as_a_whole, gate_from_the_unnormalised_stream])
def test_a_bug_planted_in_the_headwise_gate_shows(transformers, monkeypatch, plant):
    ours, theirs = headwise_pair(transformers, GROUPED)
    plant(ours, monkeypatch)
    assert largest_error(ours, theirs) > FAR


def swapped_layout(theirs, dialect, wrong_split, monkeypatch):
    """Loads with the rows of `q_proj` read in the other layout's order."""
    right = getattr(qwen_module, dialect)
    wrong = SimpleNamespace(**{**vars(right), "split": wrong_split})
    monkeypatch.setattr(qwen_module, dialect, wrong)
    return convert(theirs)


def test_reading_rows_per_group_instead_of_per_head_shows_only_with_groups(transformers, monkeypatch):
    for shape, visible in ((GROUPED, True), (EQUAL, False)):
        theirs = qwen3_next(transformers, shape)
        error = largest_error(swapped_layout(theirs, "QWEN3_NEXT", split_per_group, monkeypatch), theirs)
        assert (error > FAR) if visible else (error < TOLERANCE)


def test_reading_the_released_rows_per_head_shows_only_with_groups(monkeypatch):
    for shape, visible in ((GROUPED, True), (EQUAL, False)):
        state, config = released(shape, "elementwise")
        right = from_qwen_gated(state, config)
        with monkeypatch.context() as patch:
            wrong = SimpleNamespace(**{**vars(qwen_module.QWEN_GATED), "split": split_per_head})
            patch.setattr(qwen_module, "QWEN_GATED", wrong)
            error = largest_error(from_qwen_gated(state, config), right)
        assert (error > FAR) if visible else (error < TOLERANCE)


def test_norms_left_zero_centred_show(transformers, monkeypatch):
    theirs = qwen3_next(transformers, GROUPED)
    wrong = SimpleNamespace(**{**vars(qwen_module.QWEN3_NEXT), "norm_shift": 0.0})
    monkeypatch.setattr(qwen_module, "QWEN3_NEXT", wrong)
    assert largest_error(convert(theirs), theirs) > FAR


NORMS = ["q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "model.norm"]


@pytest.mark.parametrize("key, value", [("rms_norm_eps", 1e-6), ("rope_parameters", {"rope_theta": 10_000.0})])
def test_a_default_instead_of_the_configs_value_shows(transformers, key, value):
    theirs = qwen3(transformers, GROUPED)
    ours = from_qwen3(theirs.state_dict(), theirs.config.to_dict() | {key: value})
    assert largest_error(ours, theirs) > FAR


@pytest.mark.parametrize("norm", NORMS)
def test_one_forgotten_norm_shows(transformers, norm):
    """Each norm weight matters: the comparison fails when a single one stays at its start."""
    theirs = qwen3(transformers, GROUPED)
    state = theirs.state_dict()
    state = {name: torch.ones_like(t) if f"{norm}.weight" in name else t for name, t in state.items()}
    assert largest_error(from_qwen3(state, theirs.config.to_dict()), theirs) > FAR


def test_gradients_of_swapped_rows_differ(transformers):
    theirs = qwen3_next(transformers, GROUPED)
    ours = convert(theirs)
    list(gradients(ours, theirs, {}))
    query, gate = split_per_group(theirs.get_parameter(PACKED).grad, AttentionShape(**GROUPED))
    for wrong, name in ((query, "blocks.1.attention.q_proj.weight"), (gate, GATE)):
        with pytest.raises(AssertionError):
            assert_same_gradient(ours.get_parameter(name).grad, wrong)


def test_headwise_rows_widened_by_repeating_the_stack_show(transformers):
    """`repeat` instead of `repeat_interleave` on the gate's rows gives heads each other's scores."""
    ours, theirs = headwise_pair(transformers, GROUPED)
    elementwise = from_qwen3_next(theirs.state_dict(), theirs.config.to_dict())
    for right, wide in zip(ours.blocks, elementwise.blocks, strict=True):
        rows = right.attention.gates["g1"].scores.linear.weight
        gate: Gate = wide.attention.gates["g1"]
        assert torch.equal(gate.scores.linear.weight, widen_headwise(rows, AttentionShape(**GROUPED)))
        gate.scores.linear.weight = nn.Parameter(rows.repeat(GROUPED["head_width"], 1).detach())
    assert largest_error(elementwise, theirs) > FAR


def test_released_rows_converted_for_transformers(transformers):
    """`per_group_to_per_head` makes a released `q_proj` one that Qwen3-Next computes with."""
    state, config = released(GROUPED, "elementwise", tied=False)
    ours, theirs = from_qwen_gated(state, config), qwen3_next(transformers, GROUPED)
    shape = AttentionShape(**GROUPED)
    converted = {name: tensor - 1.0 if "norm" in name else tensor for name, tensor in state.items()}
    packed = [name for name in state if name.endswith("q_proj.weight")]
    theirs.load_state_dict(converted | {name: per_group_to_per_head(state[name], shape) for name in packed})
    assert largest_error(ours, theirs) < TOLERANCE
    theirs.load_state_dict(converted)  # twin: the rows as they were
    assert largest_error(ours, theirs) > FAR
