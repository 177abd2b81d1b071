"""The static cache: the growing cache's tokens from a step whose shapes never change, compiled once."""

import pytest
import torch
from test_cli import shell
from test_generate import TINY, prompts, run, tiny
from torch._dynamo.utils import counters

from minigated import kernels, static_cache
from minigated.attention import attention_sdpa
from minigated.device import reset_compilation
from minigated.errors import InputError
from minigated.fused_step import decode_fused, unserved
from minigated.generate import generate
from minigated.moe import choose_form, experts_batched
from minigated.static_cache import SHORT, StaticCache, StepCache, decode, likeliest
from minigated.variants import VARIANTS

DENSE = [name for name, row in VARIANTS.items() if row.dense]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def cheap_compiler(monkeypatch):
    """Graphs without the C++ compiler's seconds; one test below takes the real one."""
    monkeypatch.setattr(static_cache, "BACKEND", "aot_eager")
    reset_compilation()


# ------------------------------------------------------------------------------------ same tokens
@pytest.mark.parametrize("variant", DENSE)
def test_static_equals_growing_equals_uncached(variant):
    model = tiny(variant)
    options = {"new_tokens": 19, "temperature": 0}
    growing, plain = (run(model, prompts(), cache=kept, **options) for kept in (True, False))
    static = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), **options)
    assert torch.equal(static, growing) and torch.equal(static, plain)


@pytest.mark.parametrize("variant", ["none", "g1_elementwise", "g2_elementwise", "g3_elementwise"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_compiled_equals_growing(variant, temperature):
    model = tiny(variant)
    options = {"new_tokens": 19, "temperature": temperature}
    found = run(model, prompts(), cache=StaticCache(model, 2), **options)
    assert torch.equal(found, run(model, prompts(), **options))


def test_the_real_compiler_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(static_cache, "BACKEND", "inductor")
    model = tiny("g2_elementwise", experts=4, top_k=2)
    found = run(model, prompts(), cache=StaticCache(model, 2), new_tokens=19, temperature=0)
    assert torch.equal(found, run(model, prompts(), new_tokens=19, temperature=0))


@pytest.mark.parametrize("batch", [1, 2, 6])  # 6 rows: more assignments than experts
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_experts(batch, way):
    model, prompt = tiny("g1_elementwise", experts=4, top_k=2, shared_width=8), prompts(batch=batch)
    found = run(model, prompt, cache=StaticCache(model, batch, way=way), new_tokens=12, temperature=0)
    assert torch.equal(found, run(model, prompt, new_tokens=12, temperature=0))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
def test_grouped_heads(heads):
    model = tiny("g1_elementwise", heads=heads[0], kv_heads=heads[1])
    found = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), new_tokens=19, temperature=0)
    assert torch.equal(found, run(model, prompts(), new_tokens=19, temperature=0))


def test_scaled_positions():
    model = tiny("none", rope_scaling="yarn", rope_factor=2.0, trained_context=12)
    found = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), new_tokens=19, temperature=0)
    assert torch.equal(found, run(model, prompts(), new_tokens=19, temperature=0))


def test_logits_of_every_step_in_float64():
    model, tokens = tiny("g3_elementwise").double(), prompts(20)
    cache = StaticCache(model, 2, way="eager")
    found = [cache.start(tokens[:, :4]).clone()]
    found += [cache.step(tokens[:, i]).clone() for i in range(4, 20)]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(found, 1), model(tokens)[:, 3:], rtol=1e-9, atol=1e-11)


def test_under_autocast_it_equals_growing():
    """Keys and values come in another dtype than the cache has."""
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), new_tokens=12, temperature=0)
        assert torch.equal(found, run(model, prompts(), new_tokens=12, temperature=0))


def test_a_cache_made_in_inference_mode_serves_outside_of_it():
    model = tiny()
    with torch.inference_mode():
        cache = StaticCache(model, 2, way="eager")
    found = run(model, prompts(), cache=cache, new_tokens=6, temperature=0)
    assert torch.equal(found, run(model, prompts(), new_tokens=6, temperature=0))


