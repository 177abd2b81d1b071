"""Wrong answers to chapter 7, each with the hint that must refuse it. They keep the name of the right answer."""

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 7.1
def wide(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def unit(weights):
    return weights / weights.sum(-1, keepdim=True)


def router(weigh, last=unit):
    """weigh(logits) gives the values the k largest of which are taken."""

    def function(logits, top_k, renormalise):
        weights, chosen = weigh(wide(logits)).topk(top_k, -1)
        return chosen, last(weights) if renormalise else weights

    function.__name__ = "route"
    return function


def softmax(z):
    return torch.softmax(z, -1)


wrong("7.1", says="the softmax runs over the tokens")(router(lambda z: torch.softmax(z, 0)))
wrong("7.1", says="softmax is taken twice")(router(lambda z: softmax(softmax(z))))
wrong("7.1", says="a sigmoid instead of a softmax")(router(torch.sigmoid))
wrong("7.1", says="the logits themselves are the weights")(router(lambda z: z))
wrong("7.1", says="`renormalise` is ignored")(router(softmax, lambda w: w))
wrong("7.1", says="a second softmax instead of a division by the sum")(router(softmax, softmax))
wrong("7.1", says="divided by the square root of the sum of squares")(router(softmax, lambda w: F.normalize(w, dim=-1)))
wrong("7.1", says="divided by the largest of them")(router(softmax, lambda w: w / w[:, :1]))
wrong("7.1", says="no gradient flows through your function")(router(lambda z: softmax(z).detach()))


@wrong("7.1", says="softmax over the k chosen logits does the same")
def route(logits, top_k, renormalise):
    best, chosen = wide(logits).topk(top_k, -1)
    return chosen, softmax(best)


@wrong("7.1", says="only with `renormalise` they are")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    return chosen, unit(weights)


@wrong("7.1", says="understood the wrong way round")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    return chosen, weights if renormalise else unit(weights)


@wrong("7.1", says="the k smallest are chosen")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1, largest=False)
    return chosen, unit(weights) if renormalise else weights


@wrong("7.1", says="the most probable one comes first")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    weights, chosen = weights.flip(-1), chosen.flip(-1)
    return chosen, unit(weights) if renormalise else weights


@wrong("7.1", says="with torch.bfloat16 logits the weights lose precision")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(logits).topk(top_k, -1)
    return chosen, unit(weights) if renormalise else weights


@wrong("7.1", says="torch.bfloat16 logits give torch.float64 weights")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(logits.double()).topk(top_k, -1)
    return chosen, unit(weights) if renormalise else weights


@wrong("7.1", says="torch.float64 logits give torch.float32 weights")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(logits.float()).topk(top_k, -1)
    return chosen, unit(weights) if renormalise else weights


@wrong("7.1", says="return (chosen, weights)")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    return unit(weights) if renormalise else weights, chosen


@wrong("7.1", says="the gradient for `logits` is wrong although the values are right")
def route(logits, top_k, renormalise):
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    return chosen, weights / weights.sum(-1, keepdim=True).detach() if renormalise else weights


@wrong("7.1", says="changes its input `logits` in place")
def route(logits, top_k, renormalise):
    logits -= logits.amax(-1, keepdim=True)
    weights, chosen = softmax(wide(logits)).topk(top_k, -1)
    return chosen, unit(weights) if renormalise else weights


# ---------------------------------------------------------------------------------------------- 7.2
def balance(make):
    """make(P, f, E, k, logits, chosen)."""

    def function(logits, chosen):
        experts, k = logits.shape[-1], chosen.shape[-1]
        f = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        return make(softmax(logits).mean(0), f, experts, k, logits, chosen)

    function.__name__ = "balance_loss"
    return function


def chosen_only(logits, chosen):
    return torch.zeros_like(logits).scatter(1, chosen, softmax(logits).gather(1, chosen))


