"""Tokenizers: byte-pair tokens give every text back, documents end where they ended, losses compare by the byte."""

import itertools
import re
import sys

import pytest
import torch

from minigated.data import BOS, EOT, TextBatches, encode, load_text
from minigated.data import bpe as module
from minigated.data.bpe import BOS_NAME, EOT_NAME, BytePairTokenizer, train_bpe
from minigated.data.tokenizer import ByteTokenizer, TextStream, bytes_a_token, prompt_tokens
from minigated.errors import InputError
from minigated.run_tokenizer import choose_tokenizer, read_tokenizer, refuse_other_vocabulary

tokenizers = pytest.importorskip("tokenizers")
CORPUS = load_text("sample")
STRANGE = f"{EOT_NAME} {BOS_NAME}\r\n\n \t é 漢字 😀 \x00\x7f  the  end "


@pytest.fixture(scope="module")
def trained() -> BytePairTokenizer:
    return train_bpe(CORPUS.train[:100_000], 400)


def back(tokenizer, tokens) -> bytes:
    return b"".join(tokenizer.bytes_of(token) for token in tokens.tolist())


# ------------------------------------------------------------------------------------ byte pairs
@pytest.mark.parametrize("text", ["", "a", "ROMEO:\nHi", STRANGE, "".join(map(chr, range(0x250)))])
def test_every_text_comes_back(trained, text):
    tokens = trained.from_bytes(encode(text))
    assert tokens.dtype == torch.int32 and back(trained, tokens) == text.encode()
    assert not set(tokens.tolist()) & {trained.bos, trained.eot}, "a special token came out of plain text"


def test_the_vocabulary_is_what_was_asked_for_and_saves_tokens(trained):
    assert trained.vocabulary == 400 and trained.name == "bpe:400"
    tokens = trained.from_bytes(CORPUS.test)
    assert 0 <= tokens.min() and 258 <= tokens.max() < 400
    assert len(tokens) < 0.75 * len(CORPUS.test) and back(trained, tokens) == bytes(CORPUS.test.tolist())


def test_bytes_of_agrees_with_the_library(trained):
    tokens = trained.from_bytes(encode(STRANGE + "Speak, speak."))
    assert trained.tokenizer.decode(tokens.tolist()).encode() == back(trained, tokens)
    every = {trained.bytes_of(token) for token in range(trained.vocabulary)}
    assert {bytes([byte]) for byte in range(256)} <= every
    assert trained.bytes_of(trained.bos) == trained.bytes_of(trained.eot) == trained.bytes_of(9999) == b""


def test_a_document_ends_in_one_token_and_no_pair_crosses_it(trained):
    one, two = encode("Speak, speak."), encode("the king")
    end = torch.tensor([EOT], dtype=torch.uint8)
    found = trained.from_bytes(torch.cat((one, end, two, end)))
    ended = torch.tensor([trained.eot], dtype=torch.int32)
    assert torch.equal(found, torch.cat((trained.from_bytes(one), ended, trained.from_bytes(two), ended)))


@pytest.mark.parametrize(
    ("piece", "careless"),
    [(1, None), (41, None), (3000, None), (1, rb"\n"), (1, rb"[!-~]\n"), (1, rb"\n(?=[!-~])")],
)
def test_pieces_give_the_tokens_of_the_whole(piece, careless, monkeypatch):
    """Also around blank lines and runs of spaces, where the library looks at what comes next; other cuts show."""
    text = encode("a\n\n  b\n c \n\n\nd  e\n\n\n\n\tf\ng hi\n\nj\n" * 300)
    spaced = train_bpe(text, 267)
    whole = spaced.from_bytes(text)
    monkeypatch.setattr(module, "PIECE", piece)
    if careless is not None:
        monkeypatch.setattr(module, "_CUT", re.compile(careless))
    assert len(list(module._pieces(bytes(text.tolist())))) > 2
    assert torch.equal(spaced.from_bytes(text), whole) == (careless is None)


def test_training_repeats(trained):
    assert train_bpe(CORPUS.train[:100_000], 400).tokenizer.to_str() == trained.tokenizer.to_str()


