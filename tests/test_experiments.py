"""The experiments end to end on the smallest plans: logs that resume, records that follow from them, judged claims."""

import json

import pytest
import torch
import torch.nn.functional as F

from minigated import records
from minigated.data.text import BOS
from minigated.errors import InputError
from minigated.experiments import attention_cost, gate_table, run_experiment, sink_lm
from minigated.experiments.lm_runs import evaluate
from minigated.experiments.runlog import WORKED_OUT, RunLog
from minigated.lm import build_lm, lm_loss

FILES = ["minigated/gates.py"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """CPU plans of a few steps, in a folder of their own."""
    plan = {"size": "lm_nano", "context": 32, "batch": 4, "steps": 4, "warmup": 1, "windows": 8}
    monkeypatch.setattr(gate_table, "PLANS", {"cpu": plan})
    monkeypatch.setattr(sink_lm, "PLANS", {"cpu": plan | {"rate": 3e-3, "steps": 20}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_gate_table_writes_a_record_and_goes_on_from_its_log(tiny):
    names = ("none", "g1_headwise", "g5_elementwise")
    first = run_experiment("ch02_gate_table", scale="cpu", seeds=1, names=names, out=tiny)
    assert [row["name"] for row in first["rows"]] == list(names) and first["seeds"] == [0]
    log = tiny / "logs" / "ch02_gate_table.jsonl"
    before = log.read_text()
    second = run_experiment("ch02_gate_table", scale="cpu", seeds=2, names=names, out=tiny, resume=True)
    assert log.read_text().startswith(before) and len(log.read_text().splitlines()) == 6
    for old, new in zip(first["rows"], second["rows"], strict=True):
        assert new["values"][0] == old["values"][0] and len(new["values"]) == 2
    assert second["rows"][1]["extra"]["gate_score"] == pytest.approx(0.5, abs=0.05)
    assert second["rows"][0]["extra"]["gate_score"] is None
    assert records.load("ch02_gate_table", tiny) == json.loads(json.dumps(second))


def test_parameters_are_matched_between_rows(tiny):
    record = run_experiment("ch02_gate_table", scale="cpu", seeds=1, names=("none", "g1_elementwise"), out=tiny)
    plain, gated = (row["extra"] for row in record["rows"])
    assert gated["ffn_width"] < plain["ffn_width"]
    difference = max(gated["parameters"], plain["parameters"]) / min(gated["parameters"], plain["parameters"]) - 1
    assert difference < 0.02 and f"{difference:.1%}" in record["note"]  # rounding weighs more at this size


def test_same_seed_same_number_and_another_seed_another(tiny):
    options = {"scale": "cpu", "names": ("none",)}
    a = run_experiment("ch02_gate_table", seeds=2, out=tiny / "a", **options)["rows"][0]["values"]
    b = run_experiment("ch02_gate_table", seeds=2, out=tiny / "b", **options)["rows"][0]["values"]
    assert a == b and a[0] != a[1]


def test_a_log_is_not_mixed_with_another_by_accident(tiny):
    run_experiment("ch02_gate_table", scale="cpu", seeds=1, names=("none",), out=tiny)
    with pytest.raises(InputError, match="--resume"):
        run_experiment("ch02_gate_table", scale="cpu", seeds=1, names=("none",), out=tiny)


def test_sink_lm_follows_the_share_and_judges(tiny):
    record = run_experiment("ch02_sink_lm", scale="cpu", out=tiny)
    assert [row["name"] for row in record["rows"]] == ["none", "g1_elementwise"]
    steps = [entry["step"] for entry in record["rows"][0]["extra"]["followed"]]
    assert steps == list(range(1, 21))
    assert record["verdict"] in records.VERDICTS and "single run" in records.caption(record)


def test_one_arm_alone_writes_no_record(tiny):
    assert run_experiment("ch02_sink_lm", scale="cpu", out=tiny, names=("none",)) is None
    assert not (tiny / "ch02_sink_lm.json").exists()


def row(values, f_attn=0.0, uniform=0.01, **extra):
    n = len(values)
    return records.row("x", values, extra.pop("paper", None), f_attn=f_attn, uniform=uniform,
                       f_attn_values=[f_attn] * n, m_act_values=extra.pop("m_act", [1.0] * n))  # fmt: skip


def test_a_share_under_uniform_is_no_sink_to_remove():
    names = {n for _, a, b, _ in gate_table.CLAIMS for n in (a, b)}
    rows = [row([1.0, 1.1, 1.2], f_attn=0.008 if n == "none" else 0.004) | {"name": n} for n in names]
    verdicts = {j["claim"]: j["verdict"] for j in gate_table.judge(rows)}
    assert verdicts["G1 lowers the first-token share"] == "not at this scale"
    rows = [row([1.0, 1.1, 1.2], f_attn=0.4 if n == "none" else 0.004) | {"name": n} for n in names]
    assert {j["claim"]: j["verdict"] for j in gate_table.judge(rows)}["G1 lowers the first-token share"] == "reproduced"
    assert sink_lm.judge(row([0.008]), row([0.004])) == "not at this scale"
    assert sink_lm.judge(row([0.4]), row([0.04])) == "direction only"


def test_attention_cost_counts_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_cost, "LENGTHS", {"cpu": (16, 32)})
    record = run_experiment("ch01_attention_cost", scale="cpu", seeds=2, out=tmp_path)
    by = {entry["name"]: entry for entry in record["rows"]}
    assert set(by) >= {"naive 16", "sdpa 32", "blocks 32", "naive 32 backward"}
    assert by["naive 32"]["extra"]["flops"] == 4 * by["naive 16"]["extra"]["flops"]
    assert by["naive 32"]["extra"]["bytes"] > by["sdpa 32"]["extra"]["bytes"]
    assert "2 repetitions" in records.caption(record)


def test_log_survives_a_cut_line(tmp_path):
    log = RunLog(tmp_path, "x", {"a": 1}, FILES, resume=True)
    log.get(lambda: {"value": 1}, seed=0)
    log.path.write_text(log.path.read_text() + '{"key": {"se')
    again = RunLog(tmp_path, "x", {"a": 1}, FILES, resume=True)
    assert len(again.runs) == 1
    assert RunLog(tmp_path, "x", {"a": 2}, FILES, resume=False).runs == []  # other settings, other runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_id": "ch99"}, "ch99"),
        ({"record_id": "ch02_gate_table", "scale": "huge"}, "huge"),
        ({"record_id": "ch02_gate_table", "scale": "gpu"}, "cuda"),
        ({"record_id": "ch01_attention_cost", "scale": "cpu", "text": "shakespeare"}, "shakespeare"),
    ],
)
def test_wrong_input_is_named(options, message):
    import torch

    if message == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(InputError, match=message):
        run_experiment(options.pop("record_id"), **options)


