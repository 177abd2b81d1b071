"""Wrong answers to chapter 5, each with the hint that must refuse it. They keep the name of the right answer."""

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 5.1
@wrong("5.1", says="a shut gate would let the local context talk on")
def gated_output(x, attended, local, w_g, w_o):
    return (torch.sigmoid(x @ w_g.T) * attended + local) @ w_o.T


@wrong("5.1", says="that is position G5, not G1")
def gated_output(x, attended, local, w_g, w_o):
    return torch.sigmoid(x @ w_g.T) * ((attended + local) @ w_o.T)


@wrong("5.1", says="they are read from the block input x")
def gated_output(x, attended, local, w_g, w_o):
    y = attended + local
    return (torch.sigmoid(y @ w_g.T) * y) @ w_o.T


@wrong("5.1", says="computed from the attended part")
def gated_output(x, attended, local, w_g, w_o):
    return (torch.sigmoid(attended @ w_g.T) * (attended + local)) @ w_o.T


@wrong("5.1", says="a shut gate would let the attended part talk on")
def gated_output(x, attended, local, w_g, w_o):
    return (attended + torch.sigmoid(x @ w_g.T) * local) @ w_o.T


@wrong("5.1", says="W_O is missing")
def gated_output(x, attended, local, w_g, w_o):
    return torch.sigmoid(x @ w_g.T) * (attended + local)


@wrong("5.1", says="the sigmoid is missing")
def gated_output(x, attended, local, w_g, w_o):
    return ((x @ w_g.T) * (attended + local)) @ w_o.T


@wrong("5.1", says="that is a SiLU")
def gated_output(x, attended, local, w_g, w_o):
    return (F.silu(x @ w_g.T) * (attended + local)) @ w_o.T


@wrong("5.1", says="W_g is used transposed")
def gated_output(x, attended, local, w_g, w_o):
    return (torch.sigmoid(x @ w_g) * (attended + local)) @ w_o.T


@wrong("5.1", says="W_O is used transposed")
def gated_output(x, attended, local, w_g, w_o):
    return (torch.sigmoid(x @ w_g.T) * (attended + local)) @ w_o


@wrong("5.1", says="in place")
def gated_output(x, attended, local, w_g, w_o):
    attended += local
    return (torch.sigmoid(x @ w_g.T) * attended) @ w_o.T


# ---------------------------------------------------------------------------------------------- 5.2
def convolved(v, weight, **options):
    first = v.permute(0, 3, 1, 2)
    return F.conv2d(first, weight[:, None], groups=len(weight), **options).permute(0, 2, 3, 1)


@wrong("5.2", says="the filter is transposed")
def local_context(v, weight):
    return convolved(v, weight.mT, padding=weight.shape[-1] // 2)


@wrong("5.2", says="the filter is turned round")
def local_context(v, weight):
    return convolved(v, weight.flip(1, 2), padding=weight.shape[-1] // 2)


@wrong("5.2", says="wrapped round at its border")
def local_context(v, weight):
    edge, (height, width) = weight.shape[-1] // 2, v.shape[1:3]
    rows, columns = (torch.arange(-edge, side + edge) % side for side in (height, width))
    return convolved(v[:, rows][:, :, columns], weight)


@wrong("5.2", says="the border cells are repeated")
def local_context(v, weight):
    edge, (height, width) = weight.shape[-1] // 2, v.shape[1:3]
    rows, columns = (torch.arange(-edge, side + edge).clamp(0, side - 1) for side in (height, width))
    return convolved(v[:, rows][:, :, columns], weight)


@wrong("5.2", says="every channel uses the first channel's filter")
def local_context(v, weight):
    return convolved(v, weight[:1].expand_as(weight), padding=weight.shape[-1] // 2)


@wrong("5.2", says="the channels are mixed")
def local_context(v, weight):
    return convolved(v, weight, padding=weight.shape[-1] // 2) * 0 + F.conv2d(
        v.permute(0, 3, 1, 2), weight[None].expand(len(weight), -1, -1, -1), padding=weight.shape[-1] // 2
    ).permute(0, 2, 3, 1)


@wrong("5.2", says="LCE itself has no residual")
def local_context(v, weight):
    return v + convolved(v, weight, padding=weight.shape[-1] // 2)


@wrong("5.2", says="expected [2, 4, 6, 3]")
def local_context(v, weight):
    return convolved(v, weight)


# ---------------------------------------------------------------------------------------------- 5.3
def one_pass(q, k, v, log_gamma, axis, scale=None, decay=True):
    q, k, v = (x.movedim(axis, 3) for x in (q, k, v))
    place = torch.arange(q.shape[3])
    mask = (place[:, None] - place).abs() * log_gamma.view(-1, 1, 1).to(q.dtype)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores + mask, -1) if decay else torch.softmax(scores, -1) * mask.exp()
    return (weights @ v).movedim(3, axis)


def both(q, k, v, log_gamma, **options):
    return one_pass(q, k, one_pass(q, k, v, log_gamma, 2, **options), log_gamma, 1, **options)


@wrong("5.3", says="the height pass comes first")
def two_passes(q, k, v, log_gamma):
    return one_pass(q, k, one_pass(q, k, v, log_gamma, 1), log_gamma, 2)


@wrong("5.3", says="in reverse order")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, log_gamma.flip(0))


@wrong("5.3", says="the scale 1 / sqrt(D) is missing")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, log_gamma, scale=1.0)


@wrong("5.3", says="the decay comes after the softmax")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, log_gamma, decay=False)


