"""`ch06_swat_readings`: what each open reading of the abstract costs Gated-SwinRMT-SWAT at 64 pixels."""

from functools import partial

from minigated.experiments.vision_table import AT_64, NANO_RECIPE, Arm, VisionTable, run_table
from minigated.swat_options import SwatOptions

RATIOS = {"plain": 3.0, "mlp": 2.0}  # the feed-forward pays for the value's matrices: equal parameters
READINGS = {
    "as it is": {},
    "distance: |i - j| in the slopes": {"distance": "absolute"},
    "slopes opposed in the height pass": {"pass_signs": "opposed"},
    "slopes into four quadrants": {"pass_signs": "quadrants"},
    "slopes of ALiBi": {"slopes": "alibi"},
    "slopes of one sign": {"slopes": "one_sided"},
    "slopes as the decay": {"alibi": "outer"},
    "slopes' magnitude as the decay": {"alibi": "magnitude"},
    "no slopes": {"alibi": "none"},
    "no decay": {"decay": False},
    "RMS norm": {"norm": "rms"},
    "norm a head": {"norm": "head"},
    "rows divided by their sum": {"norm": "row_sum"},
    "weights divided by the window": {"norm": "window"},
    "log of the window off the scores": {"norm": "log_window"},
    "no norm": {"norm": "none"},
    "norm after LCE": {"norm_place": "after_lce"},
    "value gates itself": {"value": "self"},
    "value through a whole SwiGLU": {"value": "mlp"},
    "no value gate": {"value": "plain"},
    "LCE of the raw value": {"lce": "raw"},
    "LCE in each window": {"lce_place": "window"},
    "no LCE": {"lce": "none"},
    "no rotation": {"rotation": False},
}

TABLE = VisionTable(
    id="ch06_swat_readings",
    chapter=6,
    claim="how much the open readings of the SWAT mixer matter",
    arms=tuple(
        Arm(
            name,
            {"swat": SwatOptions(**options), "ffn_ratios": RATIOS.get(options.get("value"), 2.5)},
            single=name != "as it is",
        )
        for name, options in READINGS.items()
    ),
    claims=(),
    size={"cpu": "gated_swinrmt_swat_nano", "gpu": "gated_swinrmt_swat_small"},
    plans={"cpu": NANO_RECIPE, "gpu": {**AT_64, "epochs": 10}},
    images={"cpu": "cifar10-sample", "gpu": "mini-imagenet"},
    options={"window": 4},
)
run = partial(run_table, TABLE)
