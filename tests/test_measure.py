"""The measures, on tensors small enough to know the answer."""

import pytest
import torch

from minigated.errors import InputError
from minigated.lm import build_lm
from minigated.measure import (
    Probe,
    contribution_rank,
    effective_rank,
    first_token_share,
    measure,
    summary,
    uniform_share,
    value_output_rank,
)


def loops_share(q, k, first_query=1):
    """F-Attn of one head by definition, query by query."""
    shares = []
    for i in range(first_query, q.shape[0]):
        scores = (q[i].double() @ k[: i + 1].double().T) / q.shape[1] ** 0.5
        shares.append(torch.softmax(scores, 0)[0].item())
    return sum(shares) / len(shares)


@pytest.mark.parametrize("first_query", [0, 1, 5])
@pytest.mark.parametrize("rows", [3, 512])
def test_first_token_share_is_its_definition_per_query_head(first_query, rows):
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 11, 4), torch.randn(1, 2, 11, 4)
    share = first_token_share(q, k, first_query, rows)
    for head in range(6):
        assert share[head].item() == pytest.approx(loops_share(q[0, head], k[0, head // 3], first_query), abs=1e-5)
    wrong = loops_share(q[0, 1], k[0, 1], first_query)  # head 1 reads key head 0, not 1
    assert share[1].item() != pytest.approx(wrong, abs=1e-5)


def test_equal_scores_give_the_uniform_share():
    q = torch.zeros(1, 1, 64, 8)
    assert first_token_share(q, q).item() == pytest.approx(uniform_share(64), abs=1e-6)
    assert uniform_share(64, 0) == pytest.approx(0.074, abs=5e-4)
    assert uniform_share(512, 0) == pytest.approx(0.013, abs=5e-4)


def test_query_that_is_not_there_is_refused():
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(InputError, match="between 0 and 3, got 4"):
        first_token_share(q, q, 4)


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    assert effective_rank(torch.outer(torch.arange(1.0, 4), torch.ones(6))) == pytest.approx(1.0)
    # singular values 3 and 1: entropy of (3/4, 1/4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(1.7547, abs=1e-4)


def test_value_output_rank_is_that_of_the_product():
    attention = build_lm("lm_nano").blocks[0].attention
    shape, head = attention.shape, 3
    d, group = shape.head_width, shape.heads // shape.kv_heads
    w_v = attention.v_proj.weight[(head // group) * d : (head // group + 1) * d]
    w_o = attention.o_proj.weight[:, head * d : (head + 1) * d]
    assert value_output_rank(attention)[head] == pytest.approx(effective_rank(w_o @ w_v))
    assert value_output_rank(attention)[head] <= d


def test_gating_can_only_be_seen_in_the_set_of_outputs():
    attention = build_lm("lm_nano").blocks[0].attention
    torch.manual_seed(0)
    y = torch.randn(1, 200, 1, 1) * torch.randn(32).expand(1, 200, 4, 32)  # every token the same direction
    assert contribution_rank(y, attention)[0] == pytest.approx(1.0, abs=1e-3)
    gated = y * torch.sigmoid(3 * torch.randn_like(y))
    assert contribution_rank(gated, attention)[0] > 5


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    return build_lm("lm_nano", variant="g1_elementwise")


def test_measures_follow_from_hooked_tensors(gated):
    """The probe against forward hooks on the same run."""
    tokens, seen = torch.randint(0, 256, (3, 40)), {}
    block, gate = gated.blocks[2], gated.blocks[2].attention.gates["g1"]
    handles = [
        block.register_forward_hook(lambda m, i, o: seen.__setitem__("out", o)),
        block.attention.register_forward_hook(lambda m, i, o: seen.__setitem__("attention", o)),
        gate.register_forward_hook(lambda m, i, o: seen.update(before=i[0], after=o)),
        gate.scores.register_forward_hook(lambda m, i, o: seen.__setitem__("scores", o)),
    ]
    found = measure(gated, [tokens])
    for handle in handles:
        handle.remove()
    assert found["max_activation"]["ffn_residual"][2] == pytest.approx(seen["out"].abs().max().item(), rel=1e-6)
    assert found["max_activation"]["attention_output"][2] == pytest.approx(
        seen["attention"].abs().max().item(), rel=1e-6
    )
    per_sequence = seen["out"].abs().flatten(1).amax(1).mean().item()
    assert found["mean_sequence_max"]["ffn_residual"][2] == pytest.approx(per_sequence, rel=1e-6)
    assert found["gate"]["mean"][2] == pytest.approx(seen["scores"].mean().item(), rel=1e-5)
    assert found["gate"]["first_token"][2] == pytest.approx(seen["scores"][:, 0].mean().item(), rel=1e-5)
    assert found["mean_abs"]["before"][2] == pytest.approx(seen["before"].abs().mean().item(), rel=1e-5)
    assert found["mean_abs"]["after"][2] == pytest.approx(seen["after"].abs().mean().item(), rel=1e-5)
    small = (seen["after"].abs() < 1e-2).float().mean().item()
    assert found["sparsity"]["0.01"]["after"][2] == pytest.approx(small, rel=1e-5)
    average = ((seen["before"] * seen["scores"].mean()).abs() < 1e-2).float().mean().item()
    assert found["sparsity"]["0.01"]["after_average"][2] == pytest.approx(average, rel=1e-5)
    assert sum(found["gate"]["histogram"][2]) == pytest.approx(1.0)


@pytest.mark.parametrize("variant", ["g1_additive_silu", "g1_additive_identity"])
def test_the_average_of_an_additive_gate_is_added(variant):
    torch.manual_seed(0)
    model, seen = build_lm("lm_nano", variant=variant), {}
    keep = lambda m, i, o: seen.update(before=i[0], scores=m.scores(i[1]))  # noqa: E731
    handle = model.blocks[2].attention.gates["g1"].register_forward_hook(keep)
    found = measure(model, [torch.randint(0, 256, (3, 40))])["sparsity"]
    handle.remove()
    for threshold in (1e-2, 1e-3):
        average = ((seen["before"] + seen["scores"].mean()).abs() < threshold).float().mean().item()
        assert found[f"{threshold:g}"]["after_average"][2] == pytest.approx(average, rel=1e-5)


def test_query_zero_adds_one_over_n(gated):
    tokens = torch.randint(0, 256, (2, 30))
    found = measure(gated, [tokens])
    captured = {}
    gated(tokens, probe=lambda layer, name, value: captured.setdefault((layer, name), value))
    share = first_token_share(*captured[0, "qk"], first_query=0).mean().item()
    assert found["first_token_share_with_query_0"][0] == pytest.approx(share, abs=1e-6)


def test_batches_are_averaged_and_the_model_keeps_its_mode(gated):
    a, b = torch.randint(0, 256, (2, 20)), torch.randint(0, 256, (2, 20))
    gated.train()
    both, one, two = measure(gated, [a, b]), measure(gated, [a]), measure(gated, [b])
    assert gated.training
    mean = (one["first_token_share"][1] + two["first_token_share"][1]) / 2
    assert both["first_token_share"][1] == pytest.approx(mean, rel=1e-5)
    larger = max(one["max_activation"]["ffn_output"][1], two["max_activation"]["ffn_output"][1])
    assert both["max_activation"]["ffn_output"][1] == larger


def test_summary_prints_the_uniform_reference_and_no_gate_without_one():
    found = summary(measure(build_lm("lm_nano"), [torch.randint(0, 256, (2, 50))]))
    assert found["gate_score"] is None and found["uniform"] == pytest.approx(uniform_share(50))


def test_nothing_to_measure_is_said():
    with pytest.raises(InputError, match="no batch"):
        measure(build_lm("lm_nano"), [])


def test_nonsparse_scores_stay_in_their_range_in_the_probe():
    model, probe = build_lm("lm_nano", variant="g1_nonsparse"), Probe()
    with torch.no_grad():
        model(torch.randint(0, 256, (2, 20)), probe=probe)
    histogram = probe.result()["gate"]["histogram"][0]
    assert sum(histogram[:10]) == 0 and sum(histogram[10:]) == pytest.approx(1.0)


def test_a_model_that_could_not_be_measured_keeps_its_mode():
    model = build_lm("lm_nano", layers=1, context=8).train()
    with pytest.raises(InputError):
        measure(model, [torch.randint(256, (1, 9))])
    assert model.training


def test_switched_values_have_no_single_map():
    model = build_lm("lm_nano", layers=1, variant="switch_v_8top2")
    with pytest.raises(InputError, match="values come from a SwitchProjection"):
        value_output_rank(model.blocks[0].attention)
