"""Other libraries' models of the same sizes, imported when asked for. Without the library a row is listed as absent."""

import importlib
import importlib.util
import itertools

import torch
from torch import nn

from minigated.bench.rows import Absent
from minigated.lm_config import LMConfig
from minigated.moe import MoE
from minigated.torchvision_cpu import prepare_torchvision
from minigated.variants import parameters

EXPERT_FORMS = ("eager", "batched_mm", "grouped_mm")  # transformers' names of how experts run


def library(name: str):
    """The module called `name`; `Absent` if it is not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    prepare_torchvision()
    return importlib.import_module(name)


def named(library_name: str) -> str:
    """ "timm 1.0.31", for a row's facts."""
    return f"{library_name} {library(library_name).__version__}"


# ---------------------------------------------------------------------------------------------- language models
def qwen_options(config: LMConfig) -> dict:
    """A config of ours in transformers' words."""
    return {
        "vocab_size": config.vocabulary, "hidden_size": config.width, "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads, "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base, "partial_rotary_factor": 1.0},
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def qwen(kind: str, config: LMConfig, device: torch.device, experts: str = "eager") -> nn.Module:
    """A randomly initialised model of transformers with the sizes of `config`, float32.

    Args:
        kind: "qwen3", "qwen3_next" (full gated attention in every layer, dense) or "qwen3_moe".
        experts: how a "qwen3_moe" runs its experts, one of `EXPERT_FORMS`.
    """
    transformers, options = library("transformers"), qwen_options(config)
    names = {"qwen3": "Qwen3", "qwen3_next": "Qwen3Next", "qwen3_moe": "Qwen3Moe"}
    if not hasattr(transformers, f"{names[kind]}ForCausalLM"):
        raise Absent(f"{named('transformers')} has no {names[kind]}")
    if kind == "qwen3_next":
        options |= {"layer_types": ["full_attention"] * config.layers, "num_experts": 0}
    if kind == "qwen3_moe":
        options |= {
            "num_experts": config.experts, "num_experts_per_tok": config.top_k, "norm_topk_prob": config.renormalise,
            "moe_intermediate_size": config.ffn_width, "experts_implementation": experts,
        }  # fmt: skip
    made = getattr(transformers, f"{names[kind]}Config")(**options)
    with torch.device(device):
        return getattr(transformers, f"{names[kind]}ForCausalLM")(made)


def moe_block(layer: MoE, experts: str) -> nn.Module:
    """transformers' Qwen3-MoE layer with the weights of ours (shared, not copied)."""
    transformers = library("transformers")
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    count, width = layer.router.weight.shape
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=layer.experts.down_proj.shape[-1], num_experts=count,
        num_experts_per_tok=layer.top_k, norm_topk_prob=layer.renormalise, experts_implementation=experts,
    )  # fmt: skip
    with torch.device("meta"):
        block = modeling.Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = layer.router.weight
    block.experts.gate_up_proj, block.experts.down_proj = layer.experts.gate_up_proj, layer.experts.down_proj
    return block


# ---------------------------------------------------------------------------------------------- vision
def equal_swin(target: int, image: int, patch: int, window: int, classes: int, depth: int) -> tuple[dict, int]:
    """Options of a timm Swin with `target` parameters (within a hundredth, if there is one), and its exact count.

    Four stages of depths 2, 2, n, 2 with heads of 16, 32 or 48 channels, n as near to `depth` as can be; the ratio of
    the feed-forward, from 3 to 5, makes up for what whole blocks cannot.
    """
    make = library("timm.models.swin_transformer").SwinTransformer
    fixed = {"img_size": image, "patch_size": patch, "window_size": window, "num_classes": classes}
    found = []
    for width, middle in itertools.product(range(16, 193, 16), range(2, 19, 2)):
        heads, depths = max(1, width // 32), (2, 2, middle, 2)
        blocks = sum(depth * (width * 2**stage) ** 2 for stage, depth in enumerate(depths))
        if width % (16 * heads) or not 0.6 * target < 13 * blocks < 1.4 * target:  # 12 C^2 a block, a little between
            continue
        sizes = fixed | {"embed_dim": width, "depths": depths, "num_heads": tuple(heads * 2**i for i in range(4))}
        with torch.device("meta"):
            ratio = round(16 * (4 + (target - parameters(make(**sizes))) / (2 * blocks))) / 16
            if not 3 <= ratio <= 5:
                continue
            count = parameters(make(**sizes, mlp_ratio=ratio))
        off = max(0.01, abs(count / target - 1))
        found.append((off, abs(middle - depth), abs(ratio - 4), sizes | {"mlp_ratio": ratio}, count))
    if not found:
        raise Absent(f"no timm Swin of about {target:,} parameters")
    return min(found, key=lambda f: f[:3])[3:]


def swin(options: dict, device: torch.device) -> nn.Module:
    """The timm Swin of these options, without stochastic depth."""
    make = library("timm.models.swin_transformer").SwinTransformer
    with torch.device(device):
        return make(**options, drop_path_rate=0.0)
