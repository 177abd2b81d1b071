"""Checks of chapter 8: loss by position, the passkey score."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import call, draw, expect_cases, expect_good_manners, expect_untouched, refuse


# ---------------------------------------------------------------------------------------------- 8.7
def losses_by_loops(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T]: log of the sum of exponentials minus the target's logit."""
    rows = [[torch.log(x.exp().sum()) - x[t] for x, t in zip(*pair)] for pair in zip(logits, targets.tolist())]
    return torch.stack([torch.stack(row) for row in rows])


def bins_reference(logits: Tensor, targets: Tensor, edges: list) -> Tensor:
    losses = losses_by_loops(logits, targets)
    sums = [losses[:, a:b].sum() / (losses.shape[0] * (b - a)) for a, b in zip(edges, edges[1:])]
    return torch.stack(sums)


def bins_suspects(logits: Tensor, targets: Tensor, edges: list) -> dict[str, Tensor]:
    losses, pairs = losses_by_loops(logits, targets), list(zip(edges, edges[1:]))
    right = bins_reference(logits, targets, edges)
    picked = logits.gather(2, targets[..., None])[..., 0]  # [B, T]
    bins = lambda values: torch.stack([values[:, a:b].mean() for a, b in pairs])
    wrong = {
        "the sign is wrong: a loss is minus the logarithm": -right,
        "that is a perplexity; the loss is its logarithm": right.exp(),
        "bits, not nats: the logarithm is to base 2": right / math.log(2),
        "each bin is a sum: divide by its positions": torch.stack([losses[:, a:b].mean(0).sum() for a, b in pairs]),
        "each bin is summed over the batch: divide by its rows": bins(losses) * len(losses),
        "a bin holds all positions before its end: start at edges[i]": torch.stack(
            [losses[:, :b].mean() for _, b in pairs]
        ),
        "a bin does not hold its end, edges[i + 1]": torch.stack([losses[:, a : b + 1].mean() for a, b in pairs]),
        "only the first row of the batch is measured": bins(losses[:1]),
        "the logits are not normalised: apply a log-softmax": bins(-picked),
        "that is the probability of the target, not its loss": bins((-losses).exp()),
        "the logarithm of the mean probability is not the mean of the logarithms": -bins((-losses).exp()).log(),
        "every bin is the mean over all positions": right * 0 + losses[:, edges[0] : edges[-1]].mean(),
        "the softmax runs over positions instead of the vocabulary": bins(
            logits.exp().sum(1, keepdim=True).log().expand_as(logits).gather(2, targets[..., None])[..., 0] - picked
        ),
    }
    return {message: value for message, value in wrong.items()}


@exercise(
    "8.7",
    "Loss by position",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "F.cross_entropy with reduction='none' keeps every token's loss; it wants the vocabulary as axis 1. zip(edges, "
        "edges[1:]) gives start and end of every bin."
    ),
    pseudo="losses [B, T] = -log softmax(logits) at the target\nfor a, b in neighbouring edges: mean of losses[:, a:b]",
)
def loss_by_bin(f):
    targets = torch.tensor([[0, 2, 1, 4, 3, 0], [1, 1, 0, 2, 4, 3]])
    logits = 2 * draw(2, 6, 5)
    cases = {
        "with equal logits every token costs log V": (torch.zeros(2, 6, 5, dtype=torch.float64), targets, [0, 2, 6]),
        "wrong values": (logits, targets, [0, 1, 3, 6]),
        "wrong values when the bins start late and end early": (logits, targets, [1, 2, 5]),
    }
    telling = dict(list(cases.items())[1:])
    expect_cases(f, bins_reference, telling, bins_suspects)
    expect_cases(f, bins_reference, cases, lambda *_: {})
    by_logits = lambda x: f(x, targets.clone(), [0, 2, 6])
    reference = lambda x: bins_reference(x, targets, [0, 2, 6])
    expect_good_manners(by_logits, reference, {"logits": logits})


