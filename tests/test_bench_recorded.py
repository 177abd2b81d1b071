"""What a GPU is to run, planned on any machine: which rows are recorded, and that the recording is what is checked."""

import importlib
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from minigated.bench import lm_rows, suite_attention, suite_moe, suite_vit
from minigated.bench.peers import moe_block
from minigated.bench.rows import TOLERANCE, difference

CPU = torch.device("cpu")
EAGER, COMPILED, RECORDED, BOTH = lm_rows.EAGER, lm_rows.COMPILED, lm_rows.RECORDED, lm_rows.BOTH
ALL = (EAGER, COMPILED, BOTH)
GPU_WAYS = {  # suite -> (beginning of cases, contender, all its ways)
    "vit": [
        ("", "minigated retention", (EAGER, RECORDED, COMPILED, BOTH)),
        ("", "minigated swat", (EAGER, RECORDED, COMPILED, BOTH)),
        ("", "timm Swin, equal parameters", ALL),
    ],
    "attention": [
        ("core", "matrices", (EAGER, COMPILED)),
        ("core", "SDPA", ALL),
        *(("layer", f"minigated, gate {gate}", ALL) for gate in ("none", "headwise", "elementwise")),
        ("layer", "SDPA layer", ALL),
        ("layer", "nn.MultiheadAttention", (EAGER, COMPILED)),
    ],
    "moe": [
        ("layer", "minigated loop", (EAGER,)),
        ("layer", "minigated grouped", ALL),
        ("layer", "transformers Qwen3-MoE, experts grouped_mm", ALL),
        ("layer", "same operations, dense", ALL),
        ("model", "transformers Qwen3-MoE (grouped_mm)", (EAGER, COMPILED)),
    ],
}


@pytest.mark.parametrize("suite", GPU_WAYS)
def test_on_a_gpu_contenders_run_in_these_ways(suite):
    module = importlib.import_module(f"minigated.bench.suite_{suite}")
    cases = module.cases("gpu", torch.device("cuda"))
    for start, contender, ways in GPU_WAYS[suite]:
        found = [case for case in cases if case.name.startswith(start)]
        assert found
        for case in found:
            rows = [row.name.rpartition(", ") for row in case.rows]
            assert sorted(way for name, _, way in rows if name == contender) == sorted(ways), (case.name, contender)
    names = [row.name for case in module.cases("cpu", CPU) for row in case.rows]
    assert names and not any(way in name for way in (COMPILED, RECORDED) for name in names)


# ---------------------------------------------------------------------------------------------- recordings
@pytest.fixture
def replayed(monkeypatch):
    """A recording is the step itself on a processor; every one that is called is listed."""
    calls = []

    class Played:
        def __init__(self, step, device):
            self.step = step

        def __call__(self):
            calls.append(self.step)
            return self.step()

    for module in (suite_attention, suite_moe, suite_vit):
        monkeypatch.setattr(module, "Later", Played)
    monkeypatch.setattr(suite_vit, "recorded", Played)
    return calls


ATTENTION, EXPERTS = (2, 16, 2, 8), (32, 16, 8, 4, 2)
LAYERS = {"none": lambda: suite_attention.peer_layer("plain", 16, 2, 16)}
LAYERS |= {"elementwise": lambda: suite_attention.our_layer("elementwise", 16, 2)}


def attention_layer(gate, way):
    return suite_attention.prepare_layer(LAYERS[gate], gate, way, ATTENTION, CPU, torch.float32)


PREPARED = {  # what is recorded on a GPU, small
    "core": lambda way: suite_attention.prepare_core(
        suite_attention.sdpa_core, way, ATTENTION, "headwise", CPU, torch.float32
    ),
    "plain layer": lambda way: attention_layer("none", way),
    "gated layer": lambda way: attention_layer("elementwise", way),
    "experts": lambda way: suite_moe.prepare_layer("ours", "grouped", way, EXPERTS, CPU, torch.float32),
    "dense": lambda way: suite_moe.prepare_layer("dense", "dense", way, EXPERTS, CPU, torch.float32),
}


