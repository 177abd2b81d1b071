"""Chapter 6: what must hold of sigmoid attention, readings that meet, and the mixer as a module."""

import copy
import math
import pickle

import pytest
import torch
from swat_cases import ALTERNATIVES, DEFAULT, assert_same, build, different, draw
from torch import nn

import minigated.swat as swat
from minigated.decay import rmt_log_decay
from minigated.errors import InputError
from minigated.swat import SwatAttention, SwatOptions, SwatTableBuilder, balanced_slopes, swat_pass
from minigated.swat_options import NORMS, READINGS


# ------------------------------------------------------------------------------------ properties
def weights_of(tables, q, k, which="column"):
    """Weights [H, W, W] of a pass for q, k [W, H, D], through the public function: v is the identity."""
    bias, decay = getattr(tables, f"{which}_bias")[0], getattr(tables, f"{which}_decay")[-1]
    cells, heads, _ = q.shape
    eye = torch.eye(cells, dtype=q.dtype).unsqueeze(1).expand(cells, heads, cells)
    line = (t.view(1, 1, cells, heads, -1) for t in (q, k, eye))
    return swat_pass(*line, bias, decay, 2)[0, 0].transpose(0, 1)  # [H, W, W]


def test_rows_do_not_sum_to_one_and_forbidden_pairs_are_exactly_zero():
    _, builder = build(heads=2, window=4)
    tables = builder(8, 8)
    weights = weights_of(tables, draw(4, 2, 4), draw(4, 2, 4, seed=1))
    assert (weights.sum(-1) - 1).abs().min() > 1e-3
    assert weights.max() < 1
    forbidden = tables.column_decay[-1] == 0
    assert forbidden.any() and (weights[forbidden] == 0).all() and (weights[~forbidden] > 0).all()


def test_a_key_without_a_value_is_nobodys_business():
    q, k, v = (draw(1, 1, 5, 2, 4, seed=seed) for seed in range(3))
    v[:, :, 2], other = 0, k.clone()
    other[:, :, 2] = draw(2, 4, seed=3)
    tables = tables_of(2, size=(1, 5), window=None)
    attend = lambda k, weigh: swat_pass(q, k, v, tables.column_bias, tables.column_decay, 2, weigh=weigh)
    assert_same(attend(k, NORMS["none"].weights), attend(other, NORMS["none"].weights))
    shared = NORMS["row_sum"].weights  # shares, as in a softmax: one key's score is everybody's business
    assert (attend(k, shared) - attend(other, shared)).abs().max() > 0.01


@pytest.mark.parametrize(("window", "flat", "dimmed"), [(4, 2.0, 1.85), (7, 3.5, 3.0), (8, 4.0, 3.4), (14, 7.0, 5.3)])
def test_a_row_sums_to_about_half_the_window_at_the_start(window, flat, dimmed):
    nothing = torch.zeros(window, 2, 4, dtype=torch.float64)  # scores of zero, as before training
    for rate, expected in ((0.0, flat), (math.log(0.9375), dimmed)):
        builder = SwatTableBuilder(2, 4, torch.full((2,), rate), window, options=SwatOptions(alibi="none")).double()
        sums = weights_of(builder(window, window), nothing, nothing).sum(-1)
        assert abs(float(sums.mean()) - expected) < 0.06
    growth = float(sums.mean()) ** 2
    assert window != 7 or 8.5 < growth < 9.5  # two passes, decay 0.9375


def test_two_passes_grow_values_that_agree_far_more_than_values_that_do_not():
    qk = torch.zeros(1, 7, 7, 2, 2, 4, dtype=torch.float64)
    tables = SwatTableBuilder(2, 4, torch.zeros(2), 7, options=SwatOptions(alibi="none")).double()(7, 7)
    agreeing, mixed = torch.ones(1, 7, 7, 2, 4, dtype=torch.float64), draw(1, 7, 7, 2, 4)
    assert_same(swat.swat_decomposed(qk, agreeing, tables), 3.5**2 * agreeing)
    assert swat.swat_decomposed(qk, mixed, tables).std() < 3 * mixed.std()


def test_the_norm_makes_the_branch_blind_to_the_scale_of_values():
    qk, v = draw(1, 5, 5, 2, 2, 4), draw(1, 5, 5, 2, 4, seed=1)
    tables = build(heads=2)[1](5, 5)
    z = swat.swat_decomposed(qk, v, tables).flatten(-2)
    for name, reading in NORMS.items():
        norm = reading.module(8, 2).double()
        same = torch.allclose(norm(z), norm(50 * z), atol=1e-2)
        assert same == (name in ("layer", "rms", "head")), name


# ------------------------------------------------------------------------------------ readings that meet
def tables_of(heads=4, log_decay=None, size=(5, 7), window=3, **options):
    log_decay = rmt_log_decay(heads, dtype=torch.float64) if log_decay is None else log_decay
    return SwatTableBuilder(heads, 4, log_decay, window, True, SwatOptions(**options)).double()(*size)


