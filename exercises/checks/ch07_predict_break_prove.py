"""Checks of chapter 7: parameters a token meets, wrong routers, and a loss that sees nothing."""

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import draw, expect_number, refuse
from minigated.lm import build_lm
from minigated.moe import MoE
from minigated.variants import parameters


# ---------------------------------------------------------------------------------------------- 7.4
def met_by_one_token(layer: MoE, width: int) -> int:
    """Parameters that the output for one token has a gradient for."""
    layer = layer.double()
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed) / 2
    layer(draw(1, 1, width, seed=5)).sum().backward()
    return sum(int((parameter.grad != 0).sum()) for parameter in layer.parameters())


def counted_parameters(width: int, hidden: int, experts: int, top_k: int, shared: int, layers: int, other: int) -> dict:
    """Counted on the layer itself; a token's share by the gradients it causes."""
    layer = MoE(width, hidden, experts, top_k, shared_width=shared, form="loop")
    parts = {name: parameters(part) for name, part in layer.named_children()}
    total, active = parameters(layer), met_by_one_token(layer, width)
    return {
        "expert": parts["experts"] // experts,
        "router": parts["router"],
        "shared": parts.get("shared", 0) + parts.get("shared_gate", 0),
        "layer": total,
        "active": active,
        "total": other + layers * total,
        "visited": other + layers * active,
    }


def published_parameters() -> tuple[tuple, dict]:
    """The 15A2B model of the paper, built without memory: arguments of the exercise, and what is counted."""
    model = build_lm("15A2B", "meta")
    config, layer = model.config, model.blocks[0].ffn
    total, whole = parameters(model), parameters(layer)
    arguments = (config.width, config.ffn_width, config.experts, config.top_k, 0, config.layers)
    idle = config.idle_parameters
    found = {
        "expert": parameters(layer.experts) // config.experts,
        "router": parameters(layer.router),
        "shared": 0,
        "layer": whole,
        "active": whole - idle // config.layers,
        "total": total,
        "visited": total - idle,
    }
    return (*arguments, total - config.layers * whole), found


def parameter_suspects(name: str, right: dict, sizes: tuple) -> dict[str, int]:
    width, hidden, experts, top_k, shared, layers, other = sizes
    expert, router, beside, value = right["expert"], right["router"], right["shared"], right[name]
    layer, active = right["layer"], right["active"]
    small = {
        "expert": {
            "a SwiGLU has three matrices: gate, up and down": 2 * width * hidden,
            "there are no biases": value + 2 * hidden + width,
            "that is all experts of a layer": experts * value,
        },
        "router": {
            "the router gives every one of the E experts a logit, not only the k": width * top_k,
            "there are no biases": value + experts,
        },
        "shared": {
            "the gate of the shared expert is missing": value - width,
            "without a shared expert there is no gate": value + width,
            "the gate gives one number a token, not one a channel": value - width + width**2,
            "there are no biases": value + 1,
            "a SwiGLU has three matrices: gate, up and down": value - width * shared,
        },
        "layer": {"that is what a token meets; all E experts are stored": active},
        "active": {
            "that is all of the layer; a token meets k experts": layer,
            "to choose k of E a token needs the whole router, all E rows": value - router + width * top_k,
            "a share k / E of the layer: but router and shared expert are met whole": layer * top_k // experts,
            "a token meets k experts, not one": value - (top_k - 1) * expert,
        },
        "total": {"that is what a token meets; all E experts are stored": right["visited"]},
        "visited": {
            "that is all of the model; a token meets k experts a layer": right["total"],
            "k experts are met in every layer, not in one": other + layers * (active - top_k * expert) + top_k * expert,
            "to choose k of E a token needs the whole router, all E rows": value - layers * (router - width * top_k),
        },
    }[name]
    times = {"layer": 1, "active": 1, "total": layers, "visited": layers}.get(name, 0)
    if times:
        small |= {
            "the router is missing": value - times * router,
            "the shared expert is missing: every token visits it too": value - times * beside,
            "there are E shared experts here; it is one a layer": value + times * (experts - 1) * beside,
        }
    if name in ("total", "visited"):
        small |= {
            "the rest of the model is missing": value - other,
            "the rest of the model counts once, not once a layer": value + (layers - 1) * other,
            "that is one layer": other + (layer if name == "total" else active),
        }
    return {message: number for message, number in small.items() if number != value}


@exercise(
    "7.4",
    "What a token meets",
    kind="predict",
    difficulty=2,
    minutes=15,
    hint=(
        "The matrices of an expert are W_gate and W_up, [F, C] each, and W_down [C, F]; the router is [E, C]. Which of "
        "them can a token leave aside, before it knows where it goes?"
    ),
    pseudo=(
        "expert = 3 C F; router = E C\n"
        "shared = 3 C S + C, or 0 without a shared expert\n"
        "layer = router + E experts + shared; active = router + k experts + shared\n"
        "total and visited: other + layers times one of these"
    ),
)
def moe_parameters(f):
    cases = [(6, 5, 8, 3, 4, 3, 777), (4, 3, 6, 2, 0, 2, 1000), (8, 2, 5, 1, 2, 4, 50)]
    counted = [(sizes, counted_parameters(*sizes)) for sizes in cases]
    for sizes, right in [*counted, published_parameters()]:
        predicted = f(*sizes)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from name to number, not {type(predicted).__name__}")
        for name, value in right.items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            what = "{!r} for C = {}, F = {}, E = {}, k = {}, shared width {}".format(name, *sizes[:5])
            expect_number(predicted[name], value, what, parameter_suspects(name, right, sizes))


