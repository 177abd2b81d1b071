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
        self.backward, self.setup = backward, setup_context


torch.library.triton_op = lambda name, mutates_args: Plain
torch.library.wrap_triton = lambda kernel: kernel

from minigated.decay import rmt_log_decay  # noqa: E402
from minigated.errors import InputError  # noqa: E402
from minigated.fused_step import decode_fused  # noqa: E402
from minigated.kernels import attend_triton, decode_triton, depthwise_triton, windowed_triton  # noqa: E402
from minigated.lm import build_lm  # noqa: E402
from minigated.retention import WindowTableBuilder, decomposed  # noqa: E402
from minigated.static_cache import decode, likeliest  # noqa: E402
from minigated.swat import SwatTableBuilder, swat_decomposed  # noqa: E402

MAPS = [  # images, height, width, heads, head width, window, shifted
    (2, 4, 4, 2, 32, 4, False),
    (1, 8, 8, 2, 16, 4, True),
    (3, 2, 2, 2, 32, 2, False),
    (2, 1, 1, 4, 32, 4, False),
    (1, 6, 9, 2, 24, 3, True),
    (1, 7, 7, 2, 32, 7, False),
    (1, 12, 8, 2, 16, 4, True),
]
CONVOLUTIONS = [  # images, height, width, channels, side
    (2, 5, 6, 70, 5),
    (3, 1, 1, 16, 3),
    (2, 2, 2, 64, 5),
    (1, 8, 8, 96, 3),
    (1, 7, 11, 20, 3),
]
DECODERS = [  # options of a language model
    {"variant": "none", "qk_norm": False},
    {"variant": "none", "heads": 3, "kv_heads": 1, "head_width": 20},
    {"variant": "g1_elementwise", "rope_scaling": "yarn", "rope_factor": 2.0, "trained_context": 100},
    {"variant": "g1_headwise", "heads": 1, "kv_heads": 1, "layers": 1, "tied": True},
]


SHAPES = decode_triton.SHAPES
launch = windowed_triton._launch


def launched(*arguments):
    """A compiler takes a Python float for float64, so a kernel that it may meet gets whole numbers and constants."""
    made = launch(*arguments)
    assert all(type(number) is int for number in made[1]), made[1]
    return made


windowed_triton._launch = launched


def say(name: str, case: tuple, expected, found) -> None:
    worst = torch.stack([(a.detach() - b).abs().max().double() for a, b in zip(expected, found, strict=True)]).max()
    print(f"{name} {case}: {worst:.2e}", flush=True)


def convolved(x, weight, bias):
    channels, side = weight.shape[0], weight.shape[-1]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=channels).permute(0, 2, 3, 1)


def windows(case: tuple) -> None:
    images, height, width, heads, head_width, window, shifted = case
    rates = rmt_log_decay(heads, 2.0, 4.0)
    size = (height, width)
    qkv = torch.randn(images, height, width, 3, heads, head_width, requires_grad=True)
    gradient, packed = torch.randn(images, height, width, heads, head_width), qkv.detach()
    for turned in (True, False):
        soft = WindowTableBuilder(head_width, rates, window, shifted, turned, size)(*size)
        sides, shift = [soft.rows.window, soft.columns.window], [soft.rows.shift, soft.columns.shift]
        rest, masks = (sides, shift, True), (soft.row_mask, soft.column_mask)
        made = decomposed(qkv, soft, "matmul")
        inputs = (packed, None, soft.cos, soft.sin, *masks, *masks)
        found = windowed_triton.windowed(*inputs, *rest)
        slope, _ = windowed_triton.windowed_gradients(*inputs, gradient, None, *rest)
        say(f"softmax {turned}", case, (made, *torch.autograd.grad(made, qkv, gradient)), (found, slope))

    filters, bias = torch.randn(heads * head_width, 1, 5, 5), torch.randn(heads * head_width)
    leaves = [qkv, filters.clone().requires_grad_(), bias.clone().requires_grad_()]
    made = decomposed(qkv, soft, "matmul") + convolved(qkv[..., 2, :, :].flatten(-2), *leaves[1:]).view_as(gradient)
    inputs = (packed, filters, bias, soft.cos, soft.sin, *masks, sides, shift)
    slopes = backward(windowed_triton.windowed_local, inputs, gradient)[:3]
    found = (windowed_triton.windowed_local(*inputs), *slopes)
    say("local", case, (made, *torch.autograd.grad(made, leaves, gradient)), found)

    swat = SwatTableBuilder(heads, head_width, rates, window, shifted, None, size)(*size)
    qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
    made = swat_decomposed(qk, v, swat, form="matmul")
    tables = (swat.row_bias, swat.column_bias, swat.row_decay, swat.column_decay)
    inputs = (qk.detach(), v.detach(), swat.cos, swat.sin, *tables, sides, shift, False)
    slopes = backward(windowed_triton.windowed, inputs, gradient)[:2]
    found = (windowed_triton.windowed(*inputs), torch.cat([slopes[0], slopes[1].unsqueeze(3)], 3))
    say("sigmoid", case, (made, *torch.autograd.grad(made, qkv, gradient)), found)


