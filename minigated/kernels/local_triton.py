"""Softmax passes within windows plus LCE, a depth-wise convolution of their values, as one operation.

The values have two gradients, one from the passes and one from the convolution. As one operation the second kernel adds
its own to the first's on the way, and their sum is no journey through memory of its own.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from minigated.kernels.depthwise_triton import depthwise, filter_gradients
from minigated.kernels.windowed_triton import windowed, windowed_gradients


@custom_op("minigated::windowed_local", mutates_args=())
def windowed_local(
    qkv: Tensor, filters: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, row_add: Tensor,
    column_add: Tensor, window: list[int], shift: list[int],
) -> Tensor:  # fmt: skip
    """Softmax passes plus a depth-wise convolution of the values, whose two gradients meet in one place.

    Args:
        qkv: [B, h, w, 3, H, D]. filters: [H D, 1, k, k]. bias: [H D]. All else as in `windowed`.
    """
    masks = (row_add, column_add)
    y = windowed(qkv, None, cos, sin, *masks, *masks, window, shift, True)
    v = qkv.select(3, 2).flatten(-2)
    return depthwise(v, filters, bias, mirror=False, own=False, plus=y.flatten(-2)).view_as(y)


@windowed_local.register_fake
def _(qkv, filters, bias, cos, sin, row_add, column_add, window, shift):
    return torch.empty(qkv.shape[:3] + qkv.shape[4:], dtype=qkv.dtype, device=qkv.device)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _gradients(ctx, gradient):
    qkv, filters, bias, cos, sin, *masks = ctx.saved_tensors
    flat = gradient.flatten(-2).contiguous()
    packed = taps = offset = None
    if any(ctx.needs_input_grad[1:3]):
        taps, offset = filter_gradients(qkv.select(3, 2).flatten(-2), flat, filters, bias.dtype)
    if ctx.needs_input_grad[0]:
        more = depthwise(flat, filters, bias=None, mirror=True, own=False, plus=None).view_as(gradient)
        packed, _ = windowed_gradients(qkv, None, cos, sin, *masks, *masks, gradient, more, *ctx.rest, True)
    return packed, taps, offset, *(None,) * 6


windowed_local.register_autograd(_gradients, setup_context=_keep)
