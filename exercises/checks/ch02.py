"""Checks of chapter 2: gates by position, granularity and form."""

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_cases,
    expect_close,
    expect_good_manners,
    expect_refusal,
    expect_tensor,
)


def logistic(z: Tensor) -> Tensor:
    """The sigmoid from its definition, independent of torch's."""
    return 1 / (1 + torch.exp(-z))


# ---------------------------------------------------------------------------------------------- 2.1
def gated_reference(y: Tensor, x: Tensor, w_gate: Tensor, w_out: Tensor) -> Tensor:
    _, _, heads, width = y.shape
    output = x.new_zeros(*x.shape[:2], w_out.shape[0])
    for head in range(heads):
        for channel in range(width):
            row = head * width + channel
            score = logistic((x * w_gate[row]).sum(-1))  # [B, T]
            output = output + (y[:, :, head, channel] * score)[..., None] * w_out[:, row]
    return output


def gated_suspects(y: Tensor, x: Tensor, w_gate: Tensor, w_out: Tensor) -> dict[str, Tensor]:
    """Known mistakes; all of them fit the shapes when C = H * D."""
    z, joined, sizes = x @ w_gate.mT, y.flatten(2), y.shape[2:]
    swapped = z.unflatten(-1, sizes[::-1]).mT.flatten(2)  # rows read channel by channel
    return {
        "the gate is not applied: this is the ungated output": joined @ w_out.mT,
        "the sigmoid is missing: the logits themselves multiply y": joined * z @ w_out.mT,
        "SiLU instead of a sigmoid: SiLU(z) = z sigmoid(z) is not a score in [0, 1]": (
            joined * z * logistic(z) @ w_out.mT
        ),
        "the scores are added to y; this gate multiplies": (joined + logistic(z)) @ w_out.mT,
        "a softmax instead of a sigmoid: scores must not compete with each other": (
            joined * torch.softmax(z, dim=-1) @ w_out.mT
        ),
        "a softmax inside each head instead of a sigmoid: scores must not compete with each other": (
            joined * torch.softmax(z.unflatten(-1, sizes), dim=-1).flatten(2) @ w_out.mT
        ),
        "the gate closes where it should open: the sign of its logits is reversed": joined
        * logistic(-z)
        @ w_out.mT,
        "the gate acts after W_O, which is position G5; G1 is before W_O": joined @ w_out.mT * logistic(z),
        "the rows of w_gate are read channel by channel; row h * D + d belongs to head h": (
            joined * logistic(swapped) @ w_out.mT
        ),
        "w_gate is a weight of nn.Linear, [outputs, inputs]: use x @ w_gate.T": (
            joined * logistic(x @ w_gate) @ w_out.mT
        ),
        "w_out is a weight of nn.Linear, [outputs, inputs]: use ... @ w_out.T": joined * logistic(z) @ w_out,
        "the gate is computed from y; it reads the block's input x": joined
        * logistic(joined @ w_gate.mT)
        @ w_out.mT,
        "heads and channels of y are joined in the wrong order before W_O": (
            (joined * logistic(z)).unflatten(-1, sizes).mT.flatten(2) @ w_out.mT
        ),
        "heads and channels of y are joined in the wrong order: y.flatten(2) keeps a head's channels together": (
            (y.mT.flatten(2) * logistic(z)) @ w_out.mT
        ),
    }


@exercise(
    "2.1",
    "Gate the head outputs (G1)",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "`x @ w.T` is what a bias-free nn.Linear with weight w does. Joining heads is `y.flatten(2)`: "
        "number h * D + d of a token is then channel d of head h, the order of the rows of w_gate."
    ),
    pseudo=(
        "scores = sigmoid(x times w_gate transposed)\n"
        "joined = y with heads and channels in one axis, [B, T, H*D]\n"
        "return (joined * scores) times w_out transposed"
    ),
)
def gated_output(f):
    y, x, w_gate, w_out = draw(2, 5, 3, 4), draw(2, 5, 12, seed=1), draw(12, 12, seed=2), draw(12, 12, seed=3)
    expect_tensor(call(f, y, x, w_gate, w_out), (2, 5, 12))
    ones, slope = torch.ones_like(x), torch.full_like(w_gate, 40 / 12)  # a logit of 40 opens a gate fully
    only_head_1 = -slope
    only_head_1[4:8] *= -1
    cases = {
        "with w_gate = 0 all scores are 0.5: half of the ungated output must come out": (
            y,
            x,
            0 * w_gate,
            w_out,
        ),
        "with very large logits the gate is open: the ungated output must come out": (y, ones, slope, w_out),
        "with the gate open for head 1 alone only head 1 must come out": (y, ones, only_head_1, w_out),
        "wrong values for random weights": (y, x, w_gate, w_out),
    }
    expect_cases(f, gated_reference, cases, gated_suspects)
    other = {"y": draw(2, 3, 2, 3), "x": draw(2, 3, 5), "w_gate": draw(6, 5), "w_out": draw(5, 6)}
    expect_close(call(f, *other.values()), gated_reference(*other.values()), "right for C = H * D alone")
    expect_good_manners(f, gated_reference, other)