class Context:
    """What autograd hands from forward to backward."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def backward(op: Plain, inputs: tuple, gradient):
    """The gradients as autograd would get them."""
    context = Context()
    op.setup(context, inputs, None)
    return op.backward(context, gradient)


def convolution(case: tuple, programs: int) -> None:
    """Each with many programs for the gradient of the filters, and with one that goes through all cells."""
    images, height, width, channels, side = case
    depthwise_triton.PROGRAMS = programs
    x = torch.randn(images, height, width, 3 * channels)[..., channels : 2 * channels].requires_grad_()  # a slice
    weight = torch.randn(channels, 1, side, side, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)
    plus = torch.randn(images, height, width, channels, requires_grad=True)
    made = convolved(x, weight, bias) + plus
    gradient = torch.randn(made.shape)
    leaves = (x, weight, bias, plus)
    plain = [t.detach() for t in leaves]
    inputs = (*plain[:3], False, plain[3])
    slopes = backward(depthwise_triton.depthwise, inputs, gradient)
    found = (depthwise_triton.depthwise(*inputs), *slopes[:3], slopes[4])
    say("depthwise", (*case, programs), (made, *torch.autograd.grad(made, leaves, gradient)), found)
    try:
        backward(depthwise_triton.depthwise, (*plain[:3], True, None), gradient)
        raise AssertionError("the gradient of a gradient is another formula")
    except InputError:
        made = x + convolved(x, weight, bias)
    found = (
        depthwise_triton.depthwise_added(*plain[:3]),
        *backward(depthwise_triton.depthwise_added, plain[:3], gradient),
    )
    say("added", (*case, programs), (made, *torch.autograd.grad(made, leaves[:3], gradient)), found)


@torch.no_grad()
def decoding(options: dict, dtype: torch.dtype, parts: int) -> None:
    """Tokens at the seams of a cache's parts: logits of every step, then what the cache holds.

    Triton's interpreter cuts bfloat16 off where a GPU rounds, so the rounded dtype here is float16.
    """
    attend_triton.MOST_PARTS = parts
    if parts == 2:  # then each program also goes through several blocks of rows
        decode_triton.SHAPES = {kernel: dict.fromkeys((False, True), (512, 4, 2)) for kernel in SHAPES}
    else:
        decode_triton.SHAPES = SHAPES
    sizes = {"layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "head_width": 12, "ffn_width": 80, "context": 200}
    model = build_lm("lm_nano", vocabulary=61, **{**sizes, **options}).eval()
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.15 if weight.ndim > 1 else 1 + 0.2 * torch.randn_like(weight))
    model.to(dtype)
    plain, fused = ([(c.k, c.v) for c in model.new_cache(1, 180)] for _ in range(2))
    last = 131
    for here, there in zip((t for pair in plain for t in pair), (t for pair in fused for t in pair)):
        here[:, :, :last].normal_()
        there.copy_(here)[:, :, last:] = float("nan")  # what an earlier text may have left
    places = [0, 1, *range(62, 67), *range(126, last)]
    tokens = torch.randint(-1, 61, (len(places), 1))  # -1 is a token that was not there to choose
    steps = ((decode, plain), (decode_fused, fused))
    logits = [
        torch.stack([step(model, token, torch.tensor([i]), held) for i, token in zip(places, tokens)]).float()
        for step, held in steps
    ]
    caches = [torch.stack([tensor[:, :, :last] for pair in held for tensor in pair]).float() for _, held in steps]
    name = (*options.values(), parts)
    say(f"decoding {dtype}", name, (logits[0], caches[0]), (logits[1], caches[1]))


def choosing(words: int, *peaks: float) -> None:
    """The likeliest token, the next place, and a counter that is zero again; large logits at random words."""
    logits = torch.randn(1, words)
    logits[0, torch.randperm(words)[: len(peaks)]] = torch.tensor(peaks)
    tokens, position, arrived = torch.tensor([7]), torch.tensor([40]), torch.zeros(3, dtype=torch.int32)
    expected = torch.tensor([likeliest(logits).item(), 41, 0])
    decode_triton.choose(logits, tokens, position, arrived)
    say("choosing", (words, *peaks), expected, torch.cat([tokens, position, arrived.sum()[None]]))


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in MAPS:
        windows(case)
    for case in CONVOLUTIONS:
        convolution(case, 1024)
        convolution(case, 1)
    for options in DECODERS:
        for dtype, parts in ((torch.float32, 64), (torch.float32, 2), (torch.float16, 64)):
            decoding(options, dtype, parts)
    for words in (5, 1024, 2500):
        for peaks in ((), (9.0, 9.0, 9.0), (float("nan"),), (float("inf"), 9.0), (-float("inf"), 9.0)):
            choosing(words, *peaks)
