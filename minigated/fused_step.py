"""Decoding one sequence in five kernels a layer: the step of `minigated.static_cache` where a GPU has one row to do.

The compiled step keeps the module's order of operations, a dozen kernels a layer that wait for each other. Here each
layer is: norm and all projections; attention with everything around it; W_O and its sum; norm, gate and up; down and
its sum. The numbers are those of `minigated.static_cache.decode`.
"""

import torch
from torch import Tensor

from minigated import kernels
from minigated.lm import Block, LanguageModel
from minigated.variants import Variant, get_variant


def _gate(variant: Variant) -> str | None:
    """The gate that the kernels know the variant's attention by, None for one that they do not."""
    if variant.head_output or variant.switch or variant.sandwich or variant.clip:
        return None
    if variant.gate is None:
        return "none"
    known = variant.gate.position == "g1" and (variant.gate.form, variant.gate.activation) == ("multiply", "sigmoid")
    return variant.gate.granularity if known and variant.gate.granularity in ("elementwise", "headwise") else None


def serves(model: LanguageModel, batch: int) -> bool:
    """Whether `decode_fused` knows this model: one row, no experts, no gate or a sigmoid at G1, norm, then rotation."""
    config, order = model.config, model.config.qk_order
    known = batch == 1 and not config.experts and _gate(get_variant(config.variant)) is not None
    return known and config.head_width % 2 == 0 and order.index("norm") < order.index("rope")


def fits(model: LanguageModel, batch: int) -> bool:
    """Whether to take `decode_fused`: it serves, on a GPU, in a dtype that the kernels know."""
    return serves(model, batch) and kernels.usable(model.embedding.weight)


def _layer(block: Block, x: Tensor, rotary, position: Tensor, held: tuple[Tensor, Tensor], gate: str) -> None:
    """One block on one token, x [C] in place."""
    from minigated.kernels import decode_triton as fused

    layer, eps = block.attention, block.attention_norm.eps
    projections = [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    if gate != "none":
        projections.append(layer.gates["g1"].scores.linear.weight)
    normed = not isinstance(layer.q_norm, torch.nn.Identity)
    norms = (layer.q_norm.weight, layer.k_norm.weight) if normed else None
    qkv = fused.project(x, block.attention_norm.weight, eps, *projections)
    y = fused.attend(qkv, *held, position, *rotary, norms, layer.q_norm.eps if normed else eps, layer.shape.heads, gate)
    fused.add(x, y, layer.o_proj.weight)
    ffn = block.ffn
    hidden = fused.gate_and_up(x, block.ffn_norm.weight, block.ffn_norm.eps, ffn.gate_proj.weight, ffn.up_proj.weight)
    fused.add(x, hidden, ffn.down_proj.weight)


def decode_fused(model: LanguageModel, tokens: Tensor, position: Tensor, held: list[tuple[Tensor, Tensor]]) -> Tensor:
    """As `minigated.static_cache.decode`, for a model that it `serves`; nothing is compiled but the kernels."""
    from minigated.kernels import decode_triton as fused

    gate = _gate(get_variant(model.config.variant))
    x = model.embedding(tokens.clamp(min=0))[0]  # [C], a copy: the layers add to it
    for block, cache in zip(model.blocks, held):
        _layer(block, x, (model.rotary.cos, model.rotary.sin), position, cache, gate)
    return fused.project(x, model.norm.weight, model.norm.eps, model.head.weight)[None]  # [1, V]
