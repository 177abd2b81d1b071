"""What became of each suite's claim, in words made from its record."""

import pytest

from minigated import records
from minigated.bench.outcomes import OUTCOMES, outcome


def made(suite: str, times: dict[tuple[str, str], float], **extra) -> dict:
    """A record with these medians, (case, contender) -> milliseconds."""
    rows = [{"case": case, "contender": name, "median_ms": ms} | extra for (case, name), ms in times.items()]
    return {"id": f"ch09_bench_{suite}", "rows": [{"extra": row} for row in rows]}


def test_gates_are_judged_beside_the_same_way_without_one():
    core, layer = "core, gate {}, training".format, "layer, training"
    times = {(core("none"), f"SDPA, {way}"): ms for way, ms in (("eager", 1.0), ("compiled", 2.0))}
    times |= {(core("headwise"), f"SDPA, {way}"): ms for way, ms in (("eager", 1.1), ("compiled", 2.6))}
    times |= {(core("elementwise"), f"SDPA, {way}"): ms for way, ms in (("eager", 1.2), ("compiled", 2.1))}
    times |= {(layer, f"minigated, gate {gate}, eager"): 4.0 for gate in ("none", "headwise", "elementwise")}
    times |= {(layer, f"minigated, gate {gate}, compiled"): 2.0 for gate in ("none", "headwise", "elementwise")}
    assert outcome(made("attention", times)) == "a gate adds 5% to 30% to the fused core, 0% to a layer"
    both = "compiled and recorded"
    for gate, core_ms, layer_ms in (("none", 1.0, 2.0), ("headwise", 1.4, 2.2), ("elementwise", 1.5, 2.1)):
        times |= {(core(gate), f"SDPA, {both}"): core_ms, (layer, f"minigated, gate {gate}, {both}"): layer_ms}
    said = "a gate adds 40% to 50% to the fused core, 5% to 10% to a layer, each in one CUDA graph"
    assert outcome(made("attention", times)) == said
    del times[layer, f"minigated, gate none, {both}"]  # it failed: all are judged as they are without
    assert outcome(made("attention", times)) == "a gate adds 5% to 30% to the fused core, 0% to a layer"


def test_cores_are_judged_where_targets_are():
    case = "swat window {} training".format
    times = {(case(4), "matmul, eager"): 8.0, (case(4), "kernel, recorded"): 0.5, (case(4), "kernel, eager"): 2.0}
    times |= {(case(8), "matmul, eager"): 9.0, (case(8), "kernel, recorded"): 0.5, (case(8), "kernel, eager"): 1.0}
    others = {(name, "matmul, eager"): 1.0 for name in ("swat window 7 inference", "swat window 7 shifted training")}
    assert outcome(made("retention", times | others)) == "16 to 18 times in one CUDA graph, 4.0 to 9.0 without"


def test_on_a_cpu_passes_are_judged_by_their_compiled_form():
    case = "retention window {} training".format
    times = {(case(w), name): ms for w, slow in ((4, 6.0), (8, 3.0))
             for name, ms in (("matmul, eager", slow), ("pointwise, compiled", 1.5))}  # fmt: skip
    said = outcome(made("retention_cpu", times))
    assert "4.0 times" in said and "2.0 at 8" in said


def test_experts_and_backbones_are_judged_like_against_like():
    dense = "minigated, dense, same active operations,"
    times = {("model, 16", f"{dense} compiled"): 2.0, ("model, 16", f"{dense} compiled and recorded"): 1.0}
    times |= {
        ("model, 16", "minigated, experts, compiled"): 4.0,
        ("model, 16", "minigated, experts, compiled and recorded"): 1.25,
    }
    times |= {("layer, 16", "same operations, dense, compiled"): 1.0, ("layer, 16", "minigated grouped, compiled"): 2.5}
    said = "0.80 of it for models in one CUDA graph, 0.50 without; 0.40 for a layer alone"
    assert outcome(made("moe", times)) == said
    layers = {("layer, 16", f"{name}, compiled and recorded"): ms
              for name, ms in (("same operations, dense", 0.5), ("minigated grouped", 2.0))}  # fmt: skip
    assert outcome(made("moe", times | layers)) == said.replace("0.40", "0.25") + " in one CUDA graph"
    layers |= {("layer, 64", "same operations, dense, compiled"): 1.5}  # where one was not recorded, none counts
    layers |= {("layer, 64", "minigated grouped, compiled"): 2.5}
    assert outcome(made("moe", times | layers)) == said.replace("0.40", "0.40 to 0.60")
    swin = "timm Swin, equal parameters, compiled"
    times = {("32 px, training", "minigated retention, compiled and recorded"): 4.0, ("32 px, inference", swin): 1.0}
    times |= {("32 px, training", swin): 8.0, ("32 px, training", f"{swin} and recorded"): 2.0}
    assert outcome(made("vit", times)) == "2.00 times as fast; 0.50 if Swin is one CUDA graph too"


def test_steps_of_language_models_are_judged_by_gate_and_products():
    profile = {"kinds": {"matrix products": 5.0}}
    name = "minigated, gate {}, {}".format
    times = {("gates, width 8", name(gate, way)): 10.0 + more
             for way in ("compiled", "compiled and recorded")
             for gate, more in (("none", 0.0), ("headwise", -0.5), ("elementwise", 10.0))}  # fmt: skip
    said = "a gate costs -5.0% to +100.0%; matrix products are 25% to 53% of compiled steps"
    assert outcome(made("lm", times, profile=profile)) == said
    times = {("decoding, 3 M", "minigated, static cache, fused"): 1.0}
    found = outcome(made("generate", times, against_weights=2.5))
    assert found == "a token's time over that of the reading: 2.50 at 3 M"


@pytest.mark.parametrize("suite", OUTCOMES)
def test_every_claim_of_the_book_has_an_outcome(suite):
    """A renamed row would leave a claim without its numbers."""
    record = records.load(f"ch09_bench_{suite}")
    assert outcome(record)
    assert outcome(record | {"id": f"ch09_bench_{suite}_elsewhere"}) == ""
    assert outcome(record | {"rows": record["rows"][:1]}) == ""  # cut short