wrong("7.2", says="the factor E is missing")(balance(lambda p, f, *_: (f * p).sum()))
wrong("7.2", says="its shares must sum to 1, not to k")(balance(lambda p, f, E, k, *_: E * k * (f * p).sum()))
wrong("7.2", says="the factor is k")(balance(lambda p, f, E, k, *_: k * (f * p).sum()))
wrong("7.2", says="P is summed over the tokens")(balance(lambda p, f, E, k, z, c: E * len(z) * (f * p).sum()))
wrong("7.2", says="P stands twice")(balance(lambda p, f, E, *_: E * (p * p).sum()))
wrong("7.2", says="f stands twice")(balance(lambda p, f, E, k, z, c: E * (f * f).sum()))
wrong("7.2", says="softmax is taken twice")(balance(lambda p, f, E, k, z, c: E * (f * softmax(softmax(z)).mean(0)).sum()))
wrong("7.2", says="P holds only the experts that were chosen; all")(
    balance(lambda p, f, E, k, z, c: E * (f * chosen_only(z, c).mean(0)).sum())
)
wrong("7.2", says="P holds only the experts that were chosen, brought to sum 1")(
    balance(lambda p, f, E, k, z, c: E * (f * unit(chosen_only(z, c)).mean(0)).sum())
)
wrong("7.2", says="the softmax runs over the tokens")(
    balance(lambda p, f, E, k, z, c: E * (f * torch.softmax(z, 0).mean(0)).sum())
)
wrong("7.2", says="P is a softmax of the mean logits")(balance(lambda p, f, E, k, z, c: E * (f * softmax(z.mean(0))).sum()))
wrong("7.2", says="the logits stand in the place of their softmax")(
    balance(lambda p, f, E, k, z, c: E * (f * z.mean(0)).sum())
)
wrong("7.2", says="the loss is 1 when all is balanced")(balance(lambda p, f, E, *_: E * (f * p).sum() - 1))
wrong("7.2", says="no gradient flows through your function")(balance(lambda p, f, E, *_: E * (f * p.detach()).sum()))
wrong("7.2", says="no gradient can flow from it")(balance(lambda p, f, E, *_: (E * (f * p).sum()).item()))


@wrong("7.2", says="f counts the first choice of each token alone")
def balance_loss(logits, chosen):
    experts = logits.shape[-1]
    f = torch.bincount(chosen[:, 0], minlength=experts) / len(chosen)
    return experts * (f * softmax(logits).mean(0)).sum()


@wrong("7.2", says="your function raised RuntimeError")
def balance_loss(logits, chosen):
    f = torch.bincount(chosen.flatten()) / chosen.numel()  # too short where the last experts have no token
    return logits.shape[-1] * (f * softmax(logits).mean(0)).sum()


@wrong("7.2", says="the result has the shape [6], expected []")
def balance_loss(logits, chosen):
    f = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()
    return logits.shape[-1] * f * softmax(logits).mean(0)


@wrong("7.2", says="changes its input `logits` in place")
def balance_loss(logits, chosen):
    logits -= logits.amax(-1, keepdim=True)
    f = torch.bincount(chosen.flatten(), minlength=logits.shape[-1]) / chosen.numel()
    return logits.shape[-1] * (f * softmax(logits).mean(0)).sum()