def assert_same_tables(a, b):
    for name in ("row_bias", "column_bias", "row_decay", "column_decay"):
        assert_same(getattr(a, name), getattr(b, name), 1e-14)


def test_outer_slopes_are_a_multiplicative_exponential():
    slopes = balanced_slopes(4, dtype=torch.float64)
    outer = tables_of(alibi="outer")
    assert_same_tables(outer, tables_of(alibi="none", log_decay=slopes))  # the slopes in place of log gamma
    far = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    assert_same(outer.column_decay[0], torch.exp(slopes[:, None, None] * far), 1e-14)
    assert not outer.column_bias.any()


def test_magnitudes_are_a_decay():
    slopes = balanced_slopes(4, dtype=torch.float64)
    assert_same_tables(tables_of(alibi="magnitude"), tables_of(alibi="none", log_decay=-slopes.abs()))
    assert tables_of(alibi="magnitude").row_decay.max() <= 1 < tables_of(alibi="outer").row_decay.max()


def test_slopes_of_zero_are_no_slopes_and_rates_of_one_no_decay(monkeypatch):
    assert_same_tables(tables_of(decay=False), tables_of(log_decay=torch.zeros(4)))
    none = tables_of(alibi="none")
    monkeypatch.setattr(SwatOptions, "signs", lambda self, heads: (torch.zeros(heads, dtype=torch.float64),) * 2)
    assert_same_tables(tables_of(alibi="both"), none)


def test_distance_and_pass_signs_on_the_tables():
    signed, absolute = tables_of(), tables_of(distance="absolute")
    assert_same(signed.column_bias.abs(), absolute.column_bias.abs())
    assert_same(signed.column_bias, -signed.column_bias.mT)  # looks to one side
    assert_same(absolute.column_bias, absolute.column_bias.mT)
    opposed, quadrants = tables_of(pass_signs="opposed"), tables_of(pass_signs="quadrants")
    assert_same(opposed.row_bias, -opposed.column_bias)
    signs = [
        (float(column), float(row))
        for column, row in zip(quadrants.column_bias[0, :, 1, 0].sign(), quadrants.row_bias[0, :, 1, 0].sign())
    ]
    assert len(set(signs)) == 4  # each head its own direction


def test_normalising_by_the_window_is_a_factor():
    x = draw(1, 5, 7, 16)
    seen = {}
    for name in ("none", "window"):
        module, tables = build(SwatOptions(norm=name))
        module(x, tables(5, 7), probe=lambda key, value, name=name: seen.__setitem__((name, key), value))
    assert_same(seen["window", "attended"] * 9, seen["none", "attended"])


def test_rows_of_the_row_sum_reading_do_sum_to_one():
    ones = torch.ones(1, 6, 6, 2, 4, dtype=torch.float64)
    qk, tables = draw(1, 6, 6, 2, 2, 4), build(heads=2)[1](6, 6)
    assert_same(swat.swat_decomposed(qk, ones, tables, NORMS["row_sum"].weights), ones, 1e-5)
    assert (swat.swat_decomposed(qk, ones, tables) - 1).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("one", "other", "window"),
    [
        (dict(value="plain", lce="raw"), dict(value="plain"), 3),
        (dict(lce_place="window"), dict(), None),
        (dict(alibi="outer", distance="absolute"), dict(alibi="outer"), 3),
        (dict(lce="none", norm_place="after_lce"), dict(lce="none"), 3),
    ],
    ids=str,
)
def test_readings_that_cannot_differ(one, other, window):
    x = draw(1, 5, 7, 16)
    first, second = (build(SwatOptions(**o), window=window) for o in (one, other))
    assert_same(first[0](x, first[1](5, 7)), second[0](x, second[1](5, 7)))


# ------------------------------------------------------------------------------------ modules
@pytest.mark.parametrize("options", [DEFAULT, *ALTERNATIVES], ids=different)
def test_no_parameter_and_no_state_holds_positions_slopes_or_decay(options):
    module, builder = build(options)
    assert not list(builder.parameters()) and not builder.state_dict()
    builder(5, 7)
    assert not list(builder.parameters()) and not builder.state_dict()
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names <= {"qkv", "value", "norm", "lce", "out_proj"}
    assert not any(p.shape[-1] in (5, 7) and p.ndim < 3 for p in module.parameters())


def test_all_parameters_get_a_gradient():
    for options in [DEFAULT, *ALTERNATIVES]:
        module, tables = build(options)
        (module(draw(2, 5, 7, 16), tables(5, 7)) * draw(2, 5, 7, 16, seed=1)).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_precisions(dtype, device):
    module, tables = build()
    x = draw(2, 5, 7, 16)
    exact = module(x, tables(5, 7))
    low, low_tables = copy.deepcopy(module).to(device, dtype), copy.deepcopy(tables).to(device, dtype)
    made = low_tables(5, 7)
    assert {t.dtype for t in made if isinstance(t, torch.Tensor)} == {torch.float32}
    found = low(x.to(device, dtype), made)
    assert found.dtype == dtype
    assert_same(
        found.cpu(), exact, {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype] * float(exact.detach().abs().max())
    )


