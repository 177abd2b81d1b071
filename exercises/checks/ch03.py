"""Checks of chapter 3: rates, the Manhattan mask, a state that is carried on, two passes."""

import math

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    close,
    draw,
    expect_cases,
    expect_close,
    expect_dtypes,
    expect_good_manners,
    expect_gradient,
    expect_tensor,
    expect_untouched,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 3.1
def rates_by_rule(exponents) -> Tensor:
    return torch.tensor([math.log1p(-(2.0**-e)) for e in exponents], dtype=torch.float64)


def rate_suspects(heads: int, initial: float, span: float) -> dict[str, Tensor]:
    exponents = [initial + span * h / heads for h in range(heads)]
    right = rates_by_rule(exponents)
    wrong = {
        "that is gamma itself; the mask needs its logarithm": right.exp(),
        "the logarithm is to base 2; exp() undoes the natural one": right / math.log(2),
        "the logarithm is to base 10; exp() undoes the natural one": right / math.log(10),
        "the order is reversed: head 0 has the smallest gamma": right.flip(0),
        "divided by H - 1 instead of H, so that the last head reaches initial + span": rates_by_rule(
            initial + span * h / max(heads - 1, 1) for h in range(heads)
        ),
        "heads are counted from 0": rates_by_rule(initial + span * (h + 1) / heads for h in range(heads)),
        "that is RetNet's 1 - 2^(-5-h)": rates_by_rule(5.0 + h for h in range(heads)),
        "powers of e instead of powers of 2": torch.tensor([math.log1p(-math.exp(-e)) for e in exponents]),
        "span is not used: all heads have the same rate": rates_by_rule(initial for _ in range(heads)),
        "log gamma is negative: what lies farther counts less": -right,
        "2^-x is what a step takes away, not what it leaves": torch.tensor([-e * math.log(2) for e in exponents]),
    }
    return {message: value.double() for message, value in wrong.items() if not close(value, right)}


@exercise(
    "3.1",
    "A rate for every head",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "torch.arange(H) counts heads from 0, and 2.0 ** -x works on tensors. For four heads, initial 2 and span 4 the "
        "gammas are 0.75, 0.875, 0.9375 and 0.96875: take the logarithm last."
    ),
    pseudo="h = 0, 1, ..., H - 1\nlose = 2 to the power -(initial + span * h / H)\nreturn log(1 - lose)",
)
def decay_rates(f):
    for heads, initial, span in ((4, 2.0, 4.0), (5, 2.0, 5.0), (8, 1.0, 6.0), (1, 2.0, 4.0)):
        right = rates_by_rule(initial + span * h / heads for h in range(heads))
        value = f(heads, initial, span)
        expect_tensor(value, (heads,))
        if not value.is_floating_point():
            refuse(f"the rates have the dtype {value.dtype}: make them floats")
        suspects = rate_suspects(heads, initial, span)
        expect_close(value, right, f"wrong rates for {heads} heads, initial {initial}, span {span}", suspects)


# ---------------------------------------------------------------------------------------------- 3.2
def mask_by_loops(log_decay: Tensor, height: int, width: int, measure=lambda rows, columns: rows + columns) -> Tensor:
    cells = [(row, column) for row in range(height) for column in range(width)]
    apart = [[float(measure(abs(a - c), abs(b - d))) for c, d in cells] for a, b in cells]
    return torch.tensor(apart, dtype=log_decay.dtype) * log_decay[:, None, None]


def mask_suspects(log_decay: Tensor, height: int, width: int) -> dict[str, Tensor]:
    right = mask_by_loops(log_decay, height, width)
    return {
        "the distance is taken on the flattened index: the end of a row is next to the start of the following one": (
            mask_by_loops(log_decay, 1, height * width)
        ),
        "height and width are exchanged, or cells are counted column by column: use index // width and index % width": (
            mask_by_loops(log_decay, width, height)
        ),
        "that is the larger of the two distances, not their sum": mask_by_loops(log_decay, height, width, max),
        "that is the distance in a straight line, not rows plus columns": mask_by_loops(
            log_decay, height, width, math.hypot
        ),
        "the distance is squared": mask_by_loops(log_decay, height, width, lambda r, c: r * r + c * c),
        "only the rows count: the distance between columns is missing": mask_by_loops(
            log_decay, height, width, lambda r, c: r
        ),
        "only the columns count: the distance between rows is missing": mask_by_loops(
            log_decay, height, width, lambda r, c: c
        ),
        "that is gamma to the distance; the mask is added to logits, so it is a logarithm": right.exp(),
        "the sign is wrong: what lies farther must get less": -right,
        "the rates are given to the heads in reverse": mask_by_loops(log_decay.flip(0), height, width),
        "the logarithm is to base 2": right / math.log(2),
        "later cells are hidden: an image is not causal": right.tril(),
    }