# ---------------------------------------------------------------------------------------------- 2.2
def by_heads_reference(y: Tensor, logits: Tensor, granularity: str) -> Tensor:
    scores = logistic(logits)
    if granularity == "headwise":
        return torch.einsum("bthd,bth->bthd", y, scores)
    return torch.einsum("bthd,btd->bthd", y, sum(scores[:, :, h] for h in range(y.shape[2])) / y.shape[2])


def headwise_suspects(y: Tensor, logits: Tensor, _: str) -> dict[str, Tensor]:
    scores = logistic(logits)
    return {
        "headwise: the gate is not applied": y,
        "headwise scores land on the channels: a head's score needs a new *last* axis": y
        * scores.unsqueeze(2),
        "headwise: a softmax over the heads instead of a sigmoid": y
        * torch.softmax(logits, dim=2).unsqueeze(-1),
        "headwise scores are averaged over the heads; each head keeps its own": y
        * scores.mean(-1)[..., None, None],
    }


def shared_suspects(y: Tensor, logits: Tensor, _: str) -> dict[str, Tensor]:
    scores = logistic(logits)
    return {
        "shared: the gate is not applied": y,
        "shared: the logits are averaged, then the sigmoid is taken; average the scores": (
            y * logistic(logits.mean(2, keepdim=True))
        ),
        "shared: every head still has its own scores, the average is missing": y * scores,
        "shared: the scores are summed over the heads, not averaged": y * scores.sum(2, keepdim=True),
        "shared: the average runs over the channels instead of the heads": y * scores.mean(3, keepdim=True),
        "shared: the average runs over the tokens instead of the heads": y * scores.mean(1, keepdim=True),
        "shared: the scores of one head are used for all; average over the heads": y * scores[:, :, :1],
    }


@exercise(
    "2.2",
    "Headwise and head-shared scores",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "An axis of size 1 stretches to any size when tensors are multiplied: which axis has size 1 in "
        "each case? For the shared gate, sigmoid of a mean and mean of sigmoids are two different "
        "numbers."
    ),
    pseudo=(
        "headwise: scores = sigmoid(logits) with a new last axis, [B, T, H, 1]\n"
        "shared: scores = mean over heads of sigmoid(logits), [B, T, 1, D]\n"
        "anything else: raise ValueError\n"
        "return y * scores"
    ),
)
def gate_by_heads(f):
    y = draw(2, 5, 4, 4)  # as many heads as channels: a score on the wrong axis fits, and shows
    for name, logits, suspects in (
        ("headwise", draw(2, 5, 4, seed=1), headwise_suspects),
        ("shared", 2 * draw(2, 5, 4, 4, seed=2), shared_suspects),
    ):
        cases = {
            f"{name}: logits of 0 must halve y": (y, 0 * logits, name),
            f"{name}: wrong values for random logits": (y, logits, name),
        }
        expect_cases(f, by_heads_reference, cases, suspects)
        small = logits[:, :3, :2] if name == "headwise" else draw(2, 3, 2, 5, seed=3)
        expect_good_manners(f, by_heads_reference, {"y": draw(2, 3, 2, 5), "logits": small}, name)
    expect_refusal(f, y, y, "rowwise", about="the granularity 'rowwise'")


