"""Byte-pair tokens, learned from a text with the `tokenizers` library (arXiv 1508.07909, on bytes).

It starts from the 256 bytes and again and again makes the most frequent pair of neighbours a token of its own. As every
byte is a token, every text can be written. `<|endoftext|>` in a text is text; the token of that name comes only where a
document ends.
"""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minigated.data.tokens import EOT
from minigated.errors import InputError

BOS_NAME, EOT_NAME = "<|beginoftext|>", "<|endoftext|>"
FILE = "tokenizer.json"
LEAST = 256 + 2  # the bytes and two tokens of our own
PIECE = 1 << 20  # bytes of text at a time, more or less
BATCH = 256  # pieces or documents that are encoded in one call

# A line end between two visible characters: the library splits there in any case, so cutting there changes nothing.
_CUT = re.compile(rb"[!-~]\n(?=[!-~])")


class BytePairTokenizer:
    """A `tokenizers.Tokenizer` whose tokens are strings of bytes, in the form the package uses.

    Args:
        tokenizer: trained here or read from a released model's tokenizer.json.

    Raises:
        InputError: its tokens are not made of bytes.
    """

    def __init__(self, tokenizer):
        tokenizer.encode_special_tokens = True  # a special token's name in a text is text
        self.tokenizer = tokenizer
        self.bos, self.eot = tokenizer.token_to_id(BOS_NAME), tokenizer.token_to_id(EOT_NAME)
        self._bytes = _token_bytes(tokenizer)

    @property
    def vocabulary(self) -> int:
        """The largest token + 1."""
        return len(self._bytes)

    @property
    def name(self) -> str:
        """As `--tokenizer` takes it."""
        return f"bpe:{self.vocabulary}"

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token; nothing for special tokens and for rows of a model's padding."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def from_bytes(self, data: Tensor) -> Tensor:
        """The byte tokens of a text, [bytes] uint8, as byte-pair tokens, [tokens] int32; `EOT` stays one token.

        Raises:
            InputError: the text has an end of document, for which this tokenizer has no token.
        """
        documents = list(_documents(data))
        if len(documents) > 1 and self.eot is None:
            raise InputError(f"the text has several documents, but the tokenizer has no {EOT_NAME}")
        tokens = [np.empty(0, dtype=np.int32)]
        for number, document in enumerate(documents):
            if number:
                tokens.append(np.array([self.eot], dtype=np.int32))
            pieces = _pieces(document)
            while batch := list(islice(pieces, BATCH)):
                tokens += [np.array(e.ids, dtype=np.int32) for e in self._encode(batch)]
        return torch.from_numpy(np.concatenate(tokens))

    def _encode(self, texts: list[str]):
        if len(texts) == 1:  # a batch of one would start the library's threads for nothing
            return [self.tokenizer.encode(texts[0], add_special_tokens=False)]
        return self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        """Writes tokenizer.json into `folder`, whole or not at all."""
        path = Path(folder) / FILE
        partial = path.with_name(f".partial_{FILE}")
        partial.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)
        return path


def train_bpe(text: Tensor, vocabulary: int) -> BytePairTokenizer:
    """Learns byte-pair tokens from a text.

    Args:
        text: the training split as byte tokens, [bytes] uint8; documents end with `EOT`.
        vocabulary: tokens in all: the 256 bytes, two special ones, and the learned pairs.

    Raises:
        InputError: the library is not installed, or the text has not enough pairs that occur twice.
    """
    if vocabulary < LEAST:
        raise InputError(f"a byte-pair vocabulary of {vocabulary} is too small; accepted: {LEAST} or more")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise InputError("a byte-pair tokenizer needs a package: pip install tokenizers") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[BOS_NAME, EOT_NAME], show_progress=False,
        initial_alphabet=sorted(_byte_alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator((p for d in _documents(text) for p in _pieces(d)), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise InputError(
            f"the text of {len(text):,} bytes has pairs for {found} tokens, not for {vocabulary}; "
            f"accepted: bpe:{LEAST} to bpe:{found}, or a longer text"
        )
    return BytePairTokenizer(tokenizer)


def _documents(data: Tensor) -> Iterator[bytes]:
    """The parts between `EOT` tokens; n + 1 parts for n of them."""
    whole, start = data.numpy(), 0
    for end in np.flatnonzero(whole == EOT):
        yield whole[start:end].tobytes()
        start = end + 1
    yield whole[start:].tobytes()


def _pieces(document: bytes) -> Iterator[str]:
    """A document in pieces of about `PIECE` bytes that are encoded as they would be together."""
    start = 0
    while len(document) - start > PIECE and (cut := _CUT.search(document, start + PIECE)):
        yield document[start : cut.end()].decode("utf-8")
        start = cut.end()
    if start < len(document):
        yield document[start:].decode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for the 256 bytes in a tokenizer.json: visible ones for themselves, the rest moved."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def _token_bytes(tokenizer) -> list[bytes]:
    added, alphabet = tokenizer.get_added_tokens_decoder(), _byte_alphabet()
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number in added:
            table[number] = b"" if added[number].special else token.encode("utf-8")
            continue
        try:
            table[number] = bytes(alphabet[character] for character in token)
        except KeyError as error:
            said = f"token {token!r} of the tokenizer is not made of bytes; accepted: byte-level BPE"
            raise InputError(said) from error
    return table
