"""Checks of chapter 4: cutting windows, planning an axis, the mask of a shift, passes in segments."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_close,
    expect_good_manners,
    expect_refusal,
    expect_tensor,
    expect_untouched,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 4.1
def cut_reference(x: Tensor, window: int) -> Tensor:
    windows = []
    for image in x:
        for top in range(0, x.shape[1], window):
            for left in range(0, x.shape[2], window):
                windows.append(image[top : top + window, left : left + window])
    return torch.stack(windows)


def cut_suspects(x: Tensor, window: int) -> dict[str, Tensor]:
    batch, height, width, channels = x.shape
    split = x.reshape(batch, height // window, window, width // window, window, channels)
    shape = (-1, window, window, channels)
    return {
        "that is a plain reshape: it cuts the map into runs of cells, not into squares": x.reshape(shape),
        "the windows of one place come first for all images: the batch must stay outermost": (
            split.permute(1, 3, 0, 2, 4, 5).reshape(shape)
        ),
        "the windows are counted column by column": split.permute(0, 3, 1, 2, 4, 5).reshape(shape),
        "rows and columns are swapped inside each window": split.permute(0, 1, 3, 4, 2, 5).reshape(shape),
    }


@exercise(
    "4.1",
    "Cut a map into windows",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "Split both sides in two with a reshape: rows into (h / W, W), columns into (w / W, W). The six axes are then "
        "image, window row, row inside, window column, column inside, channel. Which two must change places before "
        "they can be joined again?"
    ),
    pseudo=(
        "reshape x to [B, h/W, W, w/W, W, C]\n"
        "swap axes 2 and 3: [B, h/W, w/W, W, W, C]\n"
        "reshape to [everything else, W, W, C]"
    ),
)
def cut_into_windows(f):
    x = torch.arange(2 * 4 * 6 * 3, dtype=torch.float64).view(2, 4, 6, 3)
    expect_tensor(call(f, x, 2), (12, 2, 2, 3))
    for window, shape in ((2, (2, 4, 6, 3)), (3, (3, 3, 9, 2)), (4, (1, 8, 4, 5)), (1, (2, 2, 3, 1))):
        x = draw(*shape)
        where = f"wrong for maps of {shape[1]} x {shape[2]} and windows of {window}"
        expect_close(call(f, x, window), cut_reference(x, window), where, cut_suspects(x, window))
    expect_good_manners(f, cut_reference, {"x": draw(2, 4, 6, 3)}, 2)


# ---------------------------------------------------------------------------------------------- 4.2
CASES = [
    (side, window, shifted)
    for side in (1, 2, 7, 8, 9, 14, 56)
    for window in (1, 2, 4, 7, 8, 9, 20)
    for shifted in (False, True)
]


def plan_reference(side: int, window: int, shifted: bool) -> tuple[int, int, int]:
    used = window if window < side else side
    shift = 0
    if shifted and used < side:
        shift = (used - used % 2) // 2
    cells = side
    while cells % used:
        cells += 1
    return used, shift, cells - side


@exercise(
    "4.2",
    "Plan an axis",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "Three rules, in this order: the window cannot exceed the side; a single window needs no shift; what is "
        "missing to the next multiple of the window is the padding. In Python `-side % window` is that number."
    ),
    pseudo=(
        "refuse a window below 1\n"
        "window = the smaller of window and side\n"
        "shift = half the window, if shifted and the side is larger than the window; else 0\n"
        "padding = what is missing to the next multiple"
    ),
)
def plan_of_an_axis(f):
    for side, window, shifted in CASES:
        found, right = f(side, window, shifted), plan_reference(side, window, shifted)
        case = f"side {side}, window {window}, shifted {shifted}"
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            refuse(f"return the three of (window, shift, padding); for {case} you return {found!r}")
        found = tuple(found)
        if found == right:
            continue
        if found[0] != right[0]:
            what = "a window is never larger than the map" if window > side else "the window fits and must not change"
            refuse(f"{case}: window {found[0]}; {what}")
        if found[1] != right[1]:
            if right[1] == 0 and not shifted:
                refuse(f"{case}: shift {found[1]} in a layer that does not shift")
            if right[0] == side:
                refuse(f"{case}: shift {found[1]}; one window covers the axis, so nothing is shifted")
            refuse(f"{case}: shift {found[1]}; it is half the window that is used, rounded down")
        if right[2] == 0:
            refuse(f"{case}: padding {found[2]}, although the windows divide the side")
        refuse(f"{case}: padding {found[2]}; how many cells are missing to the next multiple of {right[0]}?")
    for window in (0, -3):
        expect_refusal(f, 8, window, False, about=f"a window of {window}")


# ---------------------------------------------------------------------------------------------- 4.3
def looks_reference(side: int, window: int, shift: int) -> Tensor:
    order = [(i + shift) % side for i in range(side)]  # which cell stands where after the roll
    allowed = torch.zeros(side // window, window, window, dtype=torch.bool)
    for n in range(side // window):
        cells = order[n * window : (n + 1) * window]
        for a, first in enumerate(cells):
            for b, second in enumerate(cells):
                allowed[n, a, b] = (first < shift) == (second < shift) if n == side // window - 1 else True
    return allowed


def looks_suspects(side: int, window: int, shift: int) -> dict[str, Tensor]:
    right = looks_reference(side, window, shift)
    place = torch.arange(window)
    suspects = {
        "the mask is inverted: True is where a cell may look": ~right,
        "it is the first window that holds cells from both ends, after a roll to the wrong side": right.flip(0),
        "nothing is forbidden, but the last window holds cells of both ends": torch.ones_like(right),
        "every window is divided; only the last one holds cells from both ends": right[-1:].expand_as(right),
        "cells that came round may look at the others, only not the reverse: forbid both": (
            right | (place[:, None] >= window - shift)
        ),
        "the last window is divided at the wrong place: `shift` cells came round, not W - shift": (
            looks_reference(side, window, (window - shift) % window)
        ),
        "a cell may look at itself": right & ~torch.eye(window, dtype=torch.bool),
    }
    return {message: wrong for message, wrong in suspects.items() if not torch.equal(wrong, right)}


@exercise(
    "4.3",
    "Who may look at whom",
    kind="fill",
    difficulty=3,
    minutes=20,
    hint=(
        "Write the rolled line of 8 cells with shift 2 by hand: 2 3 4 5 | 6 7 0 1. Mark the cells that came round. "
        "Two cells of a window may look at each other if both are marked or both are not."
    ),
    pseudo=(
        "mark the last `shift` places of the rolled line: they came round\n"
        "cut the marks into windows, [side / W, W]\n"
        "compare each mark of a window with each other: equal marks may look"
    ),
)
def who_may_look(f):
    for side, window, shift in ((8, 4, 2), (8, 4, 0), (8, 4, 1), (12, 3, 1), (12, 3, 2), (14, 7, 3), (4, 4, 0)):
        found, right = f(side, window, shift), looks_reference(side, window, shift)
        expect_tensor(found, tuple(right.shape))
        if found.dtype != torch.bool:
            refuse(f"the mask is {found.dtype}: True and False, torch.bool, are meant")
        where = f"wrong for {side} cells, window {window}, shift {shift}"
        suspects = {m: w.double() for m, w in looks_suspects(side, window, shift).items()}
        expect_close(found.double(), right.double(), where, suspects)


# ---------------------------------------------------------------------------------------------- 4.4
def segments_reference(q: Tensor, k: Tensor, v: Tensor, window: int, allowed: Tensor) -> Tensor:
    rows = []
    for start in range(0, q.shape[2], window):
        part = slice(start, start + window)
        a, b, c = q[:, :, part], k[:, :, part], v[:, :, part]
        scores = torch.einsum("bhid,bhjd->bhij", a, b) / math.sqrt(q.shape[-1])
        weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * allowed[start // window]
        rows.append(torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True), c))
    return torch.cat(rows, 2)


def segments_suspects(q, k, v, window, allowed) -> dict[str, Tensor]:
    every, scale = torch.ones_like(allowed), q.shape[-1] ** -0.5
    cut = lambda x: x.unflatten(2, (-1, window))
    scores = cut(q) @ cut(k).mT * scale
    weigh = lambda weights: (weights @ cut(v)).flatten(2, 3)
    suspects = {
        "the mask is not used": segments_reference(q, k, v, window, every),
        "the mask comes after the softmax: a row's weights no longer sum to 1": weigh(scores.softmax(-1) * allowed),
        "a masked score of 0 still gets a weight; minus infinity does not": weigh((scores * allowed).softmax(-1)),
        "the mask is inverted: True is where a cell may look": segments_reference(
            q, k, v, window, ~allowed | torch.eye(window, dtype=torch.bool)
        ),
        "the masks of the segments are in reverse order": segments_reference(q, k, v, window, allowed.flip(0)),
        "the scale 1 / sqrt(D) is missing": segments_reference(q / scale, k, v, window, allowed),
        "the whole row is one segment": segments_reference(q, k, v, q.shape[2], torch.ones(1, 1, 1, dtype=torch.bool)),
    }
    if q.shape[1] == q.shape[2]:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        suspects["that is the height pass: it runs along columns"] = segments_reference(
            *turned, window, allowed
        ).transpose(1, 2)
    right = segments_reference(q, k, v, window, allowed)
    return {m: w for m, w in suspects.items() if w.isfinite().all() and (w - right).abs().max() > 1e-9}


@exercise(
    "4.4",
    "A pass without windows",
    kind="fill",
    difficulty=3,
    minutes=20,
    hint=(
        "`x.unflatten(2, (-1, W))` gives every row's segments an axis of their own: [B, h, w/W, W, D]. The matrix "
        "product works on the last two axes and leaves the rest alone; the mask [w/W, W, W] broadcasts over B and h."
    ),
    pseudo=(
        "split the column axis of q, k and v into segments of W\n"
        "scores = q k^T / sqrt(D) inside each segment, minus infinity where not allowed\n"
        "weights = softmax along the keys\n"
        "join the segments of weights times v"
    ),
)
def rows_in_segments(f):
    for height, width, window, shift in ((6, 6, 3, 1), (3, 8, 4, 2), (5, 6, 2, 0)):
        q, k, v = (draw(2, height, width, 4, seed=s) for s in range(3))
        allowed = looks_reference(width, window, shift)
        expect_tensor(call(f, q, k, v, window, allowed), (2, height, width, 4))
        where = f"wrong for a map of {height} x {width}, window {window}, shift {shift}"
        expect_close(
            call(f, q, k, v, window, allowed),
            segments_reference(q, k, v, window, allowed),
            where,
            segments_suspects(q, k, v, window, allowed),
        )
    inputs = {name: draw(1, 3, 6, 4, seed=s) for s, name in enumerate("qkv")}
    expect_untouched(f, inputs, 3, looks_reference(6, 3, 1))
    expect_good_manners(f, segments_reference, inputs, 3, looks_reference(6, 3, 1))
