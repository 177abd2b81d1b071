"""Checks of chapter 4: rolling before padding, leaks between windows, what windows save."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import expect_number, expect_property, refuse

WINDOW, SHIFT = 4, 2


# ---------------------------------------------------------------------------------------------- 4.5
def rolled_then_padded(side: int, window: int, shift: int) -> list[tuple[int, int]]:
    """Pairs of cells that see each other under the mistake, by the mask that was made for the padded line."""
    padded = side + -side % window
    cells = [(i + shift) % side for i in range(side)] + [-1] * (padded - side)  # -1 is padding
    round_ = [place >= padded - shift for place in range(padded)]
    return [
        (cells[a], cells[b])
        for start in range(0, padded, window)
        for a in range(start, start + window)
        for b in range(start, start + window)
        if min(cells[a], cells[b]) >= 0 and round_[a] == round_[b]
    ]


@exercise(
    "4.5",
    "Roll, then pad: find the leak",
    kind="break",
    difficulty=3,
    minutes=20,
    hint=(
        "Take W = 4 and shift 2, and write the rolled line and its padding for 8, 9, 10 and 11 cells, with bars "
        "between windows. Where does cell 0 land, and does the mask know that it came round?"
    ),
    pseudo=(
        "choose a window and a shift above 0\n"
        "choose a side that the window does not divide, so that there is padding\n"
        "roll without the padding: cells shift, ..., side - 1, 0, ..., shift - 1, then the padding\n"
        "look for a window that holds cell 0 and cell side - 1, with neither among the last `shift` places"
    ),
)
def leaky_map(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 3 or not all(isinstance(n, int) for n in case):
        refuse(f"return three whole numbers (side, window, shift); you return {case!r}")
    side, window, shift = case
    if not 2 <= window or not 1 <= side <= 64 or not 0 <= shift < window:
        refuse(f"side {side}, window {window}, shift {shift}: side up to 64, window at least 2, 0 <= shift < window")
    if window >= side:
        refuse(f"one window of {window} covers all {side} cells: by the adaptive rule nothing is shifted there")
    if shift == 0:
        refuse("without a shift nothing is rolled, and the order of rolling and padding does not matter")
    if side % window == 0:
        refuse(f"{window} divides {side}: there is no padding, and the order does not matter")
    if not any(abs(a - b) >= window for a, b in rolled_then_padded(side, window, shift)):
        refuse(
            f"with {side} cells, window {window} and shift {shift} no distant cells meet: the cells that came round "
            f"begin a window of their own"
        )


# ---------------------------------------------------------------------------------------------- 4.6
def regions(side: int) -> Tensor:
    """Same region, [side, side]: borders behind cells 2, 6, 10 and so on."""
    region = (torch.arange(side) + SHIFT) // WINDOW
    return region[:, None] == region


def unmasked(side: int) -> Tensor:
    """Same window of the padded, rolled line, whatever came round."""
    padded = side + -side % WINDOW
    window = ((torch.arange(padded) - SHIFT) % padded // WINDOW)[:side]
    return window[:, None] == window


def rolled_first(side: int) -> Tensor:
    """Who sees whom when the line is rolled before it is padded."""
    seen = torch.eye(side, dtype=torch.bool)
    for a, b in rolled_then_padded(side, WINDOW, SHIFT):
        seen[a, b] = True
    return seen


def still(side: int) -> Tensor:
    window = torch.arange(side) // WINDOW
    return window[:, None] == window


def by_one(side: int) -> Tensor:
    window = (torch.arange(side) + 1) // WINDOW
    return window[:, None] == window


def alone(side: int) -> Tensor:
    return torch.eye(side, dtype=torch.bool)


def passes(rows: Callable[[int], Tensor], columns: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    """Means over who sees whom: along the columns of a row, then along the rows."""

    def mix(x: Tensor) -> Tensor:
        share = lambda seen: seen.double() / seen.sum(-1, keepdim=True)
        return x + torch.einsum("ij,bjkc,lk->bilc", share(rows(x.shape[1])), x, share(columns(x.shape[2])))

    return mix


def attention(x: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    seen = regions(height)[:, None, :, None] & regions(width)[None, :, None, :]
    cells = x.reshape(batch, 1, -1, channels)
    mask = seen.reshape(height * width, -1)
    return F.scaled_dot_product_attention(cells, cells, cells, attn_mask=mask).reshape(x.shape)


def product(x: Tensor) -> Tensor:
    """Every cell times what its region adds up to: nothing is a plain mean here."""
    return x * (1 + passes(regions, regions)(x.tanh()))


STAYS = {
    "means over each region": passes(regions, regions),
    "softmax attention inside each region": attention,
    "a product with what the region adds up to": product,
}
LEAKS = {
    "no mask: a window at the border joins both ends of the map": passes(unmasked, unmasked),
    "a mask in the width pass only": passes(unmasked, regions),
    "a mask in the height pass only": passes(regions, unmasked),
    "rolled before it was padded, which shows only where windows do not divide the map": passes(
        rolled_first, rolled_first
    ),
    "windows that were not shifted": passes(still, still),
    "windows shifted by one cell": passes(by_one, by_one),
    "no window at all: every cell sees every cell": passes(
        lambda n: torch.ones(n, n, dtype=torch.bool), lambda n: torch.ones(n, n, dtype=torch.bool)
    ),
    "nothing is mixed": lambda x: 2 * x,
    "the width pass alone: a region's other rows are never seen": passes(alone, regions),
    "the height pass alone": passes(regions, alone),
    "a cell sees those before it only": passes(lambda n: regions(n).tril(), lambda n: regions(n).tril()),
    "images of a batch see each other": lambda x: passes(regions, regions)(x) + x.mean(0, keepdim=True),
    "the map is divided by its deviation, which every cell enters": lambda x: (
        passes(regions, regions)(x) / x.std((1, 2, 3), keepdim=True)
    ),
    "a 3 x 3 mean at the end, which crosses borders": lambda x: F.avg_pool2d(
        passes(regions, regions)(x).permute(0, 3, 1, 2), 3, 1, 1
    ).permute(0, 2, 3, 1),
}


@exercise(
    "4.6",
    "Prove that nothing leaks",
    kind="prove",
    difficulty=4,
    minutes=30,
    hint=(
        "Add random noise to one cell of one image and see which cells of the output move. Which ones should? Do it "
        "for every cell, and once on a map that 4 does not divide. A constant shift of a cell is not enough: a norm "
        "takes it out."
    ),
    pseudo=(
        "for a map of 8 x 12 and one of 9 x 7, two images:\n"
        "    row region = (row + 2) // 4, column region alike\n"
        "    for every cell: add noise to it in the first image, mix again\n"
        "    the cells that moved must be exactly those of its region, in that image\n"
        "return True if it was so every time"
    ),
)
def stays_in_its_region(f):
    expect_property(f, STAYS, LEAKS)


# ---------------------------------------------------------------------------------------------- 4.7
def counted_cost(height: int, width: int, window: int, channels: int) -> dict[str, int]:
    """Counted pair by pair on the map, and window by window."""
    rows, columns = height // window, width // window
    in_row = sum(a // window == b // window for a in range(width) for b in range(width))
    in_column = sum(a // window == b // window for a in range(height) for b in range(height))
    shift = window // 2
    mixed = lambda side: [len({(place + shift) // side for place in range(start, start + window)}) > 1
                          for start in range(0, side, window)]  # fmt: skip
    return {
        "whole": 2 * channels * (height * width) ** 2,
        "window": 2 * channels * in_row * in_column,
        "decomposed": 2 * channels * (height * in_row + width * in_column),
        "masks": sum(a or b for a in mixed(height) for b in mixed(width)) if rows * columns else 0,
    }


def cost_suspects(name: str, value: int, height: int, width: int, window: int, channels: int) -> dict[str, int]:
    cells, rows, columns = height * width, height // window, width // window
    suspects = {
        "whole": {
            "count the products with the values too: a pair costs twice C": value // 2,
            "every cell looks at every cell: h * w times h * w pairs": 2 * cells * channels,
        },
        "window": {
            "count the products with the values too: a pair costs twice C": value // 2,
            "a window has W * W cells, not W": 2 * cells * window * channels,
            "that is one window; there are many": 2 * window**4 * channels,
        },
        "decomposed": {
            "there are two passes": value // 2,
            "in a pass a cell looks at W cells, not at W * W": 2 * cells * 2 * window**2 * channels,
            "a pass stays inside its window": 2 * cells * (height + width) * channels,
        },
        "masks": {
            "only one window holds all four corners, but a whole row and a whole column of them hold two ends": 1,
            "not every window: only those at the end of an axis": rows * columns,
            "the window in the corner is in the last row and in the last column: count it once": rows + columns,
            "rows and columns of windows both have a last one": max(rows, columns),
        },
    }
    return {message: number for message, number in suspects[name].items() if number != value}


@exercise(
    "4.7",
    "What windows save",
    kind="predict",
    difficulty=2,
    minutes=10,
    hint=(
        "Count pairs first: how many cells does one cell look at? Then multiply by the cells of the map and by 2 C. "
        "For the masks draw a map of 3 x 4 windows and mark those that hold cells from two ends."
    ),
    pseudo=(
        "cells = h * w; a pair costs 2 C\n"
        "whole: cells * cells pairs\n"
        "window: cells * W * W pairs\n"
        "decomposed: cells * W pairs in each of two passes\n"
        "masks: windows of the last row and of the last column, the corner once"
    ),
)
def cost_of_windows(f):
    for sizes in ((8, 12, 4, 3), (12, 8, 2, 5), (56, 56, 7, 16)):
        predicted, right = f(*sizes), counted_cost(*sizes)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            where = f"{name!r} for a map of {sizes[0]} x {sizes[1]}, W = {sizes[2]}, C = {sizes[3]}"
            expect_number(predicted[name], value, where, cost_suspects(name, value, *sizes))
