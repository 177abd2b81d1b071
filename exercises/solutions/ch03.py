"""Solutions of chapter 3. The docstrings are the statements; the stubs are made from this file."""

import math

import torch
from torch import Tensor


def decay_rates(heads: int, initial: float, span: float) -> Tensor:
    """Give every head its rate, as RMT does.

    Head h of H, counted from 0, fades by gamma = 1 - 2^(-initial - span * h / H) with each step, eq. (3.3): the first
    head is the most local, the last one sees farthest. Return the natural logarithm of gamma, which masks are made of.

    Args:
        heads: H, one or more. initial, span: RMT's two numbers, for example 2 and 4.

    Returns:
        log gamma [H], any float dtype.
    """
    h = torch.arange(heads)
    return torch.log(1 - 2.0 ** (-initial - span * h / heads))


def manhattan_decay(log_decay: Tensor, height: int, width: int) -> Tensor:
    """Write the mask that knows how far apart two cells of a map are.

    The cells lie row by row: cell (row, column) has the index row * width + column. A pair of cells gets the number of
    rows between them plus the number of columns between them, times log gamma of the head, eq. (3.4). It will be added
    to the logits.

    Args:
        log_decay: log gamma of each head [H].
        height: rows of the map. width: its columns.

    Returns:
        [H, N, N] with N = height * width, in the dtype of `log_decay`.
    """
    index = torch.arange(height * width)
    row, column = index // width, index % width  # [N] each
    apart = (row[:, None] - row).abs() + (column[:, None] - column).abs()  # [N, N]
    return apart * log_decay[:, None, None]


