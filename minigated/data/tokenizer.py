"""What a tokenizer is here, its plainest form, and text that arrives token by token.

A tokenizer has a `name`, a `vocabulary` (number of tokens), `bos` (first token of a sequence; None where a model has
none), `eot` (end of a document; None likewise), and two functions: `from_bytes` takes the byte tokens of a text to its
own, `bytes_of` takes one token back to the bytes it stands for.
"""

import codecs

import torch
from torch import Tensor

from minigated.data.text import encode
from minigated.data.tokens import BOS, EOT


class ByteTokenizer:
    """Every byte is a token: nothing to train, nothing to download, 256 tokens."""

    name, vocabulary, bos, eot = "bytes", 256, BOS, EOT

    def from_bytes(self, data: Tensor) -> Tensor:
        """[bytes] uint8 as they are."""
        return data

    def bytes_of(self, token: int) -> bytes:
        """The byte itself; nothing for BOS and EOT."""
        return b"" if token in (BOS, EOT) else bytes([token])


def prompt_tokens(tokenizer, text: str) -> Tensor:
    """A text as the start of a sequence: `bos`, where there is one, and its tokens. Returns [1, T] int64.

    Raises:
        InputError: `text` cannot be written in UTF-8.
    """
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return torch.tensor([start + tokenizer.from_bytes(encode(text)).tolist()], dtype=torch.int64)


def bytes_a_token(tokenizer) -> Tensor:
    """How many bytes of text each token stands for, [vocabulary] int64; an end of document counts as one byte.

    Losses of two tokenizers are comparable by the byte only: nats of all tokens over the bytes they stand for.
    """
    lengths = torch.tensor([len(tokenizer.bytes_of(token)) for token in range(tokenizer.vocabulary)])
    if tokenizer.eot is not None:
        lengths[tokenizer.eot] = 1  # as in a byte model, whose EOT is one token
    return lengths


class TextStream:
    """Turns tokens that come one by one into text that can be shown at once.

    A token may end inside a character, and a stop string may come in parts: what is not certain yet is held back.

    Args:
        tokenizer: whose tokens come.
        stop: strings that end the text, whichever is whole first; neither it nor what follows is given out.

    Attributes:
        stopped: the stop string that was found, or None.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(s for s in stop if s), None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain after this token; "" after a stop string. Broken characters become U+FFFD."""
        return self._add(self._decoder.decode(self.tokenizer.bytes_of(token)))

    def finish(self) -> str:
        """What was held back; a character that was cut off becomes U+FFFD."""
        text = self._add(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _add(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(text.find(s), s) for s in self.stop if s in text]
        if found:
            at, self.stopped = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))  # the first that is whole
            self._held = ""
            return text[:at]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
