"""What attention costs: operations and bytes by formula, and by torch's counter (chapter 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """Floating-point operations (a multiply and an add count two) and bytes through memory."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


def attention_cost(
    batch: int, tokens: int, heads: int, head_width: int, kv_heads: int | None = None, item: int = 2, fused: bool = True
) -> Cost:
    """Cost of softmax(q k^T) v, forward, without a mask saving work.

    Two products of 2 B H T^2 D operations each; the softmax's few T^2 are left out, as counters do. Bytes: q, k, v
    read and y written; the naive form also writes and reads the scores twice (product, softmax, product).

    Args:
        item: bytes a number; 2 for bfloat16. fused: whether the scores stay on the chip.
    """
    kv_heads = kv_heads or heads
    ends = batch * tokens * head_width * (2 * heads + 2 * kv_heads) * item
    scores = 0 if fused else 4 * batch * heads * tokens * tokens * item
    return Cost(flops=4 * batch * heads * tokens * tokens * head_width, bytes=ends + scores)


def kv_cache_bytes(batch: int, tokens: int, layers: int, kv_heads: int, head_width: int, item: int = 2) -> int:
    """Bytes of keys and values kept for generation: 2 B T L K D numbers."""
    return 2 * batch * tokens * layers * kv_heads * head_width * item


def count_flops(function: Callable, *args, **kwargs) -> int:
    """Operations of one call, counted by torch. Fused attention is sent through its plain form to be counted."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()