@exercise(
    "3.2",
    "Rows apart plus columns apart",
    kind="fill",
    difficulty=2,
    minutes=20,
    hint=(
        "Give every cell its row and its column first: two vectors of length N from torch.arange(N), with // and %. "
        "Then x[:, None] - x is a table of all differences. Try a map of 2 x 3 by hand: from the first cell the "
        "distances are 0 1 2 and 1 2 3."
    ),
    pseudo=(
        "index = 0 ... N - 1\n"
        "row, column = index // width, index % width\n"
        "apart[i, j] = |row_i - row_j| + |column_i - column_j|\n"
        "return apart times log_decay, one table a head"
    ),
)
def manhattan_decay(f):
    rates = torch.tensor([0.5, 0.75, 0.9], dtype=torch.float64).log()
    expect_tensor(call(f, rates, 2, 3), (3, 6, 6))
    cases = {
        "a cell is at distance 0 of itself, and the table is symmetric": (rates, 2, 2),
        "a single row is the line of the chapter's beginning": (rates, 1, 5),
        "wrong values on a map of 2 x 3": (rates, 2, 3),
        "wrong values on a map of 4 x 3": (rates, 4, 3),
    }
    expect_cases(f, mask_by_loops, cases, mask_suspects)
    other = {"log_decay": rates[:2]}
    expect_gradient(f, mask_by_loops, other, 3, 2)
    expect_untouched(f, other, 3, 2)
    expect_dtypes(f, mask_by_loops, other, 3, 2)


# ---------------------------------------------------------------------------------------------- 3.3
def retain_reference(q: Tensor, k: Tensor, v: Tensor, gamma: float, state: Tensor) -> Tensor:
    """Outputs [B, T, E] and state [B, D, E] joined along one axis, from sums over the past."""
    steps = q.shape[1]
    outputs = []
    for n in range(steps):
        out = torch.einsum("bd,bde->be", q[:, n], state) * gamma ** (n + 1)
        for m in range(n + 1):
            out = out + (q[:, n] * k[:, m]).sum(-1, keepdim=True) * v[:, m] * gamma ** (n - m)
        outputs.append(out)
    left = state * gamma**steps
    for m in range(steps):
        left = left + k[:, m, :, None] * v[:, m, None, :] * gamma ** (steps - 1 - m)
    return torch.cat((torch.stack(outputs, 1), left), 1)


def _walk(q, k, v, gamma, state, step, answer_first=False) -> Tensor:
    outputs = []
    for n in range(q.shape[1]):
        before, state = state, step(state, k[:, n, :, None] * v[:, n, None, :], gamma)
        outputs.append((q[:, n, None, :] @ (before if answer_first else state)).squeeze(1))
    return torch.cat((torch.stack(outputs, 1), state), 1)


def retain_suspects(q: Tensor, k: Tensor, v: Tensor, gamma: float, state: Tensor) -> dict[str, Tensor]:
    fade = lambda s, new, g: g * s + new
    right = _walk(q, k, v, gamma, state, fade)
    return {
        "the state before the first step is ignored": _walk(q, k, v, gamma, 0 * state, fade),
        "the new pair fades too: decay first, then add": _walk(q, k, v, gamma, state, lambda s, new, g: g * (s + new)),
        "nothing fades: gamma is not used": _walk(q, k, v, 1.0, state, fade),
        "1 - gamma instead of gamma": _walk(q, k, v, 1 - gamma, state, fade),
        "the new pair is weighted by 1 - gamma; a moving average is something else": _walk(
            q, k, v, gamma, state, lambda s, new, g: g * s + (1 - g) * new
        ),
        "the query is answered before the new pair is taken in: a step sees itself too": _walk(
            q, k, v, gamma, state, fade, answer_first=True
        ),
        "the state fades once for the whole piece instead of once a step": _walk(q, k, v, 1.0, gamma * state, fade),
        "the state you return is the one you were given": torch.cat((right[:, : q.shape[1]], state), 1),
        "the outer product is transposed: row d, column e holds k[d] * v[e]": _walk(
            q, k, v, gamma, state, lambda s, new, g: g * s + new.mT
        ),
        "a scale of 1 / sqrt(D) has slipped in; eq. (3.2) has none": torch.cat(
            (right[:, : q.shape[1]] / math.sqrt(q.shape[-1]), right[:, q.shape[1] :]), 1
        ),
    }