# ---------------------------------------------------------------------------------------------- 7.3
def sorting(before=lambda x, order, k, w: x[order // k], after=lambda out, back, order, w: out[back] * w, add=None):
    """before: rows for the experts. after: outputs [A, C], weighted. add: [N, k, C] -> [N, C]."""

    def function(x, chosen, weights, experts, grouped):
        flat, w = chosen.flatten(), weights.reshape(-1, 1)
        order = flat.argsort(stable=True)
        out = grouped(before(x, order, chosen.shape[1], w), torch.bincount(flat, minlength=experts))
        weighted = after(out, order.argsort(), order, w).unflatten(0, chosen.shape)
        return weighted.sum(1) if add is None else add(weighted)

    function.__name__ = "sorted_experts"
    return function


wrong("7.3", says="the sorting is not undone: outputs")(sorting(after=lambda out, back, order, w: out * w))
wrong("7.3", says="though the weights were sorted as well")(sorting(after=lambda out, back, order, w: out * w[order]))
wrong("7.3", says="the sorting is applied again, not undone")(sorting(after=lambda out, back, order, w: out[order] * w))
wrong("7.3", says="weights are sorted and outputs are not")(sorting(after=lambda out, back, order, w: out[back] * w[order]))
wrong("7.3", says="the weights are missing")(sorting(after=lambda out, back, order, w: out[back]))
wrong("7.3", says="the weights multiply what the experts read")(
    sorting(lambda x, order, k, w: x[order // k] * w[order], lambda out, back, order, w: out[back])
)
wrong("7.3", says="not to a modulo N")(sorting(lambda x, order, k, w: x[order % len(x)]))
wrong("7.3", says="rows are not sorted, though the outputs are put back")(
    sorting(lambda x, order, k, w: x.repeat_interleave(k, 0))
)
wrong("7.3", says="only the first choice")(sorting(add=lambda out: out[:, 0]))
wrong("7.3", says="the mean over the k choices is taken")(sorting(add=lambda out: out.mean(1)))
wrong("7.3", says="without their weights")(
    sorting(after=lambda out, back, order, w: out[back], add=lambda out: out.mean(1))
)
wrong("7.3", says="no gradient reaches `weights`")(sorting(after=lambda out, back, order, w: out[back] * w.detach()))
wrong("7.3", says="no gradient reaches `x`")(sorting(lambda x, order, k, w: x.detach()[order // k]))
wrong("7.3", says="one row for each of the 14 assignments")(sorting(lambda x, order, k, w: x))


@wrong("7.3", says="rows are not sorted: they stand in the order of the tokens")
def sorted_experts(x, chosen, weights, experts, grouped):
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    out = grouped(x.repeat_interleave(chosen.shape[1], 0), counts).unflatten(0, chosen.shape)
    return (out * weights.unsqueeze(-1)).sum(1)


@wrong("7.3", says="the results of a token overwrite each other")
def sorted_experts(x, chosen, weights, experts, grouped):
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    token = order // chosen.shape[1]
    y = torch.zeros_like(x)
    y[token] += grouped(x[token], torch.bincount(flat, minlength=experts)) * weights.flatten()[order, None]
    return y


@wrong("7.3", says="unused experts count too")
def sorted_experts(x, chosen, weights, experts, grouped):
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    out = grouped(x[order // chosen.shape[1]], torch.bincount(flat))[order.argsort()]
    return (out.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1)


@wrong("7.3", says="here the experts have")
def sorted_experts(x, chosen, weights, experts, grouped):
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=experts).cumsum(0)
    out = grouped(x[order // chosen.shape[1]], ends)[order.argsort()]
    return (out.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(1)


@wrong("7.3", says="grouped is called more than once")
def sorted_experts(x, chosen, weights, experts, grouped):
    y = torch.zeros_like(x)
    for choice in range(chosen.shape[1]):
        order = chosen[:, choice].argsort()
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        rows = x.repeat_interleave(chosen.shape[1], 0)
        for _ in range(2):
            y = y + grouped(rows, counts)[: len(x)][order.argsort()] * weights[:, choice, None]
    return y


@wrong("7.3", says="grouped is never called")
def sorted_experts(x, chosen, weights, experts, grouped):
    return x * weights.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------- 7.4
def counts(C, F, E, k, S, L, other, expert=None, router=None, beside=None, met=None, **changed):
    """The right numbers, with parts replaced; a change may also be a function of the right numbers."""
    expert = 3 * C * F if expert is None else expert
    router = C * E if router is None else router
    beside = (3 * C * S + C if S else 0) if beside is None else beside
    layer, active = router + E * expert + beside, (router if met is None else met) + k * expert + beside
    right = {"expert": expert, "router": router, "shared": beside, "layer": layer, "active": active}
    right |= {"total": other + L * layer, "visited": other + L * active}
    return right | {name: make(right) for name, make in changed.items()}


@wrong("7.4", says="'expert' for C = 6, F = 5, E = 8, k = 3, shared width 4 is 60: a SwiGLU has three matrices")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, expert=2 * C * F)


@wrong("7.4", says="shared width 4 is 106: there are no biases")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, expert=3 * C * F + 2 * F + C)


@wrong("7.4", says="shared width 4 is 56: there are no biases")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, router=C * E + E)


@wrong("7.4", says="that is all experts of a layer")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, expert=3 * C * F * E)


@wrong("7.4", says="every one of the E experts a logit")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, router=C * k)


@wrong("7.4", says="without a shared expert there is no gate")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, beside=3 * C * S + C)


@wrong("7.4", says="the gate of the shared expert is missing")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, beside=3 * C * S)


@wrong("7.4", says="not one a channel")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, beside=3 * C * S + C * C if S else 0)


@wrong("7.4", says="a token needs the whole router, all E rows")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, met=C * k)


@wrong("7.4", says="'active' for C = 6, F = 5, E = 8, k = 3, shared width 4 is 846: that is all of the layer")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, active=lambda right: right["layer"])


@wrong("7.4", says="router and shared expert are met whole")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, active=lambda right: right["layer"] * k // E)


@wrong("7.4", says="a token meets k experts, not one")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, active=lambda right: right["active"] - (k - 1) * right["expert"])


