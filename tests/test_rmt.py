"""The RMT baseline as a whole: logits, gradients and batch statistics against plain functions on the released layout.

`rmt_by_hand` goes from a checkpoint's tensors to logits without the package; `load_rmt` takes the same checkpoint in.
Bugs that re-implementers of RMT report are planted one by one, and every one must show.
"""

import dataclasses

import pytest
import rmt_by_hand as by_hand
import torch
from torch.testing import assert_close

from minigated.interop import load_rmt
from minigated.vit import VisionTransformer

CLASSES, SIZE = 5, (40, 72)  # maps of 10 x 18, 5 x 9, 3 x 5 and 2 x 3 cells: sides that differ, and odd ones


def pictures(batch=2, size=SIZE, dtype=torch.float64):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def steady(model):
    """The same model without drop path, so that a training step has no chance in it."""
    again = VisionTransformer(dataclasses.replace(model.config, drop_path=0.0)).to(next(model.parameters()).dtype)
    again.load_state_dict(model.state_dict())
    return again


@pytest.fixture(scope="module")
def state():
    return by_hand.state_dict(by_hand.T, CLASSES)


@pytest.fixture(scope="module")
def scores(state):
    with torch.no_grad():
        return load_rmt(state, SIZE)(pictures())


def distance(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


# ---------------------------------------------------------------------------------------------- equality
def test_logits_of_rmt_t(state, scores):
    assert distance(scores, by_hand.logits(state, pictures(), by_hand.T)) < 1e-9
    rough = load_rmt({name: t.float() if t.is_floating_point() else t for name, t in state.items()}, SIZE)
    with torch.no_grad():
        assert distance(rough(pictures(dtype=torch.float32)).double(), scores) < 2e-5


def test_logits_of_rmt_b_with_layer_scale():
    state = by_hand.state_dict(by_hand.B, CLASSES)
    x, again = pictures(1, (36, 32)), load_rmt(state, (36, 32))
    with torch.no_grad():
        right = again(x)
        assert distance(right, by_hand.logits(state, x, by_hand.B)) < 1e-9
        unscaled = {name: torch.ones_like(t) if "gamma" in name else t for name, t in state.items()}
        assert distance(by_hand.logits(unscaled, x, by_hand.B), right) > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_gradients_and_batch_statistics(state, training):
    """What the functions give, gradients and moved statistics, is a checkpoint again: `load_rmt` puts it in order."""
    x, model = pictures(), steady(load_rmt(state, SIZE)).train(training)
    own = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in state.items()}
    moving = {} if training else None
    right, up = by_hand.logits(own, x, by_hand.T, moving), pictures()[:, 0, 0, :CLASSES]
    right.backward(up)
    found = model(x)
    found.backward(up)
    assert distance(found.detach(), right.detach()) < 1e-9
    gradients = {name: t if t.grad is None else t.grad for name, t in own.items()}
    gradients |= {name: t for name, t in state.items() if "Relpos" in name or "running" in name}
    for name, wanted in load_rmt(gradients, SIZE).named_parameters():
        grad = model.get_parameter(name).grad
        assert_close(grad, wanted.detach(), rtol=0, atol=1e-9 * max(1.0, wanted.abs().max().item()), msg=name)
    moved = dict(state)
    for name, (mean, variance) in (moving or {}).items():
        moved |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
    assert not training or len(moving) == 4 + 3 + 1
    for (name, buffer), wanted in zip(model.named_buffers(), load_rmt(moved, SIZE).buffers()):
        if "running" in name:
            assert_close(buffer, wanted, rtol=1e-9, atol=1e-9, msg=name)


# ---------------------------------------------------------------------------------------------- planted bugs
def activation_at_the_end(s, images, moving):
    return by_hand.gelu(by_hand.stem(s, images, moving))


def activation_between_stages(s, x, moving):
    return by_hand.gelu(by_hand.downsample(s, x, moving))