def test_one_cache_serves_texts_of_many_lengths_one_after_the_other():
    model = tiny("g2_elementwise")
    cache = StaticCache(model, 2)
    for length, new in ((12, 12), (3, 5), (1, 23), (20, 2)):
        found = run(model, prompts(length), cache=cache, new_tokens=new, temperature=0)
        assert torch.equal(found, run(model, prompts(length), new_tokens=new, temperature=0))


def test_stop_tokens_end_rows_as_before():
    model = tiny()
    free = run(model, prompts(), new_tokens=19, temperature=0)
    stop = (free[0, 3].item(), free[1, 6].item())
    found = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), stop=stop, temperature=0)
    assert torch.equal(found, run(model, prompts(), stop=stop, temperature=0)) and found.shape[1] < 19


# ------------------------------------------------------------------------------------ planted bugs show
def ungrouped(self, q, k, v):
    """The heads of a group taken from the wrong end: head h would read key/value head h modulo K."""
    order = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2)  # [B, K, H/K, 1, D]
    out = torch.nn.functional.scaled_dot_product_attention(order.flatten(2, 3), k, v, attn_mask=self.seen)
    return out.unflatten(2, (-1, 1)).transpose(1, 2).flatten(1, 2)


PLANTED = {
    "no mask": ("attend", lambda self, q, k, v: attention_sdpa(q, k, v)),
    "wrong groups": ("attend", ungrouped),
    "written one too far": ("append", lambda self, k, v: KEPT(moved(self), k, v)),
    "nothing written": ("append", lambda self, k, v: (self.k, self.v)),
}
KEPT = StepCache.append


def moved(cache: StepCache) -> StepCache:
    return StepCache(cache.k, cache.v, (cache.length + 1) % cache.k.shape[2], cache.seen)


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_shows(bug, monkeypatch):
    monkeypatch.setattr(StepCache, *PLANTED[bug])
    model = tiny()
    found = run(model, prompts(), cache=StaticCache(model, 2, way="eager"), new_tokens=19, temperature=0)
    growing = run(model, prompts(), new_tokens=19, temperature=0)
    assert torch.equal(found[:, 0], growing[:, 0]), "the first token comes from the prompt alone"
    assert not torch.equal(found, growing)


def test_a_position_that_stands_still_shows(monkeypatch):
    model = tiny()
    cache = StaticCache(model, 2, way="eager")
    cache.decode = lambda net, tokens, position, held: decode(net, tokens, position * 0 + 5, held)
    assert not torch.equal(
        run(model, prompts(), cache=cache, new_tokens=19, temperature=0),
        run(model, prompts(), new_tokens=19, temperature=0),
    )


# ------------------------------------------------------------------------------------ one graph
def test_one_graph_for_all_tokens_texts_and_caches():
    model = tiny("g2_elementwise")
    cache, before = StaticCache(model, 2), graphs()
    run(model, prompts(), cache=cache, new_tokens=19, temperature=0)
    assert graphs() - before == 1
    run(model, prompts(9), cache=cache, new_tokens=8)
    run(model, prompts(2), cache=StaticCache(model, 2), new_tokens=8, temperature=0)
    assert graphs() - before == 1 and not counters["graph_break"]


def test_the_growing_cache_needs_a_graph_for_every_length():
    """What the static cache is for: the same count sees it."""
    model, before = tiny().eval(), graphs()
    step = torch.compile(model, backend="eager", dynamic=False)
    cache = model.new_cache(2, 24)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=32):
        for column in prompts().unbind(1):
            step(column[:, None], cache)
    assert graphs() - before == 5


def test_memory_is_taken_once():
    model = tiny()
    cache = StaticCache(model, 2, way="eager")
    places = [tensor.data_ptr() for pair in cache.held for tensor in pair]
    run(model, prompts(), cache=cache, temperature=0)
    assert places == [tensor.data_ptr() for pair in cache.held for tensor in pair]
    assert cache.held[0][0].shape == (2, 2, TINY.context, 8)


