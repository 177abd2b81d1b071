"""From a released model's config.json to `LMConfig`: sizes read, agreement with the weights checked."""

from collections.abc import Mapping

from torch import Tensor

from minigated.attention import AttentionShape
from minigated.errors import InputError
from minigated.interop.experts import expert_count, expert_sizes
from minigated.interop.layouts import gate_granularity
from minigated.lm import LMConfig

VARIANT_OF = {"none": "none", "headwise": "g1_headwise", "elementwise": "g1_elementwise"}
FLAGS = {"headwise": "headwise_attn_output_gate", "elementwise": "elementwise_attn_output_gate"}
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST_LAYER = "model.layers.0.{}.weight"


def read_sizes(state: Mapping[str, Tensor], config: Mapping, rotary_share: float) -> LMConfig:
    """The `LMConfig` of a released model.

    Numbers of heads and layers come from the config, as nothing else tells them. Widths and the gate come
    from the weights; where the config names them too it must agree, except for the feed-forward's and the
    vocabulary.

    Args:
        state: their state dict, their names.
        config: content of config.json.
        rotary_share: `partial_rotary_factor` where the config does not give it.
    """
    _refuse_options(config, rotary_share)
    heads, kv_heads = _number(config, "num_attention_heads", int), _number(config, "num_key_value_heads", int)
    vocabulary, width = _matrix(state, EMBEDDING)
    q_rows, k_rows = (_matrix(state, FIRST_LAYER.format(f"self_attn.{name}"))[0] for name in ("q_proj", "k_proj"))
    if expert_count(config):
        feed_forward = expert_sizes(state, config)
        _check_agreement({"num_experts": expert_count(config)}, {"num_experts": feed_forward["experts"]})
    else:
        feed_forward = {"ffn_width": _matrix(state, FIRST_LAYER.format("mlp.gate_proj"))[0]}
    shape = AttentionShape(width, heads, kv_heads, k_rows // max(kv_heads, 1))
    kind = gate_granularity(q_rows, shape)
    qk_norm = FIRST_LAYER.format("self_attn.q_norm") in state
    _check_agreement(config, {"hidden_size": width, "head_dim": shape.head_width, "use_qk_norm": qk_norm})
    if any(flag in config for flag in FLAGS.values()):
        _check_agreement({flag: False for flag in FLAGS.values()} | dict(config), gate_flags(kind))
    rope = {**config, **(config.get("rope_parameters") or {})}  # transformers 5 moved the base in there
    return LMConfig(
        width=width,
        layers=_number(config, "num_hidden_layers", int),
        heads=heads,
        kv_heads=kv_heads,
        head_width=shape.head_width,
        **feed_forward,
        vocabulary=vocabulary,
        context=_number(config, "max_position_embeddings", int),
        variant=VARIANT_OF[kind],
        qk_norm=qk_norm,
        tied=bool(config.get("tie_word_embeddings", HEAD not in state)),
        rope_base=_number(rope, "rope_theta", float),
        norm_eps=_number(config, "rms_norm_eps", float),
    )


def gate_flags(kind: str) -> dict[str, bool]:
    """The release's two flags for a gate of that granularity."""
    return {flag: kind == granularity for granularity, flag in FLAGS.items()}


def released_config(config: LMConfig) -> dict:
    """The config.json that belongs to a model in the released layout."""
    kind = next(theirs for theirs, ours in VARIANT_OF.items() if ours == config.variant)
    return {
        "model_type": "qwen3",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "use_qk_norm": config.qk_norm,
        "hidden_act": "silu",
        **gate_flags(kind),
    }


def _matrix(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in state:
        raise InputError(f"the weights are not those of a dense Qwen decoder: {name} is missing")
    if state[name].dim() != 2:
        raise InputError(f"{name} has shape {list(state[name].shape)}; a matrix is accepted")
    return tuple(state[name].shape)


def _number(config: Mapping, key: str, kind: type):
    value, accepted = config.get(key), int if kind is int else int | float
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InputError(f"the config gives {key} as {value!r}; {kind.__name__} is accepted")
    return kind(value)


def _check_agreement(config: Mapping, found: Mapping) -> None:
    for key, value in found.items():
        if config.get(key, value) != value:
            raise InputError(f"the config says {key} = {config[key]!r}, the weights say {value!r}")


def _refuse_options(config: Mapping, rotary_share: float) -> None:
    """Options that would change the result and that this package does not have."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", rotary_share))
    given_and_accepted = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "use_sliding_window": (config.get("use_sliding_window") or False, False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (share, 1.0),
        "layer_types": (sorted(set(config.get("layer_types") or ["full_attention"])), ["full_attention"]),
        "mlp_only_layers": (config.get("mlp_only_layers") or [], []),
        "decoder_sparse_step": (config.get("decoder_sparse_step", 1), 1),
    }
    for key, (given, accepted) in given_and_accepted.items():
        if given != accepted:
            raise InputError(f"the config gives {key} as {given!r}; only {accepted!r} can be loaded")
