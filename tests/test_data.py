"""Texts: what is accepted, how it is cut, and batches as a function of (seed, step)."""

import gzip
import hashlib
import lzma
import subprocess
import sys
from collections import Counter

import pytest
import torch

from minigated.data import BOS, EOT, TextBatches, decode, describe, encode, load_text, prepare
from minigated.data import tokens as tokens_module
from minigated.data.tokens import Tokeniser, cut_points
from minigated.errors import InputError

TEXT = "Größe, naïve: 字 and 🙂.\nSecond line\n" * 40


def whole(corpus):
    return torch.cat((corpus.train, corpus.validation, corpus.test))


def test_shakespeare_is_embedded():
    corpus = load_text("shakespeare")
    assert corpus.name == load_text("sample").name == "shakespeare"
    assert corpus.bytes == 1_115_394
    assert corpus.sha256 == hashlib.sha256(bytes(whole(corpus).tolist())).hexdigest()
    assert corpus.sha256.startswith("86c4e6aa9db7c042")
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [1_003_854, 55_770, 55_770]
    assert corpus.train.dtype == torch.uint8 and decode(corpus.train[:14]) == "First Citizen:"


def test_an_altered_embedded_file_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare.txt").write_text("First Citizen:\n" * 100)
    monkeypatch.setattr("minigated.data.text.FILES", tmp_path)
    with pytest.raises(InputError, match="expected 86c4e6aa"):
        load_text("shakespeare")


def test_encode_and_decode():
    tokens = encode(TEXT)
    assert tokens.dtype == torch.uint8 and len(tokens) == len(TEXT.encode()) and decode(tokens) == TEXT
    assert encode("").tolist() == [] and decode([]) == ""
    assert decode([BOS, *b"ab", EOT, *b"c"]) == "abc" and decode(torch.tensor([[0xC3, 65]])) == "\ufffdA"
    with pytest.raises(InputError, match="udcff"):
        encode("a\udcff")


@pytest.mark.parametrize("suffix, pack", [(".txt", bytes), (".txt.xz", lzma.compress), (".txt.gz", gzip.compress)])
def test_a_file_by_path(tmp_path, suffix, pack):
    path = tmp_path / f"my.text{suffix}"
    path.write_bytes(pack(TEXT.encode()))
    corpus = load_text(path)
    assert corpus.name == "my.text" and corpus.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert corpus.bytes == len(TEXT.encode()) and decode(whole(corpus)) == TEXT
    for part in (corpus.train, corpus.validation, corpus.test):
        bytes(part.tolist()).decode()  # no character is cut in two


def tokenised(data: bytes, size: int) -> bytes:
    tokeniser = Tokeniser("text")
    pieces = [tokeniser.feed(data[i : i + size]) for i in range(0, len(data), size)]
    out = b"".join((*pieces, tokeniser.feed(b"", last=True)))
    assert tokeniser.bytes == len(data) and tokeniser.digest.hexdigest() == hashlib.sha256(data).hexdigest()
    return out


SEPARATED = [
    (b"one\n<|endoftext|>\ntwo\n", b"one\n\xfetwo\n"),
    (b"<|endoftext|>\na\n<|endoftext|>\n<|endoftext|>\n<|endoftext|>\nb", b"\xfea\n\xfe\xfe\xfeb"),
    (b"one\r\n<|endoftext|>\r\ntwo\r\n", b"one\r\n\xfetwo\r\n"),
    (b"one\n<|endoftext|>", b"one\n\xfe"),
    *(
        (text, text)
        for text in (  # not a line of its own: stays as it is
            b"one <|endoftext|>\ntwo",
            b"<|endoftext|> two\n",
            b" <|endoftext|>\n",
            b"<|endoftext|><|endoftext|>\n",
            b"aaaaaaaaaaaaaaaaaaaa<|endoftext|>\nb\n",
            "字🙂<|endoftext|>\né".encode(),
            b"<|endoftext\n|>\n",
        )
    ),
]


@pytest.mark.parametrize("data, expected", SEPARATED)
def test_separator_lines_become_eot_however_the_file_is_read(data, expected):
    for size in range(1, len(data) + 2):
        assert tokenised(data, size) == expected, size


