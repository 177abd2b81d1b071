"""Run by test_kernels in a process of its own: the Triton kernels on the CPU through Triton's interpreter.

Prints one line a case: the largest difference from the plain form, of the result and of each gradient.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F


class Plain:
    """Stands for a compiled operation: interpreted kernels are plain Python."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def register_autograd(self, backward, setup_context):
        self.backward = backward


torch.library.triton_op = lambda name, mutates_args: Plain
torch.library.wrap_triton = lambda kernel: kernel

from minigated.decay import rmt_log_decay  # noqa: E402
from minigated.decay_passes import decomposed_fast  # noqa: E402
from minigated.kernels import depthwise_triton, windowed_triton  # noqa: E402
from minigated.retention import WindowTableBuilder  # noqa: E402
from minigated.swat import SwatTableBuilder, swat_pass  # noqa: E402

MAPS = [  # images, height, width, heads, head width, window, shifted
    (2, 4, 4, 2, 32, 4, False),
    (1, 8, 8, 2, 16, 4, True),
    (3, 2, 2, 2, 32, 2, False),
    (2, 1, 1, 4, 32, 4, False),
    (1, 6, 9, 2, 24, 3, True),
    (1, 7, 7, 2, 32, 7, False),
    (1, 5, 6, 2, 16, 4, True),
]
CONVOLUTIONS = [(2, 5, 6, 70, 5), (3, 1, 1, 16, 3), (2, 2, 2, 64, 5), (1, 8, 8, 96, 3)]  # images, h, w, channels, side


def say(name: str, case: tuple, expected, found) -> None:
    worst = max(float((a.detach() - b).abs().max()) for a, b in zip(expected, found, strict=True))
    print(f"{name} {case}: {worst:.2e}", flush=True)


def windows(case: tuple) -> None:
    images, height, width, heads, head_width, window, shifted = case
    rates = rmt_log_decay(heads, 2.0, 4.0)
    soft = WindowTableBuilder(head_width, rates, window, shifted, True, (height, width))(height, width)
    swat = SwatTableBuilder(heads, head_width, rates, window, shifted, None, (height, width))(height, width)
    rows, columns = soft.rows, soft.columns
    sides = [rows.window, columns.window]
    qkv = torch.randn(images, rows.padded, columns.padded, 3, heads, head_width)
    q, k, v = (x.requires_grad_() for x in qkv.unbind(3))
    gradient = torch.randn(v.shape)

    def of_both(name, plain, *tables):
        made = plain()
        inputs = (q.detach(), k.detach(), v.detach(), *tables)
        kind = name == "softmax"
        gradients = windowed_triton.windowed_gradients(*inputs, gradient, sides, kind)
        found = (windowed_triton.windowed(*inputs, sides, kind), *gradients)
        say(name, case, (made, *torch.autograd.grad(made, (q, k, v), gradient)), found)

    def by_swat():
        z = swat_pass(q, k, v, swat.column_bias, swat.column_decay, 2, columns.window, "matmul")
        return swat_pass(q, k, z, swat.row_bias, swat.row_decay, 1, rows.window, "matmul")

    masks = soft.row_mask, soft.column_mask
    of_both("softmax", lambda: decomposed_fast(q, k, v, *masks, *sides, "matmul"), *masks, *masks)
    of_both("sigmoid", by_swat, swat.row_bias, swat.column_bias, swat.row_decay, swat.column_decay)


def convolution(case: tuple) -> None:
    images, height, width, channels, side = case
    x = torch.randn(images, height, width, 3 * channels)[..., channels : 2 * channels].requires_grad_()  # a slice
    weight = torch.randn(channels, 1, side, side, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)
    made = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=channels).permute(0, 2, 3, 1)
    gradient = torch.randn(made.shape)
    plain = [t.detach() for t in (x, weight, bias)]
    sums = depthwise_triton.depthwise_filters(plain[0], gradient, side)
    found = (
        depthwise_triton.depthwise(*plain, False),
        depthwise_triton.depthwise(gradient, plain[1], plain[1], True),
        sums[:-1].T.reshape(weight.shape),
        sums[-1],
    )
    say("depthwise", case, (made, *torch.autograd.grad(made, (x, weight, bias), gradient)), found)


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in MAPS:
        windows(case)
    for case in CONVOLUTIONS:
        convolution(case)
