"""The backbones: exact sizes, shapes of all kinds, every mixer in the same skeleton, what is refused."""

import copy
import dataclasses
import json

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close

from minigated.checkpoint import load_model, save_checkpoint
from minigated.device import compiled
from minigated.errors import InputError
from minigated.layers import DropPath
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import parameters
from minigated.vit import ViTConfig
from minigated.vit_parts import ConvStem, PatchMerging, PatchStem
from minigated.vit_sizes import SIZES, build_vit

NANO = ["swin_nano", "rmt_nano", "gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano"]
EXACT_COUNTS = {
    "rmt_t": 14_334_216,
    "rmt_s": 26_967_240,
    "rmt_b": 54_154_896,
    "rmt_l": 95_464_864,
    "swin_tiny": 28_288_354,
}


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nano(name="gated_swinrmt_retention_nano", **overrides):
    torch.manual_seed(0)
    return build_vit(name, **overrides).eval()


# ---------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(("name", "count"), EXACT_COUNTS.items())
def test_released_sizes_have_their_exact_counts(name, count):
    assert parameters(build_vit(name, "meta")) == count


@pytest.mark.parametrize("mixer", ["retention", "swat"])
def test_paper_sizes_lie_in_the_abstracts_range(mixer):
    model = build_vit(f"gated_swinrmt_{mixer}_paper", "meta")
    assert 77e6 < parameters(model) < 79e6 and model.config.classes == 100


def test_the_gate_adds_one_square_a_block():
    gated, plain = (parameters(nano(gate=gate)) for gate in ("elementwise", "none"))
    config = SIZES["gated_swinrmt_retention_nano"]
    assert gated - plain == sum(depth * width**2 for depth, width in zip(config.depths, config.widths))
    headwise = parameters(nano(gate="headwise"))
    assert headwise - plain == sum(d * w * h for d, w, h in zip(config.depths, config.widths, config.heads))


def test_same_parameters_as_timms_swin():
    from minigated.torchvision_cpu import prepare_torchvision

    prepare_torchvision()
    import timm

    theirs = timm.create_model("swin_tiny_patch4_window7_224")
    assert parameters(theirs) == EXACT_COUNTS["swin_tiny"]


