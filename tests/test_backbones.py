"""Released vision weights: Swin against timm and torchvision, RMT against state dicts built to its layout."""

import re

import pytest
import torch
from torch.testing import assert_close

from minigated.errors import InputError
from minigated.interop import load_rmt, load_swin
from minigated.torchvision_cpu import prepare_torchvision
from minigated.vit_sizes import build_vit

prepare_torchvision()


def shaken(model, seed=0):
    """Random numbers in every weight and statistic: at the usual start most mistakes cannot be seen."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if torch.is_floating_point(tensor):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.copy_(1 + 0.1 * noise.abs() if "running_var" in name else tensor + 0.15 * noise)
    return model.eval()


def pictures(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------- Swin
def timm_swin(size, window, patch=4, depths=(2, 2, 2, 2)):
    import timm

    return shaken(
        timm.models.swin_transformer.SwinTransformer(
            img_size=size, patch_size=patch, window_size=window, embed_dim=24, depths=depths, num_heads=(2, 3, 4, 6),
            num_classes=7,
        )
    )  # fmt: skip


@pytest.mark.parametrize(("size", "window", "patch"), [(224, 7, 4), (32, 4, 4), (32, 4, 2), (32, 8, 1)])
def test_swin_gives_timms_logits(size, window, patch):
    theirs = timm_swin(size, window, patch).double()
    ours, x = load_swin(theirs.state_dict(), size), pictures(size).double()
    with torch.no_grad():
        assert_close(ours(x), theirs(x), rtol=0, atol=1e-11)
        assert_close(ours.float()(x.float()), theirs.float()(x.float()), rtol=0, atol=2e-4)
        assert_close(ours.double().forward_features(x), theirs.double().forward_features(x), rtol=0, atol=1e-4)


def test_a_shuffled_bias_table_is_seen():
    theirs = timm_swin(32, 4)
    state = {n: t.flip(0) if "bias_table" in n else t for n, t in theirs.state_dict().items()}
    with torch.no_grad():
        assert (load_swin(state, 32)(pictures(32)) - theirs(pictures(32))).abs().max() > 1e-3


@pytest.mark.parametrize("size", [64, 96])
def test_swin_gives_torchvisions_logits_unless_it_pads(size):
    from torchvision.models.swin_transformer import SwinTransformer

    difference = {}
    for window in (4, 5):  # maps of 16 and 8, or 24 and 12 cells: multiples of 4, none of 5
        theirs = SwinTransformer([4, 4], 24, [2, 2], [2, 4], [window, window], num_classes=7, stochastic_depth_prob=0.0)
        theirs = shaken(theirs).double()
        x = pictures(size).double()
        with torch.no_grad():
            difference[window] = (load_swin(theirs.state_dict(), size)(x) - theirs(x)).abs().max()
    # torchvision lets cells attend to padding, whose key is the bias alone; ours masks it
    assert difference[4] < 1e-11 and difference[5] > 1e-6


def test_the_authors_spelling_is_timms_with_two_names_moved():
    theirs = timm_swin(32, 4)
    state = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = tensor
    with torch.no_grad():
        assert_close(load_swin({"model": state}, 32)(pictures(32)), theirs(pictures(32)), rtol=0, atol=2e-4)


# ---------------------------------------------------------------------------------------------- RMT
BLOCK = {
    "mixer_norm": "retention_layer_norm",
    "ffn_norm": "final_layer_norm",
    "mixer.out_proj": "retention.out_proj",
    "mixer.lce.conv": "retention.lepe.conv",
    "position.conv": "pos.conv",
    "ffn.fc1": "ffn.fc1",
    "ffn.fc2": "ffn.fc2",
    "ffn.dwconv.conv": "ffn.dwconv.conv",
}


def released_rmt(model):
    """The state dict of the released layout, built from ours name by name."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            state["patch_embed.proj." + ".".join(parts[2:])] = tensor
        elif parts[0] == "downsamples":
            state[f"layers.{parts[1]}.downsample." + ".".join(parts[2:])] = tensor
        elif parts[0] == "pre_head":
            state[".".join(parts[1:])] = tensor
        elif parts[0] == "head":
            state[name] = tensor
        else:
            block, rest = f"layers.{parts[1]}.blocks.{parts[3]}.", ".".join(parts[4:])
            if rest.startswith("mixer.qkv"):
                for part, rows in zip("qkv", tensor.chunk(3)):
                    state[f"{block}retention.{part}_proj.{parts[-1]}"] = rows
            elif rest.endswith("_scale.gamma"):
                state[f"{block}gamma_{1 if rest.startswith('mixer') else 2}"] = tensor.view(1, 1, 1, -1)
            else:
                stem, leaf = rest.rsplit(".", 1)
                state[f"{block}{BLOCK[stem]}.{leaf}"] = tensor
    for index, stage in enumerate(model.stages):
        width = model.config.widths[index] // model.config.heads[index]
        state[f"layers.{index}.Relpos.decay"] = torch.tensor(stage.tables[0].log_decay)
        angle = 1.0 / 10000 ** torch.linspace(0, 1, width // 2)
        state[f"layers.{index}.Relpos.angle"] = angle.unsqueeze(-1).repeat(1, 2).flatten()
    return state


@pytest.mark.parametrize("name", ["rmt_t", "rmt_b"])
def test_rmt_comes_back_from_the_released_layout(name):
    torch.manual_seed(0)
    model = shaken(build_vit(name, classes=11, image_size=32))
    state = released_rmt(model)
    again = load_rmt({"model": state}, 32)
    assert again.config.classes == 11 and not again.training
    with torch.no_grad():
        assert_close(again(pictures(32)), model(pictures(32)), rtol=0, atol=0)
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    swapped = {re.sub("[qk]_proj", lambda m: other[m[0]], n): t for n, t in state.items()}
    with torch.no_grad():
        assert (load_rmt(swapped, 32)(pictures(32)) - model(pictures(32))).abs().max() > 1e-3


def spoilt(state, **changes):
    state = dict(state)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__0__Relpos__decay": torch.zeros(4)}, "layers.0.Relpos.decay"),
        ({"layers__2__Relpos__angle": torch.ones(32)}, "layers.2.Relpos.angle"),
        ({"proj__bias": None}, "pre_head.proj.bias"),
        ({"proj__bias": torch.zeros(3)}, "pre_head.proj.bias is .1024. here and .3. in"),
        ({"layers__0__blocks__0__retention__k_proj__bias": None}, "only q, v of q, k and v"),
        ({"layers__0__blocks__0__retention__g_proj__bias": torch.zeros(1)}, "is no weight of RMT"),
        ({"teacher__head": torch.zeros(1)}, "teacher.head is no weight of RMT"),
        ({"layers__0__blocks__2__gamma_1": torch.zeros(1, 1, 1, 64)}, "no released RMT"),
        ({"layers__0__blocks__1__gamma_1": torch.zeros(1, 1, 1, 64)}, "which this size has not"),
        ({"layers__0__blocks__0__retention__k_proj__weight": torch.zeros(64)}, r"q, k and v of shapes .* one shape"),
        ({"layers__0__blocks__0__retention__q_proj__weight": torch.zeros(64)}, r"q_proj.weight is \[64\] in .* 2 axes"),
        ({"head__weight": torch.tensor(0.0)}, r"head.weight is \[\] in .*; accepted: 2 axes"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    state = released_rmt(build_vit("rmt_t", classes=3, image_size=32))
    with pytest.raises(InputError, match=message):
        load_rmt(spoilt(state, **changes))


def test_swin_refusals():
    state = timm_swin(32, 4).state_dict()
    with pytest.raises(InputError, match="patch_embed.proj.weight"):
        load_swin(spoilt(state, patch_embed__proj__weight=None))
    with pytest.raises(InputError, match="belongs to no square window"):
        load_swin(spoilt(state, layers__0__blocks__0__attn__relative_position_bias_table=torch.zeros(50, 2)))
    with pytest.raises(InputError, match="no layers.I.blocks.J"):
        load_swin({"weight": torch.zeros(1)})


TABLE = "layers__0__blocks__{}__attn__relative_position_bias_table"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__0__blocks__0__mlp__fc1__weight": None}, "layers.0.blocks.0.mlp.fc1.weight is missing"),
        ({"layers__0__blocks__0__mlp__fc1__weight": torch.zeros(4)}, r"fc1.weight is \[4\] in .*; accepted: 2 axes"),
        ({TABLE.format(0): torch.zeros(49)}, r"bias_table is \[49\] in .*; accepted: 2 axes"),
        ({TABLE.format(1): torch.zeros(49)}, r"bias_table is \[49, 2\] here and \[49\] in"),
        ({TABLE.format(1): torch.zeros(81, 2)}, r"bias_table is \[49, 2\] here and \[81, 2\] in"),
        ({TABLE.format(1): torch.zeros(0, 2)}, r"belongs to no square window"),
        ({"head__fc__weight": torch.tensor(0.0)}, r"head.fc.weight is \[\] in .*; accepted: 2 axes"),
    ],
)
def test_a_damaged_swin_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        load_swin(spoilt(timm_swin(32, 4).state_dict(), **changes))
    assert "\n" not in str(caught.value)


def test_a_stage_without_blocks_is_named():
    state = {name: t for name, t in timm_swin(32, 4).state_dict().items() if not name.startswith("layers.1.blocks.")}
    with pytest.raises(InputError, match="nothing for layers.1.blocks.0"):
        load_swin(state)
