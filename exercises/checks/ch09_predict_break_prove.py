"""Checks of chapter 9: operations and bytes, a point under the roof, a graph break, what a fast form must keep."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minigated.check import exercise
from minigated.expectations import expect_number, expect_property, refuse


def expect_entries(predicted, right: dict, about: str, suspects: Callable[[str], dict]) -> None:
    """A dictionary with these numbers; `suspects(name)` gives the message of each wrong value."""
    if not isinstance(predicted, dict):
        refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
    for name, value in right.items():
        if name not in predicted:
            refuse(f"the dictionary has no entry {name!r}")
        likely = {message: wrong for message, wrong in suspects(name).items() if not math.isclose(wrong, value)}
        expect_number(predicted[name], value, f"{name!r} {about}", likely)


# ---------------------------------------------------------------------------------------------- 9.1
def counted_passes(batch: int, height: int, width: int, channels: int, window: int, item: int) -> dict[str, float]:
    """Operations by torch's counter on two passes that run; bytes from the sizes of the tensors."""
    from minigated.decay_passes import decomposed_fast

    q, k, v = (torch.randn(batch, height, width, 1, channels, requires_grad=True) for _ in "qkv")
    mask, counter = torch.zeros(1, window, window), FlopCounterMode(display=False)
    with counter:
        y = decomposed_fast(q, k, v, mask, mask, window, window, form="matmul")
        flops = counter.get_total_flops()
        gradients = torch.autograd.grad(y.sum(), (q, k, v))
    size = lambda *tensors: sum(t.numel() for t in tensors) * item
    forward = size(q, k, v, y)
    return {
        "flops": flops,
        "bytes": forward,
        "intensity": flops / forward,
        "training_flops": counter.get_total_flops(),
        "training_bytes": forward + size(q, k, v, y, *gradients),
    }


def passes_suspects(name: str, right: dict, channels: int, window: int, cells: int, item: int) -> dict[str, float]:
    flops, moved, one = right["flops"], right["bytes"], right["bytes"] / 4
    wrong = {
        "flops": {
            "half of it: two passes, two products in each, and a multiply and an add are two operations": flops / 2,
            "a quarter: two passes, two products in each, and a multiply and an add are two operations": flops / 4,
            "a cell meets the W cells of its line, not the W x W of its window": flops * window,
            "a cell meets the cells of its window's line, not the whole map": flops / window * cells,
        },
        "bytes": {
            "the result is written too": 3 * one,
            "the value between the passes need not move": 6 * one,
            "the scores need not move": moved + 2 * 2 * one / channels * window,
            "bytes, not numbers: each has `item` of them": moved / item,
        },
        "intensity": {
            "operations a byte, not bytes an operation": moved / flops,
            "operations a byte, not a number": flops / moved * item,
        },
        "training_flops": {
            "each product of the forward pass has two in the backward pass": 2 * flops,
            "that is the forward pass": flops,
        },
        "training_bytes": {
            "bytes do not simply triple: count what the backward pass reads and writes": 3 * moved,
            "that is the backward pass alone": right["training_bytes"] - moved,
            "q, k and v are read again, and three gradients are written": right["training_bytes"] - 3 * one,
            "the gradient of the result is read": right["training_bytes"] - one,
        },
    }
    return wrong[name]


@exercise(
    "9.1",
    "Count operations and bytes",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "Each of the B h w cells meets W cells in each pass, and each meeting has C multiply-adds for its score and C "
        "for the value. In the backward pass, list the tensors: what comes in, what goes out?"
    ),
    pseudo=(
        "numbers = B h w C\nflops = 2 passes * 2 products * 2 * numbers * W; three times in training\n"
        "bytes = (q, k, v, y) * item; training: and (q, k, v, dy, dq, dk, dv) * item"
    ),
)
def two_passes_cost(f):
    for case in ((1, 2, 2, 2, 2, 4), (2, 8, 4, 6, 4, 2), (3, 7, 14, 5, 7, 4)):
        batch, height, width, channels, window, item = case
        right = counted_passes(*case)
        about = f"for {batch} x {height} x {width} cells, {channels} channels, windows of {window}"
        suspects = lambda name: passes_suspects(name, right, channels, window, height * width, item)  # noqa: B023
        expect_entries(f(*case), right, about, suspects)


# ---------------------------------------------------------------------------------------------- 9.2
def placed(flops: int, moved: int, seconds: float, matrix_rate: float, copy_rate: float) -> dict[str, float]:
    """By time and not by rates: computing takes so long, moving so long, and the longer one is the limit."""
    least = max(flops / matrix_rate, moved / copy_rate)
    return {
        "intensity": flops / moved,
        "bend": matrix_rate / copy_rate,
        "rate": flops / seconds,
        "roof": flops / least,
        "share": least / seconds,
        "least": least,
    }


def place_suspects(name: str, right: dict, flops, moved, seconds, matrix_rate, copy_rate) -> dict[str, float]:
    compute, move = flops / matrix_rate, moved / copy_rate
    wrong = {
        "intensity": {"operations a byte, not bytes an operation": moved / flops},
        "bend": {
            "the roof bends where I * M = R, so at R / M": copy_rate / matrix_rate,
            "the machine's bend does not depend on the work": flops / moved,
        },
        "rate": {"operations a second, not bytes": moved / seconds, "the rate that was reached": right["roof"]},
        "roof": {
            "left of the bend the copy is the limit": matrix_rate,
            "right of the bend the matrix rate is the limit": flops / move,
        },
        "share": {
            "a share of the roof, not of the matrix rate": flops / seconds / matrix_rate,
            "a share of the roof, not of the copy's bandwidth": moved / seconds / copy_rate,
            "rate over roof, not roof over rate": seconds / right["least"],
        },
        "least": {
            "the longer of computing and moving, not the shorter": min(compute, move),
            "computing and moving go on at the same time: the longer one, not the sum": compute + move,
            "that is what it took": seconds,
        },
    }
    return wrong[name]


