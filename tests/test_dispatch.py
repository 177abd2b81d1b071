"""Rows to experts, and what comes back added up: against plain indexing, and by which operations run."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minigated.dispatch import collect, dispatch, sort_by_expert
from minigated.moe import experts_grouped, route

N, C, E = 23, 5, 17
ADDING = ("index_put", "_index_put", "index_add", "scatter")


def chosen(k: int, experts: int = E) -> torch.Tensor:
    return torch.rand(N, experts, generator=torch.Generator().manual_seed(k)).topk(k).indices


def draw(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)


def by_adding(rows, plan):
    """`collect` by adding to the places of the tokens, one after another."""
    return torch.zeros(N, *rows.shape[1:], dtype=rows.dtype).index_add(0, plan.token, rows)


class Seen(TorchDispatchMode):
    """The names of the operations that run while it lasts."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def adding(self) -> list[str]:
        return [name for name in self.names if name.startswith(ADDING)]


# ------------------------------------------------------------------------------------ sorting
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_sorting_keeps_every_assignment(k):
    choices = chosen(k)
    plan = sort_by_expert(choices, E)
    assert plan.counts.tolist() == [int((choices == e).sum()) for e in range(E)]
    expert = torch.arange(E).repeat_interleave(plan.counts)
    assert_close(choices.flatten()[plan.order], expert)
    assert_close(expert[plan.back].view_as(choices), choices)
    assert_close(plan.token[plan.back].view_as(choices), torch.arange(N)[:, None].expand_as(choices))


def test_tokens_of_an_expert_stay_in_their_order():
    """So that sums over them come out the same every time."""
    plan = sort_by_expert(torch.arange(6_000).view(-1, 2) % 3, 3)
    for start, end in zip([0, *plan.ends[:-1].tolist()], plan.ends.tolist()):
        assert (plan.order[start:end].diff() > 0).all()


@pytest.mark.parametrize("experts", [300, 2**15, 2**15 + 1, 40_000])
def test_more_experts_than_a_narrow_number_holds(experts):
    counts = sort_by_expert(torch.tensor([[0, experts - 1], [experts - 1, experts // 2]]), experts).counts
    assert counts.nonzero().flatten().tolist() == [0, experts // 2, experts - 1] and counts[-1] == 2


def test_sorting_is_one_sort_and_reads_nothing_back():
    with FakeTensorMode() as numbers_unknown, Seen() as seen:  # a value that is asked for raises
        sort_by_expert(numbers_unknown.from_tensor(chosen(2)), E)
    assert seen.names.count("sort") == 1, seen.names


# ------------------------------------------------------------------------------------ dispatching and collecting
@pytest.mark.parametrize("k", [1, 2, 7, 8, 12, 17])
@pytest.mark.parametrize("shape", [(), (C,), (2, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_indexing(k, shape, compiled):
    plan = sort_by_expert(chosen(k), E)
    x, rows = draw(N, *shape), draw(N * k, *shape)
    torch._dynamo.reset()
    ways = dispatch, collect
    if compiled:
        ways = [torch.compile(way, backend="aot_eager", fullgraph=True, dynamic=False) for way in ways]
    for given, found, wanted in (
        (x, ways[0](x, plan), x[plan.token]),
        (rows, ways[1](rows, plan), by_adding(rows, plan)),
    ):
        assert_close(found, wanted)
        up = draw(*found.shape).detach()
        assert_close(torch.autograd.grad(found, given, up), torch.autograd.grad(wanted, given, up))


def test_gradients_of_gradients():
    plan, x, rows = sort_by_expert(chosen(2), E), draw(N, 2), draw(2 * N, 2)
    assert torch.autograd.gradgradcheck(lambda x: dispatch(x, plan).sin(), x)
    assert torch.autograd.gradgradcheck(lambda rows: collect(rows, plan).sin(), rows)


def test_mapped_over_a_dimension():
    plan, many = sort_by_expert(chosen(2), E), draw(3, N, C)
    there_and_back = lambda x: collect(dispatch(x, plan).sin(), plan)
    found = torch.vmap(torch.func.grad(lambda x: there_and_back(x).sum()))(many)
    assert_close(found, torch.autograd.grad(sum(there_and_back(x).sum() for x in many), many)[0])


# ------------------------------------------------------------------------------------ which operations run
def test_no_gradient_is_added_to_places():
    """The reason to have them, in second derivatives too; plain indexing does, which shows that the test can see it."""
    plan, x, rows = sort_by_expert(chosen(2), E), draw(N, C), draw(2 * N, C)
    for given, take, added in (
        (x, lambda: x[plan.token], True),
        (x, lambda: dispatch(x, plan), False),
        (rows, lambda: rows[plan.back], True),
        (rows, lambda: collect(rows, plan), False),
    ):
        y = take()
        with Seen() as seen:
            (slope,) = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
            torch.autograd.grad(slope.sum(), given)
        assert bool(seen.adding()) == added, seen.names


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
def test_the_grouped_form_adds_to_no_places():
    """All of it but the router, whose gradient goes to the k of its E logits."""
    x, logits = torch.randn(N, 16, requires_grad=True), torch.randn(N, E, requires_grad=True)
    gate_up, down = torch.randn(E, 16, 16, requires_grad=True), torch.randn(E, 16, 8, requires_grad=True)
    routing = route(logits, 2)
    weights = routing.weights.detach().requires_grad_()
    y = experts_grouped(x, gate_up, down, routing._replace(weights=weights))
    with Seen() as seen:
        torch.autograd.grad(y.sum(), [x, gate_up, down, weights])
    assert "_grouped_mm" in " ".join(seen.names) and not seen.adding(), seen.names


@pytest.mark.parametrize(("k", "longest"), [(6, 6), (8, 4), (9, 3), (10, 5), (16, 4), (11, 11)])
def test_a_compiler_gets_sums_of_fewer_than_eight(k, longest):
    """Forward and backward; a prime stays as it is, and so does every sum without a compiler."""
    lengths, plan = [], sort_by_expert(chosen(k), E)

    def look(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.sum.dim_IntList:
                lengths.append(node.args[0].meta["val"].shape[node.args[1][0]])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    for way, given in ((dispatch, draw(N, C)), (collect, draw(N * k, C))):
        torch.compile(way, backend=backend, fullgraph=True, dynamic=False)(given, plan).square().mean().backward()
    assert lengths and max(lengths) == longest
    with Seen() as seen:
        collect(draw(N * k, C), plan)
    assert seen.names.count("sum") == 1


def test_compiled_for_this_machine():
    choices, x = chosen(8), draw(N, C)

    def there_and_back(x):
        plan = sort_by_expert(choices, E)
        return collect(dispatch(x, plan).square(), plan)

    found = torch.compile(there_and_back, fullgraph=True, dynamic=False)(x)
    assert_close(found, there_and_back(x))
    assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(there_and_back(x).sum(), x))