@exercise(
    "3.3",
    "Carry a summary forward",
    kind="fill",
    difficulty=3,
    minutes=25,
    hint=(
        "A loop over the steps. k[:, n, :, None] * v[:, n, None, :] is the matrix k^T v for the whole batch, and "
        "q[:, n, None, :] @ state asks it. Make a new state at every step instead of changing the one you were given."
    ),
    pseudo=(
        "for n = 0 ... T - 1:\n"
        "    state = gamma * state + outer product of k_n and v_n\n"
        "    o_n = q_n times state\n"
        "return all o_n, state"
    ),
)
def retain(f):
    def joined(q, k, v, gamma, state):
        pair = f(q, k, v, gamma, state)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            refuse("return two things: the outputs and the state after the last step")
        out, left = pair
        expect_tensor(out, (*q.shape[:2], v.shape[-1]), "the output")
        expect_tensor(left, state.shape, "the state")
        return torch.cat((out, left), 1)

    q, k, v, state = draw(2, 5, 4), draw(2, 5, 4, seed=1), draw(2, 5, 4, seed=2), draw(2, 4, 4, seed=3)
    cases = {
        "with one step and an empty state the output is (q . k) v": (q[:, :1], k[:, :1], v[:, :1], 0.5, 0 * state),
        "wrong values from an empty state": (q, k, v, 0.75, 0 * state),
        "wrong values when a state is handed in": (q, k, v, 0.75, state),
    }
    expect_cases(joined, retain_reference, cases, retain_suspects)
    whole = call(joined, q, k, v, 0.9, state)[:, :5]
    first, left = f(q[:, :2].clone(), k[:, :2].clone(), v[:, :2].clone(), 0.9, state.clone())
    second, _ = f(q[:, 2:].clone(), k[:, 2:].clone(), v[:, 2:].clone(), 0.9, left)
    expect_close(torch.cat((first, second), 1), whole, "two pieces must give what the whole gives")
    by_name = lambda q, k, v, state: joined(q, k, v, 0.75, state)
    reference = lambda q, k, v, state: retain_reference(q, k, v, 0.75, state)
    expect_good_manners(by_name, reference, {"q": q[:, :3], "k": k[:, :3], "v": v[:, :3, :2], "state": state[..., :2]})


