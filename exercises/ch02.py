"""Exercises of chapter 2. Replace a `raise` by your answer, then `pytest exercises -k 2_1`."""

import math  # noqa: F401

import torch  # noqa: F401
import torch.nn.functional as F  # noqa: F401
from torch import Tensor  # noqa: F401


# 2.1 Gate the head outputs (G1): fill, difficulty 2 of 5, about 15 minutes
def gated_output(y: Tensor, x: Tensor, w_gate: Tensor, w_out: Tensor) -> Tensor:
    """Put the paper's best gate in its best place: G1, elementwise.

    The scores are the sigmoid of a linear map of x, the block's normalised input, the same tensor that the
    queries were made from. They multiply the head outputs y, number by number, *before* the heads are
    joined and mapped by W_O. Both weights are those of a bias-free `nn.Linear`, [outputs, inputs]. Row
    `h * D + d` of w_gate is the gate of channel d of head h.

    Args:
        y: head outputs of attention [B, T, H, D].
        x: normalised block input [B, T, C].
        w_gate: W_theta [H * D, C].
        w_out: W_O [C, H * D].

    Returns:
        [B, T, C], what the block adds to its residual stream.
    """
    raise NotImplementedError("2.1")


# 2.2 Headwise and head-shared scores: fill, difficulty 2 of 5, about 15 minutes
def gate_by_heads(y: Tensor, logits: Tensor, granularity: str) -> Tensor:
    """Gate with fewer scores: one for a whole head, or one set for all heads.

    `"headwise"`: a head has a single score, the sigmoid of its logit, for all its channels.

    `"shared"`: there are logits for every head and channel, but their *scores* are averaged over the heads,
    and every head is multiplied by this average. A score is what comes after the sigmoid.

    Args:
        y: head outputs [B, T, H, D].
        logits: X W_theta, [B, T, H] for "headwise" and [B, T, H, D] for "shared".
        granularity: "headwise" or "shared"; anything else is a ValueError.

    Returns:
        [B, T, H, D].
    """
    raise NotImplementedError("2.2")


# 2.3 Gate the values (G2): fill, difficulty 3 of 5, about 20 minutes
def gate_before_sum(weights: Tensor, v: Tensor, scores: Tensor) -> Tensor:
    """Move the gate to the values: G2, before the sum over tokens.

    Each value vector is multiplied by the scores of *its own* token, and only then do the queries average
    the values. The gate sits before the key/value heads are shared, so a group of H / K neighbouring query
    heads sees the same gated values. What does a query have to say about this gate? Nothing, and that is
    the difference to G1.

    Args:
        weights: attention weights after the softmax [B, H, T, S].
        v: values [B, S, K, D]; H is a multiple of K.
        scores: gate scores of the S tokens [B, S, K, D].

    Returns:
        [B, T, H, D].
    """
    raise NotImplementedError("2.3")


# 2.4 The first-token share: fill, difficulty 2 of 5, about 15 minutes
def first_token_share(weights: Tensor, first_query: int = 1) -> tuple:
    """Measure the attention sink, and what no sink would look like.

    The first-token share is the mean attention weight on token 0 over sequences, heads and queries. Query 0
    sees nothing but itself, so by default the count starts at query 1. Beside it stands the share that
    uniform attention would give over the same queries: query i sees i + 1 tokens.

    Args:
        weights: causal attention weights [B, H, T, T].
        first_query: the first query that counts; all later ones count too.

    Returns:
        (share, uniform), two floats.
    """
    raise NotImplementedError("2.4")


# 2.5 Five forms of a gate: fill, difficulty 1 of 5, about 15 minutes
def apply_gate(y: Tensor, logits: Tensor, form: str) -> Tensor:
    """Five ways in which scores can meet the head outputs.

        "sigmoid"              y times sigmoid(z)
        "ns_sigmoid"           y times (0.5 + 0.5 sigmoid(z)), which can never close: eq. (9)
        "silu"                 y times SiLU(z), where SiLU(z) = z sigmoid(z)
        "additive_silu"        y plus SiLU(z)
        "additive_identity"    y plus z

    Before training z is near 0. Ask yourself what each of the five does to y then: two dim it, two leave it
    alone, one shuts it off. The input-independent gate of the paper is the first form with a
    learned table z of shape [H, D] that is the same for all tokens.

    Args:
        y: head outputs [B, T, H, D].
        logits: z, [B, T, H, D], or anything that broadcasts to it such as [H, D].
        form: one of the five names; anything else is a ValueError.

    Returns:
        [B, T, H, D].
    """
    raise NotImplementedError("2.5")


