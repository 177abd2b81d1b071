"""Records as the page of claims and verdicts."""

from pathlib import Path

from minigated import records

# Records that the book plans, with the claim that each is to settle. A record may exist without being listed.
PLANNED = {
    "ch01_attention_cost": "naive attention's memory grows with the square of the length, the fused form's does not",
    "ch02_backcopy": "a head that has nothing to say looks at the first token, less so with a gate",
    "ch02_gate_table": "where a gate sits decides what it does",
    "ch02_sink_lm": "a sigmoid gate on the attention output removes the attention sink",
    "ch07_moe_gates": "in a mixture of experts a gate on the attention output is better than none",
    "ch07_learning_rate": "a gated model stands a rate that harms one without a gate",
    "ch07_sparsity_sinks": "in a mixture of experts a gate on the attention output removes the massive activations",
    "ch07_late_gate": "a gate added in continued training does not bring what one from the start brings",
    "ch09_bench_attention": "fused attention does not write its scores, and a gate on its output costs little",
    "ch09_bench_retention": "one fused kernel for both passes of a window is limited by copying alone",
    "ch09_bench_vit": "a gated retention backbone trains at least as fast as a compiled Swin with as many parameters",
    "ch09_bench_moe": "grouped products bring experts near the speed of a dense layer of the same active operations",
    "ch09_bench_lm": "a gate costs a training step a few percent at equal parameters",
    "ch09_bench_generate": "decoding one sequence is limited by reading the weights",
}
SHARES = {
    "f_attn": "F-Attn",
    "paper_f_attn": "paper",
    "m_act": "M-Act",
    "paper_m_act": "paper",
}
SCORES = {"gate_score": "gate score", "paper_gate_score": "paper"}
SPEED = {
    "median_ms": "median, ms",
    "per_second": "items a second",
    "against_first": "first = 1",
    "flop_share": "share of matrix rate",
    "byte_share": "share of copy",
    "peak_mib": "peak memory, MiB",
}
# what a record's table shows beside the metric
EXTRAS = {
    "ch01_attention_cost": {"peak_mib": "peak memory, MiB"},
    "ch02_backcopy": {"share_trigger": "trigger queries", "value_ratio": "value at BOS / others"},
    "ch02_gate_table": {**SHARES, **SCORES},
    "ch02_sink_lm": {"m_act": "M-Act", "paper_m_act": "paper", **SCORES},
    "ch07_moe_gates": {"added_millions": "M added", "paper_added_millions": "paper", **SHARES, **SCORES},
    "ch07_learning_rate": {"diverged": "diverged", "spikes": "spikes", "m_act": "M-Act"},
    "ch07_sparsity_sinks": {"f_attn": "F-Attn", "paper_f_attn": "paper", **SCORES, "perplexity": "perplexity a byte"},
    "ch07_late_gate": {"jump": "jump when added", "f_attn": "F-Attn", "m_act": "M-Act", "gate_score": "gate score"},
    **{f"ch09_bench_{suite}": SPEED for suite in ("attention", "retention", "vit", "moe", "lm", "generate")},
}
# heading of the paper's column where "paper" says too little
PAPER = {name: "paper: perplexity" for name in ("ch02_gate_table", "ch07_moe_gates", "ch07_learning_rate")}
PAPER["ch07_sparsity_sinks"] = "paper: M-Act"
MEASURES = {"loss": "nats a byte", "f_attn": "F-Attn", "m_act": "M-Act", "gate_score": "gate score"}
WIDEST = 6  # more values a row than this are left to the file


def known(results: Path) -> dict[str, dict | None]:
    """Planned and existing records by id; None where there is no file yet."""
    there = {record["id"]: record for record in records.all_records(results)}
    return {name: there.pop(name, None) for name in PLANNED} | there


def verdicts(results: Path, **_) -> str:
    """Claim, difference and verdict, one row each, linked to the record; a record may judge several claims."""
    lines = ["| Claim | Difference | Verdict |", "|---|---|---|"]
    for name, record in known(results).items():
        if record is None:
            lines.append(f"| {cell(PLANNED[name])} | | [no record yet](#{name}) |")
            continue
        verdict = record["verdict"] or "measured, nothing to judge"
        lines.append(f"| **{cell(record['claim'])}** | | [{verdict}](#{name}) |")
        for claim in record["config"].get("claims", ()):
            error = claim["standard_error"]
            spread = " (single pair)" if error is None else f" ± {error:.1g}"
            difference = f"{claim['difference']:+.2g}{spread} {MEASURES.get(claim['measure'], claim['measure'])}"
            lines.append(f"| {cell(claim['claim'])} | {difference} | [{claim['verdict']}](#{name}) |")
    return "\n".join(lines)


def sections(results: Path, **_) -> str:
    """Every record with its table, caption and command; for a missing one the command that makes it."""
    return "\n\n".join(section(name, record) for name, record in known(results).items())


def section(name: str, record: dict | None) -> str:
    head = f"### {name} {{ #{name} }}"
    if record is None:
        return f"{head}\n\nNo record yet; the command that makes it is `python -m minigated run {name}`."
    extras = {k: v for k, v in EXTRAS.get(name, {}).items() if any(row["extra"].get(k) for row in record["rows"])}
    table = records.table(record, extras, paper=PAPER.get(name, "paper"))
    parts = [head, sentence(record["claim"]), table, f"*{sentence(records.caption(record))}*"]
    uniform = {row["extra"].get("uniform") for row in record["rows"]} - {None}
    if len(uniform) == 1:
        parts.append(f"Uniform attention would give the first token {records.number(uniform.pop())}.")
    parts += [sentence(record["note"])] if record["note"] else []
    count = max(len(row["values"]) for row in record["rows"])
    if 1 < count <= WIDEST:
        parts.append(every_value(record, count))
    parts.append(
        f"Made by `{record['command']}` in {record['seconds']:,.0f} s. [The record itself](results/{name}.json) holds "
        f"every value, the whole configuration, versions, and the hashes of the files that made it."
    )
    return "\n\n".join(parts)


def every_value(record: dict, count: int) -> str:
    """A folded table with a column for each seed."""
    heads = "| | " + " | ".join(f"value {i + 1}" for i in range(count)) + " |"
    rows = [heads, "|---" * (count + 1) + "|"]
    for row in record["rows"]:
        values = [records.number(value) for value in row["values"]] + ["–"] * (count - len(row["values"]))
        rows.append(f"| {row['name']} | " + " | ".join(values) + " |")
    title = f"{record['metric']['name']}, every value"
    return f'<details markdown="1"><summary>{title}</summary>\n\n' + "\n".join(rows) + "\n\n</details>"


def sentence(text: str) -> str:
    """With a capital at the start and a full stop at the end."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def cell(text: str) -> str:
    """Text on one line, its bars escaped."""
    return " ".join(text.replace("|", r"\|").split())
