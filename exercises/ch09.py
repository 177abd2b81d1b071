"""Exercises of chapter 9. Replace a `raise` by your answer, then `pytest exercises -k 9_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 9.1 Count operations and bytes: predict, difficulty 2 of 5, about 15 minutes
def two_passes_cost(batch: int, height: int, width: int, channels: int, window: int, item: int) -> dict:
    """Predict what the two passes cost, by eqs. (9.1) and (9.2).

    A pass takes two matrix products: scores, and shares times values. A multiply and an add count as two operations;
    the softmax is not counted. Bytes are those that have to move: inputs read once, results written once, nothing for
    what lies in between. In training all operations count three times; q, k, v and the gradient of the result are
    read once *more* for the backward pass, and it writes three gradients.

        "flops"           operations of the forward pass
        "bytes"           bytes of the forward pass
        "intensity"       operations a byte of the forward pass
        "training_flops"  operations of forward and backward together
        "training_bytes"  bytes of forward and backward together

    Args:
        batch, height, width, channels: B, h, w, C of the map.
        window: W, a divisor of height and width.
        item: bytes of a number.

    Returns:
        A dictionary of numbers under these five names.
    """
    raise NotImplementedError("9.1")


# 9.2 Place a point on the roofline: predict, difficulty 1 of 5, about 10 minutes
def place_on_the_roofline(flops: int, moved: int, seconds: float, matrix_rate: float, copy_rate: float) -> dict:
    """Place a measured piece of work under the roof of eq. (9.3).

        "intensity"  operations a byte
        "bend"       the intensity at which the roof bends
        "rate"       operations a second that were reached
        "roof"       operations a second that the machine allows at this intensity
        "share"      rate as a share of the roof
        "least"      seconds that the work would take on the roof

    Args:
        flops: operations. moved: bytes that have to move. seconds: that it took.
        matrix_rate: operations a second of large matrix products. copy_rate: bytes a second of a copy.

    Returns:
        A dictionary of numbers under these six names.
    """
    raise NotImplementedError("9.2")


# 9.3 Fuse a projection: fill, difficulty 2 of 5, about 15 minutes
def fused_projection(u: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, heads: int) -> tuple:
    """Make queries, keys and values of a map by a single matrix product.

    Three products read the map three times. Stack the weights, multiply once, and take the result apart. The check
    counts the products.

    Args:
        u: the map, [B, h, w, C].
        w_q, w_k, w_v: weights [C, C], one row an output channel, as in torch.nn.Linear. No biases.
        heads: H, a divisor of C. The channels of a head lie side by side.

    Returns:
        (q, k, v), each [B, h, w, H, C / H].
    """
    raise NotImplementedError("9.3")


# 9.4 Find the graph break: break, difficulty 2 of 5, about 10 minutes
def arguments_that_break_the_graph() -> tuple:
    """Find arguments for which the compiler has to end its graph, although the doubtful branch is not even taken.

    torch.compile traces this function:

        def softened(x, temperature, clip, safe):
            if x.ndim == 3:
                x = x.flatten(1)
            if temperature != 1.0:
                x = x / temperature
            if clip and x.shape[-1] > 4:
                x = x.clamp(-clip, clip)
            if safe and x.abs().max() > 10:
                x = x - x.amax(-1, keepdim=True)
            return torch.softmax(x, -1)

    One of its conditions asks for a value that only the device knows. Give arguments that reach this condition, and for
    which it is false: the price of asking is paid all the same.

    Returns:
        (x, temperature, clip, safe): a float tensor with 2 or 3 axes; a number above 0; a number or None; a bool.
    """
    raise NotImplementedError("9.4")


# 9.5 Avoid the recompilation: fill, difficulty 2 of 5, about 15 minutes
def fixed_batch(x: Tensor, size: int) -> tuple:
    """Give the last, smaller batch of an epoch the shape of all others, so that no new graph is compiled for it.

    The rows come first, and zeros fill up the rest. So that a loss stays the mean over the real rows, return weights
    as well: sum(loss_of_each_row * weight) is to be that mean.

    Args:
        x: [n, C] with n from 1 to size. size: rows of a full batch.

    Returns:
        (rows, weight): [size, C] and [size], in the dtype of x.

    Raises:
        ValueError: more rows than `size`.
    """
    raise NotImplementedError("9.5")


# 9.6 Prove that fast is the same: prove, difficulty 3 of 5, about 25 minutes
def is_the_same_attention(form) -> bool:
    """Write the test that a fast form must pass before anybody times it.

    `form(q, k, v)` claims to be softmax(q k^T / sqrt(D)) v for float64 tensors [B, n, D]. Claims like this fail
    where nobody looks: for the second image, for another input after the first, for scores of a thousand, in the
    gradient, in the caller's own tensors, in the last digits.

    You are graded by the broken forms you turn down and by the right ones you accept. These agree with the formula
    as `torch.allclose(y, right, 1e-9, 1e-9)` asks.

    Args:
        form: a function of three float64 tensors of one shape; sizes are yours.

    Returns:
        True if all of it holds, otherwise False.
    """
    raise NotImplementedError("9.6")