@wrong("5.3", says="distant cells count more")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, -log_gamma)


@wrong("5.3", says="the height pass is missing")
def two_passes(q, k, v, log_gamma):
    return one_pass(q, k, v, log_gamma, 2)


@wrong("5.3", says="the width pass is missing")
def two_passes(q, k, v, log_gamma):
    return one_pass(q, k, v, log_gamma, 1)


@wrong("5.3", says="at the rate of the first")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, log_gamma[:1].expand_as(log_gamma))


@wrong("5.3", says="read the original values and are added")
def two_passes(q, k, v, log_gamma):
    return one_pass(q, k, v, log_gamma, 1) + one_pass(q, k, v, log_gamma, 2)


@wrong("5.3", says="there is no decay")
def two_passes(q, k, v, log_gamma):
    return both(q, k, v, log_gamma * 0)


# ---------------------------------------------------------------------------------------------- 5.4
def column(branch, kept):
    return kept.view(-1, *(1,) * (branch.ndim - 1)).to(branch.dtype)


@wrong("5.4", says="what stays is not made larger")
def drop_path(branch, rate, training, kept):
    return branch * column(branch, kept) if training else branch


@wrong("5.4", says="not by the share of this draw")
def drop_path(branch, rate, training, kept):
    return branch * column(branch, kept) / kept.double().mean().to(branch.dtype) if training else branch


@wrong("5.4", says="not by the rate")
def drop_path(branch, rate, training, kept):
    return branch * column(branch, kept) / max(rate, 1e-3) if training else branch


@wrong("5.4", says="an image keeps its branch whole or not at all")
def drop_path(branch, rate, training, kept):
    return branch * (torch.rand_like(branch) > rate) / (1 - rate) if training else branch


@wrong("5.4", says="with rate 0 the branch passes as it is")
def drop_path(branch, rate, training, kept):
    if not training:
        return branch
    return torch.zeros_like(branch) if rate == 0 else branch * column(branch, kept) / (1 - rate)


@wrong("5.4", says="outside training nothing is scaled")
def drop_path(branch, rate, training, kept):
    return (branch * column(branch, kept) if training else branch) / (1 - rate)


@wrong("5.4", says="outside training nothing is left out")
def drop_path(branch, rate, training, kept):
    return branch * column(branch, kept) / (1 - rate)


@wrong("5.4", says="the inverse scaling belongs to training")
def drop_path(branch, rate, training, kept):
    return branch * column(branch, kept) / (1 - rate) if training else branch * (1 - rate)


@wrong("5.4", says="the images are the wrong ones")
def drop_path(branch, rate, training, kept):
    return branch * (1 - column(branch, kept)) / (1 - rate) if training else branch


@wrong("5.4", says="whole images are left out, not channels")
def drop_path(branch, rate, training, kept):
    if not training or branch.shape[-1] != len(kept):
        return branch * column(branch, kept) / (1 - rate) if training else branch
    return branch * kept.to(branch.dtype) / (1 - rate)


@wrong("5.4", says="in place")
def drop_path(branch, rate, training, kept):
    if training:
        branch *= column(branch, kept) / (1 - rate)
    return branch


