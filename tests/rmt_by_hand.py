"""RMT's classifier as plain functions on a state dict in the released layout, sharing no code with the package.

Written from the facts of RMT (arXiv 2309.11523 and what its released code computes). Maps are [B, h, w, C]. Every step
is an entry of `PARTS`; `test_rmt.py` compares the package with them, and exchanges one to plant a bug.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPS_NORM, EPS_BATCH, MOMENTUM = 1e-6, 1e-5, 0.1


@dataclass(frozen=True)
class Sizes:
    """A released size. full: stages with one softmax over the map. scaled: stages with layer scale."""

    widths: tuple
    depths: tuple
    heads: tuple
    spans: tuple
    ratios: tuple
    full: tuple
    scaled: tuple = ()


T = Sizes((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (4, 4, 6, 6), (3, 3, 3, 3), full=(2, 3))
B = Sizes((80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (5, 5, 6, 6), (4, 4, 3, 3), full=(3,), scaled=(2, 3))


# ---------------------------------------------------------------------------------------------- the released layout
def _shapes(sizes: Sizes, classes: int):
    """Name and shape of every tensor; batch norms, layer norms and factors are told by the names."""
    half, whole = sizes.widths[0] // 2, sizes.widths[0]
    plan = zip((0, 3, 6, 9), (3, half, half, whole), (half, half, whole, whole))
    for n, width_in, width_out in plan:
        yield from _conv_norm(f"patch_embed.proj.{n}", f"patch_embed.proj.{n + 1}", width_in, width_out)
    for i, (width, depth) in enumerate(zip(sizes.widths, sizes.depths)):
        hidden = sizes.ratios[i] * width
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            for name in ("retention_layer_norm", "final_layer_norm"):
                yield from _layer(block + name, (width,))
            for name in "qkv":
                yield from _layer(f"{block}retention.{name}_proj", (width, width))
            yield from _layer(block + "retention.out_proj", (width, width))
            yield from _layer(block + "retention.lepe.conv", (width, 1, 5, 5))
            yield from _layer(block + "ffn.fc1", (hidden, width))
            yield from _layer(block + "ffn.fc2", (width, hidden))
            yield from _layer(block + "ffn.dwconv.conv", (hidden, 1, 3, 3))
            yield from _layer(block + "pos.conv", (width, 1, 3, 3))
            if i in sizes.scaled:
                yield from ((f"{block}gamma_{number}", (1, 1, 1, width)) for number in (1, 2))
        if i < 3:
            down = f"layers.{i}.downsample."
            yield from _conv_norm(down + "reduction", down + "norm", width, sizes.widths[i + 1])
    yield from _layer("proj", (1024, sizes.widths[-1]))
    yield from _batch_norm("norm", 1024)
    yield from _layer("head", (classes, 1024))


def _layer(name, shape):
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


def _batch_norm(name, width):
    return [*_layer(name, (width,)), (f"{name}.running_mean", (width,)), (f"{name}.running_var", (width,))]


def _conv_norm(conv, norm, width_in, width_out):
    return _layer(conv, (width_out, width_in, 3, 3)) + _batch_norm(norm, width_out)


def state_dict(sizes: Sizes, classes: int, seed: int = 0) -> dict:
    """A checkpoint of that layout, float64, everything random: at the usual start most bugs cannot be seen."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in _shapes(sizes, classes):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "gamma" in name or name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 1 + 0.15 * noise.abs()
        else:
            state[name] = noise * (0.15 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
        if name.endswith("running_mean"):
            state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    for i, heads in enumerate(sizes.heads):
        state[f"layers.{i}.Relpos.decay"] = torch.tensor(rates(heads, sizes.spans[i]), dtype=torch.float64)
        pairs = sizes.widths[i] // heads // 2
        angle = [10_000 ** -(channel // 2 / (pairs - 1)) for channel in range(2 * pairs)]
        state[f"layers.{i}.Relpos.angle"] = torch.tensor(angle, dtype=torch.float64)
    return state


def rates(heads: int, span: int) -> list[float]:
    return [math.log(1 - 2 ** -(2 + span * n / heads)) for n in range(heads)]


def under(state: dict, prefix: str) -> dict:
    """The entries below a prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------- small steps
def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def layer_norm(s, name, x):
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + EPS_NORM).sqrt()
    return centred / deviation * s[f"{name}.weight"] + s[f"{name}.bias"]


def conv(s, name, x, stride):
    weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, 1).permute(0, 2, 3, 1)


def depthwise(s, name, x):
    weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
    reach = weight.shape[-1] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=reach, groups=len(weight)).permute(0, 2, 3, 1)


def batch_norm(s, name, x, moving):
    """`moving`: None in evaluation; in training a dict that takes the statistics after the step."""
    mean, variance = s[f"{name}.running_mean"], s[f"{name}.running_var"]
    if moving is not None:
        count, before = x[..., 0].numel(), (mean, variance)
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), correction=0)
        seen = mean, variance * count / (count - 1)
        moving[name] = [(1 - MOMENTUM) * old + MOMENTUM * new.detach() for old, new in zip(before, seen)]
    return (x - mean) / (variance + EPS_BATCH).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x):
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


# ---------------------------------------------------------------------------------------------- the parts
def stem(s, images, moving):
    x = images.permute(0, 2, 3, 1)
    for n, stride in ((0, 2), (3, 1), (6, 2), (9, 1)):
        x = batch_norm(s, f"{n + 1}", conv(s, f"{n}", x, stride), moving)
        x = x if n == 9 else gelu(x)
    return x


def rotated(x):
    """x [B, h, w, H, D]: neighbouring channels turned by (row * width + column) * angle."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[4]
    angle = 10_000 ** -(torch.arange(channels // 2, dtype=x.dtype) / (channels // 2 - 1))
    turn = torch.arange(height * width, dtype=x.dtype).view(height, width, 1, 1) * angle
    a, b = x[..., ::2], x[..., 1::2]  # [B, h, w, H, D/2]
    return torch.stack((a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()), -1).flatten(-2)


def steps(cells):
    return (torch.arange(cells)[:, None] - torch.arange(cells)).abs()


def two_passes(q, k, v, decay):
    """Width, then height. q, k, v [B, h, w, H, D], decay [H]."""
    mask = lambda cells: steps(cells) * decay[:, None, None]  # [H, n, n]
    across = torch.einsum("byihd,byjhd->byhij", q, k) + mask(q.shape[2])
    v = torch.einsum("byhij,byjhd->byihd", across.softmax(-1), v)
    down = torch.einsum("bixhd,bjxhd->bxhij", q, k) + mask(q.shape[1])
    return torch.einsum("bxhij,bjxhd->bixhd", down.softmax(-1), v)


def whole_map(q, k, v, decay):
    """One softmax over all cells."""
    height, width = q.shape[1:3]
    apart = steps(height)[:, None, :, None] + steps(width)[None, :, None, :]  # [h, w, h, w]
    scores = torch.einsum("byxhd,bijhd->bhyxij", q, k) + apart * decay.view(-1, 1, 1, 1, 1)
    weights = scores.flatten(-2).softmax(-1).view_as(scores)
    return torch.einsum("bhyxij,bijhd->byxhd", weights, v)


def retention(s, u, decay, attend, parts):
    heads = len(decay)
    q, k, v = (linear(s, f"{name}_proj", u) for name in "qkv")
    split = lambda x: x.unflatten(-1, (heads, -1))
    q, k = parts["rotated"](split(q)), parts["rotated"](split(k) * (u.shape[-1] // heads) ** -0.5)
    z = parts[attend](q, k, split(v), decay).flatten(-2)
    return parts["end"](s, z, v, u)


def end(s, z, v, u):
    return linear(s, "out_proj", z + depthwise(s, "lepe.conv", v))


def feed_forward(s, x):
    y = gelu(linear(s, "fc1", x))
    return linear(s, "fc2", y + depthwise(s, "dwconv.conv", y))


def block(s, x, decay, attend, parts):
    mix = lambda u: retention(under(s, "retention."), u, decay, attend, parts)
    x = x + depthwise(s, "pos.conv", x)
    x = x + s.get("gamma_1", 1.0) * mix(layer_norm(s, "retention_layer_norm", x))
    return x + s.get("gamma_2", 1.0) * parts["feed_forward"](under(s, "ffn."), layer_norm(s, "final_layer_norm", x))


def downsample(s, x, moving):
    return batch_norm(s, "norm", conv(s, "reduction", x, 2), moving)


def head(s, x, moving):
    x = batch_norm(s, "norm", linear(s, "proj", x), moving)
    return linear(s, "head", (x * torch.sigmoid(x)).mean((1, 2)))


PARTS = {
    "stem": stem, "rotated": rotated, "decomposed": two_passes, "full": whole_map, "end": end,
    "feed_forward": feed_forward, "block": block, "downsample": downsample, "head": head,
}  # fmt: skip


def logits(state: dict, images, sizes: Sizes, moving: dict | None = None, **exchanged):
    """Scores [B, classes]; `moving` collects batch statistics in training, `exchanged` replaces entries of `PARTS`."""
    parts = PARTS | exchanged

    def normed(part, prefix, x):
        seen = None if moving is None else {}
        y = parts[part](under(state, prefix), x, seen)
        if moving is not None:
            moving.update({prefix + name: values for name, values in seen.items()})
        return y

    x = normed("stem", "patch_embed.proj.", images)
    for i, depth in enumerate(sizes.depths):
        decay = torch.tensor(rates(sizes.heads[i], sizes.spans[i]), dtype=x.dtype)
        for j in range(depth):
            s = under(state, f"layers.{i}.blocks.{j}.")
            x = parts["block"](s, x, decay, "full" if i in sizes.full else "decomposed", parts)
        if i < len(sizes.depths) - 1:
            x = normed("downsample", f"layers.{i}.downsample.", x)
    return normed("head", "", x)