def test_many_rows_in_float32_read_nothing_back_when_compiled():
    x = torch.zeros(2, 8, dtype=torch.float64)
    assert choose_form("auto", x, 8) is experts_batched
    chosen = torch.compile(lambda x: choose_form("auto", x, 8).keywords["capacity"], backend="eager", fullgraph=True)
    with torch.no_grad():
        assert chosen(x) == 2


# ------------------------------------------------------------------------------------ the likeliest token
def test_likeliest_is_the_first_of_equals_and_refuses_spoilt_rows():
    nan, inf = float("nan"), float("inf")
    rows = [[0, 2, 2, 1], [0, nan, 5, 1], [0, inf, 5, 1], [-inf, -inf, -inf, -inf], [-inf, -inf, -3, -3]]
    assert likeliest(torch.tensor(rows, dtype=torch.float32)).tolist() == [1, -1, -1, -1, 2]


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_spoilt_model_is_named(way):
    model = tiny()
    cache = StaticCache(model, 2, way=way)
    stream = generate(model, prompts(), 6, temperature=0, cache=cache)
    next(stream)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="no token can be drawn"):
        list(stream)


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ({"batch": 1}, {}, "made for a batch of 1; a batch of 2 was given"),
        ({"length": 8}, {"new_tokens": 4}, "5 tokens of prompt and 4 new ones do not fit into a static cache of 8"),
        ({"length": 4}, {}, "5 tokens of prompt and 1 new ones do not fit into a static cache of 4"),
        ({}, {"tokens": prompts(24)}, "24 tokens, which leaves no room in the context of 24; accepted: 23 at most"),
        ({"length": 8}, {"tokens": prompts(24)}, "24 tokens, which leaves no room in the context of 24"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(made, asked, said):
    model = tiny()
    cache = StaticCache(model, **{"batch": 2, "way": "eager", **made})
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    with pytest.raises(InputError, match=said) as refused:
        generate(model, **{"tokens": prompts(), "cache": cache, **asked})
    assert "\n" not in str(refused.value)


def test_without_a_number_it_runs_until_the_cache_is_full():
    model = tiny()
    assert run(model, prompts(), cache=StaticCache(model, 2, 9, way="eager")).shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "a batch of 0; accepted: 1 or more"),
        ({"length": 25}, "a static cache of 25 tokens; accepted: 2 to 24, the context"),
        ({"length": 1}, "accepted: 2 to 24"),
        ({"way": "quick"}, "unknown way of a static cache 'quick'; accepted: eager, compiled, fused"),
    ],
)
def test_impossible_caches_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        StaticCache(tiny(), **options)


@pytest.mark.parametrize(
    ("variant", "batch", "options", "why"),
    [
        ("none", 1, {}, None),
        ("kv_heads_doubled", 1, {}, None),
        ("g1_elementwise", 1, {}, None),
        ("g1_headwise", 1, {"qk_norm": False}, None),
        ("none", 2, {}, "does one row, not 2"),
        ("g1_shared", 1, {}, "does not know variant 'g1_shared'; accepted: no gate, g1_elementwise or g1_headwise"),
        ("g1_silu", 1, {}, "variant 'g1_silu'"),
        ("g1_additive_silu", 1, {}, "variant 'g1_additive_silu'"),
        ("g2_elementwise", 1, {}, "variant 'g2_elementwise'"),
        ("g1_rmsnorm", 1, {}, "variant 'g1_rmsnorm'"),
        ("sandwich_norm", 1, {}, "variant 'sandwich_norm'"),
        ("clip_100", 1, {}, "variant 'clip_100'"),
        ("none", 1, {"experts": 4, "top_k": 2}, "knows no mixture of experts"),
        ("none", 1, {"qk_order": ("gate", "rope", "norm")}, "norms queries and keys before the rotation"),
        ("none", 1, {"qk_order": ("gate", "rope", "norm"), "qk_norm": False}, None),
    ],
)
def test_the_fused_step_says_what_it_does_not_serve_and_is_not_taken_there(variant, batch, options, why, monkeypatch):
    model = tiny(variant, **options)
    assert StaticCache(model, batch).way == "compiled"
    with pytest.raises(InputError, match="needs Triton .*, a GPU .* is on cpu, torch.float32" if why is None else why):
        StaticCache(model, batch, way="fused")
    monkeypatch.setattr(kernels, "usable", lambda weight: True)
    assert (unserved(model, batch) is None) == (why is None)
    assert StaticCache(model, batch).way == ("fused" if why is None else "compiled")


