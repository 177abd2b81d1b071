"""`ch07_sparsity_sinks`: the paper's Table 4 on the mixture of experts: gate score, M-Act, F-Attn, layer by layer.

Its runs are those of `ch07_moe_gates`, in that record's log, with three rows more: scores shared by the heads, scores
without an input, scores that cannot fall under one half. Whatever the log holds is used, so either record may be made
first. A first-token share counts as a sink above twice what uniform attention gives; where the model without a gate
has none, no gate can be said to remove it.

Plan for one H100, beside the runs of `ch07_moe_gates`:

    | rows                                             | runs | seconds each | compile | seconds |
    |--------------------------------------------------|-----:|-------------:|--------:|--------:|
    | none, g1_elementwise, g1_headwise (three seeds)  |    9 |         made |         |       0 |
    | g2_elementwise                                   |    1 |         made |         |       0 |
    | g1_shared, g1_input_independent, g1_nonsparse    |    3 |           62 |  3 x 40 |     305 |
    | together                                         |   13 |              |         |     305 |
"""

from minigated import records
from minigated.device import choose_device
from minigated.errors import one_of
from minigated.experiments.gate_table import has_sink
from minigated.experiments.moe_gates import FILES as MOE_FILES
from minigated.experiments.moe_gates import make_rows, open_log, seeds_for, train_rows
from minigated.experiments.moe_table import judge, missing, singles, spent
from minigated.experiments.runlog import RunLog
from minigated.statistics import rank_correlation

NAMES = (
    *("none", "g1_elementwise", "g1_headwise", "g1_shared", "g2_elementwise", "g1_input_independent"),
    "g1_nonsparse",
)
OWN = "minigated/experiments/sparsity_sinks.py"
COLUMNS = ("gate_score", "m_act", "f_attn")
# claim, contender, rival, measure; the paper finds the contender lower. The record's verdict is the first one's.
CLAIMS = (
    ("in a mixture of experts G1 lowers the largest activations", "g1_elementwise", "none", "m_act"),
    ("one score a head lowers the largest activations", "g1_headwise", "none", "m_act"),
    ("a gate on the values lowers the largest activations", "g2_elementwise", "none", "m_act"),
    ("scores of its own for each head lower activations more than shared ones", "g1_elementwise", "g1_shared", "m_act"),
    ("scores from the input lower activations more than constants", "g1_elementwise", "g1_input_independent", "m_act"),
    ("sparse scores lower activations more than scores above one half", "g1_elementwise", "g1_nonsparse", "m_act"),
    ("in a mixture of experts G1 lowers the first-token share", "g1_elementwise", "none", "f_attn"),
    ("one score a head lowers the first-token share", "g1_headwise", "none", "f_attn"),
    ("a gate on the values leaves more of the sink than G1", "g1_elementwise", "g2_elementwise", "f_attn"),
    ("scores per channel are lower than scores per head", "g1_elementwise", "g1_headwise", "gate_score"),
    ("scores of its own for each head are lower than shared ones", "g1_elementwise", "g1_shared", "gate_score"),
    ("scores from the input are lower than constant ones", "g1_elementwise", "g1_input_independent", "gate_score"),
)


def by_layer(runs: list[dict]) -> dict[str, list]:
    """Means over seeds, one number a layer: first-token share, largest activation, gate score, sparsity at 1e-2.

    Sparsity is the share of |Y| under 1e-2 before the gate, after it, and with its mean score in its place.
    """

    def mean(lists):
        return [sum(values) / len(values) for values in zip(*lists, strict=True)]

    measures = [run["result"]["measures"] for run in runs]
    sparse = [m["sparsity"]["0.01"] for m in measures]
    return {
        "f_attn_by_layer": mean([m["first_token_share"] for m in measures]),
        "m_act_by_layer": mean([m["max_activation"]["ffn_residual"] for m in measures]),
        "gate_by_layer": mean([m["gate"]["mean"] for m in measures]) if measures[0]["gate"] else None,
        "sparsity_by_layer": {kind: mean([s[kind] for s in sparse]) for kind in ("before", "after", "after_average")},
    }


