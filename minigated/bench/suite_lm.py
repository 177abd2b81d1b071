"""Training of dense language models: the price of a gate at equal parameters, and transformers' models beside it.

Cases: two sizes beside transformers' Qwen3 and Qwen3-Next; two widths with 2,048 tokens for the gates alone, where the
feed-forward of a gated model is narrowed until its parameters equal those of the one without. Beside transformers' the
model without gate stands once more with its loss computed in chunks (`minigated.chunked_loss`). Our compiled models
follow the rule that makes layers with one input one product (`minigated.stacked`); one row, "layers apart", and those
of transformers do without. On a GPU steps are also recorded as one CUDA graph, ours and transformers'.
"""

from functools import partial

import torch

from minigated.bench.lm_rows import BOTH, COMPILED, EAGER, our_row, peer_row
from minigated.bench.rows import Case
from minigated.bench.runner import run_suite
from minigated.lm_config import LMConfig

CLAIM = "a gate costs a training step a few percent at equal parameters"
FILES = [
    "attention.py", "chunked_loss.py", "gates.py", "layers.py", "lm.py", "lm_config.py", "recompute.py", "rope.py",
    "stacked.py", "variants.py", "cuda_graph.py", "interop/qwen.py", "bench/lm_rows.py", "bench/peers.py",
    "bench/suite_lm.py",
]  # fmt: skip
PEERS = ("qwen3", "qwen3_next")
GATES = {"none": "none", "headwise": "g1_headwise", "elementwise": "g1_elementwise"}


def shape(width, layers, heads, kv_heads, ffn, vocabulary, context, tied=False) -> LMConfig:
    """A config whose heads fill the width; all numbers."""
    return LMConfig(
        width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_width=width // heads, ffn_width=ffn,
        vocabulary=vocabulary, context=context, tied=tied,
    )  # fmt: skip


# name -> config, sequences, tokens
BESIDE = {
    "cpu": {"0.5 M": (shape(96, 2, 4, 2, 256, 512, 128), 2, 128)},
    "gpu": {
        "110 M": (shape(768, 12, 12, 12, 2048, 32_000, 1024, tied=True), 16, 1024),
        "350 M": (shape(1024, 21, 16, 16, 3072, 32_000, 2048), 8, 2048),
    },
}
LARGE = ("350 M",)  # not eager: the models of a case are in memory together
GATED = {
    "cpu": {},
    "gpu": {
        "width 1024": (shape(1024, 8, 16, 8, 3072, 32_000, 2048), 8, 2048),
        "width 2048": (shape(2048, 6, 16, 8, 6144, 32_000, 2048), 8, 2048),
    },
}


def gate_rows(config: LMConfig, batch: int, tokens: int, device, way: str, gates=tuple(GATES)) -> list:
    """The model with each of the gates, all of the same size."""
    made = []
    for gate in gates:
        gated = LMConfig(**vars(config) | {"variant": GATES[gate], "match_parameters": gate != "none"})
        made.append(our_row(f"minigated, gate {gate}", gated, way, batch, tokens, device))
    return made


def loss_rows(config: LMConfig, batch: int, tokens: int, device, way: str) -> list:
    """The ungated model with the loss in chunks of an eighth of the tokens, 2,048 where the step is large."""
    chunk = min(2048, batch * tokens // 8)
    return [our_row(f"minigated, loss in chunks of {chunk:,}", config, way, batch, tokens, device, chunk)]


def beside_rows(name: str, config: LMConfig, batch: int, tokens: int, device) -> list:
    """Ours and transformers'. On a GPU compiled, the smaller size also eager, and the models without gate recorded."""
    given = (config, batch, tokens, device)
    if device.type != "cuda":
        return gate_rows(*given, EAGER) + loss_rows(*given, EAGER) + [
            peer_row(kind, config, EAGER, batch, tokens, device) for kind in PEERS
        ]  # fmt: skip
    eager = [] if name in LARGE else [EAGER]
    rows = [row for way in eager for row in gate_rows(*given, way, ("none",))]
    rows += gate_rows(*given, COMPILED) + gate_rows(*given, BOTH, ("none",)) + loss_rows(*given, COMPILED)
    if name not in LARGE:
        rows.append(our_row("minigated, layers apart", config, COMPILED, batch, tokens, device, backend="inductor"))
    plan = [(kind, way) for kind in PEERS for way in [*eager, COMPILED]] + [("qwen3", BOTH)]
    return rows + [peer_row(kind, config, way, batch, tokens, device) for kind, way in plan]


def cases(scale: str, device: torch.device) -> list[Case]:
    """On a CPU one small size, eager; on a GPU all."""
    dtype, made = torch.bfloat16 if device.type == "cuda" else torch.float32, []
    for name, (config, batch, tokens) in BESIDE[scale].items():
        made.append(Case(f"training, {name}", beside_rows(name, config, batch, tokens, device), "tokens", dtype))
    for name, (config, batch, tokens) in GATED[scale].items():
        rows = [row for way in (COMPILED, BOTH) for row in gate_rows(config, batch, tokens, device, way)]
        made.append(Case(f"gates, {name}, {tokens} tokens", rows, "tokens", dtype))
    return made


run = partial(run_suite, "lm")
