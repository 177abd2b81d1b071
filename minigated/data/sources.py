"""The texts that are downloaded: where they live, what they hash to, how they are split."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigated.data.download import fetch
from minigated.data.folders import data_root, make_folder, one_at_a_time
from minigated.data.tokens import PIECE, Tokeniser, cut_points
from minigated.errors import InputError

VISION = ("cifar10", "cifar10-sample", "mini-imagenet")
FORMAT = 1  # of the token file; another number has it made again from the download

Split = Callable[[Tensor, list[int]], tuple[int, int]]  # (tokens, where each part ends) -> the two cuts


@dataclass(frozen=True)
class Download:
    """A file at a public home: a zip file, of which `members` are read in order, or the text itself."""

    file: str
    urls: tuple[str, ...]
    bytes: int
    sha256: str | None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A named text; its parts, one after the other in the order of `downloads`, are cut by `split`."""

    name: str
    title: str
    home: str
    licence: str
    citation: str
    splits: str
    downloads: tuple[Download, ...]
    split: Split


def by_bytes(first: int, second: int) -> Split:
    """Cuts at fixed positions."""
    return lambda tokens, ends: (first, second)


def by_part(tokens: Tensor, ends: list[int]) -> tuple[int, int]:
    """The parts are train, validation and test."""
    return ends[0], ends[1]


def held_out_halved(tokens: Tensor, ends: list[int]) -> tuple[int, int]:
    """The parts are train and a held-out text; the first half of its documents validates, the other tests."""
    return ends[0], ends[0] + cut_points(tokens[ends[0] :], (0.5,))[0]


_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
_WIKITEXT = "wikitext-2-raw-v1.zip"

# The hashes are those that the public homes, or several independent users of the same files, publish. The two
# files of TinyStories and the mirror of WikiText-2 are pinned to a revision.
SOURCES = {
    source.name: source
    for source in (
        Source(
            "enwik8",
            "enwik8: the first 100,000,000 bytes of an English Wikipedia dump of 3 March 2006",
            home="https://mattmahoney.net/dc/textdata.html",
            licence="Wikipedia's text: CC BY-SA 3.0 and GFDL",
            citation="M. Mahoney, Large Text Compression Benchmark, 2006",
            splits="90,000,000 / 5,000,000 / 5,000,000 bytes, as is customary",
            downloads=(
                Download(
                    "enwik8.zip",
                    ("https://mattmahoney.net/dc/enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip"),
                    36_445_475,
                    "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                    ("enwik8",),
                ),
            ),
            split=by_bytes(90_000_000, 95_000_000),
        ),
        Source(
            "tinystories",
            "TinyStories, version 2: short stories by GPT-4 in words a young child knows",
            home="https://huggingface.co/datasets/roneneldan/TinyStories",
            licence="CDLA-Sharing-1.0",
            citation="R. Eldan and Y. Li, TinyStories: How Small Can Language Models Be and Still Speak Coherent "
            "English?, arXiv:2305.07759, 2023",
            splits="its own train file; of its validation file the first half validates, the second tests",
            downloads=(
                Download(
                    "TinyStoriesV2-GPT4-train.txt",
                    (f"{_STORIES}/TinyStoriesV2-GPT4-train.txt",),
                    2_227_753_162,
                    "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
                ),
                Download(
                    "TinyStoriesV2-GPT4-valid.txt",
                    (f"{_STORIES}/TinyStoriesV2-GPT4-valid.txt",),
                    22_502_601,
                    "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
                ),
            ),
            split=held_out_halved,
        ),
        Source(
            "wikitext2",
            "WikiText-2, raw: good and featured articles of the English Wikipedia",
            home="https://huggingface.co/datasets/Salesforce/wikitext",
            licence="CC BY-SA 3.0",
            citation="S. Merity, C. Xiong, J. Bradbury and R. Socher, Pointer Sentinel Mixture Models, "
            "arXiv:1609.07843, 2016",
            splits="its own three files",
            downloads=(
                Download(
                    _WIKITEXT,
                    (
                        f"https://wikitext.smerity.com/{_WIKITEXT}",  # kept by the data set's first author
                        f"https://huggingface.co/datasets/ggml-org/ci/resolve/"
                        f"927b3642933080f1b0e811e2f916e14c292992f9/{_WIKITEXT}",
                    ),
                    4_721_645,
                    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
                    tuple(f"wikitext-2-raw/wiki.{split}.raw" for split in ("train", "valid", "test")),
                ),
            ),
            split=by_part,
        ),
    )
}


