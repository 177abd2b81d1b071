"""What the tests of chapter 6 share: mixers with random weights, their tables, and the comparison."""

from dataclasses import replace

import swat_by_hand
import torch

from minigated.decay import rmt_log_decay
from minigated.swat import SwatAttention, SwatOptions, SwatTableBuilder
from minigated.swat_options import READINGS

DEFAULT = SwatOptions()
ALTERNATIVES = [
    replace(DEFAULT, **{name: value})
    for name, accepted in READINGS.items()
    for value in accepted
    if value != getattr(DEFAULT, name)
]


def different(options: SwatOptions) -> str:
    found = [f"{n}={v}" for n, v in vars(options).items() if v != getattr(DEFAULT, n)]
    return " ".join(found) or "default"


def build(options=DEFAULT, heads=4, width=4, window=3, shifted=True, seed=0):
    """A mixer with all weights random and large (at the usual start many mistakes are too small to see), its tables."""
    module = SwatAttention(heads * width, heads, options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    tables = SwatTableBuilder(heads, width, rmt_log_decay(heads, dtype=torch.float64), window, shifted, options)
    return module, tables.double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(module, x, window, shifted, options=None):
    rates = rmt_log_decay(module.heads, dtype=torch.float64).tolist()
    with torch.no_grad():
        return torch.stack(
            [swat_by_hand.mixer(module, m, options or module.options, rates, window, shifted) for m in x]
        )


def assert_same(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance)
