"""`ch06_mini_imagenet`: the same five mixers at 64 pixels, where windows act in the first two stages."""

from functools import partial

from minigated.experiments.vision_table import AT_64, MIXERS, NANO_RECIPE, Arm, VisionTable, run_table

PAPER = {"RMT": 73.74, "Retention": 78.20, "SWAT": 80.22}  # at 224 pixels and 77-79 M parameters

TABLE = VisionTable(
    id="ch06_mini_imagenet",
    chapter=6,
    claim="where maps are larger than a window, SWAT is clearly better than RMT",
    arms=tuple(Arm(name, options, PAPER.get(name)) for name, options in MIXERS.items()),
    claims=(
        ("SWAT is better than RMT (the paper: by 6.48 points)", "SWAT", "RMT"),
        ("Retention is better than RMT (the paper: by 4.46 points)", "Retention", "RMT"),
        ("SWAT is better than Retention", "SWAT", "Retention"),
        ("The gate is better than none", "Retention", "Retention without gate"),
        ("Retention is better than Swin attention", "Retention", "Swin attention"),
    ),
    size={"cpu": "gated_swinrmt_retention_nano", "gpu": "gated_swinrmt_retention_small"},
    plans={"cpu": NANO_RECIPE, "gpu": {**AT_64, "epochs": 15}},
    images={"cpu": "cifar10-sample", "gpu": "mini-imagenet"},
    options={"window": 4},
)
run = partial(run_table, TABLE)
