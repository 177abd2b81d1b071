"""Checks of chapter 7: which mixtures of experts treat a token as if it were alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import draw, expect_property

WIDTH, EXPERTS, TOP_K = 8, 6, 2


# ---------------------------------------------------------------------------------------------- 7.6
def outputs(x: Tensor) -> Tensor:
    """[N, C] -> [N, E, C]: what every expert would answer to every token."""
    return torch.tanh(torch.einsum("nc,ecd->ned", x, draw(EXPERTS, WIDTH, WIDTH, seed=1)))


def router_logits(x: Tensor) -> Tensor:
    return x @ draw(WIDTH, EXPERTS, seed=2)  # [N, E]


def keep(values: Tensor, top_k: int = TOP_K) -> Tensor:
    """The k largest of each row, zeros elsewhere."""
    found = values.topk(top_k, -1)
    return torch.zeros_like(values).scatter(-1, found.indices, found.values)


def mixture(weigh: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor] = router_logits) -> Callable:
    """A layer whose weights [N, E] are weigh(logits), and whose logits are change(x)."""
    return lambda x: (weigh(change(x)).unsqueeze(-1) * outputs(x)).sum(1)


def plain(z: Tensor) -> Tensor:
    return keep(torch.softmax(z, -1))


def unit(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


def with_places(places: Callable[[int], int], sort: bool = False) -> Callable[[Tensor], Tensor]:
    """Every expert has places(N) of them; tokens beyond are dropped, latest first or least probable first."""

    def weigh(z: Tensor) -> Tensor:
        weights = plain(z)
        order = torch.arange(len(z))[:, None].expand_as(z)
        first = weights.argsort(dim=0, descending=True, stable=True) if sort else order
        taken = (weights.gather(0, first) > 0).cumsum(0) <= places(len(z))
        return weights * torch.zeros_like(taken).scatter(0, first, taken)

    return weigh


def experts_choose(z: Tensor) -> Tensor:
    """Each expert takes the tokens that suit it best, N k / E of them."""
    places = max(1, math.ceil(len(z) * TOP_K / EXPERTS))
    return keep(torch.softmax(z, -1).T, places).T


class MovingBias:
    """Busy experts are made less attractive after each call, as in training."""

    def __init__(self):
        self.bias = torch.zeros(EXPERTS, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        weights = plain(z + self.bias)
        self.bias = self.bias - 0.5 * (weights > 0).double().mean(0)
        return weights


def alone() -> dict[str, Callable]:
    bias = draw(EXPERTS, seed=3)
    return {
        "top-2 of a softmax": mixture(plain),
        "top-2, weights that sum to one": mixture(lambda z: unit(plain(z))),
        "top-1": mixture(lambda z: keep(torch.softmax(z, -1), 1)),
        "a sigmoid for every expert, top-2": mixture(lambda z: keep(torch.sigmoid(z))),
        "all experts with a positive logit, however many": mixture(torch.relu),
        "a constant bias on the choice": mixture(lambda z: (keep((z + bias).exp()) > 0) * torch.softmax(z, -1)),
        "a shared expert beside two others": lambda x: mixture(plain)(x) + torch.tanh(x.roll(1, -1)),
        "boxes with a place for every token": mixture(with_places(lambda tokens: tokens)),
    }


def mixing() -> dict[str, Callable]:
    """Made anew for each property: one of them has a memory."""
    return {
        "experts choose their tokens": mixture(experts_choose),
        "a softmax over the tokens": mixture(lambda z: keep(torch.softmax(z, 0))),
        "logits minus their mean over the tokens": mixture(lambda z: plain(z - z.mean(0))),
        "weights divided by an expert's sum over the tokens": mixture(lambda z: plain(z) / plain(z).sum(0).clamp(1.0)),
        "a fourth of the places too few: the latest tokens are dropped": mixture(
            with_places(lambda tokens: max(1, tokens * TOP_K * 3 // (EXPERTS * 4)))
        ),
        "as many places as even use would need; the least probable tokens are dropped": mixture(
            with_places(lambda tokens: max(4, math.ceil(tokens * TOP_K / EXPERTS)), sort=True)
        ),
        "sixteen places an expert; the latest tokens are dropped": mixture(with_places(lambda tokens: 16)),
        "an expert picked by the token's place": mixture(
            lambda z: torch.eye(EXPERTS, dtype=z.dtype)[torch.arange(len(z)) % EXPERTS]
        ),
        "a router that reads the token before": mixture(plain, lambda x: router_logits(x.roll(1, 0))),
        "noise on the logits": mixture(lambda z: plain(z + torch.randn_like(z))),
        "a bias that moves with use": mixture(MovingBias()),
    }


@exercise(
    "7.6",
    "Prove that tokens go alone",
    kind="prove",
    difficulty=3,
    minutes=25,
    hint=(
        "Run a batch at once, and then its tokens one by one; torch.allclose compares. A layer that drops tokens does "
        "so when many of them want the same expert: which batch is sure to bring that about?"
    ),
    pseudo=(
        "two batches: a few random tokens; and 64 times the same one, so that all want the same experts\n"
        "for each: at_once = layer(batch); one_by_one = layer of each token alone, put together\n"
        "return True if the two are equal for both batches"
    ),
)
def tokens_go_alone(f):
    expect_property(f, alone(), mixing())
