"""`ch03_decomposed_vs_full`: RMT's two forms of Manhattan attention, with and without rotation, at 32 pixels."""

from functools import partial

from minigated.experiments.vision_table import NANO_RECIPE, RECIPE, Arm, VisionTable, run_table

TABLE = VisionTable(
    id="ch03_decomposed_vs_full",
    chapter=3,
    claim="one softmax over the whole map is better than two passes along its axes",
    arms=(
        Arm("decomposed", {"mixers": "rmt_decomposed"}),
        Arm("full", {"mixers": "rmt_full"}),
        Arm("decomposed, no rotation", {"mixers": "rmt_decomposed", "rotation": False}),
        Arm("full, no rotation", {"mixers": "rmt_full", "rotation": False}),
        Arm("decomposed, no decay", {"mixers": "rmt_decomposed", "decay": "none"}),
        Arm("full, no decay", {"mixers": "rmt_full", "decay": "none"}),
    ),
    claims=(
        ("The full form is better than the decomposed one", "full", "decomposed"),
        ("Rotation is better than none (decomposed)", "decomposed", "decomposed, no rotation"),
        ("Decay is better than none (decomposed)", "decomposed", "decomposed, no decay"),
        ("Decay is better than none (full)", "full", "full, no decay"),
    ),
    size={"cpu": "rmt_nano", "gpu": "gated_swinrmt_retention_tiny"},
    plans={"cpu": NANO_RECIPE, "gpu": {**RECIPE, "epochs": 10}},
    images={"cpu": "cifar10-sample", "gpu": "cifar10"},
    options={"window": None, "stem_stride": 2},
)
run = partial(run_table, TABLE)
