"""What became of a suite's claim: the numbers that it is about, worked out from the suite's record of a GPU."""

from collections.abc import Callable, Iterable, Mapping

from minigated.bench.targets import Cases, Rows, by_case, shares

GATES, WAYS = ("headwise", "elementwise"), ("compiled", "compiled and recorded")


def span(values: Iterable[float], form: str = "{:.2f}") -> str:
    """ "0.39 to 0.40", or one number where the least and the largest look the same."""
    values = sorted(values)
    if not values:
        raise KeyError("no row to compare")
    low, high = form.format(values[0]), form.format(values[-1])
    return low if low == high else f"{low} to {high}"


def ratio(rows: Rows, one: str, other: str, others: Rows | None = None) -> float:
    """Time of one row over that of another, of the same case unless its rows are given."""
    return rows[one]["median_ms"] / (others or rows)[other]["median_ms"]


def attention(cases: Cases) -> str:
    """What a gate adds to the fused core and to the layer, recorded; not so where a record has no such rows."""
    try:
        return f"{_added(cases, WAYS[1:])}, each in one CUDA graph"
    except KeyError:
        return _added(cases, ("eager", "compiled"))


def _added(cases: Cases, ways: tuple[str, ...]) -> str:
    pairs = [(gate, way) for gate in GATES for way in ways]
    plain = cases["core, gate none, training"]
    core = [ratio(cases[f"core, gate {gate}, training"], f"SDPA, {way}", f"SDPA, {way}", plain) for gate, way in pairs]
    name = "minigated, gate {}, {}".format
    layer = [ratio(cases["layer, training"], name(gate, way), name("none", way)) for gate, way in pairs]
    core, layer = (span((value - 1 for value in values), "{:.0%}") for values in (core, layer))
    return f"a gate adds {core} to the fused core, {layer} to a layer"


def retention(cases: Cases) -> str:
    """The kernel against eager matrices, as one graph and not."""
    targets = [rows for case, rows in cases.items() if case.endswith("training") and "shifted" not in case]
    graph, eager = (
        [ratio(rows, "matmul, eager", f"kernel, {way}") for rows in targets] for way in ("recorded", "eager")
    )
    return f"{span(graph, '{:.0f}')} times in one CUDA graph, {span(eager, '{:.1f}')} without"


def retention_cpu(cases: Cases) -> str:
    """On a CPU, where no kernel of ours runs: the compiled pointwise form against eager matrices."""
    rows = (cases[f"retention window {window} training"] for window in (4, 8))
    found = [ratio(one, "matmul, eager", "pointwise, compiled") for one in rows]
    said = "compiled pointwise passes are {:.1f} times as fast as eager matrices at window 4 (aim 2), {:.1f} at 8 (1.8)"
    return said.format(*found)


def vit(cases: Cases) -> str:
    """Training beside Swin, compiled and as one graph too."""
    ours, training = "minigated retention, compiled and recorded", [cases[case] for case in cases if "training" in case]
    swin = [span(ratio(rows, f"timm Swin, equal parameters, {way}", ours) for rows in training) for way in WAYS]
    return f"{swin[0]} times as fast; {swin[1]} if Swin is one CUDA graph too"


def moe(cases: Cases) -> str:
    """Experts beside dense: models in both forms, the layer alone."""
    dense, ours = "minigated, dense, same active operations,", "minigated, experts,"
    models = [rows for case, rows in cases.items() if case.startswith("model")]
    plain, graph = (span(ratio(rows, f"{dense} {way}", f"{ours} {way}") for rows in models) for way in WAYS)
    layers = [rows for case, rows in cases.items() if case.startswith("layer")]
    pair = ("same operations, dense, {}", "minigated grouped, {}")
    recorded = all(name.format(WAYS[1]) in rows for rows in layers for name in pair)  # older records have none
    way, said = (WAYS[1], " in one CUDA graph") if recorded else (WAYS[0], "")
    layer = span(ratio(rows, *(name.format(way) for name in pair)) for rows in layers)
    return f"{graph} of it for models in one CUDA graph, {plain} without; {layer} for a layer alone{said}"


def lm(cases: Cases) -> str:
    """What a gate adds to a step at equal parameters, and how much of our compiled steps is products."""
    gates = [rows for case, rows in cases.items() if case.startswith("gates")]
    name = "minigated, gate {}, {}".format
    extra = [ratio(rows, name(gate, way), name("none", way)) - 1 for rows in gates for gate in GATES for way in WAYS]
    ours = [row for rows in cases.values() for row in rows.values() if row["contender"].startswith("minigated, gate")]
    products = [shares(row)["matrix products"] for row in ours if "compiled" in row["contender"] and row["profile"]]
    return f"a gate costs {span(extra, '{:+.1%}')}; matrix products are {span(products, '{:.0%}')} of compiled steps"


def generate(cases: Cases) -> str:
    """A token's time over the reading of the weights."""
    found = {case: rows["minigated, static cache, fused"]["against_weights"] for case, rows in cases.items()}
    said = (f"{value:.2f} at {case.removeprefix('decoding, ')}" for case, value in found.items())
    return f"a token's time over that of the reading: {', '.join(said)}"


OUTCOMES: dict[str, Callable[[Cases], str]] = {
    suite.__name__: suite for suite in (attention, retention, retention_cpu, vit, moe, lm, generate)
}


def outcome(record: Mapping) -> str:
    """In words, without a full stop; "" for a record that is none of `OUTCOMES`, or holds only some of its rows."""
    suite = OUTCOMES.get(record["id"].removeprefix("ch09_bench_"))
    try:
        return suite(by_case(record)) if suite else ""
    except KeyError:  # a peer was absent, or a time limit cut the suite short
        return ""
