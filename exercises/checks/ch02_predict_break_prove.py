"""Checks of chapter 2: what a gate adds, how a layout breaks, what position G1 means."""

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    draw,
    expect_number,
    expect_property,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 2.6
def linear(inputs: int, outputs: int) -> int:
    return torch.nn.Linear(inputs, outputs, bias=False, device="meta").weight.numel()


def attention_parameters(width: int, heads: int, kv_heads: int, head_width: int) -> int:
    inner, kv_inner = heads * head_width, kv_heads * head_width
    return linear(width, inner) + 2 * linear(width, kv_inner) + linear(inner, width)


def count_added(width: int, heads: int, kv_heads: int, head_width: int) -> dict[str, int]:
    """Counted in one layer, on modules without memory."""
    before = attention_parameters(width, heads, kv_heads, head_width)
    return {
        "g1_elementwise": linear(width, heads * head_width),
        "g1_headwise": linear(width, heads),
        "g1_shared": linear(width, heads * head_width),
        "g1_input_independent": torch.empty(heads, head_width, device="meta").numel(),
        "g2_elementwise": linear(width, kv_heads * head_width),
        "g2_headwise": linear(width, kv_heads),
        "g5_elementwise": linear(width, width),
        "kv_heads_doubled": attention_parameters(width, heads, 2 * kv_heads, head_width) - before,
        "q_heads_half_more": attention_parameters(width, heads * 3 // 2, kv_heads, head_width) - before,
    }


def suspects_for(
    name: str, right: int, width: int, heads: int, kv_heads: int, head_width: int
) -> dict[str, int]:
    everywhere = {"that is a single number for each head": heads, "the gate is not free": 0}
    own = {
        "g1_elementwise": {
            "the scores fit the H query heads, not the K key/value heads": width * kv_heads * head_width,
            "one score for each channel of each head, not one for each head": width * heads,
        },
        "g1_headwise": {"a head has one score, not D": width * heads * head_width},
        "g1_shared": {
            "every head has its own rows; only the scores are averaged afterwards": width * head_width,
            "that is a headwise gate": width * heads,
        },
        "g1_input_independent": {
            "it reads no input, so C does not enter": width * heads * head_width,
            "one number for each channel of each head": heads,
        },
        "g2_elementwise": {"there are K value heads, not H": width * heads * head_width},
        "g2_headwise": {
            "there are K value heads, not H": width * heads,
            "a head has one score, not D": width * kv_heads * head_width,
        },
        "g5_elementwise": {
            "it gates the C outputs of W_O, not the H * D inputs": width * heads * head_width,
            "it is a full map from C to C": width,
        },
        "kv_heads_doubled": {
            "keys *and* values get more heads": right // 2,
            "count what is added, not the whole": 2 * right,
        },
        "q_heads_half_more": {
            "W_O grows along with W_Q": right // 2,
            "count what is added, not the whole": 3 * right,
        },
    }[name]
    return {message: number for message, number in (own | everywhere).items() if number != right}


@exercise(
    "2.6",
    "What a gate adds",
    kind="predict",
    difficulty=2,
    minutes=20,
    hint=(
        "A bias-free linear map from a to b channels has a * b parameters. Which tensor is gated, and how "
        "many scores does a token need for it? More heads enlarge every projection that has these heads "
        "at one end."
    ),
    pseudo=(
        "G1: C times the scores a token needs, H * D or H\n"
        "G2: the same with K in place of H\n"
        "G5: C times C\n"
        "input-independent: one table of the scores, no C\n"
        "more heads: their part of W_K and W_V, or of W_Q and W_O\n"
        "everything times the number of layers"
    ),
)
def added_parameters(f):
    for *sizes, layers in ((10, 6, 2, 3, 5), (14, 8, 4, 5, 7), (2048, 32, 4, 128, 24)):
        predicted = f(*sizes, layers)
        if not isinstance(predicted, dict):
            refuse(f"return a dictionary from variant to number, not {type(predicted).__name__}")
        about = f"for C, H, K, D = {tuple(sizes)} and {layers} layers"
        for name, each in count_added(*sizes).items():
            if name not in predicted:
                refuse(f"the dictionary has no entry {name!r}")
            suspects = {
                message: number * layers for message, number in suspects_for(name, each, *sizes).items()
            }
            suspects["that is one layer; the model has several"] = each
            suspects["count parameters, not millions"] = each * layers / 1e6
            expect_number(predicted[name], each * layers, f"{name} {about}", suspects)


# ---------------------------------------------------------------------------------------------- 2.7
def read_packed(w: Tensor, heads: int, kv_heads: int, part: int) -> Tensor:
    group, width = heads // kv_heads, w.shape[0] // (2 * heads)
    return w.view(kv_heads, 2, group, width, -1)[:, part].reshape(heads, width, -1)


def read_per_head(w: Tensor, heads: int, kv_heads: int, part: int) -> Tensor:
    return w.view(heads, 2, w.shape[0] // (2 * heads), -1)[:, part]


def read_halves(w: Tensor, heads: int, kv_heads: int, part: int) -> Tensor:
    return w.view(2, heads, w.shape[0] // (2 * heads), -1)[part]


def read_tiled(w: Tensor, heads: int, kv_heads: int, part: int) -> Tensor:
    group, width = heads // kv_heads, w.shape[0] // (2 * heads)
    return w.view(kv_heads, 2, group, width, -1)[:, part].transpose(0, 1).reshape(heads, width, -1)


@exercise(
    "2.7",
    "Break the weight loaders",
    kind="break",
    difficulty=3,
    minutes=20,
    hint=(
        "When H = K a group is a single head, and when K = 1 there is a single group: what do the four "
        "readings do then? And a row must be recognisable wherever it ends up."
    ),
    pseudo=(
        "choose H and K so that there are several groups of several heads each\n"
        "choose D and C, and fill w [2 * H * D, C] so that no two rows are alike\n"
        "return w, H, K"
    ),
)
def layout_test_case(f):
    case = f()
    if not isinstance(case, (tuple, list)) or len(case) != 3:
        refuse("return the three of (w, H, K)")
    w, heads, kv_heads = case
    if not isinstance(w, Tensor) or w.dim() != 2 or not w.is_floating_point():
        refuse("w must be a float tensor [2 * H * D, C]")
    if not all(isinstance(n, int) and n > 0 for n in (heads, kv_heads)):
        refuse(f"H and K must be positive whole numbers, not {heads!r} and {kv_heads!r}")
    if heads % kv_heads:
        refuse(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    if not w.numel() or w.numel() > 4096 or w.shape[0] % (2 * heads):
        refuse(
            f"w has the shape {list(w.shape)}: it needs 2 * H * D rows (H = {heads}) and 1 to 4096 entries"
        )
    if not torch.isfinite(w).all():
        refuse("w holds NaN or infinity")
    _expose_loaders(w.contiguous(), heads, kv_heads)


def _expose_loaders(w: Tensor, heads: int, kv_heads: int) -> None:
    why = "its rows are too much alike"
    if heads == kv_heads:
        why = "with H = K every group has a single head, so both layouts coincide"
    elif kv_heads == 1:
        why = "with K = 1 there is a single group, so its order cannot be wrong"
    for name, loader in (("per head", read_per_head), ("halves", read_halves), ("tiled", read_tiled)):
        for part, which in ((0, "query"), (1, "gate")):
            if torch.equal(loader(w, heads, kv_heads, part), read_packed(w, heads, kv_heads, part)):
                refuse(f"the bug '{name}' goes unnoticed in the {which}: {why}")


# ---------------------------------------------------------------------------------------------- 2.8
def _gate(scores, combine=torch.mul):
    """G1 with scores made from logits [B, T, 2, 4]."""
    matrix = draw(6, 8, seed=5).float()

    def attend(weights, v, x):
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        return combine(y, scores((x @ matrix).unflatten(-1, (2, 4))))

    return attend


def _gate_values(weights, v, x):
    scores = torch.sigmoid((x @ draw(6, 8, seed=5).float()).unflatten(-1, (2, 4)))
    return torch.einsum("bhts,bshd->bthd", weights, v * scores)


def _gate_weights(weights, v, x):
    gated = weights * torch.sigmoid(x @ draw(6, 2, seed=6).float()).mT.unsqueeze(2)  # [B, H, 1, S]
    return torch.einsum("bhts,bshd->bthd", gated / gated.sum(-1, keepdim=True), v)


FOLLOWS_QUERY = {
    "the elementwise gate at G1": _gate(torch.sigmoid),
    "a headwise gate at G1": _gate(lambda z: torch.sigmoid(z[..., :1])),
    "a head-shared gate at G1": _gate(lambda z: torch.sigmoid(z).mean(2, keepdim=True)),
    "a gate at G1 that never closes (non-sparse sigmoid)": _gate(lambda z: 0.5 + 0.5 * torch.sigmoid(z)),
    "an additive gate at G1": _gate(torch.nn.functional.silu, torch.add),
}
MISPLACED = {
    "a gate on the values (G2)": _gate_values,
    "no gate at all": _gate(torch.ones_like),
    "an input-independent gate": _gate(lambda z: torch.full_like(z, 0.3)),
    "a gate from the previous token": _gate(lambda z: torch.sigmoid(z.roll(1, dims=1))),
    "a gate from the mean over all tokens": _gate(
        lambda z: torch.sigmoid(z.mean(1, keepdim=True)).expand_as(z)
    ),
    "a gate from the mean over the tokens so far": _gate(
        lambda z: torch.sigmoid(z.cumsum(1) / torch.arange(1, z.shape[1] + 1)[:, None, None])
    ),
    "a gate on the attention weights, which are then normalised again": _gate_weights,
    "gates at G1 and G2 at once": lambda weights, v, x: _gate(torch.sigmoid)(weights, _own_gate(v, x), x),
    "a gate at G1 that leaves out token 0": _gate(
        lambda z: torch.cat((torch.ones_like(z[:, :1]), torch.sigmoid(z[:, 1:])), dim=1)
    ),
}


def _own_gate(v, x):
    return v * torch.sigmoid((x @ draw(6, 8, seed=7).float()).unflatten(-1, (2, 4)))


@exercise(
    "2.8",
    "Prove where the gate sits",
    kind="prove",
    difficulty=3,
    minutes=20,
    hint=(
        "Keep weights and v, change x at one token only, and look at which outputs move. How many should? "
        "And which? Do not compare values with a gate of your own: it may be any kind."
    ),
    pseudo=(
        "draw weights (rows sum to 1), v and x; before = attend(weights, v, x)\n"
        "for every token i:\n"
        "    change x at token i alone; after = attend(weights, v, changed x)\n"
        "    unless the output of token i moved, and no other: return False\n"
        "return True"
    ),
)
def gate_follows_query(f):
    expect_property(f, FOLLOWS_QUERY, MISPLACED)
