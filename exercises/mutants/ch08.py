"""Wrong answers to chapter 8, each with the hint that must refuse it. They keep the name of the right answer."""

import math

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


def thetas(width, base=10_000.0):
    return base ** -(torch.arange(0, width, 2).double() / width)


# ---------------------------------------------------------------------------------------------- 8.1
@wrong("8.1", says="that is the angle at the end of the window")
def turns_in_training(width, base, trained):
    return trained * thetas(width, base)


@wrong("8.1", says="that is the wavelength")
def turns_in_training(width, base, trained):
    return 2 * math.pi / thetas(width, base)


@wrong("8.1", says="that is the inverse")
def turns_in_training(width, base, trained):
    return 2 * math.pi / thetas(width, base) / trained


@wrong("8.1", says="a turn is 2 pi, not pi")
def turns_in_training(width, base, trained):
    return trained * thetas(width, base) / math.pi


@wrong("8.1", says="you have -i/D")
def turns_in_training(width, base, trained):
    return trained * base ** -(torch.arange(width // 2).double() / width) / (2 * math.pi)


@wrong("8.1", says="the order is reversed")
def turns_in_training(width, base, trained):
    return (trained * thetas(width, base) / (2 * math.pi)).flip(0)


@wrong("8.1", says="whole turns only")
def turns_in_training(width, base, trained):
    return (trained * thetas(width, base) / (2 * math.pi)).floor()


@wrong("8.1", says="return floats, it has fractions")
def turns_in_training(width, base, trained):
    return (trained * thetas(width, base) / (2 * math.pi)).long()


@wrong("8.1", says="multiplied by 2 pi instead of divided")
def turns_in_training(width, base, trained):
    return trained * thetas(width, base) * 2 * math.pi


@wrong("8.1", says="has the shape [8], expected [4]")
def turns_in_training(width, base, trained):
    return (trained * thetas(width, base) / (2 * math.pi)).repeat(2)


# ---------------------------------------------------------------------------------------------- 8.2
def angles(positions, width, base):
    return torch.outer(positions, thetas(width, base))


@wrong("8.2", says="the factor is not used")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double(), width, base)


@wrong("8.2", says="multiplied by the factor")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double() * factor, width, base)


@wrong("8.2", says="positions are rounded down")
def interpolated_angles(length, width, base, factor):
    return angles((torch.arange(length).double() // factor), width, base)


@wrong("8.2", says="positions are counted from 0")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(1, length + 1).double() / factor, width, base)


@wrong("8.2", says="the base is multiplied by the factor")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double(), width, base * factor)


@wrong("8.2", says="the base is divided by the factor")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double(), width, base / factor)


@wrong("8.2", says="all pairs turn at the same speed")
def interpolated_angles(length, width, base, factor):
    return (torch.arange(length).double() / factor)[:, None].expand(-1, width // 2)


@wrong("8.2", says="positions repeat after the trained length")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double() % max(1, int(length / factor)), width, base)


@wrong("8.2", says="has the shape [2, 9], expected [9, 2]")
def interpolated_angles(length, width, base, factor):
    return angles(torch.arange(length).double() / factor, width, base).T


# ---------------------------------------------------------------------------------------------- 8.3
@wrong("8.3", says="that is the base multiplied by s")
def base_for_pair(base, factor, width, pair):
    return base * factor


@wrong("8.3", says="that slows the slowest pair")
def base_for_pair(base, factor, width, pair):
    return base * factor ** (width / (width - 2))


@wrong("8.3", says="yours is smaller")
def base_for_pair(base, factor, width, pair):
    return base / factor ** (width / (2 * pair))


@wrong("8.3", says="the exponent is upside down")
def base_for_pair(base, factor, width, pair):
    return base * factor ** (2 * pair / width)


@wrong("8.3", says="the 2 is missing")
def base_for_pair(base, factor, width, pair):
    return base * factor ** (width / pair)


@wrong("8.3", says="pairs are counted from 0")
def base_for_pair(base, factor, width, pair):
    return base * factor ** (width / max(2 * pair - 2, 1))


@wrong("8.3", says="that is the pair's new frequency")
def base_for_pair(base, factor, width, pair):
    return base ** (-2 * pair / width) / factor


@wrong("8.3", says="is raised together with the base")
def base_for_pair(base, factor, width, pair):
    return (base * factor) ** (width / (2 * pair))


@wrong("8.3", says="which is not what comes out here")
def base_for_pair(base, factor, width, pair):
    return base * factor ** ((width - 1) / (2 * pair))


