"""Toy tasks whose every regularity is known."""

import functools

import numpy as np
import torch
from torch import Tensor

from minigated.data.streams import integers, share, uniforms
from minigated.data.text import FILES
from minigated.errors import InputError, one_of

TRIGGERS = "tens"
IGNORED = -100  # the target that torch's cross entropy leaves out by default

_TRAINING, _BATCHES, _FRESH = range(3)  # streams of random numbers, so that one seed can serve all three


class BackcopyTask:
    """Bigram-backcopy: sequences of characters with one rule that only attention can learn.

    The characters are the 65 of TinyShakespeare; their frequencies, and how often one follows another (the
    bigram table), are counted over the whole text. Character by character:

    - position 0 is BOS;
    - position 1 is drawn from the frequencies;
    - after a trigger (t, e, n or s), the character before the trigger is repeated, unless that is BOS;
    - everything else is drawn from the bigram table, given the character before.

    So "at" is always followed by "a". Two triggers in a row, possible only at positions 1 and 2, alternate to
    the end.

    A sequence of `length` tokens gives ``length - 1`` pairs: `inputs` are all tokens but the last, `targets`
    all but the first, and the target of position 0 is left out of the loss.

    Args:
        sequences: drawn once, to train on.
        length: tokens a sequence, BOS included.
        seed: of the sequences and of the batches.
        batch: sequences a batch.

    Attributes:
        characters: the 65 characters, sorted; a character's id is its place.
        vocabulary: 66, the characters and BOS.
        bos: id of BOS, the last one.
        triggers: [4] int64, ids of the triggers.
        frequencies: [65] float64, sums to 1.
        bigrams: [65, 65] float64, row = the character before; each row sums to 1.
        tokens: [sequences, length] int64.

    Raises:
        InputError: sequences or batch under 1, length under 3, or a seed out of range.
    """

    def __init__(self, sequences: int = 4096, length: int = 65, seed: int = 0, batch: int = 64):
        for name, value, least in (("sequences", sequences, 1), ("length", length, 3), ("batch", batch, 1)):
            if value < least:
                raise InputError(f"{name} {value} is too small; accepted: {least} or more")
        self.characters, self.frequencies, self.bigrams = _statistics()
        self.bos = len(self.characters)
        self.vocabulary = self.bos + 1
        self.triggers = torch.tensor([self.characters.index(trigger) for trigger in TRIGGERS])
        self.length, self.seed, self.batch = length, seed, batch
        self.tokens = self._draw(sequences, seed, _TRAINING)  # [sequences, length]

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """The training sequences of `step`, drawn with replacement: a pure function of (seed, step).

        Returns:
            [batch / world, length] int64; the parts of all ranks, one after the other, are the whole batch.
        """
        part = share(self.batch, rank, world)
        chosen = integers(self.seed, step, self.batch, len(self.tokens), _BATCHES)
        return self.tokens[torch.from_numpy(chosen[part])]

    def fresh(self, count: int, seed: int) -> Tensor:
        """New sequences for a test, [count, length] int64; never those of training, whatever the seed."""
        return self._draw(count, seed, _FRESH)

    def is_trigger(self, tokens: Tensor) -> Tensor:
        """Where a trigger stands, bool of the same shape."""
        return torch.isin(tokens, self.triggers.to(tokens.device))

    def inputs(self, tokens: Tensor) -> Tensor:
        """[B, length] -> [B, length - 1]: what the model reads."""
        return tokens[:, :-1]

    def targets(self, tokens: Tensor) -> Tensor:
        """[B, length] -> [B, length - 1]: next tokens; at position 0 `IGNORED`, which the loss skips."""
        targets = tokens[:, 1:].clone()
        targets[:, 0] = IGNORED
        return targets

    def decode(self, row: Tensor) -> str:
        """One sequence [T] as text, BOS as ``^``."""
        return "".join((*self.characters, "^")[token] for token in row.tolist())

    def entropy(self, kind: str = "all", first: int = 1) -> float:
        """The lowest loss that any model can reach on fresh sequences, in nats a token.

        It is the mean over queries `first` .. ``length - 2`` of the entropy of the next token given all
        before it: that of a row of the bigram table where the next token is drawn, 0 where it is copied. The
        chance of each pair of neighbours is carried along exactly, position by position.

        Args:
            kind: "all" queries, or those whose character is a "trigger", or the "other" ones. Triggers at
                position 1 copy nothing, so that "trigger" is 0 only from `first` = 2 on.
            first: the first query that counts; 1 is what the loss counts.

        Raises:
            InputError: unknown kind, or `first` outside 1 .. length - 2.
        """
        one_of("kind", kind, ("all", "trigger", "other"))
        if not 1 <= first <= self.length - 2:
            raise InputError(f"first query {first} is out of range; accepted: 1 to {self.length - 2}")
        row_entropy = -(self.bigrams * np.log(np.where(self.bigrams > 0, self.bigrams, 1))).sum(1)  # [65]
        trigger = np.isin(np.arange(self.bos), self.triggers.numpy())
        counted = {"all": np.ones_like(trigger), "trigger": trigger, "other": ~trigger}[kind]
        pair = np.zeros((self.vocabulary, self.bos))  # chance of (character before, the query's)
        pair[self.bos] = self.frequencies
        nats = queries = 0.0
        for query in range(1, self.length - 1):
            copied = pair * trigger
            copied[self.bos] = 0
            drawn = (pair - copied).sum(0)  # [65]
            if query >= first:
                nats += (drawn * row_entropy)[counted].sum()
                queries += pair[:, counted].sum()
            pair = np.zeros_like(pair)
            pair[: self.bos] = drawn[:, None] * self.bigrams + copied[: self.bos].T
        return float(nats / queries)

    def _draw(self, count: int, seed: int, stream: int) -> Tensor:
        chance = uniforms(seed, 0, count * self.length, stream).reshape(self.length, count)
        # Row c: the bigram row of c summed up; last row (BOS): the frequencies. A chance falls into one
        # interval.
        steps = np.concatenate((self.bigrams, self.frequencies[None])).cumsum(1)  # [66, 65]
        steps /= steps[:, -1:]
        tokens = np.full((count, self.length), self.bos)
        triggers = self.triggers.numpy()
        for position in range(1, self.length):
            last = tokens[:, position - 1]
            tokens[:, position] = (steps[last] <= chance[position][:, None]).sum(1)
            if position > 1:
                earlier = tokens[:, position - 2]
                copied = np.isin(last, triggers) & (earlier != self.bos)
                tokens[copied, position] = earlier[copied]
        return torch.from_numpy(tokens)


@functools.cache
def _statistics() -> tuple[str, np.ndarray, np.ndarray]:
    """Characters of TinyShakespeare, their frequencies [65], and the bigram table [65, 65]."""
    text = np.frombuffer((FILES / "tinyshakespeare.txt").read_bytes(), dtype=np.uint8)  # ASCII
    values, ids = np.unique(text, return_inverse=True)
    counts = np.zeros((len(values), len(values)))
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    frequencies, bigrams = np.bincount(ids) / len(ids), counts / counts.sum(1, keepdims=True)
    return values.tobytes().decode("ascii"), frequencies, bigrams
