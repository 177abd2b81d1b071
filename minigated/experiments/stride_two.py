"""`ch05_stride_2`: the five mixers at 32 pixels with a first map of 16 x 16, at half the rate of `ch05_cifar10`.

At the rate that was searched for maps of 8 x 8 (stem stride 4) the larger first map upsets the models without a gate,
see the rows of stem stride 2 in `ch05_cifar10`; half of it is what the comparison at 64 pixels, which has such a first
map too, was made at.
"""

from functools import partial

from minigated.experiments.vision_table import AT_64, MIXERS, NANO_RECIPE, Arm, VisionTable, run_table

TABLE = VisionTable(
    id="ch05_stride_2",
    chapter=5,
    claim="at 32 pixels with windows that act SWAT is better than RMT",
    arms=tuple(Arm(name, options) for name, options in MIXERS.items()),
    claims=(
        ("SWAT is better than RMT", "SWAT", "RMT"),
        ("Retention is better than RMT", "Retention", "RMT"),
        ("The gate is better than none", "Retention", "Retention without gate"),
    ),
    size={"cpu": "gated_swinrmt_retention_nano", "gpu": "gated_swinrmt_retention_small"},
    plans={"cpu": NANO_RECIPE, "gpu": {**AT_64, "epochs": 20}},
    images={"cpu": "cifar10-sample", "gpu": "cifar10"},
    options={"window": 8, "stem_stride": 2},
)
run = partial(run_table, TABLE)
