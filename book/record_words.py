"""Words for the page of claims and verdicts: titles of records, names of rows, heads and digits of columns."""

from collections.abc import Callable
from dataclasses import dataclass

from minigated.records import number
from minigated.variants import VARIANTS

# Records that the book plans: title, and the claim that each is to settle. A record may exist without being listed.
PLANNED = {
    "ch01_attention_cost": (
        "What attention costs",
        "naive attention's memory grows with the square of the length, the fused form's does not",
    ),
    "ch02_backcopy": (
        "A head with nothing to say",
        "a head that has nothing to say looks at the first token, less so with a gate",
    ),
    "ch02_gate_table": ("Every place and form of a gate", "where a gate sits decides what it does"),
    "ch02_sink_lm": (
        "The sink in a language model",
        "a sigmoid gate on the attention output removes the attention sink",
    ),
    "ch03_decomposed_vs_full": (
        "Two passes or one softmax",
        "one softmax over the whole map is better than two passes along its axes",
    ),
    "ch04_window_size": ("How large a window", "shifted windows are better than windows that stay where they are"),
    "ch05_cifar10": (
        "Five mixers at 32 pixels",
        "at 32 pixels, where every stage is one window, SWAT is still better than RMT",
    ),
    "ch05_full_size": (
        "The paper's sizes at 32 pixels",
        "at full size and 32 pixels SWAT is still better than RMT",
    ),
    "ch05_stride_2": (
        "Five mixers at 32 pixels, a larger first map",
        "at 32 pixels with windows that act SWAT is better than RMT",
    ),
    "ch05_gate_ablation": (
        "Parts of the retention mixer",
        "Gated-SwinRMT-Retention is better with its gate than without",
    ),
    "ch06_mini_imagenet": (
        "Five mixers at 64 pixels",
        "where maps are larger than a window, SWAT is clearly better than RMT",
    ),
    "ch06_doubled_rate": (
        "Five mixers at 64 pixels, twice the rate",
        "at twice the rate a gated backbone is better than one without a gate",
    ),
    "ch06_swat_readings": ("Open readings of SWAT", "how much the open readings of the SWAT mixer matter"),
    "ch07_moe_gates": (
        "Gates in a mixture of experts",
        "in a mixture of experts a gate on the attention output is better than none",
    ),
    "ch07_learning_rate": ("Higher learning rates", "a gated model stands a rate that harms one without a gate"),
    "ch07_sparsity_sinks": (
        "Sinks in a mixture of experts",
        "in a mixture of experts a gate on the attention output lowers the largest activations",
    ),
    "ch07_late_gate": (
        "A gate that comes late",
        "a gate added in continued training does not bring what one from the start brings",
    ),
    "ch08_length": (
        "Beyond the trained length",
        "beyond the trained length, under YaRN, the gated model finds more",
    ),
    "ch09_bench_attention": (
        "Speed of attention",
        "fused attention does not write its scores, and a gate on its output costs little",
    ),
    "ch09_bench_retention": (
        "Speed of two passes over windows",
        "one fused kernel for both passes of a window is limited by copying alone",
    ),
    "ch09_bench_vit": (
        "Speed of vision backbones",
        "a gated retention backbone trains at least as fast as a compiled Swin with as many parameters",
    ),
    "ch09_bench_moe": (
        "Speed of experts",
        "grouped products bring experts near the speed of a dense layer of the same active operations",
    ),
    "ch09_bench_lm": (
        "Speed of language models",
        "a gate costs a training step a few percent at equal parameters",
    ),
    "ch09_bench_generate": ("Speed of decoding", "decoding one sequence is limited by reading the weights"),
}


# ---------------------------------------------------------------------------------------------- rows
NAMES = {name: variant.summary.replace("+-", "±") for name, variant in VARIANTS.items()} | {
    "none": "no gate",
    "g1_shared": "sigmoid gate on the attention output, scores averaged over heads",
    "g2_shared": "sigmoid gate on the values, scores averaged over heads",
    "elementwise": "gate with a score per channel",
    "headwise": "gate with a score for the head",
    "late, from one": "gate added late, every score one at first",
    "late, at random": "gate added late, random weights",
    "from the start": "gate from the start",
}
FORMS = {"naive": "naive", "blocks": "block by block", "sdpa": "fused (SDPA)"}
SETTINGS = {
    "none": "as trained, at T",
    "base": "larger rotary base",
    "interpolation": "interpolated positions",
    "yarn": "YaRN",
    "trained on": "trained on at 2 T",
    "trained on, yarn": "trained on at 2 T, then YaRN",
}


# ---------------------------------------------------------------------------------------------- columns
def short(value: float, digits: int = 3) -> str:
    """So many digits, without exponents: 0.0123, 1.20, 45.6, 123,000."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:#.{digits}g}"


def size(value: float) -> str:
    """Of activations: one decimal, none from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


