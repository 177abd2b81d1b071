"""Random numbers that depend on (seed, step) alone."""

import numpy as np

from minigated.errors import InputError

_BITS = 64


def draws(seed: int, step: int, count: int, stream: int = 0) -> np.ndarray:
    """`count` random 64-bit numbers of a counter-based generator (Philox) with (seed, step) as its key.

    There is no state to carry along: a run that resumes at `step` draws what it would have drawn. The raw
    bits are used because they stay the same in every version of the library.

    Args:
        stream: keeps apart the draws of one (seed, step) that serve different ends.

    Returns:
        [count] uint64.

    Raises:
        InputError: seed or step is negative or too large.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 1 << _BITS:
            raise InputError(f"{name} {value} is out of range; accepted: 0 to 2**{_BITS} - 1")
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)


def integers(seed: int, step: int, count: int, below: int, stream: int = 0) -> np.ndarray:
    """[count] int64, uniform on 0 .. below - 1 (to one part in 2**64 / below)."""
    return (draws(seed, step, count, stream) % np.uint64(below)).astype(np.int64)


def uniforms(seed: int, step: int, count: int, stream: int = 0) -> np.ndarray:
    """[count] float64, uniform on [0, 1)."""
    return (draws(seed, step, count, stream) >> np.uint64(11)) * 2.0**-53


def share(batch: int, rank: int, world: int) -> slice:
    """The rows of a global batch that belong to process `rank` of `world`."""
    if world < 1 or batch % world:
        raise InputError(f"{world} processes cannot share a batch of {batch}; accepted: a divisor of {batch}")
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} is outside the {world} processes; accepted: 0 to {world - 1}")
    rows = batch // world
    return slice(rank * rows, (rank + 1) * rows)
