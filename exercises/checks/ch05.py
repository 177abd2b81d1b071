"""Checks of chapter 5: the gate's place, local context, two passes, stochastic depth."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_close,
    expect_good_manners,
    expect_tensor,
    expect_untouched,
)


# ---------------------------------------------------------------------------------------------- 5.1
def gated_reference(x: Tensor, attended: Tensor, local: Tensor, w_g: Tensor, w_o: Tensor) -> Tensor:
    logits = torch.einsum("bhwc,dc->bhwd", x, w_g)
    return torch.einsum("bhwc,dc->bhwd", (attended + local) / (1 + torch.exp(-logits)), w_o)


def gated_suspects(x: Tensor, attended: Tensor, local: Tensor, w_g: Tensor, w_o: Tensor) -> dict[str, Tensor]:
    gathered, score = attended + local, torch.sigmoid(x @ w_g.T)
    return {
        "the gate multiplies the attended part alone: a shut gate would let the local context talk on": (
            (score * attended + local) @ w_o.T
        ),
        "the gate comes after W_O; that is position G5, not G1": score * (gathered @ w_o.T),
        "the scores are computed from what was gathered; they are read from the block input x": (
            (torch.sigmoid(gathered @ w_g.T) * gathered) @ w_o.T
        ),
        "the scores are computed from the attended part; they are read from the block input x": (
            (torch.sigmoid(attended @ w_g.T) * gathered) @ w_o.T
        ),
        "the gate multiplies the local context alone: a shut gate would let the attended part talk on": (
            (attended + score * local) @ w_o.T
        ),
        "the output projection W_O is missing": score * gathered,
        "the sigmoid is missing": ((x @ w_g.T) * gathered) @ w_o.T,
        "that is a SiLU: the logit times its sigmoid": (F.silu(x @ w_g.T) * gathered) @ w_o.T,
        "W_g is used transposed: its rows are output channels": (torch.sigmoid(x @ w_g) * gathered) @ w_o.T,
        "W_O is used transposed: its rows are output channels": (score * gathered) @ w_o,
        "the local context is missing": (score * attended) @ w_o.T,
    }


@exercise(
    "5.1",
    "The gate's place",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint="Three steps in the order of eq. (5.1): add the local context, multiply by the scores, project.",
    pseudo="score = sigmoid(x W_g^T)\ny = attended + local\nreturn (score * y) W_O^T",
)
def gated_output(f):
    maps = {name: draw(2, 3, 4, 6, seed=s) for s, name in enumerate(("x", "attended", "local"))}
    weights = {name: draw(6, 6, seed=s + 3) for s, name in enumerate(("w_g", "w_o"))}
    inputs = maps | weights
    expect_tensor(call(f, *inputs.values()), (2, 3, 4, 6))
    expect_close(
        call(f, *inputs.values()),
        gated_reference(*inputs.values()),
        "wrong for random maps of 3 x 4 cells",
        gated_suspects(*inputs.values()),
    )
    expect_good_manners(f, gated_reference, inputs)


# ---------------------------------------------------------------------------------------------- 5.2
def local_reference(v: Tensor, weight: Tensor) -> Tensor:
    channels, side = weight.shape[0], weight.shape[-1]
    return F.conv2d(v.permute(0, 3, 1, 2), weight[:, None], padding=side // 2, groups=channels).permute(0, 2, 3, 1)


def local_suspects(v: Tensor, weight: Tensor) -> dict[str, Tensor]:
    channels, side = weight.shape[0], weight.shape[-1]
    edge, first = side // 2, v.permute(0, 3, 1, 2)
    convolve = lambda x, w, **options: F.conv2d(x, w[:, None], groups=channels, **options).permute(0, 2, 3, 1)
    wrapped = F.pad(first, (edge,) * 4, mode="circular")
    suspects = {
        "the filter is transposed: i counts rows, j counts columns": local_reference(v, weight.mT),
        "the filter is turned round: place (0, 0) belongs to the neighbour above and to the left": local_reference(
            v, weight.flip(1, 2)
        ),
        "the map is wrapped round at its border; beyond it lies 0": convolve(wrapped, weight),
        "the border cells are repeated; beyond the border lies 0": convolve(
            F.pad(first, (edge,) * 4, mode="replicate"), weight
        ),
        "every channel uses the first channel's filter": local_reference(v, weight[:1].expand_as(weight)),
        "the channels are mixed; each has a filter of its own": F.conv2d(
            first, weight[None].expand(channels, -1, -1, -1), padding=edge
        ).permute(0, 2, 3, 1),
        "the input is added to the result: LCE itself has no residual": local_reference(v, weight) + v,
    }
    right = local_reference(v, weight)
    return {m: w for m, w in suspects.items() if w.shape == right.shape and (w - right).abs().max() > 1e-9}


@exercise(
    "5.2",
    "Local context enhancement",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "Pad the two map axes with k // 2 zeros on each side. Then place (i, j) of the filter sees the padded map from "
        "row i and column j on: a slice as large as the map, times weight[:, i, j]."
    ),
    pseudo=(
        "pad rows and columns of v with zeros\n"
        "for every place (i, j) of the filter:\n"
        "    out += padded[:, i : i + h, j : j + w] * weight[:, i, j]"
    ),
)
def local_context(f):
    expect_tensor(call(f, draw(2, 4, 6, 3), draw(3, 3, 3, seed=1)), (2, 4, 6, 3))
    for height, width, side in ((5, 5, 3), (4, 7, 3), (6, 3, 5), (1, 1, 3), (3, 4, 1)):
        v, weight = draw(2, height, width, 4), draw(4, side, side, seed=1)
        where = f"wrong for maps of {height} x {width} and filters of {side} x {side}"
        expect_close(call(f, v, weight), local_reference(v, weight), where, local_suspects(v, weight))
    expect_good_manners(f, local_reference, {"v": draw(2, 3, 4, 3), "weight": draw(3, 3, 3, seed=1)})


# ---------------------------------------------------------------------------------------------- 5.3
def pass_reference(q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, axis: int) -> Tensor:
    q, k, v = (x.movedim(axis, 3) for x in (q, k, v))  # [B, other axis, H, n, D]
    apart = torch.tensor([[abs(i - j) for j in range(q.shape[3])] for i in range(q.shape[3])], dtype=q.dtype)
    scores = torch.einsum("bohid,bohjd->bohij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * torch.exp(apart * log_gamma.view(-1, 1, 1))
    out = torch.einsum("bohij,bohjd->bohid", weights / weights.sum(-1, keepdim=True), v)
    return out.movedim(3, axis)


def passes_reference(q, k, v, log_gamma) -> Tensor:
    return pass_reference(q, k, pass_reference(q, k, v, log_gamma, 2), log_gamma, 1)


def passes_suspects(q, k, v, log_gamma) -> dict[str, Tensor]:
    scale = q.shape[-1] ** 0.5
    suspects = {
        "the height pass comes first; RMT goes along the width first": pass_reference(
            q, k, pass_reference(q, k, v, log_gamma, 1), log_gamma, 2
        ),
        "the rates of the heads are in reverse order": passes_reference(q, k, v, log_gamma.flip(0)),
        "the scale 1 / sqrt(D) is missing": passes_reference(q * scale, k, v, log_gamma),
        "there is no decay": passes_reference(q, k, v, torch.zeros_like(log_gamma)),
        "the decay has the wrong sign: distant cells count more": passes_reference(q, k, v, -log_gamma),
        "all heads decay at the rate of the first": passes_reference(q, k, v, log_gamma[:1].expand_as(log_gamma)),
        "the height pass is missing": pass_reference(q, k, v, log_gamma, 2),
        "the width pass is missing": pass_reference(q, k, v, log_gamma, 1),
        "both passes read the original values and are added": (
            pass_reference(q, k, v, log_gamma, 2) + pass_reference(q, k, v, log_gamma, 1)
        ),
        "the decay comes after the softmax and the weights no longer sum to 1": unnormalised(q, k, v, log_gamma),
    }
    right = passes_reference(q, k, v, log_gamma)
    return {m: w for m, w in suspects.items() if (w - right).abs().max() > 1e-9}


def unnormalised(q, k, v, log_gamma) -> Tensor:
    for axis in (2, 1):
        a, b, c = (x.movedim(axis, 3) for x in (q, k, v))
        place = torch.arange(a.shape[3])
        decay = torch.exp((place[:, None] - place).abs() * log_gamma.view(-1, 1, 1))
        v = (((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) * decay) @ c).movedim(3, axis)
    return v


@exercise(
    "5.3",
    "Two passes",
    kind="fill",
    difficulty=3,
    minutes=25,
    hint=(
        "Write one pass for tensors whose axis stands second to last, [B, ..., H, n, D]. For the width pass swap w "
        "and H; for the height pass bring h there. The mask |i - j| * log gamma, [H, n, n], is added first."
    ),
    pseudo=(
        "along(q, k, v): softmax(q k^T / sqrt(D) + |i - j| log_gamma) v\n"
        "width: move w to the second to last place, along, move back\n"
        "height: move h there, along with the same q and k and the new values, move back"
    ),
)
def two_passes(f):
    for height, width, heads in ((4, 4, 2), (3, 5, 3), (1, 4, 2)):
        q, k, v = (draw(2, height, width, heads, 4, seed=s) for s in range(3))
        log_gamma = torch.linspace(0.5, 0.9, heads, dtype=torch.float64).log()
        expect_tensor(call(f, q, k, v, log_gamma), tuple(v.shape))
        where = f"wrong for a map of {height} x {width} and {heads} heads"
        inputs = (q, k, v, log_gamma)
        expect_close(call(f, *inputs), passes_reference(*inputs), where, passes_suspects(*inputs))
    inputs = {name: draw(1, 2, 3, 2, 4, seed=s) for s, name in enumerate("qkv")}
    expect_good_manners(f, passes_reference, inputs, torch.tensor([0.5, 0.8], dtype=torch.float64).log())


# ---------------------------------------------------------------------------------------------- 5.4
def drop_reference(branch: Tensor, rate: float, training: bool, kept: Tensor) -> Tensor:
    if not training:
        return branch.clone()
    return torch.stack([image / (1 - rate) if keep else 0 * image for image, keep in zip(branch, kept.tolist())])


def drop_suspects(branch: Tensor, rate: float, kept: Tensor) -> dict[str, Tensor]:
    column = kept.view(-1, *(1,) * (branch.ndim - 1)).double()
    suspects = {
        "what stays is not made larger: divide by 1 - rate": branch * column,
        "divide by the share that stays, 1 - rate, not by the rate": branch * column / rate,
        "divide by 1 - rate, not by the share of this draw: its mean over many draws is not the branch": (
            branch * column / column.mean()
        ),
        "the images are the wrong ones: 1 in `kept` means that the branch stays": branch * (1 - column) / (1 - rate),
        "multiply by 1 / (1 - rate), not by 1 - rate": branch * column * (1 - rate),
        "nothing is left out in training": branch,
    }
    if branch.shape[-1] == len(kept):
        suspects["whole images are left out, not channels: `kept` belongs to the first axis"] = (
            branch * kept.double() / (1 - rate)
        )
    return suspects


@exercise(
    "5.4",
    "Leave a branch out",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint="`kept` has one entry an image: give it as many axes of size 1 as the branch has after the first.",
    pseudo=(
        "not training, or rate 0: return the branch\nshape kept as [B, 1, 1, ...]\nreturn branch * kept / (1 - rate)"
    ),
)
def drop_path(f):
    kept = torch.tensor([1, 0, 1, 1])  # three of four stay, which no rate below says: the rate counts, not the draw
    for rate, shape in ((0.4, (4, 3, 2, 5)), (0.1, (4, 6)), (0.4, (4, 4, 4))):
        branch = draw(*shape)
        found = call(f, branch, rate, True, kept)
        expect_tensor(found, shape)
        case = f"for a branch of shape {list(shape)} and rate {rate}"
        where = f"wrong in training {case}"
        absent = found.flatten(1) == 0
        if (absent.any(1) & ~absent.all(1)).any():
            where = f"a part of an image is left out {case}: an image keeps its branch whole or not at all"
        right = drop_reference(branch, rate, True, kept)
        expect_close(found, right, where, drop_suspects(branch, rate, kept))
        unscaled = {
            "outside training nothing is left out": right,
            "outside training nothing is scaled": branch / (1 - rate),
            "the inverse scaling belongs to training; outside it the branch passes as it is": branch * (1 - rate),
        }
        expect_close(call(f, branch, rate, False, kept), branch, f"wrong outside training {case}", unscaled)
    branch, everyone = draw(4, 3), torch.ones(4)
    expect_close(call(f, branch, 0.0, True, everyone), branch, "with rate 0 the branch passes as it is")
    expect_untouched(f, {"branch": draw(4, 3, 2)}, 0.25, False, kept)
    expect_good_manners(f, drop_reference, {"branch": draw(4, 3, 2)}, 0.25, True, kept)
