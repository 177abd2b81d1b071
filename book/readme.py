"""Keeps README.md true: its results, its chapter table and its picture are made from the records.

python book/readme.py          write them
python book/readme.py --check  exit 1 if they are not up to date
"""

import io
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from book import generated  # noqa: E402
from minigated import records  # noqa: E402
from minigated.bench.targets import TARGETS, reached  # noqa: E402
from minigated.errors import InputError  # noqa: E402
from minigated.plots import INK, style  # noqa: E402

PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _record(name: str) -> dict | None:
    try:
        return records.load(name)
    except InputError:
        return None


def _row(record: dict, name: str) -> dict:
    return next(row for row in record["rows"] if row["name"] == name)


def _seconds(*rows: dict) -> str:
    """How long a run of these rows took."""
    low, *more = sorted({f"{row['extra']['seconds']:.0f}" for row in rows}, key=float)
    return f"{low} to {more[-1]} s" if more else f"{low} s"


def _made(record: dict) -> str:
    return f"{record['hardware']['device']}, {record['utc'][:10]}, {records.seeds_in_words(record)}"


def cpu_result(record: dict) -> str:
    """The toy task: seconds on a CPU."""
    names = ("none", "elementwise", "headwise", "none, embeddings of 0.02")
    plain, elementwise, headwise, small = (_row(record, name) for name in names)
    return (
        f"- **On a CPU, {_seconds(plain)} a run:** in a toy task most tokens have nothing to ask. They give the first "
        f"token {plain['mean']:.0%} of their attention without a gate, {elementwise['mean']:.0%} with a gate that "
        f"scores each channel and {headwise['mean']:.0%} with one score for the head; spread evenly, it would be "
        f"{plain['extra']['uniform']:.0%}. Where training starts matters as much: smaller embeddings, without a gate, "
        f"give {small['mean']:.0%} ({_made(record)}). The picture shows the first three: mean and range of the seeds."
    )


def gpu_result(record: dict) -> str:
    """The gate table: a language model on books."""
    plain, gated = _row(record, "none"), _row(record, "g1_elementwise")
    without, with_ = plain["extra"], gated["extra"]
    return (
        f"- **On one GPU, {_seconds(plain, gated)} a run:** a language model of "
        f"{without['parameters'] / 1e6:.0f} M parameters reads books byte by byte. Its test loss, the mean negative "
        f"log-probability of the next byte, is {gated['mean']:.3f} with a gate on each channel of the attention "
        f"output and {plain['mean']:.3f} without; the largest numbers inside it, mean over layers, are "
        f"{with_['m_act']:.0f} with it and {without['m_act']:.0f} without. So small a model has hardly a sink: its "
        f"first token gets {without['f_attn']:.1%} of the attention, spread evenly it would be "
        f"{without['uniform']:.1%} ({_made(record)})."
    )


def image_result(record: dict) -> str:
    """Mixers at 64 pixels."""
    found = [_row(record, name) for name in ("SWAT", "RMT", "Swin attention", "Retention")]
    swat, rmt, swin, retention = (f"{row['mean']:.1f}%" for row in found)
    return (
        f"- **On one GPU, {_seconds(*found)} a run:** vision backbones of "
        f"{found[0]['extra']['parameters'] / 1e6:.0f} M parameters sort pictures of 64 x 64 pixels into 100 classes. "
        f"With sigmoid attention and a gate on its values (SWAT) {swat} are right, with RMT's attention {rmt}, with "
        f"Swin's {swin}, with gated retention {retention} ({_made(record)})."
    )


RESULTS = {"ch02_backcopy": cpu_result, "ch02_gate_table": gpu_result, "ch06_mini_imagenet": image_result}
BENCHES = ("lm", "moe", "generate", "vit")


def speed_result(benches: dict[str, dict]) -> str:
    """Chapter 9, whole models: where they are ahead and where behind, both sides in their fastest form."""
    found = {target.what: reached(target, benches) for target in TARGETS if target.suite in benches}
    share, qwen, experts, decoding, swin = (
        found[what][0]
        for what in (
            "350 M model, share of the matrix rate",
            "350 M model, times as fast as transformers Qwen3, compiled, recorded too",
            "64 experts, speed over that of a dense model with as many active operations, recorded too",
            "decoding 350 M, times as fast as transformers' compiled static cache",
            "backbone, 224 px, paper, times as fast as timm's Swin, recorded too",
        )
    )
    made = sorted({f"{bench['hardware']['device']}, {bench['utc'][:10]}" for bench in benches.values()})
    return (
        f"- **How fast, on one GPU:** training a language model of 350 M parameters runs at {share:.0%} of the rate of "
        f"large matrix products, {qwen:.2f} times as fast as transformers' Qwen3, and it writes a text {decoding:.1f} "
        f"times as fast as with transformers' compiled static cache. A smaller model with 64 experts trains at "
        f"{experts:.2f} of the speed of a dense one with as many active operations, a vision backbone of the paper's "
        f"size at {swin:.2f} of that of timm's Swin with as many parameters ({'; '.join(made)}; medians, each side in "
        "the fastest form that was measured)."
    )


def results(**_) -> str:
    """A line for each record of `RESULTS` and one for those of speeds; a missing one is said."""
    found = {name: _record(name) for name in RESULTS}
    lines = [RESULTS[name](record) if record else f"- `{name}`: not recorded yet." for name, record in found.items()]
    benches = {suite: _record(f"ch09_bench_{suite}") for suite in BENCHES}
    missing = [f"`ch09_bench_{suite}`" for suite, record in benches.items() if record is None]
    lines.append(f"- {', '.join(missing)}: not recorded yet." if missing else speed_result(benches))
    return "\n".join(lines)


def chapters(**_) -> str:
    """The site's chapter table, its links pointing into the repository."""
    return generated.chapter_table(ROOT / "chapters")


def filled(text: str) -> str:
    """README with its generated parts made anew."""
    make = {"results": results, "chapters": chapters}
    return PART.sub(lambda m: m[1] + make[m[2]]() + "\n" + m[4], text)


def picture() -> str:
    """Share on the first token over training, from the record of the toy task, as SVG."""
    record = records.load("ch02_backcopy")
    plt.rcParams["svg.hashsalt"] = "minigated"  # the same record gives the same file
    figure, axis = plt.subplots(figsize=(7.2, 2.9))
    for index, (name, label) in enumerate(
        (("none", "no gate"), ("elementwise", "gate, a score per channel"), ("headwise", "gate, a score per head"))
    ):
        histories = _row(record, name)["extra"]["histories"]
        steps = [entry["step"] for entry in histories[0]]
        runs = [[entry["share_other"] for entry in history] for history in histories]
        mean = [sum(values) / len(values) for values in zip(*runs, strict=True)]
        axis.plot(steps, mean, label=label, **style(index))
        axis.fill_between(
            steps, [min(v) for v in zip(*runs)], [max(v) for v in zip(*runs)], alpha=0.15, color=style(index)["color"]
        )
    axis.axhline(record["rows"][0]["extra"]["uniform"], color=INK, linestyle=":", label="uniform attention")
    axis.set(xlabel="training step", ylabel="attention on the first token", ylim=(0, 1))
    axis.legend(loc="upper left", fontsize=9)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()


def main(arguments: list[str]) -> int:
    """Writes README.md and its picture, or checks README.md."""
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    if "--check" in arguments:
        return 0 if filled(text) == text else 1
    (ROOT / "docs" / "assets" / "sink.svg").write_text(picture(), encoding="utf-8")
    page.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
