"""Solutions of chapter 5. The docstrings are the statements; the stubs are made from this file."""

import torch
from torch import Tensor


def gated_output(x: Tensor, attended: Tensor, local: Tensor, w_g: Tensor, w_o: Tensor) -> Tensor:
    """Put the gate where eq. (5.1) puts it.

    The block input x decides about what the block has gathered: its scores are sigmoid(x W_g^T). They multiply
    retention *plus* local context, channel by channel, and the output projection comes last. No biases.

    Args:
        x: the normalised block input, [B, h, w, C].
        attended: what the two passes gathered, Z, [B, h, w, C].
        local: LCE(V), [B, h, w, C].
        w_g, w_o: weights [C, C], one row an output channel, as in torch.nn.Linear.

    Returns:
        [B, h, w, C].
    """
    score = torch.sigmoid(x @ w_g.T)
    return (score * (attended + local)) @ w_o.T


def local_context(v: Tensor, weight: Tensor) -> Tensor:
    """Mix every cell with its neighbours, each channel by a filter of its own, on a channel-last map.

    Cell (y, x) of the result is the sum over the filter's places (i, j) of weight[c, i, j] times the cell at
    (y + i - k // 2, x + j - k // 2), where beyond the border of the map everything is 0. (That is what deep-learning
    libraries call a convolution: the filter is not turned round.)

    Args:
        v: values, [B, h, w, C]; h and w need not be equal.
        weight: [C, k, k] with an odd k.

    Returns:
        [B, h, w, C].
    """
    side, (height, width) = weight.shape[-1], v.shape[1:3]
    edge = side // 2
    padded = torch.nn.functional.pad(v, (0, 0, edge, edge, edge, edge))  # [B, h + k - 1, w + k - 1, C]
    out = torch.zeros_like(v)
    for i in range(side):
        for j in range(side):
            out = out + padded[:, i : i + height, j : j + width] * weight[:, i, j]
    return out


def two_passes(q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor) -> Tensor:
    """Gather along the width, then along the height, with decay inside the softmax.

    Each pass is softmax(q k^T / sqrt(D) + |i - j| log gamma) times the values, along one axis of the map. Both use the
    same q and k; the second takes what the first gave.

    Args:
        q, k, v: [B, h, w, H, D].
        log_gamma: [H], one rate a head.

    Returns:
        [B, h, w, H, D].
    """

    def along(q, k, v):  # the axis is second to last: [B, ..., H, n, D]
        place = torch.arange(q.shape[-2])
        mask = (place[:, None] - place).abs() * log_gamma[:, None, None].to(q.dtype)  # [H, n, n]
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + mask, -1) @ v

    rows = [x.transpose(2, 3) for x in (q, k, v)]  # [B, h, H, w, D]
    wide = along(*rows).transpose(2, 3)
    columns = [x.permute(0, 2, 3, 1, 4) for x in (q, k, wide)]  # [B, w, H, h, D]
    return along(*columns).permute(0, 3, 1, 2, 4)


def drop_path(branch: Tensor, rate: float, training: bool, kept: Tensor) -> Tensor:
    """Leave out whole images of a branch, so that a deep model trains as many shallow ones (stochastic depth).

    In training an image whose entry in `kept` is 0 gets nothing from the branch, and the others are made larger so
    that the mean over many draws is unchanged: a branch is kept with probability 1 - rate. Outside training the
    branch passes as it is.

    Args:
        branch: [B, ...], any number of further axes.
        rate: probability of leaving an image out, 0 up to, not including, 1.
        training: whether the model trains.
        kept: [B], 1 for images that keep the branch, 0 for the others; drawn for you.

    Returns:
        Like `branch`.
    """
    if not training or rate == 0:
        return branch
    return branch * kept.view(-1, *(1,) * (branch.ndim - 1)).to(branch.dtype) / (1 - rate)


def plan_of_stages(pixels: int, stem_stride: int, window: int) -> list:
    """Predict the maps, windows and shifts of the four stages.

    The stem makes a cell of every stem_stride x stem_stride pixels, each later stage halves the side, and both round
    up where it does not come out even. Windows follow the adaptive rule of chapter 4; the shift asked for is that of
    an odd block.

    Args:
        pixels: side of a square image. stem_stride: pixels a cell is wide. window: wanted side of a window.

    Returns:
        A list of four (side, window, shift).
    """
    plan, side = [], -(-pixels // stem_stride)
    for _ in range(4):
        used = min(window, side)
        plan.append((side, used, used // 2 if side > used else 0))
        side = -(-side // 2)
    return plan


def parameters_of_a_mixer(channels: int, heads: int) -> dict:
    """Predict how many numbers a Gated-SwinRMT-Retention mixer learns.

    Projections have biases, the gate has none. LCE is a 5 x 5 depth-wise convolution with a bias. Decay masks and
    rotations are buffers.

        "qkv"               the projections of queries, keys and values together
        "lce"               local context enhancement
        "gate_elementwise"  the gate with a score for each channel
        "gate_headwise"     the gate with a score for each head
        "out"               the projection W_O
        "total"             of the mixer with the elementwise gate

    Args:
        channels: C. heads: H.

    Returns:
        A dictionary of whole numbers under these six names.
    """
    counts = {
        "qkv": 3 * channels * (channels + 1),
        "lce": channels * (5 * 5 + 1),
        "gate_elementwise": channels * channels,
        "gate_headwise": channels * heads,
        "out": channels * (channels + 1),
    }
    return counts | {"total": sum(counts.values()) - counts["gate_headwise"]}


def map_that_shows_the_walls() -> tuple:
    """Find a map on which "LCE inside windows" is caught.

    A common mistake computes the 3 x 3 depth-wise convolution after the map was cut into windows of 4, so that beyond
    a window's border lies 0 and not the neighbour. Give a map of one image, and a cell, where the mistaken result
    differs from the right one *and* the map is 0 in all cells of that cell's own window. The filter is all ones.

    Returns:
        (map, row, column): a float64 tensor [8, 8], and the cell to look at, as whole numbers.
    """
    image = torch.zeros(8, 8, dtype=torch.float64)
    image[2, 4] = 1.0  # just behind the wall
    return image, 2, 3


def gate_does_its_work(mixer) -> bool:
    """Write the property that a gate must have.

    `mixer(z, logits)` takes what was gathered, z [B, h, w, C], and the gate's logits, [B, h, w, C], and returns the
    gated map before W_O. A gate that is shut hands on nothing. A gate that is wide open changes nothing. A gate acts
    on its own cell and channel only, and it never enlarges what it lets through.

    You are graded by the broken gates you turn down and by the right ones you accept.

    Args:
        mixer: a function of two float64 tensors of one shape; sizes are yours.

    Returns:
        True if all of it holds, otherwise False.
    """
    z, logits = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    wide = torch.full_like(z, 60.0)
    if mixer(z, -wide).abs().max() > 1e-9 or not torch.allclose(mixer(z, wide), z):
        return False
    other = logits.clone()
    other[1, 0, 1, 2] += 1.0  # not a corner: those stay in place when rows and columns are swapped
    moved = (mixer(z, other) - mixer(z, logits)).abs() > 1e-12
    here = torch.zeros_like(moved)
    here[1, 0, 1, 2] = True
    smaller = (mixer(z, logits).abs() <= z.abs() + 1e-12).all() and (mixer(z, logits) * z >= 0).all()
    return bool(torch.equal(moved, here) and smaller)
