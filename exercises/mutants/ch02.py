"""Wrong answers to chapter 2, each with the hint that must refuse it. They keep the name of the right answer."""

import torch
import torch.nn.functional as F

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 2.1
@wrong("2.1", says="the gate is not applied")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) @ w_out.T


@wrong("2.1", says="the sigmoid is missing")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * (x @ w_gate.T) @ w_out.T


@wrong("2.1", says="SiLU instead of a sigmoid")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * F.silu(x @ w_gate.T) @ w_out.T


@wrong("2.1", says="the scores are added to y")
def gated_output(y, x, w_gate, w_out):
    return (y.flatten(2) + torch.sigmoid(x @ w_gate.T)) @ w_out.T


@wrong("2.1", says="a softmax instead of a sigmoid")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * torch.softmax(x @ w_gate.T, dim=-1) @ w_out.T


@wrong("2.1", says="position G5")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) @ w_out.T * torch.sigmoid(x @ w_gate.T)


@wrong("2.1", says="read channel by channel")
def gated_output(y, x, w_gate, w_out):
    scores = torch.sigmoid(x @ w_gate.T).unflatten(-1, (y.shape[3], y.shape[2])).mT  # [B, T, H, D] from D-major rows
    return (y * scores).flatten(2) @ w_out.T


@wrong("2.1", says="y.flatten(2) keeps a head's channels together")
def gated_output(y, x, w_gate, w_out):
    return (y.mT.flatten(2) * torch.sigmoid(x @ w_gate.T)) @ w_out.T


@wrong("2.1", says="heads and channels of y are joined in the wrong order")
def gated_output(y, x, w_gate, w_out):
    scores = torch.sigmoid(x @ w_gate.T).unflatten(-1, y.shape[2:])
    return (y * scores).transpose(2, 3).flatten(2) @ w_out.T


@wrong("2.1", says="use x @ w_gate.T")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * torch.sigmoid(x @ w_gate) @ w_out.T


@wrong("2.1", says="use ... @ w_out.T")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * torch.sigmoid(x @ w_gate.T) @ w_out


@wrong("2.1", says="the gate is computed from y")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * torch.sigmoid(y.flatten(2) @ w_gate.T) @ w_out.T


@wrong("2.1", says="the sign of its logits is reversed")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * (1 - torch.sigmoid(x @ w_gate.T)) @ w_out.T


@wrong("2.1", says="changes its input `y` in place")
def gated_output(y, x, w_gate, w_out):
    y *= torch.sigmoid(x @ w_gate.T).unflatten(-1, y.shape[2:])
    return y.flatten(2) @ w_out.T


@wrong("2.1", says="no gradient reaches `x`")
def gated_output(y, x, w_gate, w_out):
    return y.flatten(2) * torch.sigmoid(x @ w_gate.T).detach() @ w_out.T


# ---------------------------------------------------------------------------------------------- 2.2
def refuse_others(granularity):
    if granularity not in ("headwise", "shared"):
        raise ValueError(granularity)


@wrong("2.2", says="headwise scores land on the channels")
def gate_by_heads(y, logits, granularity):
    refuse_others(granularity)
    scores = torch.sigmoid(logits)
    return y * (scores.unsqueeze(2) if granularity == "headwise" else scores.mean(2, keepdim=True))


@wrong("2.2", says="a softmax over the heads")
def gate_by_heads(y, logits, granularity):
    refuse_others(granularity)
    if granularity == "headwise":
        return y * torch.softmax(logits, dim=-1).unsqueeze(-1)
    return y * torch.sigmoid(logits).mean(2, keepdim=True)


@wrong("2.2", says="each head keeps its own")
def gate_by_heads(y, logits, granularity):
    refuse_others(granularity)
    if granularity == "headwise":
        return y * torch.sigmoid(logits).mean(-1)[..., None, None]
    return y * torch.sigmoid(logits).mean(2, keepdim=True)


def with_shared(average):
    def function(y, logits, granularity):
        refuse_others(granularity)
        if granularity == "headwise":
            return y * torch.sigmoid(logits).unsqueeze(-1)
        return y * average(logits)

    function.__name__ = "gate_by_heads"
    return function


wrong("2.2", says="the logits are averaged")(with_shared(lambda z: torch.sigmoid(z.mean(2, keepdim=True))))
wrong("2.2", says="the average is missing")(with_shared(torch.sigmoid))
wrong("2.2", says="summed over the heads")(with_shared(lambda z: torch.sigmoid(z).sum(2, keepdim=True)))
wrong("2.2", says="over the channels instead of the heads")(
    with_shared(lambda z: torch.sigmoid(z).mean(3, keepdim=True))
)
wrong("2.2", says="over the tokens instead of the heads")(with_shared(lambda z: torch.sigmoid(z).mean(1, keepdim=True)))
wrong("2.2", says="the scores of one head")(with_shared(lambda z: torch.sigmoid(z)[:, :, :1]))


