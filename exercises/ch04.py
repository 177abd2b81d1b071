"""Exercises of chapter 4. Replace a `raise` by your answer, then `pytest exercises -k 4_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 4.1 Cut a map into windows: fill, difficulty 2 of 5, about 15 minutes
def cut_into_windows(x: Tensor, window: int) -> Tensor:
    """Cut every map of a batch into square windows.

    Windows are counted row by row: first all windows of the top row of the first image, from left to right, then the
    next row, then the next image. Inside a window the cells keep their places.

    Args:
        x: maps [B, h, w, C]; h and w are multiples of the window, and need not be equal.
        window: W.

    Returns:
        [B * (h / W) * (w / W), W, W, C].
    """
    raise NotImplementedError("4.1")


# 4.2 Plan an axis: fill, difficulty 1 of 5, about 10 minutes
def plan_of_an_axis(side: int, window: int, shifted: bool) -> tuple:
    """Decide how one axis of a map is cut.

    A window is never larger than the map. A map that fits into one window is not shifted: there is nothing to shift
    into. Otherwise the shift is half the window, rounded down. Where windows do not divide the side, cells are added
    at the end until they do.

    Args:
        side: cells along the axis, at least 1.
        window: wanted side of the window, at least 1. Refuse a smaller one with a ValueError.
        shifted: whether this layer shifts.

    Returns:
        (window, shift, padding), whole numbers.
    """
    raise NotImplementedError("4.2")


# 4.3 Who may look at whom: fill, difficulty 3 of 5, about 20 minutes
def who_may_look(side: int, window: int, shift: int) -> Tensor:
    """Write the mask of one axis after a cyclic shift.

    A line of `side` cells is rolled by -shift, so that the first `shift` cells come round to the end, and is then cut
    into windows. Two cells of a window may look at each other only if they were neighbours all the way before the
    roll: a cell that came round may not look at one that did not.

    Args:
        side: cells, a multiple of the window. window: W. shift: 0 up to, not including, W.

    Returns:
        Bool [side / W, W, W], True where the cell in the row may look at the cell in the column.
    """
    raise NotImplementedError("4.3")


# 4.4 A pass without windows: fill, difficulty 3 of 5, about 20 minutes
def rows_in_segments(q: Tensor, k: Tensor, v: Tensor, window: int, allowed: Tensor) -> Tensor:
    """Attend along the rows of a map, inside windows, without cutting out a single window.

    A width pass never leaves its row. So a row in segments of W cells is all it needs: whatever window the row above
    belongs to does not matter. Attention is softmax(q k^T / sqrt(D)) v inside each segment, with the mask before the
    softmax.

    Args:
        q, k, v: maps [B, h, w, D], already rolled; w is a multiple of the window, h is any number.
        window: W.
        allowed: bool [w / W, W, W], the mask of each segment, from exercise 4.3.

    Returns:
        [B, h, w, D].
    """
    raise NotImplementedError("4.4")


# 4.5 Roll, then pad: find the leak: break, difficulty 3 of 5, about 20 minutes
def leaky_map() -> tuple:
    """Find a map on which rolling before padding leaks.

    A line of `side` cells is padded at its end to a multiple of the window, and rolled by -shift. The right order is
    pad, then roll. A known mistake is to roll first and pad afterwards: the mask of exercise 4.3, made for the padded
    line, then lies over other cells than it was made for, and cells from the two ends of the line see each other.

    Give a case in which the mistake lets two cells of the line look at each other that lie at least W apart. On many
    lines it goes unnoticed.

    Returns:
        (side, window, shift): side up to 64, window at least 2, shift from 0 up to, not including, the window.
    """
    raise NotImplementedError("4.5")


# 4.6 Prove that nothing leaks: prove, difficulty 4 of 5, about 30 minutes
def stays_in_its_region(mix) -> bool:
    """Write the property that catches leaks between windows.

    `mix` takes maps [B, h, w, C] and mixes cells inside shifted windows of side 4, shift 2: the windows' borders lie
    behind rows and columns 2, 6, 10 and so on, and no cell may depend on one beyond a border. Inside its region,
    every cell must depend on every other one. Change one cell, see who moves.

    You are graded by the leaking or lazy implementations you turn down and by the right ones you accept.

    Args:
        mix: a function of maps [B, h, w, C], float64, that returns the same shape. h and w are yours to choose from 5
            to 16, multiples of 4 or not; B and C too.

    Returns:
        True if exactly the cells of one region move, whichever cell was changed; otherwise False.
    """
    raise NotImplementedError("4.6")


# 4.7 What windows save: predict, difficulty 2 of 5, about 10 minutes
def cost_of_windows(height: int, width: int, window: int, channels: int) -> dict:
    """Predict what windows save.

    Count multiplications of one layer on one map, for the products q k^T and weights times v only (C channels over all
    heads; a pair of cells costs C for its score and C for its value). The window divides both sides.

        "whole"       every cell looks at every cell
        "window"      every cell looks at the cells of its W x W window
        "decomposed"  a width pass over the W cells of its row in the window, then a height pass over W cells
        "masks"       the number of windows in which a shifted layer forbids any pair

    Args:
        height, width: h and w, larger than the window. window: W, even. channels: C.

    Returns:
        A dictionary of whole numbers under these four names.
    """
    raise NotImplementedError("4.7")
