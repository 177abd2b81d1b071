"""Checks of chapter 9: one product for three projections, one shape for every batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigated.check import exercise
from minigated.expectations import call, draw, expect_close, expect_good_manners, expect_refusal, expect_tensor, refuse

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class CountedProducts(TorchDispatchMode):
    """Counts matrix products while the context lasts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def graphs_of(function: Callable, calls) -> int:
    """How many graphs the compiler traces for these calls; nothing is compiled."""
    traced = []
    torch._dynamo.reset()
    try:
        counted = torch.compile(function, backend=lambda graph, _: traced.append(1) or graph.forward, dynamic=False)
        for arguments in calls:
            counted(*arguments)
    finally:
        torch._dynamo.reset()
    return len(traced)


# ---------------------------------------------------------------------------------------------- 9.3
def three_products(u: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, heads: int) -> Tensor:
    return torch.stack([torch.einsum("bhwc,dc->bhwd", u, w).unflatten(-1, (heads, -1)) for w in (w_q, w_k, w_v)])


def projection_suspects(u: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, heads: int) -> dict[str, Tensor]:
    q, k, v = right = three_products(u, w_q, w_k, w_v, heads)
    width = q.shape[-1]
    mixed = torch.cat([w_q, w_k, w_v])
    heads_first = (u @ mixed.T).unflatten(-1, (heads, 3, width)).movedim(-2, 0)
    swapped = torch.stack([(u @ w.T).unflatten(-1, (width, heads)).transpose(-1, -2) for w in (w_q, w_k, w_v)])
    suspects = {
        "the weights are used transposed: their rows are output channels": three_products(
            u, w_q.T, w_k.T, w_v.T, heads
        ),
        "the heads are cut before query, key and value are told apart: the rows of w_q come first, all of them": (
            heads_first
        ),
        "the axes of heads and channels are swapped: a head's channels lie side by side": swapped,
        "queries, keys and values are in another order": torch.stack([v, k, q]),
        "keys and values are swapped": torch.stack([q, v, k]),
        "all three are projected by w_q": torch.stack([q, q, q]),
    }
    return {m: w for m, w in suspects.items() if w.shape == right.shape and (w - right).abs().max() > 1e-9}


@exercise(
    "9.3",
    "Fuse a projection",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "Rows of a weight are output channels. Stack the rows of all three weights: one product then gives 3 C "
        "channels, the first C of them the queries. `unflatten` and `unbind` copy nothing."
    ),
    pseudo="all = u (w_q above w_k above w_v)^T\ncut the last axis into (3, heads, width of a head)\ntake the 3 apart",
)
def fused_projection(f):
    for shape, heads in (((2, 3, 4, 6), 3), ((1, 2, 5, 8), 2), ((3, 1, 1, 4), 4)):
        inputs = [draw(*shape), *(draw(shape[-1], shape[-1], seed=s) for s in (1, 2, 3))]
        found = call(f, *inputs, heads)
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            refuse(f"return three tensors (q, k, v); you return {type(found).__name__}")
        for name, value in zip("qkv", found):
            expect_tensor(value, (*shape[:3], heads, shape[3] // heads), name)
        where = f"wrong for {shape[3]} channels in {heads} heads"
        suspects = projection_suspects(*inputs, heads)
        expect_close(torch.stack(list(found)), three_products(*inputs, heads), where, suspects)
        with CountedProducts() as products:
            call(f, *inputs, heads)
        if products.count != 1:
            refuse(f"{products.count} matrix products; one of three times the width reads the map once")
    names = dict(zip(("u", "w_q", "w_k", "w_v"), [draw(2, 3, 4, 6), *(draw(6, 6, seed=s) for s in (1, 2, 3))]))
    expect_good_manners(lambda *given: torch.stack(list(f(*given))), three_products, names, 3)


# ---------------------------------------------------------------------------------------------- 9.5
@exercise(
    "9.5",
    "Avoid the recompilation",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint="Put zeros below the rows until the batch is full. Rows that are not there must weigh nothing.",
    pseudo="n rows in x; refuse n > size\nrows = x above size - n rows of zeros\nweight = 1 / n for x, else 0",
)
def fixed_batch(f):
    target = draw(5, seed=7)
    loss = lambda rows, weight: ((rows @ target).square() * weight).sum()
    for n in (8, 5, 1):
        x, size = draw(n, 5, seed=n), 8
        found = call(f, x, size)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            refuse(f"return (rows, weight); you return {type(found).__name__}")
        rows, weight = found
        where = f"of {n} rows made into {size}"
        expect_tensor(rows, (size, 5), f"the batch {where}")
        expect_tensor(weight, (size,), f"the weight {where}")
        wanted = torch.zeros(size, 5, dtype=torch.float64)
        wanted[:n] = x
        suspects = {
            "the rows stand at the end; they come first": wanted.roll(size - n, 0),
            "the missing rows repeat others; they are 0": x[torch.arange(size) % n],
            "the missing rows repeat the last one; they are 0": x[torch.arange(size).clamp(max=n - 1)],
        }
        suspects = {m: w for m, w in suspects.items() if not torch.equal(w, wanted)}
        expect_close(rows, wanted, f"wrong rows {where}", suspects)
        real = (torch.arange(size) < n).double()
        expect_close(
            weight,
            real / n,
            f"wrong weight {where}",
            {
                "divided by the size and not by the number of real rows: the last batch would count less": real / size,
                "the rows that are not there weigh something": torch.full((size,), 1 / size, dtype=torch.float64),
                "the weights must sum to 1, so that the loss stays a mean": real,
            }
            if n < size
            else {"the weights must sum to 1, so that the loss stays a mean": real},
        )
        expect_close(loss(rows, weight), (x @ target).square().mean(), f"the loss {where} is not the mean of its rows")
    expect_refusal(f, draw(9, 5), 8, about="9 rows for a batch of 8")
    graphs = graphs_of(loss, (f(draw(n, 5), 8) for n in (8, 5, 3)))
    if graphs != 1:
        refuse(f"three batches make {graphs} graphs: shapes and dtypes must not depend on the number of rows")
    expect_good_manners(lambda x, size: f(x, size)[0], lambda x, size: torch.cat([x, x.new_zeros(3, 5)]),
                        {"x": draw(5, 5)}, 8)  # fmt: skip
