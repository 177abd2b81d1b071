"""Checks of chapter 7: the router, and experts that run at once on assignments sorted by expert."""

from collections.abc import Callable

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    close,
    draw,
    expect_cases,
    expect_gradient,
    expect_tensor,
    expect_untouched,
    refuse,
)


def shares(z: Tensor, axis: int = -1) -> Tensor:
    """The softmax from its definition, independent of torch's."""
    powers = torch.exp(z - z.amax(axis, keepdim=True))
    return powers / powers.sum(axis, keepdim=True)


def best(values: Tensor, top_k: int) -> Tensor:
    """Places of the k largest of each row, largest first."""
    return torch.argsort(values, dim=-1, descending=True, stable=True)[..., :top_k]


# ---------------------------------------------------------------------------------------------- 7.1
def spread(chosen: Tensor, weights: Tensor, experts: int) -> Tensor:
    """[N, k] twice -> [N, E]: the weight of every expert, 0 where it was not chosen."""
    return weights.new_zeros(len(weights), experts).scatter_add(1, chosen, weights)


def route_reference(logits: Tensor, top_k: int, renormalise: bool) -> Tensor:
    chosen = best(logits, top_k)
    weights = shares(logits).gather(1, chosen)
    return spread(chosen, weights / weights.sum(-1, keepdim=True) if renormalise else weights, logits.shape[-1])


def route_suspects(logits: Tensor, top_k: int, renormalise: bool) -> dict[str, Tensor]:
    p, n = shares(logits), logits.shape[-1]
    unit = lambda w: w / w.sum(-1, keepdim=True)
    over = lambda w: unit(w) if renormalise else w

    def table(values: Tensor, by: Tensor, last=over) -> Tensor:
        chosen = best(by, top_k)
        return spread(chosen, last(values.gather(1, chosen)), n)

    return {
        "the softmax runs over the tokens; it runs over the experts of each token": table(
            shares(logits, 0), shares(logits, 0)
        ),
        "the softmax runs over the tokens for the weights, though not for the choice": table(shares(logits, 0), logits),
        "the weights are always divided by their sum; only with `renormalise` they are. "
        "A softmax over the k chosen logits does the same": table(p, p, unit),
        "`renormalise` is ignored: then the k weights sum to one": table(p, p, lambda w: w),
        "`renormalise` is understood the wrong way round": table(p, p, (lambda w: w) if renormalise else unit),
        "softmax is taken twice: the second one makes the weights nearly alike": table(shares(p), p),
        "a second softmax instead of a division by the sum": table(p, p, shares if renormalise else lambda w: w),
        "a sigmoid instead of a softmax: here experts compete": table(1 / (1 + torch.exp(-logits)), p),
        "the logits themselves are the weights; a softmax is missing": table(logits, p),
        "the k smallest are chosen, not the largest": table(p, -p),
        "weights are divided by the square root of the sum of squares; divide by the sum": table(
            p, p, lambda w: w / w.norm(dim=-1, keepdim=True) if renormalise else w
        ),
        "weights are divided by the largest of them; divide by the sum": table(
            p, p, lambda w: w / w.amax(-1, keepdim=True) if renormalise else w
        ),
    }


