"""Fused kernels equal their plain forms; without a GPU they are not used, and nothing else changes."""

import importlib.util
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from minigated import kernels
from minigated.bench import suite_vit
from minigated.bench.rows import difference
from minigated.bench.suite_retention import CORES, as_projected, make_tables
from minigated.compiled_parts import compile_parts
from minigated.errors import InputError
from minigated.layers import DepthwiseConv, DropPath
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.vit_parts import added
from minigated.vit_sizes import build_vit


def needs_gpu(test):
    """Marks a test that only a CUDA device can run."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


HERE = Path(__file__).resolve().parent
MIXERS = ("gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano", "rmt_nano")


def test_a_tensor_on_the_cpu_takes_the_plain_form():
    assert not kernels.usable(torch.zeros(1))


def test_kernels_can_be_switched_off_and_come_back(monkeypatch):
    monkeypatch.setattr(kernels, "_loaded", lambda: True)

    class OnDevice:
        is_cuda, dtype = True, torch.bfloat16

    assert kernels.usable(OnDevice)
    with kernels.switched_off():
        assert not kernels.usable(OnDevice)
    assert kernels.usable(OnDevice)


@pytest.mark.parametrize("version", ["3.2.0", "2.9.1+git1234"])
def test_a_triton_that_is_too_old_is_as_none(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    assert not kernels._loaded()


@pytest.mark.parametrize(
    ("sides", "width", "fits"),
    [((8, 8), 32, True), ((7, 7), 32, True), ((9, 7), 32, False), ((8, 8), 256, False), ((5, 8), 32, False)],
)
def test_windows_that_do_not_fit_are_left_to_the_plain_form(monkeypatch, sides, width, fits):
    """Sides count as powers of two, 9 x 7 as 16 x 8; windows of 5 x 8 do not divide the map."""
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    assert kernels.fits(torch.empty(1, 2 * 7 * 8 * 9, 7 * 8, 1, width), *sides) is fits


@pytest.mark.parametrize(
    ("rows", "columns", "fits"),
    [
        ((4, 2, 2), (4, 2, 2), True),
        ((3, 4, 2, 2), (4, 2, 2), True),
        ((4, 3, 3), (4, 2, 2), False),
        ((4, 2, 2), (1, 2, 2), False),
        ((2, 4, 2, 2), (4, 2, 2), False),
        ((1, 3, 4, 2, 2), (4, 2, 2), False),
    ],
)
def test_tables_of_other_sizes_or_that_are_learnt_are_left_to_the_plain_form(monkeypatch, rows, columns, fits):
    """Three windows stand on each side of the map, so a table has one segment or three."""
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    v, rows, columns = torch.empty(1, 6, 6, 4, 16), torch.zeros(rows), torch.zeros(columns)
    assert kernels.fits(v, 2, 2, (rows,), (columns,)) is fits
    assert not kernels.fits(v, 2, 2, (rows,), (columns.requires_grad_(),))


@pytest.mark.parametrize("mixer", ["retention", "swat"])
def test_what_chooses_the_kernel_is_traced_without_a_break(mixer, monkeypatch):
    """As on a GPU, with a stand-in for the kernel: it returns the values."""
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    monkeypatch.setattr(kernels, "windowed_softmax", lambda qkv, *rest: qkv[..., 2, :, :] * 1.0)
    monkeypatch.setattr(kernels, "windowed_sigmoid", lambda qk, v, *rest: v * 1.0)
    tables = make_tables(mixer, 14, 2, 16, 7, True, torch.device("cpu"))
    given, core = as_projected(mixer, torch.randn(2, 14, 14, 3, 2, 16)), CORES[mixer][0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: core(*x, tables), backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(*given), given[-1][..., 2, :, :] if mixer == "retention" else given[-1])


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 128)])
def test_windows_that_take_more_than_a_chip_has_are_left_to_the_plain_form(monkeypatch, dtype, width):
    """A backward program of 64 cells holds six maps of them."""
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    assert kernels.fits(torch.empty(1, 7, 7, 1, width, dtype=dtype), 7, 7)
    assert not kernels.fits(torch.empty(1, 7, 7, 1, width + 1, dtype=dtype), 7, 7)
    assert not kernels.fits(torch.empty(1, 0, 7, 1, width, dtype=dtype), 7, 7)


def test_slopes_of_several_segments_are_left_to_the_plain_form(monkeypatch):
    monkeypatch.setattr(kernels, "usable", lambda x: True)
    monkeypatch.setattr(kernels, "windowed_sigmoid", lambda qk, v, *rest: pytest.fail("the kernel reads one segment"))
    tables = make_tables("swat", 6, 2, 16, 3, False, torch.device("cpu"))
    tables = tables._replace(row_bias=tables.row_bias.repeat(2, 1, 1, 1))
    qk, v = as_projected("swat", torch.randn(1, 6, 6, 3, 2, 16))
    assert CORES["swat"][0](qk, v, tables).shape == v.shape


@pytest.mark.parametrize("convolve", [kernels.depthwise, kernels.depthwise_added])
def test_a_map_without_cells_is_refused(convolve):
    with pytest.raises(InputError, match=r"a map of shape \[1, 0, 2, 4\]; accepted: no empty side"):
        convolve(torch.zeros(1, 0, 2, 4), torch.zeros(4, 1, 3, 3), torch.zeros(4))


@pytest.mark.parametrize("convolve", [kernels.depthwise, kernels.depthwise_added])
def test_a_map_with_other_channels_than_the_filters_is_refused(convolve):
    with pytest.raises(InputError, match="a map of 4 channels; accepted: 6, as many as filters"):
        convolve(torch.zeros(1, 2, 2, 4), torch.zeros(6, 1, 3, 3), torch.zeros(6))


def test_kernels_refuse_a_tensor_on_the_cpu():
    x, filters = torch.zeros(1, 4, 4, 8), (torch.zeros(8, 1, 3, 3), torch.zeros(8))
    qkv, mask, conv = torch.zeros(1, 4, 4, 3, 2, 4), torch.zeros(2, 4, 4), DepthwiseConv(8).conv
    of_swat = make_tables("swat", 4, 2, 4, 4, False, torch.device("cpu"))
    said = r"the kernel \w+ got a tensor on cpu, torch.float32; accepted: Triton 3.5, a GPU and float32, "
    for call, *given in (
        (kernels.depthwise, x, *filters),
        (kernels.depthwise_added, x, *filters),
        (kernels.windowed_softmax, qkv, None, None, mask, mask, (4, 4)),
        (kernels.windowed_local, qkv, conv, None, None, mask, mask, (4, 4)),
        (kernels.windowed_sigmoid, qkv[..., :2, :, :], qkv[..., 2, :, :], of_swat),
    ):
        with pytest.raises(InputError, match=said):
            call(*given)
    with kernels.switched_off(), pytest.raises(InputError, match="bfloat16 or float16, not switched off"):
        kernels.depthwise(x, *filters)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install -e .[kernels]")
def test_kernels_equal_the_plain_forms_in_the_interpreter():
    done = subprocess.run([sys.executable, HERE / "interpreted_kernels.py"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4 * 7 + 4 * 5 + 2 + 2 + 3 * 4 + 15, done.stderr
    assert all(float(line.rpartition(" ")[2]) < (2e-2 if "float16" in line else 2e-5) for line in lines), done.stdout


@pytest.mark.parametrize("off", [1.0, 2.0])
def test_the_bench_sees_a_wrong_kernel(monkeypatch, off):
    """Its reference runs without kernels; here one stands in that gives so many times the convolution."""
    monkeypatch.setattr(kernels, "usable", lambda x: kernels._allowed)
    monkeypatch.setattr(kernels, "fits", lambda *arguments: False)
    library = lambda x, weight, bias: suite_vit.F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    ).permute(0, 2, 3, 1)
    monkeypatch.setattr(kernels, "depthwise", lambda *given: off * library(*given))
    monkeypatch.setattr(kernels, "depthwise_added", lambda x, *filters: x + off * library(x, *filters))
    monkeypatch.setattr(suite_vit, "compile_parts", lambda model: model)  # minutes that nothing here depends on
    make = partial(suite_vit.make_ours, suite_vit.our_config("retention", "nano", 32, 4, 4))
    row = suite_vit.prepare(make, suite_vit.COMPILED, True, 4, 32, torch.device("cpu"), True, {})
    assert (difference(*row.check()) > 0.1) == (off != 1.0)


# ----------------------------------------------------------------------------------------- what they need elsewhere
def test_blocks_that_differ_in_drop_path_alone_share_a_graph():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x = torch.randn(4, 2, 2, 8)
    for rate in (0.1, 0.2, 0.3):
        torch.compile(DropPath(rate).train(), backend=count, dynamic=False)(x)
    assert len(graphs) == 1


def test_drop_path_made_on_meta_keeps_its_share():
    with torch.device("meta"):
        path = DropPath(0.25)
    path.to_empty(device="cpu")
    assert path.share == 0.75
    assert path.train()(torch.ones(4000, 1)).mean() == pytest.approx(1.0, abs=0.05)


def test_a_graph_without_a_gpu_is_refused():
    config = TrainConfig(steps=1, warmup=0, compile="graph", device="cpu", progress=False)
    with pytest.raises(InputError, match="'graph' needs a CUDA device and this is cpu; accepted: none, blocks, whole"):
        Trainer(torch.nn.Linear(2, 2), lambda m, b: m(b).sum(), lambda *a: torch.ones(1, 2), config)


# ---------------------------------------------------------------------------------------------- on a GPU
@needs_gpu
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("image", [32, 64])
def test_a_backbone_with_kernels_equals_one_without(name, image, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds to three digits
    torch.manual_seed(0)
    model = build_vit(name, image_size=image).cuda().train()
    images = torch.randn(4, 3, image, image, device="cuda")
    found = []
    for plain in (False, True):
        model.zero_grad()
        with kernels.switched_off() if plain else torch.enable_grad():
            scores = model(images)
            scores.square().sum().backward()
        found.append([scores.detach(), *(p.grad.clone() for p in model.parameters())])
    for with_kernels, without in zip(*found, strict=True):
        torch.testing.assert_close(with_kernels, without, atol=2e-4, rtol=2e-3)


@needs_gpu
@pytest.mark.parametrize(("shape", "side"), [((8, 8, 8, 96), 5), ((3, 1, 1, 33), 3), ((2, 7, 9, 64), 5)])
def test_convolution_under_autocast_equals_the_library(shape, side):
    torch.manual_seed(0)
    conv, x = DepthwiseConv(shape[-1], side).cuda(), torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with kernels.switched_off():
            plain = conv(x)
        fused = conv(x)
        compiled = torch.compile(conv, fullgraph=True, dynamic=False)(x)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(compiled, fused, atol=1e-2, rtol=1e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_map_plus_its_convolution_is_the_same_in_one_kernel(dtype):
    """A float32 map under autocast keeps its digits: there the sum is made apart.

    Errors count against a tensor's largest value: a filter's gradient sums over all cells, each rounded twice or once.
    """
    torch.manual_seed(0)
    conv, x = DepthwiseConv(40).cuda(), torch.randn(2, 7, 9, 40, device="cuda", dtype=dtype, requires_grad=True)
    found = []
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for made in (added(x, conv), x + conv(x)):
            found.append([made, *torch.autograd.grad(made.float().square().sum(), [x, *conv.parameters()])])
    assert found[0][0].dtype == dtype
    for fused, plain in zip(*found, strict=True):
        assert (fused - plain).abs().max() < 1e-2 * plain.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_kernels_run_on_the_gpu_that_holds_the_map(monkeypatch):
    """The current one is another."""
    from minigated.kernels import depthwise_triton, windowed_triton

    launched = {}

    class Noted:
        def __init__(self, module, name):
            self.name, self.kernel = name, getattr(module, name)
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid):
            launched.setdefault(self.name, set()).add(torch.cuda.current_device())
            return self.kernel[grid]

    Noted(windowed_triton, "_forward"), Noted(windowed_triton, "_backward")
    Noted(depthwise_triton, "_convolve"), Noted(depthwise_triton, "_filter_gradient")
    torch.manual_seed(0)
    model, images = build_vit(MIXERS[0], image_size=32).eval().to("cuda:1"), torch.randn(2, 3, 32, 32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = [model(images)]
    found[0].sum().backward()
    with kernels.switched_off():
        found.append(model(images))
    torch.testing.assert_close(*found, atol=2e-4, rtol=2e-3)
    assert launched == {name: {1} for name in ("_forward", "_backward", "_convolve", "_filter_gradient")}


@needs_gpu
def test_a_recorded_step_trains_as_the_plain_one_does():
    results = []
    batches = torch.randn(12, 16, 3, 32, 32), torch.randint(0, 10, (12, 16))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    for mode, compiled in (("none", False), ("graph", False), ("graph", True)):  # one that is compiled, recorded too
        torch.manual_seed(0)
        model = build_vit("gated_swinrmt_retention_nano")
        if compiled:
            compile_parts(model)
        config = TrainConfig(steps=12, rate=1e-3, warmup=4, compile=mode, device="cuda", progress=False)
        result = Trainer(model, loss, lambda step, rank, world: tuple(b[step] for b in batches), config).run()
        results.append(torch.tensor(result.losses))
        assert result.compile == mode
    for recorded in results[1:]:
        torch.testing.assert_close(recorded, results[0], atol=2e-2, rtol=0)
    assert results[0][-1] != results[0][0]