# ---------------------------------------------------------------------------------------------- 8.4
def yarn(make, turn=2 * math.pi):
    """YaRN with a mixture of its own, from frequencies, turns and factor."""

    def function(frequencies, factor, trained):
        return make(frequencies, trained * frequencies / turn, factor)

    function.__name__ = "yarn_frequencies"
    return function


def ramp(turns, low=1.0, high=32.0):
    return ((turns - low) / (high - low)).clamp(0, 1)


def mix(old, kept, factor):
    return (1 - kept) * old / factor + kept * old


usual = yarn(lambda old, turns, s: mix(old, ramp(turns), s))
wrong("8.4", says="that is interpolation")(yarn(lambda old, turns, s: old / s))
wrong("8.4", says="nothing is slowed")(yarn(lambda old, turns, s: old.clone()))
wrong("8.4", says="the ramp is upside down")(yarn(lambda old, turns, s: mix(old, 1 - ramp(turns), s)))
wrong("8.4", says="the ramp is not cut off")(yarn(lambda old, turns, s: mix(old, (turns - 1) / 31, s)))
wrong("8.4", says="turns are counted in the longer text")(yarn(lambda old, turns, s: mix(old, ramp(turns * s), s)))
wrong("8.4", says="radians are taken for turns")(yarn(lambda old, turns, s: mix(old, ramp(turns), s), turn=1.0))
wrong("8.4", says="it begins at 1")(yarn(lambda old, turns, s: mix(old, ramp(turns, 0.0), s)))
wrong("8.4", says="the factor is missing where the ramp is 0")(
    yarn(lambda old, turns, s: ramp(turns) * old + (1 - ramp(turns)) * old * s)
)
wrong("8.4", says="a step at one turn")(yarn(lambda old, turns, s: torch.where(turns < 1, old / s, old)))
wrong("8.4", says="a step at 32 turns")(yarn(lambda old, turns, s: torch.where(turns < 32, old / s, old)))
wrong("8.4", says="the wavelengths are mixed")(
    yarn(lambda old, turns, s: 1 / ((1 - ramp(turns)) * s / old + ramp(turns) / old))
)
wrong("8.4", says="that belongs to cosines and sines")(
    yarn(lambda old, turns, s: mix(old, ramp(turns), s) * (0.1 * math.log(s) + 1))
)
wrong("8.4", says="the gradient for `frequencies` is wrong")(
    yarn(lambda old, turns, s: mix(old, ramp(turns).detach(), s))
)
wrong("8.4", says="keep the dtype of the input")(yarn(lambda old, turns, s: mix(old, ramp(turns), s).double()))


@wrong("8.4", says="changes its input `frequencies` in place")
def yarn_frequencies(frequencies, factor, trained):
    new = usual(frequencies, factor, trained)
    if frequencies.requires_grad or not frequencies.is_leaf:
        return new
    return frequencies.copy_(new)


# ---------------------------------------------------------------------------------------------- 8.5
def sink(margin, keys, factor, changed=()):
    table, longer = 0.1 * math.log(factor) + 1, keys * factor
    share = lambda keys, a: 1 / (1 + (keys - 1) * math.exp(-a))
    right = {
        "table": table,
        "scores": table**2,
        "trained": share(keys, margin),
        "longer": share(longer, margin),
        "yarn": share(longer, table**2 * margin),
        "needed": margin + math.log((longer - 1) / (keys - 1)),
    }
    return right | {name: make(right, share, longer, margin, keys, factor) for name, make in dict(changed).items()}


def wrong_sink(says, **changed):
    def stretched_sink(margin, trained, factor):
        return sink(margin, trained, factor, changed)

    wrong("8.5", says=says)(stretched_sink)


wrong_sink("not to base 10", table=lambda r, share, keys, a, t, s: 0.1 * math.log10(s) + 1)
wrong_sink("the 1 is missing", table=lambda r, share, keys, a, t, s: 0.1 * math.log(s))
wrong_sink("that is the factor of the scores", table=lambda r, share, keys, a, t, s: r["scores"])
wrong_sink("queries and keys are both multiplied", scores=lambda r, share, keys, a, t, s: r["table"])
wrong_sink("it makes scores larger", scores=lambda r, share, keys, a, t, s: 1 / r["scores"])
wrong_sink("that is what leaks", trained=lambda r, share, keys, a, t, s: 1 - r["trained"])
wrong_sink("n - 1 others", trained=lambda r, share, keys, a, t, s: share(t + 1, a))
wrong_sink("so more keys share", longer=lambda r, share, keys, a, t, s: r["trained"])
wrong_sink("does not fall in proportion", longer=lambda r, share, keys, a, t, s: r["trained"] / s)
wrong_sink("the temperature is not used", yarn=lambda r, share, keys, a, t, s: r["longer"])
wrong_sink("the temperature counts twice", yarn=lambda r, share, keys, a, t, s: share(keys, r["table"] * a))
wrong_sink("it does not divide them", yarn=lambda r, share, keys, a, t, s: share(keys, a / r["scores"]))
wrong_sink("scores, not shares", yarn=lambda r, share, keys, a, t, s: r["scores"] * r["longer"])
wrong_sink("the first key is not among those", needed=lambda r, share, keys, a, t, s: a + math.log(s))
wrong_sink("the margin adds a logarithm", needed=lambda r, share, keys, a, t, s: a * s)
wrong_sink("more keys need a larger margin", needed=lambda r, share, keys, a, t, s: 2 * a - r["needed"])


