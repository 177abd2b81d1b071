"""Softmax attention, from three nested loops to the module that models use (chapter 1).

Equation numbers are those of *Gated Attention for Large Language Models* (arXiv 2505.06708), section 2:
(1) projections, (2) scaled dot product, (3) heads, (4) output projection.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.errors import InputError, one_of
from minigated.layers import RMSNorm
from minigated.rope import apply_rope


# ---------------------------------------------------------------------------------------------- reference forms
def attention_loops(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Eq. (2) for one head as it would be written by hand: three nested loops.

    Args:
        q: queries [T, D]. k: keys [T, D]. v: values [T, D].
        causal: whether token i may look at tokens 0 .. i only.

    Returns:
        [T, D].
    """
    tokens, width = q.shape
    output = torch.zeros_like(v)
    for i in range(tokens):
        last = i + 1 if causal else tokens
        scores = q.new_zeros(last)
        for j in range(last):
            for d in range(width):
                scores[j] += q[i, d] * k[j, d]
        weights = torch.softmax(scores / math.sqrt(width), dim=0)  # [last]
        for j in range(last):
            output[i] += weights[j] * v[j]
    return output


def _check_causal(queries: int, keys: int) -> None:
    if queries > keys:
        raise InputError(f"causal attention needs at least as many keys as queries, got {queries} queries, {keys} keys")


def causal_mask(queries: int, keys: int, device=None) -> Tensor:
    """True where a query may look. The last query is aligned with the last key. Bool [queries, keys].

    Raises:
        InputError: more queries than keys, so that the first ones would have nothing to look at.
    """
    _check_causal(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)), the weights of eq. (2).

    Args:
        q: [..., T, D]. k: [..., S, D].
        mask: bool [T, S], True where a query may look; applied before the softmax.
        scale: 1 / sqrt(D) unless given.

    Returns:
        [..., T, S]; every row sums to 1.
    """
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # [..., T, S]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1)


def attention_matrix(q, k, v, mask=None, scale=None) -> Tensor:
    """Eq. (2) in matrices: the weights times the values. Shapes as in `attention_weights`; returns [..., T, D]."""
    return attention_weights(q, k, mask, scale) @ v


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Gives each group of query heads its shared key/value head: [B, K, S, D] -> [B, K*groups, S, D].

    Query head h reads key/value head h // groups, so each head is repeated in place, not the whole stack.
    """
    return x.repeat_interleave(groups, dim=1)


def attention_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, block: int = 64) -> Tensor:
    """Eq. (2) without ever holding a full row of scores: online softmax over blocks of keys.

    The idea of FlashAttention (arXiv 2205.14135): keep the running maximum, the running sum of exponentials and
    the running weighted sum of values; when a block raises the maximum, rescale what was gathered before.

    Args:
        q: [..., T, D]. k: [..., S, D]. v: [..., S, D].
        causal: aligned at the end, as in `causal_mask`.
        block: keys a step.

    Returns:
        [..., T, D].

    Raises:
        InputError: causal with more queries than keys.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if causal:
        _check_causal(queries, keys)
    rows = torch.arange(queries, device=q.device)[:, None] + (keys - queries)  # [T, 1] position of each query
    maximum = q.new_full((*q.shape[:-1], 1), float("-inf"))  # [..., T, 1]
    total, output = torch.zeros_like(maximum), torch.zeros_like(q[..., :1] * v[..., :1, :])  # [..., T, 1|D]
    for start in range(0, keys, block):
        kb, vb = k[..., start : start + block, :], v[..., start : start + block, :]  # [..., b, D]
        scores = q @ kb.transpose(-2, -1) * q.shape[-1] ** -0.5  # [..., T, b]
        if causal:
            columns = start + torch.arange(kb.shape[-2], device=q.device)
            scores = scores.masked_fill(columns > rows, float("-inf"))
        raised = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        level = raised.masked_fill(raised == float("-inf"), 0.0)  # a row that has seen no key yet: exp(-inf - 0) = 0
        shrink = torch.exp(maximum - level)
        weights = torch.exp(scores - level)  # [..., T, b]
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = output * shrink + weights @ vb
        maximum = raised
    return output / total


# ---------------------------------------------------------------------------------------------- the fast form
def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Eq. (2) through torch's fused kernels, with grouped key/value heads.

    Args:
        q: [B, H, T, D]. k: [B, K, S, D]. v: [B, K, S, D]; H is a multiple of K.
        causal: aligned at the end, as in `causal_mask`.

    Returns:
        [B, H, T, D].
    """
    queries, keys = q.shape[-2], k.shape[-2]
    mask = None
    if causal and queries != keys and queries > 1:  # torch aligns its own causal mask at the start
        mask = causal_mask(queries, keys, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and queries == keys, enable_gqa=q.shape[1] != k.shape[1]
    )


