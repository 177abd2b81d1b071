"""Every variant of *Gated Attention for Large Language Models* by name, the paper's numbers beside it (chapter 2).

One table: `VARIANTS`. A variant says what to put into an attention layer or around it; `minigated.lm` builds it.
Numbers are those of Tables 1, 3, 4 and 6 (MoE-15A2B, 400B tokens) and of appendix A.6.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from minigated.attention import Attention, AttentionShape
from minigated.errors import InputError
from minigated.gates import GateSpec, HeadRMSNorm, HeadSiLU, SwitchProjection, build_gate

PAPER_SHAPE, PAPER_LAYERS = AttentionShape(width=2048, heads=32, kv_heads=4, head_width=128), 24
PAPER_EXPERT_WIDTH = 768


@dataclass(frozen=True)
class Paper:
    """What the paper prints for a row; None where it prints nothing.

    Attributes:
        rows: table and row. ppl: average perplexity. mmlu: accuracy, %. added_millions: the "+param" column.
        gate_score, m_act, f_attn: Table 4.
    """

    rows: str
    ppl: float | None = None
    mmlu: float | None = None
    added_millions: float | None = None
    gate_score: float | None = None
    m_act: float | None = None
    f_attn: float | None = None


@dataclass(frozen=True)
class Variant:
    """One row: what changes against the baseline.

    Attributes:
        name: as on the command line. summary: one line for readers. paper: the paper's numbers.
        gate: a gate in the sense of eq. (5).
        head_output: "rmsnorm" or "silu" at G1 instead of a gate.
        switch: (projections, experts, top_k) of SwitchHead.
        heads_factor, kv_heads_factor: the baselines with more heads.
        sandwich: RMSNorm on both branch outputs. clip: clamp both branch outputs to +-clip.
        experts_added: more experts, total and active; such a row needs a mixture-of-experts model.
        note: what could not be derived from the paper.
    """

    name: str
    summary: str
    paper: Paper
    gate: GateSpec | None = None
    head_output: str | None = None
    switch: tuple[tuple[str, ...], int, int] | None = None
    heads_factor: float = 1.0
    kv_heads_factor: int = 1
    sandwich: bool = False
    clip: float | None = None
    experts_added: int = 0
    note: str = ""

    @property
    def dense(self) -> bool:
        """Whether a dense model can show this row."""
        return not self.experts_added

    def shape(self, base: AttentionShape) -> AttentionShape:
        """The attention shape after the variant's change of head counts."""
        heads = base.heads * self.heads_factor
        if heads != int(heads):
            raise InputError(f"{self.name} needs {self.heads_factor} x {base.heads} query heads, not a whole number")
        if heads % (base.kv_heads * self.kv_heads_factor):
            raise InputError(
                f"variant {self.name!r} cannot be built on {base.heads} query and {base.kv_heads} key/value heads: "
                f"{heads:g} query heads cannot share {base.kv_heads * self.kv_heads_factor} key/value heads evenly"
            )
        return replace(base, heads=int(heads), kv_heads=base.kv_heads * self.kv_heads_factor)

    def attention(self, base: AttentionShape, shared_mean="score", head_norm="shared", **options) -> Attention:
        """Builds the attention layer of this variant.

        Args:
            base: shape of the baseline's layer.
            shared_mean: "score" or "logit", see `gates.SharedScores`.
            head_norm: "shared" or "per_head" weight of `gates.HeadRMSNorm`.
            **options: of `Attention` (qk_norm, qk_order, eps).
        """
        shape = self.shape(base)
        gates: dict[str, nn.Module] = {}
        if self.gate is not None:
            gates[self.gate.position] = build_gate(self.gate, shape, shared_mean)
        if self.head_output == "rmsnorm":
            gates["g1"] = HeadRMSNorm(shape.heads, shape.head_width, head_norm == "per_head", options.get("eps", 1e-6))
        elif self.head_output == "silu":
            gates["g1"] = HeadSiLU()
        names, experts, top_k = self.switch or ((), 0, 0)
        projections = {
            name: SwitchProjection(shape.width, shape.kv_heads, shape.head_width, experts, top_k) for name in names
        }
        return Attention(shape, gates=gates, projections=projections, **options)


