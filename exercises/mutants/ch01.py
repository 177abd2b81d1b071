"""Wrong answers to chapter 1, each with the hint that must refuse it. They keep the name of the right answer."""

import math

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 1.1
@wrong("1.1", says="softmax runs over the queries")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-2) @ v


@wrong("1.1", says="softmax runs over the heads")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=1) @ v


@wrong("1.1", says="weights of a query do not sum to 1")
def scaled_dot_product(q, k, v):
    return torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) @ v


@wrong("1.1", says="without the 1/sqrt(D) scale")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT, dim=-1) @ v


@wrong("1.1", says="divided by D, not by its square root")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1], dim=-1) @ v


@wrong("1.1", says="multiplied by sqrt(D)")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT * math.sqrt(q.shape[-1]), dim=-1) @ v


@wrong("1.1", says="square root of the number of heads")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[1] ** 0.5, dim=-1) @ v


@wrong("1.1", says="square root of the number of keys")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(k.shape[-2]), dim=-1) @ v


@wrong("1.1", says="changes its input `q` in place")
def scaled_dot_product(q, k, v):
    q /= math.sqrt(q.shape[-1])
    return torch.softmax(q @ k.mT, dim=-1) @ v


@wrong("1.1", says="no gradient reaches `q`")
def scaled_dot_product(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).detach() @ v


@wrong("1.1", says="keep the dtype of the input")
def scaled_dot_product(q, k, v):
    return torch.softmax((q @ k.mT).double() / math.sqrt(q.shape[-1]), dim=-1) @ v.double()


@wrong("1.1", says="shape [2, 4, 3, 6], expected [2, 3, 4, 6]")
def scaled_dot_product(q, k, v):
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- 1.2
def causal(queries, keys, diagonal=None):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if diagonal is None else diagonal)


@wrong("1.2", says="the causal mask is missing")
def causal_weights(q, k):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)


@wrong("1.2", says="the mask comes after the softmax")
def causal_weights(q, k):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) * causal(q.shape[-2], k.shape[-2])


@wrong("1.2", says="masked only afterwards")
def causal_weights(q, k):
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) * causal(q.shape[-2], k.shape[-2])
    return weights / weights.sum(-1, keepdim=True)


@wrong("1.2", says="aligned to the start")
def causal_weights(q, k):
    mask = causal(q.shape[-2], k.shape[-2], diagonal=0)
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf), dim=-1)


@wrong("1.2", says="the wrong way round")
def causal_weights(q, k):
    mask = causal(q.shape[-2], k.shape[-2], diagonal=k.shape[-2] - q.shape[-2] - 1)
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(mask, -torch.inf), dim=-1)


@wrong("1.2", says="keep the diagonal")
def causal_weights(q, k):
    mask = causal(q.shape[-2], k.shape[-2], diagonal=k.shape[-2] - q.shape[-2] - 1)
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf), dim=-1)


@wrong("1.2", says="exp(0) = 1 is still a weight")
def causal_weights(q, k):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) * causal(q.shape[-2], k.shape[-2]), dim=-1)


@wrong("1.2", says="too wide")
def causal_weights(q, k):
    mask = causal(q.shape[-2], k.shape[-2], diagonal=k.shape[-2] - q.shape[-2] + 1)
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf), dim=-1)


@wrong("1.2", says="without the 1/sqrt(D) scale")
def causal_weights(q, k):
    mask = causal(q.shape[-2], k.shape[-2])
    return torch.softmax((q @ k.mT).masked_fill(~mask, -torch.inf), dim=-1)


# ---------------------------------------------------------------------------------------------- 1.3
@wrong("1.3", says="use repeat_interleave, not repeat")
def grouped_query_attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1))


@wrong("1.3", says="use repeat_interleave, not repeat")
def grouped_query_attention(q, k, v):
    by_group = q.unflatten(1, (-1, k.shape[1]))  # [B, G, K, T, D] instead of [B, K, G, T, D]
    return F.scaled_dot_product_attention(by_group, k[:, None], v[:, None]).flatten(1, 2)


@wrong("1.3", says="but keys are not")
def grouped_query_attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat(1, group, 1, 1), v.repeat_interleave(group, dim=1))


@wrong("1.3", says="tokens are repeated instead of heads")
def grouped_query_attention(q, k, v):
    group, shape = q.shape[1] // k.shape[1], (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    k, v = (x.repeat_interleave(group, dim=2).reshape(shape) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


@wrong("1.3", says="each head reads exactly one")
def grouped_query_attention(q, k, v):
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v)
    k, v = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    return F.scaled_dot_product_attention(q, k.expand_as(q[..., :1, :].expand(-1, -1, k.shape[2], -1)), v)


@wrong("1.3", says="each head reads exactly one")
def grouped_query_attention(q, k, v):
    if q.shape[1] != k.shape[1]:
        k, v = k[:, :1], v[:, :1]  # only the first head
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v


@wrong("1.3", says="without the 1/sqrt(D) scale")
def grouped_query_attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return torch.softmax(q @ k.mT, dim=-1) @ v