@wrong("2.2", says="must be refused with a ValueError")
def gate_by_heads(y, logits, granularity):
    if granularity == "headwise":
        return y * torch.sigmoid(logits).unsqueeze(-1)
    return y * torch.sigmoid(logits).mean(2, keepdim=True)  # whatever the name


# ---------------------------------------------------------------------------------------------- 2.3
def average(weights, values):
    return torch.einsum("bhts,bshd->bthd", weights, values)


def shared(x, weights):
    return x.repeat_interleave(weights.shape[1] // x.shape[2], dim=2)


@wrong("2.3", says="that is G1, not G2")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v, weights)) * shared(scores, weights)


@wrong("2.3", says="the gate acts twice")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v * scores, weights)) * shared(scores, weights)


@wrong("2.3", says="repeat_interleave, not repeat")
def gate_before_sum(weights, v, scores):
    return average(weights, (v * scores).repeat(1, 1, weights.shape[1] // v.shape[2], 1))


@wrong("2.3", says="in two different orders")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v, weights) * scores.repeat(1, 1, weights.shape[1] // v.shape[2], 1))


@wrong("2.3", says="normalised again after the gate")
def gate_before_sum(weights, v, scores):
    gated = weights * scores.mean((2, 3))[:, None, None, :]
    return average(gated / gated.sum(-1, keepdim=True), shared(v, weights))


@wrong("2.3", says="the scores of the token before it")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v * scores.roll(1, dims=1), weights))


@wrong("2.3", says="shape [2, 6, 5, 4], expected [2, 5, 6, 4]")
def gate_before_sum(weights, v, scores):
    return weights @ shared(v * scores, weights).transpose(1, 2)


@wrong("2.3", says="changes its input `v` in place")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v.mul_(scores), weights))


@wrong("2.3", says="the gate is not applied")
def gate_before_sum(weights, v, scores):
    return average(weights, shared(v, weights))


# ---------------------------------------------------------------------------------------------- 2.4
def uniform_share(weights, first_query):
    return (1 / torch.arange(first_query + 1.0, weights.shape[2] + 1)).mean().item()


@wrong("2.4", says="query 0 is counted, which sees nothing but itself")
def first_token_share(weights, first_query=1):
    return weights[..., 0].mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="`first_query` is not used")
def first_token_share(weights, first_query=1):
    return weights[:, :, 1:, 0].mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="take the column of key 0")
def first_token_share(weights, first_query=1):
    return weights[:, :, 0].mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="the share of the last token")
def first_token_share(weights, first_query=1):
    return weights[:, :, first_query:, -1].mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="only the last query is counted")
def first_token_share(weights, first_query=1):
    return weights[:, :, -1, 0].mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="that is the largest head")
def first_token_share(weights, first_query=1):
    return weights[:, :, first_query:, 0].amax(1).mean().item(), uniform_share(weights, first_query)


@wrong("2.4", says="1 / T is right for the last query alone")
def first_token_share(weights, first_query=1):
    return weights[:, :, first_query:, 0].mean().item(), 1 / weights.shape[2]


@wrong("2.4", says="query i sees i + 1 tokens, not i")
def first_token_share(weights, first_query=1):
    return weights[:, :, first_query:, 0].mean().item(), uniform_share(weights[:, :, :-1], first_query - 1)


@wrong("2.4", says="return two numbers")
def first_token_share(weights, first_query=1):
    return weights[:, :, first_query:, 0].mean().item()


# ---------------------------------------------------------------------------------------------- 2.5
RIGHT = {
    "sigmoid": lambda y, z: y * torch.sigmoid(z),
    "ns_sigmoid": lambda y, z: y * (0.5 + 0.5 * torch.sigmoid(z)),
    "silu": lambda y, z: y * F.silu(z),
    "additive_silu": lambda y, z: y + F.silu(z),
    "additive_identity": lambda y, z: y + z,
}


def form(name, changed):
    """All five forms, one of them wrong."""

    def apply_gate(y, logits, form):
        if form not in RIGHT:
            raise ValueError(form)
        return (RIGHT | {name: changed})[form](y, logits)

    return apply_gate