_SWITCH_NOTE = "the sharing of experts under grouped heads is not stated; each key/value head has its own here"
_ROWS = [
    Variant("none", "softmax attention without a gate", Paper("T1 r1", 6.026, 58.79, 0, None, 1053, 0.467)),
    Variant(
        "kv_heads_doubled", "twice the key/value heads (k = 8)", Paper("T1 r2", 5.979, 59.78, 50), kv_heads_factor=2
    ),
    Variant("q_heads_half_more", "half more query heads (q = 48)", Paper("T1 r3", 5.953, 58.45, 201), heads_factor=1.5),
    Variant(
        "experts_added",
        "four more experts, total and active",
        Paper("T1 r4", 5.964, 58.84, 400),
        experts_added=4,
        note="by the stated sizes four experts of width 768 add 453 M, the paper prints 400",
    ),
    Variant(
        "g1_elementwise",
        "sigmoid gate on the attention output, a score per channel",
        Paper("T1 r5", 5.761, 60.82, 201, 0.116, 94, 0.048),
        GateSpec("g1"),
    ),
    Variant(
        "g2_elementwise",
        "sigmoid gate on the values",
        Paper("T1 r6", 5.820, 59.17, 25, 0.221, 125, 0.297),
        GateSpec("g2"),
    ),
    Variant("g3_elementwise", "sigmoid gate on the keys", Paper("T1 r7", 6.016, 59.18, 25), GateSpec("g3")),
    Variant("g4_elementwise", "sigmoid gate on the queries", Paper("T1 r8", 5.981, 58.74, 201), GateSpec("g4")),
    Variant("g5_elementwise", "sigmoid gate after W_O", Paper("T1 r9", 6.017, 59.41, 100), GateSpec("g5")),
    Variant(
        "g1_headwise",
        "sigmoid gate on the attention output, a score per head",
        Paper("T1 r10", 5.792, 60.05, 1.6, 0.172, 98, 0.073),
        GateSpec("g1", "headwise"),
    ),
    Variant(
        "g2_headwise",
        "sigmoid gate on the values, a score per head",
        Paper("T1 r11", 5.808, 59.32, 0.2),
        GateSpec("g2", "headwise"),
        note="Table 1 prints 0.2 M, Table 6 prints 3 M for the same row; 0.2 M follows",
    ),
    Variant(
        "g1_shared",
        "as g1_elementwise, scores averaged over heads",
        Paper("T1 r12", 5.801, 60.06, 201, 0.271, 286, 0.301),
        GateSpec("g1", "shared"),
    ),
    Variant(
        "g2_shared",
        "as g2_elementwise, scores averaged over heads",
        Paper("T1 r13", 5.867, 59.02, 25),
        GateSpec("g2", "shared"),
    ),
    Variant(
        "g1_additive_silu",
        "SiLU scores added to the attention output",
        Paper("T1 r14", 5.821, 60.06, 201),
        GateSpec("g1", form="add", activation="silu"),
    ),
    Variant(
        "g1_silu",
        "SiLU scores times the attention output",
        Paper("T1 r15", 5.822, 60.49, 201),
        GateSpec("g1", activation="silu"),
    ),
    Variant("g1_rmsnorm", "RMSNorm of each head's output", Paper("T3 r5", 5.847, 60.15), head_output="rmsnorm"),
    Variant(
        "g1_silu_output",
        "SiLU of the attention output, no parameters",
        Paper("T3 r6", 5.975, 59.55, 0),
        head_output="silu",
    ),
    Variant(
        "g1_additive_identity",
        "X W added to the attention output",
        Paper("T3 r7", 5.882, 59.20),
        GateSpec("g1", form="add", activation="identity"),
    ),
    Variant(
        "g1_input_independent",
        "a learned constant score per channel",
        Paper("T4 r6", 5.917, 59.02, None, 0.335, 471, 0.364),
        GateSpec("g1", "constant"),
    ),
    Variant(
        "g1_nonsparse",
        "scores forced into [0.5, 1]",
        Paper("T4 r7", 5.900, 60.05, None, 0.653, 892, 0.451),
        GateSpec("g1", activation="ns_sigmoid"),
    ),
    Variant(
        "switch_kv_8top8",
        "SwitchHead keys and values, 8 experts, all used",
        Paper("T6 r2", 5.847, 59.17, 38),
        switch=(("k_proj", "v_proj"), 8, 8),
        note=_SWITCH_NOTE,
    ),
    Variant(
        "switch_kv_4top4",
        "SwitchHead keys and values, 4 experts, all used",
        Paper("T6 r3", 5.935, 58.14, 13),
        switch=(("k_proj", "v_proj"), 4, 4),
        note=_SWITCH_NOTE,
    ),
    Variant(
        "switch_v_4top4",
        "SwitchHead values, 4 experts, all used",
        Paper("T6 r4", 5.820, 59.02, 13),
        switch=(("v_proj",), 4, 4),
        note=_SWITCH_NOTE,
    ),
    Variant(
        "switch_v_8top2",
        "SwitchHead values, 8 experts, 2 used",
        Paper("T6 r5", 5.870, 59.10, 25),
        switch=(("v_proj",), 8, 2),
        note=_SWITCH_NOTE,
    ),
    Variant(
        "sandwich_norm",
        "RMSNorm on what attention and feed-forward add to the stream",
        Paper("T2 r7"),
        sandwich=True,
        note="dense 48-layer row of Table 2: perplexity 7.407 at the doubled rate, where the baseline has 9.195",
    ),
    Variant(
        "clip_300",
        "attention and feed-forward outputs clamped to +-300",
        Paper("A.6"),
        clip=300.0,
        note="the paper: does not converge at the doubled rate",
    ),
    Variant(
        "clip_100",
        "attention and feed-forward outputs clamped to +-100",
        Paper("A.6"),
        clip=100.0,
        note="the paper: does not converge at the doubled rate",
    ),
]
VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}


def get_variant(name: str) -> Variant:
    """The variant of that name; `InputError` lists the names otherwise."""
    if name not in VARIANTS:
        raise InputError(f"unknown variant {name!r}; accepted: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def parameters(module: nn.Module) -> int:
    """Number of scalars, frozen or not, tied ones counted once."""
    return sum(p.numel() for p in module.parameters())


def added_parameters(variant: Variant, shape: AttentionShape = PAPER_SHAPE, layers: int = PAPER_LAYERS) -> int:
    """Parameters the variant adds to the baseline, counted on the meta device; experts have the paper's width."""
    with torch.device("meta"):
        gated, plain = variant.attention(shape), Attention(shape)
    around = 2 * shape.width if variant.sandwich else 0
    experts = variant.experts_added * shape.width * (3 * PAPER_EXPERT_WIDTH + 1)  # and a row of the router each
    return layers * (parameters(gated) - parameters(plain) + around + experts)
