"""Rows and claims of `ch08_length`: what is compared, the paper's numbers beside it, the rule for a verdict."""

from minigated import records
from minigated.statistics import paired_difference, verdict

ARMS = ("none", "g1_elementwise")
TIMES = (1, 2, 4, 8)  # lengths over T, the length of the first training
SETTINGS = ("none", "base", "interpolation", "yarn", "trained on", "trained on, yarn")
# Table 5, RULER at 16k, 32k, 64k, 128k: 2 T stands for 32k, the length trained last; YaRN reaches four times that.
PAPER = {
    ("none", "trained on"): (83.15, 79.50, None, None),
    ("none", "trained on, yarn"): (61.23, 37.94, 37.51, 31.65),
    ("g1_elementwise", "trained on"): (84.61, 79.77, None, None),
    ("g1_elementwise", "trained on, yarn"): (76.74, 72.88, 66.60, 58.82),
}
LEARNED = 50.0  # percent of digits right at T; with less a model has not learned the task


def make_rows(runs: dict[str, list[dict]], short: int) -> list[dict]:
    """A row for each arm, setting and length from the arms' runs, one a seed: percent of digits right."""

    def mean(values):
        return sum(values) / len(values)

    rows = []
    for arm, found in runs.items():
        for setting in SETTINGS:
            looks = [run["result"]["settings"][setting] for run in found]
            for place, times in enumerate(TIMES):
                keys = [[k for k in one["passkey"] if k["length"] == short * times] for one in looks]
                nats, shares = ([one[what][place] for one in looks] for what in ("loss", "share"))
                row = records.row(
                    f"{arm}, {setting}, {times} T",
                    [100 * mean([k["digit"] for k in one]) for one in keys],
                    PAPER.get((arm, setting), (None,) * 4)[place],
                    arm=arm,
                    setting=setting,
                    length=short * times,
                    exact=100 * mean([k["exact"] for one in keys for k in one]),
                    depths={str(k["depth"]): mean([one[i]["digit"] for one in keys]) for i, k in enumerate(keys[0])},
                    nats=mean([n["nats"] for n in nats]),
                    nats_values=[n["nats"] for n in nats],
                    f_attn=mean([s["f_attn"] for s in shares]),
                    uniform=shares[0]["uniform"],
                    parameters=found[0]["result"]["parameters"],
                )
                rows.append(row)
    return rows


def per_seed(rows: list[dict], arm: str, setting: str, times: tuple[int, ...], nats: bool = False) -> list[float]:
    """Mean over lengths of digits right (or nats a byte), one number a seed."""
    names = [f"{arm}, {setting}, {n} T" for n in times]
    lists = [row["extra"]["nats_values"] if nats else row["values"] for row in rows if row["name"] in names]
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def judge(rows: list[dict]) -> list[dict]:
    """The paper's claims about Table 5, the one the record's verdict is on first. Written before any run.

    Each is judged by the house rule on pairs of seeds. Claims about passkeys need both arms to have learned the task
    at T (half of the digits right); "not at this scale" otherwise.
    """
    beyond, within, last = (4, 8), (1, 2), (2,)

    def gained(arm):  # by YaRN; below zero in the paper
        before, after = (per_seed(rows, arm, s, last) for s in ("trained on", "trained on, yarn"))
        return [a - b for b, a in zip(before, after)]

    plain, gated = ARMS
    yarn = "trained on, yarn"
    claims = (
        ("beyond the trained length, under YaRN, the gated model finds more", "digits", 1,
         lambda arm: per_seed(rows, arm, yarn, beyond)),
        ("at the trained length, the gated model loses fewer digits to YaRN", "digits", 1, gained),
        ("within the trained length the gated model is ahead", "digits", 1,
         lambda arm: per_seed(rows, arm, "trained on", within)),
        ("beyond the trained length, under YaRN, the gated model's loss is lower", "nats", -1,
         lambda arm: per_seed(rows, arm, yarn, beyond, nats=True)),
    )  # fmt: skip
    learned = all(sum(v) >= LEARNED * len(v) for v in (per_seed(rows, arm, "none", (1,)) for arm in ARMS))
    judged = []
    for claim, what, sign, values in claims:
        difference, error = paired_difference(values(gated), values(plain))
        found = verdict(values(gated), values(plain), sign) if learned or what == "nats" else "not at this scale"
        judged.append(
            {"claim": claim, "measure": what, "difference": difference, "standard_error": error, "verdict": found}
        )
    return judged
