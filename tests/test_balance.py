"""The losses that keep experts in use, from their definitions, and transformers' pooled form."""

import importlib
import math

import pytest
import torch
from torch.testing import assert_close

from minigated.balance import (
    RunningCounts,
    assignment_counts,
    balance_loss,
    expert_statistics,
    over_processes,
    pooled_balance_loss,
    z_loss,
)
from minigated.moe import Routing, route

TOKENS, EXPERTS, TOP = 50, 8, 2


def routing(seed=0, scale=1.0, tokens=TOKENS) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    return route(torch.randn(tokens, EXPERTS, generator=draw, dtype=torch.float64) * scale, TOP)


def by_definition(r: Routing) -> float:
    """Eq. (7.4)-(7.6) in loops."""
    tokens, experts = r.logits.shape
    total = 0.0
    for e in range(experts):
        share = sum(row.count(e) for row in r.chosen.tolist()) / (tokens * r.chosen.shape[1])
        probability = sum(math.exp(row[e]) / sum(map(math.exp, row)) for row in r.logits.tolist()) / tokens
        total += share * probability
    return experts * total


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_balance_by_definition(scale):
    assert math.isclose(balance_loss(routing(scale=scale)), by_definition(routing(scale=scale)), rel_tol=1e-10)


def test_balance_by_hand():
    """Four tokens on two experts, one each: three go to the first. f = (3/4, 1/4), P = (p, 1 - p)."""
    logits = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]], dtype=torch.float64)
    high = math.e / (1 + math.e)
    p = (3 * high + (1 - high)) / 4
    assert math.isclose(balance_loss(route(logits, 1)), 2 * (0.75 * p + 0.25 * (1 - p)), rel_tol=1e-12)


def test_one_when_balanced_and_experts_when_collapsed():
    uniform = route(torch.zeros(EXPERTS, EXPERTS), EXPERTS)
    assert math.isclose(balance_loss(uniform), 1, rel_tol=1e-6)
    collapsed = torch.full((TOKENS, EXPERTS), -40.0)
    collapsed[:, 2] = 40.0
    assert math.isclose(balance_loss(route(collapsed, 1)), EXPERTS, rel_tol=1e-6)


def test_its_gradient_pushes_the_full_expert_down():
    logits = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    logits[:, 1] = 0.5
    logits.requires_grad_()
    balance_loss(route(logits, 1)).backward()
    pushed = logits.grad.sum(0)
    assert pushed[1] > 0 and (pushed[[0, 2, 3, 4, 5, 6, 7]] < 0).all()


def test_a_loss_cut_off_from_the_router_is_seen():
    """The planted bug: P detached. The value is right and nothing is learnt."""
    logits = routing().logits.clone().requires_grad_()
    assert balance_loss(route(logits, TOP)).requires_grad
    assert not balance_loss(route(logits.detach(), TOP)).requires_grad


def test_shares_of_the_parts_average_to_the_loss_of_the_whole():
    """Why counts are added over processes and probabilities are not: with f of all, parts of P average exactly."""
    whole = routing(tokens=60)
    parts = [Routing(*(t[i : i + 20] for t in whole)) for i in (0, 20, 40)]
    counts = sum(assignment_counts(p) for p in parts)
    together = sum(balance_loss(p, counts) for p in parts) / 3
    assert math.isclose(together, balance_loss(whole), rel_tol=1e-12)
    alone = sum(balance_loss(p) for p in parts) / 3
    assert abs(alone - balance_loss(whole)) > 1e-3


def test_without_torchrun_counts_stay():
    counts = assignment_counts(routing())
    assert over_processes(counts) is counts


def test_running_counts_add_up_and_start_again():
    running, counts = RunningCounts(3), [torch.tensor([1, 0]), torch.tensor([0, 2])]
    seen = [[t.tolist() for t in running(counts)] for _ in range(4)]
    assert seen == [[[1, 0], [0, 2]], [[2, 0], [0, 4]], [[3, 0], [0, 6]], [[1, 0], [0, 2]]]
    assert counts[0].tolist() == [1, 0]


def test_running_counts_are_an_approximation():
    """The last micro-batch sees the exact counts of the step, the first only its own."""
    parts = [routing(seed) for seed in range(3)]
    running, total = RunningCounts(3), sum(assignment_counts(p) for p in parts)
    seen = [running([assignment_counts(p)])[0] for p in parts]
    assert torch.equal(seen[2], total) and not torch.equal(seen[0] * 3, total)


# ------------------------------------------------------------------------------------ z-loss
def test_z_loss_by_definition():
    r = routing()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in r.logits.tolist()) / TOKENS
    assert math.isclose(z_loss(r), expected, rel_tol=1e-10)
    assert math.isclose(z_loss(route(torch.zeros(3, EXPERTS), 1)), math.log(EXPERTS) ** 2, rel_tol=1e-6)


def test_z_loss_shrinks_logits_and_ignores_what_softmax_sees():
    """Adding a constant to all logits changes no probability; the z-loss is what notices."""
    r = routing()
    shifted = r._replace(logits=r.logits + 3)
    assert math.isclose(balance_loss(shifted), balance_loss(r), rel_tol=1e-10)
    assert z_loss(shifted) > z_loss(r) + 5


# ------------------------------------------------------------------------------------ transformers
@pytest.mark.parametrize("layers", [1, 3])
def test_pooled_loss_is_transformers(transformers, layers):
    qwen = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    routings = [routing(seed, scale=2.0) for seed in range(layers)]
    theirs = qwen.load_balancing_loss_func(tuple(r.logits for r in routings), EXPERTS, TOP)
    assert_close(pooled_balance_loss(routings), theirs.double(), rtol=1e-6, atol=0)


def test_pooled_is_k_times_ours_for_one_layer():
    assert math.isclose(pooled_balance_loss([routing()]), TOP * balance_loss(routing()), rel_tol=1e-6)


def test_pooling_hides_layers_that_collapse_on_different_experts():
    collapsed = []
    for expert in range(EXPERTS):
        logits = torch.full((TOKENS, EXPERTS), -20.0)
        logits[:, expert] = 20.0
        collapsed.append(route(logits, 1))
    assert math.isclose(pooled_balance_loss(collapsed), 1, rel_tol=1e-5)
    assert all(math.isclose(balance_loss(r), EXPERTS, rel_tol=1e-5) for r in collapsed)


# ------------------------------------------------------------------------------------ statistics
def test_statistics_of_a_collapsed_and_of_a_uniform_layer():
    logits = torch.full((TOKENS, EXPERTS), -40.0)
    logits[:, 2] = 40.0
    collapsed, uniform = expert_statistics([route(logits, 1), route(torch.zeros(4, EXPERTS), EXPERTS)])
    assert collapsed["unused"] == EXPERTS - 1 and collapsed["fullest"] == EXPERTS and collapsed["share"][2] == 1
    assert collapsed["top"] == pytest.approx(1) and collapsed["entropy"] == pytest.approx(0, abs=1e-6)
    assert uniform["unused"] == 0 and uniform["fullest"] == pytest.approx(1) and uniform["entropy"] == pytest.approx(1)
    assert uniform["top"] == pytest.approx(1 / EXPERTS)


def test_one_expert_has_no_entropy():
    (found,) = expert_statistics([route(torch.zeros(5, 1), 1)])
    assert found["entropy"] == 0.0
