"""What ``python -m minigated data NAME`` does: fetch if needed, then say what is there."""

import os
from pathlib import Path

from minigated.data.folders import data_root
from minigated.data.images import damage, load_images
from minigated.data.sources import SOURCES, VISION
from minigated.data.text import FILES, load_text
from minigated.data.text import NAMES as TEXTS
from minigated.errors import InputError

NAMES = TEXTS + VISION
_CIFAR10 = {
    "licence": "its authors state none; they ask for the citation",
    "citation": "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, technical report, "
    "University of Toronto, 2009",
    "home": "https://www.cs.toronto.edu/~kriz/cifar.html",
}
IMAGE_FACTS = {
    "cifar10": {
        "title": "CIFAR-10: 60,000 photographs of 10 kinds of things",
        "splits": "its own test; 500 of each class are held out of train",
        **_CIFAR10,
    },
    "cifar10-sample": {
        "title": "A sample of CIFAR-10: 2,500 of its 60,000 photographs",
        "splits": "each taken from the same split of the full set",
        **_CIFAR10,
    },
    "mini-imagenet": {
        "title": "Mini-ImageNet: 60,000 photographs of ImageNet in 100 classes",
        "splits": "its own held-out part is the test; 50 of each class are held out of train",
        "licence": "ImageNet's terms: for non-commercial research and education, not for redistribution",
        "citation": "O. Vinyals and others, Matching Networks for One Shot Learning, arXiv:1606.04080, 2016, and "
        "O. Russakovsky and others, ImageNet Large Scale Visual Recognition Challenge, IJCV 115, 2015",
        "home": "https://huggingface.co/datasets/timm/mini-imagenet",
    },
}


def prepare(name: str, root: str | os.PathLike | None = None, size: int | None = None) -> dict:
    """Makes a named text or set of images, or a folder of images, ready for use and sums it up.

    Args:
        name: one of `NAMES`, or a folder of class folders.
        root: folder for downloads; see `minigated.data.data_root`.
        size: side of the images, see `minigated.data.load_images`; not for texts.

    Returns:
        name, title, place (a path), sha256, what the three splits hold and how they were made, licence, citation,
        home; for texts the bytes of the raw text, for images classes, size and origin.

    Raises:
        InputError: unknown name, the download failed, or pixels in the cache that have changed.
    """
    if name in VISION or (name not in TEXTS and Path(name).expanduser().is_dir()):
        return _prepare_images(name, root, size)
    if name not in TEXTS:
        accepted = f"{', '.join(NAMES)}, or a folder of class folders"
        raise InputError(f"unknown data set {name!r}; accepted: {accepted}")
    if size is not None:
        raise InputError(f"size {size} for the text {name}; accepted: sizes for sets of images only")
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


def _prepare_images(name: str, root: str | os.PathLike | None, size: int | None) -> dict:
    images = load_images(name, root, size)
    if trouble := damage(images):
        raise InputError(trouble)
    unknown = {"title": f"Images of {images.name}", "splits": "the folder's own; what it lacks is held out of train",
               "licence": "yours to know", "citation": "-", "home": "-"}  # fmt: skip
    return {
        "name": images.name,
        **IMAGE_FACTS.get(name, unknown),
        "place": str(images.place),
        "origin": images.origin,
        "classes": len(images.classes),
        "size": images.size,
        "mean": images.mean,
        "std": images.std,
        "sha256": images.sha256,
        "train": len(images.train),
        "validation": len(images.validation),
        "test": len(images.test),
    }


def describe(name: str, root: str | os.PathLike | None = None, size: int | None = None) -> str:
    """`prepare` as text for a terminal."""
    facts = prepare(name, root, size)
    parts = " / ".join(f"{facts[split]:,}" for split in ("train", "validation", "test"))
    if "classes" in facts:
        middle = (
            f"  from      {facts['origin']}",
            f"  images    {facts['size']} x {facts['size']}, {facts['classes']} classes, sha256 {facts['sha256']}",
            f"  colours   mean {_three(facts['mean'])}, deviation {_three(facts['std'])} (of train, values 0 to 1)",
        )
    else:
        middle = (f"  text      {facts['bytes']:,} bytes, sha256 {facts['sha256']}",)
    return "\n".join(
        (
            facts["title"],
            f"  place     {facts['place']}",
            *middle,
            f"  splits    {parts} {'images' if 'classes' in facts else 'tokens'}, train / validation / test "
            f"({facts['splits']})",
            f"  licence   {facts['licence']}",
            f"  citation  {facts['citation']}",
            f"  home      {facts['home']}",
        )
    )


def _three(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
