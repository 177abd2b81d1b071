"""Mixture-of-experts layers of Qwen3-MoE and Qwen3-Next: names, sizes, and the experts of older files packed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minigated.errors import InputError

EXPERT_NAMES = {  # theirs -> ours, inside a layer
    "mlp.gate.weight": "ffn.router.weight",
    "mlp.experts.gate_up_proj": "ffn.experts.gate_up_proj",
    "mlp.experts.down_proj": "ffn.experts.down_proj",
}
SHARED_NAMES = {
    "mlp.shared_expert.gate_proj.weight": "ffn.shared.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight": "ffn.shared.up_proj.weight",
    "mlp.shared_expert.down_proj.weight": "ffn.shared.down_proj.weight",
    "mlp.shared_expert_gate.weight": "ffn.shared_gate.weight",
}


def expert_count(config: Mapping) -> int:
    """E as the config gives it, 0 for a dense model; transformers has had two names for it."""
    return config.get("num_experts") or config.get("num_local_experts") or 0


def pack_experts(state: Mapping[str, Tensor], experts: int) -> Mapping[str, Tensor]:
    """The state dict with the experts of a layer in two tensors, as transformers 5 holds them.

    Files written before have three matrices an expert. A state dict that is packed already is returned as it is.
    """
    first = ".mlp.experts.0.gate_proj.weight"
    layers = [name.removesuffix(first) for name in state if name.endswith(first)]
    packed = {name: tensor for name, tensor in state.items() if not (layers and ".mlp.experts." in name)}
    for layer in layers:
        try:
            gate, up, down = (
                torch.stack([state[f"{layer}.mlp.experts.{e}.{part}.weight"] for e in range(experts)])
                for part in ("gate_proj", "up_proj", "down_proj")
            )
        except KeyError as error:
            raise InputError(f"the config gives {experts} experts; {error.args[0]} is missing") from error
        packed[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), 1)  # [E, 2F, C]
        packed[f"{layer}.mlp.experts.down_proj"] = down  # [E, C, F]
    return packed if layers else state


def expert_sizes(state: Mapping[str, Tensor], config: Mapping) -> dict:
    """The fields of `LMConfig` that describe the mixture, read from the weights of layer 0 and the config."""
    layer = "model.layers.0.mlp."
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        if layer + name not in state:
            raise InputError(f"the config gives {expert_count(config)} experts; {layer}{name} is missing")
    if not isinstance(config.get("norm_topk_prob"), bool):
        given = config.get("norm_topk_prob")
        raise InputError(f"the config gives norm_topk_prob as {given!r}; true or false is accepted")
    shared = state.get(f"{layer}shared_expert.down_proj.weight")
    return {
        "experts": len(state[f"{layer}gate.weight"]),
        "top_k": config.get("num_experts_per_tok", 0),
        "renormalise": config["norm_topk_prob"],
        "shared_width": 0 if shared is None else shared.shape[1],
        "ffn_width": state[f"{layer}experts.down_proj"].shape[2],
    }
