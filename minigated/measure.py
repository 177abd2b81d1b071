"""What gating changes inside a model: sinks, massive activations, gate scores, sparsity, effective rank.

Definitions follow *Gated Attention for Large Language Models* (arXiv 2505.06708): first-token share (F-Attn) and
massive activation (M-Act) of Table 4, the four taps of figure 6, mean |Y| of figure 4, sparsity of figure 5. Where the
paper leaves a choice, both readings are returned.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minigated.attention import attention_weights, causal_mask, repeat_kv
from minigated.errors import InputError
from minigated.gates import COMBINE

TAPS = ("attention_output", "attention_residual", "ffn_output", "ffn_residual")
THRESHOLDS = (1e-2, 1e-3)
HISTOGRAM_BINS = 20


# ---------------------------------------------------------------------------------------------- single measures
def first_token_share(q: Tensor, k: Tensor, first_query: int = 1, rows: int = 512) -> Tensor:
    """Mean attention weight on token 0, per query head (F-Attn of one layer before the mean over heads).

    Args:
        q: [B, H, T, D] as they enter the product (after norm and rotation). k: [B, K, T, D].
        first_query: queries before this one do not count; query 0 can only look at itself and adds 1/T.
        rows: queries a step, to bound memory.

    Returns:
        [H], float32.
    """
    k = repeat_kv(k, q.shape[1] // k.shape[1])  # [B, H, T, D]
    tokens = q.shape[2]
    if not 0 <= first_query < tokens:
        raise InputError(f"first_query must be between 0 and {tokens - 1}, got {first_query}")
    total = q.new_zeros(q.shape[1], dtype=torch.float32)
    for start in range(first_query, tokens, rows):
        end = min(start + rows, tokens)
        mask = causal_mask(end - start, end, q.device)
        weights = attention_weights(q[:, :, start:end].float(), k[:, :, :end].float(), mask)  # [B, H, rows, end]
        total += weights[..., 0].mean(0).sum(-1)
    return total / (tokens - first_query)


def uniform_share(tokens: int, first_query: int = 1) -> float:
    """First-token share if every query looked at all it may see equally: the mean over i of 1 / (i + 1)."""
    return sum(1 / (i + 1) for i in range(first_query, tokens)) / (tokens - first_query)


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007): 1 to min(rows, columns)."""
    values = torch.linalg.svdvals(matrix.detach().double())
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def value_output_rank(attention: nn.Module) -> list[float]:
    """Effective rank of each head's linear map W_V W_O, eq. (6); at most D. One number a query head."""
    if not hasattr(attention.v_proj, "weight"):
        kind = type(attention.v_proj).__name__
        raise InputError(f"values come from a {kind}; accepted: one linear map for all tokens")
    shape = attention.shape
    group = shape.heads // shape.kv_heads
    w_v = attention.v_proj.weight.unflatten(0, (shape.kv_heads, shape.head_width))  # [K, D, C]
    w_o = attention.o_proj.weight.unflatten(1, (shape.heads, shape.head_width))  # [C, H, D]
    return [effective_rank(w_o[:, h] @ w_v[h // group]) for h in range(shape.heads)]  # each [C, C]


def contribution_rank(y: Tensor, attention: nn.Module, rows: int = 1024) -> list[float]:
    """Effective rank of what each head adds to the stream, rows pooled over tokens.

    Args:
        y: head outputs before or after the gate, [B, T, H, D]. attention: the layer, for its W_O.
        rows: tokens used.
    """
    shape = attention.shape
    w_o = attention.o_proj.weight.unflatten(1, (shape.heads, shape.head_width)).float()  # [C, H, D]
    tokens = y.float().flatten(0, 1)[:rows]  # [rows, H, D]
    return [effective_rank(tokens[:, h] @ w_o[:, h].T) for h in range(shape.heads)]


# ---------------------------------------------------------------------------------------------- one pass over a model
class Probe:
    """Collects every measure while a model runs; give it as `model(tokens, probe=Probe())`.

    Sums are kept per layer, so any number of batches can pass through. Each batch weighs the same.
    """

    def __init__(self):
        self.sums: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.maxima: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.heads: dict[int, Tensor] = {}
        self.histogram: dict[int, Tensor] = {}
        self.calls: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.tokens = 0
        self._forms: dict[int, str] = {}
        self._scores: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, name: str, value) -> None:
        if name in TAPS:
            self._activation(layer, name, value.float().abs())
        elif name == "qk":
            self._sink(layer, *value)
        elif name == "gate_form" and value[0] == "g1":
            self._forms[layer] = value[1]
        elif name == "gate_score":
            self._gate(layer, *value)
        elif name == "sdpa":
            self._before[layer] = value
        elif name == "sdpa_gated":
            self._output(layer, self._before.pop(layer).float(), value.float())

    def _add(self, layer: int, name: str, value) -> None:
        self.sums[name][layer] += float(value)
        self.calls[name][layer] += 1

    def _activation(self, layer, name, magnitude):
        self.maxima[name][layer] = max(self.maxima[name][layer], float(magnitude.max()))
        self._add(layer, name, magnitude.flatten(1).amax(1).mean())  # the other reading: mean of per-sequence maxima

    def _sink(self, layer, q, k):
        share = first_token_share(q, k)
        self.tokens = q.shape[2]
        self.heads[layer] = self.heads.get(layer, 0) + share.cpu()
        self._add(layer, "first_token", share.mean())

    def _gate(self, layer, position, scores):
        scores = scores.float()
        self._add(layer, "gate_mean", scores.mean())
        self._add(layer, "gate_std", scores.std())
        self._add(layer, "gate_first_token", scores[:, 0].mean())
        self.histogram[layer] = self.histogram.get(layer, 0) + torch.histc(scores, HISTOGRAM_BINS, 0.0, 1.0).cpu()
        if position == "g1":
            self._scores[layer] = scores

    def _output(self, layer, before, after):
        self._add(layer, "abs_before", before.abs().mean())
        self._add(layer, "abs_after", after.abs().mean())
        scores = self._scores.pop(layer, None)
        combine = COMBINE[self._forms.pop(layer, "multiply")]
        average = before if scores is None else combine(before, scores.mean())
        for threshold in THRESHOLDS:
            for name, y in (("before", before), ("after", after), ("after_average", average)):
                self._add(layer, f"sparsity_{name}_{threshold:g}", (y.abs() < threshold).float().mean())

    def result(self) -> dict:
        """All measures as plain lists, one entry a layer; JSON-able. See `measure` for the keys."""
        mean = {n: [v[i] / self.calls[n][i] for i in sorted(v)] for n, v in self.sums.items()}
        layers = sorted(self.heads)
        count = self.calls["first_token"]
        excluded = mean["first_token"]
        out = {
            "tokens": self.tokens,
            "first_token_share": excluded,
            "first_token_share_with_query_0": [(f * (self.tokens - 1) + 1) / self.tokens for f in excluded],
            "first_token_share_by_head": [(self.heads[i] / count[i]).tolist() for i in layers],
            "uniform_share": uniform_share(self.tokens),
            "max_activation": {tap: [self.maxima[tap][i] for i in layers] for tap in TAPS},
            "mean_sequence_max": {tap: mean[tap] for tap in TAPS},
            "mean_abs": {"before": mean["abs_before"], "after": mean["abs_after"]},
            "sparsity": {
                f"{t:g}": {n: mean[f"sparsity_{n}_{t:g}"] for n in ("before", "after", "after_average")}
                for t in THRESHOLDS
            },
            "gate": None,
        }
        if self.histogram:
            out["gate"] = {
                "mean": mean["gate_mean"],
                "std": mean["gate_std"],
                "first_token": mean["gate_first_token"],
                "histogram": [(h / h.sum().clamp(min=1)).tolist() for _, h in sorted(self.histogram.items())],
            }
        return out


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Tensor], precision: torch.dtype | None = None) -> dict:
    """Runs a model over batches of tokens and returns every measure, per layer.

    Args:
        model: any model of the package that takes `probe`.
        batches: tensors [B, T] of tokens; all of one length.
        precision: autocast dtype, e.g. torch.bfloat16; None for the model's own.

    Returns:
        tokens, first_token_share (query 0 left out) and first_token_share_with_query_0, first_token_share_by_head,
        uniform_share, max_activation and mean_sequence_max per tap, mean_abs and sparsity of the attention output
        before and after what sits at G1 (sparsity also after its average gate), and gate (None without one): mean, std,
        first_token, histogram over [0, 1].
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    probe = Probe()
    try:
        for tokens in batches:
            with torch.autocast(device.type, precision, enabled=precision is not None):
                model(tokens.to(device), probe=probe)
    finally:
        model.train(was_training)
    if not probe.heads:
        raise InputError("no batch was given, so there is nothing to measure")
    return probe.result()


def summary(measures: dict) -> dict[str, float | None]:
    """Table 4 in one line: F-Attn with its uniform reference, M-Act, mean gate score."""

    def mean(values):
        return sum(values) / len(values)

    return {
        "f_attn": mean(measures["first_token_share"]),
        "uniform": measures["uniform_share"],
        "m_act": mean(measures["max_activation"]["ffn_residual"]),
        "gate_score": mean(measures["gate"]["mean"]) if measures["gate"] else None,
    }