@wrong("7.4", says="that is what a token meets; all E experts are stored")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, layer=lambda right: right["active"])


@wrong("7.4", says="the router is missing")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, layer=lambda right: E * right["expert"] + right["shared"])


@wrong("7.4", says="shared width 4 is 768: the shared expert is missing")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, layer=lambda right: right["layer"] - right["shared"])


@wrong("7.4", says="it is one a layer")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, layer=lambda right: right["layer"] + (E - 1) * right["shared"])


@wrong("7.4", says="the rest of the model is missing")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, 0)


@wrong("7.4", says="counts once, not once a layer")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, L * other)


@wrong("7.4", says="that is one layer")
def moe_parameters(C, F, E, k, S, L, other):
    return counts(C, F, E, k, S, L, other, total=lambda right: other + right["layer"])


@wrong("7.4", says="k experts are met in every layer, not in one")
def moe_parameters(C, F, E, k, S, L, other):
    once = lambda right: right["visited"] - (L - 1) * k * right["expert"]
    return counts(C, F, E, k, S, L, other, visited=once)


@wrong("7.4", says="no entry 'visited'")
def moe_parameters(C, F, E, k, S, L, other):
    return {name: number for name, number in counts(C, F, E, k, S, L, other).items() if name != "visited"}


# ---------------------------------------------------------------------------------------------- 7.5
def crowd(tokens=8, experts=16, size=10.0, unsure=((3, 1.001), (2, 1.0)), rest=0.0):
    """Tokens that crowd on expert 5, and one that hardly knows."""
    logits = torch.full((tokens + 1, experts), -size, dtype=torch.float64)
    logits[:, 5] = size
    logits[-1] = rest
    for expert, value in unsure:
        logits[-1, expert] = value
    return logits


@wrong("7.5", says="'twice' goes unnoticed")
def router_test_case():
    return torch.randn(9, 16, dtype=torch.float64), 2


@wrong("7.5", says="'twice' goes unnoticed")
def router_test_case():
    return torch.zeros(9, 16, dtype=torch.float64), 1


@wrong("7.5", says="'twice' goes unnoticed")
def router_test_case():
    return crowd()[:, 4:6], 1  # two experts: e / (e + 1) is not far enough below 1


@wrong("7.5", says="'late' goes unnoticed")
def router_test_case():
    return crowd()[:8], 1


