"""Checks of chapter 3: rotations that look alike, a property of two passes, how far a rate reaches, what it costs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.cost import count_flops
from minigated.expectations import expect_number, expect_property, refuse


# ---------------------------------------------------------------------------------------------- 3.5
def _turned(x: Tensor, index: Tensor, angles: Tensor, pairs: Callable[[Tensor], Tensor]) -> Tensor:
    """Pairs of channels as complex numbers times exp(i index angle). x [h, w, D], index [h, w], angles [D/2]."""
    return pairs(x) * torch.polar(torch.ones_like(angles), index[..., None] * angles)


def _neighbours(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _halves(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, -1))


def products(q: Tensor, k: Tensor, wrong: str | None = None) -> tuple[Tensor, Tensor]:
    """q . k for two cells of a row [h, w, w], and of a column [w, h, h], after the rotation or a wrong one."""
    height, width, channels = q.shape
    row, column = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    index = {"tall": row * height + column, "flat": row + column}.get(wrong, row * width + column)
    angles = 10_000.0 ** -torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    if wrong == "rope":
        angles = 10_000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    pairs = _halves if wrong == "halves" else _neighbours
    a, b = _turned(q, index, angles, pairs), _turned(k, -index if wrong == "backwards" else index, angles, pairs)
    return torch.einsum("ywd,yvd->ywv", a, b.conj()).real, torch.einsum("ywd,zwd->wyz", a, b.conj()).real


UNSEEN = {
    "tall": "row * height and row * width are the same on a square map, and a single row has no row * anything",
    "flat": "row + column and row * width + column are the same in one row, and in one column if the map is one wide",
    "rope": "with one pair of channels there is one angle, 1, in both; with two pairs the others differ: 1/10000 and "
    "1/100. Is the index ever large enough to show it?",
    "halves": "with two channels there is only one pair to choose",
    "backwards": "turning keys the other way is seen as soon as q and k are not zero",
}


@exercise(
    "3.5",
    "Break five rotations",
    kind="break",
    difficulty=2,
    minutes=15,
    hint=(
        "Which maps make two of the indices equal? Which D makes two lists of angles, or two ways to pair channels, "
        "equal? Avoid those, and random entries do the rest."
    ),
    pseudo=(
        "choose h and w different, both above 1: 'tall' and 'flat' show between rows\n"
        "choose D above 2, so that there are several angles and pairs\n"
        "draw q and k, and cut the entries off at -1 and 1"
    ),
)
def rotation_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 2:
        refuse("return the two of (q, k)")
    q, k = case
    for name, value in zip("qk", (q, k)):
        if not isinstance(value, Tensor) or value.dim() != 3 or value.dtype != torch.float64:
            refuse(f"{name} must be a float64 tensor [h, w, D]")
        if not value.numel() or value.shape[0] * value.shape[1] > 16 or value.shape[2] > 8 or value.shape[2] % 2:
            refuse(f"{name} has the shape {list(value.shape)}: at most 16 cells, and D is 2, 4, 6 or 8")
        if not (value.abs() <= 1).all():  # NaN too
            refuse(f"an entry of {name} is larger than 1 in absolute value, or not a number")
    if q.shape != k.shape:
        refuse(f"q is {list(q.shape)} and k is {list(k.shape)}: they belong to the same map")
    right = products(q, k)
    for name, why in UNSEEN.items():
        gap = max(float((a - b).abs().max()) for a, b in zip(products(q, k, name), right))
        if gap <= 0.1:
            refuse(f"'{name}' goes unnoticed: {why}")


# ---------------------------------------------------------------------------------------------- 3.6
def _apart(cells: int) -> Tensor:
    return (torch.arange(cells)[:, None] - torch.arange(cells)).abs().double()


def _line(q: Tensor, k: Tensor, v: Tensor, log_gamma: float, scale: float, weigh) -> Tensor:
    return weigh(q @ k.mT * scale + _apart(q.shape[-2]) * log_gamma) @ v


def _softmax(s: Tensor) -> Tensor:
    return torch.softmax(s, -1)


def _two(
    order: str = "wh", log_gamma: float = 0.0, scale: float = 0.5, turn: bool = False, weigh=_softmax, queries=None
):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if turn:
            q, k = (_rotated(t) for t in (q, k))
        for number, axis in enumerate(order):
            asked = q if queries is None or not number else queries(q)
            parts = (asked, k, v) if axis == "w" else (t.transpose(1, 2) for t in (asked, k, v))
            v = _line(*parts, log_gamma, scale, weigh)
            v = v if axis == "w" else v.transpose(1, 2)
        return v

    return attend


def _rotated(x: Tensor) -> Tensor:
    height, width, channels = x.shape[1:]
    index = torch.arange(height * width, dtype=torch.float64).view(height, width)
    angles = 10_000.0 ** -torch.linspace(0, 1, channels // 2, dtype=torch.float64)
    return torch.view_as_real(_turned(x, index, angles, _neighbours)).flatten(-2)


def _one(log_gamma: float = 0.0, turn: bool = False, multiply: bool = False):
    """One softmax over the map."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if turn:
            q, k = (_rotated(t) for t in (q, k))
        height, width = v.shape[1:3]
        apart = (_apart(height)[:, None, :, None] + _apart(width)[None, :, None, :]).reshape(height * width, -1)
        a, b, c = (t.flatten(1, 2) for t in (q, k, v))
        s = a @ b.mT / math.sqrt(q.shape[-1])
        weights = _softmax(s) * (apart * log_gamma).exp() if multiply else _softmax(s + apart * log_gamma)
        return (weights @ c).view_as(v)

    return attend


