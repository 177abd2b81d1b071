"""Hierarchical vision backbones: one skeleton, any mixer (chapters 5 and 6).

RMT (arXiv 2309.11523), Swin (arXiv 2103.14030) and the two models of Gated-SwinRMT (arXiv 2604.06014) are configs of
the same class. Named ones are in `minigated.vit_sizes`.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from minigated.errors import InputError, one_of
from minigated.layers import DepthwiseConv, DropPath, LayerScale, follow_weights
from minigated.recompute import Checkpointing, recomputed
from minigated.retention import GATE_INPUTS, GATES
from minigated.swat_options import READINGS, SwatOptions
from minigated.vit_mixers import DECAYS, MIXERS
from minigated.vit_parts import SKELETONS, added, channels_first, check_images, initialize


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and options of a backbone; everything needed to build it again. Tuples have one entry a stage.

    Attributes:
        widths, depths, heads, ffn_ratios: C, blocks, H, and the feed-forward's hidden width over C.
        mixers: names of `MIXERS`; one name serves all stages.
        skeleton: "rmt" or "swin", see `SKELETONS`.
        classes: of the classifier; 0 gives pooled features.
        image_size: (height, width) for which tables are made at once; other sizes work too.
        image_channels, stem_stride: of the input, and how many pixels a cell of the first map is wide.
        window: side of a window, before the adaptive rule; None takes whole maps. shifts: in every second block.
        head_width: hidden width of RMT's head.
        drop_path: rate of the last block; it grows linearly from 0. layer_scale: 1e-6 factors on the branches.
        decay: "rmt", "retnet" or "none"; decay_initial, decay_spans: RMT's two numbers.
        rotation, lce, gate, gate_input, gate_bias: of the retention mixer, see `Retention`.
        swat: readings of the SWAT mixer.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ffn_ratios: tuple[float, ...] | float = 4.0
    mixers: tuple[str, ...] | str = "gated_swinrmt_retention"
    skeleton: str = "rmt"
    classes: int = 1000
    image_size: tuple[int, int] | int = 224
    image_channels: int = 3
    stem_stride: int = 4
    window: int | None = 7
    shifts: bool = True
    head_width: int = 1024
    drop_path: float = 0.1
    layer_scale: tuple[bool, ...] | bool = False
    decay: str = "rmt"
    decay_initial: float = 2.0
    decay_spans: tuple[float, ...] | float = 4.0
    rotation: bool = True
    lce: bool = True
    gate: str = "elementwise"
    gate_input: str = "normed"
    gate_bias: bool = False
    swat: SwatOptions = field(default_factory=SwatOptions)

    def __post_init__(self):
        set_ = partial(object.__setattr__, self)
        for name in ("widths", "depths", "heads"):
            if not isinstance(value := getattr(self, name), tuple | list):
                raise InputError(f"{name} {value!r}; accepted: a tuple of whole numbers, one a stage")
            set_(name, tuple(value))
        stages = len(self.widths)
        for name in ("ffn_ratios", "mixers", "layer_scale", "decay_spans"):  # one value for all stages
            value = getattr(self, name)
            set_(name, tuple(value) if isinstance(value, tuple | list) else (value,) * stages)
        size = self.image_size
        set_("image_size", tuple(size) if isinstance(size, tuple | list) else (size, size))
        if isinstance(self.swat, dict):  # after a trip through JSON
            for name in self.swat:
                one_of("swat option", name, READINGS)
            set_("swat", SwatOptions(**self.swat))
        if not isinstance(self.swat, SwatOptions):
            raise InputError(f"swat {self.swat!r}; accepted: SwatOptions, or a dict of them")
        for name in ("depths", "heads", "ffn_ratios", "mixers", "layer_scale", "decay_spans"):
            if len(getattr(self, name)) != stages:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {stages} stages")
        self._check()

    def _check(self) -> None:
        one_of("skeleton", self.skeleton, SKELETONS)
        for mixer in self.mixers:
            one_of("mixer", mixer, MIXERS)
        for name, accepted in (("decay", DECAYS), ("gate", GATES), ("gate_input", GATE_INPUTS)):
            one_of(name, getattr(self, name), accepted)
        sizes = self.widths, self.depths, self.heads
        if not self.widths or not all(_whole(size, 1) for stages in sizes for size in stages):
            raise InputError(
                f"widths {self.widths}, depths {self.depths} and heads {self.heads} must be whole numbers, at least 1"
            )
        for width, heads in zip(self.widths, self.heads):
            if width % heads:
                raise InputError(f"{width} channels cannot be split into {heads} heads evenly")
        if not all(1 <= ratio * width < math.inf for ratio, width in zip(self.ffn_ratios, self.widths)):
            raise InputError(f"ffn_ratios {self.ffn_ratios}; accepted: above 0, finite, at least one hidden channel")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop path rate {self.drop_path}; accepted: at least 0 and under 1")
        self._check_whole_numbers()

    def _check_whole_numbers(self) -> None:
        if len(self.image_size) != 2 or not all(_whole(side, 1) for side in self.image_size):
            raise InputError(
                f"image_size {self.image_size}; accepted: one side or (height, width), whole numbers, at least 1"
            )
        if not _whole(self.classes, 0):
            raise InputError(f"classes {self.classes!r}; accepted: a whole number, 0 (features) or more")
        if self.window is not None and not _whole(self.window, 1):
            raise InputError(f"window {self.window!r}; accepted: a whole number, 1 or more, or None for whole maps")
        for name in ("image_channels", "stem_stride", "head_width"):
            if not _whole(value := getattr(self, name), 1):
                raise InputError(f"{name} {value!r}; accepted: a whole number, 1 or more")

    def map_size(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's map for `image_size`; odd sides round up."""
        cell = self.stem_stride * 2**stage
        return tuple(math.ceil(side / cell) for side in self.image_size)


