"""Checks of chapter 7: the router's two losses."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_cases,
    expect_good_manners,
    expect_gradient,
    expect_tensor,
    expect_untouched,
    refuse,
)


def shares(z: Tensor, axis: int = -1) -> Tensor:
    """The softmax from its definition, independent of torch's."""
    powers = torch.exp(z - z.amax(axis, keepdim=True))
    return powers / powers.sum(axis, keepdim=True)


def best(values: Tensor, top_k: int) -> Tensor:
    """Places of the k largest of each row, largest first."""
    return torch.argsort(values, dim=-1, descending=True, stable=True)[..., :top_k]


# ---------------------------------------------------------------------------------------------- 7.2
def counted(chosen: Tensor, experts: int) -> Tensor:
    """Assignments of each expert, [E], by comparison with every number."""
    return torch.stack([(chosen == e).sum() for e in range(experts)]).double()


def balance_reference(logits: Tensor, chosen: Tensor) -> Tensor:
    probability = shares(logits).mean(0)
    share = counted(chosen, len(probability)).to(logits.dtype) / chosen.numel()
    return sum(share * probability) * len(probability)


def balance_suspects(logits: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    (tokens, experts), k = logits.shape, chosen.shape[-1]
    p = shares(logits)
    f, mean = counted(chosen, experts) / chosen.numel(), p.mean(0)
    first = counted(chosen[:, :1], experts) / tokens
    taken = torch.zeros_like(p).scatter(1, chosen, p.gather(1, chosen))
    right = experts * (f * mean).sum()
    return {
        "the factor E is missing: balanced, it is 1 / E then": right / experts,
        "f counts per token, not per assignment: its shares must sum to 1, not to k": right * k,
        "the factor is k; it is E, the number of experts": right / experts * k,
        "f counts the first choice of each token alone; all k count": experts * (first * mean).sum(),
        "P is summed over the tokens; it is their mean": right * tokens,
        "P stands twice: f is a share of assignments, a count": experts * (mean * mean).sum(),
        "f stands twice: P is the mean probability, and what carries the gradient": experts * (f * f).sum(),
        "softmax is taken twice: P becomes nearly uniform and the loss hardly moves": experts
        * (f * shares(p).mean(0)).sum(),
        "P holds only the experts that were chosen; all probabilities count": experts * (f * taken.mean(0)).sum(),
        "P holds only the experts that were chosen, brought to sum 1; all probabilities count": experts
        * (f * (taken / taken.sum(-1, keepdim=True)).mean(0)).sum(),
        "the softmax runs over the tokens; it runs over the experts of each token": experts
        * (f * shares(logits, 0).mean(0)).sum(),
        "P is a softmax of the mean logits; take the mean of the probabilities": experts
        * (f * shares(logits.mean(0))).sum(),
        "the logits stand in the place of their softmax": experts * (f * logits.mean(0)).sum(),
        "1 is subtracted; the loss is 1 when all is balanced": right - 1,
    }


@exercise(
    "7.2",
    "A loss for balance",
    kind="fill",
    difficulty=2,
    minutes=20,
    hint=(
        "Two vectors of E numbers, each with the sum 1. torch.bincount(chosen.flatten(), minlength=E) counts, with a "
        "place for experts that nobody chose. The other one is the mean of softmax(logits) over the tokens."
    ),
    pseudo=(
        "p = softmax of the logits over the experts, [N, E]\n"
        "P = mean of p over the tokens, [E]\n"
        "f = how often each expert stands in chosen, divided by N k, [E]\n"
        "return E times the sum of f * P"
    ),
)
def balance_loss(f):
    logits = 2 * draw(9, 6, seed=3) + draw(6, seed=4)
    value = call(f, logits, best(logits, 2))
    if isinstance(value, (int, float)):
        refuse("the result is a number of Python: no gradient can flow from it; return a scalar tensor")
    expect_tensor(value, ())
    cases = {
        "where the router has no preference the loss is 1, whatever was chosen": (
            0 * logits,
            torch.tensor([[0, 1]]).repeat(9, 1),
        ),
        "all tokens on the last two of six experts": (logits, torch.tensor([[5, 4]]).repeat(9, 1)),
        "wrong value when the last experts have no token": (draw(4, 8, seed=5), torch.tensor([[0, 1, 2]]).repeat(4, 1)),
        "wrong value for random logits, k = 2": (logits, best(logits, 2)),
    }
    expect_cases(f, balance_reference, cases, balance_suspects)
    more = draw(5, 4, seed=6)
    expect_untouched(f, {"logits": more, "chosen": best(more, 2)})
    as_vector = lambda of: lambda z: of(z, best(more, 2))[None]
    expect_gradient(as_vector(f), as_vector(balance_reference), {"logits": more})


# ---------------------------------------------------------------------------------------------- 7.7
def z_reference(logits: Tensor) -> Tensor:
    largest = logits.amax(-1)
    return ((largest + torch.log(torch.exp(logits - largest[:, None]).sum(-1))) ** 2).mean()


def z_suspects(logits: Tensor) -> dict[str, Tensor]:
    largest = logits.amax(-1)
    z = largest + torch.log(torch.exp(logits - largest[:, None]).sum(-1))  # [N]
    down = logits.amax(0) + torch.log(torch.exp(logits - logits.amax(0)).sum(0))  # [E]
    return {
        "the square is missing": z.mean(),
        "the mean is squared; it is the squares whose mean is taken": z.mean() ** 2,
        "the absolute value stands in the place of the square": z.abs().mean(),
        "the squares are summed; the mean over the tokens is taken": (z**2).sum(),
        "the sum of exponentials runs over the tokens; it runs over the experts of each token": (down**2).mean(),
        "the squares of the logits themselves: log sum exp is missing": (logits**2).mean(),
        "the largest logit stands in the place of log sum exp; they are alike only when one is far ahead": (
            (largest**2).mean()
        ),
        "the largest logit is subtracted, and not added again after the logarithm": ((z - largest) ** 2).mean(),
        "the mean of the exponentials is taken; it is their sum": ((z - math.log(logits.shape[-1])) ** 2).mean(),
        "the logits went through a softmax first; of them nothing but small numbers is left": (
            (torch.log(torch.exp(shares(logits)).sum(-1)) ** 2).mean()
        ),
        "the sum of a softmax is 1, so its logarithm is 0: take exponentials of the logits": 0 * z.mean(),
    }


@exercise(
    "7.7",
    "A loss for small logits",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint="torch.logsumexp subtracts the largest logit before exp and adds it after log. Square before you average.",
    pseudo=(
        "z = log of the sum over the experts of exp(logit), a number a token\n"
        "return the mean over the tokens of z squared"
    ),
)
def z_loss(f):
    expect_tensor(call(f, draw(5, 3)), ())
    cases = {
        "one expert: log exp of its logit is the logit": (draw(5, 1, seed=1),),
        "equal logits of 0: the loss is (log E)^2": (torch.zeros(3, 4, dtype=torch.float64),),
        "wrong value for random logits": (3 * draw(6, 5, seed=2),),
    }
    expect_cases(f, z_reference, cases, z_suspects)
    large = torch.tensor([[1000.0, 999.0, -1000.0], [3.0, -1000.0, 2.0]], dtype=torch.float64)
    if not torch.isfinite(call(f, large)):
        refuse("with logits of 1000 the loss is not finite: exp overflows, so subtract the largest logit first")
    expect_cases(f, z_reference, {"wrong value for logits of 1000": (large,)}, z_suspects)
    expect_untouched(f, {"logits": draw(4, 6, seed=3)})
    as_vector = lambda of: lambda z: of(z)[None]
    expect_good_manners(as_vector(f), as_vector(z_reference), {"logits": draw(4, 6, seed=3)})
