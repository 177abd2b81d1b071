"""GELU, and then x plus its depth-wise convolution, as one operation: the middle of a feed-forward.

Its gradient for the map before the GELU comes out of one kernel: the convolution's gradient is multiplied by the GELU's
slope where it is made. Apart, it would be written and read again, and what the GELU gave would be made once more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from minigated.kernels.depthwise_triton import depthwise, filter_gradients


@custom_op("minigated::gelu_added", mutates_args=())
def gelu_added(x: Tensor, filters: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """y + convolution(y) with y = GELU(x), and y, which the gradient of the filters reads; y itself has none.

    Args:
        x: [B, h, w, C]. filters: [C, 1, k, k]. bias: [C].
    """
    y = F.gelu(x).contiguous()
    return depthwise(y, filters, bias, mirror=False, own=True, plus=None), y


@gelu_added.register_fake
def _(x, filters, bias):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def _keep(ctx, inputs, output) -> None:
    x, filters, bias = inputs
    ctx.save_for_backward(x, filters, output[1])
    ctx.of_bias = bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient, _):
    x, filters, y = ctx.saved_tensors
    gradient, of_map, taps, offset = gradient.contiguous(), None, None, None
    if ctx.needs_input_grad[0]:
        of_map = depthwise(gradient, filters, bias=None, mirror=True, own=True, plus=None, before=x)
    if any(ctx.needs_input_grad[1:]):
        taps, offset = filter_gradients(y, gradient, filters, ctx.of_bias)
    return of_map, taps, offset


gelu_added.register_autograd(_gradients, setup_context=_keep)