def test_bfloat16_tables_would_round_the_decay():
    _, builder = build()
    exact, kept = builder(5, 7).column_decay, copy.deepcopy(builder).bfloat16()(5, 7).column_decay
    assert_same(kept, exact, 1e-7)
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-4


def test_autocast_runs_and_keeps_its_precision():
    module, tables = build()
    module, tables, x = module.float(), tables.float(), draw(2, 5, 7, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, tables(5, 7))
    assert found.dtype == torch.bfloat16
    exact = module(x, tables(5, 7))
    assert_same(found, exact, 3e-2 * float(exact.detach().abs().max()))


def test_one_map_after_another_and_one_image_at_a_time():
    module, tables = build()
    for size in ((1, 1), (9, 2), (5, 7), (1, 1)):
        x = draw(3, *size, 16)
        together = module(x, tables(*size))
        assert together.shape == x.shape
        assert_same(together, torch.cat([module(one, tables(*size)) for one in x.split(1)]))


def test_the_input_is_left_alone_and_probes_see_every_step():
    module, tables = build()
    x, seen = draw(1, 5, 7, 16), {}
    before = x.clone()
    out = module(x, tables(5, 7), None, lambda name, value: seen.__setitem__(name, value))
    assert torch.equal(x, before)
    assert {n: v.shape[-2:] for n, v in seen.items()} == {
        "value_gate": (4, 4),
        "attended": (4, 4),
        "before_out": (7, 16),
    }
    assert_same(module.out_proj(seen["before_out"]), out)
    gate = torch.nn.functional.silu(module.qkv(x)[..., 32:48])
    assert_same(seen["value_gate"].flatten(-2), gate)


def test_gradcheck():
    for options in (DEFAULT, SwatOptions(norm="row_sum", value="mlp", distance="absolute")):
        module, tables = build(options, heads=2, width=2, window=2)
        made = tables(3, 2)
        names, weights = zip(*module.named_parameters())

        def run(x, *values, module=module, names=names, made=made):
            return torch.func.functional_call(module, dict(zip(names, values)), (x, made))

        inputs = draw(1, 3, 2, 4).requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


class Layer(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.mixer, self.tables = build(options)

    def forward(self, x):
        return self.mixer(x, self.tables(x.shape[1], x.shape[2]))


@pytest.mark.parametrize("options", [DEFAULT, SwatOptions(norm="row_sum", lce_place="window")], ids=different)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ready", [True, False], ids=["tables ready", "tables in the graph"])
def test_eager_equals_compiled(options, grad, ready):
    torch._dynamo.reset()
    layer, x = Layer(options), draw(2, 5, 7, 16)
    plain = copy.deepcopy(layer)
    wanted = plain(x)
    if ready:
        layer.tables(5, 7)
    with torch.set_grad_enabled(grad):
        found = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)(x)
    assert found.requires_grad == grad
    assert_same(found, wanted)
    if grad:
        up = draw(*x.shape, seed=1)
        own, exact = (torch.autograd.grad(y, m.parameters(), up) for y, m in ((found, layer), (wanted, plain)))
        for a, b in zip(own, exact, strict=True):
            assert_same(a, b, 1e-11)


def test_a_layer_can_be_pickled():
    layer, x = Layer(DEFAULT), draw(1, 5, 7, 16)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_tables_on_the_meta_device_are_made_where_the_model_lands():
    with torch.device("meta"):
        layer = nn.ModuleList([SwatAttention(16, 4), SwatTableBuilder(4, 4, torch.zeros(4, device="cpu"), 4)])
    layer.to_empty(device="cpu")
    assert layer[1](5, 7).row_decay.device.type == "cpu"
    assert layer[1](5, 7).row_decay.max() == 1


# ------------------------------------------------------------------------------------ wrong input
@pytest.mark.parametrize("name", READINGS)
def test_unknown_readings_are_refused(name):
    with pytest.raises(InputError, match=rf"unknown swat {name} 'upside down'; accepted: "):
        SwatOptions(**{name: "upside down"})


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: SwatOptions(alibi="outer", decay=False), "alibi 'outer' makes the decay out of the slopes"),
        (lambda: SwatAttention(10, 4), "10 channels cannot be split into 4 heads evenly"),
        (lambda: SwatAttention(8, 0), "8 channels cannot be split into 0 heads"),
        (lambda: SwatTableBuilder(4, 4, torch.zeros(2)), "2 decay rates were given for 4 heads"),
        (lambda: SwatTableBuilder(2, 3, torch.zeros(2))(4, 4), "3"),
        (lambda: SwatTableBuilder(2, 4, torch.zeros(2), 0)(4, 4), "0"),
        (lambda: balanced_slopes(4, "steep"), "unknown slopes 'steep'; accepted: swat, alibi, one_sided"),
    ],
)
def test_wrong_settings_are_refused(attempt, said):
    with pytest.raises(InputError, match=said) as caught:
        attempt()
    assert "\n" not in str(caught.value)