# ---------------------------------------------------------------------------------------------- 2.3
def before_sum_reference(weights: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    batch, heads, queries, _ = weights.shape
    group = heads // v.shape[2]
    columns = []
    for head in range(heads):
        gated = v[:, :, head // group] * scores[:, :, head // group]  # [B, S, D]
        columns.append(weights[:, head] @ gated)  # [B, T, D]
    return torch.stack(columns, dim=2)


def before_sum_suspects(weights: Tensor, v: Tensor, scores: Tensor) -> dict[str, Tensor]:
    group = weights.shape[1] // v.shape[2]
    share, tile = (lambda x: x.repeat_interleave(group, dim=2)), (lambda x: x.repeat(1, 1, group, 1))
    mix = lambda a, values: torch.einsum("bhts,bshd->bthd", a, values)
    gated, damped = v * scores, weights * scores.mean((2, 3))[:, None, None, :]
    return {
        "the gate is not applied": mix(weights, share(v)),
        "the scores of the *query's* token multiply the sum: that is G1, not G2": mix(weights, share(v))
        * share(scores),
        "the gate acts twice, on the values and on the sum": mix(weights, share(gated)) * share(scores),
        "heads are shared in the wrong order: repeat_interleave, not repeat": mix(weights, tile(gated)),
        "values and scores are shared among the heads in two different orders": mix(
            weights, share(v) * tile(scores)
        ),
        "the weights are normalised again after the gate; a gated token simply counts less": mix(
            damped / damped.sum(-1, keepdim=True), share(v)
        ),
        "each value gets the scores of the token before it": mix(weights, share(v * scores.roll(1, dims=1))),
    }


@exercise(
    "2.3",
    "Gate the values (G2)",
    kind="fill",
    difficulty=3,
    minutes=20,
    hint=(
        "Multiply v and scores while both still have K heads, then share heads as in exercise 1.3, then "
        "take the weighted sum over S. torch.einsum can name the axes for you: the weights are bhts."
    ),
    pseudo=(
        "gated = v * scores, [B, S, K, D]\n"
        "gated = every head of it H / K times, in place, [B, S, H, D]\n"
        "return for each b, t, h, d: sum over s of weights[b, h, t, s] * gated[b, s, h, d]"
    ),
)
def gate_before_sum(f):
    weights = torch.softmax(2 * draw(2, 6, 5, 5), dim=-1)
    v, scores = draw(2, 5, 2, 4, seed=1), logistic(2 * draw(2, 5, 2, 4, seed=2))
    expect_tensor(call(f, weights, v, scores), (2, 5, 6, 4))
    one_closed, constant = torch.ones_like(scores), scores[:1, :1].expand_as(scores)
    one_closed[:, 2] = 0
    cases = {
        "with all scores at 1 it must be ungated grouped attention": (weights, v, torch.ones_like(scores)),
        "a score of 0 at token 2 must remove the value of token 2, for every query": (weights, v, one_closed),
        "scores that are the same for all tokens must act like a gate on the sum": (weights, v, constant),
        "wrong values for random scores": (weights, v, scores),
    }
    expect_cases(f, before_sum_reference, cases, before_sum_suspects)
    inputs = {"weights": weights[:, :4, :3], "v": v, "scores": scores}  # fewer queries than keys
    expect_good_manners(f, before_sum_reference, inputs)


# ---------------------------------------------------------------------------------------------- 2.5
FORMS = {
    "sigmoid": lambda y, z: y * logistic(z),
    "ns_sigmoid": lambda y, z: y * (1 + logistic(z)) / 2,
    "silu": lambda y, z: y * z * logistic(z),
    "additive_silu": lambda y, z: y + z * logistic(z),
    "additive_identity": lambda y, z: y + z,
}
MISTAKES = {
    "the gate does nothing": lambda y, z: y,
    "that is the plain sigmoid": lambda y, z: y * logistic(z),
    "0.5 * sigmoid lies in [0, 0.5]; the non-sparse sigmoid lies in [0.5, 1]": lambda y, z: (
        y * logistic(z) / 2
    ),
    "0.5 + sigmoid goes up to 1.5; the sigmoid is halved too": lambda y, z: y * (0.5 + logistic(z)),
    "the sigmoid is cut off at 0.5, which kills its gradient; eq. (9) squeezes it": lambda y, z: (
        y * logistic(z).clamp(min=0.5)
    ),
    "the logits multiply y without SiLU": lambda y, z: y * z,
    "SiLU multiplies y; here it is added": lambda y, z: y * z * logistic(z),
    "SiLU is added to y; here it multiplies": lambda y, z: y + z * logistic(z),
    "a sigmoid is added instead of SiLU": lambda y, z: y + logistic(z),
    "the logits are added without SiLU": lambda y, z: y + z,
    "y * (1 + z) instead of y + z": lambda y, z: y * (1 + z),
    "a ReLU instead of SiLU is added": lambda y, z: y + z.clamp(min=0),
    "a ReLU instead of SiLU multiplies": lambda y, z: y * z.clamp(min=0),
}


@exercise(
    "2.5",
    "Five forms of a gate",
    kind="fill",
    difficulty=1,
    minutes=15,
    hint=(
        "torch.sigmoid and torch.nn.functional.silu do the hard part. Try each form at z = 0 on paper first."
    ),
    pseudo=(
        "sigmoid: y * sigmoid(z)\n"
        "ns_sigmoid: y * (0.5 + 0.5 * sigmoid(z))\n"
        "silu: y * silu(z)\n"
        "additive_silu: y + silu(z)\n"
        "additive_identity: y + z\n"
        "anything else: raise ValueError"
    ),
)
def apply_gate(f):
    y, z = draw(2, 5, 3, 4), 2 * draw(2, 5, 3, 4, seed=1)
    start = {"sigmoid": "half of y", "ns_sigmoid": "three quarters of y", "silu": "0"}
    for form, reference in FORMS.items():
        named = lambda y, z, _, reference=reference: reference(y, z)
        suspects = lambda y, z, form: {
            f"{form!r}: {message}": wrong(y, z) for message, wrong in MISTAKES.items()
        }
        cases = {
            f"{form!r}: at z = 0 it must give {start.get(form, 'y')}": (y, 0 * z, form),
            f"{form!r}: wrong values for random z": (y, z, form),
        }
        expect_cases(f, named, cases, suspects)
        expect_good_manners(f, named, {"y": y, "logits": z}, form)
    table = draw(3, 4, seed=2)
    expect_close(
        call(f, y, table, "sigmoid"),
        FORMS["sigmoid"](y, table),
        "an input-independent table of logits [H, D] must broadcast over sequences and tokens",
    )
    expect_refusal(f, y, z, "softplus", about="the form 'softplus'")
