"""`python -m minigated generate` as a user meets it: streams, tokenizers, the shipped model, and what it refuses."""

import io
import json
import re

import pytest
import torch
from test_cli import shell

from minigated import shipped
from minigated.__main__ import main
from minigated.data.tokenizer import ByteTokenizer
from minigated.device import reset_compilation
from minigated.errors import InputError
from minigated.generate_command import Continuation, open_model
from minigated.lm import LMConfig, build_lm
from minigated.shipped import load_shipped
from minigated.weights import save_weights

TINY = LMConfig(width=16, layers=1, heads=2, kv_heads=1, head_width=8, ffn_width=16, context=32)
TRAIN = ["train", "lm_nano", "--context", "48", "--batch", "4", "--steps", "8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs, one of bytes and one of byte pairs, and what the second said."""
    root = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--variant", "g1_elementwise", "--out", str(root / "bytes")]) == 0
    assert main([*TRAIN, "--tokenizer", "bpe:300", "--out", str(root / "bpe")]) == 0
    return root


def said(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["generate", *map(str, arguments)])
    return status, *capsys.readouterr()


class Scripted(torch.nn.Module):
    """A model of bytes that continues anything with a given text, then with zeros."""

    def __init__(self, text: bytes, context: int = 32):
        super().__init__()
        self.text, self.config, self.at = text, LMConfig(**{**vars(TINY), "context": context}), 0
        self.embedding = torch.nn.Embedding(256, 1)

    def new_cache(self, batch, capacity):
        return None

    def forward(self, tokens, cache=None):
        token = self.text[self.at] if self.at < len(self.text) else 0
        self.at += 1
        return torch.nn.functional.one_hot(torch.full(tokens.shape, token), 256) * 100.0


def continuation(text: bytes, **options) -> tuple[list[str], Continuation]:
    found = Continuation(Scripted(text), ByteTokenizer(), "ab", temperature=0, **options)
    return list(found), found


# ------------------------------------------------------------------------------------ what ends a text
def test_pieces_are_whole_characters_and_the_end_of_the_document_ends_the_text():
    pieces, found = continuation("aé😀".encode() + b"\xfe more")
    assert pieces == ["a", "é", "😀"] and found.ended == "the text is over" and found.tokens == 8


def test_a_stop_string_ends_the_text_and_the_model_is_not_asked_again():
    model = Scripted(b"one. Two")
    found = Continuation(model, ByteTokenizer(), "ab", temperature=0, stop=(". ",))
    assert "".join(found) == "one" and found.ended == "stopped at '. '" and model.at == found.tokens == 5


def test_a_full_context_is_said_and_a_number_of_tokens_is_not():
    pieces, found = continuation(b"x" * 99)
    assert "".join(pieces) == "x" * 29 and found.ended == "the context of 32 tokens is full"  # BOS, a, b
    pieces, found = continuation(b"x" * 99, new_tokens=5)
    assert "".join(pieces) == "x" * 5 and found.ended is None


def test_a_character_cut_off_by_the_end_is_marked():
    assert continuation("é".encode(), new_tokens=1)[0] == ["\ufffd"]


# ------------------------------------------------------------------------------------ the command
@pytest.mark.parametrize("run", ["bytes", "bpe"])
def test_the_prompt_goes_on_and_the_last_line_has_the_speed(run, runs, capsys):
    status, out, err = said(capsys, "ROMEO:", "--model", runs / run)
    assert status == 0 and out.startswith("ROMEO:") and len(out) > 10 and out.endswith("\n")
    last = err.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ tokens, [\d,]+ tokens/s; (the context of 48 tokens is full|the text is over)", last)


def test_a_seed_repeats_another_differs_and_temperature_0_needs_none(runs, capsys):
    texts = [said(capsys, "The", "--model", runs / "bytes", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [
        said(capsys, "The", "--model", runs / "bytes", "--tokens", 9, *options)[1]
        for options in (
            ("--temperature", 0, "--seed", 1), ("--temperature", 0, "--seed", 2), ("--top-k", 1), ("--top-p", 1e-6),
        )
    ]  # fmt: skip
    assert len(set(greedy)) == 1


def test_stop_is_not_shown(runs, capsys):
    whole = said(capsys, "The", "--model", runs / "bytes", "--tokens", 20)[1][:-1]
    letter = next(c for c in whole[8:] if c.isascii() and c.isprintable())
    cut, err = said(capsys, "The", "--model", runs / "bytes", "--tokens", 20, "--stop", letter)[1:]
    assert cut == "The" + whole[3:].split(letter)[0] + "\n" and f"stopped at {letter!r}" in err


def test_a_checkpoints_folder_does_as_well_as_a_runs(runs, capsys):
    (checkpoint,) = (runs / "bpe" / "checkpoints").glob("step_*8")
    found = [said(capsys, "The", "--model", path)[1] for path in (runs / "bpe", checkpoint)]
    assert found[0] == found[1]


def test_characters_that_steer_a_terminal_are_marked(capsys, monkeypatch):
    script = Scripted(b"a\x1b[2J\tb\r\n\x00")
    monkeypatch.setattr("minigated.generate_command.open_model", lambda folder: (script, ByteTokenizer()))
    assert said(capsys, "x", "--temperature", 0, "--tokens", 10)[1] == "xa\ufffd[2J\tb\n\ufffd\n"


def test_text_reaches_the_terminal_as_it_is_made(monkeypatch):
    class Terminal(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    terminal, script = Terminal(), Scripted(b"abcdefgh")
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("minigated.generate_command.open_model", lambda folder: (script, ByteTokenizer()))
    assert main(["generate", "x", "--temperature", "0", "--tokens", "8"]) == 0
    assert terminal.getvalue() == "xabcdefgh\n" and terminal.flushed >= 10


def test_a_terminal_of_few_characters_is_no_reason_to_fail(runs):
    done = shell("generate", "é", "--model", str(runs / "bytes"), "--tokens", "3", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("?") and "Traceback" not in done.stderr


def test_byte_pairs_train_report_nats_a_byte_measure_and_resume(runs, capsys):
    capsys.readouterr()
    again = [*TRAIN, "--tokenizer", "bpe:300", "--out", str(runs / "bpe")]
    before = (runs / "bpe" / "tokenizer.json").read_bytes()
    assert main(again) == 2 and "already holds a run" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert "tokenizer bpe:300" in capsys.readouterr().out
    assert (runs / "bpe" / "tokenizer.json").read_bytes() == before
    assert main([*TRAIN, "--out", str(runs / "bpe"), "--resume"]) == 2  # bytes now
    assert "[300, 128] in the file" in capsys.readouterr().err
    assert main(["measure", str(runs / "bpe"), "--tokens", "32", "--sequences", "2"]) == 0
    assert "F-Attn" in capsys.readouterr().out
    training = torch.load(next((runs / "bpe").rglob("step_*8/training.pt")), weights_only=True)
    rows = [value for value in training.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    assert rows and all(0 < row["nats_a_byte"] < row["validation"] for row in rows[0])


def test_another_runs_tokenizer_is_not_overwritten(runs, capsys):
    before = (runs / "bpe" / "tokenizer.json").read_bytes()
    assert main([*TRAIN, "--tokenizer", "bpe:290", "--out", str(runs / "bpe")]) == 2
    assert (runs / "bpe" / "tokenizer.json").read_bytes() == before


# ------------------------------------------------------------------------------------ the shipped model
def ship(folder, **change):
    """A model in the layout of a shipped one."""
    torch.manual_seed(0)
    model = build_lm(TINY)
    (folder / "moe_nano").mkdir()
    save_weights(model, folder / "moe_nano" / "model.safetensors")
    config = {"kind": "lm", "model": {**vars(model.config), **change}}
    (folder / "moe_nano" / "config.json").write_text(json.dumps(config))
    return model


def test_the_shipped_model_is_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    model = ship(tmp_path)
    found = load_shipped()
    assert not found.training and found.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))
    status, out, _ = said(capsys, "Hi", "--tokens", 4)
    assert status == 0 and out.startswith("Hi")


def test_a_missing_shipped_model_says_how_to_train_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    status, out, err = said(capsys, "Hi")
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "python -m minigated train moe_nano --variant g1_elementwise" in err and "--model runs/moe_nano" in err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 24}, "holds another model: embedding.weight is .256, 24. here and .256, 16. in the file"),
        ({"colour": 3}, "does not describe a model of kind 'lm'.*colour"),
        ({"vocabulary": 300}, "embedding.weight is .300, 16. here"),
    ],
)
def test_a_shipped_model_that_does_not_fit_its_config(change, match, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    ship(tmp_path, **change)
    with pytest.raises(InputError, match=match):
        load_shipped()


def test_a_damaged_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    ship(tmp_path)
    for file, content, match in (
        ("model.safetensors", b"none", "cannot be read"),
        ("config.json", b"{}", "config.json is damaged"),
        ("config.json", b"\xff", "config.json is damaged"),
    ):
        (tmp_path / "moe_nano" / file).write_bytes(content)
        with pytest.raises(InputError, match=match):
            load_shipped()


def test_the_shipped_folder_is_read_if_it_is_there():
    if not (shipped.SHIPPED / "moe_nano").is_dir():
        pytest.skip("no trained moe_nano in this copy")
    model, tokenizer = open_model(None)
    assert model.config.vocabulary == tokenizer.vocabulary and not model.training


# ------------------------------------------------------------------------------------ --static
@pytest.fixture
def static(monkeypatch, capsys):
    """Runs the command with --static on a model that takes no time."""
    model = build_lm(TINY)
    monkeypatch.setattr("minigated.generate_command.open_model", lambda folder: (model, ByteTokenizer()))
    return lambda: said(capsys, "a", "--tokens", 3, "--static", "--device", "cpu")


def test_without_a_compiler_one_line_says_so(static, tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else an earlier run's code would do
    reset_compilation()
    with inductor.patch({"cpp.cxx": (None, "/no/compiler")}):
        status, out, err = static()
    reset_compilation()
    assert status == 1 and out == ""
    assert err == "error: torch.compile found no working C++ compiler; leave out --static\n"


def test_other_errors_of_the_compiler_are_not_hidden(static, monkeypatch):
    def prepare(cache):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("minigated.static_cache.StaticCache.prepare", prepare)
    with pytest.raises(RuntimeError, match="out of memory"):
        static()


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([""], "the prompt is empty"),
        (["x" * 60], "the prompt has 61 tokens, which leaves no room in the context of 48"),
        (["Hi", "--tokens", "46"], "3 tokens of prompt and 46 new ones are longer than the context of 48"),
        (["Hi", "--tokens", "0"], "0 new tokens are too few"),
        (["Hi", "--temperature", "-1"], "temperature is -1"),
        (["Hi", "--top-k", "0"], "top_k is 0"),
        (["Hi", "--top-p", "1.01"], "top_p is 1.01"),
        (["Hi", "--stop", ""], "a stop string is empty"),
        (["Hi", "--seed", "-1"], "seed -1 is out of range"),
        (["\udcff"], "cannot be written in UTF-8"),
        (["Hi", "--device", "abacus"], "abacus"),
        (["Hi", "--model", "no/folder"], "no/folder"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_printed(arguments, match, runs, capsys):
    model = [] if "--model" in arguments else ["--model", runs / "bytes"]
    status, out, err = said(capsys, *arguments, *model)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and match in err


def test_a_folder_whose_tokenizer_is_gone_or_anothers(runs, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(runs / "bpe", copy)
    (copy / "tokenizer.json").unlink()
    status, _, err = said(capsys, "Hi", "--model", copy)
    assert status == 2 and "has 300 tokens, not the 256 of bytes, and tokenizer.json is missing" in err
    (copy / "tokenizer.json").write_text("{}")
    status, _, err = said(capsys, "Hi", "--model", copy)
    assert status == 2 and "is not a tokenizer" in err and err.count("\n") == 1
    shutil.copy(runs / "bpe" / "tokenizer.json", copy)
    shutil.copytree(runs / "bytes" / "checkpoints", copy / "checkpoints", dirs_exist_ok=True)
    status, _, err = said(capsys, "Hi", "--model", copy)
    assert status == 2 and "has 256 tokens, its tokenizer.json has 300" in err


def test_a_vision_model_cannot_write(tmp_path, capsys):
    command = ["train", "gated_swinrmt_retention_nano", "--steps", "1", "--batch", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    status, _, err = said(capsys, "Hi", "--model", tmp_path)
    assert status == 2 and "holds a model of kind 'vit'; accepted: language models" in err


@pytest.mark.parametrize("name", ["bpe:10", "words", "bpe:9999999"])
def test_wrong_tokenizers_are_refused_before_training(name, capsys):
    assert main([*TRAIN, "--tokenizer", name]) == 2
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1 and "accepted: " in streams.err
