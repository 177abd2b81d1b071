"""What ``python -m minigated data NAME`` does: fetch if needed, then say what is there."""

import os

from minigated.data.folders import data_root
from minigated.data.sources import SOURCES, VISION
from minigated.data.text import FILES, NAMES, load_text
from minigated.errors import InputError, one_of


def prepare(name: str, root: str | os.PathLike | None = None) -> dict:
    """Makes a named text ready for use and sums it up.

    Args:
        name: one of `minigated.data.text.NAMES`.
        root: folder for downloads; see `minigated.data.data_root`.

    Returns:
        name, title, place (a path), bytes and sha256 of the raw text, tokens per split, and licence,
        citation, home.

    Raises:
        InputError: unknown name, or the download failed.
    """
    if name in VISION:
        raise InputError(f"{name} comes with the vision chapters, not here yet; accepted: {', '.join(NAMES)}")
    one_of("data set", name, NAMES)
    corpus = load_text(name, root)
    source = SOURCES.get(corpus.name)
    place = data_root(root) / corpus.name / "tokens.bin" if source else FILES / "tinyshakespeare.txt"
    return {
        "name": corpus.name,
        "title": source.title if source else "TinyShakespeare: passages from Shakespeare's plays",
        "place": str(place),
        "bytes": corpus.bytes,
        "sha256": corpus.sha256,
        "train": len(corpus.train),
        "validation": len(corpus.validation),
        "test": len(corpus.test),
        "splits": source.splits if source else "by position, 90 / 5 / 5 %",
        "licence": source.licence if source else "public domain",
        "citation": source.citation if source else "A. Karpathy, char-rnn, 2015, for the selection",
        "home": source.home if source else "https://huggingface.co/datasets/karpathy/tiny_shakespeare",
    }


def describe(name: str, root: str | os.PathLike | None = None) -> str:
    """`prepare` as text for a terminal."""
    facts = prepare(name, root)
    parts = " / ".join(f"{facts[split]:,}" for split in ("train", "validation", "test"))
    return "\n".join(
        (
            facts["title"],
            f"  place     {facts['place']}",
            f"  text      {facts['bytes']:,} bytes, sha256 {facts['sha256']}",
            f"  splits    {parts} tokens, train / validation / test ({facts['splits']})",
            f"  licence   {facts['licence']}",
            f"  citation  {facts['citation']}",
            f"  home      {facts['home']}",
        )
    )