def test_books_are_asked_for_by_path(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGATED_DATA", str(tmp_path))
    from minigated.experiments.lm_runs import find_text

    with pytest.raises(InputError, match=r"books.txt.xz.*--text enwik8"):
        find_text("books")


def test_what_only_works_out_rows_counts_as_it_is_when_the_record_is_written(tmp_path):
    table, loop = WORKED_OUT[0], "minigated/experiments/runlog.py"
    log = RunLog(tmp_path, "x", {}, [table, loop], resume=False)
    for seed in (0, 1):
        log.get(lambda: {}, seed=seed)
    log.runs[0]["files"][table] = log.runs[1]["files"][table] = "another hash"
    log.runs[0]["files"][table] = "a third"
    assert "versions of the package files" not in log.provenance()
    assert log.as_made({})["code"]["files"] == records.file_hashes([table, loop])
    log.runs[0]["files"][loop] = log.runs[1]["files"][loop] + "?"
    assert "made by 2 versions of the package files" in log.provenance()


def test_a_short_held_out_part_counts_each_window_once():
    """Five windows of 32 where eight are asked for, four a batch: the mean of all five."""
    torch.manual_seed(0)
    model, part = build_lm("lm_nano", context=32), torch.randint(256, (5, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = lm_loss(model.eval(), F.pad(part.long(), (1, 0), value=BOS)).item()
    plan = {"context": 32, "batch": 4, "windows": 8}
    assert evaluate(model, part.flatten(), plan, torch.device("cpu"), "float32") == pytest.approx(expected, rel=1e-5)
    assert model.training