# ---------------------------------------------------------------------------------------------- 1.4
def angles_of(x, positions, base, exponent=2.0):
    channels = torch.arange(x.shape[-1] // 2).double()
    return positions.double()[:, None] * base ** (-exponent * channels / x.shape[-1])


def turn(x, angles):
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@wrong("1.4", says="the interleaved layout")
def rotate(x, positions, base=10_000.0):
    angles = angles_of(x, positions, base)
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


@wrong("1.4", says="turns backwards")
def rotate(x, positions, base=10_000.0):
    return turn(x, -angles_of(x, positions, base))


@wrong("1.4", says="not a rotation")
def rotate(x, positions, base=10_000.0):
    angles = angles_of(x, positions, base)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos + b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@wrong("1.4", says="position 0 must leave x as it is")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, positions + 1, base))


@wrong("1.4", says="`positions` is not used")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, torch.arange(x.shape[-2]), base))


@wrong("1.4", says="the exponent is -i / D")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, positions, base, exponent=1.0))


@wrong("1.4", says="does not differ from pair to pair")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, positions, base, exponent=0.0))


@wrong("1.4", says="the argument `base` is not used")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, positions, 10_000.0))


@wrong("1.4", says="far positions blur")
def rotate(x, positions, base=10_000.0):
    return turn(x, angles_of(x, positions, base).to(x.dtype))


@wrong("1.4", says="keep the dtype of the input")
def rotate(x, positions, base=10_000.0):
    return turn(x.double(), angles_of(x, positions, base))


# ---------------------------------------------------------------------------------------------- 1.5
@wrong("1.5", says="without rescaling")
def merge_partials(first, second):
    return torch.maximum(first[0], second[0]), first[1] + second[1], first[2] + second[2]


@wrong("1.5", says="when the *first* block is the louder one")
def merge_partials(first, second):
    shrink = torch.exp(first[0] - second[0])
    return second[0], first[1] * shrink + second[1], first[2] * shrink + second[2]


@wrong("1.5", says="`output` is not: the two shrink alike")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0] - maximum) for b in (first, second))
    return maximum, total, first[2] + second[2]


@wrong("1.5", says="the wrong sign")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(maximum - b[0]) for b in (first, second))
    return maximum, total, sum(b[2] * torch.exp(maximum - b[0]) for b in (first, second))


@wrong("1.5", says="divide once, after the last block")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0] - maximum) for b in (first, second))
    return maximum, total, sum(b[2] * torch.exp(b[0] - maximum) for b in (first, second)) / total


@wrong("1.5", says="the plain mean of the two averages")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0] - maximum) for b in (first, second))
    return maximum, total, (first[2] / first[1] + second[2] / second[1]) / 2


@wrong("1.5", says="exp of a *difference*")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0]) for b in (first, second)) / torch.exp(maximum)
    return maximum, total, sum(b[2] * torch.exp(b[0]) for b in (first, second)) / torch.exp(maximum)


@wrong("1.5", says="two empty blocks give NaN")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0] - maximum) for b in (first, second))
    return maximum, total, sum(b[2] * torch.exp(b[0] - maximum) for b in (first, second))


@wrong("1.5", says="merging with an empty block")
def merge_partials(first, second):
    first, second = ((b[0].clamp(min=0.0), b[1], b[2]) if b[1].sum() == 0 else b for b in (first, second))
    maximum = torch.maximum(first[0], second[0])
    total = sum(b[1] * torch.exp(b[0] - maximum) for b in (first, second))
    return maximum, total, sum(b[2] * torch.exp(b[0] - maximum) for b in (first, second))


@wrong("1.5", says="`maximum` must be the larger one of the two")
def merge_partials(first, second):
    return torch.minimum(first[0], second[0]), first[1], first[2]


@wrong("1.5", says="changes its input `first[1]` in place")
def merge_partials(first, second):
    maximum = torch.maximum(first[0], second[0])
    finite = maximum.masked_fill(torch.isneginf(maximum), 0.0)
    for b in (first, second):
        b[1].mul_(torch.exp(b[0] - finite))
        b[2].mul_(torch.exp(b[0] - finite))
    return maximum, first[1] + second[1], first[2] + second[2]


# ---------------------------------------------------------------------------------------------- 1.6
def cost(B, H, K, T, D, **changed):
    return {"flops": 4 * B * H * T * T * D, "score_bytes": 4 * B * H * T * T, "cache_bytes": 4 * B * K * T * D} | changed


@wrong("1.6", says="only one of the two products")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, flops=2 * B * H * T * T * D)


@wrong("1.6", says="a quarter: there are two products")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, flops=B * H * T * T * D)


@wrong("1.6", says="T * T, not T")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, flops=4 * B * H * T * D)


@wrong("1.6", says="the heads are missing")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, score_bytes=4 * B * T * T)


@wrong("1.6", says="a float32 has four bytes")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, score_bytes=2 * B * H * T * T)


@wrong("1.6", says="not all H query heads")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, cache_bytes=4 * B * H * T * D)


@wrong("1.6", says="keys *and* values are cached")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, cache_bytes=2 * B * K * T * D)


