"""Tokens to their experts and back: values and gradients against plain indexing, which knows nothing of the order."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minigated.dispatch import collect, dispatch, sort_by_expert

N, C, E = 23, 5, 7


def chosen(k: int) -> torch.Tensor:
    return torch.rand(N, E, generator=torch.Generator().manual_seed(k)).topk(k).indices


def draw(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)


def summed(rows, plan):
    """`collect` by adding to the places of the tokens, one after another."""
    return torch.zeros(N, *rows.shape[1:], dtype=rows.dtype).index_add(0, plan.token, rows)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_sorting_keeps_every_assignment(k):
    choices = chosen(k)
    plan = sort_by_expert(choices, E)
    assert plan.counts.tolist() == [int((choices == e).sum()) for e in range(E)]
    expert = torch.arange(E).repeat_interleave(plan.counts)
    assert_close(choices.flatten()[plan.order], expert)
    assert_close(expert[plan.back].view_as(choices), choices)
    assert_close(plan.token[plan.back].view_as(choices), torch.arange(N)[:, None].expand_as(choices))


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("shape", [(), (C,), (2, 3)])
def test_values_and_gradients_are_those_of_indexing(k, shape):
    plan = sort_by_expert(chosen(k), E)
    x, rows = draw(N, *shape), draw(N * k, *shape)
    for given, found, wanted in (
        (x, dispatch(x, plan), x[plan.token]),
        (rows, collect(rows, plan), summed(rows, plan)),
    ):
        assert_close(found, wanted)
        up = draw(*found.shape).detach()
        assert_close(torch.autograd.grad(found, given, up), torch.autograd.grad(wanted, given, up))


def test_gradients_of_gradients():
    plan, x, rows = sort_by_expert(chosen(2), E), draw(N, 2), draw(2 * N, 2)
    assert torch.autograd.gradgradcheck(lambda x: dispatch(x, plan).sin(), x)
    assert torch.autograd.gradgradcheck(lambda rows: collect(rows, plan).sin(), rows)


def test_no_gradient_is_added_to_places():
    """The reason to have them; plain indexing does, which shows that the test can see it."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    plan, x, rows = sort_by_expert(chosen(2), E), draw(N, C), draw(2 * N, C)
    for given, take, added in (
        (x, lambda: x[plan.token], True),
        (x, lambda: dispatch(x, plan), False),
        (rows, lambda: rows[plan.back], True),
        (rows, lambda: collect(rows, plan), False),
    ):
        seen, y = [], take()
        with Names():
            torch.autograd.grad(y.square().sum(), given)
        assert any(name.startswith(("index_put", "_index_put", "index_add", "scatter")) for name in seen) == added, seen


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_one_graph_and_equal(backend):
    choices, x = chosen(2), draw(N, C)

    def there_and_back(x):
        plan = sort_by_expert(choices, E)
        return collect(dispatch(x, plan).square(), plan)

    found = torch.compile(there_and_back, backend=backend, fullgraph=True, dynamic=False)(x)
    assert_close(found, there_and_back(x))
    assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(there_and_back(x).sum(), x))
