"""The command line as a user meets it: in its own process, by exit status and by the one line it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigated.__main__ import main, take_gpu

ROOT = Path(__file__).resolve().parent.parent


def shell(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "minigated", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def test_variants_lists_every_row_beside_the_paper(capsys):
    assert main(["variants"]) == 0
    text = capsys.readouterr().out
    assert "g1_elementwise" in text and "5.761" in text and "201.33" in text and "diverged" in text
    assert main(["variants", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 27 and rows[0]["name"] == "none"


def test_models_have_exact_counts(capsys):
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["1.7B-28L"]["parameters"] == 1_720_837_120
    assert rows["lm_nano"]["parameters"] == sum(
        p.numel() for p in __import__("minigated.lm").lm.build_lm("lm_nano").parameters()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "lm_huge"], "lm_huge"),
        (["train", "lm_nano", "--variant", "g9"], "g9"),
        (["train", "lm_nano", "--text", "no/such.txt"], "no/such.txt"),
        (["train", "lm_nano", "--steps", "0"], "steps"),
        (["train", "lm_nano", "--seed", str(2**64)], "seed is 18446744073709551616; accepted: a whole"),
        (["train", "rmt_nano", "--seed", str(2**64)], "seed is 18446744073709551616"),
        (["train", "lm_nano", "--steps", "2", "--accumulate", "3"], "accepted: 1, 2, 4, 8, 16"),
        (["train", "rmt_nano", "--accumulate", "2"], "--accumulate 2"),
        (["train", "lm_nano", "--context", "2000000"], "2000000|2,000,000"),
        (["train", "lm_nano", "--context", "0"], "context must be at least 1, got 0"),
        (["run", "ch42"], "ch42"),
        (["data", "imagenet22k"], "imagenet22k"),
        (["measure", "no/folder"], "no/folder"),
        (["measure", "no/folder", "--sequences", "0"], "--sequences 0; accepted: 1 or more"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments, said, capsys):
    import re

    assert main(arguments) == 2
    streams = capsys.readouterr()
    last = streams.err.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error: ") and re.search(said, last[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_asked_for_and_absent():
    done = shell("train", "lm_nano", "--device", "cuda")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "cuda" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_command_is_refused_by_name():
    done = shell("fly")
    assert done.returncode == 2 and "fly" in done.stderr


def test_unwritable_output_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = shell("train", "lm_nano", "--steps", "5", "--out", str(tmp_path / "file" / "run"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_train_resume_and_measure(tmp_path, capsys):
    common = ["train", "lm_nano", "--variant", "g1_headwise", "--context", "32", "--batch", "2", "--out", str(tmp_path)]
    assert main([*common, "--steps", "6"]) == 0
    assert "saved" in capsys.readouterr().out
    assert main([*common, "--steps", "6"]) == 2  # a folder that holds a run is not overwritten
    assert "error: " in capsys.readouterr().err
    assert main([*common, "--steps", "6", "--resume"]) == 0
    capsys.readouterr()
    assert main(["measure", str(tmp_path), "--tokens", "32", "--sequences", "2"]) == 0
    text = capsys.readouterr().out
    assert "F-Attn" in text and "uniform attention: " in text and "gate score" in text
    assert main(["measure", str(tmp_path), "--tokens", "32", "--sequences", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["first_token_share"]) == 4


def test_corrupted_checkpoint_is_named(tmp_path, capsys):
    main(["train", "lm_nano", "--context", "32", "--batch", "2", "--steps", "2", "--out", str(tmp_path)])
    for weights in tmp_path.rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert main(["measure", str(tmp_path)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_import_is_light_and_leaves_the_gpu_alone():
    code = (
        "import sys, minigated, minigated.lm, torch; "
        "bad = {'matplotlib', 'torchvision', 'transformers', 'IPython'} & set(sys.modules); "
        "print(sorted(bad), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False", done.stderr


def test_a_vision_model_trains_and_goes_on(tmp_path, capsys):
    command = ["train", "gated_swinrmt_retention_nano", "--steps", "2", "--batch", "8", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1,800 images of 32 x 32, 10 classes" in said and "images/s" in said and "% by chance" in said
    assert main(["measure", str(tmp_path)]) == 2
    assert "model of kind 'vit'" in capsys.readouterr().err
    assert main(command) == 2  # there is a run already
    assert "resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize("option", [["--steps", "0"], ["--batch", "0"], ["--images", "nowhere"]])
def test_wrong_options_of_a_vision_run_are_one_line(option, capsys):
    assert main(["train", "rmt_nano", *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_gpu_of_a_name_becomes_the_current_one(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("auto", "cpu", "cuda", "cuda:1", "cuda:2", "cuda:x", ""):
        take_gpu(name)
    assert taken == [1]