@wrong("7.5", says="'late' goes unnoticed")
def router_test_case():
    return crowd(rest=-20.0), 2


@wrong("7.5", says="'rounded' goes unnoticed")
def router_test_case():
    return crowd(unsure=((3, 1.1), (2, 1.0))), 1


@wrong("7.5", says="'rounded' goes unnoticed")
def router_test_case():
    return crowd(unsure=((2, 1.001), (3, 1.0))), 1  # the first of the two is right by luck


@wrong("7.5", says="'rounded' goes unnoticed")
def router_test_case():
    return crowd(unsure=((3, 1.001), (2, 1.0))), 2  # both are chosen


@wrong("7.5", says="'blind' goes unnoticed")
def router_test_case():
    logits = crowd()
    logits[:8] = -10.0
    logits[torch.arange(8), torch.arange(8)] = 10.0  # sure, but evenly spread
    return logits, 1


@wrong("7.5", says="larger than 20 in absolute value")
def router_test_case():
    return crowd(size=1000.0), 1


@wrong("7.5", says="logits must be a float64 tensor")
def router_test_case():
    return crowd().float(), 1


@wrong("7.5", says="accepted: N from 1 to 32, E from 2 to 16")
def router_test_case():
    return crowd(experts=64), 1


@wrong("7.5", says="top_k is 16; accepted here: a whole number from 1 to 15")
def router_test_case():
    return crowd(), 16


@wrong("7.5", says="return the two of (logits, top_k)")
def router_test_case():
    return crowd()


# ---------------------------------------------------------------------------------------------- 7.6
def drawn(tokens):
    return torch.randn(tokens, 8, dtype=torch.float64)


def same_alone(layer, x):
    return torch.allclose(layer(x), torch.cat([layer(token[None]) for token in x]))


@wrong("7.6", says="catches 0 of 11")
def tokens_go_alone(layer):
    return True


@wrong("7.6", says="turns down a right implementation: top-2 of a softmax")
def tokens_go_alone(layer):
    return False


@wrong("7.6", says="one it lets through: experts choose their tokens")
def tokens_go_alone(layer):
    x, order = drawn(12), torch.randperm(12)
    return torch.allclose(layer(x)[order], layer(x[order]))  # the order alone


@wrong("7.6", says="one it lets through: sixteen places an expert")
def tokens_go_alone(layer):
    return same_alone(layer, drawn(12))


@wrong("7.6", says="one it lets through: a router that reads the token before")
def tokens_go_alone(layer):
    return same_alone(layer, drawn(1).repeat(64, 1))


@wrong("7.6", says="one it lets through: a fourth of the places too few")
def tokens_go_alone(layer):
    x = drawn(40)
    other = x.clone()
    other[20:] = drawn(20)
    return torch.allclose(layer(x)[:20], layer(other)[:20])  # no look into the future; the past may still push


@wrong("7.6", says="one it lets through")
def tokens_go_alone(layer):
    x = drawn(12)
    return torch.allclose(layer(x), layer(x))  # the same twice


@wrong("7.6", says="turns down a right implementation: top-2 of a softmax")
def tokens_go_alone(layer):
    x = drawn(12)
    return torch.allclose(layer(2 * x), 2 * layer(x))  # linear, which no layer is


@wrong("7.6", says="turns down a right implementation: a sigmoid for every expert")
def tokens_go_alone(layer):
    x = drawn(12)
    return bool((layer(x).abs() < 1.0).all()) and same_alone(layer, x)  # weights of at most one in sum


@wrong("7.6", says="returns Tensor; return True or False")
def tokens_go_alone(layer):
    x = drawn(12)
    return torch.isclose(layer(x), torch.cat([layer(token[None]) for token in x]))


# ---------------------------------------------------------------------------------------------- 7.7
def small(make):
    """make(logits, z [N])."""

    def function(logits):
        return make(logits, logits.logsumexp(-1))

    function.__name__ = "z_loss"
    return function


