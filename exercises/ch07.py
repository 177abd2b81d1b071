"""Exercises of chapter 7. Replace a `raise` by your answer, then `pytest exercises -k 7_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 7.1 A router: fill, difficulty 1 of 5, about 15 minutes
def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Choose k experts for every token.

    The probabilities are a softmax of a token's logits over *all* experts, eq. (7.1). The k largest of them name the
    experts and are the weights of their outputs, eq. (7.2); with `renormalise` they are divided by their sum first.

    Two experts often get nearly equal logits, and bfloat16 keeps only eight bits: compute in float32 at least.
    float16 and bfloat16 logits give float32 weights, float64 logits give float64 weights.

    Args:
        logits: of the router, [N, E]. top_k: k, from 1 to E. renormalise: whether the k weights sum to one.

    Returns:
        (chosen, weights): [N, k] each, the most probable expert first; `chosen` is int64.
    """
    raise NotImplementedError("7.1")


# 7.2 A loss for balance: fill, difficulty 2 of 5, about 20 minutes
def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Measure how unevenly one layer uses its experts.

    Each of N tokens visits k experts, which makes N k assignments. f_e is the share of all assignments that went to
    expert e, eq. (7.4); P_e is the mean over all tokens of the probability that the router gives e, chosen or not,
    eq. (7.5). The loss is E times the sum over e of f_e P_e, eq. (7.6): 1 when either is uniform.

    A count has no gradient; P_e is what the router learns from.

    Args:
        logits: of the router, [N, E]. chosen: the experts of each token, [N, k] int64.

    Returns:
        A scalar tensor.
    """
    raise NotImplementedError("7.2")


# 7.3 Experts in order: fill, difficulty 3 of 5, about 30 minutes
def sorted_experts(x: Tensor, chosen: Tensor, weights: Tensor, experts: int, grouped) -> Tensor:
    """Run all experts at once, on assignments sorted by expert.

    A loop over experts gathers the tokens of each, runs it and adds the weighted results. Large models do the same
    with one call: `grouped(rows, counts)` expects the rows of expert 0 first, then those of expert 1 and so on,
    counts[e] of them for expert e, and returns one output row for each. A token stands there k times, once for each
    expert it visits. Prepare this call, make it once, and undo the sorting: the output of token n is the sum over its k
    choices of weight times output.

    Args:
        x: tokens [N, C]. chosen: experts of each token, [N, k] int64, a token's experts all different.
        weights: of the k outputs, [N, k]. experts: E; some of them may have no token.
        grouped: the function of (rows [N k, C], counts [E] int64) that returns [N k, C].

    Returns:
        [N, C].
    """
    raise NotImplementedError("7.3")


# 7.4 What a token meets: predict, difficulty 2 of 5, about 15 minutes
def moe_parameters(width: int, hidden: int, experts: int, top_k: int, shared: int, layers: int, other: int) -> dict:
    """Predict how many parameters a mixture of experts has, and how many of them a token meets.

    There are no biases. An expert is a SwiGLU of hidden width F, three matrices. The router is one linear layer; a
    token needs all of it. A shared expert is a SwiGLU of its own width that every token visits, with a gate: one more
    linear layer that gives one number a token. Without a shared expert there is no such gate.

        "expert"    one expert
        "router"    the router of one layer
        "shared"    shared expert and its gate, of one layer
        "layer"     all of one mixture layer
        "active"    of these, what one token meets
        "total"     the whole model
        "visited"   of the whole model, what one token meets

    Args:
        width: C. hidden: F. experts: E. top_k: k. shared: width of the shared expert, 0 for none.
        layers: how many mixture layers the model has.
        other: parameters of the whole model outside its mixture layers; a token counts as meeting all of them.

    Returns:
        A dictionary with whole numbers under these seven names.
    """
    raise NotImplementedError("7.4")


# 7.5 Break four routers: break, difficulty 3 of 5, about 25 minutes
def router_test_case() -> tuple:
    """Break four routers with one input.

    The right router takes p = softmax(logits) over the E experts and the k largest p as weights. Four wrong ones
    circulate:

        twice     a second softmax: weights are the k largest of softmax(p)
        late      the softmax comes after the choice, over the k largest logits alone
        rounded   the choice is made from logits rounded to bfloat16; of equal ones the first in order is taken
        blind     the weights are right, and the balance loss takes P from softmax(p)

    Find logits and k for which all four show: `twice` lowers some weight by more than 0.5, `late` raises some weight by
    more than 0.2, `rounded` sends some token to another set of experts, and `blind` reports less than half of the right
    balance loss.

    Returns:
        (logits, top_k): a float64 tensor [N, E] with entries of at most 20 in absolute value, N from 1 to 32, E from 2
        to 16; k from 1 to E - 1.
    """
    raise NotImplementedError("7.5")


# 7.6 Prove that tokens go alone: prove, difficulty 3 of 5, about 25 minutes
def tokens_go_alone(layer) -> bool:
    """Write the property that lets a mixture of experts generate.

    With a key/value cache a model sees one new token a step; in training it sees all at once. Both give the same if
    a layer treats each token as if it were alone: its output depends on this token, and not on its neighbours, their
    number, its place among them, or on what the layer did before.

    Some published layers break this: experts with room for a few tokens drop the rest, or experts choose tokens instead
    of the other way round. Some of them look innocent as long as tokens are few or experts evenly used.

    You are graded by the layers you turn down that mix tokens, and by those that you accept: one expert or several a
    token, weights that sum to one or not, other routers, a shared expert.

    Args:
        layer: a function of tokens [N, 8], float64, that returns [N, 8]; N is yours to choose, from 1 to 64.

    Returns:
        True if every token goes alone, otherwise False.
    """
    raise NotImplementedError("7.6")


# 7.7 A loss for small logits: fill, difficulty 1 of 5, about 10 minutes
def z_loss(logits: Tensor) -> Tensor:
    """Keep the router's logits small.

    A softmax does not notice a number added to all logits of a token, so nothing holds them near zero, and large
    logits are rounded coarsely. The z-loss of ST-MoE is the mean over tokens of the square of
    log sum_e exp(logit_e), eq. (7.7). exp(1000) is infinite: see to it that logits of 1000 still give a finite loss.

    Args:
        logits: [N, E].

    Returns:
        A scalar tensor in the dtype of `logits`.
    """
    raise NotImplementedError("7.7")


# 7.8 Hide two collapsed layers: break, difficulty 2 of 5, about 15 minutes
def layers_test_case() -> tuple:
    """Hide two collapsed layers from a pooled balance loss.

    Some code joins the tokens of all layers and computes one f_e and one P_e for them together:

        pooled = E * sum_e f_e P_e,   over the N tokens of each of two layers, as if they were 2 N tokens of one

    Find router logits of two layers for which each layer's own loss, eq. (7.6), is above 1.9, and the pooled one is
    below 1.01, as if all were well. The experts of a token are the k largest of its logits.

    Returns:
        (first, second, top_k): two float64 tensors [N, E] of one shape, with entries of at most 20 in absolute value, N
        from 1 to 64, E from 2 to 16; k from 1 to E.
    """
    raise NotImplementedError("7.8")
