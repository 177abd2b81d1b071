"""`ch08_length` end to end on a tiny plan, and its verdicts on made-up runs."""

import pytest

from minigated import records
from minigated.experiments import length, run_experiment
from minigated.experiments.length_table import ARMS, SETTINGS, TIMES, judge, make_rows


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two steps, then one, on the shortest context that holds a passkey, in a folder of its own."""
    plan = {"size": "lm_nano", "context": 72, "batch": 2, "steps": 2, "more_steps": 1, "windows": 4}
    monkeypatch.setattr(length, "PLANS", {"cpu": plan})
    monkeypatch.setattr(length, "MODEL", {"layers": 1, "width": 32, "ffn_width": 96})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_record_has_a_row_for_each_arm_setting_and_length_and_goes_on_from_its_log(tiny):
    assert run_experiment("ch08_length", scale="cpu", out=tiny, names=("none",)) is None
    before = (tiny / "logs" / "ch08_length.jsonl").read_text()
    record = run_experiment("ch08_length", scale="cpu", out=tiny, resume=True)
    assert (tiny / "logs" / "ch08_length.jsonl").read_text().startswith(before)
    names = [f"{arm}, {setting}, {n} T" for arm in ARMS for setting in SETTINGS for n in TIMES]
    assert [row["name"] for row in record["rows"]] == names
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["none, trained on, yarn, 8 T"]["paper"] == 31.65
    assert rows["g1_elementwise, trained on, 2 T"]["paper"] == 79.77 and rows["none, yarn, 2 T"]["paper"] is None
    assert rows["none, yarn, 8 T"]["extra"]["length"] == 576
    # one weight set under four tables: at T no scaling is not interpolation, and both are not what trained on
    nats = {setting: rows[f"none, {setting}, 1 T"]["extra"]["nats"] for setting in SETTINGS}
    assert len(set(nats.values())) == len(SETTINGS)
    assert record["verdict"] == "not at this scale" and "single run" in records.caption(record)


def test_a_diverged_seed_is_left_out_with_its_pair(tiny, monkeypatch):
    def train_arm(variant, seed, plan, *rest):
        found = runs({}, (1, 1, 2, 3), short=plan["context"])[seed]["result"] | {"seconds": 1.0, "curve": []}
        return found | {"settings": None} if (variant, seed) == ("none", 0) else found

    monkeypatch.setattr(length, "train_arm", train_arm)
    assert run_experiment("ch08_length", scale="cpu", out=tiny) is None
    record = run_experiment("ch08_length", scale="cpu", seeds=2, out=tiny, resume=True)
    assert record["seeds"] == [1] and "Diverged: none seed 0." in record["note"]


# ---------------------------------------------------------------------------------------------- verdicts
def runs(found, nats, short=10):
    """Runs of three seeds of one arm: share of digits right by setting and length, loss by length."""

    def look(setting, seed):
        digits = found.get(setting, (0.9,) * 4)
        passkey = [{"length": short * n, "depth": d, "digit": x + seed / 1000, "exact": 0.0, "count": 1}
                   for n, x in zip(TIMES, digits) for d in (0.0, 1.0)]  # fmt: skip
        loss = [{"start": 0, "end": 1, "nats": value + seed / 1000} for value in nats]
        return {"passkey": passkey, "loss": loss, "share": [{"f_attn": 0.1, "uniform": 0.05}] * 4}

    made = ({"settings": {s: look(s, seed) for s in SETTINGS}, "parameters": 1} for seed in range(3))
    return [{"result": result} for result in made]


def verdicts(plain, gated, nats=((1, 1, 2, 3), (1, 1, 1.5, 2))):
    rows = make_rows({arm: runs(found, n) for arm, found, n in zip(ARMS, (plain, gated), nats)}, 10)
    return [claim["verdict"] for claim in judge(rows)]


FADES, HOLDS = {"trained on, yarn": (0.6, 0.4, 0.3, 0.2)}, {"trained on, yarn": (0.8, 0.7, 0.6, 0.5)}


def test_the_papers_picture_is_reproduced():
    assert verdicts(FADES, HOLDS) == ["reproduced", "reproduced", "not at this scale", "reproduced"]


def test_the_other_way_round_nothing_is():
    assert verdicts(HOLDS, FADES, nats=((1, 1, 1.5, 2), (1, 1, 2, 3))) == ["not at this scale"] * 4


def test_at_the_floor_passkeys_say_nothing():
    floor = {"none": (0.12,) * 4}
    found = verdicts(FADES | floor, HOLDS)
    assert found == ["not at this scale"] * 3 + ["reproduced"]  # losses still do
    assert verdicts(FADES, HOLDS | floor) == found


def test_rows_are_means_over_depths_in_percent():
    row = make_rows({"none": runs(FADES, (1, 2, 3, 4))}, 10)[-1]
    assert row["name"] == "none, trained on, yarn, 8 T" and row["paper"] == 31.65
    assert row["values"] == pytest.approx([20.0, 20.1, 20.2]) and row["extra"]["nats"] == pytest.approx(4.001)
    assert row["extra"]["depths"] == pytest.approx({"0.0": 0.201, "1.0": 0.201})