def table_4(rows: list[dict], runs: dict[str, list[dict]]) -> list[dict]:
    """Rows whose values are M-Act; loss and perplexity move into `extra`, the numbers by layer join them."""
    made = []
    for row in rows:
        extra = row["extra"] | {"test": row["mean"], "test_values": row["values"], "paper_perplexity": row["paper"]}
        extra |= by_layer(runs[row["name"]])
        made.append(records.row(row["name"], extra["m_act_values"], extra["paper_m_act"], **extra))
    return made


def orders(rows: list[dict]) -> dict[str, float]:
    """Spearman's correlation with the paper's order for each column of Table 4, over the rows that have both."""
    found = {}
    for column in COLUMNS:
        pairs = [(r["extra"][column], r["extra"][f"paper_{column}"]) for r in rows]
        pairs = [pair for pair in pairs if None not in pair]
        if len(pairs) > 2:
            found[column] = rank_correlation(*map(list, zip(*pairs)))
    return found


# ---------------------------------------------------------------------------------------------- the record
def describe(rows: list[dict], diverged: list[str]) -> str:
    """The note: what was not run or ran once, whether there is a sink, how the columns are ordered."""
    by = {row["name"]: row["extra"] for row in rows}
    sink = ""
    if "none" in by:
        times = by["none"]["f_attn"] / by["none"]["uniform"]
        kind = "a sink" if has_sink(by["none"]["f_attn"], by["none"]["uniform"]) else "no sink"
        sink = f"Without a gate the first token gets {times:.1f} times what uniform attention gives it: {kind}."
    order = ", ".join(f"{value:.2f} for {what}" for what, value in orders(rows).items())
    parts = (
        "The verdict is that of the first claim. Runs are those of ch07_moe_gates.",
        missing(NAMES, [*by, *diverged]),
        f"Diverged: {', '.join(diverged)}." if diverged else "",
        singles(rows),
        sink,
        f"Rank correlation with the paper's order: {order}." if order else "",
        "The paper's column is the M-Act of its MoE-15A2B.",
    )
    return " ".join(part for part in parts if part)


def build_record(log: RunLog, runs: dict, seeds: list[int], scale: str, corpus) -> dict | None:
    """Table 4 from the runs; None if every row diverged."""
    rows, diverged = make_rows(runs, log.settings)
    if not rows:
        return None
    rows = table_4(rows, runs)
    judged = judge(rows, CLAIMS)
    record = records.make(
        files=MOE_FILES,
        id="ch07_sparsity_sinks",
        chapter=7,
        claim="in a mixture of experts a gate on the attention output lowers the largest activations",
        command=f"python -m minigated run ch07_sparsity_sinks --scale {scale} --seeds {len(seeds)}",
        config={**log.settings, "rank_correlations": orders(rows), "claims": judged},
        seeds=seeds,
        metric={"name": "largest activation (M-Act)", "split": "test", "better": "lower"},
        rows=rows,
        verdict=next((j["verdict"] for j in judged if j["claim"] == CLAIMS[0][0]), None),
        data={"name": corpus.name, "sha256": corpus.sha256},
        seconds=sum(spent(found) for found in runs.values()),
        note=f"{describe(rows, diverged)} {log.provenance()}".strip(),
    )
    record = log.as_made(record)
    record["code"]["files"] = record["code"]["files"] | records.file_hashes([OWN])  # it chose and worked out the rows
    return record


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict | None:
    """Trains what the log of `ch07_moe_gates` lacks, goes on from what it holds, and writes the record.

    `resume` changes nothing: using the runs that are there is what this record is for.
    """
    for name in names or NAMES:
        one_of("row", name, NAMES)
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    log, corpus, folder = open_log(scale, text, out, resume=True)
    runs = train_rows(log, names or NAMES, seeds, corpus, chosen)
    record = build_record(log, runs, seeds_for("none", seeds), scale, corpus)
    if record is None:
        print("every row diverged; no record written")
        return None
    print(f"wrote {records.write(record, folder)}", flush=True)
    return record
