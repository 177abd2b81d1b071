"""The named backbones, and how to build them."""

from dataclasses import fields, replace

import torch

from minigated.errors import InputError, one_of
from minigated.variants import parameters
from minigated.vit import VisionTransformer, ViTConfig


def _rmt(widths, depths, heads, spans, ratios, full_from: int, drop_path: float, layer_scale=False) -> ViTConfig:
    """A released size of RMT: stages from `full_from` on use the full form, those before it the decomposed one."""
    return ViTConfig(
        widths=widths,
        depths=depths,
        heads=heads,
        ffn_ratios=ratios,
        mixers=tuple("rmt_full" if stage >= full_from else "rmt_decomposed" for stage in range(4)),
        decay_spans=spans,
        window=None,
        drop_path=drop_path,
        layer_scale=layer_scale,
    )


NANO = ViTConfig(
    widths=(32, 64, 96, 128),
    depths=(2, 2, 2, 1),
    heads=(2, 4, 6, 8),
    ffn_ratios=3.0,
    decay_spans=(4.0, 4.0, 6.0, 6.0),
    classes=10,
    image_size=32,
    window=8,
    head_width=256,
    drop_path=0.0,
)
TINY = replace(NANO, widths=(64, 128, 192, 256), depths=(2, 2, 4, 2), heads=(2, 4, 6, 8), head_width=512)
SMALL = replace(
    TINY, widths=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), head_width=1024, drop_path=0.1
)
PAPER = ViTConfig(
    widths=(128, 256, 512, 1024),
    depths=(2, 2, 12, 2),
    heads=(4, 8, 16, 32),
    decay_spans=(4.0, 4.0, 6.0, 6.0),
    classes=100,
)
LATE = (False, False, True, True)  # layer scale in the last two stages
DECOMPOSED_BUT_LAST = ("rmt_decomposed", "rmt_decomposed", "rmt_decomposed", "rmt_full")

SIZES: dict[str, ViTConfig] = {
    "swin_nano": replace(NANO, mixers="swin", skeleton="swin", window=4, ffn_ratios=4.0),
    "swin_tiny": ViTConfig(
        widths=(96, 192, 384, 768), depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), mixers="swin", skeleton="swin"
    ),
    "rmt_nano": replace(NANO, mixers=DECOMPOSED_BUT_LAST, window=None),
    "rmt_t": _rmt((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (4, 4, 6, 6), 3.0, 2, 0.1),
    "rmt_s": _rmt((64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 6, 6), (4, 4, 3, 3), 3, 0.15),
    "rmt_b": _rmt((80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (5, 5, 6, 6), (4, 4, 3, 3), 3, 0.4, LATE),
    "rmt_l": _rmt((112, 224, 448, 640), (4, 8, 25, 8), (7, 7, 14, 20), (6, 6, 6, 6), (4, 4, 3, 3), 3, 0.5, LATE),
}
for _size, _config in {"nano": NANO, "tiny": TINY, "small": SMALL, "paper": PAPER}.items():
    for _mixer in ("gated_swinrmt_retention", "gated_swinrmt_swat"):
        SIZES[f"{_mixer}_{_size}"] = replace(_config, mixers=_mixer)


def build_vit(size: str | ViTConfig, device=None, **overrides) -> VisionTransformer:
    """Builds a backbone by name.

    Args:
        size: a name of `SIZES`, or a config.
        device: where to build it; "meta" costs no memory.
        **overrides: fields of `ViTConfig`, or `num_classes` for `classes`.
    """
    if isinstance(size, str):
        one_of("model", size, SIZES)
        size = SIZES[size]
    if "num_classes" in overrides:
        if "classes" in overrides:
            raise InputError("classes and num_classes are two names of one option; accepted: one of them")
        overrides["classes"] = overrides.pop("num_classes")
    accepted = [f.name for f in fields(ViTConfig)]
    unknown = set(overrides) - set(accepted)
    if unknown:
        raise InputError(f"unknown option {sorted(unknown)[0]!r}; accepted: num_classes, {', '.join(accepted)}")
    with torch.device(device or "cpu"):
        return VisionTransformer(replace(size, **overrides))


def model_rows() -> list[dict]:
    """Every named backbone with its sizes and its exact parameter count, counted on the meta device."""
    rows = []
    for name, config in SIZES.items():
        sizes = {n: getattr(config, n) for n in ("widths", "depths", "heads", "window", "classes", "image_size")}
        rows.append({"name": name, "parameters": parameters(build_vit(config, "meta")), **sizes})
    return rows
