"""Which images are held out of a data set's train part: fixed, balanced over the classes, the same everywhere."""

import numpy as np

from minigated.data.streams import draws

PARTS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
SEED, STREAM = 0, 3  # of the choice; changing either changes every validation split


def hold_out(labels: np.ndarray, parts: np.ndarray, count: int | np.ndarray, to: int = VALIDATION) -> np.ndarray:
    """Moves some of every class from train to another part.

    The train images of class c, in the order of the source, are ranked by the 64-bit numbers that
    `minigated.data.streams.draws` gives for (seed 0, step c); the lowest go. No library's shuffle is involved, so
    the choice is the same on every machine and in every version.

    Args:
        labels: [N] class of every image.
        parts: [N] `TRAIN`, `VALIDATION` or `TEST`; not changed.
        count: images to move of every class: one number, or [classes].
        to: where to.

    Returns:
        [N], the new parts.
    """
    parts = parts.copy()
    for label, images in enumerate(np.broadcast_to(count, labels.max() + 1).tolist()):
        rows = np.flatnonzero((labels == label) & (parts == TRAIN))
        order = np.argsort(draws(SEED, label, len(rows), STREAM + to), kind="stable")
        parts[rows[order[:images]]] = to
    return parts
