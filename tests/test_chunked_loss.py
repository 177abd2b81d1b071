"""The loss by chunks against the plain one: values, gradients, what is never there, what is refused."""

import pytest
import torch
from kept_storages import kept_storages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from minigated import chunked_loss
from minigated.bench import suite_lm
from minigated.bench.lm_rows import TrainingLoss as BenchLoss
from minigated.chunked_loss import IGNORED, chunked_cross_entropy, plain_cross_entropy
from minigated.errors import InputError
from minigated.lm import TrainingLoss, build_lm, lm_loss

TOKENS, WIDTH, VOCABULARY = 26, 16, 37
CHUNKS = [1, 5, 13, 26, 100]  # one by one, uneven, even, exactly all, more than all
SMALL = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "vocabulary": 61, "context": 32}


def drawn(device="cpu", dtype=torch.float32, ignored=()) -> tuple[torch.Tensor, ...]:
    """Hidden [2, 13, C] and weight [V, C] that want gradients, targets [2, 13]."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, TOKENS // 2, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(device, dtype)
    targets = torch.randint(VOCABULARY, (2, TOKENS // 2), generator=generator).to(device)
    for place in ignored:
        targets.view(-1)[place] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def answers(loss, hidden, weight, targets, **options) -> list[torch.Tensor]:
    """Loss and gradients, of three times the loss so that the scale from outside counts too."""
    value = loss(hidden, weight, targets, **options)
    return [value, *torch.autograd.grad(3 * value, (hidden, weight))]


def off(found, expected) -> float:
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, expected))


def small(name: str = "lm_nano"):
    torch.manual_seed(0)
    return build_lm(name, **SMALL, ffn_width=16)


def windows(tokens: int = 17) -> torch.Tensor:
    return torch.randint(61, (2, tokens), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ equal to the plain form
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ignored", [(), (0, 7, 25), tuple(range(5, 10))], ids=["all", "some", "a whole chunk"])
def test_loss_and_gradients_are_those_of_the_plain_form(chunk, ignored, device):
    given = drawn(device, torch.float64, ignored)
    found, expected = answers(chunked_cross_entropy, *given, chunk=chunk), answers(plain_cross_entropy, *given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_other_precisions(dtype, tolerance, device):
    given = drawn(device, dtype, ignored=(4,))
    found, expected = answers(chunked_cross_entropy, *given, chunk=5), answers(plain_cross_entropy, *given)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
    assert off(found, expected) < tolerance


def test_under_autocast_the_sum_over_chunks_is_not_rounded(device):
    """bfloat16 products, float32 loss and gradients; the weight's gradient is nearer to the exact one than torch's."""
    hidden, weight, targets = drawn(device)
    many = hidden.detach().repeat(40, 1, 1).requires_grad_(), weight, targets.repeat(40, 1)
    exact = answers(plain_cross_entropy, *many)
    with torch.autocast(device, torch.bfloat16):
        found, plain = answers(chunked_cross_entropy, *many, chunk=64), answers(plain_cross_entropy, *many)
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert off(found, plain) < 5e-3 and off(found, exact) < 1e-2
    assert 1e-6 < off(found[2:], exact[2:]) < off(plain[2:], exact[2:])


def test_gradients_by_finite_differences():
    hidden, weight, targets = drawn(dtype=torch.float64, ignored=(2,))
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets, 5), (hidden, weight))


def test_no_token_counts_and_another_mark():
    hidden, weight, targets = drawn(ignored=range(TOKENS))
    assert chunked_cross_entropy(hidden, weight, targets, 5).isnan()
    for slope in torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, 5), (hidden, weight)):
        assert slope.eq(0).all(), "where no token counts, the gradients are 0, as torch's"
    hidden, weight, targets = drawn()
    marked = targets.masked_fill(targets == targets[0, 0], VOCABULARY + 5)
    found = chunked_cross_entropy(hidden, weight, marked, 5, ignore_index=VOCABULARY + 5)
    torch.testing.assert_close(found, plain_cross_entropy(hidden, weight, marked, VOCABULARY + 5))


def test_no_tokens_at_all():
    _, weight, _ = drawn()
    hidden, targets = torch.empty(2, 0, WIDTH, requires_grad=True), torch.empty(2, 0, dtype=torch.int64)
    for found, expected in zip(
        answers(chunked_cross_entropy, hidden, weight, targets, chunk=5),
        answers(plain_cross_entropy, hidden, weight, targets),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_one_token_without_an_axis_of_tokens():
    hidden, weight, targets = drawn()
    alone = hidden.detach()[0, 0].requires_grad_(), weight, targets[0, 0]
    found, expected = answers(chunked_cross_entropy, *alone, chunk=5), answers(plain_cross_entropy, *alone)
    assert found[1].shape == (WIDTH,)
    torch.testing.assert_close(found, expected)


def test_a_sum_over_many_tokens_passes_the_range_of_float16_and_its_mean_does_not():
    hidden = torch.full((1, 8192, 4), 20.0).half().requires_grad_()
    weight = (0.01 * torch.randn(11, 4, generator=torch.Generator().manual_seed(0))).half().requires_grad_()
    given = hidden, weight, torch.zeros(1, 8192, dtype=torch.int64)
    found, expected = answers(chunked_cross_entropy, *given, chunk=1024), answers(plain_cross_entropy, *given)
    assert [t.dtype for t in found[1:]] == [torch.float16] * 2 and found[2].isfinite().all()
    assert off(found, expected) < 5e-3


def test_a_target_outside_of_the_vocabulary_is_an_error():
    hidden, weight, targets = drawn()
    targets[0, 0] = VOCABULARY
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, weight, targets, 5)


# ------------------------------------------------------------------------------------ what is never there
class Largest(TorchDispatchMode):
    """Watches the results of all operations, also inside the operator: the most numbers in one of them."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return result


