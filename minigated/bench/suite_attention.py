"""The attention core of chapter 1 and the gate of chapter 2: matrices against fused kernels, with and without gate.

Two kinds of cases: the core, q, k, v to the heads' outputs, and the whole layer, x to x, beside torch's own
`nn.MultiheadAttention` and a plain layer around SDPA with one projection for q, k and v. All hold the same weights.
"Recorded" is a call as one CUDA graph, without the host's time, which such short calls feel.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import Attention, AttentionShape, attention_matrix, attention_sdpa, causal_mask
from minigated.bench.formulas import attention_module, causal_attention
from minigated.bench.rows import Case, Prepared, Row
from minigated.bench.runner import run_suite
from minigated.cuda_graph import Later
from minigated.variants import get_variant

CLAIM = "fused attention does not write its scores, and a gate on its output adds less than half to it"
FILES = ["attention.py", "gates.py", "cuda_graph.py", "bench/suite_attention.py"]
SIZES = {"cpu": (1, 256, 4, 32), "gpu": (8, 2048, 16, 64)}  # sequences, tokens, heads, head width
GATES = {"none": "none", "headwise": "g1_headwise", "elementwise": "g1_elementwise"}
WAYS = ("eager", "compiled", "compiled and recorded")


# ---------------------------------------------------------------------------------------------- the core
def matrix_core(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
    """All scores in memory. [B, H, T, D]; scores of the gate [B, H, T, 1 | D] or None."""
    y = attention_matrix(q, k, v, causal_mask(q.shape[-2], k.shape[-2], q.device))
    return y if scores is None else y * torch.sigmoid(scores)


def sdpa_core(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None) -> Tensor:
    """The fused kernel, then the gate."""
    y = attention_sdpa(q, k, v)
    return y if scores is None else y * torch.sigmoid(scores)


def core_inputs(sizes, gate: str, device, dtype) -> list[Tensor]:
    """q, k, v and, with a gate, its logits; leaves that require gradients."""
    batch, tokens, heads, width = sizes
    generator = torch.Generator().manual_seed(0)
    last = {"none": [], "headwise": [1], "elementwise": [width]}[gate]
    shapes = [(batch, heads, tokens, d) for d in [width, width, width, *last]]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def prepare_core(core, way: str, sizes, gate, device, dtype) -> Prepared:
    """A core, forward and backward; checked on the first sequence in float32. `way` is one of `WAYS`."""
    inputs = core_inputs(sizes, gate, device, dtype)
    compiled, graph = "compiled" in way, "recorded" in way
    run = torch.compile(core, dynamic=False) if compiled else core
    grown = torch.ones_like(inputs[0])

    def outputs(function=run, tensors=inputs, grown=grown):
        y = function(*tensors, *[None] * (4 - len(tensors)))
        return [y, *torch.autograd.grad(y, tensors, grown)]

    step = Later(outputs, device) if graph else outputs

    def check():
        wide = [x[:1].detach().float().requires_grad_() for x in inputs]
        return [x[:1] for x in step()], outputs(matrix_core, wide, grown[:1].float())

    return Prepared(step, check, {"gate": gate, "compiled": compiled, "recorded": graph}, counted=not graph)


def core_case(gate: str, sizes, device, dtype, compiles: bool) -> Case:
    """Matrix form and SDPA, eager and compiled, and SDPA recorded."""
    batch, tokens, heads, width = sizes
    cost = causal_attention(batch, tokens, heads, width, item=dtype.itemsize, training=True)
    plan = [("matrices", matrix_core, WAYS[:2]), ("SDPA", sdpa_core, WAYS)]
    rows = [
        Row(
            f"{name}, {way}",
            partial(prepare_core, core, way, sizes, gate, device, dtype),
            flops=cost.flops, bytes=cost.bytes, items=batch * tokens,
        )
        for name, core, ways in plan for way in (ways if compiles else WAYS[:1])
    ]  # fmt: skip
    return Case(f"core, gate {gate}, training", rows, "tokens", dtype)


# ---------------------------------------------------------------------------------------------- the layer
class PlainLayer(nn.Module):
    """The layer most people write: one projection for q, k and v, SDPA, output projection. No gate, no positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TorchLayer(nn.Module):
    """`nn.MultiheadAttention` as its documentation asks for causal attention: a mask, the hint, no weights back."""

    def __init__(self, width: int, heads: int, tokens: int):
        super().__init__()
        self.layer = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
        self.register_buffer("mask", ~causal_mask(tokens, tokens), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.layer(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]


def our_layer(gate: str, width: int, heads: int) -> Attention:
    """Chapter 2's module without positions or QK-norm, which the peers do not have; the same weights every time."""
    torch.manual_seed(0)
    return get_variant(GATES[gate]).attention(AttentionShape(width, heads, heads, width // heads), qk_norm=False)


def peer_layer(kind: str, width: int, heads: int, tokens: int) -> nn.Module:
    """A peer that holds the weights of `our_layer("none")`."""
    ours = our_layer("none", width, heads)
    qkv = torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]).detach()
    peer = PlainLayer(width, heads) if kind == "plain" else TorchLayer(width, heads, tokens)
    inner, out = (peer.qkv.weight, peer.out) if kind == "plain" else (peer.layer.in_proj_weight, peer.layer.out_proj)
    with torch.no_grad():
        inner.copy_(qkv)
        out.weight.copy_(ours.o_proj.weight)
    return peer


def prepare_layer(make, gate: str, way: str, sizes, device, dtype) -> Prepared:
    """A layer's forward and backward, weights' gradients too; checked against the eager module in float32."""
    compiled, graph = "compiled" in way, "recorded" in way
    batch, tokens, heads, head_width = sizes
    layer = make().to(device, dtype)
    x = torch.randn(batch, tokens, heads * head_width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    run = torch.compile(layer, dynamic=False) if compiled else layer
    weights, x = list(layer.parameters()), x.requires_grad_()
    grown = torch.ones_like(x)

    def step():
        y = run(x)
        return [y, *torch.autograd.grad(y, [x, *weights], grown)]

    if graph:
        step = Later(step, device)

    def check():
        wide = x[:1].detach().float().requires_grad_()
        y = our_layer(gate, heads * head_width, heads).to(device)(wide)
        (gradient,) = torch.autograd.grad(y, wide, grown[:1].float())
        return [part[:1] for part in step()[:2]], [y, gradient]

    return Prepared(step, check, {"gate": gate, "compiled": compiled, "recorded": graph}, counted=not graph)


def layer_case(sizes, device, dtype, compiles: bool) -> Case:
    """Our module with each gate, torch's own, and the plain one; all but torch's own recorded too."""
    batch, tokens, heads, head_width = sizes
    width, rows = heads * head_width, []
    makers = [(f"minigated, gate {gate}", gate, partial(our_layer, gate, width, heads)) for gate in GATES]
    makers.append(("SDPA layer", "none", partial(peer_layer, "plain", width, heads, tokens)))
    makers.append(("nn.MultiheadAttention", "none", partial(peer_layer, "torch", width, heads, tokens)))
    for name, gate, make in makers:
        cost = attention_module(batch, tokens, width, heads, head_width, gate, dtype.itemsize, training=True)
        ways = WAYS[:2] if name == "nn.MultiheadAttention" else WAYS
        for way in ways if compiles else WAYS[:1]:
            prepare = partial(prepare_layer, make, gate, way, sizes, device, dtype)
            rows.append(Row(f"{name}, {way}", prepare, flops=cost.flops, bytes=cost.bytes, items=batch * tokens))
    return Case("layer, training", rows, "tokens", dtype)


def cases(scale: str, device: torch.device) -> list[Case]:
    """The core with each gate, then the layer; compiled and recorded only on a GPU."""
    dtype, compiles = (torch.bfloat16, True) if device.type == "cuda" else (torch.float32, False)
    cores = [core_case(gate, SIZES[scale], device, dtype, compiles) for gate in GATES]
    return [*cores, layer_case(SIZES[scale], device, dtype, compiles)]


run = partial(run_suite, "attention")