# ---------------------------------------------------------------------------------------------- 5.5
def stages(pixels, stride, window, up=True, rule=True, odd=True):
    divide = lambda a, b: -(-a // b) if up else a // b
    plan, side = [], divide(pixels, stride)
    for _ in range(4):
        used = min(window, side) if rule else window
        plan.append((side, used, used // 2 if side > used or not odd else 0))
        side = max(1, divide(side, 2))
    return plan


@wrong("5.5", says="is rounded up")
def plan_of_stages(pixels, stem_stride, window):
    return stages(pixels, stem_stride, window, up=False)


@wrong("5.5", says="the smaller of the wanted one and the map")
def plan_of_stages(pixels, stem_stride, window):
    return stages(pixels, stem_stride, window, rule=False)


@wrong("5.5", says="one window covers the map")
def plan_of_stages(pixels, stem_stride, window):
    return stages(pixels, stem_stride, window, odd=False)


@wrong("5.5", says="the stem divides by its stride")
def plan_of_stages(pixels, stem_stride, window):
    return stages(pixels, 1, window)


@wrong("5.5", says="rounded down")
def plan_of_stages(pixels, stem_stride, window):
    return [(side, used, shift and (used + 1) // 2) for side, used, shift in stages(pixels, stem_stride, window)]


@wrong("5.5", says="four triples")
def plan_of_stages(pixels, stem_stride, window):
    return stages(pixels, stem_stride, window)[:3]


# ---------------------------------------------------------------------------------------------- 5.6
def counts(c, heads, **changed):
    right = {
        "qkv": 3 * c * (c + 1), "lce": 26 * c, "gate_elementwise": c * c, "gate_headwise": c * heads,
        "out": c * (c + 1), "total": 3 * c * (c + 1) + 26 * c + c * c + c * (c + 1),
    }  # fmt: skip
    return right | changed


@wrong("5.6", says="a projection has a bias too")
def parameters_of_a_mixer(channels, heads):
    return counts(channels, heads, qkv=3 * channels**2)


@wrong("5.6", says="not one for each pair of channels")
def parameters_of_a_mixer(channels, heads):
    return counts(channels, heads, lce=channels * (25 * channels + 1))


@wrong("5.6", says="the gate has no bias")
def parameters_of_a_mixer(channels, heads):
    return counts(channels, heads, gate_elementwise=channels * (channels + 1))


@wrong("5.6", says="one score a head, not one a channel")
def parameters_of_a_mixer(channels, heads):
    return counts(channels, heads, gate_headwise=channels**2)


@wrong("5.6", says="a mixer has one gate, not both")
def parameters_of_a_mixer(channels, heads):
    right = counts(channels, heads)
    return right | {"total": right["total"] + channels * heads}


@wrong("5.6", says="has no entry 'total'")
def parameters_of_a_mixer(channels, heads):
    right = counts(channels, heads)
    del right["total"]
    return right


# ---------------------------------------------------------------------------------------------- 5.7
def case(filled, row, column):
    def map_that_shows_the_walls():
        image = torch.zeros(8, 8, dtype=torch.float64)
        for cell in filled:
            image[cell] = 1.0
        return image, row, column

    return map_that_shows_the_walls


wrong("5.7", says="lies inside its window")(case([(1, 4)], 1, 2))
wrong("5.7", says="both ways give 0")(case([], 2, 3))
wrong("5.7", says="is not empty")(case([(2, 4), (2, 2)], 2, 3))
wrong("5.7", says="the neighbours behind the wall say nothing")(case([(2, 6)], 2, 3))
wrong("5.7", says="whole numbers from 0 to 7")(case([(2, 4)], 2, 8))


@wrong("5.7", says="return (map, row, column)")
def map_that_shows_the_walls():
    return torch.zeros(8, 8)


# ---------------------------------------------------------------------------------------------- 5.8
def four_sentences(mixer, shut=True, wide_open=True, small=True, sign=True, local=True, images=2, cell=(0, 1, 2)):
    z, logits = torch.randn(2, images, 3, 4, 5, dtype=torch.float64)
    wide, other, cell = torch.full_like(z, 60.0), logits.clone(), (images - 1, *cell)
    other[cell] += 1.0
    before = mixer(z, logits)
    moved = (mixer(z, other) - before).abs() > 1e-12
    return (
        (not shut or bool(mixer(z, -wide).abs().max() < 1e-9))
        and (not wide_open or torch.allclose(mixer(z, wide), z))
        and (not small or bool((before.abs() <= z.abs() + 1e-12).all()))
        and (not sign or bool((before * z >= 0).all()))
        and (not local or (bool(moved[cell]) and int(moved.sum()) == 1))
    )


@wrong("5.8", says="one it lets through: one score a head")
def gate_does_its_work(mixer):
    return four_sentences(mixer, local=False)


@wrong("5.8", says="one it lets through: images share their scores")
def gate_does_its_work(mixer):
    return four_sentences(mixer, images=1)  # one image has nobody to share with


@wrong("5.8", says="one it lets through: scores in [0.5, 1]")
def gate_does_its_work(mixer):
    return four_sentences(mixer, shut=False)


@wrong("5.8", says="one it lets through: half the sigmoid")
def gate_does_its_work(mixer):
    return four_sentences(mixer, wide_open=False)


@wrong("5.8", says="one it lets through: a score that overshoots 1")
def gate_does_its_work(mixer):
    return four_sentences(mixer, small=False)


@wrong("5.8", says="one it lets through: a SiLU that is cut off at 1")
def gate_does_its_work(mixer):
    return four_sentences(mixer, sign=False)


@wrong("5.8", says="one it lets through: rows and columns of the scores are swapped")
def gate_does_its_work(mixer):
    return four_sentences(mixer, cell=(2, 3, 4))  # a corner stays where it is


@wrong("5.8", says="turns down a right implementation: a steeper sigmoid")
def gate_does_its_work(mixer):
    z, logits = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    return torch.allclose(mixer(z, logits), z * torch.sigmoid(logits))


@wrong("5.8", says="catches 0 of")
def gate_does_its_work(mixer):
    return True


@wrong("5.8", says="turns down a right implementation")
def gate_does_its_work(mixer):
    return False
