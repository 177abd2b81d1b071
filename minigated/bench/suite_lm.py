"""Training of dense language models: the price of a gate at equal parameters, and transformers' models beside it.

Cases: two sizes beside transformers' Qwen3 and Qwen3-Next; two widths with 2,048 tokens for the gates alone, where the
feed-forward of a gated model is narrowed until its parameters equal those of the one without. Each model beside
transformers' stands there once more with its loss computed in chunks (`minigated.chunked_loss`): the same numbers.
"""

from functools import partial

import torch

from minigated.bench.lm_rows import our_row, peer_row
from minigated.bench.rows import Case
from minigated.bench.runner import run_suite
from minigated.lm_config import LMConfig

CLAIM = "a gate costs a training step a few percent at equal parameters; the step is limited by matrix products"
FILES = [
    "attention.py", "chunked_loss.py", "gates.py", "layers.py", "lm.py", "lm_config.py", "recompute.py", "rope.py",
    "variants.py", "interop/qwen.py", "bench/lm_rows.py", "bench/peers.py", "bench/suite_lm.py",
]  # fmt: skip
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
LARGE = ("350 M",)  # only compiled: the models of a case are in memory together
GATED = {
    "cpu": {},
    "gpu": {
        "width 1024": (shape(1024, 8, 16, 8, 3072, 32_000, 2048), 8, 2048),
        "width 2048": (shape(2048, 6, 16, 8, 6144, 32_000, 2048), 8, 2048),
    },
}


def gate_rows(config: LMConfig, batch: int, tokens: int, device, compiled: bool) -> list:
    """The model without gate and with each, all of the same size."""
    made = []
    for gate, variant in GATES.items():
        gated = LMConfig(**vars(config) | {"variant": variant, "match_parameters": gate != "none"})
        made.append(our_row(f"minigated, gate {gate}", gated, compiled, batch, tokens, device))
    return made


def loss_rows(config: LMConfig, batch: int, tokens: int, device, compiled: bool) -> list:
    """The ungated model with the loss in chunks of an eighth of the tokens, 2,048 where the step is large."""
    chunk = min(2048, batch * tokens // 8)
    return [our_row(f"minigated, loss in chunks of {chunk:,}", config, compiled, batch, tokens, device, chunk)]


def cases(scale: str, device: torch.device) -> list[Case]:
    """On a CPU one small size, eager; on a GPU all, compiled, the smaller size also eager."""
    cuda = device.type == "cuda"
    dtype, made = torch.bfloat16 if cuda else torch.float32, []
    for name, (config, batch, tokens) in BESIDE[scale].items():
        ways = [False] if not cuda else [True] if name in LARGE else [False, True]
        rows = [row for way in ways for row in gate_rows(config, batch, tokens, device, way)[: 3 if way == cuda else 1]]
        rows += loss_rows(config, batch, tokens, device, compiled=cuda)
        rows += [peer_row(k, config, way, batch, tokens, device) for k in ("qwen3", "qwen3_next") for way in ways]
        made.append(Case(f"training, {name}", rows, "tokens", dtype))
    for name, (config, batch, tokens) in GATED[scale].items():
        rows = gate_rows(config, batch, tokens, device, compiled=True)
        made.append(Case(f"gates, {name}, {tokens} tokens", rows, "tokens", dtype))
    return made


run = partial(run_suite, "lm")
