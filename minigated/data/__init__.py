"""Texts, toy tasks and downloads."""

from minigated.data.catalogue import describe, prepare
from minigated.data.download import fetch
from minigated.data.folders import data_root
from minigated.data.text import Corpus, TextBatches, decode, encode, load_text
from minigated.data.tokens import BOS, EOT

__all__ = [
    "BOS",
    "EOT",
    "Corpus",
    "TextBatches",
    "data_root",
    "decode",
    "describe",
    "encode",
    "fetch",
    "load_text",
    "prepare",
]