# ---------------------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32), (7, 90), (4, 4)], ids=str)
@pytest.mark.parametrize("name", NANO)
def test_any_size_goes_through(name, size):
    model = nano(name)
    with torch.no_grad():
        maps = model.feature_maps(images(2, 3, *size))
        assert model(images(2, 3, *size)).shape == (2, 10)
    sides = [tuple(-(-side // (4 * 2**stage)) for side in size) for stage in range(4)]
    assert [m.shape for m in maps] == [(2, c, *side) for c, side in zip(model.config.widths, sides)]


@pytest.mark.parametrize("name", NANO)
def test_the_size_seen_last_leaves_no_trace(name):
    model, x = nano(name), images(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        model(images(1, 3, 48, 20))
        assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NANO)
def test_a_size_first_seen_in_inference_mode_can_train(name):
    model = nano(name)
    with torch.inference_mode():
        model(images(1, 3, 48, 20))
    model.train()(images(2, 3, 48, 20)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stem_stride(stride):
    model = nano(stem_stride=stride, depths=(1, 1, 1, 1))
    with torch.no_grad():
        sides = [m.shape[-1] for m in model.feature_maps(images(1, 3, 16, 16))]
    assert sides == [16 // stride // 2**i or 1 for i in range(4)]


def test_features_without_a_classifier():
    model = nano(num_classes=0)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 1, 1, model.num_features)
        assert_close(model(x), features.mean((1, 2)))
        assert nano(classes=7)(x).shape == (2, 7)


def test_one_image_does_not_see_another():
    model, x = nano(), images(3, 3, 32, 32)
    with torch.no_grad():
        assert_close(model(x)[1:2], model(x[1:2]), rtol=0, atol=1e-5)


def test_channels_of_the_image():
    with torch.no_grad():
        assert nano(image_channels=1)(images(1, 1, 32, 32)).shape == (1, 10)


# ---------------------------------------------------------------------------------------------- what the paper says
def windows(model, size):
    return [
        [(t.rows.window, t.rows.shift, t.columns.window, t.columns.shift) for t in (b(*size_) for b in stage.tables)]
        for stage, size_ in zip(model.stages, size)
    ]


@pytest.mark.parametrize("name", NANO[2:])
def test_small_images_make_attention_global(name):
    model = nano(name)
    sides = [(8, 8), (4, 4), (2, 2), (1, 1)]
    for stage, (height, _) in zip(windows(model, sides), sides):
        assert all(window == (height, 0, height, 0) for window in stage)


def test_without_gate_and_windows_it_is_rmt():
    ours, rmt = nano(gate="none"), nano("rmt_nano")
    rmt.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_close(ours(images(2, 3, 32, 32)), rmt(images(2, 3, 32, 32)))
        larger = images(2, 3, 128, 128)
        assert (ours(larger) - rmt(larger)).abs().max() > 1e-4 * rmt(larger).std()  # windows act


def test_larger_images_have_windows_and_every_second_block_shifts():
    model = nano(window=4)
    still, shifted = windows(model, [(16, 16), (8, 8), (4, 4), (2, 2)])[0]
    assert still == (4, 0, 4, 0) and shifted == (4, 2, 4, 2)
    assert windows(model, [(16, 16), (8, 8), (4, 4), (2, 2)])[2] == [(4, 0, 4, 0)] * 2


def test_windows_carry_nothing_further_than_they_say():
    model = nano(window=4, depths=(1, 1, 1, 1), lce=False, image_size=64)
    for module in model.modules():  # leave the mixers as the only ones that mix
        if type(module).__name__ == "DepthwiseConv":
            module.conv.weight.data.zero_()
    x = images(1, 16, 16, 32)
    with torch.no_grad():
        still = model.stages[0](x)
        x[0, 5, 6] += images(32, seed=3)
        changed = (model.stages[0](x) - still).abs().amax(-1)[0] > 0
    assert changed[4:8, 4:8].all() and changed.sum() == 16


@pytest.mark.parametrize("name", NANO)
def test_nothing_about_decay_is_a_parameter_or_saved(name):
    model = nano(name)
    saved = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    assert all("norm" in name or name.startswith("stem.layers") or "relative_position_index" in name for name in saved)
    assert not any("decay" in name or "slope" in name for name, _ in model.named_parameters())


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    model = nano(drop_path=0.3)
    assert [round(block.drop_path.rate, 4) for block in model.blocks] == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1)
    y = DropPath(0.25).train()(x)
    assert set(y.unique().tolist()) == {0.0, 4 / 3} or torch.allclose(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert (y[:, 0] == y[:, 1]).all() and abs(float(y.mean()) - 1) < 0.05
    assert DropPath(0.25).eval()(x) is x


# ---------------------------------------------------------------------------------------------- parts
def test_stem_has_no_activation_at_its_end_and_half_its_channels_first():
    stem = ConvStem(3, 16)
    kinds = [type(layer).__name__ for layer in stem.layers]
    assert kinds == ["Conv2d", "BatchNorm2d", "GELU"] * 3 + ["Conv2d", "BatchNorm2d"]
    assert [stem.layers[i].out_channels for i in (0, 3, 6, 9)] == [8, 8, 16, 16]
    assert stem(images(2, 3, 32, 32)).min() < -0.5


def test_patch_merging_order():
    merging = PatchMerging(1, 4)
    merging.norm = torch.nn.Identity()
    merging.reduction.weight.data = torch.eye(4)
    square = torch.arange(4.0).view(1, 2, 2, 1)  # 0 1 / 2 3
    assert merging(square).flatten().tolist() == [0, 2, 1, 3]
    assert merging(torch.ones(1, 3, 5, 1)).shape == (1, 2, 3, 4)


def test_patch_stem_pads_at_the_end():
    stem = PatchStem(3, 8, 4).eval()
    x = images(1, 3, 6, 8)
    with torch.no_grad():
        assert_close(stem(x)[:, :1], stem(x[:, :, :4]))
        assert stem(x).shape == (1, 2, 2, 8)


# ---------------------------------------------------------------------------------------------- use
@pytest.mark.parametrize("name", NANO)
def test_a_config_survives_json_and_a_model_its_checkpoint(name, tmp_path):
    model, x = nano(name), images(1, 3, 32, 32)
    again = ViTConfig(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert again == model.config
    save_checkpoint(tmp_path, 1, model, {}, {"step": 1})
    with torch.no_grad():
        assert_close(load_model(tmp_path).eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", NANO)
def test_it_learns(name):
    torch.manual_seed(0)
    model = build_vit(name)
    x, labels = images(16, 3, 32, 32), torch.arange(16) % 10
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    config = TrainConfig(steps=15, rate=3e-3, warmup=2, progress=False)
    losses = Trainer(model, loss, lambda *_: (x, labels), config).run().losses
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", NANO)
def test_bf16_autocast_stays_near(name):
    model, x = nano(name), images(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x)
    assert_close(rough.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", NANO)
def test_every_block_compiles_without_a_break_for_every_stage(name):
    model, x = nano(name, window=4), images(2, 3, 64, 48)
    with torch.no_grad():
        expected = model(x)
    counters.clear()
    with compiled(model, "blocks", backend="eager"), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        with torch.no_grad():
            assert_close(model(x), expected)
        model.train()(x).sum().backward()
    assert counters["frames"]["ok"] and not counters["graph_break"]


def test_the_probe_names_stage_and_block():
    model, seen = nano(), {}
    with torch.no_grad():
        model(images(1, 3, 32, 32), probe=lambda stage, block, *told: seen.setdefault((stage, block, told[0]), told[1]))
    assert {key[:2] for key in seen} == {(s, b) for s, depth in enumerate(model.config.depths) for b in range(depth)}
    position, scores = seen[0, 1, "gate_score"]
    assert position == "g1" and scores.shape == (1, 8, 8, 2, 16) and 0 < scores.min() < scores.max() < 1


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"window": 0}, "window 0"),
        ({"heads": (3, 4, 6, 8)}, "32 channels cannot be split into 3 heads"),
        ({"mixers": "conv"}, "mixer 'conv'"),
        ({"skeleton": "resnet"}, "skeleton 'resnet'"),
        ({"decay": "linear"}, "decay 'linear'"),
        ({"depths": (2, 2)}, "depths has 2 entries for 4 stages"),
        ({"depths": (2, 0, 2, 2)}, "must be whole numbers, at least 1"),
        ({"classes": -1}, "classes -1"),
        ({"image_size": (32, 0)}, "image_size"),
        ({"stem_stride": 3}, "stem stride 3; accepted: 1, 2, 4"),
        ({"drop_path": 1.0}, "drop path rate"),
        ({"windows": 3}, "unknown option 'windows'"),
        ({"window": 7.5}, "window 7.5; accepted: a whole number, 1 or more, or None"),
        ({"window": "7"}, "window '7'"),
        ({"window": True}, "window True"),
        ({"image_size": 32.5}, r"image_size \(32.5, 32.5\); accepted: one side or \(height, width\), whole numbers"),
        ({"image_size": (32, 32.0)}, r"image_size \(32, 32.0\)"),
        ({"image_size": "32"}, r"image_size \('32', '32'\)"),
        ({"image_size": None}, r"image_size \(None, None\)"),
        ({"image_size": (32, 32, 32)}, r"image_size \(32, 32, 32\)"),
        ({"classes": 10.0}, "classes 10.0; accepted: a whole number, 0"),
        ({"classes": None}, "classes None"),
        ({"head_width": 0}, "head_width 0; accepted: a whole number, 1 or more"),
        ({"head_width": 2.5}, "head_width 2.5"),
        ({"ffn_ratios": 0}, r"ffn_ratios \(0, 0, 0, 0\); accepted: above 0"),
        ({"ffn_ratios": (4.0, 4.0, -1.0, 4.0)}, r"ffn_ratios \(4.0, 4.0, -1.0, 4.0\)"),
        ({"ffn_ratios": 0.01}, "at least one hidden channel"),
        ({"ffn_ratios": float("nan")}, "ffn_ratios"),
        ({"ffn_ratios": float("inf")}, "ffn_ratios"),
        ({"stem_stride": 2.5}, "stem_stride 2.5; accepted: a whole number"),
        ({"image_channels": 3.0}, "image_channels 3.0; accepted: a whole number"),
        ({"widths": 32}, "widths 32; accepted: a tuple of whole numbers"),
        ({"depths": (2, 2, 2.0, 1)}, r"depths \(2, 2, 2.0, 1\) and .* must be whole"),
        ({"heads": (2, 4, "6", 8)}, "must be whole numbers"),
        ({"gate": "g9", "mixers": "swin"}, "unknown gate 'g9'; accepted: none, elementwise, headwise"),
        ({"gate_input": "raw", "mixers": "swin"}, "unknown gate_input 'raw'"),
        ({"decay": "swin", "mixers": "swin"}, "unknown decay 'swin'; accepted: rmt"),
        ({"swat": "alibi"}, "swat 'alibi'; accepted: SwatOptions"),
        ({"drop_path": -0.1}, "drop path rate -0.1; accepted: at least 0"),
        ({"classes": 7, "num_classes": 5}, "two names of one option"),
        ({"swat": {"gates": "g1"}}, "unknown swat option 'gates'; accepted: alibi, distance, pass_signs"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        nano(**overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"window": 1.5}, {"image_size": 9.5}, {"classes": 1.0}, {"head_width": 0}, {"ffn_ratios": 0}, {"swat": {"x": 1}}],
    ids=str,
)
def test_a_config_is_refused_when_it_is_made(fields):
    with pytest.raises(InputError):
        ViTConfig(widths=(8,), depths=(1,), heads=(2,), **fields)


def test_odd_heads_are_refused_where_slopes_must_balance():
    with pytest.raises(InputError, match="3"):
        nano("gated_swinrmt_swat_nano", widths=(48, 64, 96, 128), heads=(3, 4, 6, 8))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\]"),
        (torch.zeros(2, 1, 32, 32), r"\[2, 1, 32, 32\]"),
        (torch.zeros(2, 3, 0, 32), "no empty side"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), r"images of float64 for weights of float32; .*images.to"),
    ],
)
def test_wrong_images_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        nano()(batch)