# ---------------------------------------------------------------------------------------------- 3.4
def line_by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One pass within lines: [..., n, D], every cell by itself, softmax from its definition."""
    rows = []
    for i in range(q.shape[-2]):
        scores = (q[..., i : i + 1, :] * k).sum(-1) / math.sqrt(q.shape[-1]) + mask[i]  # [..., n]
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        rows.append((weights[..., None] * v).sum(-2))
    return torch.stack(rows, -2)


def passes_reference(q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
    v = line_by_loops(q, k, v, column_mask)
    return line_by_loops(*(t.transpose(1, 2) for t in (q, k, v)), row_mask).transpose(1, 2)


def _passes(weigh, order="wh"):
    """A two-pass form with its own weights."""

    def form(q, k, v, row_mask, column_mask):
        for axis in order:
            a, b, c = (t if axis == "w" else t.transpose(1, 2) for t in (q, k, v))
            v = weigh(a @ b.mT / math.sqrt(q.shape[-1]), column_mask if axis == "w" else row_mask, q.shape[-1]) @ c
            v = v if axis == "w" else v.transpose(1, 2)
        return v

    return form


def _full(q, k, v, row_mask, column_mask):
    height, width = v.shape[1:3]
    mask = (row_mask[:, None, :, None] + column_mask[None, :, None, :]).reshape(height * width, -1)
    a, b, c = (t.flatten(1, 2) for t in (q, k, v))
    return (torch.softmax(a @ b.mT / math.sqrt(q.shape[-1]) + mask, -1) @ c).view_as(v)


def softmax_with(s, mask, width):
    return torch.softmax(s + mask, -1)


WRONG_PASSES = {
    "the height pass comes first; it must be the second": _passes(softmax_with, order="hw"),
    "that is the full form: one softmax over the whole map": _full,
    "the width pass is missing, or the height pass reads the old values instead of its result": _passes(
        softmax_with, order="h"
    ),
    "the height pass is missing": _passes(softmax_with, order="w"),
    "the scale 1 / sqrt(D) is missing": _passes(lambda s, mask, d: torch.softmax(s * math.sqrt(d) + mask, -1)),
    "the scale is applied twice": _passes(lambda s, mask, d: torch.softmax(s / math.sqrt(d) + mask, -1)),
    "the scale is applied to the mask too": _passes(lambda s, mask, d: torch.softmax(s + mask / math.sqrt(d), -1)),
    "the decay multiplies the softmax's weights and nothing makes them sum to one again": _passes(
        lambda s, mask, d: torch.softmax(s, -1) * mask.exp()
    ),
    "the mask holds logarithms: add it to the logits instead of multiplying them by its exponential": _passes(
        lambda s, mask, d: torch.softmax(s * mask.exp(), -1)
    ),
    "the mask is subtracted: what lies farther gets more": _passes(lambda s, mask, d: torch.softmax(s - mask, -1)),
    "the masks are not used": _passes(lambda s, mask, d: torch.softmax(s, -1)),
    "the softmax runs over the queries instead of the keys": _passes(lambda s, mask, d: torch.softmax(s + mask, -2)),
    "queries and keys are exchanged: the weights are transposed": _passes(
        lambda s, mask, d: torch.softmax(s.mT + mask, -1)
    ),
}


def pass_suspects(q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor, column_mask: Tensor) -> dict[str, Tensor]:
    return {message: form(q, k, v, row_mask, column_mask) for message, form in WRONG_PASSES.items()}


@exercise(
    "3.4",
    "Every row, then every column",
    kind="fill",
    difficulty=3,
    minutes=25,
    hint=(
        "On [B, h, w, D] the product q @ k.mT compares cells of the same row, because B and h count as batch. For the "
        "columns exchange axes 1 and 2, do the same with the other mask, and exchange them back."
    ),
    pseudo=(
        "for each row: weights = softmax(q k^T / sqrt(D) + column_mask)    # [B, h, w, w]\n"
        "    v = weights times v\n"
        "for each column (exchange axes 1 and 2 of q, k and the new v):\n"
        "    weights = softmax(q k^T / sqrt(D) + row_mask)                 # [B, w, h, h]\n"
        "    v = weights times v\n"
        "exchange the axes back and return v"
    ),
)
def two_passes(f):
    def masks(height, width, row_rate=0.5, column_rate=0.8):
        sides = ((height, row_rate), (width, column_rate))
        return [mask_by_loops(torch.tensor([r], dtype=torch.float64).log(), 1, n)[0] for n, r in sides]

    q, k, v = (1.5 * draw(2, 3, 3, 4, seed=s) for s in range(3))
    square, wide = masks(3, 3), [1.5 * draw(2, 2, 5, 4, seed=s) for s in range(3)]
    exchanged = "the masks are exchanged: the width pass needs the one between columns"
    first = call(f, q, k, v, *square)
    expect_tensor(first, v.shape)
    if close(first, passes_reference(q, k, v, *reversed(square))):
        refuse(exchanged)  # before a map that is not square, where it would only say that shapes differ
    expect_tensor(call(f, *wide, *masks(2, 5)), (2, 2, 5, 4))
    cases = {
        "with q = 0 and masks of 0 it must be the mean over the map": (0 * q, k, v, *(0 * m for m in square)),
        "wrong values on a square map": (q, k, v, *square),
        "wrong values on a map of 2 x 5": (*wide, *masks(2, 5)),
    }
    expect_cases(f, passes_reference, cases, pass_suspects)
    other = {"q": draw(1, 3, 2, 2), "k": draw(1, 3, 2, 2, seed=1), "v": draw(1, 3, 2, 2, seed=2)}
    other |= dict(zip(("row_mask", "column_mask"), masks(3, 2)))
    expect_good_manners(f, passes_reference, other)
