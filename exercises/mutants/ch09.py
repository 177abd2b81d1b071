"""Wrong answers to chapter 9, each with the hint that must refuse it. They keep the name of the right answer."""

import torch

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 9.1
def passes(batch, height, width, channels, window, item, **changed):
    numbers = batch * height * width * channels
    flops, moved = 8 * numbers * window, 4 * numbers * item
    right = {"flops": flops, "bytes": moved, "intensity": flops / moved, "training_flops": 3 * flops,
             "training_bytes": 11 * numbers * item}  # fmt: skip
    return right | {name: change(numbers) for name, change in changed.items()}


@wrong("9.1", says="a multiply and an add are two operations")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, flops=lambda n: 4 * n * window)


@wrong("9.1", says="not the W x W of its window")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, flops=lambda n: 8 * n * window**2)


@wrong("9.1", says="the result is written too")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, bytes=lambda n: 3 * n * item)


@wrong("9.1", says="the value between the passes need not move")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, bytes=lambda n: 6 * n * item)


@wrong("9.1", says="bytes, not numbers")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, bytes=lambda n: 4 * n)


@wrong("9.1", says="not bytes an operation")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, intensity=lambda n: item / (2 * window))


@wrong("9.1", says="each product of the forward pass has two in the backward pass")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, training_flops=lambda n: 16 * n * window)


@wrong("9.1", says="bytes do not simply triple")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, training_bytes=lambda n: 12 * n * item)


@wrong("9.1", says="the gradient of the result is read")
def two_passes_cost(b, h, w, c, window, item):
    return passes(b, h, w, c, window, item, training_bytes=lambda n: 10 * n * item)


@wrong("9.1", says="has no entry 'intensity'")
def two_passes_cost(b, h, w, c, window, item):
    right = passes(b, h, w, c, window, item)
    del right["intensity"]
    return right


# ---------------------------------------------------------------------------------------------- 9.2
def place(flops, moved, seconds, matrix_rate, copy_rate):
    roof = min(matrix_rate, flops / moved * copy_rate)
    return {"intensity": flops / moved, "bend": matrix_rate / copy_rate, "rate": flops / seconds, "roof": roof,
            "share": flops / seconds / roof, "least": flops / roof}  # fmt: skip


@wrong("9.2", says="not bytes an operation")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"intensity": moved / flops}


@wrong("9.2", says="so at R / M")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"bend": copy_rate / matrix_rate}


@wrong("9.2", says="operations a second, not bytes")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"rate": moved / seconds}


@wrong("9.2", says="left of the bend the copy is the limit")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    roof = max(matrix_rate, flops / moved * copy_rate)
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"roof": roof}


@wrong("9.2", says="right of the bend the matrix rate is the limit")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"roof": flops / moved * copy_rate}


@wrong("9.2", says="a share of the roof, not of the matrix rate")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"share": flops / seconds / matrix_rate}


@wrong("9.2", says="the longer one, not the sum")
def place_on_the_roofline(flops, moved, seconds, matrix_rate, copy_rate):
    return place(flops, moved, seconds, matrix_rate, copy_rate) | {"least": flops / matrix_rate + moved / copy_rate}


# ---------------------------------------------------------------------------------------------- 9.3
def fuse(u, packed, heads):
    return (u @ packed.T).unflatten(-1, (3, heads, -1)).unbind(-3)


@wrong("9.3", says="3 matrix products")
def fused_projection(u, w_q, w_k, w_v, heads):
    return tuple((u @ w.T).unflatten(-1, (heads, -1)) for w in (w_q, w_k, w_v))


@wrong("9.3", says="the weights are used transposed")
def fused_projection(u, w_q, w_k, w_v, heads):
    return fuse(u, torch.cat([w_q.T, w_k.T, w_v.T]), heads)


@wrong("9.3", says="the heads are cut before")
def fused_projection(u, w_q, w_k, w_v, heads):
    return (u @ torch.cat([w_q, w_k, w_v]).T).unflatten(-1, (heads, 3, -1)).unbind(-2)


@wrong("9.3", says="a head's channels lie side by side")
def fused_projection(u, w_q, w_k, w_v, heads):
    return (u @ torch.cat([w_q, w_k, w_v]).T).unflatten(-1, (3, -1, heads)).transpose(-1, -2).unbind(-3)


@wrong("9.3", says="keys and values are swapped")
def fused_projection(u, w_q, w_k, w_v, heads):
    return fuse(u, torch.cat([w_q, w_v, w_k]), heads)


@wrong("9.3", says="in another order")
def fused_projection(u, w_q, w_k, w_v, heads):
    return fuse(u, torch.cat([w_v, w_k, w_q]), heads)


@wrong("9.3", says="return three tensors (q, k, v)")
def fused_projection(u, w_q, w_k, w_v, heads):
    return u @ torch.cat([w_q, w_k, w_v]).T


@wrong("9.3", says="no gradient flows through your function")
def fused_projection(u, w_q, w_k, w_v, heads):
    return tuple(x.detach() for x in fuse(u, torch.cat([w_q, w_k, w_v]), heads))


