"""A mixture of experts: a router sends each token to k of E small feed-forwards (chapter 7).

    p = softmax(x W_r)                                      the router's probabilities, [E]                  (7.1)
    y = sum over the k largest p_e of w_e * expert_e(x),    w = p, or p divided by the sum of the k          (7.2)
    expert_e(x) = W_down,e (SiLU(W_gate,e x) * W_up,e x)    a narrow SwiGLU                                  (7.3)

The layer of the 15A2B model of *Gated Attention for Large Language Models* (arXiv 2505.06708): 128 experts, 8 a token,
no shared expert. Qwen3-Next adds one. All experts stand in two packed tensors, so the same weights run in four ways:
a loop to read, padded batches, grouped matrix products, and for a few tokens a look-up. N counts tokens, whatever
sequences they come from.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.dispatch import Sorted, collect, dispatch, sort_by_expert
from minigated.errors import InputError, one_of
from minigated.layers import SwiGLU


class Routing(NamedTuple):
    """What a router decided for N tokens.

    Attributes:
        logits: [N, E] float32, before the softmax. chosen: [N, k] int64, the experts, most probable first.
        weights: [N, k] float32, what their outputs are multiplied by.
    """

    logits: Tensor
    chosen: Tensor
    weights: Tensor


def check_top_k(top_k: int, experts: int) -> None:
    """Refuses a number of choices that E experts do not offer."""
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k must be from 1 to {experts}, the number of experts, got {top_k}")


def route(logits: Tensor, top_k: int, renormalise: bool = False) -> Routing:
    """Softmax over all experts, then the k largest, eq. (7.1) and (7.2).

    Args:
        logits: [N, E].
        top_k: k experts a token.
        renormalise: divide the k probabilities by their sum (`norm_topk_prob` of the released models).

    Raises:
        InputError: top_k is not from 1 to E.
    """
    check_top_k(top_k, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights, chosen = torch.softmax(logits, -1).topk(top_k, -1)  # [N, k] each
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(logits, chosen, weights)


# ---------------------------------------------------------------------------------------------- four ways to run them
def experts_loop(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Eq. (7.2) expert by expert, to read.

    Args:
        x: [N, C].
        gate_up: [E, 2F, C], rows of W_gate, then of W_up. down: [E, C, F].

    Returns:
        [N, C].
    """
    y = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, place = (routing.chosen == expert).nonzero(as_tuple=True)  # who comes here, as which choice
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, -1)  # [n, F] each
        out = (F.silu(gate) * up) @ down[expert].T  # [n, C], eq. (7.3)
        y.index_add_(0, token, out * routing.weights[token, place, None].to(x.dtype))
    return y


