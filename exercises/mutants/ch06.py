"""Wrong answers to chapter 6, each with the hint that must refuse it. They keep the name of the right answer."""

import math

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 6.1
def parts(q, k, slope, gamma):
    cells = torch.arange(q.shape[-2])
    offset = (cells[:, None] - cells).to(q.dtype)
    return q @ k.mT / math.sqrt(q.shape[-1]), slope * offset, gamma ** offset.abs()


def with_weights(weigh):
    def function(q, k, v, slope, gamma):
        return weigh(*parts(q, k, slope, gamma)) @ v

    function.__name__ = "sigmoid_pass"
    return function


wrong("6.1", says="a softmax instead of a sigmoid")(with_weights(lambda s, b, d: torch.softmax(s + b, -1) * d))
wrong("6.1", says="that is the retention of chapter 5")(with_weights(lambda s, b, d: torch.softmax(s + b + d.log(), -1)))
wrong("6.1", says="the decay is added inside the sigmoid")(with_weights(lambda s, b, d: torch.sigmoid(s + b + d.log())))
wrong("6.1", says="the slope is outside the sigmoid")(with_weights(lambda s, b, d: torch.sigmoid(s) * d + b))
wrong("6.1", says="the head looks to the other side")(with_weights(lambda s, b, d: torch.sigmoid(s - b) * d))
wrong("6.1", says="the slope is missing")(with_weights(lambda s, b, d: torch.sigmoid(s) * d))
wrong("6.1", says="the decay is missing")(with_weights(lambda s, b, d: torch.sigmoid(s + b)))
wrong("6.1", says="the weights are transposed")(with_weights(lambda s, b, d: (torch.sigmoid(s + b) * d).mT))
wrong("6.1", says="the weights are divided by their sum")(
    with_weights(lambda s, b, d: F.normalize(torch.sigmoid(s + b) * d, p=1, dim=-1))
)


@wrong("6.1", says="the slope multiplies |i - j|")
def sigmoid_pass(q, k, v, slope, gamma):
    s, _, d = parts(q, k, slope, gamma)
    cells = torch.arange(q.shape[-2])
    return torch.sigmoid(s + slope * (cells[:, None] - cells).abs()) * d @ v


@wrong("6.1", says="the decay takes the signed offset")
def sigmoid_pass(q, k, v, slope, gamma):
    s, b, _ = parts(q, k, slope, gamma)
    cells = torch.arange(q.shape[-2])
    return torch.sigmoid(s + b) * gamma ** (cells[:, None] - cells).to(q.dtype) @ v


@wrong("6.1", says="the scale 1 / sqrt(D) is missing")
def sigmoid_pass(q, k, v, slope, gamma):
    s, b, d = parts(q, k, slope, gamma)
    return torch.sigmoid(q @ k.mT + b) * d @ v


@wrong("6.1", says="the scale is applied to the slope too")
def sigmoid_pass(q, k, v, slope, gamma):
    _, b, d = parts(q, k, slope, gamma)
    return torch.sigmoid((q @ k.mT + b) / math.sqrt(q.shape[-1])) * d @ v


@wrong("6.1", says="changes its input `q` in place")
def sigmoid_pass(q, k, v, slope, gamma):
    q /= math.sqrt(q.shape[-1])
    _, b, d = parts(q, k, slope, gamma)
    return torch.sigmoid(q @ k.mT + b) * d @ v


@wrong("6.1", says="no gradient reaches `q`")
def sigmoid_pass(q, k, v, slope, gamma):
    s, b, d = parts(q, k, slope, gamma)
    return (torch.sigmoid(s + b) * d).detach() @ v


@wrong("6.1", says="keep the dtype of the input")
def sigmoid_pass(q, k, v, slope, gamma):
    s, b, d = parts(q.double(), k.double(), slope, gamma)
    return torch.sigmoid(s + b) * d @ v.double()