def retain(q: Tensor, k: Tensor, v: Tensor, gamma: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a summary of the past forward, RetNet's recurrent form for one head.

    At each step the state fades, then takes in the new pair, then answers the query, eq. (3.2):

        S_n = gamma S_{n-1} + k_n^T v_n        (k_n^T v_n is a matrix: row d, column e holds k_n[d] * v_n[e])
        o_n = q_n S_n

    A text may come in pieces: the state you return is handed to the next call.

    Args:
        q, k: [B, T, D]. v: [B, T, E].
        gamma: the head's rate, between 0 and 1.
        state: S before the first step, [B, D, E].

    Returns:
        The outputs [B, T, E] and the state after the last step [B, D, E].
    """
    outputs = []
    for n in range(q.shape[1]):
        state = gamma * state + k[:, n, :, None] * v[:, n, None, :]  # a new tensor: the caller keeps the old one
        outputs.append((q[:, n, None, :] @ state).squeeze(1))
    return torch.stack(outputs, dim=1), state


def two_passes(q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
    """Write RMT's decomposed attention for one head: every row by itself, then every column.

    The *width* pass comes first: in each row, softmax(q k^T / sqrt(D) + column_mask) v over the cells of that row.
    Its result takes the place of the values in the *height* pass: the same in each column, with the same queries and
    keys and with `row_mask`, eq. (3.7).

    Args:
        q, k, v: maps [B, h, w, D].
        row_mask: additive mask between rows [h, h]. column_mask: between columns [w, w].

    Returns:
        [B, h, w, D].
    """
    scale = 1 / math.sqrt(q.shape[-1])
    for mask in (column_mask, row_mask):
        weights = torch.softmax(q @ k.mT * scale + mask, dim=-1)  # [B, h, w, w], then [B, w, h, h]
        v = (weights @ v).transpose(1, 2)  # lines and cells change places: what was a column is now a row
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return v


def rotation_test_case() -> tuple:
    """Break five rotations with one pair of maps.

    RMT turns channel pairs (0, 1), (2, 3), ... of q and k at cell (row, column) by index * angle, with the index
    row * width + column and one angle a pair, spread evenly on a logarithmic scale from 1 down to 1/10000, eq. (3.9).
    Five wrong ones circulate:

        tall        the index is row * height + column
        flat        the index is row + column
        rope        the angles are RoPE's, 10000^(-2i/D) for pair i
        halves      channel i is turned together with channel i + D/2
        backwards   the keys turn the other way

    Only the products between queries and keys matter, in the two passes: q . k for two cells of a row, and for two
    cells of a column. Give q and k such that each wrong one changes a product by more than 0.1.

    Returns:
        (q, k): float64 tensors [h, w, D]: at most 16 cells, D at most 8, no entry larger than 1 in absolute value.
    """
    q, k = (torch.randn(2, 6, 8, dtype=torch.float64).clamp(-1, 1) for _ in range(2))
    return q, k


def asks_only_its_column(attend) -> bool:
    """Write the property that tells two passes from one softmax over the map.

    In the decomposed form, width pass first, a query never meets a key that lies in another row *and* another column.
    What a cell hears from another row was gathered there by the cell straight above or below it, with *that* cell's
    query. So when all values outside one other row are zero, the query of a cell can make its own output longer or
    shorter, but it cannot turn it: it chooses how much of the row to take, not what. In the full form it can.

    You are graded by the implementations you turn down (full forms, height pass first, ...) and by those you
    accept: two passes, width first, with any decay, rotation, or scale.

    Args:
        attend: a function of q, k, v [B, h, w, D] that returns [B, h, w, D]. B, h, w and D (even) are yours to choose,
            up to 8 each; everything is float64.

    Returns:
        True if a query only chooses among the rows, otherwise False.
    """
    q, k, v = torch.randn(3, 1, 4, 5, 4, dtype=torch.float64)
    only = torch.zeros_like(v)
    only[:, 3] = v[:, 3]  # values in the last row alone
    for row in range(3):
        for column in range(5):
            asked = q.clone()
            asked[:, row, column] = torch.randn(4, dtype=torch.float64)
            one, other = (attend(x, k, only)[0, row, column] for x in (q, asked))
            if not torch.allclose(one / one.norm(), other / other.norm()):
                return False
    return True


def reach(gamma: float) -> dict:
    """Predict how far a rate reaches when all scores are equal.

    With all logits equal, the softmax leaves weights proportional to gamma^distance. Think of a line without ends, both
    directions open, and of an infinite map with the Manhattan distance.

        "half"        the distance (not rounded) at which the weight has fallen to a half of a cell's own
        "own_line"    the share of all weight that a cell of the line gives to itself
        "own_map"     the share that a cell of the map gives to itself
        "mean_line"   the mean distance of what a cell of the line looks at
        "mean_map"    the same on the map

    Args:
        gamma: between 0 and 1, both excluded.

    Returns:
        A dictionary of numbers under these five names.
    """
    own = (1 - gamma) / (1 + gamma)  # 1 / (1 + 2 (gamma + gamma^2 + ...))
    mean = 2 * gamma / (1 - gamma**2)
    return {
        "half": math.log(0.5) / math.log(gamma),
        "own_line": own,
        "own_map": own**2,
        "mean_line": mean,
        "mean_map": 2 * mean,
    }


def cost_of_both_forms(height: int, width: int, heads: int, head_width: int) -> dict:
    """Predict what the full form costs, and what two passes cost.

    Count the operations of the matrix products for one map, a multiplication and an addition being two: scores and
    weighted sums, no projections, no softmax. Count the weights that are held, all heads together, and for the two
    passes both of them. Count the bytes of the float32 masks, one for each head: an N x N mask in the full form, an
    h x h and a w x w one for the two passes.

    Args:
        height, width: h and w of the map. heads: H. head_width: D.

    Returns:
        A dictionary of whole numbers: "full_operations", "passes_operations", "full_weights", "passes_weights",
        "full_mask_bytes", "passes_mask_bytes".
    """
    cells, sides = height * width, height + width
    return {
        "full_operations": 4 * heads * cells * cells * head_width,
        "passes_operations": 4 * heads * cells * sides * head_width,
        "full_weights": heads * cells * cells,
        "passes_weights": heads * cells * sides,
        "full_mask_bytes": 4 * heads * cells * cells,
        "passes_mask_bytes": 4 * heads * (height**2 + width**2),
    }
