"""Which tokenizer a run trains with, and which one a folder was trained with."""

import re
from pathlib import Path

from minigated.data import Corpus
from minigated.data.bpe import FILE, BytePairTokenizer, train_bpe
from minigated.data.tokenizer import ByteTokenizer
from minigated.errors import InputError


def choose_tokenizer(name: str, corpus: Corpus, out: str | None = None, resume: bool = False):
    """The tokenizer called `name`: "bytes", or "bpe:VOCABULARY", trained on the corpus's training split.

    Args:
        out: folder of the run. resume: take the byte-pair tokenizer from there, if it holds one.

    Raises:
        InputError: unknown name, a vocabulary that the text cannot fill, or another one in the folder.
    """
    if name == "bytes":
        return ByteTokenizer()
    match = re.fullmatch(r"bpe:(\d+)", name)
    if match is None:
        raise InputError(f"unknown tokenizer {name!r}; accepted: bytes, or bpe:VOCABULARY such as bpe:1024")
    if not (resume and out is not None and (Path(out) / FILE).is_file()):
        return train_bpe(corpus.train, int(match[1]))
    found = read_tokenizer(out)
    if found.vocabulary != int(match[1]):
        raise InputError(f"cannot resume: the tokenizer in {out} is {found.name!r}, and {name!r} was asked for")
    return found


def read_tokenizer(folder: str | Path):
    """The tokenizer of a folder's tokenizer.json; bytes where there is none."""
    from minigated.interop import load_tokenizer

    return BytePairTokenizer(load_tokenizer(folder)) if (Path(folder) / FILE).exists() else ByteTokenizer()


def refuse_other_vocabulary(tokenizer, vocabulary: int, folder: str | Path, padded: bool = False) -> None:
    """Refuses a tokenizer that is not the one a model was trained with.

    Args:
        vocabulary: of the model. padded: it may be larger than the tokenizer's, as in released models.
    """
    fits = tokenizer.vocabulary <= vocabulary if padded else tokenizer.vocabulary == vocabulary
    if fits:
        return
    if isinstance(tokenizer, ByteTokenizer):
        raise InputError(f"the model in {folder} has {vocabulary} tokens, not the 256 of bytes, and {FILE} is missing")
    raise InputError(f"the model in {folder} has {vocabulary} tokens, its {FILE} has {tokenizer.vocabulary}")
