"""Rows taken in another order: values and gradients against plain indexing, which knows nothing of the order."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from minigated.moe import sort_by_expert
from minigated.row_order import take_rows

N, C, E = 23, 5, 7


def plan_of(k: int):
    chosen = torch.rand(N, E, generator=torch.Generator().manual_seed(k)).topk(k).indices
    return sort_by_expert(chosen, E)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_rows_and_gradients_are_those_of_indexing(k):
    plan, draw = plan_of(k), torch.Generator().manual_seed(0)
    x = torch.randn(N, C, dtype=torch.float64, generator=draw, requires_grad=True)
    out = torch.randn(N * k, C, dtype=torch.float64, generator=draw, requires_grad=True)
    for rows, source, places in ((x, plan.token, plan.back), (out, plan.back, plan.order)):
        up = torch.randn(len(source), C, dtype=torch.float64, generator=draw)
        found, wanted = take_rows(rows, source, places), rows[source]
        assert torch.equal(found, wanted)
        assert_close(torch.autograd.grad(found, rows, up), torch.autograd.grad(wanted, rows, up))


def test_places_of_another_order_give_another_gradient():
    """What the docstring warns of, and what the comparison above would see."""
    plan = plan_of(2)
    x = torch.randn(N, C, requires_grad=True)
    up = torch.randn(2 * N, C)
    right, wrong = (torch.autograd.grad(take_rows(x, plan.token, p), x, up)[0] for p in (plan.back, plan.order))
    assert not torch.allclose(right, wrong)


def test_gradients_of_gradients():
    plan = plan_of(2)
    x = torch.randn(N, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: take_rows(x, plan.token, plan.back).sin(), x)


def test_no_gradient_is_scattered():
    """The reason to have it: no operation of the backward pass adds to places of memory."""
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    plan, x = plan_of(2), torch.randn(N, C, requires_grad=True)
    for take, scattered in ((lambda: x[plan.token], True), (lambda: take_rows(x, plan.token, plan.back), False)):
        seen, y = [], take()
        with Names():
            torch.autograd.grad(y.sum(), x)
        assert any("index_put" in name for name in seen) == scattered, seen


def test_compiled_it_is_one_graph_and_equal():
    plan, x = plan_of(2), torch.randn(N, C, requires_grad=True)
    run = torch.compile(lambda x: take_rows(x, plan.token, plan.back).square(), backend="aot_eager", fullgraph=True)
    found, wanted = run(x), x[plan.token].square()
    assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x))
