"""What a GPU does during a call: kinds of kernels, time that none fills, and the targets that the records answer."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigated import kernels
from minigated.bench import suite_generate, suite_lm, suite_moe, suite_retention, suite_vit
from minigated.bench.profile import IDLE, OTHER, busy, kind_of, look, summary
from minigated.bench.targets import (
    TARGETS,
    Target,
    fastest_form,
    measured,
    reached,
    shares,
    tally,
    targets_table,
    where,
)


# ----------------------------------------------------------------------------------------- kernels by name
@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GroupProblemShape>>", "matrix products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int,", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_backward_3", "compiled"),
        ("triton_red_fused_convolution_add_2", "compiled"),
        ("_attend", "our kernels"),
        ("_convolve", "our kernels"),
        ("void conv2d_grouped_direct_kernel<c10::BFloat16>", "convolution"),
        ("sm80_xmma_wgrad_implicit_gemm_indexed_bf16f32", "convolution"),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata, FusedAdamMathFunctor>", "optimizer"),
        ("Memset (Device)", "copies and casts"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16>>", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", OTHER),
    ],
)  # fmt: skip
def test_a_kernel_is_known_by_its_name(kernel, kind):
    assert kind_of(kernel) == kind


def test_every_kernel_of_ours_is_known_as_ours():
    """A renamed one would count as torch's own; the name of a launch is what a profiler sees."""
    sources = [path.read_text() for path in Path(kernels.__file__).parent.glob("*_triton.py")]
    launch = re.compile(r"^ +(_\w+)\[", re.MULTILINE)
    launched = {name for text in sources for name in launch.findall(text)}
    assert len(launched) == 10 and {kind_of(name) for name in launched} == {"our kernels"}, launched


def test_overlapping_kernels_are_busy_once():
    assert busy([(5.0, 7.0), (0.0, 4.0), (1.0, 2.0), (3.0, 5.0)]) == 7.0
    assert busy([]) == 0.0


def test_a_summary_is_of_the_last_call():
    first = [("_add", 0.0, 50.0), ("_add", 60.0, 110.0)]
    last = [("_add", 1000.0, 1400.0), ("copy", 1200.0, 1600.0), ("_add", 1900.0, 2000.0)]
    found = summary([*last, *first, ("early", -9.0, -8.0)], calls=2)
    assert found["kernels"] == 3 and found["longest"] == [["_add", 0.5, 2], ["copy", 0.4, 1]]
    assert found["kinds"] == pytest.approx({"our kernels": 0.5 * 7 / 9, "copies and casts": 0.4 * 7 / 9})
    assert summary([]) is None and summary(first, calls=3) is None


def test_a_long_call_is_not_looked_at():
    assert look(lambda: pytest.fail("it ran"), seconds=2.0) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_look_finds_the_product_and_the_sum():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    found = look(lambda: (a @ a).sum(), seconds=1e-3)
    assert found["kinds"]["matrix products"] > found["kinds"][OTHER] > 0
    assert 2 <= found["kernels"] <= 5


# ----------------------------------------------------------------------------------------- targets
PROFILE = {"kinds": {"matrix products": 6.0, "copies and casts": 3.9, "compiled": 0.1, IDLE: 2.0}}  # within a call


def row(name: str, speed: float, **more) -> dict:
    """A timed row of case "c"."""
    extra = {"case": "c", "contender": name, "per_second": speed, "median_ms": 20.0, "profile": None, **more}
    return {"extra": extra}


def record(*rows: dict) -> dict:
    return {"id": "ch09_bench_x", "rows": list(rows)}


def test_shares_fill_a_call():
    assert shares({"profile": PROFILE, "median_ms": 20.0}) == pytest.approx(
        {"matrix products": 0.3, "copies and casts": 0.195, "compiled": 0.005, IDLE: 0.5}
    )
    slow = shares({"profile": PROFILE, "median_ms": 8.0})  # the call that was looked at was slower than the others
    assert slow == pytest.approx({"matrix products": 0.6, "copies and casts": 0.39, "compiled": 0.01, IDLE: 0.0})
    assert slow[IDLE] == 0.0


