"""`ch05_stride_2`: the mixers of `ch05_cifar10` with a first map of 16 x 16, at half the rate.

At the rate that was searched for maps of 8 x 8 (stem stride 4) the larger first map upsets the models without a gate,
see the rows of stem stride 2 there; half of it is what the comparison at 64 pixels, with such a first map too, was made
at.
"""

from dataclasses import replace
from functools import partial

from minigated.experiments.cifar10 import TABLE as SMALLER
from minigated.experiments.vision_table import MIXERS, run_table

GPU = SMALLER.plans["gpu"]
TABLE = replace(
    SMALLER,
    id="ch05_stride_2",
    claim="at 32 pixels with windows that act SWAT is better than RMT",
    arms=tuple(arm for arm in SMALLER.arms if arm.name in MIXERS),
    claims=(
        ("SWAT is better than RMT", "SWAT", "RMT"),
        ("Retention is better than RMT", "Retention", "RMT"),
        ("The gate is better than none", "Retention", "Retention without gate"),
    ),
    plans=SMALLER.plans | {"gpu": GPU | {"rate": GPU["rate"] / 2}},
    options=SMALLER.options | {"stem_stride": 2},
)
run = partial(run_table, TABLE)
