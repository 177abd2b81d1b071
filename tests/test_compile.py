"""Every model compiles as one graph, in training and in evaluation, and a run compiles once.

Dynamo finds what would break a graph, so most tests stop before code is generated: "aot_eager" traces forward and
backward, "eager" the forward alone. Inductor, which generates the code, takes one model of each kind.

A mixture of experts is compiled as it is trained on a GPU, in bfloat16: its grouped form has no compiled float32. There
a training step runs its experts outside the graph, the one known break, which two tests keep in view.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from minigated import device
from minigated.compiled_parts import compile_parts
from minigated.data.images import ImageBatches, ImageSplit
from minigated.errors import InputError
from minigated.lm import SIZES as LM_SIZES
from minigated.lm import TrainingLoss, build_lm, lm_loss
from minigated.train import TrainConfig, Trainer
from minigated.variants import VARIANTS
from minigated.vit_sizes import SIZES as VISION_SIZES
from minigated.vit_sizes import build_vit

FAMILIES = ["swin_nano", "rmt_nano", "gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano"]
CODED = [name for name in FAMILIES if name != "rmt_nano"]  # with their backward pass; rmt_nano's passes are the third's
# One variant of each kind; the block of every one compiles in test_variants.py.
CHOSEN = [
    *("none", "g1_elementwise", "g2_elementwise", "g3_elementwise", "g4_elementwise", "g5_elementwise", "g1_headwise"),
    *("g1_shared", "g1_rmsnorm", "switch_v_8top2", "sandwich_norm", "clip_100", "experts_added"),
]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def nothing_compiled():
    device.reset_compilation()
    counters.clear()
    torch.manual_seed(0)


def image_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def pictures(count: int = 2, side: int = 32):
    return torch.randn(count, 3, side, side), torch.arange(count) % 3


def windows(count: int = 2, length: int = 12):
    return torch.randint(256, (count, length + 1))


def waitless(backend: str):
    """`backend`, which refuses `.item()`: with `fullgraph=True` torch takes it into the graph, and the host waits."""
    compile_graph = torch._dynamo.lookup_backend(backend)

    def compile_waitless(graph, inputs):
        assert not [node for node in graph.graph.nodes if node.target == "item"], "a value is brought to the host"
        return compile_graph(graph, inputs)

    return compile_waitless


def whole_in_both_modes(model, loss, batch, backend: str = "aot_eager", bf16: bool = False) -> list:
    """Loss of a training step with its gradients, and of evaluation, each one graph or an exception."""

    def run(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return loss(model, batch)

    compiled = torch.compile(run, backend=waitless(backend), fullgraph=True, dynamic=False)
    model.train()
    trained = compiled(batch)
    trained.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        return [trained.detach(), compiled(batch)]


def forward_in_both_modes(model, batch, shape: tuple[int, ...], accepted: float | None = None) -> None:
    """One graph in training, with gradients asked for, and one in evaluation, without.

    Args:
        accepted: differences as a share of the largest number; torch's own for a dtype unless given.
    """
    step = torch.compile(model, backend=waitless("eager"), fullgraph=True, dynamic=False)
    assert step(batch).shape == shape
    model.eval()
    with torch.no_grad():
        right = model(batch)
        rough = {"rtol": 0.0, "atol": accepted * right.abs().max().item()} if accepted else {}
        torch.testing.assert_close(step(batch), right, **rough)
    assert graphs() == 2 and not counters["graph_break"]


# ---------------------------------------------------------------------------------------------- vision
@pytest.mark.parametrize("name", CODED)
def test_a_backbone_is_one_graph_in_training_and_in_evaluation(name):
    whole_in_both_modes(build_vit(name, classes=3, depths=(2, 1, 1, 1), drop_path=0.1), image_loss, pictures())
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_of_another_size_are_one_graph_too(name):
    """Tables for the model's own image size are kept; for another the graph makes them."""
    model, images = build_vit(name, depths=(2, 1, 1, 1)).eval(), pictures(2, 64)[0]
    step = torch.compile(model, backend=waitless("eager"), fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(step(images), model(images))


@pytest.mark.parametrize("name", [name for name in VISION_SIZES if name not in CODED])
def test_every_other_backbone_is_one_graph_in_both_modes(name):
    """One block a stage, two in the first and so a shift where there is one."""
    model, images = build_vit(name, depths=(2, 1, 1, 1), image_size=32), pictures()[0]
    forward_in_both_modes(model, images, (2, model.config.classes))


# ---------------------------------------------------------------------------------------------- language
@pytest.mark.parametrize("variant", CHOSEN)
def test_a_language_model_is_one_graph_in_training_and_in_evaluation(variant):
    dense = VARIANTS[variant].dense
    model = build_lm("lm_nano" if dense else "moe_nano", variant=variant, layers=1)
    whole_in_both_modes(model, TrainingLoss(), windows(), bf16=not dense)
    assert graphs() == 2 and not counters["graph_break"]


@pytest.mark.parametrize("name", LM_SIZES)
def test_every_size_of_language_model_is_one_graph_in_both_modes(name):
    few = {"experts": 16, "ffn_width": 32} if LM_SIZES[name].experts else {}
    accepted = 0.01 if few else None  # eight experts a token are added up in two steps, and rounded twice here
    forward_in_both_modes(build_lm(name, layers=1, vocabulary=300, **few).bfloat16(), windows(), (2, 13, 300), accepted)


@pytest.mark.parametrize("tokens", [12, 2])  # 26 rows: more assignments than experts; 6 rows: fewer
def test_a_mixture_in_float32_is_one_graph_where_no_gradient_is_asked_for(tokens):
    model, batch = build_lm("moe_nano", layers=1).eval(), windows(2, tokens)
    step = torch.compile(model, backend=waitless("eager"), fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(step(batch), model(batch))
    assert graphs() == 1


def test_a_float32_training_step_of_a_mixture_is_the_one_known_break():
    model, batch = build_lm("moe_nano", layers=1), windows()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        whole_in_both_modes(model, lm_loss, batch)


# ---------------------------------------------------------------------------------------------- with code generated
def language_block(name: str, variant: str, dtype=torch.float32):
    model = build_lm(name, variant=variant, layers=1).to(dtype)
    rotary = model.rotary(0, 12)
    return model.blocks[0], lambda x: (x, rotary), torch.randn(2, 12, 128, dtype=dtype)


def vision_block(name: str):
    stage = build_vit(name, depths=(1, 1, 1, 1)).stages[1]
    tables = stage.tables[0](4, 4)
    return stage.blocks[0], lambda x: (x, tables), torch.randn(2, 4, 4, 64)


KINDS = {  # kind -> block, gradients or not: a backbone's backward pass costs the C++ compiler a quarter of a minute
    "backbone": (partial(vision_block, "gated_swinrmt_retention_nano"), False),
    "dense": (partial(language_block, "lm_nano", "g1_elementwise"), True),
    "mixture": (partial(language_block, "moe_nano", "g1_headwise", torch.bfloat16), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_generated_code_gives_the_eager_numbers(kind):
    build, gradients = KINDS[kind]
    block, arguments, x = build()
    step = torch.compile(lambda x: block(*arguments(x)), fullgraph=True, dynamic=False)
    off = {"rtol": 5e-2, "atol": 5e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.set_grad_enabled(gradients):
        out, expected = step(x), block(*arguments(x))
    torch.testing.assert_close(out, expected, **off)
    if gradients:
        found = [torch.autograd.grad(y.square().sum(), block.ffn_norm.weight)[0] for y in (out, expected)]
        torch.testing.assert_close(*found, **off | {"atol": off["atol"] * found[1].abs().max().item()})
    assert graphs() == 1


# ---------------------------------------------------------------------------------------------- planted breaks
def looks(module, arguments, output):
    """What a statistic left behind in a model does: it brings a value back to Python."""
    if output.float().mean().item() > 1e9:
        raise ValueError("too large")


def scales(module, arguments, output):
    """The same, but nothing hangs on the value."""
    return output * (1 + 0 * output.float().mean().item())


MODELS = {
    "backbone": (lambda: build_vit(FAMILIES[2], classes=3, depths=(2, 1, 1, 1)), image_loss, pictures),
    "dense": (lambda: build_lm("lm_nano", layers=1), lm_loss, windows),
}


@pytest.mark.parametrize("hook", [looks, scales])
@pytest.mark.parametrize("kind", MODELS)
def test_a_planted_break_is_seen(kind, hook):
    build, loss, make = MODELS[kind]
    model = build()
    model.blocks[0].ffn.register_forward_hook(hook)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        whole_in_both_modes(model, loss, make())


# ---------------------------------------------------------------------------------------------- once a run
def trained(model, loss, batch_at, compile, monkeypatch, evaluate=None, **settings) -> list[int]:
    """Trains with the trainer's own way to compile; graphs there are after each step."""
    monkeypatch.setattr(device, "compiled", partial(device.compiled, backend="aot_eager"))
    counted = []

    def counting(step, rank, world):
        counted.append(graphs())  # before step `step`, whose batch this is
        return batch_at(step, rank, world)

    config = TrainConfig(
        steps=9, warmup=1, device="cpu", progress=False, compile=compile, eval_every=3, unit="images", **settings
    )
    Trainer(model, loss, counting, config, evaluate).run()
    return [*counted[1:], graphs()]


def split(count: int) -> ImageSplit:
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
    return ImageSplit(pixels, torch.arange(count) % 3)


def scaled(pixels):
    return pixels.permute(0, 3, 1, 2).float() / 255  # [B, 3, h, w]


def normalised(loss):
    return lambda model, batch: loss(model, (scaled(batch[0]), batch[1]))


@pytest.mark.parametrize("compile", ["whole", "blocks"])
def test_a_backbones_run_compiles_in_its_first_step_and_never_again(compile, monkeypatch):
    """Ten images in batches of four: two and a half batches an epoch, three and a half epochs.

    No batch is smaller than the others, as epochs follow each other without a seam. Validation has a smaller last
    batch, and runs uncompiled.
    """
    images = split(10)
    model = build_vit("gated_swinrmt_retention_nano", classes=3, depths=(2, 1, 1, 1), drop_path=0.2)

    def evaluate(model) -> dict[str, float]:
        assert not model.training
        sizes = [len(model(scaled(batch))) for batch, _ in ImageBatches(images, 4).sequential()]
        assert sizes == [4, 4, 2]
        return {"rows": float(sum(sizes))}

    counts = trained(model, normalised(image_loss), ImageBatches(images, 4).at, compile, monkeypatch, evaluate)
    assert counts[0] >= 1 and set(counts) == {counts[0]}, counts
    assert len(counts) == 9 and not counters["graph_break"]


@pytest.mark.parametrize("compile", ["whole", "blocks"])
def test_a_language_models_run_compiles_once(compile, monkeypatch):
    model = build_lm("lm_nano", variant="g1_elementwise", layers=2)

    def evaluate(model):
        return {"validation": sum(lm_loss(model, windows(rows)).item() for rows in (4, 1))}

    counts = trained(model, lm_loss, lambda *_: windows(4), compile, monkeypatch, evaluate)
    assert set(counts) == {1} and not counters["graph_break"]  # both blocks share one


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_mixtures_run_compiles_in_its_first_step(precision, monkeypatch):
    """Also in float32, where experts run beside the graph: how full they are changes with every batch."""
    model = build_lm("moe_nano", layers=2)
    counts = trained(model, TrainingLoss(), lambda *_: windows(4), "blocks", monkeypatch, precision=precision)
    assert len(set(counts)) == 1, counts
    assert bool(counters["graph_break"]) == (precision == "float32")


def test_a_smaller_batch_would_be_counted(monkeypatch):
    """The count sees what the seamless epochs avoid."""
    model = build_lm("lm_nano", layers=1)
    sizes = lambda step, *_: windows(3 if step == 7 else 4)
    assert trained(model, lm_loss, sizes, "blocks", monkeypatch) == [1] * 7 + [2] * 2


def test_evaluation_of_a_compiled_model_adds_one_graph_however_often():
    model = build_lm("lm_nano", layers=1)
    step, counts = torch.compile(model, backend="aot_eager", dynamic=False), []
    for _ in range(3):
        step.train()(windows()).sum().backward()
        with torch.no_grad():
            step.eval()(windows())
        counts.append(graphs())
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("name", ["gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano"])
def test_all_parts_of_a_backbone_are_compiled_in_training_and_evaluation(name):
    """Beyond its limit of graphs a function, here 2, PyTorch would run the rest as it stands and only log it."""
    model, images = build_vit(name).train(), torch.randn(2, 3, 32, 32)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert compile_parts(model, backend="eager") is model
        for mode in (True, False):
            model.train(mode)(images)
    assert all(part._compiled_call_impl is not None for part in model.parts)


def test_a_model_without_parts_is_refused():
    with pytest.raises(InputError, match="LanguageModel has no parts; accepted: a backbone"):
        compile_parts(build_lm("lm_nano"))


def test_parts_that_are_alike_share_a_graph():
    """12 for 23 parts of the paper's size, as chapter 9 says."""
    model, made = build_vit("gated_swinrmt_retention_paper").train(), []
    compile_parts(model, backend=lambda graph, _: made.append(graph) or graph.forward)
    model(torch.randn(1, 3, 224, 224))
    assert (len(model.parts), len(made)) == (23, 12)
