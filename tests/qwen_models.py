"""Small random Qwen models of transformers, and the released state-dict layout built row by row.

Every weight is drawn, norms included, and large enough that attention is far from uniform: a comparison on
nearly constant logits would pass with most bugs inside.
"""

import torch

VOCABULARY, LAYERS, FFN, CONTEXT = 61, 2, 40, 32
BASE, EPS = 1000.0, 1e-3  # not the usual ones: a default taken instead of the config's value shows
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
GROUPED = dict(width=48, heads=6, kv_heads=2, head_width=8)  # G = 3, C = H*D
NARROW = dict(width=40, heads=6, kv_heads=2, head_width=8)  # G = 3, C below H*D
EQUAL = dict(width=32, heads=4, kv_heads=4, head_width=8)  # G = 1


def _options(shape: dict) -> dict:
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=shape["width"],
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": BASE, "partial_rotary_factor": 1.0},
    )


def randomize(model: torch.nn.Module, norm_centre: float, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter; norm weights around `norm_centre`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(norm_centre + 0.3 * draw)
            else:
                weight.copy_(draw / weight.shape[1] ** 0.5)
    return model


def qwen3(transformers, shape: dict, tied: bool = False):
    """Qwen3ForCausalLM in float32 with eager attention."""
    config = transformers.Qwen3Config(**_options(shape), tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    return randomize(transformers.Qwen3ForCausalLM(config), norm_centre=1.0)


def qwen3_next(transformers, shape: dict):
    """Qwen3NextForCausalLM with full attention and a dense feed-forward in every layer."""
    config = transformers.Qwen3NextConfig(
        **_options(shape), layer_types=["full_attention"] * LAYERS, num_experts=0, tie_word_embeddings=False
    )
    config._attn_implementation = "eager"
    return randomize(transformers.Qwen3NextForCausalLM(config), norm_centre=0.0)


def qwen3_moe(transformers, shape: dict, renormalise: bool):
    """Qwen3MoeForCausalLM in float32 with eager attention: 5 experts of width 12, 2 a token."""
    config = transformers.Qwen3MoeConfig(
        **_options(shape), **EXPERTS, norm_topk_prob=renormalise, tie_word_embeddings=False
    )
    config._attn_implementation = "eager"
    return randomize(transformers.Qwen3MoeForCausalLM(config), norm_centre=1.0)


def qwen3_next_moe(transformers, shape: dict, renormalise: bool):
    """Qwen3NextForCausalLM with full attention, experts and a shared expert in every layer."""
    config = transformers.Qwen3NextConfig(
        **_options(shape), **EXPERTS, layer_types=["full_attention"] * LAYERS, norm_topk_prob=renormalise,
        shared_expert_intermediate_size=10, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return randomize(transformers.Qwen3NextForCausalLM(config), norm_centre=0.0)


def tokens(batch: int = 2, length: int = 19, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ released layout
def pack_rows(query: torch.Tensor, gate: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """The released order by plain loops over rows: of each group its query rows, then its gate rows."""
    query_rows, gate_rows = len(query) // heads, len(gate) // heads  # rows of one head
    group, rows = heads // kv_heads, []
    for kv in range(kv_heads):
        members = range(kv * group, (kv + 1) * group)
        rows += [query[head * query_rows + row] for head in members for row in range(query_rows)]
        rows += [gate[head * gate_rows + row] for head in members for row in range(gate_rows)]
    return torch.stack(rows)


def released(shape: dict, gate: str | None, seed=3, ffn=FFN, tied=True) -> tuple[dict, dict]:
    """A random state dict in the released layout and its config.json, written out by hand.

    Args:
        gate: "headwise", "elementwise" or None. ffn: width of the weights; the config keeps saying `FFN`.
    """
    generator = torch.Generator().manual_seed(seed)
    width, inner = shape["width"], shape["heads"] * shape["head_width"]
    kv_inner = shape["kv_heads"] * shape["head_width"]

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm(size):
        return 1.0 + 0.3 * torch.randn(size, generator=generator)

    state = {"model.embed_tokens.weight": matrix(VOCABULARY, width), "model.norm.weight": norm(width)}
    for layer in range(LAYERS):
        query = matrix(inner, width)
        if gate is not None:
            gate_weight = matrix(shape["heads"] if gate == "headwise" else inner, width)
            query = pack_rows(query, gate_weight, shape["heads"], shape["kv_heads"])
        sizes = {
            "self_attn.q_proj": query,
            "self_attn.k_proj": matrix(kv_inner, width),
            "self_attn.v_proj": matrix(kv_inner, width),
            "self_attn.o_proj": matrix(width, inner),
            "self_attn.q_norm": norm(shape["head_width"]),
            "self_attn.k_norm": norm(shape["head_width"]),
            "mlp.gate_proj": matrix(ffn, width),
            "mlp.up_proj": matrix(ffn, width),
            "mlp.down_proj": matrix(width, ffn),
            "input_layernorm": norm(width),
            "post_attention_layernorm": norm(width),
        }
        state |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in sizes.items()}
    if not tied:
        state["lm_head.weight"] = matrix(VOCABULARY, width)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_qwen3.Qwen3Config"},
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "headwise_attn_output_gate": gate == "headwise",
        "elementwise_attn_output_gate": gate == "elementwise",
        "head_dim": shape["head_width"],
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": FFN,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": shape["kv_heads"],
        "qkv_bias": False,
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }
    return state, config