class Block(nn.Module):
    """x + position(x), then x + mixer(norm(x)), then x + feed_forward(norm(x)). [B, h, w, C] -> [B, h, w, C]."""

    def __init__(self, config: ViTConfig, stage: int, drop_path: float):
        super().__init__()
        width, skeleton = config.widths[stage], SKELETONS[config.skeleton]
        self.position = DepthwiseConv(width, 3) if skeleton.position else None
        self.mixer_norm = nn.LayerNorm(width, skeleton.eps)
        self.mixer = MIXERS[config.mixers[stage]].module(config, stage)
        self.ffn_norm = nn.LayerNorm(width, skeleton.eps)
        self.ffn = skeleton.feed_forward(width, int(config.ffn_ratios[stage] * width))
        scaled = config.layer_scale[stage]
        self.mixer_scale = LayerScale(width) if scaled else nn.Identity()
        self.ffn_scale = LayerScale(width) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tables, probe=None) -> Tensor:
        if self.position is not None:
            x = added(x, self.position)
        mixed = self.mixer(self.mixer_norm(x), tables, x, probe)
        x = x + self.drop_path(self.mixer_scale(mixed))
        return x + self.drop_path(self.ffn_scale(self.ffn(self.ffn_norm(x))))


class Stage(nn.Module):
    """Blocks on maps of one size; every second one shifts its windows, where the mixer has any."""

    def __init__(self, config: ViTConfig, stage: int, drop_paths: list[float]):
        super().__init__()
        mixer = MIXERS[config.mixers[stage]]
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_paths)
        kinds = 2 if mixer.shifts and config.shifts and config.depths[stage] > 1 else 1
        self.tables = nn.ModuleList(mixer.tables(config, stage, bool(shifted)) for shifted in range(kinds))

    def forward(self, x: Tensor, probe=None, checkpointing: bool = False) -> Tensor:
        tables = [table(x.shape[1], x.shape[2]) for table in self.tables]
        again = checkpointing and probe is None  # it would see every block twice
        for index, block in enumerate(self.blocks):
            seen = partial(probe, index) if probe is not None else None
            x = recomputed(again, block, x, tables[index % len(tables)], seen)
        return x


class VisionTransformer(nn.Module, Checkpointing):
    """Images in, class scores out.

    Args:
        config: sizes, skeleton and mixers.
    """

    kind = "vit"

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, skeleton = config, SKELETONS[config.skeleton]
        rates = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        self.stem = skeleton.stem(config.image_channels, config.widths[0], config.stem_stride, skeleton.eps)
        self.stages, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            if stage:
                self.downsamples.append(skeleton.downsample(*config.widths[stage - 1 : stage + 1], skeleton.eps))
            start = sum(config.depths[:stage])
            self.stages.append(Stage(config, stage, rates[start : start + depth]))
        self.pre_head = skeleton.head(config.widths[-1], config.head_width, skeleton.eps)
        self.num_features = self.pre_head.features
        self.head = nn.Linear(self.num_features, config.classes) if config.classes else nn.Identity()
        self.apply(initialize)
        self.register_load_state_dict_post_hook(follow_weights)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in order, for `torch.compile` block by block."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def parts(self) -> list[nn.Module]:
        """Stem, blocks, downsamples and the head's first step, for `minigated.compiled_parts`."""
        return [self.stem, *self.blocks, *self.downsamples, self.pre_head]

    def _maps(self, images: Tensor, probe=None) -> list[Tensor]:
        check_images(images, self.config.image_channels, next(self.stem.parameters()))
        x, maps = self.stem(images), []  # [B, h, w, C]
        for index, stage in enumerate(self.stages):
            if index:
                x = self.downsamples[index - 1](x)
            x = stage(x, partial(probe, index) if probe is not None else None, self.checkpointing)
            maps.append(x)
        return maps

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The map of each stage, [B, C, h, w] each, for detection or segmentation heads.

        In memory they are ordered as the images were; `memory_format=torch.channels_last` images spare copies.
        """
        return [channels_first(x) for x in self._maps(images)]

    def forward_features(self, images: Tensor, probe=None) -> Tensor:
        """The last map after the head's norm, before the mean. [B, 3, height, width] -> [B, h, w, num_features]."""
        return self.pre_head(self._maps(images, probe)[-1])

    def forward_head(self, features: Tensor) -> Tensor:
        """Mean over the map, then the classifier. [B, h, w, num_features] -> [B, classes]."""
        return self.head(features.mean((1, 2)))

    def forward(self, images: Tensor, probe=None) -> Tensor:
        """Scores of the classes.

        Args:
            images: [B, image_channels, height, width], normalised floats.
            probe: called as probe(stage, block, name, value); see `Retention.forward` and `SwatAttention.forward`.

        Returns:
            [B, classes]; with classes=0 the pooled features [B, num_features].
        """
        return self.forward_head(self.forward_features(images, probe))