@exercise(
    "9.2",
    "Place a point on the roofline",
    kind="predict",
    difficulty=1,
    minutes=10,
    hint="Ask twice how long it would take: to compute, if nothing had to move; to move, if nothing were computed.",
    pseudo="intensity = flops / moved; bend = R / M\nroof = min(R, intensity * M); share = rate / roof",
)
def place_on_the_roofline(f):
    for case in ((6e10, 2e10, 0.02, 8e14, 3e12), (8e9, 4e9, 0.01, 1e12, 1e12), (5e6, 1e5, 1e-4, 1e11, 4e10)):
        right = placed(*case)
        about = f"for {case[0]:g} operations and {case[1]:g} bytes in {case[2]:g} s, limits {case[3]:g} and {case[4]:g}"
        expect_entries(f(*case), right, about, lambda name: place_suspects(name, right, *case))  # noqa: B023


# ---------------------------------------------------------------------------------------------- 9.4
def softened(x, temperature, clip, safe):
    """What the statement shows."""
    if x.ndim == 3:
        x = x.flatten(1)
    if temperature != 1.0:
        x = x / temperature
    if clip and x.shape[-1] > 4:
        x = x.clamp(-clip, clip)
    if safe and x.abs().max() > 10:
        x = x - x.amax(-1, keepdim=True)
    return torch.softmax(x, -1)


def graphs_of(arguments: tuple) -> int:
    """How many graphs the compiler makes of `softened` for these arguments."""
    traced = []
    torch._dynamo.reset()
    try:
        torch.compile(softened, backend=lambda graph, _: traced.append(1) or graph.forward, dynamic=False)(*arguments)
    finally:
        torch._dynamo.reset()
    return len(traced)


@exercise(
    "9.4",
    "Find the graph break",
    kind="break",
    difficulty=2,
    minutes=10,
    hint="Number of axes, shapes and plain Python numbers are known while tracing. Which condition reads an element?",
    pseudo="switch on the condition that reads the tensor's values\nkeep all values small",
)
def arguments_that_break_the_graph(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 4:
        refuse(f"return (x, temperature, clip, safe); you return {type(case).__name__}")
    x, temperature, clip, safe = case
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (2, 3) or not x.numel():
        refuse("x must be a float tensor with 2 or 3 axes and at least one element")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or temperature <= 0:
        refuse(f"temperature {temperature!r}; it is a number above 0")
    if not isinstance(safe, bool) or not (clip is None or (isinstance(clip, (int, float)) and clip > 0)):
        refuse(f"clip {clip!r}, safe {safe!r}; clip is None or a number above 0, safe is True or False")
    if not safe:
        known = "number of axes, shape and Python numbers are known while tracing"
        refuse(f"one graph: with safe=False nobody asks for a value; {known}")
    if not torch.isfinite(x).all():
        refuse("x has elements that are not finite")
    last = (x.flatten(1) if x.ndim == 3 else x) / temperature
    last = last.clamp(-clip, clip) if clip and last.shape[-1] > 4 else last
    if last.abs().max() > 10:
        refuse("the branch is taken: find values for which the condition is false, and the graph ends all the same")
    if graphs_of((x, temperature, clip, safe)) < 2:
        refuse("the compiler makes one graph of this")


# ---------------------------------------------------------------------------------------------- 9.6
def by_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / q.shape[-1] ** 0.5
    return (torch.softmax(scores, -1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def by_matrices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def without_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT / q.shape[-1] ** 0.5)
    return weights / weights.sum(-1, keepdim=True) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q.mul_(q.shape[-1] ** -0.5)
    return torch.softmax(q @ k.mT, -1) @ v


def first_of_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_matrices(q, k[:1].expand_as(k), v)


def replayed() -> Callable:
    """A recorded step whose weights are those of its first call."""
    kept = []

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1).detach())
        return by_matrices(q, k, v) if len(kept) == 1 else kept[0].expand(*v.shape[:-1], -1) @ v + 0 * (q + k)

    return form


def replays(holds: Callable) -> Callable:
    """A fresh recording for each time the property is tried."""
    return lambda form: holds(form() if form is replayed else form)


@exercise(
    "9.6",
    "Prove that fast is the same",
    kind="prove",
    difficulty=3,
    minutes=25,
    hint=(
        "Compute the formula beside the form for several inputs, one with scores of a thousand. Use more than one "
        "image. Compare results, gradients of q, k and v, and the inputs before and after."
    ),
    pseudo=(
        "for several random inputs, one of them with large q:\n"
        "    results equal to 1e-9?  inputs as before?\n    gradients of q, k, v of a random weighting equal?"
    ),
)
def is_the_same_attention(f):
    right = {
        "batched products": by_matrices,
        "sums of broadcast products": by_sums,
        "torch's fused attention": torch.nn.functional.scaled_dot_product_attention,
        "one image after the other": lambda q, k, v: torch.stack([by_matrices(*x) for x in zip(q, k, v)]),
    }
    wrong = {
        "the scale is missing": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
        "the softmax runs over the queries": lambda q, k, v: torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -2) @ v,
        "every image meets the keys of the first": first_of_the_batch,
        "exponentials without the maximum taken off": without_maximum,
        "float32 inside": lambda q, k, v: by_matrices(q.float(), k.float(), v.float()).double(),
        "queries are scaled in place": in_place,
        "weights carry no gradient": lambda q, k, v: by_matrices(q.detach(), k.detach(), v) + 0 * (q + k),
        "it replays the weights of its first call": replayed,
    }
    expect_property(replays(f), right, wrong)
