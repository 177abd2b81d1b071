"""`ch04_window_size`: how large a window should be, and what shifting it is worth, at 64 pixels."""

from functools import partial

from minigated.experiments.vision_table import AT_64, NANO_RECIPE, Arm, VisionTable, run_table

TABLE = VisionTable(
    id="ch04_window_size",
    chapter=4,
    claim="shifted windows are better than windows that stay where they are",
    arms=(
        Arm("window 4", {"window": 4}),
        Arm("window 4, not shifted", {"window": 4, "shifts": False}),
        Arm("window 2", {"window": 2}),
        Arm("window 2, not shifted", {"window": 2, "shifts": False}),
        Arm("window 8", {"window": 8}),
        Arm("window 8, not shifted", {"window": 8, "shifts": False}),
        Arm("whole map", {"window": 16}),
    ),
    claims=(
        ("Shifted is better than not (window 4)", "window 4", "window 4, not shifted"),
        ("Shifted is better than not (window 2)", "window 2", "window 2, not shifted"),
        ("Window 4 is better than window 2", "window 4", "window 2"),
        ("The whole map is better than window 4", "whole map", "window 4"),
    ),
    size={"cpu": "gated_swinrmt_retention_nano", "gpu": "gated_swinrmt_retention_tiny"},
    plans={"cpu": NANO_RECIPE, "gpu": {**AT_64, "epochs": 10}},
    images={"cpu": "cifar10-sample", "gpu": "mini-imagenet"},
    options={"mixers": "swin"},
)
run = partial(run_table, TABLE)