def load_tokens(name: str, root: str | os.PathLike | None = None) -> tuple[Tensor, tuple[int, int], str, int]:
    """Loads a source, after downloading and preparing it if this is the first time.

    The prepared text lies in ``ROOT/NAME/tokens.bin`` and is mapped into memory, not read: a start is
    instant, and a text larger than memory can be used. The downloads beside it are no longer needed then.

    Returns:
        tokens [length] uint8; the two cuts between the splits; SHA-256 and length of the raw text.

    Raises:
        InputError: unknown name, download failed, or a damaged file.
    """
    folder = data_root(root) / name
    note = _ready(folder)
    if note is None:
        make_folder(folder)
        with one_at_a_time(folder):
            note = _ready(folder) or _build(SOURCES[name], folder)
    tokens = torch.from_file(str(folder / "tokens.bin"), size=note["tokens"], dtype=torch.uint8)
    return tokens, tuple(note["cuts"]), note["sha256"], note["bytes"]


def _ready(folder: Path) -> dict | None:
    try:
        note = json.loads((folder / "tokens.json").read_text())
        whole = note["format"] == FORMAT and (folder / "tokens.bin").stat().st_size == note["tokens"]
        return note if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut short: made again
        return None


def _build(source: Source, folder: Path) -> dict:
    paths = [fetch(file.urls, folder / file.file, file.sha256) for file in source.downloads]
    part, note_part = folder / "tokens.bin.part", folder / "tokens.json.part"
    try:
        note = {"format": FORMAT, "name": source.name, **_write_tokens(source, paths, part)}
        note_part.write_text(json.dumps(note, indent=1) + "\n")
        os.replace(part, folder / "tokens.bin")
        os.replace(note_part, folder / "tokens.json")  # last: it says that all is there
    except OSError as error:
        raise InputError(f"cannot write {error.filename or part}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
        note_part.unlink(missing_ok=True)
    return note


def _write_tokens(source: Source, paths: list[Path], part: Path) -> dict:
    digest, size, ends = None, 0, []
    with open(part, "wb") as out:
        for file, path in zip(source.downloads, paths):
            for member in file.members or (None,):
                tokeniser = Tokeniser(f"{path} ({member})" if member else str(path), digest)
                for piece in _pieces(path, member):
                    out.write(tokeniser.feed(piece))
                out.write(tokeniser.feed(b"", last=True))
                digest, size = tokeniser.digest, size + tokeniser.bytes
                ends.append(out.tell())
    tokens = torch.from_file(str(part), size=ends[-1], dtype=torch.uint8)
    cuts = source.split(tokens, ends)
    return {"sha256": digest.hexdigest(), "bytes": size, "tokens": ends[-1], "cuts": cuts}


def _pieces(path: Path, member: str | None) -> Iterator[bytes]:
    """The bytes of a file, or of a member of a zip file, with a progress bar for the large ones."""
    from zlib import error as DeflateError

    from tqdm import tqdm

    try:
        archive = zipfile.ZipFile(path) if member else None
        size = archive.getinfo(member).file_size if archive else path.stat().st_size
        with (
            archive.open(member) if archive else open(path, "rb") as file,
            tqdm(desc=member or path.name, total=size, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while piece := file.read(PIECE):
                yield piece
                bar.update(len(piece))
    except (zipfile.BadZipFile, KeyError, EOFError, DeflateError) as error:
        raise InputError(
            f"{path} is no zip file with a sound {member!r} ({error}); delete it to download it again"
        ) from None
