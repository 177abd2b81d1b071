"""Solutions of chapter 8. The docstrings are the statements; the stubs are made from this file."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def turns_in_training(width: int, base: float, trained: int) -> Tensor:
    """Count how often each clock hand went round in training.

    Pair i of a head of width D turns by base^(-2i/D) radians a position. Its wavelength is the number of positions it
    needs for a full turn; a training window of `trained` positions holds that many wavelengths, eq. (8.1).

    Args:
        width: D, even. base: of the frequencies, for example 10,000. trained: length of training, in positions.

    Returns:
        Turns of each pair, [D/2], any float dtype; fast pairs first.
    """
    theta = base ** -(torch.arange(0, width, 2).double() / width)  # radians a position
    wavelength = 2 * math.pi / theta
    return trained / wavelength


def interpolated_angles(length: int, width: int, base: float, factor: float) -> Tensor:
    """Squeeze positions, so that a longer text uses the angles of training.

    Position interpolation, eq. (8.3): the text is `factor` times as long as those of training, and every angle is what
    the position divided by `factor` had. Positions are counted from 0 and do not stay whole.

    Args:
        length: positions of the longer text. width: D, even. base: of the frequencies. factor: s, at least 1.

    Returns:
        The angle of each position for each pair, [length, D/2], in radians, any float dtype.
    """
    theta = base ** -(torch.arange(0, width, 2).double() / width)
    return torch.outer(torch.arange(length).double() / factor, theta)


def base_for_pair(base: float, factor: float, width: int, pair: int) -> float:
    """Find the base that slows one pair by a given factor.

    Equation (8.2) asks that the *slowest* pair turn s times slower. Ask the same of pair number `pair`, counted from 0:
    with the new base its frequency is the old one divided by `factor`.

    Args:
        base: of the trained model. factor: s, at least 1. width: D, even. pair: 1 to D/2 - 1.

    Returns:
        The new base, a number.
    """
    return base * factor ** (width / (2 * pair))  # from b'^(-2i/D) = b^(-2i/D) / s


def yarn_frequencies(frequencies: Tensor, factor: float, trained: int) -> Tensor:
    """Slow each pair by what it has seen, as YaRN does.

    With r the turns of a pair within the *trained* length, eq. (8.1), the ramp is 1 from 32 turns up, 0 up to one turn,
    and straight in r between. A pair keeps its frequency where the ramp is 1, has it divided by `factor` where the ramp
    is 0, and a mixture of these two *frequencies* between, eq. (8.4).

    Args:
        frequencies: radians a position, [D/2], of the trained model. factor: s, at least 1.
        trained: length of training, in positions.

    Returns:
        The new frequencies [D/2], in the dtype of `frequencies`.
    """
    turns = trained * frequencies / (2 * math.pi)
    ramp = ((turns - 1) / (32 - 1)).clamp(0, 1)
    return (1 - ramp) * frequencies / factor + ramp * frequencies


def stretched_sink(margin: float, trained: int, factor: int) -> dict:
    """Predict what a sink lets through when the text grows.

    A head is silent by its sink: the first key's score is higher by `margin` than all others, which are equal. A query
    sees n keys, the first one included.

        "table"           what YaRN multiplies cosines and sines by, eq. (8.5)
        "scores"          what becomes of a score by that, as a factor
        "trained"         the sink's share with n = trained keys, eq. (8.6)
        "longer"          its share with n = trained * factor keys and the same margin
        "yarn"            the same, with YaRN's temperature on all scores
        "needed"          the margin that gives the share "trained" with trained * factor keys

    Args:
        margin: a, in units of the scores. trained: keys at the trained length, at least 2. factor: s, at least 2.

    Returns:
        A dictionary of numbers under these six names.
    """
    table = 0.1 * math.log(factor) + 1

    def share(keys: int, a: float) -> float:
        return 1 / (1 + (keys - 1) * math.exp(-a))

    longer = trained * factor
    return {
        "table": table,
        "scores": table**2,
        "trained": share(trained, margin),
        "longer": share(longer, margin),
        "yarn": share(longer, table**2 * margin),
        "needed": margin + math.log((longer - 1) / (trained - 1)),
    }


def yarn_test_case() -> tuple:
    """Break five tables that are called YaRN.

    The right frequencies are those of eq. (8.4). Five wrong ones circulate:

        squeezed    every pair is slowed by s: interpolation
        longer      turns are counted in the longer text, s * trained, instead of in the trained one
        unclipped   the ramp goes on below 0 and above 1
        index       the ramp is straight in the pair's number, from where there are 32 turns to where there is 1
        step        no ramp: pairs under 32 turns are slowed by s, the others keep their frequency

    Choose a head and a length for which each of them moves some pair's frequency by more than 10 % of the right one.

    Returns:
        (width, base, factor, trained): an even width from 2 to 16, a base from 100 to 1,000,000, a factor from 1 to 16,
        and a trained length of whole positions from 1 to 8192.
    """
    return 16, 10_000.0, 8.0, 1024


def loss_by_bin(logits: Tensor, targets: Tensor, edges: list) -> Tensor:
    """Measure the loss by how far into the text a token is predicted.

    The loss of a token is minus the natural logarithm of the probability that the softmax of its logits gives to the
    target. Bin i holds the positions edges[i], ..., edges[i + 1] - 1; its value is the mean over all of its positions
    and the whole batch.

    Args:
        logits: [B, T, V], not normalised. targets: [B, T], whole numbers from 0 to V - 1.
        edges: increasing whole numbers from 0 to T, at least two.

    Returns:
        Nats a token, a value a bin [len(edges) - 1], in the dtype of `logits`.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # [B, T]
    return torch.stack([losses[:, a:b].mean() for a, b in zip(edges, edges[1:])])


def passkey_score(logits: Tensor, windows: Tensor, digits: int) -> tuple[float, float]:
    """Score passkeys in one pass, with the answer in place.

    A window holds T + 1 bytes and ends with the answer. A model has read all of its bytes but the last: `logits` at
    position t are its guess for the byte at position t + 1 of the window. Greedy decoding takes the likeliest byte.

    Args:
        logits: [B, T, 256]. windows: [B, T + 1], whole numbers. digits: length of a key, at most T.

    Returns:
        (digit, exact): the share of all digits that are right, and the share of keys that are right in every digit.
    """
    right = logits[:, -digits:].argmax(-1) == windows[:, -digits:]  # [B, digits]
    return right.double().mean().item(), right.all(dim=1).double().mean().item()


def spares_and_slows(scale) -> bool:
    """Write the property that makes a scaling safe without training.

    Two things are asked of it, at every width (even, from 8 to 64) and every factor from 2 to 16, for base 10,000 and a
    trained length from 256 to 1024:

    - the fastest pair, pair 0, keeps its frequency of one radian a position, so that neighbours stay apart;
    - a pair that never finished a turn in training meets no new angle: at position factor * trained its angle is not
      larger than it was at position `trained` with its own frequency, 10,000^(-2i/D) for pair i.

    You are graded by the scalings you turn down and by those you accept.

    Args:
        scale: a function of (width, factor, trained) that returns the new frequencies, float64 [width / 2].

    Returns:
        True if both hold, otherwise False.
    """
    for width, factor, trained in ((8, 4.0, 256), (32, 8.0, 512), (64, 16.0, 1024)):
        old = 10_000.0 ** -(torch.arange(0, width, 2).double() / width)
        new = scale(width, factor, trained)
        slow = trained * old < 2 * math.pi
        if abs(float(new[0]) - 1) > 1e-6 or (new[slow] * factor > old[slow] * (1 + 1e-6)).any():
            return False
    return True
