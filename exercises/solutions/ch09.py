"""Solutions of chapter 9."""

import torch
from torch import Tensor


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
    numbers = batch * height * width * channels
    flops, moved = 8 * numbers * window, 4 * numbers * item
    return {
        "flops": flops,
        "bytes": moved,
        "intensity": flops / moved,
        "training_flops": 3 * flops,
        "training_bytes": moved + 7 * numbers * item,
    }


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
    intensity, rate = flops / moved, flops / seconds
    roof = min(matrix_rate, intensity * copy_rate)
    return {
        "intensity": intensity,
        "bend": matrix_rate / copy_rate,
        "rate": rate,
        "roof": roof,
        "share": rate / roof,
        "least": flops / roof,
    }


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
    packed = torch.cat([w_q, w_k, w_v])  # [3 C, C]
    return (u @ packed.T).unflatten(-1, (3, heads, -1)).unbind(-3)


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
    return torch.zeros(2, 3), 1.0, None, True


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
    n = len(x)
    if n > size:
        raise ValueError(f"{n} rows; accepted: up to {size}")
    rows = torch.cat([x, x.new_zeros(size - n, x.shape[1])])
    return rows, torch.cat([x.new_full((n,), 1 / n), x.new_zeros(size - n)])


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
    for seed, size in ((0, 1.0), (1, 1.0), (2, 900.0)):
        lot = torch.Generator().manual_seed(seed)
        given = [torch.randn(3, 5, 4, generator=lot, dtype=torch.float64) for _ in range(4)]
        given[0] *= size
        q, k, v = (x.clone().requires_grad_() for x in given[:3])
        right = torch.softmax(q @ k.mT / 2, -1) @ v
        wanted = torch.autograd.grad(right, (q, k, v), given[3])
        leaves = [x.clone().requires_grad_() for x in given[:3]]
        handed = [x * 1 for x in leaves]  # not leaves, so that an edit in place is possible and seen
        y = form(*handed)
        if not torch.allclose(y, right, 1e-9, 1e-9) or not y.requires_grad:
            return False
        if any(not torch.equal(x, before) for x, before in zip(handed, given)):
            return False
        made = torch.autograd.grad(y, leaves, given[3], allow_unused=True)
        if any(g is None or not torch.allclose(g, w, 1e-8, 1e-8) for g, w in zip(made, wanted)):
            return False
    return True
