"""Where the gate's rows stand inside `q_proj.weight`.

A G1 gate is one more linear map of the same input as the queries, so released models store both in one
matrix. They disagree on the order of its rows. Take H = 4 query heads on K = 2 key/value heads, so G = 2; q0
stands for the D query rows of head 0, g0 for its gate rows (D of them elementwise, one headwise):

    separate (this package)                  q0 q1 q2 q3          and   g0 g1 g2 g3
    per group (Qwen's gated attention)       q0 q1 g0 g1 | q2 q3 g2 g3
    per head (Qwen3-Next in transformers)    q0 g0 | q1 g1 | q2 g2 | q3 g3

The last two are the same matrix when G = 1: a wrong reading survives every test without grouped heads.
All functions work on the rows alone; a weight [rows, C] and its gradient go in alike.
"""

from torch import Tensor, cat, stack

from minigated.attention import AttentionShape
from minigated.errors import InputError


def gate_granularity(rows: int, shape: AttentionShape) -> str:
    """Which gate a `q_proj` with so many rows carries: "none", "headwise" or "elementwise"."""
    queries = shape.heads * shape.head_width
    kinds = {queries: "none", queries + shape.heads: "headwise", 2 * queries: "elementwise"}
    if rows not in kinds:
        accepted = ", ".join(f"{count} ({kind})" for count, kind in kinds.items())
        heads = f"{shape.heads} heads of width {shape.head_width}"
        raise InputError(f"q_proj has {rows} rows; {heads} accept {accepted}")
    return kinds[rows]


# ---------------------------------------------------------------------------------------------- per group
def split_per_group(packed: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Takes the released layout apart.

    Args:
        packed: [H*D + gate rows, ...]; of each of the K groups first G*D query rows, then its gate rows
            (G*D elementwise, G headwise, none in the baseline).
        shape: H, K and D.

    Returns:
        Query rows [H*D, ...] and gate rows [H*D | H | 0, ...], both in head order: group * G + place in
        group.
    """
    gate_granularity(packed.shape[0], shape)
    queries = shape.heads // shape.kv_heads * shape.head_width  # G*D, query rows of one group
    groups = packed.unflatten(0, (shape.kv_heads, -1))  # [K, G*D + gate rows of a group, ...]
    return groups[:, :queries].flatten(0, 1), groups[:, queries:].flatten(0, 1)


def join_per_group(query: Tensor, gate: Tensor, shape: AttentionShape) -> Tensor:
    """The inverse of `split_per_group`: [H*D, ...] and [H*D | H, ...] -> [H*D + gate rows, ...]."""
    kv_heads = shape.kv_heads
    groups = cat((query.unflatten(0, (kv_heads, -1)), gate.unflatten(0, (kv_heads, -1))), dim=1)
    return groups.flatten(0, 1)  # [K, G*D + gate rows of a group, ...] -> [H*D + gate rows, ...]


# ---------------------------------------------------------------------------------------------- per head
def split_per_head(packed: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """Takes Qwen3-Next's layout apart: [2*H*D, ...] -> query rows [H*D, ...], gate rows [H*D, ...]."""
    heads = packed.unflatten(0, (shape.heads, 2, shape.head_width))  # [H, query | gate, D, ...]
    return heads[:, 0].flatten(0, 1), heads[:, 1].flatten(0, 1)


def join_per_head(query: Tensor, gate: Tensor, shape: AttentionShape) -> Tensor:
    """The inverse of `split_per_head`: [H*D, ...] twice -> [2*H*D, ...]."""
    each = (shape.heads, shape.head_width)
    return stack((query.unflatten(0, each), gate.unflatten(0, each)), dim=1).flatten(0, 2)


# ---------------------------------------------------------------------------------------------- between them
def per_group_to_per_head(packed: Tensor, shape: AttentionShape) -> Tensor:
    """Released layout, elementwise -> Qwen3-Next's: in a group, (query | gate) and the head change places.

    [2*H*D, ...] -> [2*H*D, ...].
    """
    group = shape.heads // shape.kv_heads
    groups = packed.unflatten(0, (shape.kv_heads, 2, group, shape.head_width))
    return groups.transpose(1, 2).flatten(0, 3)  # [K, 2, G, D, ...] -> [K, G, 2, D, ...]


def per_head_to_per_group(packed: Tensor, shape: AttentionShape) -> Tensor:
    """Qwen3-Next's layout -> the released one: the same exchange back. [2*H*D, ...] -> [2*H*D, ...]."""
    group = shape.heads // shape.kv_heads
    heads = packed.unflatten(0, (shape.kv_heads, group, 2, shape.head_width))
    return heads.transpose(1, 2).flatten(0, 3)  # [K, G, 2, D, ...] -> [K, 2, G, D, ...]


def widen_headwise(gate: Tensor, shape: AttentionShape) -> Tensor:
    """A headwise gate as an elementwise one, exactly: each head's row D times, [H, ...] -> [H*D, ...]."""
    return gate.repeat_interleave(shape.head_width, dim=0)
