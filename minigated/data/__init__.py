"""Texts, images, toy tasks and downloads."""

from minigated.data.augment import Augment
from minigated.data.augment_config import AugmentConfig
from minigated.data.catalogue import describe, prepare
from minigated.data.download import fetch
from minigated.data.folders import data_root
from minigated.data.images import ImageBatches, ImageSet, ImageSplit, load_images
from minigated.data.text import Corpus, TextBatches, decode, encode, load_text
from minigated.data.tokens import BOS, EOT

__all__ = [
    "BOS",
    "EOT",
    "Augment",
    "AugmentConfig",
    "Corpus",
    "ImageBatches",
    "ImageSet",
    "ImageSplit",
    "TextBatches",
    "data_root",
    "decode",
    "describe",
    "encode",
    "fetch",
    "load_images",
    "load_text",
    "prepare",
]