wrong("2.5", says="'ns_sigmoid': that is the plain sigmoid")(form("ns_sigmoid", RIGHT["sigmoid"]))
wrong("2.5", says="lies in [0.5, 1]")(form("ns_sigmoid", lambda y, z: y * 0.5 * torch.sigmoid(z)))
wrong("2.5", says="goes up to 1.5")(form("ns_sigmoid", lambda y, z: y * (0.5 + torch.sigmoid(z))))
wrong("2.5", says="is cut off at 0.5")(form("ns_sigmoid", lambda y, z: y * torch.sigmoid(z).clamp(min=0.5)))
wrong("2.5", says="'silu': the logits multiply y without SiLU")(form("silu", lambda y, z: y * z))
wrong("2.5", says="'silu': that is the plain sigmoid")(form("silu", RIGHT["sigmoid"]))
wrong("2.5", says="'additive_silu': SiLU multiplies y")(form("additive_silu", RIGHT["silu"]))
wrong("2.5", says="a sigmoid is added")(form("additive_silu", lambda y, z: y + torch.sigmoid(z)))
wrong("2.5", says="y * (1 + z) instead of y + z")(form("additive_identity", lambda y, z: y * (1 + z)))
wrong("2.5", says="changes its input `y` in place")(form("sigmoid", lambda y, z: y.mul_(torch.sigmoid(z))))


@wrong("2.5", says="must be refused with a ValueError")
def apply_gate(y, logits, form):
    return RIGHT.get(form, RIGHT["sigmoid"])(y, logits)


@wrong("2.5", says="`logits`")
def apply_gate(y, logits, form):
    return RIGHT[form](y, logits.detach())


# ---------------------------------------------------------------------------------------------- 2.6
def added(C, H, K, D, layers, **changed):
    each = {
        "g1_elementwise": C * H * D,
        "g1_headwise": C * H,
        "g1_shared": C * H * D,
        "g1_input_independent": H * D,
        "g2_elementwise": C * K * D,
        "g2_headwise": C * K,
        "g5_elementwise": C * C,
        "kv_heads_doubled": 2 * C * K * D,
        "q_heads_half_more": C * H * D,
    }
    return {name: layers * number for name, number in (each | changed).items()}


@wrong("2.6", says="that is one layer")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, 1)


@wrong("2.6", says="g1_headwise for C, H, K, D = (10, 6, 2, 3) and 5 layers is 900: a head has one score, not D")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, g1_headwise=C * H * D)


@wrong("2.6", says="only the scores are averaged afterwards")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, g1_shared=C * D)


@wrong("2.6", says="it reads no input")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, g1_input_independent=C * H * D)


@wrong("2.6", says="there are K value heads, not H")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, g2_elementwise=C * H * D)


@wrong("2.6", says="it gates the C outputs of W_O")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, g5_elementwise=C * H * D)


@wrong("2.6", says="keys *and* values get more heads")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, kv_heads_doubled=C * K * D)


@wrong("2.6", says="W_O grows along with W_Q")
def added_parameters(C, H, K, D, layers):
    return added(C, H, K, D, layers, q_heads_half_more=C * H * D // 2)


@wrong("2.6", says="count parameters, not millions")
def added_parameters(C, H, K, D, layers):
    return {name: number / 1e6 for name, number in added(C, H, K, D, layers).items()}


@wrong("2.6", says="no entry 'q_heads_half_more'")
def added_parameters(C, H, K, D, layers):
    result = added(C, H, K, D, layers)
    return {name: result[name] for name in result if name != "q_heads_half_more"}


# ---------------------------------------------------------------------------------------------- 2.7
def numbered(heads, kv_heads, rows=None):
    rows = 2 * heads * 3 if rows is None else rows
    return torch.arange(rows * 2.0).view(rows, 2), heads, kv_heads


@wrong("2.7", says="the bug 'per head' goes unnoticed in the query: with H = K")
def layout_test_case():
    return numbered(4, 4)


@wrong("2.7", says="the bug 'halves' goes unnoticed in the query: with K = 1")
def layout_test_case():
    return numbered(4, 1)


@wrong("2.7", says="its rows are too much alike")
def layout_test_case():
    return torch.ones(24, 2), 4, 2


@wrong("2.7", says="the bug 'tiled' goes unnoticed in the gate: its rows are too much alike")
def layout_test_case():
    w, heads, kv_heads = numbered(4, 2)
    w.view(2, 2, 2, 3, 2)[:, 1] = 1.0  # recognisable queries, but all gate rows alike
    return w, heads, kv_heads


@wrong("2.7", says="it needs 2 * H * D rows")
def layout_test_case():
    return numbered(4, 2, rows=20)


@wrong("2.7", says="evenly")
def layout_test_case():
    return numbered(4, 3)


@wrong("2.7", says="1 to 4096 entries")
def layout_test_case():
    return torch.randn(2 * 32 * 128, 2048 // 64), 32, 4


@wrong("2.7", says="return the three of (w, H, K)")
def layout_test_case():
    return numbered(4, 2)[0]


# ---------------------------------------------------------------------------------------------- 2.8
def moved_by_one_token(attend, token, weights=None):
    """Which outputs [T] move when x changes at `token` alone."""
    weights = torch.softmax(torch.randn(2, 2, 5, 5), dim=-1) if weights is None else weights
    v, x = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 6)
    other = x.clone()
    other[:, token] = 2 * torch.randn(2, 6)
    return (attend(weights, v, other) - attend(weights, v, x)).abs().amax(dim=(0, 2, 3)) > 1e-5


@wrong("2.8", says="catches 0 of 9")
def gate_follows_query(attend):
    return True


@wrong("2.8", says="turns down a right implementation")
def gate_follows_query(attend):
    return bool(moved_by_one_token(attend, 2).all())


@wrong("2.8", says="turns down a right implementation: a headwise gate")
def gate_follows_query(attend):
    weights, v, x = torch.softmax(torch.randn(1, 2, 5, 5), dim=-1), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 6)
    first = attend(weights, v, x) / torch.einsum("bhts,bshd->bthd", weights, v)
    return not torch.allclose(first[..., 0], first[..., 1], atol=1e-4)  # wants scores that differ by channel


