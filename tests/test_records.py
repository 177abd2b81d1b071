"""Records: one schema, numbers that follow from their values, and pages that notice changed code."""

import copy
import json
from pathlib import Path

import pytest

from minigated import records
from minigated.codehash import code_hash
from minigated.errors import InputError


@pytest.fixture
def record():
    return records.make(
        files=["minigated/gates.py"], id="ch99_test", chapter=99, claim="c", command="x", config={}, seeds=[0, 1],
        metric={"name": "nats", "split": "test", "better": "lower"},
        rows=[records.row("a", [1.0, 2.0], 1.5, note="n"), records.row("b", [3.0, 3.0])],
        verdict="direction only", data={"name": "d", "sha256": ""}, seconds=1.0, note="",
    )  # fmt: skip


def test_row_works_out_mean_and_sample_deviation():
    row = records.row("a", [1.0, 2.0, 3.0])
    assert (row["mean"], row["std"]) == (2.0, 1.0)
    assert records.row("a", [1.0])["std"] is None


def test_round_trip_leaves_nothing_half_written(record, tmp_path):
    path = records.write(record, tmp_path)
    assert records.load("ch99_test", tmp_path) == json.loads(json.dumps(record))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("seeds"), "seeds"),
        (lambda r: r.update(more=1), "more"),
        (lambda r: r.update(verdict="perfect"), "perfect"),
        (lambda r: r["metric"].update(better="bigger"), "bigger"),
        (lambda r: r["rows"][0].update(mean=9.0), "mean 9.0"),
        (lambda r: r["rows"][0].update(std=None), "std"),
        (lambda r: r["rows"][0].pop("paper"), "paper"),
        (lambda r: r["data"].pop("sha256"), "data"),
        (lambda r: r.update(chapter="2"), "chapter"),
    ],
)
def test_schema_refuses(record, change, message):
    broken = copy.deepcopy(record)
    change(broken)
    with pytest.raises(InputError, match=message):
        records.validate(broken)


def test_every_published_record_follows_the_schema():
    for path in records.FOLDER.glob("*.json"):
        assert records.load(path.stem)["id"] == path.stem


def test_missing_record_names_its_command(tmp_path):
    with pytest.raises(InputError, match="run ch02_gate_table"):
        records.load("ch02_gate_table", tmp_path)


def test_unwritable_folder_is_named(record, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        records.write(record, tmp_path / "file" / "below")


def test_caption_says_device_date_seeds_and_changed_files(record):
    text = records.caption(record)
    assert record["hardware"]["device"] in text and record["utc"][:10] in text and "2 seeds" in text
    assert "Changed since" not in text
    record["code"]["files"]["minigated/gates.py"] = "0" * 64
    assert "minigated/gates.py" in records.caption(record) and records.changed_since(record) == " 1 file changed since."
    record["code"]["files"] |= {f"minigated/{name}.py": "0" * 64 for name in ("attention", "rope", "moe")}
    assert records.caption(record).endswith(" `minigated/rope.py` and 1 more.")
    assert records.caption(record, named=None).endswith(", `minigated/moe.py`.")
    assert records.changed_since(record) == " 4 files changed since."


def test_single_run_is_called_so(record):
    for row in record["rows"]:
        row["values"] = row["values"][:1]
    assert "single run" in records.caption(record)


def test_table_has_spread_extras_and_the_papers_column(record):
    lines = records.table(record, {"note": "remark"}).splitlines()
    assert lines[0] == "|  | nats | remark | paper |"
    assert lines[2] == "| a | 1.5 ± 0.71 | n | 1.5 |" and lines[3].endswith("| – | – |")


def test_code_hash_follows_code_and_not_comments(tmp_path):
    def of(text: str) -> str:
        Path(tmp_path / "x.py").write_text(text)
        return code_hash(tmp_path / "x.py")

    first = of('"""Doc."""\n\ndef f(x):\n    """Says."""\n    return x + 1\n')
    assert first == of("def f(x):\n    # why\n    return (x +\n            1)\n")
    assert first != of("def f(x):\n    return x + 2\n")
    assert first != of("def f(x, y=None):\n    return x + 1\n")
    assert of("x = 'a'\n") != of("x = 'b'\n")


def test_a_copy_without_its_history_is_told_its_commit(record, monkeypatch):
    checkout = records.commit()
    monkeypatch.setenv("MINIGATED_COMMIT", "f" * 40)
    assert records.commit() == "f" * 40 != checkout
