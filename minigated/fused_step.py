"""Decoding one sequence in five kernels a layer: the step of `minigated.static_cache` where a GPU has one row to do.

The compiled step keeps the module's order of operations, many small kernels that wait for each other. Here each
layer is: norm and all projections; attention with everything around it; W_O and its sum; norm, gate and up; down and
its sum. The numbers are those of `minigated.static_cache.decode`, up to the order of sums.
"""

import torch
from torch import Tensor, nn

from minigated import kernels
from minigated.errors import InputError
from minigated.lm import Block, LanguageModel
from minigated.variants import Variant, get_variant


def _gate(variant: Variant) -> str | None:
    """What the kernels call the variant's gate, "plain" where it has none; None for a variant they do not know."""
    if variant.head_output or variant.switch or variant.sandwich or variant.clip:
        return None
    if variant.gate is None:
        return "plain"
    sigmoid = (variant.gate.position, variant.gate.form, variant.gate.activation) == ("g1", "multiply", "sigmoid")
    return variant.gate.granularity if sigmoid and variant.gate.granularity in ("elementwise", "headwise") else None


def unserved(model: LanguageModel, batch: int) -> str | None:
    """Why `decode_fused` cannot do this model's steps with so many rows on its device; None if it can."""
    config, weight, order = model.config, model.embedding.weight, model.config.qk_order
    if batch != 1:
        return f"does one row, not {batch}"
    if config.experts:
        return "knows no mixture of experts"
    if _gate(get_variant(config.variant)) is None:
        return f"does not know variant {config.variant!r}; accepted: no gate, g1_elementwise or g1_headwise"
    if config.qk_norm and order.index("norm") > order.index("rope"):
        return f"norms queries and keys before the rotation; qk_order is {order!r}"
    if not all(parameter.is_contiguous() for parameter in model.parameters()):
        return "wants weights that lie in one piece each"
    if not kernels.usable(weight):
        return f"needs {kernels.WANTED}; the model is on {weight.device}, {weight.dtype}"
    return None


def _layer(
    fused, attend, block: Block, x: Tensor, tables: tuple, position: Tensor, held: tuple, gate: str, arrived: Tensor
) -> None:
    """One block on one token, x [C] in place. `fused`: the module of the kernels but `attend`."""
    layer, ffn, eps = block.attention, block.ffn, block.attention_norm.eps
    projections = [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    if gate != "plain":
        projections.append(layer.gates["g1"].scores.linear.weight)
    normed = not isinstance(layer.q_norm, nn.Identity)
    norms = (layer.q_norm.weight, layer.k_norm.weight) if normed else None
    qkv = fused.project(x, block.attention_norm.weight, eps, *projections)
    options = (norms, layer.q_norm.eps if normed else eps, layer.shape.heads, gate, arrived)
    y = attend(qkv, *held, position, *tables, *options)
    fused.add(x, y, layer.o_proj.weight)
    hidden = fused.gate_and_up(x, block.ffn_norm.weight, block.ffn_norm.eps, ffn.gate_proj.weight, ffn.up_proj.weight)
    fused.add(x, hidden, ffn.down_proj.weight)


@torch.no_grad()
def decode_fused(
    model: LanguageModel, tokens: Tensor, position: Tensor, held: list[tuple[Tensor, Tensor]], move: bool = False
) -> Tensor:
    """As `minigated.static_cache.decode`, for a model that is not `unserved`; nothing is compiled but the kernels.

    Args:
        move: then write the likeliest token that follows to `tokens`, and the place of it to `position`.

    Raises:
        InputError: a model that is `unserved`; the message says why.
    """
    if why := unserved(model, len(tokens)):
        raise InputError(f"the fused step {why}")
    # here, since a machine without Triton imports this module too
    from minigated.kernels import decode_triton as fused
    from minigated.kernels.attend_triton import attend

    gate, tables = _gate(get_variant(model.config.variant)), (model.rotary.cos, model.rotary.sin)
    x, arrived = fused.embed(model.embedding.weight, tokens, model.blocks[0].attention.shape.heads)
    for block, cache in zip(model.blocks, held):
        _layer(fused, attend, block, x, tables, position, cache, gate, arrived)
    logits = fused.project(x, model.norm.weight, model.norm.eps, model.head.weight)[None]  # [1, V]
    if move:
        fused.choose(logits, tokens, position, arrived)
    return logits
