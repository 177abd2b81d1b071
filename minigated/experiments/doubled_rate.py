"""`ch06_doubled_rate`: the runs of `ch06_mini_imagenet` at twice the rate: what a gate lets a backbone stand.

The other paper of the book finds that of language models (its Table 2). At 64 pixels the rate found at 32 upset the
models without a gate, so those runs became an experiment of their own, and half of it the rate of the comparison.
"""

from dataclasses import replace
from functools import partial

from minigated.experiments.mini_imagenet import TABLE as ONCE
from minigated.experiments.vision_table import run_table

GPU = ONCE.plans["gpu"]
TABLE = replace(
    ONCE,
    id="ch06_doubled_rate",
    claim="at twice the rate a gated backbone is better than one without a gate",
    arms=tuple(replace(arm, paper=None) for arm in ONCE.arms),
    claims=(
        ("The gate is better than none", "Retention", "Retention without gate"),
        ("SWAT is better than RMT", "SWAT", "RMT"),
        ("Retention is better than RMT", "Retention", "RMT"),
        ("Retention is better than Swin attention", "Retention", "Swin attention"),
    ),
    plans=ONCE.plans | {"gpu": GPU | {"rate": 2 * GPU["rate"]}},
)
run = partial(run_table, TABLE)
