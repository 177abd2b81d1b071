"""`python -m minigated variants`: the variants beside the paper's numbers, and Table 2's rows as settings of them."""

from dataclasses import asdict, dataclass

from minigated.variants import VARIANTS, added_parameters


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


def variant_rows() -> list[dict]:
    """The variants as plain rows: name, summary, the paper's numbers and the counted parameters in millions."""
    rows = []
    for variant in VARIANTS.values():
        counted = added_parameters(variant) / 1e6
        named = {"name": variant.name, "summary": variant.summary, "counted_millions": counted}
        rows.append(named | asdict(variant.paper) | {"note": variant.note})
    return rows


def _cell(value, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def format_rows(rows: list[dict]) -> str:
    """Aligned text for a terminal; notes below, by number."""
    head = (
        f"{'variant':22}{'paper':8}{'ppl':>7}{'+M paper':>10}{'+M here':>10}{'score':>7}{'M-Act':>7}{'F-Attn':>8}  what"
    )
    lines, notes = [head], list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    for row in rows:
        mark = f" [{notes.index(row['note']) + 1}]" if row["note"] else ""
        lines.append(
            f"{row['name']:22}{row['rows']:8}{_cell(row['ppl'], '{:.3f}'):>7}{_cell(row['added_millions'], '{:g}'):>10}"
            f"{_cell(row['counted_millions'], '{:.2f}'):>10}{_cell(row['gate_score']):>7}{_cell(row['m_act']):>7}"
            f"{_cell(row['f_attn']):>8}  {row['summary']}{mark}"
        )
    lines += [f"[{i + 1}] {note}" for i, note in enumerate(notes)]
    said = "The paper (arXiv 2505.06708): MoE-15A2B after 400B tokens. +M: parameters added at that size, in millions."
    return "\n".join([*lines, said])


def format_dense_rows() -> str:
    """Table 2 as text: each row is a model size, a variant and a rate."""
    lines = [f"{'Table 2':9}{'model':10}{'variant':16}{'tokens':>8}{'rate':>9}{'ppl':>10}"]
    for r in TABLE_2:
        ppl = "diverged" if r.ppl is None else f"{r.ppl:.3f}"
        lines.append(f"row {r.row:<5}{r.size:10}{r.variant:16}{r.tokens:>7}B{r.rate:>9.1e}{ppl:>10}")
    return "\n".join(lines)
