"""How much memory training a language model takes on each of N GPUs, by formula (chapter 9).

Parameters are counted on the meta device, tensor by tensor, and cut as FSDP2 cuts them. Activations are what autograd
keeps in eager mode, worked out per token below and held to measured bytes by a test; a compiled block keeps less, as
it computes cheap things again. A report is a sum of heights that are not all reached at once, so it is a bound from
above for tensors. The allocator's gaps, NCCL's buffers and the CUDA context, some GB together, come on top.

Recipes:
    autocast  what `train --parallel fsdp` does: float32 weights, gathered as such; autocast's bf16 copies of the
              matrices live until the backward pass. The residual stream is float32.
    mixed     FSDP2's MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=float32): blocks are gathered in bf16 and
              everything inside them is bf16.
Both hold float32 master weights, float32 gradients and both float32 moments of AdamW: 16 bytes a parameter, shared.
"""

import math
from dataclasses import asdict, dataclass

from torch import nn

from minigated.errors import InputError, one_of
from minigated.lm import SIZES, LMConfig, build_lm

FLOAT = 4  # bytes of float32
MOST = 1_000_000  # GPUs, and sequences of one: far over what there is, and the table has room for it
GATES = ("none", "g1_elementwise", "g1_headwise")  # variants that the formula knows


@dataclass(frozen=True)
class Precision:
    """Bytes a number: `stream` of the residual stream, `product` of what matrix products see.

    `apart`: every linear layer keeps a cast copy of its input of its own, as under autocast; otherwise those that read
    the same input share it.
    """

    stream: int
    product: int
    apart: bool


PRECISIONS = {
    "float32": Precision(4, 4, False), "autocast": Precision(4, 2, True), "bfloat16": Precision(2, 2, False),
}  # fmt: skip
RECIPES = {"autocast": "autocast", "mixed": "bfloat16"}


# ---------------------------------------------------------------------------------------------- activations
def norm_bytes(width: int, precision: Precision, readers: int) -> int:
    """RMSNorm over C and what its readers keep of the result, bytes a token.

    The input in float32, the normalised numbers, 1 / rms; the result once, or a copy for each linear layer.
    """
    return FLOAT * width + precision.stream * width + FLOAT + precision.product * width * readers


def attention_bytes(config: LMConfig, precision: Precision) -> int:
    """Norm, projections, QK-norm, rotation, SDPA and gate of one block, bytes a token."""
    heads, kv_heads, item = config.heads, config.kv_heads, precision.product
    queries, keys = heads * config.head_width, kv_heads * config.head_width
    gated = config.variant != "none"
    kept = norm_bytes(config.width, precision, 3 + gated if precision.apart else 1)
    kept += item * (2 * queries + 2 * keys) + FLOAT * heads  # SDPA: q, k, v, result, log-sum-exp
    if config.qk_norm:  # the input in float32, the normalised numbers, 1 / rms
        kept += (FLOAT + item) * (queries + keys) + FLOAT * (heads + kv_heads)
    if gated:  # scores, and the product that W_O reads
        kept += item * (queries if config.variant == "g1_elementwise" else heads) + item * queries
    return kept


def ffn_bytes(config: LMConfig, precision: Precision) -> int:
    """Norm and feed-forward, or mixture of experts, of one block, bytes a token."""
    item, hidden = precision.product, config.ffn_width
    if not config.experts:  # gate, SiLU, up, product
        return norm_bytes(config.width, precision, 2 if precision.apart else 1) + 4 * item * hidden
    kept = norm_bytes(config.width, precision, 0) + FLOAT * config.width  # the router reads float32
    kept += 3 * FLOAT * config.experts + FLOAT  # logits and twice the softmax, with the two losses; log-sum-exp
    kept += config.top_k * (3 * 8 + item)  # int64: expert, which assignment, place; the weight
    kept += config.top_k * item * (config.width + 5 * hidden)  # rows in; gate, up, SiLU, product, weighed
    if config.shared_width:
        readers = 3 if precision.apart else int(precision.stream == 2)  # in float32 the router's copy serves all
        kept += item * (config.width * (readers + 1) + 4 * config.shared_width + 1)
    return kept


def routing_bytes(config: LMConfig) -> int:
    """What the router losses keep of a block even where it is checkpointed, bytes a token."""
    return 2 * FLOAT * config.experts + FLOAT if config.experts else 0


