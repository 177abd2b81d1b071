"""Text as byte tokens: checks on the way in, the end of a document, where a text is cut into splits."""

import codecs
import hashlib
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from minigated.errors import InputError

BOS = 0xFF  # bytes that UTF-8 never uses, so that they are free and the vocabulary stays 256
EOT = 0xFE
SUFFIXES = (".txt", ".txt.xz", ".txt.gz")
PIECE = 1 << 22  # bytes held at a time while a file is read

_SEPARATOR = re.compile(rb"<\|endoftext\|>\r?(?:\n|\Z)")
_LONGEST = len(b"<|endoftext|>\r\n")


class Tokeniser:
    """Turns the raw bytes of one text, fed piece by piece, into tokens.

    A token is a byte. A line that holds only ``<|endoftext|>`` becomes the single token `EOT`, its line end
    included; every other byte stays as it is. Text that is not UTF-8 is refused, and with it the bytes 0xFE
    and 0xFF, which mark the end of a document and the start of a sequence.

    Args:
        name: what to call the text in an error message.
        digest: a running hash to continue (several texts under one hash); a new SHA-256 by default.
    """

    def __init__(self, name: str, digest=None):
        self.name = name
        self.digest = hashlib.sha256() if digest is None else digest
        self.bytes = 0
        self._character = b""  # the first bytes of a character that the last piece cut in two
        self._line = b""  # the first bytes of a line that may turn out to be a separator
        self._previous = b"\n"  # the byte before `_line`: a separator stands at the start of a line

    def feed(self, piece: bytes, last: bool = False) -> bytes:
        """Returns the tokens that are certain after `piece`; `last` closes the text.

        Raises:
            InputError: not UTF-8; the message has the text's name and the offset of the byte.
        """
        self.digest.update(piece)
        self._check(piece, last)
        data = self._line + piece
        start = len(data) if last else data.rfind(b"\n") + 1
        if len(data) - start >= _LONGEST:  # too long to be a separator: no need to wait for its end
            start = len(data)
        ready, self._line = data[:start], data[start:]
        tokens = _SEPARATOR.sub(_end_of_document, self._previous + ready)[1:]
        self._previous = ready[-1:] or self._previous
        return tokens

    def _check(self, piece: bytes, last: bool) -> None:
        data = self._character + piece
        start = self.bytes - len(self._character)
        try:
            _, used = codecs.utf_8_decode(data, "strict", last)
        except UnicodeDecodeError as error:
            offset, value = start + error.start, data[error.start]
            why = "is reserved for tokens" if value in (BOS, EOT) else f"is no UTF-8 ({error.reason})"
            raise InputError(
                f"{self.name}: byte 0x{value:02X} at offset {offset:,} {why}; accepted: text in UTF-8"
            ) from None
        self.bytes += len(piece)
        self._character = data[used:]


def _end_of_document(match: re.Match) -> bytes:
    # Looking back here, not in the pattern, lets that begin with plain characters: a much faster search.
    start = match.start()
    return bytes([EOT]) if start and match.string[start - 1] == ord("\n") else match[0]


def read_tokens(path: Path) -> tuple[Tensor, str, int]:
    """Reads a text file, plain or compressed.

    Returns:
        tokens [bytes] uint8; the SHA-256 of the (decompressed) text; its length in bytes.

    Raises:
        InputError: no such file, another suffix than `SUFFIXES`, damaged compression, empty, or not UTF-8.
    """
    tokeniser, buffer = Tokeniser(str(path)), bytearray()
    for piece in _pieces(path):
        buffer += tokeniser.feed(piece)
    buffer += tokeniser.feed(b"", last=True)
    if not buffer:
        raise InputError(f"{path}: the file is empty; accepted: text in UTF-8")
    return torch.frombuffer(buffer, dtype=torch.uint8), tokeniser.digest.hexdigest(), tokeniser.bytes


def _pieces(path: Path):
    import zlib
    from lzma import LZMAError

    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    try:
        with _open(path) as file:
            while piece := file.read(PIECE):
                yield piece
    except (EOFError, LZMAError, zlib.error) as error:
        raise InputError(f"{path}: the compressed file is damaged ({error})") from None
    except OSError as error:  # gzip reports damage as an OSError too, without an errno
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".xz":
        import lzma

        return lzma.open(path)
    if path.suffix.lower() == ".gz":
        import gzip

        return gzip.open(path)
    return open(path, "rb")


def cut_points(tokens: Tensor, fractions: tuple[float, ...]) -> list[int]:
    """Where to cut a text so that the parts end near the given fractions of its length.

    With enough documents (an `EOT` ends each), a cut is the document end nearest to its fraction, so that no
    document lies in two parts. Otherwise it is the next start of a character.

    Args:
        tokens: [bytes] uint8.
        fractions: increasing, each between 0 and 1.

    Returns:
        One position per fraction, strictly increasing, each with tokens before it and after it.

    Raises:
        InputError: too short for that many non-empty parts.
    """
    length = len(tokens)
    cuts = _document_cuts(tokens, fractions) or [_character_start(tokens, int(f * length)) for f in fractions]
    edges = [0, *cuts, length]
    if any(left >= right for left, right in zip(edges, edges[1:])):
        raise InputError(
            f"a text of {length} bytes is too short to be cut into {len(cuts) + 1} parts; "
            f"accepted: about {100 * (len(cuts) + 1)} bytes or more"
        )
    return cuts


def _document_cuts(tokens: Tensor, fractions: tuple[float, ...]) -> list[int] | None:
    ends = np.flatnonzero(tokens.numpy() == EOT) + 1
    ends = ends[ends < len(tokens)]
    cuts, low = [], 0
    for later, fraction in zip(range(len(fractions) - 1, -1, -1), fractions):
        free = ends[low : len(ends) - later]  # leaves a document end for each cut that follows
        if len(free) == 0:
            return None
        nearest = int(np.abs(free - fraction * len(tokens)).argmin())
        cuts.append(int(free[nearest]))
        low += nearest + 1
    return cuts


def _character_start(tokens: Tensor, position: int) -> int:
    while position < len(tokens) - 1 and int(tokens[position]) & 0xC0 == 0x80:  # inside a character
        position += 1
    return position