@pytest.mark.parametrize("what", PREPARED)
@pytest.mark.parametrize("way", ALL)
def test_the_recording_of_the_compiled_call_is_what_is_checked_and_timed(what, way, replayed, monkeypatch):
    compiled, ran = [], []
    noted = lambda run: lambda *given: ran.append(run) or run(*given)
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or noted(run))
    row = PREPARED[what](way)
    assert (row.check is None) == (what == "dense") and row.counted == (way != BOTH)
    if row.check is not None:
        assert difference(*row.check()) < TOLERANCE[torch.float32]
    assert all(torch.is_tensor(x) for x in row.step())
    calls = 1 + (row.check is not None)
    assert len(replayed) == (calls if way == BOTH else 0)
    assert (len(compiled), len(ran)) == ((0, 0) if way == EAGER else (1, calls))
    assert (row.facts["compiled"], row.facts["recorded"]) == (way != EAGER, way == BOTH)


@pytest.mark.parametrize("kind", ["ours", "transformers", "loop"])
def test_recorded_experts_read_nothing_back(kind, transformers):
    """Tensors without values have none to read, so what a host must know raises. In bfloat16, as recorded."""
    layer = suite_moe.our_layer(EXPERTS, "loop" if kind == "loop" else "grouped").bfloat16()
    layer = moe_block(layer, "grouped_mm") if kind == "transformers" else layer
    mode = FakeTensorMode()
    weights = {name: mode.from_tensor(weight) for name, weight in layer.named_parameters()}
    x = mode.from_tensor(torch.randn(1, 32, 16).bfloat16().requires_grad_())
    run = partial(torch.func.functional_call, layer, weights, (x,))
    with mode:
        if kind == "loop":  # a form that does read
            with pytest.raises(DynamicOutputShapeException):
                run()
            return
        y = run()
        gradients = torch.autograd.grad(y, [x, *weights.values()], torch.ones_like(y))
    assert [g.shape for g in gradients] == [t.shape for t in (x, *weights.values())]


@pytest.mark.parametrize("training", [True, False])
def test_a_recorded_backbone_is_made_of_the_graphs_of_the_compiled_one(training, replayed, monkeypatch):
    graphs, real = [], suite_vit.compile_parts
    backend = lambda graph, _: graphs.append(graph) or graph.forward
    monkeypatch.setattr(suite_vit, "compile_parts", lambda model: real(model, backend))
    sizes = ("nano", 32, 4, 4, 2, 2)
    make = {row.name: row.prepare for row in suite_vit.our_rows("", sizes, training, torch.device("cuda"))}
    made = []
    torch._dynamo.reset()
    for way in (COMPILED, BOTH):
        row = make[f"minigated retention, {way}"]
        row = row.func(*row.args[:4], 32, CPU, *row.args[6:])
        assert difference(*row.check()) < TOLERANCE[torch.float32] and row.counted == (way == COMPILED)
        row.step()
        made.append(len(graphs))
    assert made[0] == made[1] > 0 and len(replayed) == 2


# ---------------------------------------------------------------------------------------------- peers with experts
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_compiled_peer_with_experts_is_checked_as_it_is_timed(factor, monkeypatch, transformers):
    """With one compilation, on all sequences; a compiler that changes the loss is seen."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or (lambda: factor * run()))
    config = suite_moe.CPU_MODEL
    rows = {way: lm_rows.prepare_peer("qwen3_moe", config, way, 2, 16, CPU, "grouped_mm") for way in (EAGER, COMPILED)}
    off = {way: difference(*row.check()) for way, row in rows.items()}
    assert off[EAGER] < TOLERANCE[torch.float32] and (off[COMPILED] < TOLERANCE[torch.float32]) == (factor == 1.0)
    assert len(compiled) == 1
    assert rows[EAGER].facts["checked"] == "eager, float32, one sequence"
    assert rows[COMPILED].facts["checked"] == "eager, float32, one sequence; as timed: compiled beside eager"
