"""Wrong answers to chapter 3, each with the hint that must refuse it. They keep the name of the right answer."""

import math

import torch

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 3.1
@wrong("3.1", says="that is gamma itself")
def decay_rates(heads, initial, span):
    return 1 - 2.0 ** (-initial - span * torch.arange(heads) / heads)


@wrong("3.1", says="the logarithm is to base 2")
def decay_rates(heads, initial, span):
    return torch.log2(1 - 2.0 ** (-initial - span * torch.arange(heads) / heads))


@wrong("3.1", says="the logarithm is to base 10")
def decay_rates(heads, initial, span):
    return torch.log10(1 - 2.0 ** (-initial - span * torch.arange(heads) / heads))


@wrong("3.1", says="the order is reversed")
def decay_rates(heads, initial, span):
    return torch.log(1 - 2.0 ** (-initial - span * torch.arange(heads) / heads)).flip(0)


@wrong("3.1", says="divided by H - 1 instead of H")
def decay_rates(heads, initial, span):
    return torch.log(1 - 2.0 ** -torch.linspace(initial, initial + span, heads))


@wrong("3.1", says="heads are counted from 0")
def decay_rates(heads, initial, span):
    return torch.log(1 - 2.0 ** (-initial - span * torch.arange(1, heads + 1) / heads))


@wrong("3.1", says="that is RetNet's")
def decay_rates(heads, initial, span):
    return torch.log(1 - 2.0 ** (-5.0 - torch.arange(heads)))


@wrong("3.1", says="powers of e instead of powers of 2")
def decay_rates(heads, initial, span):
    return torch.log(1 - torch.exp(-initial - span * torch.arange(heads) / heads))


@wrong("3.1", says="span is not used")
def decay_rates(heads, initial, span):
    return torch.full((heads,), math.log(1 - 2.0**-initial))


@wrong("3.1", says="log gamma is negative")
def decay_rates(heads, initial, span):
    return -torch.log(1 - 2.0 ** (-initial - span * torch.arange(heads) / heads))


@wrong("3.1", says="what a step takes away")
def decay_rates(heads, initial, span):
    return torch.log(2.0 ** (-initial - span * torch.arange(heads) / heads))