def largest(loss, **options) -> int:
    """The most numbers in a tensor of a forward and a backward pass, with more logits than weights."""
    hidden = torch.randn(60, 4, requires_grad=True)
    weight, targets = torch.randn(200, 4, requires_grad=True), torch.randint(200, (60,))
    with Largest() as seen:
        loss(hidden, weight, targets, **options).backward()
    return seen.numbers


def test_logits_are_never_there_at_once():
    assert largest(plain_cross_entropy) == 60 * 200
    watched = chunked_loss.loss_and_gradients._init_fn  # an operator hides what it does; its function does not
    hidden, weight, targets = torch.randn(60, 4), torch.randn(200, 4), torch.randint(200, (60,))
    with Largest() as inside:
        watched(hidden, weight, targets, 10, IGNORED, torch.float32, True, True, False)
    assert inside.numbers == 10 * 200 and largest(chunked_cross_entropy, chunk=10) <= 200 * 4


def kept_bytes(loss) -> int:
    """Bytes of different storages that autograd keeps for the backward pass of `loss()`."""
    with kept_storages() as held:
        loss()
    return sum(held.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_gradients_are_kept_and_no_logits(compiled):
    hidden = torch.randn(60, 4, requires_grad=True)
    weight, targets = torch.randn(200, 4, requires_grad=True), torch.randint(200, (60,))
    call = lambda loss, *options: loss(hidden, weight, targets, *options)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, dynamic=False)
    assert kept_bytes(lambda: call(plain_cross_entropy)) > 4 * 60 * 200
    # a few scalars beside the gradients of hidden and weight, and at most both inputs
    assert kept_bytes(lambda: call(chunked_cross_entropy, 10)) <= 2 * 4 * (60 * 4 + 200 * 4) + 8 * 60 + 64


def test_nothing_is_computed_for_gradients_nobody_asks_for(monkeypatch):
    asked = []
    real = chunked_loss.loss_and_slope
    monkeypatch.setattr(chunked_loss, "loss_and_slope", lambda *given: asked.append(given[-1]) or real(*given))
    hidden, weight, targets = drawn()
    with torch.no_grad():
        value = chunked_cross_entropy(hidden, weight, targets, 13)
    assert asked == [False, False] and not value.requires_grad
    torch.testing.assert_close(value, plain_cross_entropy(hidden, weight, targets))
    chunked_cross_entropy(hidden.detach(), weight, targets, 13)
    assert asked[2:] == [True, True]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_gradient(frozen, compiled):
    """By the bytes kept; the products saved are counted below."""
    hidden, weight, targets = torch.randn(60, 40), torch.randn(200, 40), torch.randint(200, (60,))
    trained, other = (weight, hidden) if frozen == "hidden" else (hidden, weight)
    trained.requires_grad_()
    call = lambda loss, *options: loss(hidden, weight, targets, *options)
    expected = torch.autograd.grad(call(plain_cross_entropy), trained)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, dynamic=False)
    assert kept_bytes(lambda: call(chunked_cross_entropy, 10)) < trained.nbytes + min(other.nbytes, 4000)
    torch.testing.assert_close(torch.autograd.grad(call(chunked_cross_entropy, 10), trained), expected)


