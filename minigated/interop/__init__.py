"""Weights in from released models: language models (chapter 2) and vision backbones (chapters 4 and 5).

`layouts` holds the row permutations, tensors only; `qwen` maps names and sizes; `folder` reads files, never
a pickle that can run code; `backbones` reads RMT and Swin.
"""

from minigated.interop.backbones import load_rmt, load_swin
from minigated.interop.folder import load_checkpoint_folder, load_tokenizer, read_config, read_weights
from minigated.interop.layouts import (
    gate_granularity,
    join_per_group,
    join_per_head,
    per_group_to_per_head,
    per_head_to_per_group,
    split_per_group,
    split_per_head,
    widen_headwise,
)
from minigated.interop.qwen import from_qwen3, from_qwen3_next, from_qwen_gated, to_qwen_gated

__all__ = [
    "from_qwen3",
    "from_qwen3_next",
    "from_qwen_gated",
    "gate_granularity",
    "join_per_group",
    "join_per_head",
    "load_checkpoint_folder",
    "load_rmt",
    "load_swin",
    "load_tokenizer",
    "per_group_to_per_head",
    "per_head_to_per_group",
    "read_config",
    "read_weights",
    "split_per_group",
    "split_per_head",
    "to_qwen_gated",
    "widen_headwise",
]