def end_bytes(config: LMConfig, precision: Precision, chunk: int = 0) -> int:
    """Embedding, last norm, output layer and loss, bytes a token: the logarithms of all V probabilities, or by chunks
    the gradient of the last hidden state."""
    ends = 2 * 8  # the token and the target
    if chunk:
        return ends - 8 + norm_bytes(config.width, precision, 0) + precision.stream * config.width
    return ends + norm_bytes(config.width, precision, 1) + FLOAT * config.vocabulary


def loss_bytes(config: LMConfig, precision: Precision, tokens: int, chunk: int = 0) -> int:
    """Logits and their relatives that live for a moment, in bytes, in eager mode.

    A chunk of all tokens saves nothing: it takes about what the logits at once and their logarithms in `end_bytes` do.
    """
    item, width = precision.product, config.width
    if not chunk:  # logits, and their gradient in float32 and in the dtype of the logits
        return tokens * config.vocabulary * (2 * item + FLOAT)
    passing = min(chunk, tokens)
    logits = passing * config.vocabulary
    # `loss_and_slope` at its peak: logits; softmax and one-hot target in float32; the comparison that made the latter
    peak = logits * (item + FLOAT + FLOAT + 1)
    # after it: logits, slope, and the product to be added to the weight's gradient, which counts in small chunks
    peak = max(peak, logits * 2 * item + config.vocabulary * width * item)
    peak += 8 * (config.vocabulary + 3 * tokens)  # int64: the columns, the targets; the loss of each token and such
    return peak + tokens * precision.stream * width + passing * item * width  # hidden states, and the chunk's cast


def activation_bytes(config: LMConfig, tokens: int, precision: str, checkpointing=False, chunk: int = 0) -> dict:
    """What autograd keeps of a forward pass, in bytes, by part.

    Args:
        tokens: B T of one GPU.
        precision: a name of `PRECISIONS`.
        checkpointing: blocks keep their input, see `minigated.recompute`.
        chunk: of the loss; 0 for all logits at once.

    Returns:
        "blocks"; "running": of one block while it is computed again, 0 without checkpointing; "end"; "loss": logits
        and their relatives that live for a moment.
    """
    one_of("variant for the memory formula", config.variant, GATES)
    one_of("precision", precision, PRECISIONS)
    kind = PRECISIONS[precision]
    block = attention_bytes(config, kind) + ffn_bytes(config, kind)
    kept = kind.stream * config.width + routing_bytes(config) if checkpointing else block
    return {
        "blocks": tokens * config.layers * kept,
        "running": tokens * block if checkpointing else 0,
        "end": tokens * end_bytes(config, kind, chunk) + (FLOAT * config.vocabulary * config.width if chunk else 0),
        "loss": loss_bytes(config, kind, tokens, chunk),
    }


# ---------------------------------------------------------------------------------------------- weights
def share(tensor, gpus: int) -> int:
    """Numbers of a tensor that the first GPU holds: FSDP2 cuts the first dimension and rounds up.

    128 packed experts on 512 GPUs are one expert each on 128 of them, and nothing on the rest.
    """
    return math.ceil(tensor.shape[0] / gpus) * math.prod(tensor.shape[1:])


def shared_numbers(module_parameters, gpus: int) -> int:
    """`share` of all of them together."""
    return sum(share(tensor, gpus) for tensor in module_parameters)


def copied_numbers(block: nn.Module) -> int:
    """Weights that autocast copies to bf16 for one block: all matrices but the router's, which runs in float32."""
    named = ((name, value) for name, value in block.named_parameters() if value.ndim > 1)
    return sum(value.numel() for name, value in named if "router" not in name)


def _check(config: LMConfig, gpus: int, batch: int, length: int, recipe: str, chunk: int) -> None:
    one_of("recipe", recipe, RECIPES)
    for name, value in {"gpus": gpus, "batch": batch}.items():
        if not 1 <= value <= MOST:
            raise InputError(f"{name} {value}; accepted: 1 to {MOST:,}")
    if not 1 <= length <= config.context:
        raise InputError(f"length {length}; accepted: 1 to {config.context}, the model's context")
    if chunk < 0:
        raise InputError(f"chunk {chunk}; accepted: 0, for all logits at once, or a number of tokens")