def test_splits_hold_whole_documents(tmp_path):
    documents = [f"Book {i}\n" + "word " * (37 * i % 50 + 20) + "\n" for i in range(60)]
    path = tmp_path / "books.txt"
    path.write_text("<|endoftext|>\n".join(documents))
    corpus = load_text(path)
    parts = [bytes(part.tolist()) for part in (corpus.train, corpus.validation, corpus.test)]
    assert [x.decode() for x in b"".join(parts).split(b"\xfe")] == documents
    assert parts[0].endswith(b"\xfe") and parts[1].endswith(b"\xfe") and parts[2].startswith(b"Book")
    assert len(parts[0]) == pytest.approx(0.9 * len(whole(corpus)), rel=0.02)
    assert len(parts[1]) == pytest.approx(0.05 * len(whole(corpus)), rel=0.4)


def test_few_documents_still_give_three_splits():
    three = torch.tensor([*b"abc", EOT, *b"d" * 90, EOT, *b"efghij"], dtype=torch.uint8)
    assert cut_points(three, (0.90, 0.95)) == [4, 95]
    two = torch.tensor([*b"abc" * 30, EOT, *b"efghijklm"], dtype=torch.uint8)
    assert cut_points(two, (0.90, 0.95)) == [90, 95]  # too few to give each split one: by position
    late = torch.tensor([*b"d" * 94, EOT, *b"abc", EOT, *b"e"], dtype=torch.uint8)
    assert cut_points(late, (0.90, 0.95)) == [95, 99]  # no document end serves twice
    closed = torch.tensor([*b"d" * 50, EOT, *b"abc" * 10, EOT], dtype=torch.uint8)
    assert cut_points(closed, (0.90, 0.95)) == [73, 77]  # the end of the text is no place to cut


def test_a_character_is_never_cut():
    assert cut_points(encode("字" * 25), (0.90, 0.95)) == [69, 72]  # 67 and 71 lie inside one


