"""`ch05_gate_ablation`: Gated-SwinRMT-Retention at 64 pixels with one thing changed at a time."""

from functools import partial

from minigated.experiments.vision_table import AT_64, GATED, NANO_RECIPE, Arm, VisionTable, run_table

TABLE = VisionTable(
    id="ch05_gate_ablation",
    chapter=5,
    claim="Gated-SwinRMT-Retention is better with its gate than without",
    arms=(
        Arm("as it is", GATED),
        Arm("no gate", {"gate": "none"}, single=True),
        Arm("one gate score a head", {"gate": "headwise"}, single=True),
        Arm("gate from the block input before its norm", {**GATED, "gate_input": "residual"}, single=True),
        Arm("gate with a bias", {**GATED, "gate_bias": True}, single=True),
        Arm("no LCE", {**GATED, "lce": False}, single=True),
        Arm("no decay", {**GATED, "decay": "none"}, single=True),
        Arm("RetNet's decay rates", {**GATED, "decay": "retnet"}, single=True),
        Arm("no rotation", {**GATED, "rotation": False}, single=True),
    ),
    claims=(
        ("The gate is better than none", "as it is", "no gate"),
        ("One score a channel is better than one a head", "as it is", "one gate score a head"),
        ("LCE is better than none", "as it is", "no LCE"),
        ("Decay is better than none", "as it is", "no decay"),
    ),
    size={"cpu": "gated_swinrmt_retention_nano", "gpu": "gated_swinrmt_retention_small"},
    plans={"cpu": NANO_RECIPE, "gpu": {**AT_64, "epochs": 10}},
    images={"cpu": "cifar10-sample", "gpu": "mini-imagenet"},
    options={"window": 4},
)
run = partial(run_table, TABLE)
