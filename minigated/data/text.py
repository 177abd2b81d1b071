"""Text for the language models: a corpus in three splits, and batches that are a function of (seed, step)."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigated.data.sources import SOURCES, VISION, load_tokens
from minigated.data.streams import integers, share
from minigated.data.tokens import BOS, EOT, SUFFIXES, cut_points, read_tokens
from minigated.errors import InputError

FILES = Path(__file__).parent / "files"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMES = ("shakespeare", "sample", *SOURCES)


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of `text` as tokens.

    Returns:
        [bytes] uint8.

    Raises:
        InputError: `text` has a lone surrogate, which UTF-8 cannot write.
    """
    try:
        data = bytearray(text, "utf-8")
    except UnicodeEncodeError as error:
        what = f"character {text[error.start]!r} at {error.start}"
        raise InputError(f"{what} cannot be written in UTF-8; accepted: no lone surrogates") from None
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def decode(tokens: Tensor | list[int]) -> str:
    """Tokens back to text; BOS and EOT are dropped, broken characters become U+FFFD."""
    values = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    return bytes(value for value in values if value not in (BOS, EOT)).decode("utf-8", errors="replace")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits.

    Attributes:
        name: the name it was asked for by, or the file's name without its suffixes.
        sha256: of the raw text as used, decompressed, before any token replaced anything; texts that come as
            several files are hashed one after the other, in the order train, validation, test.
        bytes: length of that raw text.
        train, validation, test: [tokens] uint8.
    """

    name: str
    sha256: str
    bytes: int
    train: Tensor
    validation: Tensor
    test: Tensor


def load_text(name_or_path: str | os.PathLike, root: str | os.PathLike | None = None) -> Corpus:
    """Loads a text by name or by path.

    ``shakespeare`` (also called ``sample``) is embedded in the package. ``enwik8``, ``tinystories`` and
    ``wikitext2`` are downloaded on first use and have splits of their own. A path names a file in UTF-8,
    plain or compressed (`SUFFIXES`), in which a line ``<|endoftext|>`` ends a document; it and
    ``shakespeare`` are split by position, 90 % train, 5 % validation, 5 % test, and where there are documents
    every split holds whole ones.

    Args:
        name_or_path: one of `NAMES`, or a path.
        root: folder for downloads; see `minigated.data.data_root`.

    Raises:
        InputError: unknown name and no such file, text that cannot be used, or a download that failed.
    """
    name = os.fspath(name_or_path)
    if name in SOURCES:
        tokens, (first, second), sha256, size = load_tokens(name, root)
        return Corpus(name, sha256, size, tokens[:first], tokens[first:second], tokens[second:])
    if name in ("shakespeare", "sample"):
        name, path = "shakespeare", FILES / "tinyshakespeare.txt"
    else:
        path = Path(name).expanduser()
        if name in VISION or not path.is_file():
            kind = "is a set of images, not a text" if name in VISION else "is no file and no known text"
            accepted = f"{', '.join(NAMES)}, or a path ending in {', '.join(SUFFIXES)}"
            raise InputError(f"{name!r} {kind}; accepted: {accepted}")
        name = re.sub(r"\.txt(\.xz|\.gz)?$", "", path.name, flags=re.IGNORECASE)
    tokens, sha256, size = read_tokens(path)
    if name == "shakespeare" and path.parent == FILES and sha256 != SHAKESPEARE_SHA256:
        raise InputError(f"{path} has sha256 {sha256}, expected {SHAKESPEARE_SHA256}; restore the file")
    first, second = cut_points(tokens, (0.90, 0.95))
    return Corpus(name, sha256, size, tokens[:first], tokens[first:second], tokens[second:])


class TextBatches:
    """Windows of a text, drawn as a pure function of (seed, step).

    Every row has ``context + 1`` tokens: columns ``[:-1]`` are the inputs, columns ``[1:]`` the targets. With
    `bos`, column 0 is `bos_token` and ``context`` tokens of text follow.

    Args:
        tokens: [length] uint8 (bytes), or int32 of another tokenizer.
        context: inputs a row.
        batch: rows of the global batch.
        seed: of the draws.
        bos: whether every row starts with `bos_token`.
        bos_token: `BOS`, unless the tokenizer has its own.

    Raises:
        InputError: tokens of another shape or type, a size under 1, or a text shorter than one window.
    """

    def __init__(
        self,
        tokens: Tensor,
        context: int = 512,
        batch: int = 64,
        seed: int = 0,
        bos: bool = True,
        bos_token: int = BOS,
    ):
        if tokens.dim() != 1 or tokens.dtype not in (torch.uint8, torch.int32):
            raise InputError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; accepted: uint8 or int32, one dimension"
            )
        for name, value in (("context", context), ("batch", batch)):
            if value < 1:
                raise InputError(f"{name} {value} is too small; accepted: 1 or more")
        self.tokens, self.context, self.batch, self.seed, self.bos = tokens, context, batch, seed, bos
        self.bos_token = bos_token
        self.width = context if bos else context + 1  # tokens of text in a row
        if len(tokens) < self.width:
            unit = "bytes" if tokens.dtype == torch.uint8 else "tokens"
            raise InputError(
                f"the text has {len(tokens):,} {unit}, but a context of {context:,} takes "
                f"{self.width:,}; accepted: a longer text or a smaller context"
            )
        self._windows = tokens.unfold(0, self.width, 1)  # [length - width + 1, width], a view

    def at(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """The batch of `step`, or the part of it that belongs to one of `world` processes.

        Windows start at positions drawn uniformly, with replacement. The parts of all ranks, one after the
        other, are the batch of a single process.

        Returns:
            [batch / world, context + 1] int64, on the CPU.

        Raises:
            InputError: `world` does not divide the batch, or `rank` is outside 0 .. world - 1.
        """
        part = share(self.batch, rank, world)
        starts = integers(self.seed, step, self.batch, len(self._windows))[part]
        return self._rows(torch.from_numpy(starts))

    def sequential(self, count: int | None = None) -> Iterator[Tensor]:
        """Windows in order, for validation and test: every token is predicted at most once.

        Rows start every `context` tokens. Without `bos`, a row's first token is also the last target of the row
        before it; the targets do not overlap.

        Args:
            count: batches at most; all by default.

        Yields:
            [batch, context + 1] int64; the last one may have fewer rows, and a rest shorter than a row is
            left out.
        """
        starts = torch.arange(0, len(self._windows), self.context)
        for number, part in enumerate(starts.split(self.batch)):
            if count is not None and number >= count:
                return
            yield self._rows(part)

    def _rows(self, starts: Tensor) -> Tensor:
        rows = torch.full((len(starts), self.context + 1), self.bos_token, dtype=torch.int64)
        rows[:, self.context + 1 - self.width :] = self._windows[starts]
        return rows