def test_saved_and_read_again(trained, tmp_path):
    assert trained.save(tmp_path).name == "tokenizer.json"
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    again = read_tokenizer(tmp_path)
    assert (again.bos, again.eot, again.vocabulary) == (trained.bos, trained.eot, 400)
    assert torch.equal(again.from_bytes(encode(STRANGE)), trained.from_bytes(encode(STRANGE)))


def test_prompts_start_with_bos(trained):
    assert prompt_tokens(trained, "the")[0, 0] == trained.bos and prompt_tokens(trained, "the").dtype == torch.int64
    assert prompt_tokens(ByteTokenizer(), "hé").tolist() == [[BOS, *"hé".encode()]]


def test_batches_take_its_tokens_and_its_first_token(trained):
    tokens = trained.from_bytes(CORPUS.validation)
    rows = TextBatches(tokens, context=8, batch=3, bos_token=trained.bos).at(0)
    assert rows.dtype == torch.int64 and (rows[:, 0] == trained.bos).all() and rows.max() > 255
    with pytest.raises(InputError, match="the text has 5 tokens, but a context of 8"):
        TextBatches(tokens[:5], context=8)


# ------------------------------------------------------------------------------------ nats a byte
def test_bytes_a_token_add_up_to_the_text(trained):
    end = torch.tensor([EOT], dtype=torch.uint8)
    text = torch.cat((CORPUS.test[:5000], end, encode("é漢"), end))
    for tokenizer in (trained, ByteTokenizer()):
        lengths = bytes_a_token(tokenizer)
        assert lengths.shape == (tokenizer.vocabulary,) and lengths[tokenizer.bos] == 0
        assert lengths[tokenizer.from_bytes(text).long()].sum() == len(text)


def test_nats_a_byte_of_a_uniform_model_by_hand(trained):
    from minigated.commands import validation_loss

    tokens = trained.from_bytes(CORPUS.validation)
    windows = list(TextBatches(tokens, context=16, batch=4, bos_token=trained.bos).sequential(3))
    uniform = torch.nn.Embedding(400, 400)
    torch.nn.init.zeros_(uniform.weight)
    found = validation_loss(windows, "float32", bytes_a_token(trained))(uniform)
    text = sum(len(back(trained, row[1:])) for window in windows for row in window)
    assert found["validation"] == pytest.approx(torch.log(torch.tensor(400.0)).item())
    assert found["nats_a_byte"] == pytest.approx(found["validation"] * 3 * 4 * 16 / text)
    assert set(validation_loss(windows, "float32")(uniform)) == {"validation"}