def position_after_the_norm(s, x, decay, attend, parts):
    """The first norm reads the map without its position, the position is added to what comes out of it."""
    u = by_hand.layer_norm(s, "retention_layer_norm", x)
    u = u + by_hand.depthwise(s, "pos.conv", u)
    x = x + by_hand.retention(by_hand.under(s, "retention."), u, decay, attend, parts)
    return x + parts["feed_forward"](by_hand.under(s, "ffn."), by_hand.layer_norm(s, "final_layer_norm", x))


def norms_at_the_end(s, x, decay, attend, parts):
    x = x + by_hand.depthwise(s, "pos.conv", x)
    x = x + by_hand.layer_norm(
        s, "retention_layer_norm", by_hand.retention(by_hand.under(s, "retention."), x, decay, attend, parts)
    )
    return x + by_hand.layer_norm(s, "final_layer_norm", parts["feed_forward"](by_hand.under(s, "ffn."), x))


def attention_replaced(attend):
    """Every stage attends in one way."""
    return lambda s, x, decay, given, parts: by_hand.block(s, x, decay, attend, parts)


def height_before_width(q, k, v, decay):
    return by_hand.two_passes(*(t.transpose(1, 2) for t in (q, k, v)), decay).transpose(1, 2)


def mean_before_the_norm(s, x, moving):
    return by_hand.head(s, x.mean((1, 2), keepdim=True), moving)


def head_without_activation(s, x, moving):
    x = by_hand.batch_norm(s, "norm", by_hand.linear(s, "proj", x), moving)
    return by_hand.linear(s, "head", x.mean((1, 2)))


def convolution_before_the_activation(s, x):
    y = by_hand.linear(s, "fc1", x)
    return by_hand.linear(s, "fc2", by_hand.gelu(y + by_hand.depthwise(s, "dwconv.conv", y)))


def only_the_convolution(s, x):
    return by_hand.linear(s, "fc2", by_hand.depthwise(s, "dwconv.conv", by_hand.gelu(by_hand.linear(s, "fc1", x))))


BUGS = {
    "an activation at the end of the stem": dict(stem=activation_at_the_end),
    "position after the norm": dict(block=position_after_the_norm),
    "norms at the end of the branches": dict(block=norms_at_the_end),
    "the full form in every stage": dict(block=attention_replaced("full")),
    "the decomposed form in every stage": dict(block=attention_replaced("decomposed")),
    "height before width": dict(decomposed=height_before_width),
    "no decay": dict(decomposed=lambda q, k, v, decay: by_hand.two_passes(q, k, v, 0 * decay)),
    "rates reversed": dict(full=lambda q, k, v, decay: by_hand.whole_map(q, k, v, decay.flip(0))),
    "scaled twice": dict(full=lambda q, k, v, decay: by_hand.whole_map(q, k / k.shape[-1] ** 0.5, v, decay)),
    "no rotation": dict(rotated=lambda x: x),
    "rotation counted column by column": dict(
        rotated=lambda x: by_hand.rotated(x.transpose(1, 2)).transpose(1, 2),
    ),
    "LCE after the projection": dict(
        end=lambda s, z, v, u: by_hand.linear(s, "out_proj", z) + by_hand.depthwise(s, "lepe.conv", v)
    ),
    "LCE of the input": dict(end=lambda s, z, v, u: by_hand.end(s, z, u, u)),
    "LCE of the attended values": dict(end=lambda s, z, v, u: by_hand.end(s, z, z, u)),
    "convolution before the activation": dict(feed_forward=convolution_before_the_activation),
    "only the convolution's part": dict(feed_forward=only_the_convolution),
    "an activation between stages": dict(downsample=activation_between_stages),
    "mean before the norm of the head": dict(head=mean_before_the_norm),
    "no activation in the head": dict(head=head_without_activation),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_seen(bug, state, scores):
    assert distance(by_hand.logits(state, pictures(), by_hand.T, **bug), scores) > 1e-3