def test_wrong_bytes_are_named_with_their_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 1000)  # the offset counts from the start of the file
    start = TEXT.encode() * 2
    assert len(start) > 3000
    for bad, why in (
        (b"\xff", "0xFF .*reserved"),
        (b"\xfe", "0xFE .*reserved"),
        (b"\x80", "0x80 .*UTF-8"),
        (b"\xc3(", "0xC3 .*UTF-8"),
    ):
        path = tmp_path / "bad.txt"
        path.write_bytes(start + bad + b"more\n")
        with pytest.raises(InputError, match=f"bad.txt: byte {why}") as caught:
            load_text(path)
        assert f"offset {len(start):,} " in str(caught.value)
    path.write_bytes(TEXT.encode() + "é".encode()[:1])  # cut inside its last character
    with pytest.raises(InputError, match=f"offset {len(TEXT.encode()):,} "):
        load_text(path)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match="'nowhere.txt'.*shakespeare, sample, enwik8, tinystories, wikitext2.*txt.xz"):
        load_text("nowhere.txt")
    with pytest.raises(InputError, match="'cifar10'.*images"):
        load_text("cifar10")
    with pytest.raises(InputError, match="is no file"):
        load_text(tmp_path)
    for name, data, message in (
        ("a.parquet", b"PAR1", r"'\.parquet'.*\.txt, "),
        ("empty.txt", b"", "is empty"),
        ("short.txt", b"ab", "2 bytes"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-20], "damaged"),
        ("no.txt.xz", b"plain text", "damaged"),
        ("cut.txt.gz", gzip.compress(TEXT.encode())[:-20], "damaged"),
        ("no.txt.gz", b"plain text", "cannot read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            load_text(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_windows_come_from_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    plain = TextBatches(text, context=16, batch=8, bos=False).at(3)
    assert plain.shape == (8, 17) and plain.dtype == torch.int64 and (plain.diff(dim=1) == 1).all()
    marked = TextBatches(text, context=16, batch=8).at(3)
    assert marked.shape == (8, 17) and (marked[:, 0] == BOS).all() and (marked[:, 1:].diff(dim=1) == 1).all()


@pytest.mark.parametrize("bos, starts", [(True, 5), (False, 4)])
def test_every_start_is_drawn_and_evenly(bos, starts):
    batches = TextBatches(torch.arange(20, dtype=torch.uint8), context=16, batch=50, bos=bos)
    seen = Counter(torch.cat([batches.at(step)[:, int(bos)] for step in range(100)]).tolist())
    assert sorted(seen) == list(range(starts))  # the first and the last window included
    assert all(count == pytest.approx(5000 / starts, rel=0.15) for count in seen.values())


def test_batches_are_a_function_of_seed_and_step():
    tokens = load_text("sample").train
    batches = TextBatches(tokens, context=32, batch=8, seed=1)
    later = [batches.at(step) for step in (5, 6)]
    again = TextBatches(tokens, context=32, batch=8, seed=1)
    assert torch.equal(again.at(6), later[1]) and torch.equal(again.at(5), later[0])
    assert not torch.equal(later[0], later[1])
    assert not torch.equal(TextBatches(tokens, context=32, batch=8, seed=2).at(5), later[0])
    assert not torch.equal(TextBatches(tokens, context=32, batch=8, seed=6).at(0), batches.at(5))  # not seed + step


def test_the_draws_stay_the_same_in_every_version():
    # A record's seed must mean the same data later: these numbers are written down, not computed.
    starts = TextBatches(torch.arange(256).repeat(4)[:1000].to(torch.uint8), context=1, batch=6, seed=3).at(7)[:, 1]
    assert starts.tolist() == [132, 112, 43, 175, 110, 144]


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TextBatches(torch.zeros(100, dtype=torch.uint8), context=8).at(0)
    assert torch.equal(before, torch.get_rng_state())


def test_ranks_share_the_batch_of_one_process():
    batches = TextBatches(load_text("sample").train, context=32, batch=8)
    for world in (2, 4, 8):
        parts = [batches.at(9, rank, world) for rank in range(world)]
        assert all(len(part) == 8 // world for part in parts)
        assert torch.equal(torch.cat(parts), batches.at(9))
    with pytest.raises(InputError, match="3 processes.*batch of 8"):
        batches.at(0, 0, 3)
    with pytest.raises(InputError, match="rank 2.*0 to 1"):
        batches.at(0, 2, 2)


@pytest.mark.parametrize("bos", [True, False])
def test_sequential_windows_predict_every_byte_once_and_in_order(bos):
    text = torch.arange(103, dtype=torch.uint8)
    rows = list(TextBatches(text, context=10, batch=4, bos=bos).sequential())
    assert [len(batch) for batch in rows] == [4, 4, 2]
    targets = torch.cat(rows)[:, 1:].flatten()
    assert targets.tolist() == list(range(100)) if bos else list(range(1, 101))
    first = list(TextBatches(text, context=10, batch=4, bos=bos).sequential(1))
    assert len(first) == 1 and torch.equal(first[0], rows[0])


def test_impossible_batches_are_refused():
    text = torch.zeros(512, dtype=torch.uint8)
    assert TextBatches(text, context=512).at(0).shape == (64, 513)
    with pytest.raises(InputError, match="512 bytes.*context of 512 takes 513"):
        TextBatches(text, context=512, bos=False)
    with pytest.raises(InputError, match="511 bytes.*context of 512"):
        TextBatches(text[:511], context=512)
    with pytest.raises(InputError, match="context 0"):
        TextBatches(text, context=0)
    with pytest.raises(InputError, match="batch 0"):
        TextBatches(text, context=8, batch=0)
    with pytest.raises(InputError, match="int64"):
        TextBatches(text.long())
    with pytest.raises(InputError, match="step -1"):
        TextBatches(text).at(-1)


def test_describe_the_sample():
    facts = prepare("sample")
    assert facts["name"] == "shakespeare" and facts["train"] + facts["validation"] + facts["test"] == facts["bytes"]
    page = describe("shakespeare")
    for part in ("1,115,394", facts["sha256"], "1,003,854 / 55,770 / 55,770", "public domain"):
        assert part in page


def test_data_sets_that_are_not_here():
    with pytest.raises(InputError, match="'text8'.*shakespeare, sample, enwik8.*cifar10.*a folder"):
        describe("text8")
    with pytest.raises(InputError, match="size 64 for the text sample"):
        describe("sample", size=64)


def test_the_import_opens_no_connection():
    script = (
        "import socket, torch\n"
        "def refuse(*a, **k): raise SystemExit('a connection at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import sys; before = set(sys.modules)\n"
        "import minigated.data, minigated.data.toys\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"tqdm", "pyarrow", "matplotlib", "torchvision"} & set(eval(result.stdout)), result.stdout
