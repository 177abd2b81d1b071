"""Solutions of chapter 4. The docstrings are the statements; the stubs are made from this file."""

import torch
from torch import Tensor


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
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window, window, channels)


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
    if window < 1:
        raise ValueError(f"window {window}; accepted: 1 or more")
    window = min(window, side)
    return window, window // 2 if shifted and side > window else 0, -side % window


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
    came_round = torch.arange(side) >= side - shift  # in rolled order
    region = came_round.view(-1, window)  # [windows, W]
    return region[:, :, None] == region[:, None, :]


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
    cut = lambda x: x.unflatten(2, (-1, window))  # [B, h, w/W, W, D], a view
    scores = cut(q) @ cut(k).mT / q.shape[-1] ** 0.5  # [B, h, w/W, W, W]
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
    return (weights @ cut(v)).flatten(2, 3)


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
    return 9, 4, 2


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
    for height, width in ((8, 12), (9, 7)):
        x = torch.randn(2, height, width, 3, dtype=torch.float64)
        before = mix(x)
        rows, columns = ((torch.arange(side) + 2) // 4 for side in (height, width))
        for cell in [(r, c) for r in range(height) for c in range(width)]:
            other = x.clone()
            other[0, cell[0], cell[1]] += torch.randn(3, dtype=torch.float64)
            moved = (mix(other) - before).abs().amax(-1) > 1e-9  # [2, h, w]
            region = (rows == rows[cell[0]])[:, None] & (columns == columns[cell[1]])
            if moved[1].any() or not torch.equal(moved[0], region):
                return False
    return True


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
    cells = height * width
    rows, columns = height // window, width // window
    return {
        "whole": 2 * cells * cells * channels,
        "window": 2 * cells * window**2 * channels,
        "decomposed": 2 * cells * 2 * window * channels,
        "masks": rows + columns - 1,  # the last row and the last column of windows
    }
