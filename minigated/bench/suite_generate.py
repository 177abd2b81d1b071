"""Cached decoding of one sequence: milliseconds a token beside the time that reading the weights once must take.

A call continues a short prompt greedily by a fixed number of tokens. Bytes are those of one new token (all weights but
the embedding's, and the cache at its middle length) times the new tokens, so the share of copy bandwidth in the table
is how near a row comes to the limit. The prompt counts there; it does not in the time of each token after the first,
which stands beside that of reading the weights. Outputs are checked as logits: greedy tokens may differ where two tie.
"""

from functools import partial

import torch

from minigated.bench.formulas import lm_decoding, lm_matrix_parameters
from minigated.bench.lm_rows import deep_tolerance, draw_experts
from minigated.bench.peers import named, qwen
from minigated.bench.rows import Absent, Case, Prepared, Row
from minigated.bench.runner import run_suite
from minigated.bench.suite_lm import shape
from minigated.fused_step import unserved
from minigated.generate import generate
from minigated.interop import from_qwen3
from minigated.lm import LanguageModel, build_lm
from minigated.lm_config import SIZES as LM_SIZES
from minigated.lm_config import LMConfig
from minigated.static_cache import WAYS, StaticCache
from minigated.variants import parameters

CLAIM = "decoding one sequence is limited by reading the weights: a token takes less than three times as long"
FILES = [
    "generate.py", "static_cache.py", "fused_step.py", "kernels/decode_triton.py", "kernels/attend_triton.py",
    "kernels/__init__.py", "cuda_graph.py", "lm.py", "lm_config.py", "variants.py", "gates.py", "attention.py",
    "layers.py", "rope.py", "interop/qwen.py", "bench/lm_rows.py", "bench/peers.py", "bench/suite_lm.py",
    "bench/suite_generate.py",
]  # fmt: skip
PROMPT = 16
SIZES = {  # name -> config, new tokens
    "cpu": {"0.5 M": (shape(96, 2, 4, 2, 256, 512, 64), 24)},
    "gpu": {
        "350 M": (shape(1024, 21, 16, 8, 3072, 32_000, 1024), 64),
        "1.7 B": (LM_SIZES["1.7B-28L"], 64),
    },
}
PEER_CACHES = {"static": "static cache", "dynamic": "growing cache"}


def dtype_on(device: torch.device) -> torch.dtype:
    """Weights in bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def prompt(config: LMConfig, device) -> torch.Tensor:
    """Random tokens, [1, PROMPT]."""
    return torch.randint(config.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)


def our_model(config: LMConfig, device) -> LanguageModel:
    """A model in evaluation mode, the same weights every time."""
    torch.manual_seed(0)
    return build_lm(config, device).to(dtype_on(device)).eval()


@torch.no_grad()
def cached_logits(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each position, fed one token at a time through a cache. [1, T] -> [1, T, V]."""
    cache = model.new_cache(1, tokens.shape[1])
    return torch.cat([model(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], 1)


def prepare_ours(config: LMConfig, cache: bool, new_tokens: int, device) -> Prepared:
    """`minigated.generate` with or without its cache; the cached logits must be those of one run over everything."""
    model, tokens = our_model(config, device), prompt(config, device)

    def step(count=new_tokens):
        return list(generate(model, tokens, count, temperature=0.0, cache=cache))

    @torch.no_grad()
    def check():
        return [cached_logits(model, tokens)], [model(tokens)]

    facts = {"parameters": parameters(model), "cache": cache}
    return Prepared(step, check if cache else None, facts, deep_tolerance(device), before=partial(step, 1))


def static_length(config: LMConfig, new_tokens: int) -> int:
    """Tokens of a static cache for this text: a power of two, as each length has its own graph, within the context."""
    return min(config.context, 1 << (PROMPT + new_tokens - 1).bit_length())


@torch.no_grad()
def static_logits(cache: StaticCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each position through the static step, the first token as prompt. [1, T] -> [1, T, V]."""
    found = [cache.start(tokens[:, :1]).clone()]
    found += [cache.step(column).clone() for column in tokens[:, 1:].unbind(1)]
    return torch.stack(found, 1)


def prepare_static(config: LMConfig, way: str, new_tokens: int, device) -> Prepared:
    """`minigated.generate` on a static cache whose step is eager, or was compiled or fused, and recorded, before."""
    model, tokens = our_model(config, device), prompt(config, device)
    if way == "fused" and (why := unserved(model, 1)):
        raise Absent(f"the fused step {why}")
    cache = StaticCache(model, 1, static_length(config, new_tokens), way)

    def step(count=new_tokens):
        return list(generate(model, tokens, count, temperature=0.0, cache=cache))

    @torch.no_grad()
    def check():
        return [static_logits(cache, tokens)], [model(tokens)]

    facts = {"parameters": parameters(model), "cache": "static", "cache_length": cache.length, "way": way}
    return Prepared(step, check, facts, deep_tolerance(device), before=partial(step, 1))


def prepare_peer(config: LMConfig, cache: str, new_tokens: int, device) -> Prepared:
    """transformers' `generate`; with a static cache on a GPU it compiles its step by itself."""
    torch.manual_seed(0)
    model, tokens = qwen("qwen3", config, device).to(dtype_on(device)).eval(), prompt(config, device)
    draw_experts(model)
    options = {"do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(tokens), "use_cache": True}
    options |= {"cache_implementation": "static"} if cache == "static" else {}

    def step(count=new_tokens):
        return model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **options)

    @torch.no_grad()
    def check():
        ours = from_qwen3(model.state_dict(), model.config.to_dict()).to(device)
        return [model(tokens).logits], [ours(tokens)]

    facts = {"parameters": parameters(model), "cache": cache, "library": named("transformers")}
    return Prepared(step, check, facts, deep_tolerance(device), before=partial(step, 1))


def case(name: str, config: LMConfig, new_tokens: int, device) -> Case:
    """Without cache (the reference), with a growing and with a static one, and transformers' two ways."""
    total, item = parameters(build_lm(config, "meta")), dtype_on(device).itemsize
    one = lm_decoding(config, total, PROMPT + new_tokens / 2, item)
    work = {"flops": one.flops * new_tokens, "bytes": one.bytes * new_tokens, "items": new_tokens}
    work["weight_bytes"] = lm_matrix_parameters(config, total) * item * new_tokens
    static = partial(prepare_static, config, new_tokens=new_tokens, device=device)
    prepare = partial(prepare_ours, config, new_tokens=new_tokens, device=device)
    rows = [
        Row("minigated, no cache", partial(prepare, False), state="reference", **work),
        Row("minigated, cache", partial(prepare, True), **work),
    ]
    ways = WAYS if device.type != "cuda" else WAYS[1:]  # eager launches as many kernels as a growing cache
    rows += [Row(f"minigated, static cache, {way}", partial(static, way), **work) for way in ways]
    for cache, words in PEER_CACHES.items():
        rows.append(
            Row(f"transformers generate, {words}", partial(prepare_peer, config, cache, new_tokens, device), **work)
        )
    return Case(f"decoding, {name}", rows, "tokens", dtype_on(device))


def cases(scale: str, device: torch.device) -> list[Case]:
    """Each size; no training anywhere."""
    return [case(name, config, new_tokens, device) for name, (config, new_tokens) in SIZES[scale].items()]


run = partial(run_suite, "generate")