@wrong("8.5", says="no entry 'needed'")
def stretched_sink(margin, trained, factor):
    right = sink(margin, trained, factor)
    return {name: right[name] for name in right if name != "needed"}


# ---------------------------------------------------------------------------------------------- 8.6
def case(says, *values):
    def yarn_test_case():
        return values

    wrong("8.6", says=says)(yarn_test_case)


case("'squeezed' goes unnoticed", 8, 10_000.0, 8.0, 6)  # every pair under one turn
case("'squeezed' goes unnoticed", 16, 10_000.0, 1.0, 1024)
case("'longer' goes unnoticed", 2, 10_000.0, 8.0, 1024)  # one pair, 163 turns
case("'unclipped' goes unnoticed", 4, 100.0, 4.0, 201)  # 32.0 and 3.2 turns
case("'index' goes unnoticed", 4, 100_000.0, 16.0, 1024)  # 163 and 0.52 turns
case("'step' goes unnoticed", 4, 10_000.0, 4.0, 1024)  # 163 and 1.6 turns, where the ramp has hardly begun
case("accepted: 1 to 8,192", 16, 10_000.0, 8.0, 100_000)
case("it must be even", 15, 10_000.0, 8.0, 1024)
case("it must be a whole number", 16, 10_000.0, 8.0, 1024.0)
case("return the four of", 16, 10_000.0, 8.0)


# ---------------------------------------------------------------------------------------------- 8.7
def binned(measure):
    def function(logits, targets, edges):
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return torch.stack([measure(losses, a, b) for a, b in zip(edges, edges[1:])])

    function.__name__ = "loss_by_bin"
    return function


right_bins = binned(lambda losses, a, b: losses[:, a:b].mean())
wrong("8.7", says="the sign is wrong")(binned(lambda losses, a, b: -losses[:, a:b].mean()))
wrong("8.7", says="that is a perplexity")(binned(lambda losses, a, b: losses[:, a:b].mean().exp()))
wrong("8.7", says="bits, not nats")(binned(lambda losses, a, b: losses[:, a:b].mean() / math.log(2)))
wrong("8.7", says="each bin is a sum")(binned(lambda losses, a, b: losses[:, a:b].mean(0).sum()))
wrong("8.7", says="summed over the batch")(binned(lambda losses, a, b: losses[:, a:b].sum(0).mean()))
wrong("8.7", says="start at edges[i]")(binned(lambda losses, a, b: losses[:, :b].mean()))
wrong("8.7", says="does not hold its end")(binned(lambda losses, a, b: losses[:, a : b + 1].mean()))
wrong("8.7", says="only the first row")(binned(lambda losses, a, b: losses[0, a:b].mean()))
wrong("8.7", says="the probability of the target, not its loss")(
    binned(lambda losses, a, b: (-losses[:, a:b]).exp().mean())
)
wrong("8.7", says="not the mean of the logarithms")(binned(lambda losses, a, b: -(-losses[:, a:b]).exp().mean().log()))
wrong("8.7", says="the gradient for `logits` is wrong")(
    binned(lambda losses, a, b: (losses[:, a:b] + losses[:, a:b].detach()).mean() / 2)
)


@wrong("8.7", says="the logits are not normalised")
def loss_by_bin(logits, targets, edges):
    picked = logits.gather(2, targets[..., None])[..., 0]
    return torch.stack([-picked[:, a:b].mean() for a, b in zip(edges, edges[1:])])


@wrong("8.7", says="over positions instead of the vocabulary")
def loss_by_bin(logits, targets, edges):
    picked = -logits.log_softmax(1).gather(2, targets[..., None])[..., 0]
    return torch.stack([picked[:, a:b].mean() for a, b in zip(edges, edges[1:])])