# ---------------------------------------------------------------------------------------------- 9.4
def arguments(*case):
    def arguments_that_break_the_graph():
        return case

    return arguments_that_break_the_graph


wrong("9.4", says="with safe=False nobody asks for a value")(arguments(torch.ones(2, 8), 2.0, 3.0, False))
wrong("9.4", says="known while tracing")(arguments(torch.ones(2, 3, 4), 1.0, None, False))
wrong("9.4", says="the branch is taken")(arguments(torch.full((2, 3), 20.0), 1.0, None, True))
wrong("9.4", says="the branch is taken: find values")(arguments(torch.full((2, 3), 8.0), 0.5, None, True))
wrong("9.4", says="x must be a float tensor")(arguments(torch.ones(4, dtype=torch.long), 1.0, None, True))
wrong("9.4", says="it is a number above 0")(arguments(torch.ones(2, 3), 0.0, None, True))
wrong("9.4", says="clip is None or a number above 0")(arguments(torch.ones(2, 3), 1.0, -1.0, True))


@wrong("9.4", says="return (x, temperature, clip, safe)")
def arguments_that_break_the_graph():
    return torch.ones(2, 3)


# ---------------------------------------------------------------------------------------------- 9.5
def padded(x, size, fill=None):
    if len(x) > size:
        raise ValueError(f"{len(x)} rows; accepted: up to {size}")
    fill = x.new_zeros(size - len(x), x.shape[1]) if fill is None else fill
    return torch.cat([x, fill]), (torch.arange(size) < len(x)).to(x.dtype) / len(x)


@wrong("9.5", says="expected [8, 5]")
def fixed_batch(x, size):
    return x, x.new_full((len(x),), 1 / len(x))


@wrong("9.5", says="divided by the size and not by the number of real rows")
def fixed_batch(x, size):
    rows, weight = padded(x, size)
    return rows, weight * len(x) / size


@wrong("9.5", says="the rows that are not there weigh something")
def fixed_batch(x, size):
    rows, weight = padded(x, size)
    return rows, torch.full_like(weight, 1 / size)


@wrong("9.5", says="the weights must sum to 1")
def fixed_batch(x, size):
    rows, weight = padded(x, size)
    return rows, (weight > 0).to(x.dtype)


@wrong("9.5", says="the missing rows repeat the last one")
def fixed_batch(x, size):
    return padded(x, size, x[-1:].expand(max(0, size - len(x)), -1))


@wrong("9.5", says="the rows stand at the end")
def fixed_batch(x, size):
    rows, weight = padded(x, size)
    return rows.roll(size - len(x), 0), weight


@wrong("9.5", says="must be refused with a ValueError")
def fixed_batch(x, size):
    return padded(x[:size], size)


@wrong("9.5", says="return (rows, weight)")
def fixed_batch(x, size):
    return padded(x, size)[0]


# ---------------------------------------------------------------------------------------------- 9.6
def inspected(form, images=3, large=900.0, calls=2, close=1e-9, gradients=True, inputs=True):
    """The solution with one sentence left out."""
    for number in range(calls):
        given = [torch.randn(images, 5, 4, dtype=torch.float64) for _ in "qkv"]
        given[0] *= large if number else 1.0
        q, k, v = (x.clone().requires_grad_() for x in given)
        right = torch.softmax(q @ k.mT / 2, -1) @ v
        leaves = [x.clone().requires_grad_() for x in given]
        handed = [x * 1 for x in leaves]
        y = form(*handed)
        if not torch.allclose(y, right, close, close):
            return False
        if inputs and any(not torch.equal(x, before) for x, before in zip(handed, given)):
            return False
        weights = torch.randn_like(right)
        wanted = torch.autograd.grad(right, (q, k, v), weights)
        made = torch.autograd.grad(y, leaves, weights) if gradients else wanted
        if not all(torch.allclose(g, w, 10 * close, 10 * close) for g, w in zip(made, wanted)):
            return False
    return True


@wrong("9.6", says="one it lets through: every image meets the keys of the first")
def is_the_same_attention(form):
    return inspected(form, images=1)


@wrong("9.6", says="one it lets through: exponentials without the maximum taken off")
def is_the_same_attention(form):
    return inspected(form, large=2.0)


@wrong("9.6", says="one it lets through: float32 inside")
def is_the_same_attention(form):
    return inspected(form, close=2e-3)


@wrong("9.6", says="one it lets through: queries are scaled in place")
def is_the_same_attention(form):
    return inspected(form, inputs=False)


@wrong("9.6", says="one it lets through: weights carry no gradient")
def is_the_same_attention(form):
    return inspected(form, gradients=False)


@wrong("9.6", says="one it lets through: exponentials without the maximum")
def is_the_same_attention(form):
    return inspected(form, calls=1)


@wrong("9.6", says="turns down a right implementation: sums of broadcast products")
def is_the_same_attention(form):
    q, k, v = (torch.randn(2, 5, 4, dtype=torch.float64) for _ in "qkv")
    return torch.equal(form(q, k, v), torch.softmax(q @ k.mT / 2, -1) @ v)


@wrong("9.6", says="catches 0 of")
def is_the_same_attention(form):
    return True
