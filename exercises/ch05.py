"""Exercises of chapter 5. Replace a `raise` by your answer, then `pytest exercises -k 5_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 5.1 The gate's place: fill, difficulty 1 of 5, about 10 minutes
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
    raise NotImplementedError("5.1")


# 5.2 Local context enhancement: fill, difficulty 2 of 5, about 15 minutes
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
    raise NotImplementedError("5.2")


# 5.3 Two passes: fill, difficulty 3 of 5, about 25 minutes
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
    raise NotImplementedError("5.3")


# 5.4 Leave a branch out: fill, difficulty 1 of 5, about 10 minutes
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
    raise NotImplementedError("5.4")


# 5.5 Four stages: predict, difficulty 1 of 5, about 10 minutes
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
    raise NotImplementedError("5.5")


# 5.6 What a mixer learns: predict, difficulty 2 of 5, about 10 minutes
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
    raise NotImplementedError("5.6")


# 5.7 Walls inside the local context: break, difficulty 2 of 5, about 15 minutes
def map_that_shows_the_walls() -> tuple:
    """Find a map on which "LCE inside windows" is caught.

    A common mistake computes the 3 x 3 depth-wise convolution after the map was cut into windows of 4, so that beyond
    a window's border lies 0 and not the neighbour. Give a map of one image, and a cell, where the mistaken result
    differs from the right one *and* the map is 0 in all cells of that cell's own window. The filter is all ones.

    Returns:
        (map, row, column): a float64 tensor [8, 8], and the cell to look at, as whole numbers.
    """
    raise NotImplementedError("5.7")


# 5.8 Prove that a gate gates: prove, difficulty 3 of 5, about 25 minutes
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
    raise NotImplementedError("5.8")
