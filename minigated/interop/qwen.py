"""Weights of Qwen models under this package's names.

Three sources, all decoders with the same parts under the same names:

- Qwen3 and Qwen3-MoE of transformers: the baseline; `q_proj` holds queries only.
- Qwen3-Next of transformers with full attention in every layer, dense or a mixture of experts with a shared one: the
  elementwise gate at G1, rows per head; RMSNorm weights are stored as their difference from one.
- Qwen's release for *Gated Attention for Large Language Models* (arXiv 2505.06708): baseline, headwise and
  elementwise, rows per key/value group. This layout is tested on state dicts built to it with random
  weights and through its identities with Qwen3-Next, not on the released files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minigated.attention import AttentionShape
from minigated.errors import InputError, one_of
from minigated.interop.experts import EXPERT_NAMES, SHARED_NAMES, expert_count, pack_experts
from minigated.interop.layouts import join_per_group, split_per_group, split_per_head
from minigated.interop.sizes import EMBEDDING, HEAD, NORM, VARIANT_OF, read_sizes, released_config
from minigated.lm import LanguageModel, LMConfig
from minigated.rope import RotaryTable

OUR_GATE = "attention.gates.g1.scores.linear.weight"
LAYER_NAMES = {  # theirs -> ours, inside a layer; their q_proj may hold the gate too and is split apart
    "self_attn.q_proj.weight": "attention.q_proj.weight",
    "self_attn.k_proj.weight": "attention.k_proj.weight",
    "self_attn.v_proj.weight": "attention.v_proj.weight",
    "self_attn.o_proj.weight": "attention.o_proj.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "mlp.gate_proj.weight": "ffn.gate_proj.weight",
    "mlp.up_proj.weight": "ffn.up_proj.weight",
    "mlp.down_proj.weight": "ffn.down_proj.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


@dataclass(frozen=True)
class Dialect:
    """What the three sources do differently.

    Attributes:
        split: takes `q_proj` apart into query rows and gate rows.
        norm_shift: what is added to a stored RMSNorm weight.
        rotary_share: `partial_rotary_factor` where the config is silent.
        variants: what can be stored that way.
    """

    split: Callable[[Tensor, AttentionShape], tuple[Tensor, Tensor]]
    norm_shift: float
    rotary_share: float
    variants: tuple[str, ...]


QWEN3 = Dialect(split_per_group, 0.0, 1.0, ("none",))
QWEN_GATED = Dialect(split_per_group, 0.0, 1.0, tuple(VARIANT_OF.values()))
QWEN3_NEXT = Dialect(split_per_head, 1.0, 0.25, ("g1_elementwise",))


# ---------------------------------------------------------------------------------------------- the doors
def from_qwen3(state: Mapping[str, Tensor], config: Mapping, dtype=None) -> LanguageModel:
    """A Qwen3 or Qwen3-MoE of transformers as this package's baseline.

    Args:
        state: its state dict. Every tensor is copied.
        config: what stands in its config.json (`hf_model.config.to_dict()`).
        dtype: torch dtype of the new model; as stored unless given.

    Raises:
        InputError: for missing, unexpected or misshapen weights, and for options this package does not
        have.
    """
    return _convert(state, config, QWEN3, dtype)


def from_qwen_gated(state: Mapping[str, Tensor], config: Mapping, dtype=None) -> LanguageModel:
    """A model in the layout of Qwen's gated-attention release: baseline, headwise or elementwise.

    Which of the three is read off the rows of `q_proj`, and must agree with the config's two flags where it
    has them. The feed-forward's width is read off the weights: the release narrows it for the elementwise
    gate (5504 instead of 6144). Arguments and errors as in `from_qwen3`.
    """
    return _convert(state, config, QWEN_GATED, dtype)


def from_qwen3_next(state: Mapping[str, Tensor], config: Mapping, dtype=None) -> LanguageModel:
    """A Qwen3-Next of transformers with full attention in every layer, dense or with experts in every layer.

    Its RMSNorm multiplies by 1 + weight; the shift is made here, in float32. Rotary positions must cover
    the whole head (`partial_rotary_factor` 1). Arguments and errors as in `from_qwen3`.
    """
    return _convert(state, config, QWEN3_NEXT, dtype)


def to_qwen_gated(model: LanguageModel) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `from_qwen_gated`: state dict in the released layout, and its config.json as a dict.

    Raises:
        InputError: a model that the layout has no words for: another variant, experts, scaled rotary frequencies, or
            queries and keys that are rotated before they are normalised.
    """
    config = model.config
    one_of("variant for the released layout", config.variant, QWEN_GATED.variants)
    one_of("experts for the released layout", config.experts, (0,))
    one_of("rope_scaling for the released layout", config.rope_scaling, ("none",))
    if config.qk_norm and config.qk_order.index("rope") < config.qk_order.index("norm"):
        raise InputError(f"qk_order {config.qk_order} for the released layout; accepted: norm before rope")
    ours = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state = {theirs: ours[name] for theirs, name in _names(config).items()}
    for layer in range(config.layers if config.variant != "none" else 0):
        q_proj, gate = f"model.layers.{layer}.self_attn.q_proj.weight", ours[f"blocks.{layer}.{OUR_GATE}"]
        state[q_proj] = join_per_group(state[q_proj], gate, config.shape)
    return state, released_config(config)


