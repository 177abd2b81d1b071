"""Every suite on its smallest sizes: rows checked, peers beside them, a record, a log that a cut run goes on from."""

import importlib
import importlib.util
import json
import types

import pytest
import torch

from minigated import attention, kernels, records
from minigated.__main__ import main
from minigated.bench import (
    lm_rows,
    peers,
    plan,
    report,
    runner,
    suite_attention,
    suite_generate,
    suite_lm,
    suite_moe,
    suite_retention,
    suite_vit,
)
from minigated.bench.rows import TOLERANCE, Absent, difference
from minigated.errors import InputError
from minigated.experiments import EXPERIMENTS, run_experiment, runlog
from minigated.lm import LanguageModel, build_lm

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Sizes of milliseconds, two samples a row at least, a folder of its own."""
    small = suite_lm.shape(32, 2, 2, 2, 32, 64, 32)
    monkeypatch.setattr(suite_attention, "SIZES", {"cpu": (2, 16, 2, 8)})
    monkeypatch.setattr(suite_retention, "SIZES", {"cpu": (2, 8, 16, 2)})
    monkeypatch.setattr(suite_retention, "WINDOWS", {"cpu": {"retention": (4,), "swat": (4,)}})
    monkeypatch.setattr(suite_vit, "SIZED", {"cpu": {"32 px, nano": ("nano", 32, 4, 4, 2, 2)}})
    monkeypatch.setattr(suite_moe, "LAYERS", {"cpu": [(32, 16, 8, 4, 2)]})
    monkeypatch.setattr(suite_lm, "BESIDE", {"cpu": {"tiny": (small, 2, 16)}})
    monkeypatch.setattr(suite_generate, "SIZES", {"cpu": {"tiny": (small, 4)}})
    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: {"float32": 1e11, "bfloat16": 1e11, "copy": 1e10})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(suite: str, out, **options) -> dict:
    return runner.run_suite(suite, scale="cpu", seeds=2, out=out, device="cpu", **options)


def states(record: dict) -> dict[str, str]:
    """State of every row, timed or not."""
    found = {row["name"]: row["extra"]["state"] for row in record["rows"]}
    return found | {f"{row['case']}: {row['row']}": row["state"] for row in record["config"]["not_timed"]}


EXPECTED = {  # words -> rows that must be there, and what they must be
    "attention": {"SDPA, eager": "equal", "nn.MultiheadAttention": "equal", "SDPA layer": "equal"},
    "vit": {"minigated retention": "reference", "minigated swat": "reference", "timm Swin": "other function"},
    "moe": {"grouped, eager": "equal", "experts grouped_mm": "equal", "Qwen3-MoE (eager)": "equal"},
    "lm": {"minigated, gate none": "reference", "transformers Qwen3,": "equal", "transformers Qwen3-Next": "equal"},
    "generate": {
        "minigated, cache": "equal", "minigated, static cache, eager": "equal", "static cache, compiled": "equal",
        "generate, static cache": "equal", "growing cache": "equal", "static cache, fused": "absent",
    },
}  # fmt: skip


@pytest.mark.parametrize("suite", EXPECTED)
def test_a_suite_checks_times_and_records(suite, tiny, capsys):
    record = run(suite, tiny)
    assert record == json.loads((tiny / f"ch09_bench_{suite}_cpu.json").read_text())
    found = states(record)
    fine = {"reference", "equal", "other function"} | ({"absent"} if suite == "generate" else set())
    assert set(found.values()) <= fine, record["config"]["not_timed"]
    for word, state in EXPECTED[suite].items():
        rows = [name for name in found if word in name]
        assert rows and {found[name] for name in rows} == {state}, word
    for row in record["rows"]:
        extra = row["extra"]
        assert len(row["values"]) == 2 and extra["quartiles_ms"][0] <= extra["median_ms"] <= extra["quartiles_ms"][1]
        assert extra["ready_seconds"] > 0 and extra["per_second"] > 0
        if extra["flops"] and extra["bytes"]:
            assert extra["intensity"] == extra["flops"] / extra["bytes"]
            assert extra["flop_share"] == pytest.approx(extra["flop_rate"] / 1e11)
            assert extra["byte_share"] == pytest.approx(extra["byte_rate"] / 1e10)
        if suite == "generate":  # bytes of weights at 1e10 a second
            assert extra["weights_ms"] < 1e3 * extra["bytes"] / 1e10
            assert extra["token_ms"] == pytest.approx((extra["median_ms"] - extra["before_ms"]) / (extra["items"] - 1))
            assert extra["against_weights"] == pytest.approx(extra["token_ms"] / extra["weights_ms"])
    printed = capsys.readouterr().out
    assert (suite == "generate") == ("of reading the weights)" in record["note"])
    assert all(row["extra"]["contender"] in printed for row in record["rows"])
    assert "measured limits" in printed and not records.stale_files(record)


def test_cores_of_vision_run_eager_and_compiled(tiny):
    record = run("retention", tiny, names=("eager", "retention window 4 training: pointwise"))
    found = states(record)
    kernel = {f"{mixer} window 4 training: kernel, eager" for mixer in ("retention", "swat")}
    assert {name for name, state in found.items() if state == "absent"} == kernel
    assert {state for name, state in found.items() if name not in kernel} == {"equal"}
    assert "retention window 4 training: pointwise, compiled" in found
    assert {"swat window 4 training: matmul, eager", "swat window 4 training: pointwise, eager"} <= set(found)
    compiled = next(row for row in record["rows"] if row["name"].endswith("compiled"))["extra"]
    assert compiled["ready_seconds"] > 0 and compiled["facts"]["form"] == "pointwise"


# ---------------------------------------------------------------------------------------------- wrong, absent
def test_the_kernel_is_absent_on_a_processor_and_says_why(tiny, capsys):
    record = run("retention", tiny, names=("retention window 4 training: kernel", "matmul"))
    (absent,) = record["config"]["not_timed"]
    assert absent["row"] == "kernel, eager" and absent["reason"] == "the fused kernel runs on a GPU, this is a cpu"
    assert absent["reason"] in capsys.readouterr().out and absent["reason"] in record["note"]


@pytest.mark.parametrize(
    ("there", "dtype", "width", "window", "reason"),
    [
        (False, torch.bfloat16, 32, 4, "needs Triton"),
        (True, torch.float64, 32, 4, "these are torch.float64"),
        (True, torch.bfloat16, 32, 14, "64 cells.*not 14 x 14"),
        (True, torch.bfloat16, 256, 4, "heads of up to 128.*256"),
        (True, torch.bfloat16, 32, 8, None),
    ],
)
def test_where_the_kernel_cannot_run_no_other_form_stands_in(there, dtype, width, window, reason, monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", lambda: there)
    values = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 56, 56, 2, width))
    if reason is None:
        assert suite_retention.require_kernel(values, window) is None
        return
    with pytest.raises(Absent, match=reason):
        suite_retention.require_kernel(values, window)


def test_the_row_called_kernel_runs_what_a_model_runs(monkeypatch):
    asked, cores = [], suite_retention.CORES
    monkeypatch.setattr(suite_retention, "require_kernel", lambda x, window: asked.append(tuple(x.shape)))
    for mixer, (core, *rest) in list(cores.items()):
        noted = lambda *given, form, core=core: asked.append(form) or core(*given, form=form)
        monkeypatch.setitem(cores, mixer, (noted, *rest))
        for form in ("kernel", "matmul"):
            row = suite_retention.prepare(mixer, form, "eager", (2, 8, 16, 2), 4, False, True, CPU, torch.float32)
            assert len(row.step()) == {"retention": 2, "swat": 3}[mixer]  # the output, and a gradient of what is given
    assert asked == [(2, 8, 8, 2, 8), "auto", "matmul"] * 2
    rows = suite_retention.case("retention", 7, (2, 14, 16, 2), True, torch.device("cuda"), torch.bfloat16).rows
    assert "kernel, eager" in {row.name for row in rows}


def test_a_wrong_fast_form_is_refused_and_the_command_says_so(tiny, monkeypatch, capsys):
    right = suite_retention.CORES["retention"]
    one_pass = lambda qkv, tables, form: right[0](qkv, tables, form).roll(1, 1)
    monkeypatch.setitem(suite_retention.CORES, "retention", (one_pass, *right[1:]))
    arguments = ["bench", "--suite", "retention", "--scale", "cpu", "--seeds", "2", "--device", "cpu"]
    assert main([*arguments, "--only", "matmul", "--out", str(tiny)]) == 1
    record = records.load("ch09_bench_retention_cpu", tiny)
    assert states(record)["retention window 4 training: matmul, eager"] == "wrong"
    assert [row["name"] for row in record["rows"]] == ["swat window 4 training: matmul, eager"]
    assert "Wrong: retention window 4 training: matmul, eager (differs" in record["note"]
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["vit", "moe", "lm", "generate"])
def test_a_peer_that_is_not_installed_is_listed_as_absent(suite, tiny, monkeypatch, capsys):
    find = importlib.util.find_spec
    hidden = ("timm", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    assert main(["bench", suite, "--scale", "cpu", "--seeds", "2", "--device", "cpu", "--out", str(tiny)]) == 0
    record = records.load(f"ch09_bench_{suite}_cpu", tiny)
    absent = [row for row in record["config"]["not_timed"] if row["state"] == "absent"]
    absent = [row for row in absent if not row["row"].startswith("minigated")]  # the fused step, on a CPU
    named = "timm" if suite == "vit" else "transformers"
    assert absent and all(row["reason"] == f"{named} is not installed" for row in absent)
    assert "Absent: " in record["note"] and f"{named} is not installed" in capsys.readouterr().out
    assert all(named not in row["name"] for row in record["rows"])


def test_a_language_model_peer_with_other_weights_is_wrong(tiny, monkeypatch, transformers):
    def changed(state, config):
        model = real(state, config)
        with torch.no_grad():
            model.blocks[0].attention.k_proj.weight.normal_(std=1.0)
        return model

    real = lm_rows.LOADERS["qwen3"]
    monkeypatch.setitem(lm_rows.LOADERS, "qwen3", changed)
    record = run("lm", tiny, names=("gate none", "Qwen3,"))
    assert states(record) == {
        "training, tiny: minigated, gate none, eager": "reference",
        "training, tiny: transformers Qwen3, eager": "wrong",
    }


def test_bfloat16_runs_of_a_deep_model_agree_and_wrong_ones_do_not(monkeypatch):
    config = suite_lm.shape(64, 6, 2, 2, 128, 128, 64)
    model, data = build_lm(config), lm_rows.windows(config, 2, 64, CPU)

    def gradients(precision: str) -> list[torch.Tensor]:
        loss = lm_rows.bound(lm_rows.lm_loss, model, data, False, precision)
        return lm_rows.loss_and_gradients(loss, lm_rows.watched(model))

    right = gradients("float32")
    off = lambda: difference(gradients("bf16"), right)
    assert TOLERANCE[torch.float32] < off() < lm_rows.DEEP / 2
    fused = attention.attention_sdpa
    monkeypatch.setattr(attention, "attention_sdpa", lambda q, k, v: fused(q, k, v, causal=False))
    assert off() > 3 * lm_rows.DEEP
    monkeypatch.setattr(attention, "attention_sdpa", fused)
    monkeypatch.setattr(attention, "apply_rope", lambda x, cos, sin: x)
    assert off() > 3 * lm_rows.DEEP


def test_a_cache_that_forgets_is_seen(monkeypatch):
    config = suite_lm.shape(32, 2, 2, 2, 32, 64, 32)
    forget = LanguageModel.forward
    prepared = suite_generate.prepare_ours(config, True, 4, CPU)
    got, expected = prepared.check()
    assert suite_generate.prepare_ours(config, False, 4, CPU).check is None
    monkeypatch.setattr(LanguageModel, "forward", lambda self, tokens, cache=None: forget(self, tokens))
    forgetful, _ = prepared.check()
    monkeypatch.setattr(LanguageModel, "forward", forget)
    static = lambda: suite_generate.prepare_static(config, "eager", 4, CPU).check()  # a new cache, with nothing in it
    assert difference(*static()) < TOLERANCE[torch.float32]
    monkeypatch.setattr("minigated.static_cache.StepCache.append", lambda self, k, v: (self.k, self.v))
    assert difference(*static()) > TOLERANCE[torch.float32]
    assert difference(got, expected) < TOLERANCE[torch.float32] < difference(forgetful, expected)


# ---------------------------------------------------------------------------------------------- logs, choices, input
def test_a_cut_run_goes_on_from_its_log(tiny, monkeypatch):
    run("attention", tiny, names=("core",))
    log = tiny / "logs" / "ch09_bench_attention_cpu.jsonl"
    before = log.read_text().splitlines()
    assert len(before) == 1 + len(suite_attention.GATES)  # ceilings, and a line a case
    log.write_text("\n".join(before[:3]) + '\n{"key": {"ca')  # cut while the third case was written
    again, seen = runner.measure_case, []
    monkeypatch.setattr(runner, "measure_case", lambda case, *rest: seen.append(case.name) or again(case, *rest))
    record = run("attention", tiny, names=("core",), resume=True)
    assert seen == ["core, gate elementwise, training"] and len(record["rows"]) == 6
    with pytest.raises(InputError, match="--resume"):
        run("attention", tiny, names=("core",))


def test_when_the_time_is_over_the_rest_is_listed_and_can_be_resumed(tiny, monkeypatch):
    real = runner.measure_case
    now = [0.0]

    def slow(case, *rest):
        now[0] += 100.0
        return real(case, *rest)

    monkeypatch.setattr(runner, "measure_case", slow)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    record = run("attention", tiny, names=("core",), seconds=150)  # of three cases, the third starts too late
    found = states(record)
    assert sorted(found.values()) == ["equal"] * 4 + ["not run"] * 2
    assert "Not run: core, gate elementwise" in record["note"] and "TFLOP/s" in record["note"]
    again = run("attention", tiny, names=("core",), seconds=150, resume=True)
    assert set(states(again).values()) == {"equal"} and again["rows"][:4] == record["rows"]


def test_a_failed_row_is_tried_again(tiny, monkeypatch):
    def breaks(*_):
        raise RuntimeError("out of luck")

    real = suite_attention.sdpa_core
    monkeypatch.setattr(suite_attention, "sdpa_core", breaks)
    found = states(run("attention", tiny, names=("gate none, training",)))
    assert found["core, gate none, training: SDPA, eager"] == "failed"
    monkeypatch.setattr(suite_attention, "sdpa_core", real)
    assert set(states(run("attention", tiny, names=("gate none, training",), resume=True)).values()) == {"equal"}


def test_rows_of_other_code_are_measured_again(tiny, monkeypatch, capsys):
    """Old and new times beside each other would pass for a record of the new code."""
    words = ("gate none, training",)
    run("attention", tiny, names=words)
    now = runlog.file_hashes
    monkeypatch.setattr(runlog, "file_hashes", lambda files: now(files) | {"minigated/attention.py": "changed"})
    real, seen = runner.measure_case, []
    monkeypatch.setattr(runner, "measure_case", lambda case, *rest: seen.append(case.name) or real(case, *rest))
    record = run("attention", tiny, names=words, resume=True)
    assert seen == ["core, gate none, training"] and record["code"]["files"]["minigated/attention.py"] == "changed"
    assert "2 runs in the log are of other code" in capsys.readouterr().out
    run("attention", tiny, names=words, resume=True)
    assert len(seen) == 1


def test_a_few_rows_do_not_replace_the_record_of_all(tiny):
    run("attention", tiny, names=("core",))
    before = (tiny / "ch09_bench_attention_cpu.json").read_text()
    with pytest.raises(InputError, match="holds 6 rows that --only leaves out"):
        run("attention", tiny, names=("layer",), resume=True)
    with pytest.raises(InputError, match="holds 2 rows that --only leaves out"):
        run("attention", tiny, names=("core, gate none", "SDPA, eager"), resume=True)
    assert (tiny / "ch09_bench_attention_cpu.json").read_text() == before
    assert len(run("attention", tiny, resume=True)["rows"]) == 11


def test_what_is_wrong_with_a_later_suite_is_said_before_the_first_runs(tiny, capsys):
    arguments = ["--scale", "cpu", "--seeds", "2", "--device", "cpu", "--out", str(tiny)]
    assert main(["bench", "lm", "--only", "gate none", *arguments]) == 0
    assert main(["bench", "attention", "lm", *arguments]) == 2
    assert "--resume" in capsys.readouterr().err and not (tiny / "ch09_bench_attention_cpu.json").exists()
    assert main(["bench", "attention", "moe", "--only", "grouped, eager", *arguments]) == 0
    assert "no such rows in attention" in capsys.readouterr().out
    assert (tiny / "ch09_bench_moe_cpu.json").exists() and not (tiny / "ch09_bench_attention_cpu.json").exists()


def test_bench_is_also_an_experiment_of_that_name(tiny):
    assert {name for name in EXPERIMENTS if "bench" in name} == {f"ch09_bench_{suite}" for suite in plan.SUITES}
    record = run_experiment("ch09_bench_attention", scale="cpu", seeds=2, out=tiny, names=("gate headwise, training",))
    assert record["command"] == "python -m minigated bench attention --scale cpu --only 'gate headwise, training'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "speed"], "speed"),
        (["bench", "attention", "--only", "no such row"], "no row is called 'no such row'; there are: core, gate none"),
        (["bench", "--only", "no such row"], "no row is called 'no such row'; name one suite"),
        (["bench", "attention", "--only", " "], "no row is called ' '"),
        (["bench", "attention", "--seconds", "0"], "seconds 0"),
        (["bench", "attention", "--seconds", "nan"], "seconds nan"),
        (["bench", "attention", "--workers", "0"], "workers 0"),
        (["bench", "attention", "--seeds", "-1"], "-1"),
        (["bench", "--suite", "lm,fast"], "fast"),
    ],
)
def test_wrong_input_is_named(arguments, message, tiny, capsys):
    assert main([*arguments, "--scale", "cpu", "--out", str(tiny)]) == 2
    assert message in capsys.readouterr().err


def test_the_speed_column_keeps_three_digits():
    say = lambda items, median: report.speed({"items": items, "median": median, "unit": "maps"})
    assert [say(16_384, 0.0426), say(128, 0.25), say(1, 2)] == ["385,000 maps/s", "512 maps/s", "0.5 maps/s"]


# ---------------------------------------------------------------------------------------------- peers
@pytest.mark.parametrize(
    ("target", "pixels", "depth"), [(12_900_000, 32, 6), (78_700_000, 224, 12)], ids=["small", "paper"]
)
def test_the_swin_beside_a_backbone_has_as_many_parameters(target, pixels, depth, transformers):
    options, count = peers.equal_swin(target, pixels, 4, 4, 10, depth)
    assert abs(count / target - 1) < 0.01 and options["depths"] == (2, 2, depth, 2)
    assert options["embed_dim"] % (16 * options["num_heads"][0]) == 0  # heads that fill a tile, or the peer is slowed
    assert sum(p.numel() for p in peers.swin(options, torch.device("meta")).parameters()) == count


def test_no_swin_of_that_size(transformers):
    with pytest.raises(Absent, match="10 parameters"):
        peers.equal_swin(10, 32, 2, 4, 10, depth=6)


def test_routing_is_decided_in_bfloat16_too():
    layer = suite_moe.our_layer((64, 32, 8, 16, 4), "loop")
    tokens = suite_moe.decided_tokens(layer.router.weight.detach(), 64)
    logits = layer.router(tokens)
    rounded = torch.nn.functional.linear(tokens.bfloat16(), layer.router.weight.bfloat16())
    assert torch.equal(logits.topk(4).indices, rounded.topk(4).indices)
    torch.testing.assert_close(logits.sort(-1, descending=True).values, torch.linspace(2, -2, 16).expand(64, -1))
    assert len(logits.argmax(-1).unique()) > 8  # and not all the same