def _mean(one, other):
    return lambda q, k, v: (one(q, k, v) + other(q, k, v)) / 2


ROWS_ONLY = {
    "two passes without decay": _two(),
    "two passes with decay": _two(log_gamma=math.log(0.75)),
    "two passes with decay and rotation": _two(log_gamma=math.log(0.9), turn=True),
    "two passes with another scale": _two(scale=0.25, log_gamma=math.log(0.9)),
    "two passes of sigmoid weights (chapter 6)": _two(weigh=torch.sigmoid),
}
TURNING = {
    "the full form": _one(),
    "the full form with decay": _one(math.log(0.75)),
    "the full form with decay and rotation": _one(math.log(0.9), turn=True),
    "the full form, decay after the softmax": _one(math.log(0.75), multiply=True),
    "height pass first": _two("hw"),
    "height pass first, with decay": _two("hw", math.log(0.75)),
    "the mean of both orders": _mean(_two("wh"), _two("hw")),
    "rows, columns, and rows again": _two("whw"),
    "two passes plus a little of the full form": _mean(_two(log_gamma=math.log(0.9)), _one(math.log(0.9))),
}


@exercise(
    "3.6",
    "Prove that a query only chooses rows",
    kind="prove",
    difficulty=4,
    minutes=30,
    hint=(
        "Set v to zero outside one row. Then change the query of one cell in another row and compare its own output "
        "before and after, each divided by its length: they are the same if only the length has changed. The row of "
        "the cell itself must not be the one with values: there the query decides in the width pass too."
    ),
    pseudo=(
        "draw q, k, v; keep v in one row only\n"
        "for cells in other rows:\n"
        "    change the cell's query, and look at the cell's output before and after\n"
        "    if the two vectors do not point the same way: return False\n"
        "return True"
    ),
)
def asks_only_its_column(f):
    expect_property(f, ROWS_ONLY, TURNING)


# ---------------------------------------------------------------------------------------------- 3.7
def measured_reach(gamma: float) -> dict[str, float]:
    """Sums over a line long enough that its ends do not count."""
    far = int(math.log(1e-13) / math.log(gamma)) + 1
    weights = {d: gamma ** abs(d) for d in range(-far, far + 1)}
    total = sum(weights.values())
    mean = sum(abs(d) * w for d, w in weights.items()) / total
    low, high = 0.0, float(far)
    for _ in range(200):  # where the weight is a half, by halving the interval
        middle = (low + high) / 2
        low, high = (middle, high) if gamma**middle > 0.5 else (low, middle)
    # on the map the weights are products, so totals multiply and distances add
    return {"half": low, "own_line": 1 / total, "own_map": 1 / total**2, "mean_line": mean, "mean_map": 2 * mean}


def reach_suspects(name: str, gamma: float, right: dict[str, float]) -> dict[str, float]:
    value, one_sided = right[name], 1 - gamma
    wrong = {
        "half": {
            "the logarithms are the wrong way round: log(1/2) / log(gamma)": 1 / value,
            "distances are positive": -value,
            "after one step a weight gamma is left; what is lost, 1 - gamma, does not add up": 0.5 / (1 - gamma),
            "that is where the weight has fallen to 1/e": -1 / math.log(gamma),
        },
        "own_line": {
            "only one direction is counted: a line without ends has two": one_sided,
            "the cell itself is counted twice": (1 - gamma) / 2,
            "that is the share of the map": value**2,
        },
        "own_map": {
            "that is the share of the line; on the map both directions thin it out": right["own_line"],
            "shares of rows and columns multiply": right["own_line"] / 2,
            "only one quadrant is counted": one_sided**2,
        },
        "mean_line": {
            "only one direction is counted, and the cell's own weight weighs more there": gamma / (1 - gamma),
            "the cell itself counts, with distance 0": 1 / (1 - gamma),
            "weights must be divided by their sum": 2 * gamma / (1 - gamma) ** 2,
        },
        "mean_map": {
            "rows and columns both add their distance": right["mean_line"],
            "distances add, they do not multiply": right["mean_line"] ** 2,
            "rows apart plus columns apart, not the straight line": right["mean_line"] * math.sqrt(2),
        },
    }[name]
    return {message: number for message, number in wrong.items() if abs(number - value) > 1e-9}


