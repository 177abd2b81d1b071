"""A suite's results in words: the table that the command prints, and the note of the record."""

from minigated.records import number

UNTIMED = ("wrong", "failed", "absent", "not run")


def ceilings_line(ceilings: dict[str, float]) -> str:
    """The machine's measured limits, one line."""
    tera, giga = 1e12, 1e9
    return (
        f"measured limits: matrix products {number(ceilings['bfloat16'] / tera, 3)} TFLOP/s in bfloat16, "
        f"{number(ceilings['float32'] / tera, 3)} in float32; copy {number(ceilings['copy'] / giga, 4)} GB/s"
    )


def speed(result: dict) -> str:
    """ "384,000 tokens/s", three digits."""
    rate = f"{result['items'] / result['median']:.3g}"
    return f"{rate if 'e' not in rate else f'{float(rate):,.0f}'} {result['unit']}/s"


def against(result: dict, first: dict) -> float:
    """How many times as fast as the first timed row of the case."""
    return result["items"] / result["median"] / (first["items"] / first["median"])


def weights(result: dict, ceilings: dict[str, float]) -> dict[str, float]:
    """Of decoding, a token after the first: milliseconds, those that reading the weights takes at copy bandwidth, and
    the first over the second. The prompt and the first token are left out.
    """
    if not result.get("weight_bytes"):
        return {}
    limit = result["weight_bytes"] / result["items"] / ceilings["copy"]
    token = (result["median"] - result["before_seconds"]) / (result["items"] - 1)
    return {"weights_ms": 1e3 * limit, "token_ms": 1e3 * token, "against_weights": token / limit}


def _beside_weights(result: dict, ceilings: dict[str, float]) -> str:
    found = weights(result, ceilings)
    if not found:
        return ""
    each, floor = number(found["token_ms"], 3), number(found["weights_ms"], 3)
    return f" ({each} ms a token after the first, {found['against_weights']:.2f}x the {floor} of reading the weights)"


def _cells(result: dict, first: dict | None, ceilings: dict[str, float]) -> list[str]:
    if not result["times"]:
        return [result["row"], result["state"], *[""] * 6, result["reason"] or ""]
    lower, upper = (1e3 * q for q in result["quartiles"])
    gone = lambda work, limit: f"{work / result['median'] / limit:.0%}" if work else "–"
    peak = "–" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.2f}"
    return [
        result["row"],
        f"{number(1e3 * result['median'])} ms",
        f"{number(lower, 3)}–{number(upper, 3)}",
        speed(result),
        f"{against(result, first):.2f}x",
        gone(result["flops"], ceilings[result["dtype"]]),
        gone(result["bytes"], ceilings["copy"]),
        peak,
        result["state"] + (f" ({result['error']:.0e})" if result["error"] is not None else ""),
    ]


HEADS = ["", "median", "quartiles", "speed", "first = 1", "of matrix rate", "of copy", "peak GiB", "output"]


def table(suite: str, results: list[dict], ceilings: dict[str, float]) -> str:
    """All rows by case, in columns of even width; rows that were not timed say why."""
    lines = [f"bench {suite}", ceilings_line(ceilings)]
    for case in dict.fromkeys(result["case"] for result in results):
        rows = [result for result in results if result["case"] == case]
        first = next((result for result in rows if result["times"]), None)
        limit = weights(first, ceilings) if first else {}
        if limit:
            case += f" (reading the weights: {number(limit['weights_ms'], 3)} ms a token)"
        cells = [HEADS] + [_cells(result, first, ceilings) for result in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEADS) - 1)]
        lines += ["", case]
        for row in cells:
            padded = [text.ljust(width) for text, width in zip(row, widths)]
            lines.append("  ".join([*padded, row[-1]]).rstrip())
    return "\n".join(lines)


def note(results: list[dict], ceilings: dict[str, float]) -> str:
    """What a reader of the record must know: limits, the fastest row of each case, and everything not timed."""
    limits = ceilings_line(ceilings)
    parts = [limits[0].upper() + limits[1:] + "."]
    for case in dict.fromkeys(result["case"] for result in results):
        timed = [result for result in results if result["case"] == case and result["times"]]
        if timed:
            best = max(timed, key=lambda result: result["items"] / result["median"])
            parts.append(f"{case}: fastest is {best['row']}, {speed(best)}{_beside_weights(best, ceilings)}.")
    for state in UNTIMED:
        found = [f"{r['case']}: {r['row']} ({r['reason']})" for r in results if r["state"] == state]
        if found:
            parts.append(f"{state.capitalize()}: {'; '.join(found)}.")
    return " ".join(parts)
