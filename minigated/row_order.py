"""Rows in another order, some of them several times, with a gradient that is read and not scattered (chapter 7).

The gradient of `x[source]` adds up whatever comes back to a row. PyTorch knows nothing of `source`, so it sorts once
more, or lets thousands of threads add to the same places of memory. Who sorted knows where each row went: the gradient
can be looked up there, as fast as the rows were, and in the same order every time.
"""

import torch
from torch import Tensor


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        return x[source]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, places = inputs
        ctx.save_for_backward(places)
        ctx.rows = len(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (places,) = ctx.saved_tensors
        returned = gradient[places]
        if len(places) > ctx.rows:
            returned = returned.unflatten(0, (ctx.rows, -1)).sum(1)
        return returned, None, None


def take_rows(x: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """`x[source]`, every row taken equally often.

    Args:
        x: [N, ...]. source: [A] which row stands at each place, A = N k.
        places: [A] where the rows went: row 0 to the first k of them, row 1 to the next k, and so on. Of another
            `source` the gradient would be wrong, without a word.

    Returns:
        [A, ...].
    """
    return _Taken.apply(x, source, places)