def test_a_target_compares_the_fastest_rows_and_needs_all_peers():
    found = {"x": record(row("ours a", 6.0), row("ours b", 3.0), row("theirs a", 4.0), row("theirs b", 5.0))}
    both = ("theirs a", "theirs b")
    assert reached(Target("t", "x", "c", "ours", 1.25, both), found) == (pytest.approx(1.2), False)
    assert reached(Target("t", "x", "c", "ours", 1.25, both, least=False), found) == (pytest.approx(1.2), True)
    assert reached(Target("t", "x", "c", "ours b", 1.25, both[:1]), found) == (pytest.approx(0.75), False)
    assert fastest_form(Target("t", "x", "c", "ours", 1.25, both, forms=True), found) == "b"
    longer = Target("t", "x", "c", "ours b", 0.3, both[:1], extra=True, least=False)
    assert reached(longer, found) == (pytest.approx(1 / 3), False)
    assert reached(Target("t", "x", "c", "ours", 7.0, key="per_second"), found) == (6.0, False)
    assert reached(Target("t", "x", "c", "ours", 1.0, (*both, "theirs c")), found) is None  # would be too easy
    assert reached(Target("t", "x", "c", "gone", 1.0, both), found) is None
    assert reached(Target("t", "x", "elsewhere", "ours", 1.0, both), found) is None
    assert reached(Target("t", "x", "c", "ours", 1.0, both), {"x": found["x"] | {"id": "ch09_bench_x_cpu"}}) is None


def test_what_stands_in_the_way_is_of_the_row_that_was_measured():
    found = {"x": record(row("ours a", 6.0, profile=PROFILE), row("ours b", 3.0, profile={"kinds": {"compiled": 9.0}}))}
    missed = Target("t", "x", "c", "ours", 9.0, key="per_second")
    assert where(missed, found) == f"ours a: {IDLE} 50%, matrix products 30%, copies and casts 20%"
    found["x"]["rows"].append(row("ours c", 7.0))
    assert where(missed, found) == ""  # and not the profile of a slower row


def test_a_near_miss_does_not_look_like_the_aim():
    aim = Target("t", "x", "c", "ours", 1.3)
    assert [measured(aim, value, False) for value in (1.2, 1.297, 1.29996)] == ["1.20", "1.297", "1.29996"]
    assert measured(aim, 1.3, True) == "1.30"
    share, whole = replace(aim, aim=0.6, shown="{:.0%}"), replace(aim, aim=1260, shown="{:,.0f}")
    assert measured(share, 0.597, False) == "59.7%" and measured(whole, 1259.7, False) == "1,259.7"


def test_the_table_has_every_target_or_says_that_it_is_open(monkeypatch):
    said = f"Not measured on a GPU yet: {len(TARGETS)} targets, suites lm, moe, generate, retention, vit."
    assert targets_table({}) == said
    fast = Target("fast", "x", "c", "ours", 1.0, key="per_second")
    slow = Target("slow", "x", "c", "ours", 9.0, key="per_second", least=False)
    gone = Target("gone", "x", "c", "else", 9.0, key="k")
    best = Target("over", "x", "c", "ours", 1.0, ("theirs a", "theirs b"), forms=True)
    monkeypatch.setattr("minigated.bench.targets.TARGETS", [fast, slow, replace(slow, what="same"), best, gone])
    found = record(row("ours", 10.0, profile=PROFILE), row("theirs a", 5.0), row("theirs b", 4.0))
    lines = targets_table({"x": found}).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert lines[2:6] == [
        "| fast | ≥ 1.00 | 10.00 | reached |",
        "| slow | ≤ 9.00 | 10.00 | missed; ours: waiting 50%, matrix products 30%, copies and casts 20% |",
        "| same | ≤ 9.00 | 10.00 | missed; as above |",
        "| over a | ≥ 1.00 | 2.00 | reached |",
    ]
    assert lines[-1] == "Not measured on a GPU yet: 1 targets, suites x."
    assert tally(found) == "2 of 4 targets reached" and tally(found | {"id": "ch09_bench_x_cpu"}) == ""


def test_every_target_asks_for_rows_that_a_suite_has():
    """Names are written twice; a renamed row would leave its target open for ever."""
    modules = {"lm": suite_lm, "moe": suite_moe, "generate": suite_generate, "retention": suite_retention}
    modules["vit"] = suite_vit
    there = {}
    for suite, module in modules.items():
        named = [(case.name, one.name) for case in module.cases("gpu", torch.device("cuda")) for one in case.rows]
        numbers = {"flop_share": 0.5, "byte_share": 0.5, "against_weights": 1.0, "profile": PROFILE}
        rows = [row(name, 1.0 + i, **numbers | {"case": case}) for i, (case, name) in enumerate(named)]
        there[suite] = {"id": f"ch09_bench_{suite}", "rows": rows}
    for target in TARGETS:
        assert reached(target, there) is not None, target.what
        assert where(target, there).startswith(target.ours), target.what