def test_the_fused_step_itself_refuses_what_it_does_not_serve():
    model = tiny()
    with pytest.raises(InputError, match="the fused step needs Triton .*, a GPU .* is on cpu, torch.float32"):
        decode_fused(model, torch.zeros(1).long(), torch.zeros(1).long(), [(c.k, c.v) for c in model.new_cache(1, 8)])


def test_scattered_weights_are_not_for_the_fused_step(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda weight: True)
    model = tiny()
    weight = model.blocks[0].attention.o_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert "in one piece" in unserved(model, 1) and StaticCache(model, 1).way == "compiled"


def test_an_infinity_in_the_last_text_does_not_spoil_the_next():
    model = tiny()
    cache = StaticCache(model, 2, way="eager")
    plain = run(model, prompts(), cache=cache, new_tokens=6, temperature=0)
    for k, v in cache.held:
        k[:, :, 12:], v[:, :, 12:] = float("inf"), float("nan")
    assert torch.equal(run(model, prompts(), cache=cache, new_tokens=6, temperature=0), plain)


def test_a_step_before_any_text_starts_at_the_first_place():
    model = tiny()
    for way in ("eager", "compiled"):
        logits = StaticCache(model, 2, way=way).step(torch.tensor([3, 4]))
        torch.testing.assert_close(logits, model(torch.tensor([[3], [4]]))[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, SHORT, SHORT + 1])
def test_a_short_prompt_goes_through_the_recorded_step(length, monkeypatch):
    model, tokens = tiny(), prompts(length)
    cache = StaticCache(model, 2, way="eager")
    cache.recorded, steps = True, []  # as after a recording, which a CPU does not make
    monkeypatch.setattr(cache, "advance", lambda: steps.append(1) or cache._advance())
    for _ in range(2):  # the second text finds what the first left
        torch.testing.assert_close(cache.start(tokens), model(tokens)[:, -1], rtol=1e-4, atol=1e-5)
    assert len(steps) == (2 * length if length <= SHORT else 0)
    assert cache.position.item() == length and cache.caches[0].length == length
    follows = torch.cat([tokens, cache.tokens[:, None]], 1)
    torch.testing.assert_close(cache.step(), model(follows)[:, -1], rtol=1e-4, atol=1e-5)


def test_another_model_and_a_full_cache_are_refused():
    model = tiny()
    cache = StaticCache(model, 2, 6, way="eager")
    with pytest.raises(InputError, match="made for another model"):
        generate(tiny(), prompts(), cache=cache)
    with pytest.raises(InputError, match=r"prompts of shape \[2, 6\].* 2 rows of 1 to 5 tokens"):
        cache.start(prompts(6))
    cache.start(prompts())
    cache.step()
    with pytest.raises(InputError, match="the cache holds 6 tokens; 7 were given"):
        cache.step()


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 99], "token 99 is unknown; accepted: 0 to "),
        ([-1, 1], "token -1 is unknown"),
        ([1.0, 2.0], "tokens are torch.float32; accepted: whole numbers"),
    ],
)
def test_unknown_tokens_are_refused_and_change_nothing(tokens, said):
    cache = StaticCache(tiny(), 2, way="eager")
    expected = [cache.start(prompts()), cache.step(torch.tensor([1, 2]))]
    found = [cache.start(prompts())]
    with pytest.raises(InputError, match=said):
        cache.start(torch.tensor(tokens)[:, None])
    with pytest.raises(InputError, match=said):
        cache.step(torch.tensor(tokens))
    assert torch.equal(torch.stack([*found, cache.step(torch.tensor([1, 2]))]), torch.stack(expected))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_a_step_takes_one_token_a_row(shape):
    cache = StaticCache(tiny(), 2, way="eager")
    with pytest.raises(InputError, match=r"tokens of shape \[.*\]; accepted: \[2\], one a row"):
        cache.step(torch.zeros(shape, dtype=torch.int64))
    assert cache.caches[0].length == 0