# ---------------------------------------------------------------------------------------------- 6.2
def guarded(make):
    def function(heads):
        if heads < 2 or heads % 2:
            raise ValueError(heads)
        return make(heads, torch.arange(1.0, heads // 2 + 1))

    function.__name__ = "slopes_of_both_signs"
    return function


def mirrored(x):
    return torch.cat((x, -x))


wrong("6.2", says="k starts at 1")(guarded(lambda heads, k: mirrored(2.0 ** -(k - 1))))
wrong("6.2", says="all slopes are positive")(guarded(lambda heads, k: mirrored(2.0**-k).abs()))
wrong("6.2", says="all slopes are negative")(guarded(lambda heads, k: -mirrored(2.0**-k).abs()))
wrong("6.2", says="the halves are exchanged")(guarded(lambda heads, k: mirrored(-(2.0**-k))))
wrong("6.2", says="the signs alternate")(guarded(lambda heads, k: torch.stack((2.0**-k, -(2.0**-k)), 1).flatten()))
wrong("6.2", says="the second half goes on with smaller numbers")(
    guarded(lambda heads, k: torch.cat((2.0**-k, -(2.0 ** -(k + heads // 2)))))
)
wrong("6.2", says="SWAT's is 2^-k")(guarded(lambda heads, k: mirrored(2 ** (-8 * k / (heads // 2)))))
wrong("6.2", says="ALiBi's sequence 2^(-8k / H) over all heads")(
    guarded(lambda heads, k: 2 ** (-8 * torch.arange(1.0, heads + 1) / heads))
)
wrong("6.2", says="1 / k falls too slowly")(guarded(lambda heads, k: mirrored(1 / (2 * k))))
wrong("6.2", says="the first one backwards")(guarded(lambda heads, k: torch.cat((2.0**-k, -(2.0**-k).flip(0)))))
wrong("6.2", says="make them floats")(guarded(lambda heads, k: (2 ** (heads // 2 - mirrored(k).abs())).long()))


@wrong("6.2", says="5 heads must be refused with a ValueError")
def slopes_of_both_signs(heads):
    half = 2.0 ** -torch.arange(1.0, heads // 2 + 1)
    return torch.cat((half, -half))


@wrong("6.2", says="1 head must be refused with a ValueError")
def slopes_of_both_signs(heads):
    if heads % 2 and heads > 1:
        raise ValueError(heads)
    return mirrored(2.0 ** -torch.arange(1.0, heads // 2 + 1))


# ---------------------------------------------------------------------------------------------- 6.3
def local_context(v, kernel):
    return F.conv2d(v.permute(0, 3, 1, 2), kernel[:, None], padding=2, groups=len(kernel)).permute(0, 2, 3, 1)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def ending(make):
    """make(z joined, local context, w_out transposed, z, v, kernel)."""

    def function(z, v, kernel, w_out):
        return make(z.flatten(-2), local_context(v, kernel), w_out.T, z, v, kernel)

    function.__name__ = "normalise_then_add"
    return function


wrong("6.3", says="the norm is missing")(ending(lambda j, local, out, *_: (j + local) @ out))
wrong("6.3", says="the local context is missing")(ending(lambda j, local, out, *_: norm(j) @ out))
wrong("6.3", says="the norm is taken after the local context")(ending(lambda j, local, out, *_: norm(j + local) @ out))
wrong("6.3", says="the norm is taken after W_O")(ending(lambda j, local, out, *_: norm((j + local) @ out)))
wrong("6.3", says="the convolution reads z")(ending(lambda j, l, out, z, v, k: (norm(j) + local_context(j, k)) @ out))
wrong("6.3", says="reads the normalised z")(
    ending(lambda j, l, out, z, v, k: (norm(j) + local_context(norm(j), k)) @ out)
)
wrong("6.3", says="both go through W_O")(ending(lambda j, local, out, *_: norm(j) @ out + local))
wrong("6.3", says="each head is normalised by itself")(
    ending(lambda j, local, out, z, *_: (norm(z).flatten(-2) + local) @ out)
)
wrong("6.3", says="the norm runs over the whole map")(
    ending(lambda j, local, out, *_: (F.layer_norm(j, j.shape[1:], eps=1e-6) + local) @ out)
)
wrong("6.3", says="the norm runs over the cells")(
    ending(lambda j, local, out, *_: (norm(j.flatten(1, 2).mT).mT.view_as(j) + local) @ out)
)
wrong("6.3", says="that is RMSNorm")(
    ending(lambda j, local, out, *_: (F.rms_norm(j, j.shape[-1:], eps=1e-6) + local) @ out)
)
wrong("6.3", says="joined in the wrong order")(ending(lambda j, local, out, z, *_: (norm(z.mT.flatten(-2)) + local) @ out))
wrong("6.3", says="rows and columns of the map are exchanged")(
    ending(lambda j, l, out, z, v, k: (norm(j) + local_context(v, k.mT)) @ out)
)
wrong("6.3", says="use ... @ w_out.T")(ending(lambda j, local, out, *_: (norm(j) + local) @ out.T))
wrong("6.3", says="no gradient reaches `v`")(ending(lambda j, local, out, *_: (norm(j) + local.detach()) @ out))


@wrong("6.3", says="changes its input `z` in place")
def normalise_then_add(z, v, kernel, w_out):
    z -= z.mean((-2, -1), keepdim=True)
    return (norm(z.flatten(-2)) + local_context(v, kernel)) @ w_out.T


# ---------------------------------------------------------------------------------------------- 6.4
def two_groups(q, v=None, group=(0, 0, 1, 1)):
    group = torch.tensor(group)
    v = torch.arange(1.0, 17.0, dtype=torch.float64).view(4, 4) if v is None else v
    return q, q.clone(), v, group[:, None] == group


def large():
    return torch.full((4, 4), 10.0, dtype=torch.float64)


@wrong("6.4", says="the mask 'minus_100' goes unnoticed")
def mask_test_case():
    return two_groups(torch.randn(4, 4, dtype=torch.float64))


@wrong("6.4", says="the mask 'minus_100' goes unnoticed")
def mask_test_case():
    q, _, v, allowed = two_groups(large())
    return q, -q, v, allowed  # scores of -200: nothing to leak


@wrong("6.4", says="the mask 'zeroed' goes unnoticed")
def mask_test_case():
    return two_groups(large(), 0.01 * torch.ones(4, 4, dtype=torch.float64))


@wrong("6.4", says="no shifted window has this mask")
def mask_test_case():
    return two_groups(large(), group=(0, 1, 0, 1))


@wrong("6.4", says="a cell may not look at itself")
def mask_test_case():
    q, k, v, allowed = two_groups(large())
    return q, k, v, ~allowed


@wrong("6.4", says="nothing is forbidden")
def mask_test_case():
    return two_groups(large(), group=(0, 0, 0, 0))


@wrong("6.4", says="larger than 20 in absolute value, or not a number")
def mask_test_case():
    return two_groups(10 * large())


@wrong("6.4", says="must be a float64 tensor")
def mask_test_case():
    q, k, v, allowed = two_groups(large())
    return q.float(), k.float(), v.float(), allowed


@wrong("6.4", says="no shifted window has this mask")
def mask_test_case():
    q, k, v, allowed = two_groups(large())
    return q, k, v, torch.ones(4, 4).tril().bool()  # causal


@wrong("6.4", says="return the four of (q, k, v, allowed)")
def mask_test_case():
    return two_groups(large())[:3]


# ---------------------------------------------------------------------------------------------- 6.5
def drawn():
    return torch.randn(3, 2, 6, 4, dtype=torch.float64)


@wrong("6.5", says="catches 0 of 9")
def weights_are_independent(attend):
    return True


@wrong("6.5", says="turns down a right implementation")
def weights_are_independent(attend):
    return False


@wrong("6.5", says="turns down a right implementation: a sigmoid divided by the number of cells")
def weights_are_independent(attend):
    q, k, _ = drawn()
    rows = attend(q, k, torch.ones(2, 6, 1, dtype=torch.float64))
    return bool((rows > 1.05).any())  # "rows do not sum to one", in one direction only


@wrong("6.5", says="turns down a right implementation: plain sigmoid attention")
def weights_are_independent(attend):
    q, k, v = drawn()
    other = k.clone()
    other[:, 2] = 0  # with its value still there, the key must show
    return torch.allclose(attend(q, k, v), attend(q, other, v))


@wrong("6.5", says="one it lets through: a softmax multiplied by a decay")
def weights_are_independent(attend):
    q, k, _ = drawn()
    rows = attend(q, k, torch.ones(2, 6, 1, dtype=torch.float64))
    return not torch.allclose(rows, torch.ones_like(rows))  # only: rows do not sum to one


@wrong("6.5", says="one it lets through: a softmax over the queries")
def weights_are_independent(attend):
    q, k, v = drawn()
    v[:, 2] = 0
    other = k.clone()
    other[:, 2] = 3 * torch.randn(2, 4, dtype=torch.float64)
    return torch.allclose(attend(q, k, v), attend(q, other, v))


@wrong("6.5", says="one it lets through: softmax attention")
def weights_are_independent(attend):
    q, k, v = drawn()
    other = q.clone()
    other[:, 2] = 3 * torch.randn(2, 4, dtype=torch.float64)
    rest = torch.arange(6) != 2
    return torch.allclose(attend(q, k, v)[:, rest], attend(other, k, v)[:, rest])


@wrong("6.5", says="returns Tensor; return True or False")
def weights_are_independent(attend):
    q, k, v = drawn()
    return attend(q, k, v) > 0


# ---------------------------------------------------------------------------------------------- 6.6
def growth(window, gamma, half=0.5, distance=abs, passes=lambda r: r * r, **changed):
    sums = [half * sum(gamma ** distance(i - j) for j in range(window)) for i in range(window)]
    end, middle = sums[0], sums[window // 2]
    names = {"row_end": end, "row_middle": middle, "corner": passes(end), "middle": passes(middle)}
    names["mean"] = passes(sum(sums) / window)
    return names | {name: make(sums) for name, make in changed.items()}


@wrong("6.6", says="a sigmoid of 0 is one half")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, half=1.0)


@wrong("6.6", says="both sides count")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, row_middle=lambda sums: 0.5 * sum(gamma**d for d in range(window // 2 + 1)))


@wrong("6.6", says="'corner' for W = 3, gamma = 0.5 is 0.875: that is a single pass")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, passes=lambda r: r)


@wrong("6.6", says="they do not add")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, passes=lambda r: 2 * r)


@wrong("6.6", says="that is the cell at the other place")
def growth_at_the_start(window, gamma):
    right = growth(window, gamma)
    return right | {"row_end": right["row_middle"], "row_middle": right["row_end"]}


@wrong("6.6", says="the cell itself is left out")
def growth_at_the_start(window, gamma):
    sums = [0.5 * sum(gamma ** abs(i - j) for j in range(window) if j != i) for i in range(window)]
    end, middle, mean = sums[0], sums[window // 2], sum(sums) / window
    return {"row_end": end, "row_middle": middle, "corner": end**2, "middle": middle**2, "mean": mean**2}


@wrong("6.6", says="not over the corner and the middle alone")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, mean=lambda sums: (sums[0] ** 2 + sums[window // 2] ** 2) / 2)


@wrong("6.6", says="not over the diagonal")
def growth_at_the_start(window, gamma):
    return growth(window, gamma, mean=lambda sums: sum(r * r for r in sums) / window)


@wrong("6.6", says="no entry 'mean'")
def growth_at_the_start(window, gamma):
    right = growth(window, gamma)
    return {name: right[name] for name in right if name != "mean"}


# ---------------------------------------------------------------------------------------------- 6.7
def counts(C, H, linear=None, lce=None, norm=None, **changed):
    linear = C * C + C if linear is None else linear
    lce, norm = 26 * C if lce is None else lce, 2 * C if norm is None else norm
    each = {
        "rmt": 4 * linear + lce,
        "retention": 4 * linear + lce + C * C,
        "headwise": 4 * linear + lce + C * H,
        "swat": 5 * linear + lce + norm,
        "self": 5 * linear + lce + norm,
        "mlp": 6 * linear + lce + norm,
        "plain": 4 * linear + lce + norm,
    }
    return each | {name: each[name] + more for name, more in changed.items()}


@wrong("6.7", says="the convolution is depth-wise")
def mixer_parameters(C, H):
    return counts(C, H, lce=25 * C * C + C)


@wrong("6.7", says="'rmt' for C = 12, H = 4 is 924: a bias of C numbers is missing")
def mixer_parameters(C, H):
    return counts(C, H, lce=25 * C)


@wrong("6.7", says="the linear layers have biases")
def mixer_parameters(C, H):
    return counts(C, H, linear=C * C)


@wrong("6.7", says="the LayerNorm is missing")
def mixer_parameters(C, H):
    return counts(C, H, norm=0)


@wrong("6.7", says="the convolution is missing")
def mixer_parameters(C, H):
    return counts(C, H, lce=0)


@wrong("6.7", says="'retention' for C = 12, H = 4 is 1,092: G1 is bias-free")
def mixer_parameters(C, H):
    return counts(C, H, retention=C)


@wrong("6.7", says="the headwise gate has H outputs, not C")
def mixer_parameters(C, H):
    return counts(C, H, headwise=C * C - C * H)


@wrong("6.7", says="there is no output gate G1 beside the value gate")
def mixer_parameters(C, H):
    return counts(C, H, swat=C * C)


@wrong("6.7", says="takes two matrices in place of one")
def mixer_parameters(C, H):
    return counts(C, H, swat=-C * C - C)


@wrong("6.7", says="there is no third matrix after the product")
def mixer_parameters(C, H):
    return counts(C, H, swat=C * C + C)


@wrong("6.7", says="so W_V is needed as well")
def mixer_parameters(C, H):
    return counts(C, H, self=-C * C - C)


@wrong("6.7", says="the third matrix comes on top of the other two")
def mixer_parameters(C, H):
    return counts(C, H, mlp=-C * C - C)


@wrong("6.7", says="no entry 'plain'")
def mixer_parameters(C, H):
    return {name: number for name, number in counts(C, H).items() if name != "plain"}