wrong("7.7", says="the square is missing")(small(lambda x, z: z.mean()))
wrong("7.7", says="the mean is squared")(small(lambda x, z: z.mean().square()))
wrong("7.7", says="the absolute value stands in the place of the square")(small(lambda x, z: z.abs().mean()))
wrong("7.7", says="the squares are summed")(small(lambda x, z: z.square().sum()))
wrong("7.7", says="the sum of exponentials runs over the tokens")(small(lambda x, z: x.logsumexp(0).square().mean()))
wrong("7.7", says="log sum exp is missing")(small(lambda x, z: x.square().mean()))
wrong("7.7", says="alike only when one is far ahead")(small(lambda x, z: x.amax(-1).square().mean()))
wrong("7.7", says="not added again after the logarithm")(
    small(lambda x, z: (x - x.amax(-1, keepdim=True)).logsumexp(-1).square().mean())
)
wrong("7.7", says="the mean of the exponentials is taken")(
    small(lambda x, z: (z - torch.tensor(float(x.shape[-1])).log()).square().mean())
)
wrong("7.7", says="the logits went through a softmax first")(small(lambda x, z: softmax(x).logsumexp(-1).square().mean()))
wrong("7.7", says="the sum of a softmax is 1")(small(lambda x, z: softmax(x).sum(-1).log().square().mean()))
wrong("7.7", says="exp overflows")(small(lambda x, z: x.exp().sum(-1).log().square().mean()))
wrong("7.7", says="no gradient flows through your function")(small(lambda x, z: z.detach().square().mean()))
wrong("7.7", says="keep the dtype of the input")(small(lambda x, z: x.double().logsumexp(-1).square().mean()))
wrong("7.7", says="the gradient for `logits` is wrong although the values are right")(
    small(lambda x, z: (z * z.detach()).mean())
)


@wrong("7.7", says="changes its input `logits` in place")
def z_loss(logits):
    largest = logits.amax(-1, keepdim=True)
    logits -= largest
    return (logits.exp().sum(-1).log() + largest[:, 0]).square().mean()


# ---------------------------------------------------------------------------------------------- 7.8
def halves(experts=8, size=10.0, first=4):
    logits = torch.where(torch.arange(experts) < first, size, -size).double()[None]
    return logits, -logits


@wrong("7.8", says="the second layer's own loss is 1:")
def layers_test_case():
    first, second = halves()
    return first, 0 * second, 8 // 2


@wrong("7.8", says="the first layer's own loss is 1:")
def layers_test_case():
    zero = torch.zeros(4, 8, dtype=torch.float64)
    return zero, zero, 2


@wrong("7.8", says="the pooled loss is 2: it still sees uneven use")
def layers_test_case():
    first, _ = halves()
    return first, first.clone(), 4


@wrong("7.8", says="the pooled loss is 4: it still sees uneven use")
def layers_test_case():
    first = torch.full((1, 8), -10.0, dtype=torch.float64)
    second = first.clone()
    first[0, 0] = second[0, 1] = 10.0  # one expert each, and six idle in both
    return first, second, 1


@wrong("7.8", says="own loss is 1")
def layers_test_case():
    first, second = halves(size=0.1)  # barely a preference: the probabilities stay even
    return first, second, 4


@wrong("7.8", says="larger than 20 in absolute value")
def layers_test_case():
    return *halves(size=100.0), 4


@wrong("7.8", says="they must be equal")
def layers_test_case():
    first, second = halves()
    return first, second.repeat(2, 1), 4


@wrong("7.8", says="second must be a float64 tensor")
def layers_test_case():
    first, second = halves()
    return first, second.float(), 4


@wrong("7.8", says="top_k is 4.0; accepted here: a whole number from 1 to 8")
def layers_test_case():
    return *halves(), 4.0


@wrong("7.8", says="return the three of (first, second, top_k)")
def layers_test_case():
    return halves()
