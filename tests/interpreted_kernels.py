"""Run by test_kernels in a process of its own: the Triton kernels on the CPU through Triton's interpreter.

Prints one line a case: the largest difference from the plain form, of the result and of each gradient.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from minigated import kernels
from minigated.decay import rmt_log_decay
from minigated.errors import InputError
from minigated.fused_step import decode_fused
from minigated.kernels import attend_triton, decode_triton, depthwise_triton, local_triton, windowed_triton
from minigated.lm import build_lm
from minigated.retention import WindowTableBuilder, decomposed
from minigated.static_cache import decode, likeliest
from minigated.swat import SwatTableBuilder, swat_decomposed
from minigated.vit_sizes import build_vit

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


SHAPES, usable = decode_triton.SHAPES, kernels.usable


def say(name: str, case: tuple, expected, found) -> None:
    worst = torch.stack([(a.detach() - b).abs().max().double() for a, b in zip(expected, found, strict=True)]).max()
    print(f"{name} {case}: {worst:.2e}", flush=True)


def both(y, leaves, gradient) -> tuple:
    """A result and its gradients."""
    return y, *torch.autograd.grad(y, leaves, gradient)


def convolved(x, weight, bias):
    channels, side = weight.shape[0], weight.shape[-1]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=channels).permute(0, 2, 3, 1)


def windows(case: tuple) -> None:
    images, height, width, heads, head_width, window, shifted = case
    rates = rmt_log_decay(heads, 2.0, 4.0)
    size = (height, width)
    qkv = torch.randn(images, height, width, 3, heads, head_width, requires_grad=True)
    gradient = torch.randn(images, height, width, heads, head_width)
    for turned in (True, False):
        soft = WindowTableBuilder(head_width, rates, window, shifted, turned, size)(*size)
        sides, shift = [soft.rows.window, soft.columns.window], [soft.rows.shift, soft.columns.shift]
        masks = (soft.row_mask, soft.column_mask)
        made = decomposed(qkv, soft, "matmul")
        found = windowed_triton.windowed(qkv, None, soft.cos, soft.sin, *masks, *masks, sides, shift, True)
        say(f"softmax {turned}", case, *(both(y, [qkv], gradient) for y in (made, found)))

    filters, bias = torch.randn(heads * head_width, 1, 5, 5), torch.randn(heads * head_width)
    leaves = [qkv, filters.clone().requires_grad_(), bias.clone().requires_grad_()]
    made = decomposed(qkv, soft, "matmul") + convolved(qkv[..., 2, :, :].flatten(-2), *leaves[1:]).view_as(gradient)
    found = local_triton.windowed_local(*leaves, soft.cos, soft.sin, *masks, sides, shift)
    say("local", case, *(both(y, leaves, gradient) for y in (made, found)))

    swat = SwatTableBuilder(heads, head_width, rates, window, shifted, None, size)(*size)
    qk, v = qkv[..., :2, :, :], qkv[..., 2, :, :]
    made = swat_decomposed(qk, v, swat, form="matmul")
    tables = (swat.row_bias, swat.column_bias, swat.row_decay, swat.column_decay)
    found = windowed_triton.windowed(qk, v, swat.cos, swat.sin, *tables, sides, shift, False)
    say("sigmoid", case, *(both(y, [qkv], gradient) for y in (made, found)))


def convolution(case: tuple, programs: int) -> None:
    """Each with so many programs for the gradient of the filters, at most."""
    images, height, width, channels, side = case
    depthwise_triton.PROGRAMS = programs if side < 5 else 2 * programs  # which the gradient of 25 taps halves
    x = torch.randn(images, height, width, 3 * channels)[..., channels : 2 * channels].requires_grad_()  # a slice
    weight = torch.randn(channels, 1, side, side, requires_grad=True)
    bias = torch.randn(channels, requires_grad=True)
    plus = torch.randn(images, height, width, channels, requires_grad=True)
    made = convolved(x, weight, bias) + plus
    gradient = torch.randn(made.shape)
    leaves = [x, weight, bias, plus]
    found = depthwise_triton.depthwise(*leaves[:3], mirror=False, own=False, plus=plus)
    say("depthwise", (*case, programs), *(both(y, leaves, gradient) for y in (made, found)))
    try:
        depthwise_triton.depthwise(*leaves[:3], mirror=True, own=False, plus=None)
        raise AssertionError("the gradient of a gradient is another formula")
    except InputError:
        made = x + convolved(x, weight, bias)
        found = depthwise_triton.depthwise(*leaves[:3], mirror=False, own=True, plus=None)
    say("added", (*case, programs), *(both(y, leaves[:3], gradient) for y in (made, found)))


def registered() -> None:
    """What a compiler is told of each operation is what it does: shapes and strides, no writing, gradients."""
    x, mask = torch.randn(1, 4, 4, 16, requires_grad=True), torch.zeros(1, 4, 4)
    half = torch.randn(2, 4, 4, 32, dtype=torch.float16)[..., :16]  # a slice
    weight, bias = (torch.randn(size, requires_grad=True) for size in ((16, 1, 3, 3), (16,)))
    qkv, qk = (torch.randn(1, 4, 4, n, 1, 16, requires_grad=True) for n in (3, 2))
    of_pass = (None, None, mask, mask, mask, mask, [4, 4], [0, 0])
    for operation, inputs in (
        (depthwise_triton.depthwise, (x, weight, bias, False, False, x)),
        (depthwise_triton.depthwise_filters, (x.detach(), x.detach(), 3)),
        (depthwise_triton.depthwise, (x, weight, bias, False, True, None)),
        (depthwise_triton.depthwise, (half, weight.detach(), None, True, True, None)),
        (depthwise_triton.depthwise_filters, (half, half, 3)),
        (windowed_triton.windowed, (qkv, None, *of_pass, True)),
        (windowed_triton.windowed, (qk, x.unsqueeze(3), *of_pass, False)),
        (local_triton.windowed_local, (qkv, weight, bias, None, None, mask, mask, [4, 4], [0, 0])),
    ):
        torch.library.opcheck(operation, inputs)


def graph(name: str) -> None:
    """A block that is traced, forward and backward, with the kernels as closed operations in its graph."""
    model = build_vit(name, image_size=16, drop_path=0.0).train()
    stage, x = model.stages[0], torch.randn(1, 4, 4, model.config.widths[0], requires_grad=True)
    block, tables = stage.blocks[0], stage.tables[0](4, 4)
    leaves, gradient = [x, *block.parameters()], torch.randn(x.shape)
    plain = both(block(x, tables), leaves, gradient)
    traced = []

    def look(module, inputs):
        traced.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    kernels.usable = lambda x: True
    block.compile(backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True, dynamic=False)
    found = both(block(x, tables), leaves, gradient)
    kernels.usable = usable
    ours = [name.split(".")[1] for name in traced if name.startswith("minigated.")]
    counted = tuple(sum(name.startswith(kind) for name in ours) for kind in ("windowed", "depthwise"))
    # three convolutions, and of each the gradients of map and filters; `windowed_local` holds one of the nine
    assert counted == (2, 8 if "windowed_local" in ours else 9), traced
    say("block", (name,), plain, found)


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
    convolution((3, 7, 9, 70, 5), 3)  # several programs, each with several rounds, the last ones in part beyond the map
    registered()
    for name in ("gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano"):
        graph(name)
    kernels.usable = lambda x: True  # the fused step asks
    for options in DECODERS:
        for dtype, parts in ((torch.float32, 64), (torch.float32, 2), (torch.float16, 64)):
            decoding(options, dtype, parts)
    for words in (5, 1024, 2500):
        for peaks in ((), (9.0, 9.0, 9.0), (float("nan"),), (float("inf"), 9.0), (-float("inf"), 9.0)):
            choosing(words, *peaks)