def _routed(f, logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Calls the reader's router and looks at the form of what comes back."""
    result, shape = f(logits, top_k, renormalise), (len(logits), top_k)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        refuse(f"return the two of (chosen, weights), not {type(result).__name__}")
    chosen, weights = result
    expect_tensor(chosen, shape, "chosen")
    expect_tensor(weights, shape, "weights")
    if chosen.is_floating_point() and not weights.is_floating_point():
        refuse("weights come first there; return (chosen, weights)")
    if chosen.dtype != torch.int64:
        refuse(f"chosen is {chosen.dtype}; experts are numbers of dtype int64")
    if (chosen < 0).any() or (chosen >= logits.shape[-1]).any():
        refuse(f"chosen names an expert outside 0 to {logits.shape[-1] - 1}")
    return chosen, weights


@exercise(
    "7.1",
    "A router",
    kind="fill",
    difficulty=1,
    minutes=15,
    hint=(
        "tensor.topk(k, -1) returns (values, indices), the largest first. What matters is the order of the steps: "
        "softmax over all experts, then the choice, then the division. Raise the precision before the first."
    ),
    pseudo=(
        "wide = logits in float32, or in their own dtype if that is wider\n"
        "p = softmax of wide over the experts\n"
        "weights, chosen = the k largest p\n"
        "if renormalise: divide weights by their sum over the k\n"
        "return chosen, weights"
    ),
)
def route(f):
    logits = draw(7, 5)

    def spreading(logits, top_k, renormalise):
        return spread(*_routed(f, logits, top_k, renormalise), logits.shape[-1])

    cases = {
        "with k = E every expert has its probability as weight": (logits, 5, False),
        "with k = 1 the best expert keeps its probability as weight": (logits, 1, False),
        "wrong weights for random logits, k = 2": (logits, 2, False),
        "wrong weights with `renormalise`, k = 3": (2 * draw(6, 8, seed=1), 3, True),
    }
    expect_cases(spreading, route_reference, cases, route_suspects)
    chosen, weights = _routed(f, logits, 3, False)
    if not torch.equal(chosen, best(logits, 3)):
        refuse("the experts are right but not in order: the most probable one comes first")
    _check_router_precision(f)
    _check_router_manners(f, spreading)


def _check_router_precision(f) -> None:
    logits = torch.tensor([[8.0, 7.9375, 4.0, 7.875], [-3.0, 6.0, 5.96875, 5.9375]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        low = logits.to(dtype)
        chosen, weights = _routed(f, low, 2, False)
        exact = route_reference(low.double(), 2, False)
        if not close(spread(chosen, weights.double(), 4), exact, 1e-5):
            refuse(f"with {dtype} logits the weights lose precision: take the softmax in float32")
        if weights.dtype != wanted:
            refuse(f"{dtype} logits give {weights.dtype} weights, expected {wanted}")


def _check_router_manners(f, spreading) -> None:
    logits = draw(4, 6, seed=2)
    expect_untouched(lambda logits: f(logits, 2, True), {"logits": logits})
    for renormalise in (False, True):
        expect_gradient(spreading, route_reference, {"logits": logits}, 2, renormalise)


# ---------------------------------------------------------------------------------------------- 7.3
def run_expert(expert: int, rows: Tensor) -> Tensor:
    """[n, C] -> [n, C]: a small network that only this expert has, not linear in its rows."""
    return torch.tanh((expert + 1) * rows) + rows.roll(expert + 1, -1) ** 2 - expert


def run_sorted(rows: Tensor, counts: Tensor) -> Tensor:
    pieces = rows.split(counts.tolist())
    return torch.cat([run_expert(e, piece) for e, piece in enumerate(pieces)])


class Grouped:
    """What the reader gets: refuses rows and counts that do not fit, and remembers how often it was called."""

    def __init__(self, chosen: Tensor, experts: int):
        self.chosen, self.experts, self.calls = chosen, experts, 0

    def __call__(self, rows, counts) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            refuse("grouped is called more than once: one call runs all experts")
        if not isinstance(counts, Tensor) or counts.is_floating_point():
            refuse("counts must be a tensor of whole numbers")
        if counts.shape != (self.experts,):
            refuse(f"counts has the shape {list(counts.shape)}, expected [{self.experts}]: unused experts count too")
        wanted = torch.stack([(self.chosen == e).sum() for e in range(self.experts)])
        if not torch.equal(counts.long(), wanted):
            refuse(f"counts is {counts.tolist()}; here the experts have {wanted.tolist()} assignments")
        if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) != self.chosen.numel():
            found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            refuse(f"rows has the shape {found}: one row for each of the {self.chosen.numel()} assignments")
        return run_sorted(rows, counts)


def loop_reference(x: Tensor, chosen: Tensor, weights: Tensor, experts: int) -> Tensor:
    """One token and one choice after the other."""
    return torch.stack(
        [
            sum(weight * run_expert(int(e), token[None])[0] for e, weight in zip(row, scores))
            for token, row, scores in zip(x, chosen, weights)
        ]
    )


def dispatch_suspects(x: Tensor, chosen: Tensor, weights: Tensor, experts: int) -> dict[str, Tensor]:
    tokens, k = chosen.shape
    flat, w = chosen.flatten(), weights.flatten()[:, None]
    order = torch.sort(flat, stable=True).indices
    back, token = torch.argsort(order), order // k
    counts = torch.stack([(flat == e).sum() for e in range(experts)])
    out = run_sorted(x[token], counts)
    add = lambda rows: rows.unflatten(0, (tokens, k)).sum(1)
    unsorted = run_sorted(x.repeat_interleave(k, 0), counts)
    last = torch.zeros_like(x)
    for place, n in enumerate(token.tolist()):
        last[n] = (out * w[order])[place]
    return {
        "the sorting is not undone: outputs still stand in the order of the experts": add(out * w),
        "the sorting is not undone, though the weights were sorted as well": add(out * w[order]),
        "the sorting is applied again, not undone: the inverse of `order` is order.argsort()": add(out[order] * w),
        "weights are sorted and outputs are not: the two no longer belong together": add(out[back] * w[order]),
        "rows are not sorted: they stand in the order of the tokens, and meet the wrong experts": add(unsorted * w),
        "rows are not sorted, though the outputs are put back": add(unsorted[back] * w),
        "assignment a belongs to token a // k, not to a modulo N": add(run_sorted(x[order % tokens], counts)[back] * w),
        "assignment a belongs to token a // k, not to a // E": add(
            run_sorted(x[(order // experts).clamp(max=tokens - 1)], counts)[back] * w
        ),
        "the weights are missing": add(out[back]),
        "the mean of the k outputs is taken, without their weights": add(out[back]) / k,
        "the weights multiply what the experts read; they multiply what comes out": add(
            run_sorted(x[token] * w[order], counts)[back]
        ),
        "the results of a token overwrite each other: y[token] = ... and y[token] += ... keep one of k; "
        "use index_add": last,
        "only the first choice of each token arrives": (out[back] * w)[::k],
        "the mean over the k choices is taken; it is their sum": add(out[back] * w) / k,
    }


def _checked(f: Callable) -> Callable:
    """The reader's function with a fresh `grouped` at each call."""

    def function(x: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> Tensor:
        grouped = Grouped(chosen.clone(), experts)
        result = f(x, chosen, weights, experts, grouped)
        if not grouped.calls:
            refuse("grouped is never called: it is what runs the experts")
        return result

    return function


@exercise(
    "7.3",
    "Experts in order",
    kind="fill",
    difficulty=3,
    minutes=30,
    hint=(
        "flat = chosen.flatten() lists the assignments token by token, so number a belongs to token a // k. "
        "flat.argsort(stable=True) says which assignment comes first, second and so on when sorted by expert; argsort "
        "of that says where each one went."
    ),
    pseudo=(
        "flat = chosen as one list of N k experts\n"
        "order = argsort of flat; counts = how often each of the E experts is in it\n"
        "out = grouped(the token of each assignment in this order, counts)\n"
        "put out back into the order of flat, as [N, k, C]\n"
        "return the sum over k of weight times output"
    ),
)
def sorted_experts(f):
    checked = _checked(f)
    wrap = lambda of: lambda x, chosen, weights, experts: of(x, weights, chosen, experts)
    routes = torch.stack([draw(7, 5, seed=s).argsort(-1)[:, :2] for s in (1, 2)])
    few = torch.tensor([[3, 0, 1], [0, 3, 2], [2, 1, 3], [3, 2, 0]])  # experts 4 and 5 have no token
    cases = {
        "k = 1: every token is one row": (draw(6, 4), torch.tensor([[2, 0, 1, 0, 2, 0]]).T, draw(6, 1, seed=3), 3),
        "wrong values with two experts a token": (draw(7, 4), routes[0], draw(7, 2, seed=4).abs(), 5),
        "wrong values with three experts a token, two experts unused": (draw(4, 3), few, draw(4, 3, seed=5).abs(), 6),
    }
    expect_tensor(call(wrap(checked), *cases["wrong values with two experts a token"]), (7, 4))
    expect_cases(wrap(checked), loop_reference, cases, dispatch_suspects)
    inputs = {"x": draw(7, 4), "weights": draw(7, 2, seed=6)}
    reference = lambda x, weights, chosen, experts: loop_reference(x, chosen, weights, experts)
    expect_gradient(checked, reference, inputs, routes[1], 5)
    expect_untouched(wrap(checked), {"x": draw(7, 4), "chosen": routes[1], "weights": draw(7, 2, seed=6)}, 5)