# 2.6 What a gate adds: predict, difficulty 2 of 5, about 20 minutes
def added_parameters(width: int, heads: int, kv_heads: int, head_width: int, layers: int) -> dict:
    """Predict what each variant adds to the model, and see the paper's column appear.

    Write the number of parameters that each variant adds to a model whose layers have C channels, H query
    heads, K key/value heads and head width D. No biases. At the paper's size (C = 2048, H = 32, K = 4, D =
    128, 24 layers) your formulas give the added parameters of its Table 1, which prints them in millions.

    Args:
        width: C.
        heads: H.
        kv_heads: K.
        head_width: D.
        layers: number of layers.

    Returns:
        A dictionary with whole numbers under these names:
        "g1_elementwise", "g1_headwise", "g1_shared" (scores for every head, then averaged),
        "g1_input_independent" (a table of logits instead of a linear map),
        "g2_elementwise", "g2_headwise" (gates on the values), "g5_elementwise" (on the C outputs of W_O),
        "kv_heads_doubled" (2 K key/value heads) and "q_heads_half_more" (1.5 H query heads).
    """
    raise NotImplementedError("2.6")


# 2.7 Break the weight loaders: break, difficulty 3 of 5, about 20 minutes
def layout_test_case() -> tuple:
    """Break three loaders with one weight.

    The paper's checkpoints keep the query and the gate rows in one matrix, [2 * H * D, C], packed by
    key/value head: with G = H / K, the rows read as [K, 2, G, D], where index 0 of the second axis is the
    query. The right loader and three that circulate as bugs:

        # part 0 is the query, part 1 the gate
        right    = w.view(K, 2, G, D, C)[:, part].reshape(H, D, C)
        per_head = w.view(H, 2, D, C)[:, part]  # the layout of another model
        halves   = w.view(2, H, D, C)[part]  # all queries, then all gates
        tiled    = w.view(K, 2, G, D, C)[:, part].transpose(0, 1).reshape(H, D, C)  # heads in another order

    With carelessly chosen sizes each of the three agrees with the right one, and the bug goes unnoticed.
    Return one weight and head counts with which all three bugs show, in the query *and* in the gate.

    Returns:
        (w [2 * H * D, C], H, K): a float tensor with at most 4096 entries and two whole numbers.
    """
    raise NotImplementedError("2.7")


# 2.8 Prove where the gate sits: prove, difficulty 3 of 5, about 20 minutes
def gate_follows_query(attend) -> bool:
    """Write the property: the gate acts after the sum, from the query's own token.

    You get the second half of some gated attention: the attention weights and the values are given, and x
    is read by the gate alone. With a gate at G1 the output of token i changes when x of token i does, and
    never when x of another token does. With a gate at G2 a token's x shows in the output of every token that
    looks at it. Your answer is graded by the misplaced gates it catches and by the G1 gates, of any kind,
    that it accepts.

    Args:
        attend: a function of weights [B, H, T, T], v [B, T, H, D] and x [B, T, C] that returns [B, T, H, D].
            Here H = 2, D = 4 and C = 6; B and T are yours to choose, everything is float32. The rows of
            the weights sum to 1.

    Returns:
        True if the gate follows the query, otherwise False.
    """
    raise NotImplementedError("2.8")


# 2.9 Massive activations: fill, difficulty 1 of 5, about 10 minutes
def massive_activation(hidden: list) -> int:
    """Boil the largest activations of a model down to the paper's one number, M-Act.

    Every layer leaves a residual stream behind. Take the largest absolute activation of each layer, over
    all sequences, tokens and channels; average these over the layers; round once, at the end, to the
    nearest whole number.

    Args:
        hidden: the residual stream after each layer, a list of tensors [B, T, C].

    Returns:
        A whole number.
    """
    raise NotImplementedError("2.9")
