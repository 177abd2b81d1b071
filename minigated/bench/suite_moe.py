"""Mixtures of experts: the layer in each of its forms beside transformers', then whole models in training.

The dense row of a case has the same active operations: a feed-forward as wide as the experts of one token together.
"Recorded" is a call, or a step, as one CUDA graph.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from minigated.bench.formulas import moe_layer
from minigated.bench.lm_rows import BOTH, COMPILED, EAGER, our_row, peer_row
from minigated.bench.peers import EXPERT_FORMS, moe_block, named
from minigated.bench.rows import Case, Prepared, Row
from minigated.bench.runner import run_suite
from minigated.cuda_graph import Later
from minigated.layers import SwiGLU
from minigated.lm_config import LMConfig
from minigated.moe import FORMS, MoE

CLAIM = "grouped products train a model with experts at half of a dense one's speed or more, active operations equal"
FILES = [
    "moe.py", "dispatch.py", "balance.py", "lm.py", "lm_config.py", "attention.py", "stacked.py",
    "interop/experts.py", "cuda_graph.py", "bench/lm_rows.py", "bench/peers.py", "bench/suite_moe.py",
]  # fmt: skip
COPYING = ("gathered", "batched_mm")  # forms that copy each token's experts: tens of gigabytes at a GPU's sizes
# tokens, C, F, experts, k
LAYERS = {"cpu": [(256, 64, 64, 8, 2)], "gpu": [(16_384, 512, 512, 16, 2), (16_384, 1024, 256, 64, 8)]}
CPU_MODEL = LMConfig(
    width=64, layers=2, heads=2, kv_heads=2, head_width=32, ffn_width=64, vocabulary=256, context=64, experts=4, top_k=2
)
GPU_MODEL = LMConfig(
    width=512, layers=8, heads=8, kv_heads=8, head_width=64, ffn_width=512, vocabulary=32_000, context=1024,
    experts=16, top_k=2, tied=False,
)  # fmt: skip
MODELS = {  # name -> config, sequences, tokens
    "cpu": {"4 experts": (CPU_MODEL, 2, 64)},
    "gpu": {
        "16 experts": (GPU_MODEL, 16, 1024),
        "64 experts": (replace(GPU_MODEL, experts=64, top_k=8, ffn_width=128), 16, 1024),
    },
}


def our_layer(sizes, form: str) -> MoE:
    """The layer with the same weights every time; large ones, so that experts differ and routing is decided."""
    _, width, hidden, experts, top_k = sizes
    torch.manual_seed(0)
    layer = MoE(width, hidden, experts, top_k, renormalise=True, form=form)
    nn.init.normal_(layer.router.weight, std=0.1)
    layer.experts.initialize(width**-0.5)
    return layer


def decided_tokens(router: torch.Tensor, tokens: int) -> torch.Tensor:
    """Tokens [N, C] whose logits stand well apart, so that bfloat16 and float32 routers choose the same experts.

    Args:
        router: weights [E, C] with E at most C. The logits of every token are the same evenly spaced numbers from 2 to
            -2 in an order of its own.
    """
    experts, width = router.shape
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(tokens, width, generator=generator)
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)
    wanted = torch.linspace(2, -2, experts)[order]  # [N, E]
    return noise + (wanted - noise @ router.T) @ torch.linalg.pinv(router).T


def prepare_layer(kind: str, form: str, way: str, sizes, device, dtype) -> Prepared:
    """A layer, forward and backward.

    Args:
        kind: "ours", "transformers" or "dense". form: how the experts run, in the kind's own words.
        way: `EAGER`, `COMPILED` or `BOTH`, that is recorded too.
    """
    compiled, graph = way in (COMPILED, BOTH), way == BOTH
    tokens, width, hidden, _, top_k = sizes
    mixture = our_layer(sizes, form if kind == "ours" else "loop")
    x = decided_tokens(mixture.router.weight.detach(), tokens).to(device, dtype)[None].requires_grad_()
    layer = SwiGLU(width, hidden * top_k) if kind == "dense" else mixture
    layer = layer.to(device, dtype)
    weights = list(layer.parameters())
    layer = moe_block(layer, form) if kind == "transformers" else layer
    run = torch.compile(layer, dynamic=False) if compiled else layer
    grown = torch.ones_like(x)

    def step():
        y = run(x)
        return [y, *torch.autograd.grad(y, [x, *weights], grown)]

    if graph:
        step = Later(step, device)

    def check():
        wide = x.detach().clone().requires_grad_()
        y = our_layer(sizes, "loop").to(device, dtype)(wide)
        return step()[:2], [y, *torch.autograd.grad(y, wide, grown)]

    facts = {"form": form, "compiled": compiled, "recorded": graph}
    facts |= {"library": named(kind)} if kind == "transformers" else {}
    return Prepared(step, None if kind == "dense" else check, facts, counted=not graph)


def layer_case(sizes, device, dtype) -> Case:
    """Our three forms, transformers', and the dense layer; on a GPU compiled and recorded where one has no loop.

    In bfloat16 the grouped form of transformers reads nothing back, so it can be recorded; its float32 model cannot.
    """
    tokens, width, hidden, experts, top_k = sizes
    cost = moe_layer(tokens, width, hidden, experts, top_k, dtype.itemsize, training=True)
    flat = moe_layer(tokens, width, hidden * top_k, 1, 1, dtype.itemsize, training=True)
    cuda = device.type == "cuda"
    fast = (COMPILED, BOTH) if cuda else ()
    plan = [("ours", form, EAGER) for form in FORMS] + [("transformers", form, EAGER) for form in EXPERT_FORMS]
    plan += [(*pair, way) for pair in (("ours", "grouped"), ("transformers", "grouped_mm")) for way in fast]
    plan += [("dense", "dense", way) for way in (EAGER, *fast)]
    titles = {"ours": "minigated", "transformers": "transformers Qwen3-MoE, experts", "dense": "same operations,"}
    rows = []
    for kind, form, way in plan:
        if form in COPYING and cuda:
            continue
        work = flat if kind == "dense" else cost
        rows.append(
            Row(
                f"{titles[kind]} {form}, {way}",
                partial(prepare_layer, kind, form, way, sizes, device, dtype),
                state="other function" if kind == "dense" else "equal",
                flops=work.flops, bytes=work.bytes, items=tokens,
            )
        )  # fmt: skip
    return Case(f"layer, {experts} experts, top {top_k}, training", rows, "tokens", dtype)


def model_case(name: str, config: LMConfig, batch: int, tokens: int, device, dtype) -> Case:
    """A model with experts, the dense one with the same active operations, and transformers' in its forms."""
    cuda = device.type == "cuda"
    ways = (EAGER, COMPILED, BOTH) if cuda else (EAGER,)
    dense = replace(config, experts=0, top_k=0, ffn_width=config.ffn_width * config.top_k)
    name_of_dense = "minigated, dense, same active operations"
    rows = [our_row(name_of_dense, dense, way, batch, tokens, device) for way in (ways[1:] or ways)]
    rows += [our_row("minigated, experts", config, way, batch, tokens, device) for way in ways]
    plan = [("eager", EAGER), *(("grouped_mm", way) for way in ways[:2])]  # float32 counts go to the host: no graph
    rows += [peer_row("qwen3_moe", config, way, batch, tokens, device, form) for form, way in plan]
    return Case(f"model, {name}, training", rows, "tokens", dtype)


def cases(scale: str, device: torch.device) -> list[Case]:
    """The layers, then the models."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layers = [layer_case(sizes, device, dtype) for sizes in LAYERS[scale]]
    return layers + [model_case(name, *rest, device, dtype) for name, rest in MODELS[scale].items()]


run = partial(run_suite, "moe")
