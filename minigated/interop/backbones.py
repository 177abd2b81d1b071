"""Released vision weights under this package's names: RMT's classification models, and Swin in three spellings.

Each loader takes a state dict (`torch.load(file, weights_only=True)`), reads the sizes off its shapes and gives back a
model in evaluation mode. RMT's layout is tested on state dicts built to it with random weights: the released files were
not at hand. Swin is tested against timm's and torchvision's own models.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minigated.errors import InputError
from minigated.vit import VisionTransformer, ViTConfig
from minigated.vit_sizes import SIZES

# What a released name becomes, tried in order; None drops it.
RMT_NAMES = [
    (r"patch_embed\.proj\.(\d+)\.(.+)", r"stem.layers.\1.\2"),
    (r"layers\.\d+\.Relpos\.(angle|decay)", None),  # compared with ours before it is dropped
    (r"layers\.(\d+)\.downsample\.(reduction|norm)\.(.+)", r"downsamples.\1.\2.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", r"stages.\1.blocks.\2.\3"),
    (r"(proj|norm)\.(.+)", r"pre_head.\1.\2"),
    (r"head\.(weight|bias)", r"head.\1"),
]
RMT_PARTS = {  # inside a block
    "retention_layer_norm": "mixer_norm",
    "final_layer_norm": "ffn_norm",
    "retention.out_proj": "mixer.out_proj",
    "retention.lepe.conv": "mixer.lce.conv",
    "ffn.fc1": "ffn.fc1",
    "ffn.fc2": "ffn.fc2",
    "ffn.dwconv.conv": "ffn.dwconv.conv",
    "pos.conv": "position.conv",
    "gamma_1": "mixer_scale.gamma",
    "gamma_2": "ffn_scale.gamma",
}
TORCHVISION_TO_TIMM = [
    (r"features\.0\.0\.(.+)", r"patch_embed.proj.\1"),
    (r"features\.0\.2\.(.+)", r"patch_embed.norm.\1"),
    (r"features\.(\d*[13579])\.(\d+)\.(.+)", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.{_mlp(m[3])}"),
    (r"features\.(\d*[2468])\.(.+)", lambda m: f"layers.{int(m[1]) // 2}.downsample.{m[2]}"),
    (r"head\.(.+)", r"head.fc.\1"),
    (r"norm\.(.+)", r"norm.\1"),
]
SWIN_NAMES = [
    (r"patch_embed\.(proj|norm)\.(.+)", r"stem.\1.\2"),
    (r"layers\.(\d+)\.downsample\.(.+)", lambda m: f"downsamples.{int(m[1]) - 1}.{m[2]}"),
    (r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)", None),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.(.+)", r"stages.\1.blocks.\2.mixer.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.(.+)", r"stages.\1.blocks.\2.mixer_norm.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm2\.(.+)", r"stages.\1.blocks.\2.ffn_norm.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.(.+)", r"stages.\1.blocks.\2.ffn.\3"),
    (r"norm\.(.+)", r"pre_head.norm.\1"),
    (r"head\.fc\.(.+)", r"head.\1"),
]


def _mlp(name: str) -> str:
    return name.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")


# ---------------------------------------------------------------------------------------------- the doors
def load_rmt(state: Mapping[str, Tensor], image_size: int | tuple[int, int] = 224) -> VisionTransformer:
    """A released RMT classifier as this package's RMT.

    Args:
        state: its state dict, or the checkpoint that holds it under "model". Every tensor is copied.
        image_size: for which tables are made at once.

    Raises:
        InputError: sizes that are no named RMT, a name that is unknown, missing or misshapen, or decay rates and
            rotation angles that are not those of the named size.
    """
    state = dict(state.get("model", state))
    config = replace(_rmt_config(state), image_size=image_size, classes=_shape(state, "head.weight", 2)[0])
    model = VisionTransformer(config)
    _compare_positions(state, model)
    weights = {}
    for name, tensor in _renamed(state, RMT_NAMES, "RMT").items():
        block = re.fullmatch(r"(stages\.\d+\.blocks\.\d+\.)(.+?)((?:\.weight|\.bias)?)", name)
        if block is None:
            weights[name] = tensor
        elif re.fullmatch(r"retention\.[qkv]_proj", block[2]):
            weights.setdefault(f"{block[1]}mixer.qkv{block[3]}", {})[block[2][10]] = tensor
        elif block[2] in RMT_PARTS:
            weights[f"{block[1]}{RMT_PARTS[block[2]]}{block[3]}"] = tensor.flatten() if "gamma" in block[2] else tensor
        else:
            raise InputError(f"{name.replace('stages', 'layers')} is no weight of RMT")
    for name, parts in weights.items():
        if isinstance(parts, dict):
            released = name.replace("stages", "layers")
            if sorted(parts) != ["k", "q", "v"]:
                raise InputError(f"{released}: only {', '.join(sorted(parts))} of q, k and v")
            shapes = [list(parts[part].shape) for part in "qkv"]
            if not shapes[0] == shapes[1] == shapes[2] or not shapes[0]:
                raise InputError(f"{released}: q, k and v of shapes {shapes}; accepted: three of one shape")
            weights[name] = torch.cat([parts[part] for part in "qkv"])
    return _filled(model, weights)


def load_swin(state: Mapping[str, Tensor], image_size: int | tuple[int, int] = 224) -> VisionTransformer:
    """A Swin of timm, torchvision or the authors' release as this package's Swin.

    Args:
        state: its state dict, or the checkpoint that holds it under "model". Every tensor is copied.
        image_size: for which tables are made at once.

    Raises:
        InputError: a name that is unknown, missing or misshapen.
    """
    state = dict(state.get("model", state))
    if any(name.startswith("features.") for name in state):
        state = {name: t for name, t in state.items() if not name.endswith("relative_position_index")}
        state = _renamed(state, TORCHVISION_TO_TIMM, "Swin")
    elif "layers.0.downsample.reduction.weight" in state:  # the authors count a stage's downsampling to its end
        later = lambda m: f"layers.{int(m[1]) + 1}.downsample."
        state = {re.sub(r"^layers\.(\d+)\.downsample\.", later, name): t for name, t in state.items()}
        state = {re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name): t for name, t in state.items()}
    model = VisionTransformer(replace(_swin_config(state), image_size=image_size))
    weights = _renamed(state, SWIN_NAMES, "Swin")
    for name, table in model.state_dict().items():
        if name.endswith("relative_position_bias_table") and name in weights:
            weights[name] = _widened(weights[name], table)
    return _filled(model, weights)


# ---------------------------------------------------------------------------------------------- sizes from shapes
def _shape(state: Mapping[str, Tensor], name: str, axes: int) -> torch.Size:
    if name not in state:
        raise InputError(f"{name} is missing in the state dict")
    shape = state[name].shape
    if len(shape) != axes or 0 in shape:
        raise InputError(f"{name} is {list(shape)} in the state dict; accepted: {axes} axes, none of them empty")
    return shape


def _depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    if not blocks:
        raise InputError("the state dict has no layers.I.blocks.J")
    stages = range(1 + max(i for i, _ in blocks))
    for stage in stages:
        if (stage, 0) not in blocks:
            raise InputError(f"the state dict has nothing for layers.{stage}.blocks.0")
    return tuple(1 + max(j for i, j in blocks if i == stage) for stage in stages)


def _rmt_config(state: Mapping[str, Tensor]) -> ViTConfig:
    depths = _depths(state)
    widths = tuple(_shape(state, f"layers.{i}.blocks.0.retention.q_proj.weight", 2)[0] for i in range(len(depths)))
    named = {name: SIZES[name] for name in ("rmt_t", "rmt_s", "rmt_b", "rmt_l")}
    for config in named.values():
        if (config.widths, config.depths) == (widths, depths):
            return config
    accepted = "; ".join(f"{name} {config.widths} {config.depths}" for name, config in named.items())
    raise InputError(f"widths {widths} and depths {depths} are no released RMT; accepted: {accepted}")


def _compare_positions(state: Mapping[str, Tensor], model: VisionTransformer) -> None:
    """Released files carry the rates and angles they were trained with: ours must be the same numbers."""
    for index, stage in enumerate(model.stages):
        heads, width = model.config.heads[index], model.config.widths[index]
        angle = 10000 ** -torch.linspace(0, 1, width // heads // 2)
        ours = {"decay": torch.tensor(stage.tables[0].log_decay), "angle": angle.repeat_interleave(2)}
        for name, expected in ours.items():
            stored = state.get(f"layers.{index}.Relpos.{name}")
            if stored is None:
                continue
            same = stored.shape == expected.shape and torch.allclose(stored.float(), expected.float(), atol=1e-6)
            if not same:
                raise InputError(f"layers.{index}.Relpos.{name} of the file is not that of this size of RMT")


def _swin_config(state: Mapping[str, Tensor]) -> ViTConfig:
    depths = _depths(state)
    blocks = [f"layers.{stage}.blocks.0." for stage in range(len(depths))]
    tables = [_shape(state, f"{block}attn.relative_position_bias_table", 2) for block in blocks]
    fc1 = [_shape(state, f"{block}mlp.fc1.weight", 2) for block in blocks]
    patches = _shape(state, "patch_embed.proj.weight", 4)
    return ViTConfig(
        widths=tuple(width for _, width in fc1),
        depths=depths,
        heads=tuple(heads for _, heads in tables),
        ffn_ratios=tuple(hidden / width for hidden, width in fc1),
        mixers="swin",
        skeleton="swin",
        classes=_shape(state, "head.fc.weight", 2)[0] if "head.fc.weight" in state else 0,
        image_channels=patches[1],
        stem_stride=patches[2],
        window=max(_side(offsets) + 1 for offsets, _ in tables) // 2,
        drop_path=0.0,
    )


def _side(offsets: int) -> int:
    """2W - 1 from the (2W - 1)^2 offsets of a window."""
    side = round(offsets**0.5)
    if side * side != offsets or side % 2 == 0:
        raise InputError(f"a relative position table of {offsets} rows belongs to no square window")
    return side


def _widened(small: Tensor, table: Tensor) -> Tensor:
    """A table of a smaller window in the middle of a larger one, where the same offsets are; the rest stays unused."""
    inner, outer = _side(len(small)) if small.ndim == 2 else 0, _side(len(table))
    if not 0 < inner < outer:
        return small  # as it is, or of no use: its shape will be compared
    square = small.new_zeros(outer, outer, small.shape[1])
    start = (outer - inner) // 2
    square[start : start + inner, start : start + inner] = small.reshape(inner, inner, -1)
    return square.flatten(0, 1)


# ---------------------------------------------------------------------------------------------- names
def _renamed(state: Mapping[str, Tensor], rules, family: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            match = re.fullmatch(pattern, name)
            if match:
                if new is not None:
                    renamed[new(match) if callable(new) else match.expand(new)] = tensor
                break
        else:
            raise InputError(f"{name} is no weight of {family}")
    return renamed


def _filled(model: VisionTransformer, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """Copies the weights in and says which one does not fit."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise InputError(f"the state dict has nothing for {name}")
        if weights[name].shape != tensor.shape:
            raise InputError(f"{name} is {list(tensor.shape)} here and {list(weights[name].shape)} in the state dict")
    surplus = sorted(set(weights) - set(own))
    if surplus:
        raise InputError(f"the state dict has {surplus[0]}, which this size has not")
    dtype = next(t.dtype for t in weights.values() if torch.is_floating_point(t))
    model.to(dtype).load_state_dict(dict(weights))
    return model.eval()
