"""Which mixer a stage uses, by name: how to build it and the tables of its maps (chapters 5 and 6)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minigated.decay import retnet_log_decay, rmt_log_decay
from minigated.retention import FullTableBuilder, Retention, WindowTableBuilder, decomposed, full
from minigated.swat import SwatAttention, SwatTableBuilder
from minigated.swin import SwinAttention, SwinTables

if TYPE_CHECKING:
    from minigated.vit import ViTConfig

DECAYS = ("rmt", "retnet", "none")


def log_decay(config: "ViTConfig", stage: int) -> Tensor:
    """The log-decay of each head of a stage, [H] float64. "none" is a rate of 1: no decay."""
    heads = config.heads[stage]
    with torch.device("cpu"):  # numbers, also where the model itself is built on the meta device
        if config.decay == "none":
            return torch.zeros(heads, dtype=torch.float64)
        if config.decay == "retnet":
            return retnet_log_decay(heads).double()
        return rmt_log_decay(heads, config.decay_initial, config.decay_spans[stage], dtype=torch.float64)


@dataclass(frozen=True)
class Mixer:
    """A way of mixing the cells of a map.

    Attributes:
        module: (config, stage) -> the mixer of one block.
        tables: (config, stage, shifted) -> the builder of its tables.
        shifts: whether every second block shifts its windows.
    """

    module: Callable[["ViTConfig", int], nn.Module]
    tables: Callable[["ViTConfig", int, bool], nn.Module]
    shifts: bool


def _retention(config: "ViTConfig", stage: int, attend=decomposed, gate: str | None = None) -> nn.Module:
    return Retention(
        config.widths[stage],
        config.heads[stage],
        attend,
        gate=config.gate if gate is None else gate,
        gate_input=config.gate_input,
        gate_bias=config.gate_bias,
        lce=5 if config.lce else 0,
    )


def _window_tables(config: "ViTConfig", stage: int, shifted: bool, window: int | None) -> nn.Module:
    return WindowTableBuilder(
        config.widths[stage] // config.heads[stage],
        log_decay(config, stage),
        window,
        shifted,
        config.rotation,
        config.map_size(stage),
    )


MIXERS: dict[str, Mixer] = {
    "swin": Mixer(
        lambda c, i: SwinAttention(c.widths[i], c.heads[i], c.window),
        lambda c, i, shifted: SwinTables(c.window, shifted, c.map_size(i)),
        shifts=True,
    ),
    "rmt_full": Mixer(
        lambda c, i: _retention(c, i, full, gate="none"),
        lambda c, i, shifted: FullTableBuilder(
            c.widths[i] // c.heads[i], log_decay(c, i), c.rotation, c.map_size(i)
        ),
        shifts=False,
    ),
    "rmt_decomposed": Mixer(
        lambda c, i: _retention(c, i, gate="none"),
        lambda c, i, shifted: _window_tables(c, i, False, None),
        shifts=False,
    ),
    "gated_swinrmt_retention": Mixer(
        _retention,
        lambda c, i, shifted: _window_tables(c, i, shifted, c.window),
        shifts=True,
    ),
    "gated_swinrmt_swat": Mixer(
        lambda c, i: SwatAttention(c.widths[i], c.heads[i], c.swat),
        lambda c, i, shifted: SwatTableBuilder(
            c.heads[i], c.widths[i] // c.heads[i], log_decay(c, i), c.window, shifted, c.swat, c.map_size(i)
        ),
        shifts=True,
    ),
}