# ---------------------------------------------------------------------------------------------- 7.5
def _best(values: Tensor, top_k: int) -> Tensor:
    return torch.argsort(values, dim=-1, descending=True, stable=True)[:, :top_k]


def _share(chosen: Tensor, experts: int) -> Tensor:
    return torch.bincount(chosen.flatten(), minlength=experts).double() / chosen.numel()


def _loss(chosen: Tensor, p: Tensor) -> float:
    return float(p.shape[-1] * (_share(chosen, p.shape[-1]) * p.mean(0)).sum())


def _check_logits(name: str, logits, tokens: int) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.dtype != torch.float64:
        refuse(f"{name} must be a float64 tensor [N, E]")
    if not 1 <= logits.shape[0] <= tokens or not 2 <= logits.shape[1] <= 16:
        refuse(f"{name} has the shape {list(logits.shape)}; accepted: N from 1 to {tokens}, E from 2 to 16")
    if not (logits.abs() <= 20).all():  # NaN too
        refuse(f"an entry of {name} is larger than 20 in absolute value, or not a number")


def _check_top_k(top_k, largest: int) -> None:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= largest:
        refuse(f"top_k is {top_k!r}; accepted here: a whole number from 1 to {largest}")


@exercise(
    "7.5",
    "Break four routers",
    kind="break",
    difficulty=3,
    minutes=25,
    hint=(
        "Probabilities lie between 0 and 1, so a second softmax tells experts apart by a factor of e at most: which "
        "logits should have been told apart far better? `late` and `rounded` need another kind of token, one that "
        "hardly knows. One input may hold both kinds."
    ),
    pseudo=(
        "E = 16, k = 1; most tokens: one logit far above the rest, the same expert for all\n"
        "that shows `twice` (1 becomes about 0.15) and `blind` (16 becomes about 2.4)\n"
        "one token: all logits equal but two, which differ by less than bfloat16 tells; the larger one stands later\n"
        "that shows `late` (a small weight becomes 1) and `rounded`"
    ),
)
def router_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 2:
        refuse("return the two of (logits, top_k)")
    logits, top_k = case
    _check_logits("logits", logits, 32)
    _check_top_k(top_k, logits.shape[1] - 1)
    p = torch.softmax(logits, -1)
    chosen, again = _best(logits, top_k), torch.softmax(p, -1)
    weights = p.gather(1, chosen)
    if (weights - again.gather(1, chosen)).max() <= 0.5:
        refuse(
            "'twice' goes unnoticed: its largest weight is e / (e + E - 1) at most, so one token must be far surer; "
            "and few experts leave little room"
        )
    if (torch.softmax(logits.gather(1, chosen), -1) - weights).max() <= 0.2:
        refuse("'late' goes unnoticed: for some token, experts that are not chosen must hold much of the probability")
    other = _best(logits.to(torch.bfloat16), top_k)
    if torch.equal(chosen.sort(-1).values, other.sort(-1).values):
        refuse(
            "'rounded' goes unnoticed: at the border of the k best two logits must be nearer than one part in 256, "
            "and the larger one must stand later"
        )
    right, blind = _loss(chosen, p), _loss(chosen, again)
    if blind >= right / 2:
        refuse(
            f"'blind' goes unnoticed: it reports {blind:.3g}, the right loss is {right:.3g}. Are all tokens on the "
            "same experts, and sure of it?"
        )


# ---------------------------------------------------------------------------------------------- 7.8
@exercise(
    "7.8",
    "Hide two collapsed layers",
    kind="break",
    difficulty=2,
    minutes=15,
    hint=(
        "Pooled, experts look evenly used when what one layer leaves idle the other one overloads. Multiply out "
        "(f + f') (P + P') / 4: when nothing overlaps, the pooled loss is a quarter of the sum of the two."
    ),
    pseudo=(
        "first layer: k experts with the same large logit, the others far below\n"
        "second layer: the other E - k experts, so that k = E / 2\n"
        "return both, and k"
    ),
)
def layers_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 3:
        refuse("return the three of (first, second, top_k)")
    first, second, top_k = case
    _check_logits("first", first, 64)
    _check_logits("second", second, 64)
    if first.shape != second.shape:
        refuse(f"the layers have the shapes {list(first.shape)} and {list(second.shape)}; they must be equal")
    _check_top_k(top_k, first.shape[1])
    layers = [(_best(z, top_k), torch.softmax(z, -1)) for z in (first, second)]
    for name, layer in zip(("first", "second"), layers):
        if _loss(*layer) <= 1.9:
            refuse(f"the {name} layer's own loss is {_loss(*layer):.4g}: it is not collapsed on half of its experts")
    pooled = _loss(*(torch.cat(both) for both in zip(*layers)))
    if pooled >= 1.01:
        refuse(f"the pooled loss is {pooled:.4g}: it still sees uneven use. Do layers share experts, or leave some?")
