"""Passkey retrieval (Landmark Attention, arXiv 2305.16300): a number hidden in a text of bytes, asked for at its end.

A window of `context` + 1 tokens is a BOS and text; over the text are written

- at some depth: `` The pass key is 52917. ``
- at the end: `` What is the pass key? The pass key is 52917``

so that the last targets are the digits of the answer. The text loses the bytes that are written over; its length does
not depend on the key. A model that has never seen such windows answers at the floor: `PasskeyBatches` mixes them into
the training text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigated.data.streams import integers, uniforms
from minigated.data.text import TextBatches, encode
from minigated.errors import InputError

BEFORE, AFTER = " The pass key is ", ". "
QUESTION = " What is the pass key? The pass key is "
CHANCE = 0.1  # a digit guessed by a model that knows it is one; a whole key of n digits: 0.1 ** n

_CHOSEN, _DEPTHS, _KEYS, _TESTED = range(1, 5)  # streams of random numbers; 0 is that of the text


def room(context: int, digits: int = 5) -> int:
    """Places at which the passkey sentence can start in a window.

    Raises:
        InputError: the window is too short for the sentence and the question.
    """
    least = 1 + len(BEFORE) + len(AFTER) + len(QUESTION) + 2 * digits
    if digits < 1 or context + 1 < least:
        raise InputError(
            f"a context of {context} cannot hold a passkey of {digits} digits; accepted: {least - 1} or more, "
            f"and at least 1 digit"
        )
    return context + 2 - least


def write_passkeys(windows: Tensor, keys: Tensor, depths: Tensor) -> Tensor:
    """Windows of text with a passkey sentence and its question written over them.

    Args:
        windows: [B, context + 1] int64, column 0 is BOS. keys: [B, digits] int64, each 0 .. 9.
        depths: [B] float64, 0 for the start of the window, 1 for just before the question.

    Returns:
        [B, context + 1] int64; `windows` stays as it was.

    Raises:
        InputError: a depth outside 0 to 1, or windows that are too short.
    """
    if len(depths) and not (0 <= float(depths.min()) and float(depths.max()) <= 1):
        raise InputError(f"depths are {float(depths.min()):g} to {float(depths.max()):g}; accepted: 0 to 1")
    digits = keys.shape[1]
    starts = 1 + (depths * (room(windows.shape[1] - 1, digits) - 1)).round().long()  # [B]
    answers = keys + ord("0")  # [B, digits]

    def said(text: str) -> Tensor:
        return encode(text).long().expand(len(windows), -1)

    sentence = torch.cat((said(BEFORE), answers, said(AFTER)), dim=1)  # [B, S]
    question = torch.cat((said(QUESTION), answers), dim=1)  # [B, Q]
    written = windows.scatter(1, starts[:, None] + torch.arange(sentence.shape[1]), sentence)
    written[:, -question.shape[1] :] = question
    return written


class PasskeyBatches:
    """Windows of a text of which a share holds a passkey; a pure function of (seed, step), like `TextBatches`.

    Args:
        tokens: [length] uint8. context, batch, seed: as in `TextBatches`.
        mixed: share of the windows that hold a passkey, at a depth drawn uniformly.
        digits: of a passkey.

    Raises:
        InputError: as in `TextBatches`; a share outside 0 to 1; a context that is too short.
    """

    def __init__(self, tokens: Tensor, context: int = 512, batch: int = 64, seed: int = 0, mixed=0.5, digits: int = 5):
        if not 0 <= mixed <= 1:
            raise InputError(f"the share of windows with a passkey is {mixed!r}; accepted: 0 to 1")
        room(context, digits)
        self.text = TextBatches(tokens, context, batch, seed)
        self.mixed, self.digits = mixed, digits

    def at(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """The batch of `step`, or one process's part of it: [batch / world, context + 1] int64, on the CPU."""
        windows, seed, batch = self.text.at(step, rank, world), self.text.seed, self.text.batch
        part = slice(rank * len(windows), (rank + 1) * len(windows))
        keys = integers(seed, step, batch * self.digits, 10, _KEYS).reshape(batch, self.digits)[part]
        depths = uniforms(seed, step, batch, _DEPTHS)[part]
        chosen = torch.from_numpy(uniforms(seed, step, batch, _CHOSEN)[part] < self.mixed)
        written = write_passkeys(windows, torch.from_numpy(keys), torch.from_numpy(depths))
        return torch.where(chosen[:, None], written, windows)


def passkey_windows(
    tokens: Tensor, context: int, depth: float, count: int = 32, seed: int = 0, digits: int = 5
) -> Tensor:
    """Windows to test with, each with a passkey at `depth`; the same texts and keys at every depth.

    Args:
        tokens: [length] uint8, a held-out text. context: inputs a window. depth: 0 to 1. count: windows.

    Returns:
        [count, context + 1] int64; the last `digits` targets are the answer.
    """
    windows = TextBatches(tokens, context, count, seed).at(0)
    keys = torch.from_numpy(integers(seed, 0, count * digits, 10, _TESTED).reshape(count, digits))
    return write_passkeys(windows, keys, torch.full((count,), float(depth), dtype=torch.float64))


@torch.no_grad()
def passkey_accuracy(
    model,
    tokens: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    count: int = 32,
    batch: int = 8,
    seed: int = 0,
    digits: int = 5,
) -> list[dict]:
    """How often a model finds the passkey, by length and depth.

    One pass a window with the answer in place is enough: greedy decoding gives the right key exactly where every
    digit is the likeliest next byte after the right ones before it.

    Args:
        model: tokens [B, T] -> logits [B, T, 256]. tokens: a held-out text, [length] uint8.
        lengths: contexts. depths: see `write_passkeys`. count: windows of each length and depth.
        batch: windows a pass. seed: of texts and keys. digits: of a passkey.

    Returns:
        For each length and depth: length, depth, count, exact (share of keys right in all digits; chance
        0.1 ** digits) and digit (share of digits right; chance 0.1).
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rows = []
    for length in lengths:
        for depth in depths:
            right = []
            for windows in passkey_windows(tokens, length, depth, count, seed, digits).to(device).split(batch):
                guessed = model(windows[:, :-1])[:, -digits:].argmax(-1)  # [b, digits]
                right.append(guessed == windows[:, -digits:])
            found = torch.cat(right)  # [count, digits]
            exact, digit = found.all(1).float().mean().item(), found.float().mean().item()
            rows.append({"length": length, "depth": depth, "count": count, "exact": exact, "digit": digit})
    model.train(was_training)
    return rows