def test_products_that_each_gradient_costs():
    hidden, weight, targets = torch.randn(60, 4), torch.randn(200, 4), torch.randint(200, (60,))
    for needs in [(False, False), (True, False), (False, True), (True, True)]:
        with FlopCounterMode(display=False) as counter:
            chunked_loss.loss_and_gradients._init_fn(hidden, weight, targets, 10, IGNORED, torch.float32, *needs, False)
        assert counter.get_total_flops() == (1 + sum(needs)) * 2 * 60 * 200 * 4


def test_a_second_derivative_is_refused():
    hidden, weight, targets = drawn()
    scale = torch.ones((), requires_grad=True)
    loss = scale * chunked_cross_entropy(hidden, weight, targets, 5)
    (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# ------------------------------------------------------------------------------------ compiled
def test_compiled_whole_it_is_equal_and_what_lies_between_is_compiled_too(monkeypatch):
    torch._dynamo.reset()
    calls, real = [], chunked_loss._compiled_between
    monkeypatch.setattr(chunked_loss, "_compiled_between", lambda: calls.append(1) or real())
    given = drawn(ignored=(3,))
    fast = torch.compile(lambda *args: chunked_cross_entropy(*args, chunk=5), fullgraph=True)
    assert off(answers(fast, *given), answers(plain_cross_entropy, *given)) < 1e-6
    assert calls
    before = len(calls)
    answers(chunked_cross_entropy, *given, chunk=5)
    assert len(calls) == before, "eager callers stay eager"


# ------------------------------------------------------------------------------------ in the language model
@pytest.mark.parametrize("name", ["lm_nano", "moe_nano"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_a_model_trains_the_same_with_chunks(name, tied):
    torch.manual_seed(0)
    options = {**SMALL, "ffn_width": 16, "tied": tied}
    model, batch = build_lm(name, **options), windows()
    values = [loss(model, batch) for loss in (TrainingLoss(), TrainingLoss(chunk=7))]
    plain, chunked = (torch.autograd.grad(value, list(model.parameters())) for value in values)
    torch.testing.assert_close(values[1], values[0])
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_models_own_loss_is_the_one_outside():
    model, batch = small(), windows()
    torch.testing.assert_close(model(batch[:, :-1], targets=batch[:, 1:]), lm_loss(model, batch), rtol=0, atol=0)
    torch.testing.assert_close(lm_loss(model, batch, chunk=5), lm_loss(model, batch))
    assert model(batch[:, :-1]).shape == (2, 16, 61)


def test_a_model_compiled_whole_has_no_graph_break_in_its_loss():
    torch._dynamo.reset()
    model, batch = small(), windows()
    loss = torch.compile(lambda: lm_loss(model, batch, chunk=8), fullgraph=True)
    torch.testing.assert_close(loss(), lm_loss(model, batch))


def test_the_bench_measures_both_losses(monkeypatch):
    calls, real = [], chunked_loss.loss_and_slope
    monkeypatch.setattr(chunked_loss, "loss_and_slope", lambda *given: calls.append(1) or real(*given))
    assert BenchLoss is TrainingLoss
    sized = {"tiny": (suite_lm.shape(32, 2, 2, 2, 32, 64, 32), 2, 16)}
    rows = suite_lm.loss_rows(*sized["tiny"], torch.device("cpu"), "eager")
    assert len(rows) == 1 and "chunk" in rows[0].name and rows[0].state == "equal"
    found, expected = rows[0].prepare().check()
    assert off(found, expected) < 1e-5 and len(calls) == 8  # 32 tokens, 4 a chunk; none from the plain form
    assert any("chunk" in row.name for case in suite_lm.cases("cpu", torch.device("cpu")) for row in case.rows)


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize("chunk", [0, -3, 2.5])
def test_a_chunk_that_is_none_is_named(chunk):
    with pytest.raises(InputError, match=f"chunk is {chunk}; accepted: a whole number of tokens, at least 1"):
        chunked_cross_entropy(*drawn(), chunk)


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, targets = drawn()
    with pytest.raises(InputError, match=r"\[2, 13, 16\], \[37, 16\], \[2, 12\]"):
        chunked_cross_entropy(hidden, weight, targets[:, 1:], 5)
    with pytest.raises(InputError, match=r"\[37, 15\]"):
        chunked_cross_entropy(hidden, weight[:, 1:], targets, 5)
    with pytest.raises(InputError, match=r"\[\], \[16\], \[\]; accepted: \[..., C\]"):
        chunked_cross_entropy(hidden[0, 0, 0], weight[0], targets[0, 0], 5)


def test_a_chunk_without_targets_is_refused():
    with pytest.raises(InputError, match="chunk 8 without targets"):
        small()(windows(), chunk=8)