# ---------------------------------------------------------------------------------------------- how
def _names(config: LMConfig) -> dict[str, str]:
    """Their full names -> ours, for all weights of a model except the gates."""
    names = {EMBEDDING: "embedding.weight", NORM: "norm.weight"}
    if not config.tied:
        names[HEAD] = "head.weight"
    inside = dict(LAYER_NAMES)
    if config.experts:
        inside = {theirs: ours for theirs, ours in inside.items() if not theirs.startswith("mlp.")} | EXPERT_NAMES
        inside |= SHARED_NAMES if config.shared_width else {}
    for layer in range(config.layers):
        for theirs, ours in inside.items():
            if config.qk_norm or not theirs.endswith(("q_norm.weight", "k_norm.weight")):
                names[f"model.layers.{layer}.{theirs}"] = f"blocks.{layer}.{ours}"
    return names


def _convert(state: Mapping[str, Tensor], source: Mapping, dialect: Dialect, dtype) -> LanguageModel:
    state = pack_experts(state, expert_count(source))
    config = read_sizes(state, source, dialect.rotary_share)
    one_of("gate for this loader", config.variant, dialect.variants)
    names = _names(config)
    if config.tied and HEAD in state:  # saved twice by some writers
        if not torch.equal(state[HEAD], state[EMBEDDING]):
            raise InputError(f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
        names[HEAD] = "head.weight"
    _check_names(state, names)

    weights = {}
    for theirs, ours in names.items():
        tensor = state[theirs].detach()
        if ours.endswith("q_proj.weight") and config.variant != "none":
            tensor, gate = dialect.split(tensor, config.shape)  # [H*D, C], [H*D | H, C]
            block = ours.removesuffix("attention.q_proj.weight")
            weights[block + OUR_GATE] = gate.to(dtype or gate.dtype, copy=True)
        elif "norm" in ours and dialect.norm_shift:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) + dialect.norm_shift
        weights[ours] = tensor.to(dtype or state[theirs].dtype, copy=True)
    return _assemble(config, weights)


def _assemble(config: LMConfig, weights: dict[str, Tensor]) -> LanguageModel:
    """A model that takes over `weights` (our names), without drawing random ones first."""
    with torch.device("meta"):
        model = LanguageModel(config)
    wanted = model.state_dict()
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    for name, tensor in weights.items():
        found, asked = list(tensor.shape), list(wanted[name].shape)
        if found != asked:
            raise InputError(f"the weight for {name} has shape {found}; the config asks for {asked}")
    model.load_state_dict(weights, assign=True)
    table = RotaryTable(config.context, config.head_width, config.rope_base)
    model.rotary = table.to(model.embedding.weight.device)  # no longer meta
    if config.tied:
        model.head.weight = model.embedding.weight
    return model


def _check_names(state: Mapping, names: Mapping) -> None:
    """One line that says which weights are missing and which nobody asked for."""
    missing = [name for name in names if name not in state]
    unexpected = [name for name in state if name not in names]
    parts = [
        f"{len(found)} {word} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for word, found in (("missing", missing), ("unexpected", unexpected))
        if found
    ]
    if parts:
        raise InputError(f"the weights do not fit the config: {'; '.join(parts)}")