# ---------------------------------------------------------------------------------------------- 8.8
def score_suspects(logits: Tensor, windows: Tensor, digits: int) -> dict[str, tuple[float, float]]:
    guessed, count = logits.argmax(-1), len(windows)

    def score(right: Tensor) -> tuple[float, float]:
        return right.double().mean().item(), right.all(1).double().mean().item()

    digit, exact = score(guessed[:, -digits:] == windows[:, -digits:])
    wrong = {
        "logits at position t are compared with the byte at t; they guess the byte at t + 1": score(
            guessed[:, -digits:] == windows[:, -digits - 1 : -1]
        ),
        "one position too early: the last logits guess the last byte": score(
            guessed[:, -digits - 1 : -1] == windows[:, -digits:]
        ),
        "all positions are scored, not the answer's": score(guessed == windows[:, 1:]),
        "a key counts as found when any of its digits is right; all must be": (
            digit,
            (guessed[:, -digits:] == windows[:, -digits:]).any(1).double().mean().item(),
        ),
        "the two numbers are exchanged: digits first": (exact, digit),
        "these are counts; shares are asked for": (digit * count * digits, exact * count),
        "in percent; shares are asked for": (100 * digit, 100 * exact),
        "only the last digit is scored": score(guessed[:, -1:] == windows[:, -1:]),
        "the share of whole keys is not a power of the share of digits": (digit, digit**digits),
        "the least likely byte is taken": score(logits.argmin(-1)[:, -digits:] == windows[:, -digits:]),
    }
    return {message: pair for message, pair in wrong.items() if pair != (digit, exact)}


def key_case(rows: list[str], said: list[str], length: int = 12) -> tuple[Tensor, Tensor]:
    """Windows that end with `rows`, and logits whose likeliest bytes over the answer are `said`."""
    windows = torch.tensor([list(("x" * (length + 1 - len(r)) + r).encode()) for r in rows])  # [B, T + 1]
    logits = draw(len(rows), length, 256) * 0.1
    for row, answer in enumerate(said):
        for place, byte in enumerate(answer.encode()):
            logits[row, length - len(answer) + place, byte] = 5.0
    return logits, windows


@exercise(
    "8.8",
    "Score passkeys",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "The last `digits` positions of the logits guess the last `digits` bytes of the window: it is one longer, so "
        "both slices are [-digits:]. all(dim=1) says which keys are right as a whole."
    ),
    pseudo=(
        "guess = likeliest byte at the last `digits` positions\nright = guess equals the last `digits` bytes\n"
        "return mean of right, mean over rows of (all right)"
    ),
)
def passkey_score(f):
    cases = (
        (("11223", "20468", "77312", "13579"), ("11222", "20460", "00312", "13579"), 5),
        (("123", "456", "788", "019"), ("123", "456", "780", "555"), 3),
        (("81", "36"), ("18", "99"), 2),
    )
    for rows, said, digits in cases:
        logits, windows = key_case(list(rows), list(said))
        right = [[a == b for a, b in zip(*pair)] for pair in zip(rows, said)]
        wanted = sum(map(sum, right)) / (len(rows) * digits), sum(map(all, right)) / len(rows)
        value = call(f, logits, windows, digits)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            refuse("return two numbers: the share of digits and the share of whole keys")
        numbers = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in value]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            refuse("return two numbers: the share of digits and the share of whole keys")
        if all(abs(a - b) < 1e-6 for a, b in zip(numbers, wanted)):
            continue
        for message, wrong in score_suspects(logits, windows, digits).items():
            if all(abs(a - b) < 1e-6 for a, b in zip(numbers, wrong)):
                refuse(message)
        told = ", ".join(f"{v:.4g}" for v in numbers)
        refuse(f"({told}) for keys of {digits} digits, where {', '.join(rows)} are sought and {', '.join(said)} said")
    expect_untouched(lambda x, w: f(x, w, 2), {"logits": logits, "windows": windows})