@wrong("2.8", says="no gate at all")
def gate_follows_query(attend):
    return all(moved_by_one_token(attend, i).sum() <= moved_by_one_token(attend, i)[i] for i in range(5))


@wrong("2.8", says="one it lets through: a gate on the values (G2)")
def gate_follows_query(attend):
    return all(bool(moved_by_one_token(attend, i)[i]) for i in range(5))  # its own output moves; and the others?


@wrong("2.8", says="lets through: a gate on the values (G2)")
def gate_follows_query(attend):
    eye = torch.eye(5).expand(2, 2, 5, 5)  # every token looks at itself: before or after the sum is the same
    moved = [moved_by_one_token(attend, i, eye) for i in range(5)]
    return all(bool(m[i]) and m.sum() == 1 for i, m in enumerate(moved))


@wrong("2.8", says="one it lets through: a gate from the mean over the tokens so far")
def gate_follows_query(attend):
    moved = moved_by_one_token(attend, 4)  # the last token only
    return bool(moved[4]) and int(moved.sum()) == 1


@wrong("2.8", says="catches 8 of 9 wrong implementations; one it lets through: a gate at G1 that leaves out token 0")
def gate_follows_query(attend):
    moved = [moved_by_one_token(attend, i) for i in range(1, 5)]  # and token 0?
    return all(bool(m[i]) and m.sum() == 1 for i, m in enumerate(moved, start=1))


@wrong("2.8", says="returns NoneType; return True or False")
def gate_follows_query(attend):
    assert moved_by_one_token(attend, 1).shape == (5,)


# ---------------------------------------------------------------------------------------------- 2.9
@wrong("2.9", says="take absolute values before the maximum")
def massive_activation(hidden):
    return round(sum(h.max().item() for h in hidden) / len(hidden))


@wrong("2.9", says="the largest of all layers")
def massive_activation(hidden):
    return round(max(h.abs().max().item() for h in hidden))


@wrong("2.9", says="the sum over the layers")
def massive_activation(hidden):
    return round(sum(h.abs().max().item() for h in hidden))


@wrong("2.9", says="the mean absolute activation")
def massive_activation(hidden):
    return round(sum(h.abs().mean().item() for h in hidden) / len(hidden))


@wrong("2.9", says="the maxima of the tokens")
def massive_activation(hidden):
    return round(sum(h.abs().amax(-1).mean().item() for h in hidden) / len(hidden))


@wrong("2.9", says="the maxima of the sequences")
def massive_activation(hidden):
    return round(sum(h.abs().amax((1, 2)).mean().item() for h in hidden) / len(hidden))


@wrong("2.9", says="do not cut off")
def massive_activation(hidden):
    return int(sum(h.abs().max().item() for h in hidden) / len(hidden))


@wrong("2.9", says="round once, at the end")
def massive_activation(hidden):
    return round(sum(round(h.abs().max().item()) for h in hidden) / len(hidden))


@wrong("2.9", says="round the result to a whole number")
def massive_activation(hidden):
    return sum(h.abs().max().item() for h in hidden) / len(hidden)


@wrong("2.9", says="changes its input `hidden[0]` in place")
def massive_activation(hidden):
    return round(sum(h.abs_().max().item() for h in hidden) / len(hidden))
