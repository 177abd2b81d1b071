"""Chapter 7's experiments on tiny plans: the training run with experts, records that follow from logs, their rules."""

import math

import pytest
import torch

from minigated import records
from minigated.data import load_text
from minigated.errors import InputError
from minigated.experiments import (
    late_gate,
    late_gate_table,
    learning_rate,
    moe_gates,
    moe_table,
    run_experiment,
    sparsity_sinks,
)
from minigated.experiments import learning_rate_table as rates
from minigated.experiments.lm_runs import train_one
from minigated.lm import SIZES, build_lm
from minigated.variants import parameters

CPU = torch.device("cpu")
PLAN = {"context": 32, "batch": 4, "steps": 4, "warmup": 1, "windows": 4, "rate": 2e-3}
MOE = {"match_parameters": False, "layers": 2, "width": 32, "heads": 4, "head_width": 8, "ffn_width": 16, "experts": 4}
DENSE = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "ffn_width": 96}


@pytest.fixture(scope="module")
def corpus():
    return load_text("shakespeare")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A few steps of the smallest models, in a folder of its own."""
    sizes = {k: v for k, v in PLAN.items() if k != "rate"}
    monkeypatch.setattr(moe_gates, "PLANS", {"cpu": {"size": "moe_nano", **sizes}})
    monkeypatch.setattr(moe_gates, "MODEL", {"cpu": MOE})
    monkeypatch.setattr(learning_rate, "PLANS", {"cpu": {"size": "lm_nano", **sizes}})
    monkeypatch.setattr(learning_rate, "MODEL", {"cpu": DENSE})
    late = {"size": "lm_nano", **sizes, "more_steps": 3}
    monkeypatch.setattr(late_gate, "PLANS", {"cpu": {k: v for k, v in late.items() if k != "warmup"}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------------- one run with experts
def test_experts_train_with_the_router_losses_and_are_tested_without(corpus):
    plan = PLAN | {"size": "moe_nano", "model": MOE | {"balance_weight": 10.0}}
    found = train_one("none", 0, plan, corpus, CPU)
    assert all(loss > 2 * 10.0 for _, loss in found["curve"])  # two layers, at least 1 each
    assert 2 < found["test"] < 6
    assert [len(layer["share"]) for layer in found["experts"]] == [4, 4]
    assert all(sum(layer["share"]) == pytest.approx(1) for layer in found["experts"])


def test_a_dense_run_is_what_it_was(corpus):
    plan = PLAN | {"size": "lm_nano", "model": DENSE, "steps": 90}
    found = train_one("g1_elementwise", 0, plan, corpus, CPU)
    assert found["experts"] is None and found["ffn_width"] < DENSE["ffn_width"]  # matched
    assert len(found["curve"]) == 90 and found["curve"][0][0] == 0
    assert len(train_one("none", 0, plan | {"steps": 4}, corpus, CPU, points=2)["curve"]) == 2


def test_every_row_of_the_gpu_plan_can_be_built():
    base, counted = SIZES["moe_small"], {}
    for name in {*moe_gates.NAMES, *sparsity_sinks.NAMES}:
        model = build_lm("moe_small", "meta", variant=name, **moe_gates.MODEL["gpu"])
        counted[name] = parameters(model)
        assert model.blocks[0].ffn.top_k == (12 if name == "experts_added" else 8)  # half more, as in the paper
        assert 8 * model.config.ffn_width == base.top_k * base.ffn_width
    added = {name: count - counted["none"] for name, count in counted.items()}
    assert added["g1_elementwise"] == added["q_heads_half_more"] == 8 * 512 * 512  # equal, as in Table 1
    plain = parameters(build_lm("lm_small", "meta", **learning_rate.MODEL["gpu"]))
    for name, _ in (*learning_rate.SEEDED, *learning_rate.ALONE):
        dense = build_lm("lm_small", "meta", variant=name, match_parameters=True, **learning_rate.MODEL["gpu"])
        assert len(dense.blocks) == 24 and parameters(dense) == pytest.approx(plain, rel=0.005)


# ---------------------------------------------------------------------------------------------- Table 1 and Table 4
def test_two_records_share_one_log(tiny):
    names = ("none", "g1_elementwise", "g2_elementwise", "g1_shared")
    table = run_experiment("ch07_sparsity_sinks", scale="cpu", seeds=2, names=names, out=tiny)
    before = (tiny / "logs" / "ch07_moe_gates.jsonl").read_text()
    assert len(before.splitlines()) == 6  # two seeds of two rows, the others once
    names = ("none", "g1_elementwise", "g2_elementwise", "kv_heads_doubled")
    with pytest.raises(InputError, match="--resume"):
        run_experiment("ch07_moe_gates", scale="cpu", seeds=2, names=names, out=tiny)
    gates = run_experiment("ch07_moe_gates", scale="cpu", seeds=2, names=names, out=tiny, resume=True)
    after = (tiny / "logs" / "ch07_moe_gates.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 8

    by = {row["name"]: row for row in gates["rows"]}
    assert [len(row["values"]) for row in gates["rows"]] == [2, 2, 1, 2] and by["none"]["paper"] == 6.026
    assert by["g1_elementwise"]["extra"]["added_millions"] == pytest.approx(2 * 32 * 32 / 1e6)
    assert by["g1_elementwise"]["extra"]["paper_added_millions"] == 201
    assert "Single runs: g2_elementwise." in gates["note"]
    assert "Not run: g1_headwise; q_heads_half_more; experts_added." in gates["note"]
    assert gates["verdict"] == gates["config"]["claims"][0]["verdict"]

    sparse = {row["name"]: row for row in table["rows"]}
    assert sparse["none"]["paper"] == 1053 and sparse["g1_shared"]["extra"]["paper_f_attn"] == 0.301
    assert sparse["none"]["extra"]["test_values"] == by["none"]["values"]
    one = sparse["g1_elementwise"]["extra"]
    assert len(one["gate_by_layer"]) == len(one["f_attn_by_layer"]) == len(one["m_act_by_layer"]) == 2
    assert sum(one["m_act_by_layer"]) / 2 == pytest.approx(sparse["g1_elementwise"]["mean"])
    assert sum(one["f_attn_by_layer"]) / 2 == pytest.approx(one["f_attn"])
    assert sparse["none"]["extra"]["gate_by_layer"] is None
    assert "minigated/experiments/sparsity_sinks.py" in table["code"]["files"]
    assert records.load("ch07_sparsity_sinks", tiny)["rows"] == table["rows"]


def test_table_4_goes_on_from_the_runs_of_table_1(tiny):
    run_experiment("ch07_moe_gates", scale="cpu", seeds=1, names=("none",), out=tiny)
    run_experiment("ch07_sparsity_sinks", scale="cpu", seeds=1, names=("none", "g1_nonsparse"), out=tiny)
    assert len((tiny / "logs" / "ch07_moe_gates.jsonl").read_text().splitlines()) == 2


def test_a_diverged_row_is_left_out_and_named(tiny, monkeypatch):
    whole = moe_gates.train_one

    def train(name, seed, *rest):
        found = whole(name, seed, *rest)
        spoilt = {"test": None, "measures": None, "experts": None}
        return found | spoilt if (name, seed) == ("g1_headwise", 1) else found

    monkeypatch.setattr(moe_gates, "train_one", train)
    record = run_experiment("ch07_moe_gates", scale="cpu", seeds=2, names=("none", "g1_headwise"), out=tiny)
    assert [row["name"] for row in record["rows"]] == ["none"] and "Diverged: g1_headwise." in record["note"]
    assert record["verdict"] is None and record["config"]["claims"] == []


def row(name, values, **extra):
    extra = {"f_attn": 0.4, "uniform": 0.1} | extra
    return records.row(name, values, None, **extra)


def test_seeds_are_paired_as_far_as_both_rows_have_them():
    claims = (("a", "x", "y", "loss"), ("b", "z", "y", "loss"), ("c", "z", "gone", "loss"), ("d", "x", "y", "m_act"))
    rows = [row("x", [1.0, 1.1, 1.2]), row("y", [2.0, 2.1, 2.3]), row("z", [1.5])]
    judged = moe_table.judge(rows, claims)
    assert [one["claim"] for one in judged] == ["a", "b"]  # no such row, no such measure
    assert judged[0]["verdict"] == "reproduced" and judged[0]["pairs"] == 3
    assert judged[1]["verdict"] == "direction only" and judged[1]["difference"] == -0.5
    assert judged[1]["standard_error"] is None


def test_without_a_sink_no_gate_removes_one():
    claims = (("a", "x", "y", "f_attn"),)
    rows = [row("x", [1.0], f_attn_values=[0.05, 0.06]), row("y", [1.0], f_attn_values=[0.4, 0.42])]
    assert moe_table.judge(rows, claims)[0]["verdict"] == "reproduced"
    rows[1]["extra"]["f_attn"] = 0.15
    assert moe_table.judge(rows, claims)[0]["verdict"] == "not at this scale"


# ---------------------------------------------------------------------------------------------- Table 2
def test_a_spike_is_a_stretch_above_the_average_after_the_warmup():
    flat = [1.0] * 10
    assert rates.count_spikes(flat, 2) == 0
    assert rates.count_spikes([*flat, 1.2, 1.3, *flat], 2) == 1  # two steps in a row
    assert rates.count_spikes([*flat, 1.2, 1.0, 1.3, *flat], 2) == 2
    assert rates.count_spikes([*flat, 1.09, *flat], 2) == 0  # under 0.1 nats
    assert rates.count_spikes([1.0, 2.0, 1.0, 1.0], 3) == 0  # in the warm-up
    assert rates.count_spikes([*flat, 1.099, 1.108, *flat], 2) == 0  # the average rises with the first: 1.0099
    assert rates.count_spikes([*flat, *(1.0 + 0.05 * step for step in range(1, 10))], 2) == 1  # a rise, step by step
    assert rates.count_spikes([*flat, *[1.3] * 40, 1.45], 2) == 2  # the average has come up meanwhile
    assert rates.count_spikes([3.0 - 0.1 * step for step in range(20)], 0) == 0  # falling


def runs_of(tests, curve=((0, 1.0),)):
    measures = {"first_token_share": [0.2], "uniform_share": 0.1, "gate": None}
    measures["max_activation"] = {"ffn_residual": [5.0]}
    common = {"curve": curve, "parameters": 1, "ffn_width": 1, "tokens_per_second": 1.0}
    return [{"result": {"test": t, "measures": None if t is None else measures} | common} for t in tests]


def rate_rows(plain2, gated2, plain4=(1.5, 1.5), gated4=(1.1, 1.1)):
    arms = {("none", 1): (1.0, 1.1), ("none", 2): plain2, ("none", 4): plain4, ("g1_elementwise", 1): (0.9, 1.0),
            ("g1_elementwise", 2): gated2, ("g1_elementwise", 4): gated4}  # fmt: skip
    return rates.make_rows({arm: runs_of(tests) for arm, tests in arms.items()}, warmup=0)


def test_a_diverged_run_counts_as_a_guess():
    plain = {row["name"]: row for row in rate_rows((1.5, None), (0.9, 1.0))}["none, 2x"]
    assert plain["values"] == [1.5, math.log(256)] and plain["extra"]["diverged"] == 1 and plain["paper"] == 9.195
    assert plain["extra"]["m_act_values"] == [5.0, None] and plain["extra"]["m_act"] == 5.0
    assert plain["extra"]["cost_values"] == pytest.approx([0.5, math.log(256) - 1.1])
    assert rates.counted_loss({"test": 7.0}) == math.log(256)
    assert rates.paper_perplexity("g1_elementwise", 2) == 7.325 and rates.paper_perplexity("none", 4) is None


def test_the_verdict_is_on_the_smallest_rate_that_harms():
    rows = rate_rows((1.5, 1.6), (0.95, 1.04))
    judged = rates.judge_rates(rows)
    assert rates.overall(rows, judged) == judged[0]["verdict"] == "reproduced"
    rows = rate_rows((0.9, 1.0), (0.5, 0.61))  # twice the rate helps: the fourfold one decides
    judged = rates.judge_rates(rows)
    assert judged[0]["verdict"] == "not at this scale" and judged[0]["difference"] < 0
    assert rates.overall(rows, judged) == judged[1]["verdict"] == "reproduced"
    rows = rate_rows((0.9, 1.0), (0.5, 0.61), plain4=(0.8, 0.9))
    assert rates.overall(rows, rates.judge_rates(rows)) == "not at this scale"
    assert rates.overall(rows[:1], rates.judge_rates(rows[:1])) is None


def test_learning_rate_writes_a_record_and_goes_on_from_its_log(tiny):
    names = ("none, 1x", "none, 2x", "sandwich_norm, 2x")
    first = run_experiment("ch07_learning_rate", scale="cpu", seeds=1, names=names, out=tiny)
    second = run_experiment("ch07_learning_rate", scale="cpu", seeds=2, names=names, out=tiny, resume=True)
    assert [row["name"] for row in second["rows"]] == list(names)
    assert [len(row["values"]) for row in second["rows"]] == [2, 2, 1]
    assert second["rows"][0]["values"][0] == first["rows"][0]["values"][0] != second["rows"][1]["values"][0]
    assert second["rows"][0]["extra"]["steps_made"] == [4, 4]
    assert "sandwich_norm, 2x" in second["note"].partition("Single runs: ")[2]


# ---------------------------------------------------------------------------------------------- appendix A.7
def test_a_gate_from_one_changes_nothing_at_first_and_then_learns():
    torch.manual_seed(0)
    plain = build_lm("lm_nano", **DENSE)
    tokens = torch.randint(256, (2, 8))
    gated = late_gate.add_gate(plain, from_one=True)
    torch.testing.assert_close(gated(tokens), plain(tokens), rtol=0, atol=0)
    gate = gated.blocks[1].attention.gates["g1"].scores.linear.weight
    gated(tokens).square().sum().backward()
    assert not gate.any() and gate.grad.abs().max() > 0  # zero is no dead end
    assert not any(len(block.attention.gates) for block in plain.blocks)


def test_a_random_gate_halves_what_attention_adds():
    torch.manual_seed(0)
    plain = build_lm("lm_nano", **DENSE)
    gated = late_gate.add_gate(plain, from_one=False)
    scores = gated.blocks[0].attention.gates["g1"].scores(torch.randn(2, 8, 32))
    assert scores.mean().item() == pytest.approx(0.5, abs=0.02) and scores.std() > 0.01
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in gated.state_dict().items() if name in weights)
    assert gated.config.variant == "g1_elementwise"


def test_late_gate_trains_each_first_phase_once(tiny, monkeypatch):
    trained, whole = [], late_gate.train

    def train(model, plan, corpus, seed, device, more=False, folder=None):
        trained.append((model.config.variant, more))
        return whole(model, plan, corpus, seed, device, more, folder)

    monkeypatch.setattr(late_gate, "train", train)
    record = run_experiment("ch07_late_gate", scale="cpu", seeds=2, out=tiny)
    assert trained.count(("none", False)) == trained.count(("g1_elementwise", False)) == 2
    assert trained.count(("none", True)) == 2 and trained.count(("g1_elementwise", True)) == 6
    by = {row["name"]: row for row in record["rows"]}
    assert list(by) == list(late_gate_table.NAMES)
    before = {row["extra"]["before"] for name, row in by.items() if name != "from the start"}
    assert len(before) == 1  # the three go on from the same weights
    assert by["late, from one"]["extra"]["jump"] == 0 != by["late, at random"]["extra"]["jump"]
    assert by["late, from one"]["extra"]["gate_score"] == pytest.approx(1, abs=0.05)
    assert len({row["mean"] for row in by.values()}) == 4
    effects = {(e["arm"], e["measure"]): e["difference"] for e in record["config"]["late_effects"]}
    assert effects["late, from one", "loss"] == pytest.approx(by["late, from one"]["mean"] - by["none"]["mean"])
    assert len(record["config"]["claims"]) == len(late_gate_table.CLAIMS)
    again = run_experiment("ch07_late_gate", scale="cpu", seeds=2, out=tiny, resume=True)
    assert again["rows"] == record["rows"] and len(trained) == 12


def test_the_second_phase_goes_on_where_the_first_ended(corpus):
    seen = []

    class Batches:
        def __init__(self, *_, **__):
            pass

        def at(self, step, *_):
            seen.append(step)
            return torch.zeros(2, 9, dtype=torch.int64)

    plan = PLAN | late_gate.RECIPE | {"more_steps": 3}
    model = build_lm("lm_nano", **DENSE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(late_gate, "TextBatches", Batches)
        late_gate.train(model, plan, corpus, 0, CPU)
        late_gate.train(model, plan, corpus, 0, CPU, more=True)
    assert seen == list(range(7))


def test_an_arm_whose_first_phase_diverged_is_named(tiny, monkeypatch):
    whole = late_gate.first_phase
    monkeypatch.setattr(late_gate, "first_phase", lambda v, *rest: (None, 1.0) if v != "none" else whole(v, *rest))
    names = ("none", "from the start")
    record = run_experiment("ch07_late_gate", scale="cpu", seeds=1, names=names, out=tiny)
    assert [row["name"] for row in record["rows"]] == ["none"] and "Diverged: from the start." in record["note"]
    assert record["verdict"] is None


# ---------------------------------------------------------------------------------------------- doors and pages
@pytest.mark.parametrize("name", ["moe_gates", "sparsity_sinks", "learning_rate", "late_gate"])
def test_an_unknown_row_is_refused_before_anything_runs(name, tiny):
    with pytest.raises(InputError, match="g9.*none"):
        run_experiment(f"ch07_{name}", scale="cpu", names=("g9",), out=tiny)
    assert not (tiny / "logs").exists()


def test_a_claim_of_a_single_pair_has_its_line_on_the_page(tmp_path):
    from test_site import a_record, record_pages

    claim = {"claim": "x", "measure": "cost", "verdict": "direction only", "difference": -0.1, "standard_error": None}
    records.write(a_record(id="ch07_learning_rate", config={"claims": [claim]}), tmp_path)
    made = record_pages.verdicts(tmp_path)
    assert "| x | -0.1 (single pair) cost | [direction only](#ch07_learning_rate) |" in made
    assert "[no record yet](#ch07_moe_gates)" in made
    assert "`python -m minigated run ch07_late_gate`" in record_pages.sections(tmp_path)