@dataclass(frozen=True)
class Column:
    """A column of a record's table.

    Attributes:
        head: its heading; `{unit}` is what a speed record counts. words: what it is, for readers; "" needs none.
        form: number -> text, the same digits in every row.
        paper: heading of the paper's number beside it, which `extra` holds under "paper_" and the column's key.
        paper_form: of that number.
    """

    head: str
    words: str = ""
    form: Callable[[float], str] = short
    paper: str = ""
    paper_form: Callable[[float], str] = number


SHARE_WORDS = "mean attention weight on the first token"
F_ATTN = Column("F-Attn", SHARE_WORDS, "{:.4f}".format, "paper: F-Attn")
M_ACT = Column("M-Act", "largest number in the residual stream, mean over layers", size, "paper: M-Act", "{:,}".format)
SCORE = Column("gate score", "mean of the gate's scores, 0 closed and 1 open", "{:.3f}".format, "paper: gate score")
PERPLEXITY = Column("perplexity a byte", "e to the loss in nats", "{:.3f}".format)
TABLE_4 = {"f_attn": F_ATTN, "m_act": M_ACT, "gate_score": SCORE}
SPEED = {
    "per_second": Column("{unit} a second"),
    "against_first": Column("first = 1", "times as fast as the first row of its table", lambda n: f"{n:.2f}"),
    "flop_share": Column("of matrix rate", "share of the measured rate of matrix products", "{:.0%}".format),
    "byte_share": Column("of copy", "share of the measured copy bandwidth", "{:.0%}".format),
    "against_weights": Column("weights = 1", "a token after the first over reading the weights", "{:.2f}".format),
    "peak_mib": Column("peak, MiB", "memory of the call at its highest", "{:,.0f}".format),
    "ready_seconds": Column("ready, s", "to build, compile and check; less with a warm cache", "{:.0f}".format),
}
LEARNED = {
    "parameters": Column("parameters, M", form=lambda n: f"{n / 1e6:.2f}"),
    "images_per_second": Column("images/s", "in training"),
}
VISION = ("ch03_decomposed_vs_full", "ch04_window_size", "ch05_cifar10", "ch05_full_size", "ch05_gate_ablation")
# what a record's table shows beside the metric, by key of a row's `extra`
EXTRAS: dict[str, dict[str, Column]] = {
    "ch01_attention_cost": {"peak_mib": SPEED["peak_mib"]},
    "ch02_backcopy": {
        "share_trigger": Column("trigger queries", "the same, where the head has something to say", "{:.3f}".format),
        "value_ratio": Column("value at BOS / others", "norm of the first token's value to others'", "{:.2f}".format),
    },
    "ch02_gate_table": TABLE_4,
    "ch02_sink_lm": {"m_act": M_ACT, "gate_score": SCORE},
    "ch07_moe_gates": {
        "added_millions": Column("M added", "millions of parameters that the row adds", short, "paper: M added"),
        **TABLE_4,
    },
    "ch07_learning_rate": {
        "diverged": Column("diverged", "runs whose loss was no longer finite", "{:.0f}".format),
        "spikes": Column("spikes", "jumps of the training loss, mean a run", "{:.1f}".format),
        "m_act": M_ACT,
    },
    "ch07_sparsity_sinks": {"f_attn": F_ATTN, "gate_score": SCORE, "perplexity": PERPLEXITY},
    "ch07_late_gate": {
        "jump": Column("jump when added", "change of the validation loss at once, nats a byte", "{:+.3f}".format),
        **TABLE_4,
    },
    **{
        name: LEARNED
        for name in (*VISION, "ch05_stride_2", "ch06_mini_imagenet", "ch06_doubled_rate", "ch06_swat_readings")
    },
    **{f"ch09_bench_{suite}": SPEED for suite in ("attention", "retention", "vit", "moe", "lm", "generate")},
}
LOSS = "mean negative log-probability of the next byte (a guess has 5.545); e to it is the perplexity a byte"
PASSKEY = "of a number hidden in a long text, what the model gives back (a guess has 10); the paper's number is RULER"
# a record's own measure, by the name in its `metric`
METRICS = {
    "nats a byte": Column("nats a byte", LOSS, "{:.4f}".format, "paper: perplexity", "{:.3f}".format),
    "top-1 accuracy in %": Column(
        "accuracy, %", "test images whose class is named first", "{:.2f}".format, "paper: accuracy, %", "{:.2f}".format
    ),
    "first-token share": Column("F-Attn", SHARE_WORDS, "{:.4f}".format, "paper: F-Attn"),
    "largest activation (M-Act)": M_ACT,
    "attention weight on BOS, non-trigger queries": Column(
        "weight on BOS", "attention on the first token where the head has nothing to say", "{:.3f}".format
    ),
    "passkey digits right, %": Column("digits right, %", PASSKEY, "{:.1f}".format, "RULER", "{:.1f}".format),
    "milliseconds a call": Column("median, ms", "half of the calls are faster; quartiles beside it"),
}
# unit of a single claim's difference
MEASURES = {
    "loss": "nats a byte",
    "nats": "nats a byte",
    "f_attn": "F-Attn",
    "m_act": "M-Act",
    "gate_score": "gate score",
    "digits": "points",
    "accuracy": "points",
}