def test_one_image_of_one_cell_cannot_train():
    with pytest.raises(InputError, match="two images or more"):
        nano().train()(images(1, 3, 32, 32))
    assert nano()(images(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(("stride", "side"), [(4, 4), (4, 3), (4, 1), (2, 2), (1, 1)])
def test_a_stem_cannot_train_on_one_image_of_one_cell(stride, side):
    stem, one = ConvStem(3, 8, stride), images(1, 3, side, side)
    before = {name: value.clone() for name, value in stem.state_dict().items()}
    with pytest.raises(InputError, match="single cell .* two images or more, a larger image") as caught:
        stem(one)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in stem.state_dict().items())  # refused before any norm
    assert stem(images(2, 3, side, side)).shape == (2, 1, 1, 8)
    assert stem(images(1, 3, stride, stride + 1)).shape == (1, 1, 2, 8)
    assert stem.eval()(one).shape == (1, 1, 1, 8)


@pytest.mark.parametrize("name", ["gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano", "rmt_nano", "swin_nano"])
def test_a_backbone_on_meta_runs_without_numbers(name):
    """Shapes, operations and memory of any size can be counted without a machine that holds it."""
    model = build_vit(name, "meta", image_size=64)
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", NANO)
def test_weights_assigned_on_meta_bring_the_model_down(name):
    full, batch = build_vit(name, drop_path=0.5).eval(), images(2, 3, 40, 32)
    model = build_vit(name, "meta", drop_path=0.5)
    model.load_state_dict(full.state_dict(), assign=True)
    assert_close(model.eval()(batch), full(batch), rtol=0, atol=0)
    assert model.to("cpu").train()(batch).isfinite().all()
    drops = [part for part in model.modules() if isinstance(part, DropPath)]
    assert drops and all(float(part.share) == pytest.approx(1 - part.rate) for part in drops)


@pytest.mark.parametrize("name", NANO)
def test_a_size_first_seen_by_a_functional_gradient_is_kept_plain(name):
    """Tables made under `torch.func.grad` stayed wrapped, and the model could no longer be copied."""
    model, batch = build_vit(name).eval().requires_grad_(False), images(2, 3, 40, 32)
    expected = torch.func.grad(lambda x: copy.deepcopy(model)(x).sum())(batch)
    assert_close(torch.func.grad(lambda x: model(x).sum())(batch), expected)
    again = copy.deepcopy(model)
    assert_close(again(batch), model(batch), rtol=0, atol=0)


@pytest.mark.parametrize("mixers", ["swin", "gated_swinrmt_retention", "gated_swinrmt_swat"])
def test_tables_of_another_size_are_not_carried_over(mixers):
    """Averaged weights and functional calls copy buffers; tables went with them and kept the other size's name."""
    net = build_vit(
        "swin_nano", mixers=mixers, skeleton="swin", widths=(16, 32), depths=(2, 2), heads=(2, 4), ffn_ratios=2.0,
        decay_spans=4.0, layer_scale=False, window=3, stem_stride=2, image_size=(20, 28),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    narrow, wide = torch.randn(2, 3, 20, 26), torch.randn(2, 3, 20, 28)
    expected = [net(images) for images in (narrow, wide)]
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    torch.func.functional_call(net, state, (narrow,))
    assert_close([net(images) for images in (narrow, wide)], expected)
    average = torch.optim.swa_utils.AveragedModel(net).eval()
    net(narrow)
    average.update_parameters(net)
    assert_close([average(images) for images in (wide, narrow)], expected[::-1])
