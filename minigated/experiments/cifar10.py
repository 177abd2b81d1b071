"""`ch05_cifar10`: five mixers in one skeleton at 32 pixels, where every window is the whole map."""

from functools import partial

from minigated.experiments.vision_table import MIXERS, NANO_RECIPE, RECIPE, Arm, VisionTable, run_table

TABLE = VisionTable(
    id="ch05_cifar10",
    chapter=5,
    claim="at 32 pixels, where every stage is one window, SWAT is still better than RMT",
    arms=(
        *(Arm(name, options) for name, options in MIXERS.items()),
        *(Arm(f"{name}, stem stride 2", MIXERS[name] | {"stem_stride": 2}, single=True) for name in MIXERS),
    ),
    claims=(
        ("SWAT is better than RMT (the paper: by 0.56 points)", "SWAT", "RMT"),
        ("Retention is better than RMT", "Retention", "RMT"),
        ("The gate is better than none", "Retention", "Retention without gate"),
        ("Retention is better than Swin attention", "Retention", "Swin attention"),
    ),
    size={"cpu": "gated_swinrmt_retention_nano", "gpu": "gated_swinrmt_retention_small"},
    plans={"cpu": NANO_RECIPE, "gpu": {**RECIPE, "epochs": 20}},
    images={"cpu": "cifar10-sample", "gpu": "cifar10"},
    options={"window": 8},
)
run = partial(run_table, TABLE)
