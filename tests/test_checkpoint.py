"""Checkpoints: whole or not there, of this model or refused, never code."""

import dataclasses
import json
import pickle
import shutil
from dataclasses import asdict, dataclass

import pytest
import torch
from toy_training import ToyModel, same_weights, toy_trainer

from minigated import checkpoint
from minigated.checkpoint import list_checkpoints, load_model, save_checkpoint
from minigated.errors import InputError
from minigated.lm import build_lm
from minigated.lm_config import SIZES
from minigated.weights import fitting_weights, save_weights


def save_toy(out, step, model=None):
    return save_checkpoint(out, step, model or ToyModel(), {"rate": 1.0}, {"losses": [1.0]})


def names(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------- what is kept
def test_checkpoint_has_three_files_and_says_what_it_is(tmp_path):
    model = build_lm("lm_nano", layers=1, variant="g1_headwise")
    folder = save_checkpoint(tmp_path, 7, model, {"rate": 0.5}, {"losses": [2.0]})
    assert folder == tmp_path / "checkpoints" / "step_000007"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "training.pt"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["step"], config["kind"], config["train"]) == (7, "lm", {"rate": 0.5})
    assert config["model"] == json.loads(json.dumps(dataclasses.asdict(model.config)))


def test_last_two_are_kept_in_order_of_steps(tmp_path):
    for step in (8, 9, 999_999, 1_000_000):
        save_toy(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    assert len(names(tmp_path)) == 2


def test_same_step_may_be_saved_again(tmp_path):
    save_toy(tmp_path, 3)
    folder = save_toy(tmp_path, 3, ToyModel(seed=1))
    model = ToyModel()
    model.load_state_dict(fitting_weights(model, folder / "model.safetensors"))
    assert same_weights(model, ToyModel(seed=1)) and names(tmp_path) == ["step_000003"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_broken_write_leaves_nothing_half_written(tmp_path, monkeypatch, error):
    save_toy(tmp_path, 1)

    def fail(training, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        save_toy(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"]


def test_checkpoint_appears_only_when_all_is_written(tmp_path, monkeypatch):
    seen = []
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda folder: (flush(folder), seen.append(list_checkpoints(tmp_path))))
    save_toy(tmp_path, 2)
    assert seen == [[]] and names(tmp_path) == ["step_000002"]


def test_remains_of_a_killed_process_are_cleared(tmp_path):
    remains = tmp_path / "checkpoints" / ".partial_step_000005"
    remains.mkdir(parents=True)
    (remains / "training.pt").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save_toy(tmp_path, 6)
    assert names(tmp_path) == ["step_000006"]


# ------------------------------------------------------------------------------------------------- weights
def test_tied_weights_stand_once_and_come_back_tied(tmp_path):
    path, saved, model = tmp_path / "model.safetensors", ToyModel(tied=True), ToyModel(tied=True, seed=1)
    save_weights(saved, path)
    untied = tmp_path / "untied.safetensors"
    save_weights(ToyModel(), untied)
    assert untied.stat().st_size - path.stat().st_size > 300  # one matrix of 11 x 8 less
    model.load_state_dict(fitting_weights(model, path))
    assert model.head.weight is model.embedding.weight and same_weights(model, saved)
    with pytest.raises(InputError, match="head.weight is .* here and tied to embedding.weight in the file"):
        fitting_weights(ToyModel(), path)
    with pytest.raises(InputError, match="head.weight is .* in the file and tied to embedding.weight here"):
        fitting_weights(ToyModel(tied=True), untied)


def test_overlapping_views_are_saved_apart(tmp_path):
    both = torch.arange(6.0)
    model = torch.nn.Module()
    model.register_buffer("first", both[:4])
    model.register_buffer("second", both[2:])
    save_weights(model, tmp_path / "w.safetensors")
    assert fitting_weights(model, tmp_path / "w.safetensors")["second"].tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_comes_back_from_run_and_checkpoint_folder(tmp_path, tied):
    model = build_lm("lm_nano", layers=1, variant="g1_elementwise", tied=tied).eval()
    folder = save_toy(tmp_path, 5, model)
    tokens = torch.randint(256, (2, 9))
    for place in (tmp_path, folder, str(tmp_path)):
        loaded = load_model(place)
        assert loaded.config == model.config and not loaded.training
        assert torch.equal(loaded(tokens), model(tokens))
        assert (loaded.head.weight is loaded.embedding.weight) == tied


def test_model_of_another_size_is_refused_by_its_first_parameter(tmp_path):
    toy_trainer(out=tmp_path).run(until=2)
    with pytest.raises(InputError, match=r"embedding.weight is \[11, 12\] here and \[11, 8\] in the file"):
        toy_trainer(ToyModel(width=12), out=tmp_path, resume=True)
    deeper, shallower = ToyModel(), ToyModel()
    deeper.blocks.append(torch.nn.Linear(2, 2))
    del shallower.blocks[1]
    with pytest.raises(InputError, match=r"blocks.2.weight is \[2, 2\] here and missing in the file"):
        toy_trainer(deeper, out=tmp_path, resume=True)
    with pytest.raises(InputError, match=r"blocks.1.gain is \[8\] in the file and missing here"):
        toy_trainer(shallower, out=tmp_path, resume=True)


def test_model_of_the_same_shapes_but_another_config_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Config:
        base: float

    def configured(base, kind="toy"):
        model = ToyModel()
        model.config, model.kind = Config(base), kind
        return model

    toy_trainer(configured(1.0), out=tmp_path).run(until=2)
    with pytest.raises(InputError, match="base is 1.0 there and 2.0 here"):
        toy_trainer(configured(2.0), out=tmp_path, resume=True)
    with pytest.raises(InputError, match="kind 'toy', not 'other'"):
        toy_trainer(configured(1.0, "other"), out=tmp_path, resume=True)
    assert toy_trainer(configured(1.0), out=tmp_path, resume=True).step == 2


# ------------------------------------------------------------------------------------------------- damage
def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


DAMAGES = [
    ("model.safetensors", truncate, "bytes, .* were written"),
    ("model.safetensors", flip, "sha256 differs"),
    ("training.pt", truncate, "bytes, .* were written"),
    ("training.pt", flip, "sha256 differs"),
    ("training.pt", lambda path: path.unlink(), "is missing"),
    ("config.json", truncate, "not the JSON"),
    ("config.json", lambda path: path.write_text('{"step": 4}'), "not the JSON"),
    ("config.json", lambda path: path.unlink(), "is missing"),
]


@pytest.mark.parametrize("file, damage, says", DAMAGES, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGES)])
def test_damage_is_named_and_resume_falls_back_aloud(tmp_path, capsys, file, damage, says):
    straight = toy_trainer().run()
    toy_trainer(out=tmp_path, save_every=2).run(until=4)
    shutil.copytree(tmp_path, tmp_path / "lone")
    shutil.rmtree(tmp_path / "lone" / "checkpoints" / "step_000002")
    damage(tmp_path / "checkpoints" / "step_000004" / file)
    damage(tmp_path / "lone" / "checkpoints" / "step_000004" / file)
    with pytest.raises(InputError, match=f"step_000004/{file}.*{says}.*no earlier whole checkpoint"):
        toy_trainer(out=tmp_path / "lone", resume=True, save_every=2)
    assert names(tmp_path / "lone") == ["step_000004"]
    capsys.readouterr()
    trainer = toy_trainer(out=tmp_path, resume=True, save_every=2)
    said = capsys.readouterr().out
    assert trainer.step == 2 and f"step_000004/{file}" in said and "going on from" in said
    assert trainer.run().losses == straight.losses
    assert names(tmp_path) == ["damaged_step_000004", "step_000008", "step_000010"]


def test_damaged_model_is_not_loaded(tmp_path):
    folder = save_toy(tmp_path, 4, build_lm("lm_nano", layers=1))
    flip(folder / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        load_model(tmp_path)


def test_absent_and_unknown_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        load_model(tmp_path / "nowhere")
    folder = save_toy(tmp_path, 1)
    with pytest.raises(InputError, match="model kind .* None; accepted: lm"):
        load_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kind": "lm", "model": {"wide": 3}}))
    with pytest.raises(InputError, match="config.json does not describe a model of kind 'lm'.*wide"):
        load_model(tmp_path)
    (folder / "config.json").write_text(json.dumps({**config, "kind": ["lm"]}))
    with pytest.raises(InputError, match=r"model kind .* \['lm'\]; accepted: lm"):
        load_model(tmp_path)
    broken = json.loads(json.dumps({**asdict(SIZES["lm_nano"]), "layers": 1.0}))
    (folder / "config.json").write_text(json.dumps({**config, "kind": "lm", "model": broken}))
    with pytest.raises(InputError, match="config.json does not describe a model of kind 'lm'"):
        load_model(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """A file that would run a command when unpickled is refused, even with a hash that fits."""
    marker = tmp_path / "ran"

    class Command:
        def __reduce__(self):
            return exec, (f"open({str(marker)!r}, 'w').close()",)

    toy_trainer(out=tmp_path).run(until=2)
    folder = list_checkpoints(tmp_path)[0]
    torch.save({"losses": Command()}, folder / "training.pt")
    config = json.loads((folder / "config.json").read_text())
    size, sha256 = (folder / "training.pt").stat().st_size, checkpoint._sha256(folder / "training.pt")
    config["files"]["training.pt"] = {"bytes": size, "sha256": sha256}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="training.pt cannot be read"):
        toy_trainer(out=tmp_path, resume=True)
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "training.pt", weights_only=True)
    torch.load(folder / "training.pt", weights_only=False)
    assert marker.exists()  # the trap works: only the way of loading kept it shut