@wrong("1.6", says="a bfloat16 has two bytes")
def attention_cost(B, H, K, T, D):
    return cost(B, H, K, T, D, cache_bytes=8 * B * K * T * D)


@wrong("1.6", says="no entry 'cache_bytes'")
def attention_cost(B, H, K, T, D):
    return {"flops": 4 * B * H * T * T * D, "score_bytes": 4 * B * H * T * T}


# ---------------------------------------------------------------------------------------------- 1.7
@wrong("1.7", says="the naive code survives: its largest score")
def overflowing_inputs():
    return torch.ones(1, 16), torch.ones(2, 16), torch.ones(2, 16)


@wrong("1.7", says="its largest score, after the division by sqrt(16), is 81")
def overflowing_inputs():
    q = torch.zeros(1, 16)
    q[0, :4] = 9.0  # q k^T is 324, enough only without the scale
    return q, q, torch.ones(1, 16)


@wrong("1.7", says="entries beyond 10 are not allowed")
def overflowing_inputs():
    return torch.full((1, 16), 100.0), torch.full((2, 16), 100.0), torch.ones(2, 16)


@wrong("1.7", says="NaN or infinity itself")
def overflowing_inputs():
    return torch.full((1, 16), torch.inf), torch.ones(2, 16), torch.ones(2, 16)


@wrong("1.7", says="must be float32")
def overflowing_inputs():
    return torch.full((1, 16), 10.0).half(), torch.full((2, 16), 10.0).half(), torch.ones(2, 16).half()


@wrong("1.7", says="the naive code survives")
def overflowing_inputs():
    k = torch.stack((torch.full((16,), -10.0), torch.zeros(16)))  # scores -400 and 0: exp(-400) = 0 is no harm
    return torch.full((1, 16), 10.0), k, torch.ones(2, 16)


@wrong("1.7", says="expected [tokens, 16]")
def overflowing_inputs():
    return torch.full((1, 64), 10.0), torch.full((2, 64), 10.0), torch.ones(2, 64)


@wrong("1.7", says="each key needs its value")
def overflowing_inputs():
    return torch.full((1, 16), 10.0), torch.full((2, 16), 10.0), torch.ones(3, 16)


# ---------------------------------------------------------------------------------------------- 1.8
def outputs_stay(attention, change, tokens=7, heads=3, atol=1e-5):
    """A property with holes: whether outputs before token i stay when `change` edits copies of q, k, v."""
    q, k, v = torch.randn(3, 2, heads, tokens, 4)
    before = attention(q, k, v)
    for i in range(tokens - 1):
        copies = [x.clone() for x in (q, k, v)]
        change(i, *copies)
        if not torch.allclose(attention(*copies)[:, :, : i + 1], before[:, :, : i + 1], atol=atol):
            return False
    return True


@wrong("1.8", says="catches 0 of 9")
def is_causal(attention):
    return True


@wrong("1.8", says="turns down a right implementation")
def is_causal(attention):
    return False


@wrong("1.8", says="turns down a right implementation: causal attention with another scale")
def is_causal(attention):
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    return torch.allclose(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


@wrong("1.8", says="future *keys*")
def is_causal(attention):
    def only_values(i, q, k, v):
        v[:, :, i + 1 :] = torch.randn_like(v[:, :, i + 1 :])

    return outputs_stay(attention, only_values)


@wrong("1.8", says="queries with their mean")
def is_causal(attention):
    def keys_and_values(i, q, k, v):
        k[:, :, i + 1 :], v[:, :, i + 1 :] = 0.0, 1.0

    return outputs_stay(attention, keys_and_values)


@wrong("1.8", says="only the last head looks ahead")
def is_causal(attention):
    def first_head(i, q, k, v):
        for x in (q, k, v):
            x[:, 0, i + 1 :] += 3.0

    return outputs_stay(attention, first_head)


@wrong("1.8", says="one it lets through: only token 0 looks ahead, by one step")
def is_causal(attention):
    q, k, v = torch.randn(3, 1, 2, 7, 4)
    before = attention(q, k, v)
    for x in (q, k, v):
        x[:, :, -1] += 1.0
    return torch.allclose(attention(q, k, v)[:, :, :-1], before[:, :, :-1])  # changes the last token alone


@wrong("1.8", says="one it lets through: only token 0 looks ahead")
def is_causal(attention):
    q, k, v = torch.randn(3, 2, 3, 7, 4)
    before = attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 4:] += torch.randn_like(x[:, :, 4:])
    after = attention(q, k, v)
    return torch.equal(after[:, :, 3], before[:, :, 3])  # looks at one token alone


@wrong("1.8", says="turns down a right implementation")
def is_causal(attention):
    def present_too(i, q, k, v):
        v[:, :, i:] += 1.0  # token i itself may change its output

    return outputs_stay(attention, present_too)


@wrong("1.8", says="returns NoneType; return True or False")
def is_causal(attention):
    assert attention(*torch.randn(3, 1, 2, 4, 4)).shape == (1, 2, 4, 4)