def test_prompts_are_rows_of_whole_numbers():
    cache = StaticCache(tiny(), 2, way="eager")
    with pytest.raises(InputError, match=r"prompts of shape \[2\]; this static cache takes 2 rows of 1 to 23 tokens"):
        cache.start(torch.tensor([1, 2]))
    assert torch.equal(cache.start(prompts().to(torch.uint8)), cache.start(prompts()))


def test_a_gpu_gives_what_the_cpu_gives(device):
    model = tiny("g2_elementwise")
    there = run(model, prompts(), new_tokens=10, temperature=0)
    model = model.to(device)
    cache = StaticCache(model, 2)
    for seed in (0, 1):  # the second text only replays
        assert torch.equal(run(model, prompts(), seed, cache=cache, new_tokens=10, temperature=0), there)
    sampled = run(model, prompts(), cache=cache, new_tokens=10, temperature=0.8)
    assert torch.equal(sampled, run(model, prompts(), new_tokens=10, temperature=0.8))


FUSED = [
    ("none", torch.float32, {"heads": 3, "kv_heads": 1, "head_width": 20}),
    ("g1_headwise", torch.float32, {"qk_norm": False}),
    ("g1_elementwise", torch.float32, {"rope_scaling": "yarn", "rope_factor": 2.0, "trained_context": 100}),
    ("none", torch.bfloat16, {"tied": True}),
    ("g1_elementwise", torch.float16, {"heads": 4, "kv_heads": 4, "head_width": 128}),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("variant", "dtype", "options"), FUSED)
@pytest.mark.parametrize("number", [0, 1])
def test_the_fused_step_equals_the_eager_one_on_a_gpu(variant, dtype, options, number):
    if number >= torch.cuda.device_count():
        pytest.skip("needs a second CUDA device")
    place = torch.device("cuda", number)  # not the current one: `number` 1 finds kernels that start on another device
    model = tiny(variant, context=200, vocabulary=2500, **options).to(place, dtype)
    tokens = torch.randint(2500, (1, 150), generator=torch.Generator().manual_seed(0)).to(place)
    logits = []
    for way in ("eager", "fused"):
        cache, found = StaticCache(model, 1, way=way), []
        for length in (4, SHORT + 4):  # a prompt through the recorded step; one that the model reads, then a replay
            found.append(cache.start(tokens[:, :length]).clone())
            for i in range(length, 150):
                found.append(cache.step(tokens[:, i]).clone())
                assert torch.equal(cache.tokens, likeliest(found[-1]))
        logits.append(torch.stack(found).double())
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_that_start_early_change_no_bit(monkeypatch):
    from minigated.kernels import decode_triton

    sizes = {"width": 1024, "heads": 8, "kv_heads": 4, "head_width": 128, "ffn_width": 3072, "layers": 6}
    sizes |= {"context": 600}
    model = tiny("g1_elementwise", vocabulary=20_000, **sizes).to("cuda", torch.bfloat16)
    tokens, logits = torch.randint(20_000, (1, 500), generator=torch.Generator().manual_seed(0)).cuda(), []
    for early in (True, False):
        monkeypatch.setattr(decode_triton, "EARLY", early)
        cache = StaticCache(model, 1, way="fused")
        cache.start(tokens)
        logits.append(torch.stack([cache.step().clone() for _ in range(99)]))
    assert torch.equal(*logits)


# ------------------------------------------------------------------------------------ the command
def test_the_command_writes_the_same_text():
    said = [shell("generate", "ROMEO:", "--tokens", "12", "--temperature", "0", *more) for more in ([], ["--static"])]
    assert [done.returncode for done in said] == [0, 0], said[1].stderr
    assert said[0].stdout == said[1].stdout


def test_the_command_refuses_a_long_prompt_in_one_line():
    done = shell("generate", "x" * 300, "--static")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "leaves no room in the context" in done.stderr