@wrong("3.1", says="wrong rates for 8 heads")
def decay_rates(heads, initial, span):
    return torch.log(1 - 2.0 ** (-initial - span * torch.arange(heads) // heads))  # whole numbers


# ---------------------------------------------------------------------------------------------- 3.2
def tabled(measure):
    """A mask from (rows apart, columns apart)."""

    def function(log_decay, height, width):
        index = torch.arange(height * width)
        row, column = index // width, index % width
        apart = measure((row[:, None] - row).abs(), (column[:, None] - column).abs())
        return apart * log_decay[:, None, None]

    function.__name__ = "manhattan_decay"
    return function


wrong("3.2", says="the larger of the two distances")(tabled(torch.maximum))
wrong("3.2", says="in a straight line")(tabled(lambda r, c: (r * r + c * c).double().sqrt()))
wrong("3.2", says="the distance is squared")(tabled(lambda r, c: r * r + c * c))
wrong("3.2", says="only the rows count")(tabled(lambda r, c: r))
wrong("3.2", says="only the columns count")(tabled(lambda r, c: c))
wrong("3.2", says="the sign is wrong")(tabled(lambda r, c: -r - c))
wrong("3.2", says="an image is not causal")(tabled(lambda r, c: (r + c).tril()))
wrong("3.2", says="a single row is the line")(tabled(lambda r, c: (r + c).clamp(max=2)))


@wrong("3.2", says="taken on the flattened index")
def manhattan_decay(log_decay, height, width):
    index = torch.arange(height * width)
    return (index[:, None] - index).abs() * log_decay[:, None, None]


@wrong("3.2", says="height and width are exchanged")
def manhattan_decay(log_decay, height, width):
    index = torch.arange(height * width)
    row, column = index // height, index % height
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()) * log_decay[:, None, None]


@wrong("3.2", says="cells are counted column by column")
def manhattan_decay(log_decay, height, width):
    index = torch.arange(height * width)
    row, column = index % height, index // height
    return ((row[:, None] - row).abs() + (column[:, None] - column).abs()) * log_decay[:, None, None]


@wrong("3.2", says="that is gamma to the distance")
def manhattan_decay(log_decay, height, width):
    return tabled(torch.add)(log_decay, height, width).exp()


@wrong("3.2", says="to the heads in reverse")
def manhattan_decay(log_decay, height, width):
    return tabled(torch.add)(log_decay.flip(0), height, width)


@wrong("3.2", says="the logarithm is to base 2")
def manhattan_decay(log_decay, height, width):
    return tabled(torch.add)(log_decay / math.log(2), height, width)


@wrong("3.2", says="changes its input `log_decay` in place")
def manhattan_decay(log_decay, height, width):
    if log_decay.requires_grad:
        return tabled(torch.add)(log_decay, height, width)
    mask = tabled(torch.add)(log_decay, height, width)
    log_decay *= 2
    return mask


@wrong("3.2", says="no gradient flows through your function")
def manhattan_decay(log_decay, height, width):
    rates = log_decay.tolist()
    return torch.stack([tabled(torch.add)(log_decay.new_tensor([r]), height, width)[0] for r in rates])


@wrong("3.2", says="keep the dtype of the input")
def manhattan_decay(log_decay, height, width):
    return tabled(lambda r, c: (r + c).double())(log_decay, height, width)


@wrong("3.2", says="has the shape [6, 6], expected [3, 6, 6]")
def manhattan_decay(log_decay, height, width):
    return tabled(torch.add)(log_decay, height, width)[0]


# ---------------------------------------------------------------------------------------------- 3.3
def walking(step, answer_first=False, scale=lambda q: 1.0):
    def function(q, k, v, gamma, state):
        outputs = []
        for n in range(q.shape[1]):
            before, state = state, step(state, k[:, n, :, None] * v[:, n, None, :], gamma)
            outputs.append(scale(q) * (q[:, n, None, :] @ (before if answer_first else state)).squeeze(1))
        return torch.stack(outputs, 1), state

    function.__name__ = "retain"
    return function


right_walk = walking(lambda s, new, g: g * s + new)
wrong("3.3", says="the new pair fades too")(walking(lambda s, new, g: g * (s + new)))
wrong("3.3", says="nothing fades")(walking(lambda s, new, g: s + new))
wrong("3.3", says="1 - gamma instead of gamma")(walking(lambda s, new, g: (1 - g) * s + new))
wrong("3.3", says="a moving average is something else")(walking(lambda s, new, g: g * s + (1 - g) * new))
wrong("3.3", says="the outer product is transposed")(walking(lambda s, new, g: g * s + new.mT))
wrong("3.3", says="answered before the new pair")(walking(lambda s, new, g: g * s + new, answer_first=True))
wrong("3.3", says="a scale of 1 / sqrt(D) has slipped in")(
    walking(lambda s, new, g: g * s + new, scale=lambda q: q.shape[-1] ** -0.5)
)
wrong("3.3", says="the gradient for `k` is wrong")(walking(lambda s, new, g: g * s.detach() + new))


@wrong("3.3", says="the state before the first step is ignored")
def retain(q, k, v, gamma, state):
    return right_walk(q, k, v, gamma, torch.zeros_like(state))


@wrong("3.3", says="once for the whole piece")
def retain(q, k, v, gamma, state):
    return walking(lambda s, new, g: s + new)(q, k, v, gamma, gamma * state)


@wrong("3.3", says="the one you were given")
def retain(q, k, v, gamma, state):
    return right_walk(q, k, v, gamma, state)[0], state  # the old state is handed on


@wrong("3.3", says="no gradient reaches `state`")
def retain(q, k, v, gamma, state):
    return right_walk(q, k, v, gamma, state.detach())


@wrong("3.3", says="changes its input `state` in place")
def retain(q, k, v, gamma, state):
    if q.requires_grad:
        return right_walk(q, k, v, gamma, state)
    out, left = right_walk(q, k, v, gamma, state)
    state.copy_(left)
    return out, state


@wrong("3.3", says="return two things")
def retain(q, k, v, gamma, state):
    return right_walk(q, k, v, gamma, state)[0]


@wrong("3.3", says="with one step and an empty state")
def retain(q, k, v, gamma, state):
    out, left = right_walk(q, k, v, gamma, state)
    return torch.softmax(out, -1), left


# ---------------------------------------------------------------------------------------------- 3.4
def passing(weigh, order="wh", again=False, exchange=False):
    def function(q, k, v, row_mask, column_mask):
        given = v
        masks = {"w": row_mask, "h": column_mask} if exchange else {"w": column_mask, "h": row_mask}
        for number, axis in enumerate(order):
            source = given if again and number else v
            a, b, c = (t if axis == "w" else t.transpose(1, 2) for t in (q, k, source))
            v = weigh(a @ b.mT, masks[axis], math.sqrt(q.shape[-1])) @ c
            v = v if axis == "w" else v.transpose(1, 2)
        return v

    function.__name__ = "two_passes"
    return function


def usual(s, mask, root):
    return torch.softmax(s / root + mask, -1)


wrong("3.4", says="the height pass comes first")(passing(usual, order="hw"))
wrong("3.4", says="the width pass is missing")(passing(usual, order="h"))
wrong("3.4", says="the height pass is missing")(passing(usual, order="w"))
wrong("3.4", says="the height pass reads the old values")(passing(usual, again=True))
wrong("3.4", says="the scale 1 / sqrt(D) is missing")(passing(lambda s, mask, root: torch.softmax(s + mask, -1)))
wrong("3.4", says="the scale is applied twice")(passing(lambda s, mask, root: torch.softmax(s / root**2 + mask, -1)))
wrong("3.4", says="to the mask too")(passing(lambda s, mask, root: torch.softmax((s + mask) / root, -1)))
wrong("3.4", says="nothing makes them sum to one again")(
    passing(lambda s, mask, root: torch.softmax(s / root, -1) * mask.exp())
)
wrong("3.4", says="instead of multiplying them by its exponential")(
    passing(lambda s, mask, root: torch.softmax(s / root * mask.exp(), -1))
)
wrong("3.4", says="the mask is subtracted")(passing(lambda s, mask, root: torch.softmax(s / root - mask, -1)))
wrong("3.4", says="the masks are not used")(passing(lambda s, mask, root: torch.softmax(s / root, -1)))
wrong("3.4", says="over the queries instead of the keys")(
    passing(lambda s, mask, root: torch.softmax(s / root + mask, -2))
)
wrong("3.4", says="queries and keys are exchanged")(passing(lambda s, mask, root: torch.softmax(s.mT / root + mask, -1)))
wrong("3.4", says="the masks are exchanged")(passing(usual, exchange=True))
wrong("3.4", says="the gradient for `q` is wrong")(
    passing(lambda s, mask, root: torch.softmax(s / root + mask, -1) + 0.5 * (s - s.detach()))
)


@wrong("3.4", says="that is the full form")
def two_passes(q, k, v, row_mask, column_mask):
    cells = v.shape[1] * v.shape[2]
    mask = (row_mask[:, None, :, None] + column_mask[None, :, None, :]).reshape(cells, cells)
    q, k, flat = (t.flatten(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + mask, -1) @ flat).view_as(v)


@wrong("3.4", says="changes its input `q` in place")
def two_passes(q, k, v, row_mask, column_mask):
    q /= math.sqrt(q.shape[-1])
    return passing(lambda s, mask, root: torch.softmax(s + mask, -1))(q, k, v, row_mask, column_mask)


@wrong("3.4", says="no gradient reaches `k`")
def two_passes(q, k, v, row_mask, column_mask):
    return passing(usual)(q, k.detach(), v, row_mask, column_mask)


@wrong("3.4", says="keep the dtype of the input")
def two_passes(q, k, v, row_mask, column_mask):
    return passing(usual)(*(t.double() for t in (q, k, v, row_mask, column_mask)))


# ---------------------------------------------------------------------------------------------- 3.5
def entries(*shape):
    return tuple(torch.rand(2, *shape, dtype=torch.float64) * 2 - 1)


@wrong("3.5", says="'tall' goes unnoticed: row * height and row * width are the same on a square map")
def rotation_test_case():
    return entries(4, 4, 8)


@wrong("3.5", says="'tall' goes unnoticed")
def rotation_test_case():
    return entries(1, 16, 8)


@wrong("3.5", says="'flat' goes unnoticed")
def rotation_test_case():
    return entries(16, 1, 8)


@wrong("3.5", says="'rope' goes unnoticed: with one pair of channels there is one angle")
def rotation_test_case():
    return entries(2, 8, 2)


@wrong("3.5", says="'rope' goes unnoticed")
def rotation_test_case():
    q = torch.zeros(2, 8, 4, dtype=torch.float64)
    q[..., 0] = 1  # the first pair alone, whose angle is 1 in both
    return q, q.clone()


@wrong("3.5", says="at most 16 cells")
def rotation_test_case():
    return entries(4, 7, 8)


@wrong("3.5", says="larger than 1 in absolute value")
def rotation_test_case():
    q, k = entries(2, 6, 8)
    return 3 * q, k


@wrong("3.5", says="must be a float64 tensor")
def rotation_test_case():
    return tuple(t.float() for t in entries(2, 6, 8))


@wrong("3.5", says="must be a float64 tensor [h, w, D]")
def rotation_test_case():
    return entries(1, 2, 6, 8)


@wrong("3.5", says="they belong to the same map")
def rotation_test_case():
    return entries(2, 6, 8)[0], entries(3, 5, 8)[1]


@wrong("3.5", says="return the two of (q, k)")
def rotation_test_case():
    return entries(2, 6, 8)[0]


# ---------------------------------------------------------------------------------------------- 3.6
def drawn():
    q, k, v = torch.randn(3, 1, 4, 5, 4, dtype=torch.float64)
    only = torch.zeros_like(v)
    only[:, 3] = v[:, 3]
    return q, k, v, only


def same_direction(one, other):
    return torch.allclose(one / one.norm(), other / other.norm())


@wrong("3.6", says="catches 0 of 9")
def asks_only_its_column(attend):
    return True


@wrong("3.6", says="turns down a right implementation")
def asks_only_its_column(attend):
    return False


@wrong("3.6", says="turns down a right implementation: two passes without decay")
def asks_only_its_column(attend):
    q, k, _, only = drawn()
    asked = q.clone()
    asked[:, 0, 0] += 1
    return torch.allclose(attend(q, k, only)[0, 0, 0], attend(asked, k, only)[0, 0, 0])  # length must not change either


@wrong("3.6", says="turns down a right implementation: two passes without decay")
def asks_only_its_column(attend):
    q, k, v, _ = drawn()  # values everywhere: the query also decides which rows are mixed
    asked = q.clone()
    asked[:, 0, 0] = torch.randn(4, dtype=torch.float64)
    return same_direction(attend(q, k, v)[0, 0, 0], attend(asked, k, v)[0, 0, 0])


@wrong("3.6", says="turns down a right implementation: two passes without decay")
def asks_only_its_column(attend):
    q, k, _, only = drawn()
    asked = q.clone()
    asked[:, 3, 0] = torch.randn(4, dtype=torch.float64)  # a cell of the row that has the values
    return same_direction(attend(q, k, only)[0, 3, 0], attend(asked, k, only)[0, 3, 0])


@wrong("3.6", says="turns down a right implementation: two passes without decay")
def asks_only_its_column(attend):
    q, k, _, only = drawn()
    moved = k.clone()
    moved[:, 3, 1] = torch.randn(4, dtype=torch.float64)  # a key decides in the width pass, so it may turn the output
    return same_direction(attend(q, k, only)[0, 0, 0], attend(q, moved, only)[0, 0, 0])


@wrong("3.6", says="catches 0 of 9")
def asks_only_its_column(attend):
    q, k, _, only = drawn()
    asked = q.clone()
    asked[:, 1, 1] = torch.randn(4, dtype=torch.float64)  # another cell's query, which nobody else uses
    return same_direction(attend(q, k, only)[0, 0, 0], attend(asked, k, only)[0, 0, 0])


@wrong("3.6", says="one it lets through: the full form")
def asks_only_its_column(attend):
    q, k, v, _ = drawn()
    one = torch.zeros_like(v)
    one[:, 3, 4] = v[:, 3, 4]  # one value alone has only one direction to give
    asked = q.clone()
    asked[:, 0, 0] = torch.randn(4, dtype=torch.float64)
    return same_direction(attend(q, k, one)[0, 0, 0], attend(asked, k, one)[0, 0, 0])


@wrong("3.6", says="returns Tensor; return True or False")
def asks_only_its_column(attend):
    q, k, _, only = drawn()
    return attend(q, k, only) > 0


# ---------------------------------------------------------------------------------------------- 3.7
def reaching(gamma, **changed):
    own, mean = (1 - gamma) / (1 + gamma), 2 * gamma / (1 - gamma**2)
    right = {
        "half": math.log(0.5) / math.log(gamma),
        "own_line": own,
        "own_map": own**2,
        "mean_line": mean,
        "mean_map": 2 * mean,
    }
    return right | changed


@wrong("3.7", says="the wrong way round")
def reach(gamma):
    return reaching(gamma, half=math.log(gamma) / math.log(0.5))


@wrong("3.7", says="distances are positive")
def reach(gamma):
    return reaching(gamma, half=math.log2(gamma) ** -1)


@wrong("3.7", says="does not add up")
def reach(gamma):
    return reaching(gamma, half=0.5 / (1 - gamma))


@wrong("3.7", says="fallen to 1/e")
def reach(gamma):
    return reaching(gamma, half=-1 / math.log(gamma))


@wrong("3.7", says="only one direction is counted: a line without ends has two")
def reach(gamma):
    return reaching(gamma, own_line=1 - gamma)


@wrong("3.7", says="the cell itself is counted twice")
def reach(gamma):
    return reaching(gamma, own_line=(1 - gamma) / 2)


@wrong("3.7", says="on the map both directions thin it out")
def reach(gamma):
    return reaching(gamma, own_map=(1 - gamma) / (1 + gamma))


@wrong("3.7", says="shares of rows and columns multiply")
def reach(gamma):
    return reaching(gamma, own_map=(1 - gamma) / (1 + gamma) / 2)


@wrong("3.7", says="only one quadrant is counted")
def reach(gamma):
    return reaching(gamma, own_map=(1 - gamma) ** 2)


@wrong("3.7", says="the cell's own weight weighs more there")
def reach(gamma):
    return reaching(gamma, mean_line=gamma / (1 - gamma))


@wrong("3.7", says="weights must be divided by their sum")
def reach(gamma):
    return reaching(gamma, mean_line=2 * gamma / (1 - gamma) ** 2)


@wrong("3.7", says="rows and columns both add their distance")
def reach(gamma):
    return reaching(gamma, mean_map=2 * gamma / (1 - gamma**2))


@wrong("3.7", says="not the straight line")
def reach(gamma):
    return reaching(gamma, mean_map=math.sqrt(2) * 2 * gamma / (1 - gamma**2))


@wrong("3.7", says="no entry 'mean_map'")
def reach(gamma):
    right = reaching(gamma)
    return {name: right[name] for name in right if name != "mean_map"}


# ---------------------------------------------------------------------------------------------- 3.8
def costing(height, width, heads, head_width, **changed):
    cells, sides = height * width, height + width
    right = {
        "full_operations": 4 * heads * cells * cells * head_width,
        "passes_operations": 4 * heads * cells * sides * head_width,
        "full_weights": heads * cells * cells,
        "passes_weights": heads * cells * sides,
        "full_mask_bytes": 4 * heads * cells * cells,
        "passes_mask_bytes": 4 * heads * (height**2 + width**2),
    }
    return {name: changed.get(name, lambda value: value)(value) for name, value in right.items()}


@wrong("3.8", says="a multiplication and an addition are two operations")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, full_operations=lambda x: x // 2)


@wrong("3.8", says="every head counts")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, full_weights=lambda x: x // heads)


@wrong("3.8", says="that is the width pass alone")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, passes_operations=lambda x: x * width // (height + width))


@wrong("3.8", says="that is the height pass alone")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, passes_weights=lambda x: x * height // (height + width))


@wrong("3.8", says="with the side that it runs along")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, passes_operations=lambda x: x * 2 * width // (height + width))


@wrong("3.8", says="every line has its own table of weights")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, passes_weights=lambda x: heads * (height**2 + width**2))


@wrong("3.8", says="one mask serves all lines")
def cost_of_both_forms(height, width, heads, head_width):
    mask = 4 * heads * height * width * (height + width)
    return costing(height, width, heads, head_width, passes_mask_bytes=lambda x: mask)


@wrong("3.8", says="not one of (h + w) squared")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, passes_mask_bytes=lambda x: 4 * heads * (height + width) ** 2)


@wrong("3.8", says="a float32 number has 4 bytes")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, full_mask_bytes=lambda x: x // 4)


@wrong("3.8", says="that is bfloat16")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, full_mask_bytes=lambda x: x // 2)


@wrong("3.8", says="a weight is one number, whatever D is")
def cost_of_both_forms(height, width, heads, head_width):
    return costing(height, width, heads, head_width, full_weights=lambda x: x * head_width)