# ------------------------------------------------------------------------------------ text as it comes
def shown(tokenizer, data: bytes | torch.Tensor, stop=()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [stream.feed(int(token)) for token in data] + [stream.finish()]


def test_only_whole_characters_are_shown():
    assert shown(ByteTokenizer(), "aé😀b".encode()) == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_broken_characters_are_marked_and_nothing_waits_for_ever():
    assert shown(ByteTokenizer(), b"\xc3a") == ["", "\ufffda", ""]
    assert shown(ByteTokenizer(), b"a\xf0\x9f") == ["a", "", "", "\ufffd"]
    assert shown(ByteTokenizer(), [BOS, 97, EOT]) == ["", "a", "", ""]


def test_pieces_of_byte_pairs_make_the_text(trained):
    pieces = shown(trained, trained.from_bytes(encode(STRANGE)))
    assert "".join(pieces) == STRANGE and "\ufffd" not in "".join(pieces) and pieces.count("") > 3


@pytest.mark.parametrize(
    ("text", "stop", "left", "stopped"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("one\ntwo", ["\n\n"], "one\ntwo", None),
        ("aab", ["ab"], "a", "ab"),  # the first a is held back, then let go
        ("abcd", ["bcd", "c"], "ab", "c"),  # as it streams: the one that is complete first
        ("abcd", ["c", "bc"], "a", "bc"),  # complete at the same time: the longer one
        ("abx", ["abc", "x"], "ab", "x"),
        ("xé", ["é"], "x", "é"),
        ("ends in ab", ["abc"], "ends in ab", None),
    ],
)
def test_stop_strings_are_never_shown(text, stop, left, stopped):
    stream = TextStream(ByteTokenizer(), stop)
    pieces = [stream.feed(token) for token in text.encode()] + [stream.finish()]
    assert "".join(pieces) == left and stream.stopped == stopped


class Pieces:
    """A tokenizer whose tokens are given pieces of a text."""

    def __init__(self, pieces):
        self.bytes_of = lambda token: pieces[token].encode()


@pytest.mark.parametrize("stop", [("bcd", "c"), ("c", "bc"), ("cde", "abcx"), ("ab", "b"), ("zz",)])
def test_what_is_shown_does_not_depend_on_where_tokens_end(stop):
    seen = set()
    for cuts in itertools.product((False, True), repeat=4):
        pieces = "".join(c + "|" * cut for c, cut in zip("abcde", (*cuts, False))).split("|")
        stream = TextStream(Pieces(pieces), stop)
        seen.add(("".join([stream.feed(n) for n in range(len(pieces))] + [stream.finish()]), stream.stopped))
    assert len(seen) == 1


def test_text_after_a_stop_string_in_the_same_token_is_cut(trained):
    token = max(range(400), key=lambda t: len(trained.bytes_of(t)))
    word = trained.bytes_of(token).decode()
    stream = TextStream(trained, (word[1],))
    assert stream.feed(token) == word[0] and stream.stopped == word[1] and stream.feed(token) + stream.finish() == ""


# ------------------------------------------------------------------------------------ wrong input
def test_wrong_vocabularies_are_refused():
    with pytest.raises(InputError, match="vocabulary of 257 is too small; accepted: 258 or more"):
        train_bpe(CORPUS.train, 257)
    with pytest.raises(InputError, match=r"pairs for 26\d tokens, not for 5000; accepted: bpe:258 to bpe:26\d"):
        train_bpe(encode("the king the king"), 5000)
    with pytest.raises(InputError, match="the text of 6 bytes has pairs for 258 tokens"):  # each occurs once
        train_bpe(encode("abcdef"), 259)


@pytest.mark.parametrize("name", ["word", "bpe", "bpe:", "bpe:-4", "bpe:1e3", ""])
def test_unknown_tokenizers_are_refused(name):
    with pytest.raises(InputError, match="unknown tokenizer .*; accepted: bytes, or bpe:VOCABULARY"):
        choose_tokenizer(name, CORPUS)


def test_resume_takes_the_folders_tokenizer_and_no_other(trained, tmp_path):
    trained.save(tmp_path)
    assert choose_tokenizer("bpe:400", CORPUS, str(tmp_path), resume=True).tokenizer.to_str() == (
        trained.tokenizer.to_str()
    )
    with pytest.raises(InputError, match="cannot resume: the tokenizer in .* is 'bpe:400', and 'bpe:401' was asked"):
        choose_tokenizer("bpe:401", CORPUS, str(tmp_path), resume=True)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(trained):
    refuse_other_vocabulary(trained, 400, "here")
    refuse_other_vocabulary(trained, 512, "here", padded=True)
    for tokenizer, vocabulary, padded, said in (
        (trained, 401, False, "in here has 401 tokens, its tokenizer.json has 400"),
        (trained, 399, True, "in here has 399 tokens, its tokenizer.json has 400"),
        (ByteTokenizer(), 400, False, "400 tokens, not the 256 of bytes, and tokenizer.json is missing"),
    ):
        with pytest.raises(InputError, match=said):
            refuse_other_vocabulary(tokenizer, vocabulary, "here", padded)


def test_tokens_that_are_not_bytes_are_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"漢": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="is not made of bytes; accepted: byte-level BPE"):
        BytePairTokenizer(words)


def test_documents_need_a_token(trained):
    released = tokenizers.Tokenizer.from_str(trained.tokenizer.to_str().replace(EOT_NAME, "<|other|>"))
    plain = BytePairTokenizer(released)
    assert plain.eot is None and len(plain.from_bytes(encode("the king")))
    with pytest.raises(InputError, match="several documents"):
        plain.from_bytes(torch.tensor([97, EOT, 98], dtype=torch.uint8))


def test_without_the_library_one_line_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install tokenizers"):
        train_bpe(CORPUS.train, 300)
