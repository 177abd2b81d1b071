"""Distance as decay: from RetNet's one dimension to RMT's Manhattan masks (chapter 3).

RetNet (arXiv 2307.08621) dims what lies n steps back by gamma^n. RMT (arXiv 2309.11523) takes this to images: gamma to
the power of the Manhattan distance, |rows apart| + |columns apart|. Numbers (3.x) are those of chapter 3.

    gamma_h = 1 - 2^(-initial - span h / H)                                                                  (3.3)
    M_ij = (|y_i - y_j| + |x_i - x_j|) log gamma                                                             (3.4)

Masks hold log gamma times the distance and are added to the logits before the softmax, as RMT's code does; its paper
multiplies after the softmax and does not renormalise (`decay_after_softmax`). Maps are [B, h, w, H, D].
"""

import torch
from torch import Tensor

from minigated.errors import InputError, one_of

RETNET_FORMS = ("exponents", "linspace")


# ---------------------------------------------------------------------------------------------- rates and masks
def rmt_log_decay(heads: int, initial: float = 2.0, span: float = 4.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """log gamma of each head, eq. (3.3): the first head is the most local. [H] in `dtype`, computed in float64.

    Args:
        heads: H. initial, span: RMT's initial_value and heads_range.

    Raises:
        InputError: no heads, or a rate that would not lie between 0 and 1.
    """
    ask = "accepted: heads >= 1, initial > 0, span >= 0"
    if heads < 1 or initial <= 0 or span < 0:
        raise InputError(f"heads {heads}, initial {initial}, span {span}; {ask}")
    h = torch.arange(heads, dtype=torch.float64)
    rates = torch.log1p(-torch.exp2(-initial - span * h / heads)).to(dtype)
    if not (rates.isfinite() & (rates < 0)).all():  # not a number, or so slow that it rounds to none
        raise InputError(f"initial {initial}, span {span} give {rates.tolist()} as log rates; {ask}, both moderate")
    return rates


def retnet_log_decay(heads: int, form: str = "exponents") -> Tensor:
    """log gamma of RetNet's heads, [H] float32.

    Args:
        heads: H.
        form: "exponents", gamma = 1 - 2^(-5-h); "linspace", gamma = 1 - exp(x) with x evenly spaced from log 1/32 to
            log 1/512, the RetNet paper's other choice.
    """
    one_of("RetNet decay form", form, RETNET_FORMS)
    if heads < 1:
        raise InputError(f"heads {heads}; accepted: 1 or more")
    h = torch.arange(heads, dtype=torch.float64)
    if form == "exponents":
        return torch.log1p(-torch.exp2(-5.0 - h)).float()
    ends = torch.tensor([1 / 32, 1 / 512], dtype=torch.float64).log()
    return torch.log1p(-torch.linspace(*ends.tolist(), heads, dtype=torch.float64).exp()).float()


def distances(length: int, device: torch.device | None = None) -> Tensor:
    """|i - j| for the cells of a line, [n, n] int64."""
    if length < 1:
        raise InputError(f"a line of {length} cells; accepted: 1 or more")
    cells = torch.arange(length, device=device)
    return (cells[:, None] - cells).abs()


def decay_mask(log_decay: Tensor, length: int) -> Tensor:
    """One-dimensional additive mask |i - j| log gamma. log_decay [H] -> [H, n, n]."""
    return distances(length, log_decay.device) * log_decay[:, None, None]


def manhattan_mask(log_decay: Tensor, height: int, width: int) -> Tensor:
    """Eq. (3.4) for the N = height * width cells of a map, row by row. log_decay [H] -> [H, N, N]."""
    rows, columns = distances(height, log_decay.device), distances(width, log_decay.device)
    apart = rows[:, None, :, None] + columns[None, :, None, :]  # [h, w, h, w]
    return apart.reshape(height * width, -1) * log_decay[:, None, None]


# ---------------------------------------------------------------------------------------------- rotation
def rotation_table(height: int, width: int, head_width: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RMT's rotation (3.9), [h, w, D] each.

    Two neighbouring channels turn together by index * angle, angle = 10000^(-i / (D/2 - 1)) for pair i (its last
    frequency is 1/10000, unlike RoPE's). The index is row * width + column: one step down turns as far as `width`
    steps to the right.

    Raises:
        InputError: an odd head width.
    """
    if head_width % 2 or head_width < 2:
        raise InputError(f"rotation turns pairs of channels; a head width of {head_width} is not even")
    if height < 1 or width < 1:
        raise InputError(f"a map of {height} x {width} cells; accepted: sides of 1 or more")
    angle = 10_000.0 ** -torch.linspace(0, 1, head_width // 2, dtype=torch.float64)
    index = torch.arange(height * width, dtype=torch.float64).view(height, width, 1)
    turned = index * angle.repeat_interleave(2)  # [h, w, D]
    return turned.cos().to(dtype), turned.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring channel pairs (0, 1), (2, 3), ...; x [..., H, D] with tables [..., D] -> same, dtype of x."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack((-odd, even), -1).flatten(-2)  # [..., H, D]
    return (x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


# ---------------------------------------------------------------------------------------------- RetNet, one dimension
def retention_parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Eq. (3.1), (Q K^T (.) D) V with D_nm = gamma^(n - m), 0 for m > n; no softmax. [B, H, T, D] -> [B, H, T, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    decay = decay_mask(log_decay.to(wide), q.shape[-2]).exp().tril()  # [H, T, T]
    return (q @ k.transpose(-2, -1) * decay).to(v.dtype) @ v


def retention_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, one step at a time, eq. (3.2): S_n = gamma S_{n-1} + k_n^T v_n, o_n = q_n S_n.

    Args:
        q, k, v: [B, H, T, D].
        state: [B, H, D, D] of the steps before; zeros by default.

    Returns:
        Output [B, H, T, D] in the dtype of v, and the state after the last step, float32 at least: in bfloat16 a gamma
        of 1 - 2^-9 is 1, and nothing would fade.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    gamma = log_decay.to(wide).exp()[:, None, None]  # [H, 1, 1]
    if state is None:
        state = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=wide, device=k.device)
    outputs = []
    for n in range(q.shape[-2]):
        state = gamma * state + k[..., n, :, None] * v[..., n, None, :].to(wide)  # [B, H, D, D]
        outputs.append((q[..., n, None, :].to(wide) @ state).squeeze(-2))
    return torch.stack(outputs, -2).to(v.dtype), state


# ---------------------------------------------------------------------------------------------- RMT, two dimensions
def manhattan_loops(q: Tensor, k: Tensor, v: Tensor, log_decay: float) -> Tensor:
    """RMT's full form (3.5) for one head by hand: every cell looks at every cell. [h, w, D] -> [h, w, D]."""
    height, width, channels = q.shape
    output = torch.zeros_like(v)
    for y in range(height):
        for x in range(width):
            scores = q.new_zeros(height, width)
            for row in range(height):
                for column in range(width):
                    apart = abs(y - row) + abs(x - column)
                    scores[row, column] = q[y, x] @ k[row, column] / channels**0.5 + apart * log_decay
            weights = torch.softmax(scores.flatten(), 0).view(height, width)
            output[y, x] = (weights[..., None] * v).sum((0, 1))
    return output


def as_tokens(x: Tensor) -> Tensor:
    """[B, h, w, H, D] -> [B, H, N, D]."""
    return x.flatten(1, 2).transpose(1, 2)


def as_map(x: Tensor, height: int) -> Tensor:
    """[B, H, N, D] -> [B, h, w, H, D]."""
    return x.transpose(1, 2).unflatten(1, (height, -1))


def manhattan_full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Eq. (3.5), softmax(Q K^T / sqrt(D) + M) V over all cells. Maps [B, h, w, H, D], mask [H, N, N] -> a map."""
    scores = as_tokens(q) @ as_tokens(k).transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, H, N, N]
    return as_map(torch.softmax(scores + mask, -1).to(v.dtype) @ as_tokens(v), q.shape[1])


def manhattan_decomposed(q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
    """RMT's decomposed form (3.7): every row by itself (the width pass), then every column (the height pass).

    Both passes use the same queries and keys; the second takes the first's result as its values.

    Args:
        q, k, v: [B, h, w, H, D].
        row_mask: [H, h, h], of the height pass. column_mask: [H, w, w], of the width pass.

    Returns:
        [B, h, w, H, D].
    """
    scale = q.shape[-1] ** -0.5
    along_rows = torch.einsum("byxhd,byzhd->byhxz", q, k) * scale + column_mask  # [B, h, H, w, w]
    v = torch.einsum("byhxz,byzhd->byxhd", torch.softmax(along_rows, -1).to(v.dtype), v)
    along_columns = torch.einsum("byxhd,bzxhd->bxhyz", q, k) * scale + row_mask  # [B, w, H, h, h]
    return torch.einsum("bxhyz,bzxhd->byxhd", torch.softmax(along_columns, -1).to(v.dtype), v)


def decay_after_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, renormalise: bool) -> Tensor:
    """The formula of RMT's paper: softmax(Q K^T / sqrt(D)) (.) gamma^distance, then V.

    With `renormalise` each row is divided by its sum, and the result equals `manhattan_full` (3.6). Without, rows sum
    to less than one, and it does not. Shapes as in `manhattan_full`.
    """
    scores = as_tokens(q) @ as_tokens(k).transpose(-2, -1) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, -1) * mask.exp()  # [B, H, N, N]
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return as_map(weights.to(v.dtype) @ as_tokens(v), q.shape[1])