@exercise(
    "3.7",
    "How far a rate reaches",
    kind="predict",
    difficulty=3,
    minutes=20,
    hint=(
        "The line's weights are 1 in the middle and gamma, gamma^2, ... twice. A geometric series: "
        "gamma + gamma^2 + ... = gamma / (1 - gamma), and gamma + 2 gamma^2 + 3 gamma^3 + ... = gamma / (1 - gamma)^2. "
        "On the map gamma^(rows + columns) is a product of two such weights."
    ),
    pseudo=(
        "half: solve gamma^d = 1/2\n"
        "total of the line: 1 + 2 gamma / (1 - gamma); own share: 1 / total\n"
        "mean: 2 gamma / (1 - gamma)^2 divided by the total\n"
        "map: totals multiply, mean distances add"
    ),
)
def reach(f):
    for gamma in (0.75, 0.875, 0.96875, 0.5):
        predicted, right = f(gamma), measured_reach(gamma)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            expect_number(predicted[name], value, f"{name!r} for gamma = {gamma}", reach_suspects(name, gamma, right))


# ---------------------------------------------------------------------------------------------- 3.8
def counted_cost(height: int, width: int, heads: int, head_width: int) -> dict[str, int]:
    """Both forms, run on tensors without memory and counted by torch."""
    cells = height * width
    token = torch.empty(heads, cells, head_width, device="meta")
    row = torch.empty(height, heads, width, head_width, device="meta")
    column = torch.empty(width, heads, height, head_width, device="meta")
    attend = lambda x: (x @ x.mT) @ x
    masks = [torch.empty(heads, n, n, device="meta") for n in (cells, height, width)]
    held = lambda x: (x @ x.mT).numel()
    return {
        "full_operations": count_flops(attend, token),
        "passes_operations": count_flops(attend, row) + count_flops(attend, column),
        "full_weights": held(token),
        "passes_weights": held(row) + held(column),
        "full_mask_bytes": masks[0].nbytes,
        "passes_mask_bytes": masks[1].nbytes + masks[2].nbytes,
    }


def cost_suspects(name: str, height: int, width: int, heads: int, head_width: int, right: dict) -> dict[str, float]:
    value, cells = right[name], height * width
    general = {
        "every head counts": value // heads,
        "that is the other form": right[
            name.replace("full", "passes") if "full" in name else name.replace("passes", "full")
        ],
    }
    own = {
        "operations": {
            "a multiplication and an addition are two operations": value // 2,
            "there are two products: scores and weighted sum": value // 2,
            "that counts the weights, not the operations": value // (4 * head_width),
        },
        "weights": {
            "a weight is one number, whatever D is": value * head_width,
            "an operation is not a weight": value * 4 * head_width,
        },
        "mask_bytes": {
            "a float32 number has 4 bytes": value // 4,
            "that is bfloat16; the masks are float32": value // 2,
        },
    }[name.split("_", 1)[1]]
    passes = {
        "passes_operations": {
            "one pass is missing: that is the width pass alone": 4 * heads * cells * width * head_width,
            "one pass is missing: that is the height pass alone": 4 * heads * cells * height * head_width,
            "the two passes differ, each counts with the side that it runs along": 8
            * heads
            * cells
            * width
            * head_width,
        },
        "passes_weights": {
            "one pass is missing: that is the width pass alone": heads * cells * width,
            "one pass is missing: that is the height pass alone": heads * cells * height,
            "every line has its own table of weights": heads * (height**2 + width**2),
        },
        "passes_mask_bytes": {
            "one mask serves all lines": 4 * heads * cells * (height + width),
            "an h x h and a w x w mask, not one of (h + w) squared": 4 * heads * (height + width) ** 2,
            "an h x h and a w x w mask: sides are squared": 4 * heads * (height + width),
        },
    }.get(name, {})
    return {message: number for message, number in (passes | own | general).items() if number != value}


@exercise(
    "3.8",
    "What one softmax costs, and what two passes cost",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "A product of [a, b] with [b, c] takes 2abc operations. In the full form every cell has N weights; in the two "
        "passes it has w and then h. How many tables of weights does each pass hold, and how large is one?"
    ),
    pseudo=(
        "N = h w\n"
        "full: two products of N x D x N for each head; N x N weights; one N x N mask a head\n"
        "passes: the same with N x (h + w) in place of N x N; masks h x h and w x w a head"
    ),
)
def cost_of_both_forms(f):
    for sizes in ((4, 6, 3, 8), (14, 14, 16, 32), (56, 40, 4, 16)):
        predicted, right = f(*sizes), counted_cost(*sizes)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            about = f"{name!r} for h = {sizes[0]}, w = {sizes[1]}, H = {sizes[2]}, D = {sizes[3]}"
            expect_number(predicted[name], value, about, cost_suspects(name, *sizes, right))
