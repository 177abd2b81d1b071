"""The scaled experiments: each writes a record. `python -m minigated run RECORD_ID`."""

from importlib import import_module
from inspect import signature

from minigated.errors import InputError, one_of

EXPERIMENTS = {
    "ch01_attention_cost": "minigated.experiments.attention_cost",
    "ch02_backcopy": "minigated.experiments.backcopy_table",
    "ch02_gate_table": "minigated.experiments.gate_table",
    "ch02_sink_lm": "minigated.experiments.sink_lm",
    "ch03_decomposed_vs_full": "minigated.experiments.decomposed_vs_full",
    "ch04_window_size": "minigated.experiments.window_size",
    "ch05_cifar10": "minigated.experiments.cifar10",
    "ch05_full_size": "minigated.experiments.full_size",
    "ch05_gate_ablation": "minigated.experiments.gate_ablation",
    "ch05_stride_2": "minigated.experiments.stride_two",
    "ch06_doubled_rate": "minigated.experiments.doubled_rate",
    "ch06_mini_imagenet": "minigated.experiments.mini_imagenet",
    "ch06_swat_readings": "minigated.experiments.swat_readings",
    "ch07_late_gate": "minigated.experiments.late_gate",
    "ch07_learning_rate": "minigated.experiments.learning_rate",
    "ch07_moe_gates": "minigated.experiments.moe_gates",
    "ch07_sparsity_sinks": "minigated.experiments.sparsity_sinks",
    "ch08_length": "minigated.experiments.length",
    "ch09_bench_attention": "minigated.bench.suite_attention",
    "ch09_bench_generate": "minigated.bench.suite_generate",
    "ch09_bench_lm": "minigated.bench.suite_lm",
    "ch09_bench_moe": "minigated.bench.suite_moe",
    "ch09_bench_retention": "minigated.bench.suite_retention",
    "ch09_bench_vit": "minigated.bench.suite_vit",
}
SCALES = ("cpu", "gpu")


def run_experiment(record_id: str, **options) -> dict:
    """Runs an experiment and returns its record.

    Args:
        record_id: a name of `EXPERIMENTS`.
        **options: scale ("cpu" or "gpu"), seeds (how many), device, out (folder), text (name or path;
            of images for vision), resume, names (rows to run), made_only (train nothing; not of every experiment).
    """
    one_of("record id", record_id, EXPERIMENTS)
    one_of("scale", options.get("scale"), SCALES)
    run = import_module(EXPERIMENTS[record_id]).run
    if "made_only" in options and "made_only" not in signature(run).parameters:
        raise InputError(f"{record_id} is not made from its log alone; leave --made-only out")
    return run(**options)
