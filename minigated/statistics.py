"""How a claim is judged; the rules were written down before the runs.

Seeds are paired: run s of a contender saw the same data in the same order as run s of the baseline. *Reproduced* needs
a mean difference of more than twice its standard error in the paper's direction; less is *direction only*; none, or the
other way, is *not at this scale*. An order of many rows is judged by rank correlation with a bootstrap interval.
"""

import math
import random


def ranks(values: list[float]) -> list[float]:
    """Rank of each value from 1; ties share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in range(start, end + 1):
            out[order[i]] = (start + end) / 2 + 1
        start = end + 1
    return out


def correlation(a: list[float], b: list[float]) -> float:
    """Pearson's correlation; nan if one side does not vary."""
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cross = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))
    return cross / size if size else math.nan


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's correlation: Pearson's on ranks."""
    return correlation(ranks(a), ranks(b))


def bootstrap_rank_correlation(
    values: list[list[float]], paper: list[float], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the rank correlation between row means and the paper's numbers.

    Rows are drawn with replacement, and so are the seeds (the same for all rows, as they are paired).

    Args:
        values: one list of per-seed values a row. paper: the paper's number a row.

    Returns:
        (low, high) of the central `level` of the draws.
    """
    generator = random.Random(seed)
    seeds, found = len(values[0]), []
    for _ in range(draws):
        rows = [generator.randrange(len(values)) for _ in values]
        runs = [generator.randrange(seeds) for _ in range(seeds)]
        means = [sum(values[r][s] for s in runs) / seeds for r in rows]
        rho = rank_correlation(means, [paper[r] for r in rows])
        if not math.isnan(rho):
            found.append(rho)
    found.sort()
    tail = (1 - level) / 2
    return found[int(tail * len(found))], found[min(len(found) - 1, int((1 - tail) * len(found)))]


def paired_difference(values: list[float], baseline: list[float]) -> tuple[float, float | None]:
    """Mean of value - baseline over seeds, and its standard error (None for a single pair)."""
    differences = [v - b for v, b in zip(values, baseline, strict=True)]
    mean = sum(differences) / len(differences)
    if len(differences) < 2:
        return mean, None
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def verdict(values: list[float], baseline: list[float], paper_sign: int) -> str:
    """The house rule for one claim.

    Args:
        values, baseline: paired per-seed values. paper_sign: -1 if the paper finds value < baseline, else +1.
    """
    mean, error = paired_difference(values, baseline)
    if mean * paper_sign <= 0:
        return "not at this scale"
    return "reproduced" if error is not None and abs(mean) > 2 * error else "direction only"
