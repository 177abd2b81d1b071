"""Operations and bytes of what is timed, by formula: where a row stands on the roofline does not depend on a counter.

A multiply and an add count as two operations. Training counts three times the forward products: one for the result,
one for the gradient of each factor; what a kernel computes again is its own affair and is not credited. Bytes are those
that must move at least once: inputs read, results written, nothing in between.
"""

import math

from minigated.cost import Cost, attention_cost, kv_cache_bytes
from minigated.lm_config import LMConfig
from minigated.variants import get_variant
from minigated.vit import ViTConfig

TRAINING = 3  # forward, gradient of the input, gradient of the weight
FUSED_BLOCK = 45  # N C elements a backbone block moves when every pass over memory that can be fused is fused


def causal_attention(
    batch: int, tokens: int, heads: int, head_width: int, kv_heads: int | None = None, item: int = 2, training=False
) -> Cost:
    """The attention core with half of the square masked away.

    The backward pass reads q, k, v, y and the gradient of y, and writes three gradients.
    """
    kv_heads = kv_heads or heads
    full = attention_cost(batch, tokens, heads, head_width, kv_heads, item)
    flops = full.flops // 2 * (TRAINING if training else 1)
    gradients = batch * tokens * head_width * (4 * heads + 4 * kv_heads) * item
    return Cost(flops, full.bytes + (gradients if training else 0))


def attention_module(batch, tokens, width, heads, head_width, gate: str = "none", item=2, training=False) -> Cost:
    """A whole layer: q, k, v, output projection, the core and the gate's projection.

    Args:
        gate: "none", "headwise" (a score a head) or "elementwise" (a score a channel).
    """
    inner = heads * head_width
    scores = {"none": 0, "headwise": heads, "elementwise": inner}[gate]
    weights = 4 * width * inner + width * scores
    flops = 2 * batch * tokens * weights * (TRAINING if training else 1)
    core = causal_attention(batch, tokens, heads, head_width, item=item, training=training)
    ends = 2 * batch * tokens * width + weights
    return Cost(flops + core.flops, ends * item * (TRAINING if training else 1))


def two_passes(batch: int, height: int, width: int, channels: int, window: int, item: int = 2, training=False) -> Cost:
    """Width pass and height pass in windows: each has two products of 2 N W C operations.

    Bytes as if one kernel did both passes: q, k, v read and the result written, nothing for the values in between;
    training reads those three and the gradient, and writes three gradients.
    """
    numbers = batch * height * width * channels
    flops = 2 * 2 * 2 * numbers * window
    return Cost(flops * TRAINING, 11 * numbers * item) if training else Cost(flops, 4 * numbers * item)


def moe_layer(tokens, width, hidden, experts, top_k, item=2, training=False) -> Cost:
    """Router and the k experts of each token. Every expert's weights are read once (written once as gradients)."""
    active = 3 * width * hidden * top_k + experts * width
    weights = 3 * width * hidden * experts + experts * width
    flops = 2 * tokens * active * (TRAINING if training else 1)
    numbers = weights + 2 * tokens * width
    return Cost(flops, (numbers * TRAINING if training else numbers) * item)


# ---------------------------------------------------------------------------------------------- whole models
def lm_matrix_parameters(config: LMConfig, total: int) -> int:
    """Parameters one token is multiplied by: all but the embedding, with the output layer, active experts only.

    Args:
        total: parameters of the built model; a tied output layer is the embedding and counts as one.
    """
    lookup = 0 if config.tied else config.vocabulary * config.width
    return total - lookup - config.idle_parameters


def lm_training(config: LMConfig, total: int, batch: int, tokens: int) -> float:
    """Operations of a training step: 6 a parameter a token, plus causal attention over half of the square."""
    heads = get_variant(config.variant).shape(config.shape).heads
    core = causal_attention(batch, tokens, heads, config.head_width, training=True).flops
    return 6 * lm_matrix_parameters(config, total) * batch * tokens + config.layers * core


def lm_decoding(config: LMConfig, total: int, past: float, item: int = 2) -> Cost:
    """One new token of one sequence: every active weight read once, and the keys and values of `past` tokens."""
    weights = lm_matrix_parameters(config, total)
    shape = get_variant(config.variant).shape(config.shape)
    core = 4 * past * shape.heads * shape.head_width * config.layers
    cache = kv_cache_bytes(1, 1, config.layers, shape.kv_heads, shape.head_width, item) * past
    return Cost(2 * weights + core, weights * item + cache)


def vit_block(config: ViTConfig, stage: int) -> int:
    """Forward operations of one block of a gated backbone, retention or SWAT, for one image.

    (5 + 2 r) N C^2 for query, key, value, output, a gate and the feed-forward, 4 N W C for the two passes, all times
    two, and the depth-wise kernels: 3 x 3 before the block and inside the feed-forward, 5 x 5 beside the attention.
    """
    height, width = config.map_size(stage)
    cells, channels, ratio = height * width, config.widths[stage], config.ffn_ratios[stage]
    ungated = config.mixers[stage] != "gated_swinrmt_swat" and config.gate == "none"
    linear = (4 if ungated else 5) + 2 * ratio
    window = (min(config.window or side, side) for side in (height, width))
    local = 9 + 25 * config.lce + 9 * ratio
    return int(2 * cells * (linear * channels**2 + 2 * sum(window) * channels + local * channels))


def vit_flops(config: ViTConfig) -> int:
    """Forward operations of a gated backbone of RMT's skeleton for one image: stem, blocks, what joins them, head."""
    first, widths, depths = config.widths[0], config.widths, config.depths
    cells = [math.prod(config.map_size(stage)) for stage in range(len(widths))]
    before = cells[0] * (4 if config.stem_stride == 4 else 1)  # the stem halves twice, once or never
    half = first // 2
    stem = 9 * (before * (config.image_channels * half + half**2) + cells[0] * (half * first + first**2))
    between = 9 * sum(n * a * b for n, a, b in zip(cells[1:], widths, widths[1:]))
    head = cells[-1] * widths[-1] * config.head_width + config.head_width * config.classes
    return 2 * (stem + between + head) + sum(depth * vit_block(config, i) for i, depth in enumerate(depths))


def vit_bytes(config: ViTConfig, parameters: int, batch: int, item: int = 2, training=False) -> int:
    """Bytes of a step with best fusion: `FUSED_BLOCK` N C numbers a block and image, and the weights once."""
    numbers = sum(
        math.prod(config.map_size(stage)) * width * depth
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths))
    )
    return (FUSED_BLOCK * numbers * batch + parameters) * item * (TRAINING if training else 1)
