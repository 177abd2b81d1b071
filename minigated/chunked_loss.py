"""Next-token loss without the logits: output layer and cross-entropy together, a chunk of tokens at a time (chapter 9).

The last layer of a language model makes V numbers a token, more than all blocks together keep where V is large: 16,384
tokens of a vocabulary of 152,064 are 5 GB in bfloat16 and three times that with the float32 copies of the loss. The
loss needs none of them afterwards but its gradient, which is known as soon as the logits are:

    loss = sum over tokens of log sum_v exp(z_v) - z_t,     z = h W^T                                        (9.6)
    dloss / dz = softmax(z) - onehot(t),    dh = dz W,      dW = sum over tokens of dz^T h                   (9.7)

So each chunk does both at once, keeps dh and adds to dW, and its logits are gone before the next. That is three matrix
products a chunk, as many as the plain form has; computing logits again in the backward pass would be a fourth.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minigated.errors import InputError

IGNORED = -100  # torch's own mark of a token that does not count


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """The reference: all logits, then torch's loss in float32 or wider. Shapes as in `chunked_cross_entropy`."""
    logits = F.linear(hidden, weight).reshape(targets.numel(), len(weight))  # [N, V]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets.flatten(), ignore_index=ignore_index)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, ignore_index: int = IGNORED
) -> Tensor:
    """Mean cross-entropy in nats of the tokens that count, with at most `chunk` x V logits at any time.

    Logits are computed in autocast's dtype where autocast is on, the loss in float32 or wider, and the gradient of the
    weight is summed in the same: more exact than one bfloat16 product over all tokens. Only the product of one chunk is
    in the dtype of the logits, so in float16 one of many tokens can pass 65,504. Held until the backward pass are the
    two gradients, N x C in the dtype of `hidden` and V x C in that of the sum; of an input that needs no gradient,
    nothing is held or computed.

    Args:
        hidden: after the last norm, [..., C]. weight: of the output layer, [V, C].
        targets: int64 [...], each from 0 to V - 1 or `ignore_index`.
        chunk: tokens whose logits are there at once; 1,024 to 4,096 keep a GPU busy. One near N saves nothing: with the
            gradient, the logits of a chunk take as much a token as those of the plain form.
        ignore_index: the target of tokens that do not count.

    Returns:
        A scalar; where no token counts, not a number, with gradients of 0, as torch's.

    Raises:
        InputError: a chunk under 1, or shapes that do not fit.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk is {chunk!r}; accepted: a whole number of tokens, at least 1")
    if weight.ndim != 2 or hidden.shape != (*targets.shape, weight.shape[1]):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (hidden, weight, targets))
        raise InputError(f"hidden, weight and targets have shapes {shapes}; accepted: [..., C], [V, C], [...]")
    kind = hidden.device.type
    both = torch.promote_types(hidden.dtype, weight.dtype)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else both
    needs_hidden, needs_weight = (torch.is_grad_enabled() and given.requires_grad for given in (hidden, weight))
    flat, targets = hidden.reshape(targets.numel(), weight.shape[1]), targets.flatten()  # [N, C], [N]
    return _Mean.apply(flat, weight, targets, chunk, ignore_index, dtype, needs_hidden, needs_weight)


class _Mean(torch.autograd.Function):
    """The mean of the losses; the backward pass only scales what the forward pass has found."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, ignore_index, dtype, needs_hidden, needs_weight):
        ctx.asked = (needs_hidden, hidden.dtype), (needs_weight, weight.dtype)
        options = (chunk, ignore_index, dtype, needs_hidden, needs_weight, torch.compiler.is_compiling())
        total, *gradients = loss_and_gradients(hidden, weight, targets, *options)
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(count, *gradients)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        count, *sums = ctx.saved_tensors
        scale = scale / count.clamp(min=1)  # where no token counts, the sums are 0 and so are their means
        # scaled before they are rounded: in float16 a sum over many tokens overflows where its mean does not
        means = [(s.to(scale.dtype) * scale).to(dtype) if n else None for s, (n, dtype) in zip(sums, ctx.asked)]
        return *means, None, None, None, None, None, None


# An operator of its own, because a compiler that sees inside puts off to the backward pass what only that pass uses:
# the products of eq. (9.7), and with them the logits of every chunk.
@torch.library.custom_op("minigated::chunked_cross_entropy", mutates_args=())
def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    ignore_index: int,
    dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (9.6) and (9.7) chunk by chunk.

    Args:
        hidden: [N, C]. weight: [V, C]. targets: [N]. chunk, ignore_index: see `chunked_cross_entropy`.
        dtype: of the matrix products. needs_hidden, needs_weight: which gradients to work out. compiled: whether what
            lies between the products runs as compiled kernels; it passes over the logits twice then, and about ten
            times otherwise.

    Returns:
        The sum of the losses, its gradients of `hidden`, in that dtype, and of `weight`, in float32 or wider; an empty
        tensor for one that is not needed.
    """
    wide = torch.promote_types(dtype, torch.float32)
    matrix, between = weight.to(dtype), _compiled_between() if compiled else loss_and_slope
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)  # [N, C]
    for_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else weight.new_empty(0, dtype=wide)  # [V, C]
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk].to(dtype)  # [n, C]
        logits = part @ matrix.T  # [n, V]
        loss, slope = between(logits, targets[start : start + chunk], ignore_index, needs_hidden or needs_weight)
        total += loss
        if needs_hidden:
            for_hidden[start : start + chunk] = slope @ matrix
        if needs_weight:
            for_weight += slope.T @ part
        del logits, slope  # or they were still there beside the next chunk's
    return total, for_hidden, for_weight


@loss_and_gradients.register_fake
def _(hidden, weight, targets, chunk, ignore_index, dtype, needs_hidden, needs_weight, compiled):
    wide = torch.promote_types(dtype, torch.float32)
    for_hidden = torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
    for_weight = torch.empty_like(weight, dtype=wide) if needs_weight else weight.new_empty(0, dtype=wide)
    return hidden.new_empty((), dtype=wide), for_hidden, for_weight


def loss_and_slope(logits: Tensor, targets: Tensor, ignore_index: int, needed: bool) -> tuple[Tensor, Tensor]:
    """What lies between the products: the summed loss and the slope softmax(z) - onehot(t), 0 for ignored tokens.

    Args:
        logits: z, [n, V]. targets: [n].

    Returns:
        A scalar in float32 or wider, and [n, V] in the dtype of the logits, empty unless needed.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = targets != ignore_index
    targets = targets.where(counts, 0)[:, None]  # [n, 1]
    level = logits.to(wide).logsumexp(-1, keepdim=True)  # [n, 1]
    loss = (level - logits.gather(-1, targets)).squeeze(-1).where(counts, 0).sum()
    if not needed:
        return loss, logits.new_empty(0)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    slope = (logits - level).exp()  # wide, as `level` is; from here in place, as the peak of `minigated.memory` is next
    slope -= (columns == targets).to(wide)  # a comparison fuses, a scatter does not
    slope *= counts[:, None]
    return loss, slope.to(logits.dtype)


@functools.cache
def _compiled_between():
    return torch.compile(loss_and_slope, dynamic=False)
