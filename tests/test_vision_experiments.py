"""The vision experiments on a few steps: every arm builds, logs resume, records follow, claims are judged."""

import dataclasses
import json
from importlib import import_module

import pytest
import torch

from minigated import records
from minigated.__main__ import main
from minigated.data.images import ImageSplit, load_images
from minigated.errors import InputError
from minigated.experiments import EXPERIMENTS, run_experiment, vision_table
from minigated.experiments.vision_runs import FILES, accuracy, augmentation
from minigated.experiments.vision_table import Arm, judge
from minigated.variants import parameters
from minigated.vit import VisionTransformer

IDS = [name for name in EXPERIMENTS if name[:4] in ("ch03", "ch04", "ch05", "ch06")]
TABLES = {name: import_module(EXPERIMENTS[name]).TABLE for name in IDS}
ARMS = [(name, arm) for name, table in TABLES.items() for arm in table.arms]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Two steps a run."""
    for table in TABLES.values():
        plan = table.plans["cpu"] | {"epochs": 0.02, "batch": 16, "warmup": 0.01}
        monkeypatch.setitem(table.plans, "cpu", plan)
    return tmp_path


@pytest.mark.parametrize(("name", "arm"), ARMS, ids=[f"{name}-{arm.name}" for name, arm in ARMS])
def test_every_arm_builds_at_both_scales(name, arm):
    for scale in ("cpu", "gpu"):
        with torch.device("meta"):
            model = VisionTransformer(TABLES[name].config(arm, scale, 100, 64))
        assert parameters(model) > 1e5


@pytest.mark.parametrize("name", ["ch05_cifar10", "ch06_mini_imagenet", "ch06_swat_readings"])
def test_arms_have_equal_parameters(name):
    counts = {}
    for arm in TABLES[name].arms:
        with torch.device("meta"):
            counts[arm.name] = parameters(VisionTransformer(TABLES[name].config(arm, "gpu", 100, 64)))
    low, high = min(counts.values()), max(counts.values())
    assert high / low < 1.02, counts


def test_arms_are_what_they_say():
    table = TABLES["ch05_cifar10"]
    configs = {arm.name: table.config(arm, "gpu", 10, 32) for arm in table.arms}
    assert configs["RMT"].mixers[-1] == "rmt_full" and configs["RMT"].window is None
    assert configs["Retention"].gate == "elementwise" and configs["Retention without gate"].gate == "none"
    assert configs["SWAT"].mixers == ("gated_swinrmt_swat",) * 4
    assert configs["RMT, stem stride 2"].stem_stride == 2 and configs["RMT"].stem_stride == 4
    still = TABLES["ch04_window_size"].config(Arm("x", {"shifts": False}), "cpu", 10, 32)
    assert not still.shifts
    for one in TABLES.values():
        names = [arm.name for arm in one.arms]
        assert len(set(names)) == len(names)
        assert all({a, b} <= set(names) for _, a, b in one.claims)


def test_a_table_writes_a_record_and_goes_on_from_its_log(quick):
    names = ("RMT", "Retention", "Retention, stem stride 2")
    options = {"scale": "cpu", "names": names, "out": quick}
    first = run_experiment("ch05_cifar10", seeds=1, **options)
    log = quick / "logs" / "ch05_cifar10.jsonl"
    before = log.read_text()
    second = run_experiment("ch05_cifar10", seeds=2, resume=True, **options)
    assert log.read_text().startswith(before) and len(log.read_text().splitlines()) == 5  # one arm runs once
    assert [len(row["values"]) for row in second["rows"]] == [2, 2, 1]
    assert [row["values"][0] for row in second["rows"]] == [row["values"][0] for row in first["rows"]]
    assert "Not run: Swin attention" in second["note"] and "Single run: Retention, stem stride 2" in second["note"]
    assert records.load("ch05_cifar10", quick) == json.loads(json.dumps(second))
    assert {claim["claim"] for claim in second["config"]["claims"]} == {"Retention is better than RMT"}
    with pytest.raises(InputError, match="--resume"):
        run_experiment("ch05_cifar10", seeds=1, **options)


def test_a_record_of_the_runs_that_are_logged(quick, capsys):
    with pytest.raises(InputError, match="holds no runs with these settings"):
        run_experiment("ch05_cifar10", scale="cpu", out=quick, made_only=True)
    run_experiment("ch05_cifar10", scale="cpu", seeds=1, names=("RMT", "Retention"), out=quick)
    run_experiment("ch05_cifar10", scale="cpu", seeds=2, names=("RMT",), out=quick, resume=True)
    log = quick / "logs" / "ch05_cifar10.jsonl"
    before, _ = log.read_text(), capsys.readouterr()
    assert main(["run", "ch05_cifar10", "--scale", "cpu", "--out", str(quick), "--made-only"]) == 0
    record = records.load("ch05_cifar10", quick)
    assert log.read_text() == before and "left" not in capsys.readouterr().err  # no progress: nothing was trained
    assert {row["name"]: len(row["values"]) for row in record["rows"]} == {"RMT": 2, "Retention": 1}
    assert "Fewer seeds: RMT." in record["note"] and "Single run: Retention." in record["note"]
    assert main(["run", "ch08_length", "--scale", "cpu", "--made-only"]) == 2
    assert "ch08_length is not made from its log alone" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in IDS if name != "ch05_cifar10"])
def test_every_table_runs(quick, name):
    arm = TABLES[name].arms[-1].name
    record = run_experiment(name, scale="cpu", seeds=1, names=(arm,), out=quick)
    assert [row["name"] for row in record["rows"]] == [arm] and 0 <= record["rows"][0]["mean"] <= 100
    assert record["metric"]["better"] == "higher" and set(record["code"]["files"]) == set(FILES)


def test_a_claim_is_judged_over_the_seeds_both_have():
    rows = [records.row("a", [80.0, 81.0, 82.0]), records.row("b", [79.0, 80.2, 81.1]), records.row("c", [85.0])]
    claims = (("a over b", "a", "b"), ("b over a", "b", "a"), ("a over c", "a", "c"), ("x", "a", "absent"))
    found = judge(claims, rows)
    assert [j["verdict"] for j in found] == ["reproduced", "not at this scale", "not at this scale"]
    assert found[0]["difference"] == pytest.approx(0.9) and found[2]["standard_error"] is None


def test_accuracy_counts_every_image():
    images = load_images("cifar10-sample")
    augment = augmentation(images, {"augment": {}})
    split = ImageSplit(images.test.images[:30], torch.arange(30) % 10)

    class Always(torch.nn.Module):
        def forward(self, pixels):
            return torch.nn.functional.one_hot(torch.full((len(pixels),), 3), 10).float()

    assert accuracy(Always(), split, augment, torch.device("cpu"), "float32", batch=7) == pytest.approx(10.0)


def test_unknown_arms_and_images_are_named(quick):
    with pytest.raises(InputError, match="arm of ch05_cifar10 'RMTT'"):
        run_experiment("ch05_cifar10", scale="cpu", names=("RMTT",), out=quick)
    with pytest.raises(InputError, match="no known set of images"):
        run_experiment("ch05_cifar10", scale="cpu", text="cifar11", out=quick)


def test_plans_of_both_scales_have_the_same_keys():
    for table in TABLES.values():
        assert set(table.plans["cpu"]) == set(table.plans["gpu"])
        assert dataclasses.is_dataclass(table) and vision_table.RECIPE["batch"] == table.plans["gpu"]["batch"]