# ---------------------------------------------------------------------------------------------- the module
@dataclass(frozen=True)
class AttentionShape:
    """The four numbers of an attention layer.

    Attributes:
        width: C, channels of the residual stream.
        heads: H, query heads.
        kv_heads: K, key/value heads; H must be a multiple of K.
        head_width: D, channels of one head.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                f"kv_heads must divide heads"
            )


class KVCache:
    """Keys and values of the tokens seen so far, for one layer.

    Args:
        batch: B. capacity: tokens that fit. shape: of the attention layer. device, dtype: of the tensors.
    """

    def __init__(self, batch: int, capacity: int, shape: AttentionShape, device=None, dtype=None):
        size = (batch, shape.kv_heads, capacity, shape.head_width)
        with torch.inference_mode(False):  # it is written to later, in whatever mode that is
            self.k = torch.zeros(size, device=device, dtype=dtype)  # [B, K, capacity, D]
            self.v = torch.zeros_like(self.k)
        self.capacity, self.length = capacity, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, K, T, D] keys and values; returns all of them so far, [B, K, length, D]."""
        if k.shape[0] != self.k.shape[0]:
            raise InputError(f"the cache was made for a batch of {self.k.shape[0]}; a batch of {k.shape[0]} was given")
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens; {end} were given")
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The core on what `append` returned: new queries [B, H, T, D] -> [B, H, T, D]."""
        return attention_sdpa(q, k, v)


def check_qk_order(qk_order: tuple[str, ...]) -> None:
    """Refuses anything but an order of "gate", "norm" and "rope"."""
    if sorted(map(str, qk_order)) != ["gate", "norm", "rope"]:
        raise InputError(f"qk_order must hold gate, norm and rope once each, got {qk_order!r}")


class Attention(nn.Module):
    """Causal multi-head attention with grouped key/value heads, rotary positions and optional QK-norm.

    A variant of chapter 2 is given as `gates`: modules called `gate(y, x, probe)` at the paper's five positions.
    This class knows where the positions are and nothing about what a gate does.

    Args:
        shape: sizes of the layer.
        qk_norm: RMSNorm over D on queries and keys.
        gates: module per position, keys among g1 (attention output, before W_O), g2 (values), g3 (keys),
            g4 (queries), g5 (after W_O).
        projections: replacements for `k_proj` or `v_proj`, modules [B, T, C] -> [B, T, K*D].
        qk_order: the order of "gate", "norm" and "rope" on queries and keys; the paper does not state it.
        eps: of the QK-norm.
    """

    def __init__(
        self,
        shape: AttentionShape,
        qk_norm: bool = True,
        gates: dict[str, nn.Module] | None = None,
        projections: dict[str, nn.Module] | None = None,
        qk_order: tuple[str, ...] = ("gate", "norm", "rope"),
        eps: float = 1e-6,
    ):
        super().__init__()
        check_qk_order(qk_order)
        for position in gates or {}:
            one_of("position of a gate", position, ("g1", "g2", "g3", "g4", "g5"))
        width, inner, kv_inner = shape.width, shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        projections = projections or {}
        self.shape, self.qk_order = shape, tuple(qk_order)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = projections.get("k_proj") or nn.Linear(width, kv_inner, bias=False)
        self.v_proj = projections.get("v_proj") or nn.Linear(width, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = RMSNorm(shape.head_width, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_width, eps) if qk_norm else nn.Identity()
        self.gates = nn.ModuleDict(gates or {})

    def forward(self, x: Tensor, rotary=None, cache: KVCache | None = None, probe=None) -> Tensor:
        """Attends over the sequence (and what the cache holds).

        Args:
            x: block input after its norm, [B, T, C].
            rotary: (cos, sin) of these T positions, [T, D/2] each, or None for no rotary positions.
            cache: grows by these T tokens.
            probe: called as probe(name, value) with what `minigated.measure` looks at.

        Returns:
            [B, T, C].
        """
        shape = self.shape
        q = self.q_proj(x).unflatten(-1, (shape.heads, shape.head_width))  # [B, T, H, D], eq. (1)
        k = self.k_proj(x).unflatten(-1, (shape.kv_heads, shape.head_width))  # [B, T, K, D]
        v = self.v_proj(x).unflatten(-1, (shape.kv_heads, shape.head_width))  # [B, T, K, D]
        q, k = self._prepare_qk(q, k, x, rotary, probe)
        v = self._gate("g2", v, x, probe)  # before the cache and before the heads of a group share it
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H|K, T, D]
        if cache is not None:
            k, v = cache.append(k, v)  # [B, K, S, D]
        if probe is not None:
            probe("qk", (q, k))
        y = attention_sdpa(q, k, v) if cache is None else cache.attend(q, k, v)  # [B, H, T, D], eq. (2)
        y = y.transpose(1, 2)  # [B, T, H, D]
        if probe is not None:
            probe("sdpa", y)
        y = self._gate("g1", y, x, probe)  # eq. (5) on the head outputs
        if probe is not None:
            probe("sdpa_gated", y)
        return self._gate("g5", self.o_proj(y.flatten(2)), x, probe)  # [B, T, C], eq. (3) and (4)

    def _prepare_qk(self, q, k, x, rotary, probe):
        for step in self.qk_order:
            if step == "gate":
                q, k = self._gate("g4", q, x, probe), self._gate("g3", k, x, probe)
            elif step == "norm":
                q, k = self.q_norm(q), self.k_norm(k)
            elif rotary is not None:
                q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        return q, k

    def _gate(self, position: str, y: Tensor, x: Tensor, probe) -> Tensor:
        return self.gates[position](y, x, probe) if position in self.gates else y