def weights_of(plan: Sorted, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The weight of each sorted assignment, [A, 1]."""
    one_each = plan._replace(k=1)  # weights[order], and in the backward pass gradient[back]
    return dispatch(routing.weights.flatten(), one_each).unsqueeze(-1).to(dtype)


def experts_batched(
    x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, capacity: int | None = None
) -> Tensor:
    """The same as one batched product: every expert gets a box of equal size, filled up with zeros.

    Args:
        x, gate_up, down: as in `experts_loop`.
        capacity: places in a box; that of the fullest expert unless given. With N places, which always suffice, nothing
            is read back from the device.

    Raises:
        InputError: an expert got more tokens than `capacity`. No token is ever dropped.
    """
    plan = sort_by_expert(routing.chosen, len(gate_up))
    if capacity is None or capacity < len(x):
        fullest = int(plan.counts.max())
        capacity = fullest if capacity is None else capacity
        if fullest > capacity:
            raise InputError(
                f"expert {int(plan.counts.argmax())} received {fullest} tokens and has room for {capacity}; "
                f"give capacity={fullest} or more, or None"
            )
    total = len(plan.order)
    expert = torch.arange(len(gate_up), device=x.device).repeat_interleave(plan.counts, output_size=total)  # [A]
    place = torch.arange(total, device=x.device) - (plan.ends - plan.counts)[expert]
    boxes = x.new_zeros(len(gate_up), capacity, x.shape[1])  # [E, capacity, C]
    boxes = boxes.index_put((expert, place), dispatch(x, plan))  # and read again: its gradient is added to places
    gate, up = (boxes @ gate_up.transpose(1, 2)).chunk(2, -1)  # [E, capacity, F] each
    boxes = (F.silu(gate) * up) @ down.transpose(1, 2)  # [E, capacity, C]
    return collect(boxes[expert, place] * weights_of(plan, routing, x.dtype), plan)


def experts_grouped(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """The same without padding: one grouped matrix product each way. Reads nothing back, so it compiles whole.

    W_down is linear, so a weight multiplies its input, F numbers where the output has C. For the backward pass that
    keeps one more row of F in place of one of C. Shapes as in `experts_loop`; bfloat16, and float32 on a CPU without
    compilation. C and F numbers must be multiples of 16 bytes: 8 of bfloat16, 4 of float32.
    """
    plan = sort_by_expert(routing.chosen, len(gate_up))
    gate, up = F.grouped_mm(dispatch(x, plan), gate_up.transpose(1, 2), offs=plan.ends).chunk(2, -1)  # [A, F] each
    hidden = F.silu(gate) * up * weights_of(plan, routing, x.dtype)
    return collect(F.grouped_mm(hidden, down.transpose(1, 2), offs=plan.ends), plan)


def experts_gathered(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """The same for a few tokens: each assignment fetches its expert's weights. Reads nothing back.

    Shapes as in `experts_loop`. As many weights move as there are assignments, so this serves the decoding of a few
    sequences, where N k is under E and the other experts need not be touched.
    """
    gate, up = torch.einsum("nkfc,nc->nkf", gate_up[routing.chosen], x).chunk(2, -1)  # [N, k, F] each
    out = torch.einsum("nkcf,nkf->nkc", down[routing.chosen], F.silu(gate) * up)  # [N, k, C]
    return (out * routing.weights.unsqueeze(-1).to(x.dtype)).sum(1)


# Traced, the size of the boxes would be part of the graph, and every batch that fills them otherwise a new graph.
BATCHED_AS_IT_STANDS = torch.compiler.disable(experts_batched)
FORMS: dict[str, Callable] = {
    "loop": experts_loop,
    "batched": experts_batched,
    "grouped": experts_grouped,
    "gathered": experts_gathered,
}


def choose_form(form: str, x: Tensor, hidden: int, few: bool = False) -> Callable:
    """The function for a form's name.

    "auto": gathered without gradients where there are `few` assignments, no more than experts; else grouped where this
    torch has it for device, dtype and sizes, else batched. Batched reads one number back. Compiled without gradients it
    does not, at the price of boxes for all tokens; with gradients the graph breaks around it, and it runs as it stands.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in (x.shape[-1], hidden))
    if form == "grouped" and (not aligned or x.dtype == torch.float64):
        raise InputError(
            f"grouped experts of width {x.shape[-1]} and hidden width {hidden} in {x.dtype}; "
            "accepted: multiples of 16 bytes, not float64"
        )
    if form != "auto":
        return FORMS[form]
    if few and not torch.is_grad_enabled():
        return experts_gathered
    eager_cpu = not x.is_cuda and not torch.compiler.is_compiling()  # the only place that takes float32
    types = (torch.bfloat16, torch.float32) if eager_cpu else (torch.bfloat16,)
    if hasattr(F, "grouped_mm") and x.dtype in types and aligned:
        return experts_grouped
    if not torch.compiler.is_compiling():
        return experts_batched
    return BATCHED_AS_IT_STANDS if torch.is_grad_enabled() else partial(experts_batched, capacity=len(x))


# ---------------------------------------------------------------------------------------------- the layer
class Experts(nn.Module):
    """The packed weights of E SwiGLU feed-forwards, in the layout of transformers' Qwen models.

    Args:
        experts: E. width: C. hidden: F, the width of one expert. form: "auto" or a name of `FORMS`.
    """

    def __init__(self, experts: int, width: int, hidden: int, form: str = "auto"):
        super().__init__()
        one_of("form of the experts", form, ("auto", *FORMS))
        self.form = form
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.initialize(0.02)

    def initialize(self, std: float) -> None:
        """Draws all weights from N(0, std^2)."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[N, C] -> [N, C]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x = x.to(dtype)  # grouped products are not on autocast's list
        few = routing.chosen.numel() <= len(self.down_proj)
        form = choose_form(self.form, x, self.down_proj.shape[-1], few)
        return form(x, self.gate_up_proj.to(dtype), self.down_proj.to(dtype), routing)


class MoE(nn.Module):
    """Router, experts and, where asked for, a shared expert that every token visits.

    Args:
        width: C. hidden: F, the width of one expert. experts: E. top_k: k.
        renormalise: see `route`.
        shared_width: width of the shared expert, 0 for none. It is multiplied by sigmoid(x w), as in Qwen3-Next.
        form: how the experts run, see `Experts`.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int, renormalise=False, shared_width=0, form="auto"
    ):
        super().__init__()
        check_top_k(top_k, experts)
        self.top_k, self.renormalise = top_k, renormalise
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(experts, width, hidden, form)
        self.shared = SwiGLU(width, shared_width) if shared_width else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_width else None

    def forward(self, x: Tensor, routings: list[Routing] | None = None) -> Tensor:
        """Sends every token through its experts.

        Args:
            x: [B, T, C].
            routings: a list that gets this layer's `Routing` appended, for the balance loss and for statistics.

        Returns:
            [B, T, C].
        """
        tokens = x.flatten(0, -2)  # [N, C]
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 logits would tie and flip choices
            wide = torch.promote_types(self.router.weight.dtype, torch.float32)
            routing = route(F.linear(tokens.to(wide), self.router.weight.to(wide)), self.top_k, self.renormalise)
        if routings is not None:
            routings.append(routing)
        y = self.experts(tokens, routing)
        if self.shared is not None:
            y = y + torch.sigmoid(self.shared_gate(tokens)) * self.shared(tokens)
        return y.view_as(x)

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, renormalise={self.renormalise}"
