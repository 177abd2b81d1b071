"""Solutions of chapter 6. The docstrings are the statements; the stubs are made from this file."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_pass(q: Tensor, k: Tensor, v: Tensor, slope: float, gamma: float) -> Tensor:
    """Write one pass of attention whose weights need not sum to one.

    Cell i gives cell j the weight sigmoid(q_i . k_j / sqrt(D) + s (i - j)) times gamma to the power |i - j|,
    eq. (6.1). The slope s goes *inside* the sigmoid with the signed offset i - j: a positive one favours cells
    before i. The decay goes *outside*, with the distance. The output is the weighted sum of the values, and
    nothing is divided by anything.

    Args:
        q: queries of one line of W cells [..., W, D].
        k: keys [..., W, D].
        v: values [..., W, D].
        slope: s, one number for this head.
        gamma: the decay rate of this head, between 0 and 1.

    Returns:
        [..., W, D].
    """
    cells = torch.arange(q.shape[-2])
    offset = (cells[:, None] - cells).to(q.dtype)  # [W, W], i - j
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + slope * offset
    weights = torch.sigmoid(scores) * gamma ** offset.abs()  # [..., W, W]
    return weights @ v


def slopes_of_both_signs(heads: int) -> Tensor:
    """Give every head its slope, as SWAT does.

    There are as many positive as negative slopes, and the two halves are mirror images: the first H/2 heads
    have 2^-1, 2^-2, 2^-3 and so on, the other H/2 the same numbers with a minus sign. An odd number of heads
    cannot be halved: refuse it with a ValueError.

    Args:
        heads: H.

    Returns:
        [H], any float dtype.
    """
    if heads < 2 or heads % 2:
        raise ValueError(f"{heads} heads cannot be split into two halves")
    half = 2.0 ** -torch.arange(1.0, heads // 2 + 1)  # [H/2]
    return torch.cat((half, -half))


def normalise_then_add(z: Tensor, v: Tensor, kernel: Tensor, w_out: Tensor) -> Tensor:
    """Finish the mixer: normalise what attention gave, then add the local context, then project.

    The scale of z is anybody's guess: it grows with how many weights are open and how much the values agree.
    So each cell of z is brought to mean 0 and deviation 1 over *all* its C = H * D channels, a LayerNorm
    without weights (eps 1e-6). What the depth-wise convolution finds in the *values* is added after that,
    eq. (6.4), and W_O comes last.

    The convolution is `F.conv2d(maps, kernel[:, None], padding=2, groups=C)` on maps [B, C, h, w].

    Args:
        z: attention output [B, h, w, H, D].
        v: gated values [B, h, w, C]; channel h * D + d belongs to head h.
        kernel: one 5 x 5 filter a channel, [C, 5, 5].
        w_out: W_O, the weight of a bias-free nn.Linear, [C, C].

    Returns:
        [B, h, w, C].
    """
    joined = z.flatten(-2)  # [B, h, w, C]
    normed = F.layer_norm(joined, joined.shape[-1:], eps=1e-6)
    maps = v.permute(0, 3, 1, 2)  # [B, C, h, w]
    local = F.conv2d(maps, kernel[:, None], padding=2, groups=len(kernel)).permute(0, 2, 3, 1)
    return (normed + local) @ w_out.T


def mask_test_case() -> tuple:
    """Break three masks with one input.

    In a shifted window some pairs are forbidden: `allowed` [W, W] is False there. With s = q k^T / sqrt(D) the
    right weights are

        right      = sigmoid(s) * allowed

    and three wrong ones circulate:

        zeroed     = sigmoid(s * allowed)            # a score of zero is not a weight of zero
        minus_100  = sigmoid(s - 100 * ~allowed)     # Swin's habit; made for a softmax
        silenced   = sigmoid(s) @ (v * allowed.any(0)[:, None])   # hides cells nobody may see, and no pair

    Most inputs expose the first. Find one on which each of the three gives an output that differs from the right
    one by more than 0.1. Choose a mask that a shifted window could have: cells see each other within groups of
    neighbours, every cell sees itself, and there are two groups or more.

    Returns:
        (q, k, v, allowed): float64 tensors [W, D] with entries of at most 20 in absolute value, and a bool tensor
        [W, W]; W and D from 1 to 16.
    """
    q = torch.full((4, 4), 10.0, dtype=torch.float64)  # q . k / sqrt(D) = 200
    v = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4)
    group = torch.tensor([0, 0, 1, 1])
    return q, q.clone(), v, group[:, None] == group


def weights_are_independent(attend) -> bool:
    """Write the property that sets this chapter's attention apart: every pair decides alone.

    In a softmax a pair's weight depends on all other keys, because they share one sum. Here the weight of (i, j)
    depends on q_i, k_j and the two places, and on nothing else. Two things follow, and each catches mistakes that
    the other lets through. A key whose value is zero cannot be noticed, whatever it is. And a query changes its own
    output, never that of another cell.

    You are graded by the implementations you turn down that share something among keys or among queries, and by
    those without such sharing that you accept: with or without decay, slopes, or a mask.

    Args:
        attend: a function of q, k, v [B, W, D] that returns [B, W, D]. B, W and D are yours to choose (W up to 32),
            everything is float64.

    Returns:
        True if every pair decides alone, otherwise False.
    """
    q, k, v = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    for cell in range(6):
        silent = v.clone()
        silent[:, cell] = 0
        other = k.clone()
        other[:, cell] = 3 * torch.randn(2, 4, dtype=torch.float64)
        if not torch.allclose(attend(q, k, silent), attend(q, other, silent)):
            return False
        asked = q.clone()
        asked[:, cell] = 3 * torch.randn(2, 4, dtype=torch.float64)
        rest = torch.arange(6) != cell
        if not torch.allclose(attend(q, k, v)[:, rest], attend(asked, k, v)[:, rest]):
            return False
    return True


def growth_at_the_start(window: int, gamma: float) -> dict:
    """Predict by how much two passes multiply values that agree.

    Before training queries and keys are near zero, so every score is 0. Leave the slopes out. Then a weight is half
    the decay, and a row of weights sums to a half of the sum over j of gamma^|i - j|. Give this sum for a cell at
    the end of the line and for the one in the middle. Values that are 1 everywhere come out of a width pass and a
    height pass multiplied by a row sum each time: give that factor for the corner of the window, for its middle, and
    the mean over all cells.

    Args:
        window: W, odd; the window is W x W.
        gamma: the decay rate, above 0 and at most 1.

    Returns:
        A dictionary of numbers: "row_end", "row_middle", "corner", "middle", "mean".
    """
    sums = [sum(gamma ** abs(i - j) for j in range(window)) / 2 for i in range(window)]
    end, middle, mean = sums[0], sums[window // 2], sum(sums) / window
    return {"row_end": end, "row_middle": middle, "corner": end**2, "middle": middle**2, "mean": mean**2}


def mixer_parameters(channels: int, heads: int) -> dict:
    """Predict the price of a value gate against that of an output gate.

    Count the parameters of one mixer with C channels and H heads. Every linear layer has a bias, except the gate G1;
    the convolution has one 5 x 5 filter and a bias a channel; LayerNorm has a weight and a bias a channel.

        "rmt"        queries, keys, values, W_O, convolution (chapter 5, no gate)
        "retention"  the same with the elementwise gate G1, bias-free, C outputs
        "headwise"   the same with the headwise gate G1, bias-free
        "swat"       queries, keys, the two matrices of SiLU(uW_1) * (uW_2), W_O, convolution, LayerNorm
        "self"       as swat, but with the value V * SiLU(V W)
        "mlp"        as swat, but with a third matrix after the product
        "plain"      as swat, but with the plain value uW_V

    Args:
        channels: C. heads: H.

    Returns:
        A dictionary with whole numbers under these seven names.
    """
    linear, lce, norm = channels**2 + channels, 26 * channels, 2 * channels
    rmt = 4 * linear + lce
    return {
        "rmt": rmt,
        "retention": rmt + channels**2,
        "headwise": rmt + channels * heads,
        "swat": 5 * linear + lce + norm,
        "self": 5 * linear + lce + norm,
        "mlp": 6 * linear + lce + norm,
        "plain": 4 * linear + lce + norm,
    }