def memory_report(
    config: LMConfig, gpus: int, batch: int, length: int, recipe: str = "autocast", checkpointing=False, chunk: int = 0
) -> dict:
    """Bytes on the fullest of `gpus` GPUs in a training step, by part.

    Args:
        config: of the model.
        gpus: N; with one, nothing is cut or gathered.
        batch: sequences of one GPU in one micro-batch. length: tokens of each.
        recipe: a name of `RECIPES`.
        checkpointing, chunk: see `activation_bytes`.

    Returns:
        parameters, gradients, optimizer: this GPU's share. block: the largest unsharded block, part of "unsharded":
        all that is gathered at once, and its gradients. copies: autocast's. activations, loss. total.

    Raises:
        InputError: a count under 1 or over `MOST`, a length over the context, a recipe or variant that the formula does
            not know.
    """
    _check(config, gpus, batch, length, recipe, chunk)
    model = build_lm(config, "meta")
    config = model.config
    held = FLOAT * shared_numbers(model.parameters(), gpus)
    inside = {id(value) for block in model.blocks for value in block.parameters()}
    root = [value for value in model.parameters() if id(value) not in inside]
    block = max(gpus * shared_numbers(part.parameters(), gpus) for part in model.blocks)
    weight = FLOAT if recipe == "autocast" else 2
    # Blocks: the running one and the next, fetched ahead; the gradients of the running one, and of the one before,
    # which are averaged in float32. The root, embedding and output layer, stays whole from the first use to the end.
    gathered = block * (2 * weight + weight + FLOAT) + 2 * weight * gpus * shared_numbers(root, gpus)
    copied = 0
    if recipe == "autocast":
        copied = 2 * copied_numbers(model.blocks[0]) * (1 if checkpointing else config.layers)
        copied += 2 * config.vocabulary * config.width
    kept = activation_bytes(config, batch * length, RECIPES[recipe], checkpointing, chunk)
    parts = {
        "parameters": held, "gradients": held, "optimizer": 2 * held,
        "unsharded": gathered if gpus > 1 or recipe == "mixed" else 0,
        "copies": copied,
        "activations": kept["blocks"] + kept["running"] + kept["end"],
        "loss": kept["loss"],
    }  # fmt: skip
    settings = {"gpus": gpus, "batch": batch, "length": length, "recipe": recipe}
    settings |= {"checkpointing": checkpointing, "chunk": chunk, "model": asdict(config)}
    return {**settings, **parts, "block": weight * block, "total": sum(parts.values())}


# ---------------------------------------------------------------------------------------------- the command
COLUMNS = ("parameters", "gradients", "optimizer", "block", "unsharded", "copies", "activations", "loss", "total")


def format_report(name: str, rows: list[dict]) -> str:
    """The rows as a table for a terminal, in GB of 10^9 bytes, or in MB of 10^6 where every total is under 1 GB."""
    first = rows[0]
    power, unit = (9, "GB") if max(row["total"] for row in rows) >= 1e9 else (6, "MB")
    logits = f"loss in chunks of {first['chunk']:,}" if first["chunk"] else "all logits at once"
    precision = {"autocast": "bf16 under autocast", "mixed": "bf16 by FSDP2's mixed precision"}[first["recipe"]]
    title = (
        f"{name}: {unit} (10^{power} bytes) on the fullest GPU; {first['batch']} x {first['length']:,} tokens each, "
        f"{logits}; recipe {first['recipe']}: {precision}, float32 weights, gradients and AdamW shared by FSDP2"
    )
    lines = [title, "", f"{'GPUs':>7}  {'blocks keep':12}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for row in rows:
        kept = "their input" if row["checkpointing"] else "all"
        cells = "".join(f"{row[column] / 10**power:>12.2f}" for column in COLUMNS)
        lines.append(f"{row['gpus']:>7}  {kept:12}{cells}")
    lines += ["", "block: the largest one unsharded, part of unsharded. total: a bound, as not all is there at once."]
    return "\n".join(lines)


def memory_rows(name: str, gpus: list[int], batch: int, length: int | None, variant: str, **options) -> list[dict]:
    """Reports of a named model for each number of GPUs, without checkpointing and with it."""
    one_of("language model", name, SIZES)
    config = build_lm(name, "meta", variant=variant).config
    length = config.context if length is None else length
    return [
        memory_report(config, count, batch, length, checkpointing=again, **options)
        for count in gpus
        for again in (False, True)
    ]
