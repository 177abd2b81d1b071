"""Checks of chapter 2: what is measured on gates and sinks."""

import torch
from torch import Tensor

from minigated.check import exercise
from minigated.expectations import (
    call,
    draw,
    expect_number,
    expect_untouched,
    refuse,
)


# ---------------------------------------------------------------------------------------------- 2.4
def share_reference(weights: Tensor, first_query: int) -> tuple[float, float]:
    batch, heads, queries, _ = weights.shape
    found = [
        float(weights[b, h, i, 0])
        for b in range(batch)
        for h in range(heads)
        for i in range(first_query, queries)
    ]
    uniform = [1 / (i + 1) for i in range(first_query, queries)]
    return sum(found) / len(found), sum(uniform) / len(uniform)


def share_suspects(weights: Tensor, first_query: int) -> tuple[dict[str, float], dict[str, float]]:
    queries, mean = weights.shape[2], lambda x: float(x.mean())
    if first_query == 0:
        return {}, {}
    shares = {
        "query 0 is counted, which sees nothing but itself": mean(weights[:, :, :, 0]),
        "`first_query` is not used": mean(weights[:, :, 1:, 0]),
        "that is the row of query 0, what it gives to all keys; take the column of key 0": mean(
            weights[:, :, 0]
        ),
        "that is the share of the last token": mean(weights[:, :, first_query:, -1]),
        "only the last query is counted": mean(weights[:, :, -1, 0]),
        "that is the largest head; average over the heads": mean(weights[:, :, first_query:, 0].amax(1)),
        "that is the sum over the queries; take the mean": mean(weights[:, :, first_query:, 0].sum(-1)),
    }
    counts = torch.arange(1, queries + 1).double()
    uniforms = {
        "1 / T is right for the last query alone: query i sees i + 1 tokens": 1 / queries,
        "query 0 is counted, which sees nothing but itself": mean(1 / counts),
        "`first_query` is not used": mean(1 / counts[1:]),
        "query i sees i + 1 tokens, not i": mean(1 / counts[first_query - 1 : -1]),
        "the mean of 1 / (i + 1) is not 1 over the mean of i + 1": 1 / mean(counts[first_query:]),
    }
    right = share_reference(weights, first_query)
    clean = lambda suspects, number: {m: n for m, n in suspects.items() if abs(n - number) > 1e-9}
    return clean(shares, right[0]), clean(uniforms, right[1])


@exercise(
    "2.4",
    "The first-token share",
    kind="fill",
    difficulty=2,
    minutes=15,
    hint=(
        "weights[b, h, i, j] is what query i gives to key j: which index is 0, and which starts at "
        "first_query? With T = 3 and first_query = 1 the uniform share is (1/2 + 1/3) / 2."
    ),
    pseudo=(
        "share = mean of weights[:, :, first_query:, 0]\n"
        "uniform = mean of 1 / (i + 1) for i = first_query .. T - 1\n"
        "return both as floats"
    ),
)
def first_token_share(f):
    for tokens, first_query in ((6, 1), (9, 4), (33, 1), (12, 0)):
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        weights = torch.softmax(2 * draw(2, 3, tokens, tokens).masked_fill(~mask, float("-inf")), dim=-1)
        result = call(f, weights) if first_query == 1 else call(f, weights, first_query)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            refuse("return two numbers: (share, uniform)")
        for value, expected, suspects, name in zip(
            result,
            share_reference(weights, first_query),
            share_suspects(weights, first_query),
            ("the share", "the uniform reference"),
        ):
            about = f"{name} of {tokens} tokens from query {first_query} on"
            expect_number(value, expected, about, suspects)
    expect_untouched(f, {"weights": weights.clone()})


# ---------------------------------------------------------------------------------------------- 2.9
@exercise(
    "2.9",
    "Massive activations",
    kind="fill",
    difficulty=1,
    minutes=10,
    hint=(
        "The sign of a massive activation may well be negative. `tensor.abs().max()` is a tensor; "
        "`.item()` makes a number of it."
    ),
    pseudo=("largest = for each layer the maximum of the absolute values\nreturn round(mean of largest)"),
)
def massive_activation(f):
    layers = [(i + 1) * draw(2, 4, 5, seed=i) for i in range(3)]
    layers[1][1, 2, 3] = -400.7  # the massive one is negative
    layers[0][0, 0, 0], layers[2][0, 1, 0] = 55.6, 60.6
    for hidden, what in (([layers[0]], "M-Act of one layer"), (layers, "M-Act of three layers")):
        largest = [layer.abs().max().item() for layer in hidden]
        mean = sum(largest) / len(largest)
        stacked = torch.stack(hidden)  # [layers, B, T, C]
        suspects = {
            "the sign is lost: take absolute values before the maximum": round(
                sum(layer.max().item() for layer in hidden) / len(hidden)
            ),
            "that is the largest of all layers; average over the layers": round(max(largest)),
            "that is the sum over the layers; average": round(sum(largest)),
            "each layer is rounded before the average; round once, at the end": sum(map(round, largest))
            / len(hidden),
            "that rounds the average of rounded layers; round once, at the end": round(
                sum(map(round, largest)) / len(hidden)
            ),
            "round to the nearest whole number, do not cut off": int(mean),
            "round the result to a whole number": mean,
            "that is the mean absolute activation; take the maximum of each layer": round(
                stacked.abs().mean().item()
            ),
            "that averages the maxima of the tokens; take one maximum for the whole layer": round(
                stacked.abs().amax(-1).mean().item()
            ),
            "that averages the maxima of the sequences; take one maximum for the whole layer": round(
                stacked.abs().amax((2, 3)).mean().item()
            ),
        }
        expected = round(mean)
        expect_number(
            f([h.clone() for h in hidden]),
            expected,
            what,
            {m: n for m, n in suspects.items() if n != expected},
        )
    expect_untouched(
        lambda *tensors: f(list(tensors)), {f"hidden[{i}]": layer for i, layer in enumerate(layers)}
    )
