"""A model of a few hundred weights and batches that depend on the step alone, for the tests of training."""

import torch
import torch.nn.functional as F
from torch import nn

from minigated.train import TrainConfig, Trainer

WORDS, WIDTH, BATCH, LENGTH = 11, 8, 8, 6


class ToyBlock(nn.Module):
    """A residual linear layer with dropout, so that the random state matters, and a per-channel gain."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x + self.gain * self.dropout(torch.tanh(self.linear(x)))


class ToyModel(nn.Module):
    """Predicts the next of `WORDS` words from the present one."""

    def __init__(self, width: int = WIDTH, tied: bool = False, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(WORDS, width)
            self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(2))
            self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def toy_loss(model, batch):
    """Next-word cross-entropy of windows [B, T + 1]."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


def toy_batch(step: int, rank: int = 0, world: int = 1):
    """Process `rank`'s share of batch `step`: counting up modulo `WORDS` from random starts."""
    start = torch.randint(WORDS, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    batch = (start + torch.arange(LENGTH + 1)) % WORDS  # [BATCH, LENGTH + 1]
    share = BATCH // world
    return batch[rank * share : (rank + 1) * share]


def toy_config(**settings) -> TrainConfig:
    """Ten quiet steps on the CPU."""
    return TrainConfig(**{"steps": 10, "warmup": 2, "device": "cpu", "progress": False, **settings})


def toy_trainer(model=None, batch_at=toy_batch, evaluate=None, loss_fn=toy_loss, **settings) -> Trainer:
    """A trainer of a fresh toy model under `toy_config(**settings)`."""
    return Trainer(model or ToyModel(), loss_fn, batch_at, toy_config(**settings), evaluate)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters are equal bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def spoiling(step, factor):
    """A loss that is multiplied by `factor` at the given step."""
    count = iter(range(1000))
    return lambda model, batch: toy_loss(model, batch) * (factor if next(count) == step else 1.0)
