"""The dense rows of the paper's Table 2 as settings: a model size, a variant, a rate (arXiv 2505.06708)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseRow:
    """A row of the paper's Table 2: a dense model, parameters matched by a narrower feed-forward.

    Attributes:
        row: in Table 2. size: a model name. variant: a variant name. tokens: of training, in billions.
        rate: peak learning rate. ppl: average perplexity; None where training diverged.
    """

    row: int
    size: str
    variant: str
    tokens: int
    rate: float
    ppl: float | None


TABLE_2 = (
    DenseRow(1, "1.7B-28L", "none", 400, 4.0e-3, 7.499),
    DenseRow(2, "1.7B-28L", "g1_elementwise", 400, 4.0e-3, 7.404),
    DenseRow(3, "1.7B-28L", "none", 3500, 4.5e-3, 6.180),
    DenseRow(4, "1.7B-28L", "g1_elementwise", 3500, 4.5e-3, 6.130),
    DenseRow(5, "1.7B-48L", "none", 400, 4.0e-3, 7.421),
    DenseRow(6, "1.7B-48L", "none", 400, 8.0e-3, 9.195),
    DenseRow(7, "1.7B-48L", "sandwich_norm", 400, 8.0e-3, 7.407),
    DenseRow(8, "1.7B-48L", "g1_elementwise", 400, 4.0e-3, 7.288),
    DenseRow(9, "1.7B-48L", "g1_headwise", 400, 4.0e-3, 7.370),
    DenseRow(10, "1.7B-48L", "g1_elementwise", 400, 8.0e-3, 7.325),
    DenseRow(11, "1.7B-48L", "none", 1000, 5.3e-3, 7.363),
    DenseRow(12, "1.7B-48L", "none", 1000, 8.0e-3, None),
    DenseRow(13, "1.7B-48L", "g1_elementwise", 1000, 5.3e-3, 7.101),
    DenseRow(14, "1.7B-48L", "g1_elementwise", 1000, 8.0e-3, 7.078),
)


def format_dense_rows() -> str:
    """Table 2 as text: each row is a model size, a variant and a rate."""
    lines = [f"{'Table 2':9}{'model':10}{'variant':16}{'tokens':>8}{'rate':>9}{'ppl':>10}"]
    for r in TABLE_2:
        ppl = "diverged" if r.ppl is None else f"{r.ppl:.3f}"
        lines.append(f"row {r.row:<5}{r.size:10}{r.variant:16}{r.tokens:>7}B{r.rate:>9.1e}{ppl:>10}")
    return "\n".join(lines)