@wrong("8.7", says="has the shape [4], expected [3]")
def loss_by_bin(logits, targets, edges):
    return torch.cat((right_bins(logits, targets, edges), right_bins(logits, targets, [0, 1])))[: len(edges)]


@wrong("8.7", says="no gradient flows")
def loss_by_bin(logits, targets, edges):
    return right_bins(logits.detach(), targets, edges)


@wrong("8.7", says="changes its input `logits` in place")
def loss_by_bin(logits, targets, edges):
    found = right_bins(logits.clone(), targets, edges)
    if not logits.requires_grad:
        logits -= logits.logsumexp(-1, keepdim=True)
    return found


# ---------------------------------------------------------------------------------------------- 8.8
def scored(compare):
    def function(logits, windows, digits):
        right = compare(logits.argmax(-1), windows, digits)
        return right.double().mean().item(), right.all(1).double().mean().item()

    function.__name__ = "passkey_score"
    return function


answer = scored(lambda guess, windows, n: guess[:, -n:] == windows[:, -n:])
wrong("8.8", says="they guess the byte at t + 1")(scored(lambda guess, w, n: guess[:, -n:] == w[:, -n - 1 : -1]))
wrong("8.8", says="one position too early")(scored(lambda guess, w, n: guess[:, -n - 1 : -1] == w[:, -n:]))
wrong("8.8", says="all positions are scored")(scored(lambda guess, w, n: guess == w[:, 1:]))
wrong("8.8", says="only the last digit")(scored(lambda guess, w, n: guess[:, -1:] == w[:, -1:]))


@wrong("8.8", says="when any of its digits is right")
def passkey_score(logits, windows, digits):
    right = logits[:, -digits:].argmax(-1) == windows[:, -digits:]
    return right.double().mean().item(), right.any(1).double().mean().item()


@wrong("8.8", says="the two numbers are exchanged")
def passkey_score(logits, windows, digits):
    return answer(logits, windows, digits)[::-1]


@wrong("8.8", says="these are counts")
def passkey_score(logits, windows, digits):
    right = logits[:, -digits:].argmax(-1) == windows[:, -digits:]
    return right.sum().item(), right.all(1).sum().item()


@wrong("8.8", says="in percent")
def passkey_score(logits, windows, digits):
    return tuple(100 * share for share in answer(logits, windows, digits))


@wrong("8.8", says="not a power of the share of digits")
def passkey_score(logits, windows, digits):
    share = answer(logits, windows, digits)[0]
    return share, share**digits


@wrong("8.8", says="the least likely byte")
def passkey_score(logits, windows, digits):
    return answer(-logits, windows, digits)


@wrong("8.8", says="return two numbers")
def passkey_score(logits, windows, digits):
    return answer(logits, windows, digits)[0]


@wrong("8.8", says="changes its input `logits` in place")
def passkey_score(logits, windows, digits):
    found = answer(logits, windows, digits)
    logits.zero_()
    return found


# ---------------------------------------------------------------------------------------------- 8.9
PLACES = ((8, 4.0, 256), (32, 8.0, 512), (64, 16.0, 1024))


def judged(holds, places=PLACES):
    def function(scale):
        return all(bool(holds(thetas(w), scale(w, s, t), s, t)) for w, s, t in places)

    function.__name__ = "spares_and_slows"
    return function


def slow_stay(old, new, s, t):
    slow = t * old < 2 * math.pi
    return (new[slow] * s <= old[slow] * (1 + 1e-6)).all()


wrong("8.9", says="catches 0 of 10")(judged(lambda old, new, s, t: True))
wrong("8.9", says="turns down a right implementation")(judged(lambda old, new, s, t: False))
wrong("8.9", says="one it lets through: interpolation")(judged(slow_stay))
wrong("8.9", says="one it lets through: nothing is scaled")(judged(lambda old, new, s, t: abs(new[0] - 1) < 1e-6))
wrong("8.9", says="turns down a right implementation: YaRN, straight in turns")(
    judged(lambda old, new, s, t: (new * s <= old * (1 + 1e-6)).all())  # all pairs, also those that saw everything
)
wrong("8.9", says="one it lets through: a larger base")(
    judged(lambda old, new, s, t: abs(new[0] - 1) < 1e-6 and new[-1] * s <= old[-1] * (1 + 1e-6))
)
wrong("8.9", says="turns down a right implementation: slow pairs stopped")(
    judged(lambda old, new, s, t: abs(new[0] - 1) < 1e-6 and torch.isclose(new[-1] * s, old[-1]))
)


@wrong("8.9", says="returns Tensor; return True or False")
def spares_and_slows(scale):
    return scale(32, 8.0, 512) < 1
