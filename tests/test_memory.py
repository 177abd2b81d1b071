"""The memory formula against bytes that autograd really keeps, and against the shares that FSDP2 really makes."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigated.__main__ import main
from minigated.chunked_loss import IGNORED, loss_and_gradients
from minigated.errors import InputError
from minigated.lm import SIZES, LMConfig, TrainingLoss, build_lm
from minigated.memory import (
    MOST,
    PRECISIONS,
    activation_bytes,
    copied_numbers,
    format_report,
    memory_report,
    memory_rows,
    share,
    shared_numbers,
)

# No two sizes alike: heads fill 48 channels and the width is 40, so that a swapped letter shows.
DENSE = LMConfig(width=40, layers=3, heads=6, kv_heads=2, head_width=8, ffn_width=56, vocabulary=93, context=64)
CONFIGS = {
    "lm_nano": SIZES["lm_nano"],
    "dense": DENSE,
    "dense, no norm of queries": replace(DENSE, qk_norm=False, tied=True),
    "gate elementwise": replace(DENSE, variant="g1_elementwise"),
    "gate headwise": replace(DENSE, variant="g1_headwise"),
    "moe_nano": SIZES["moe_nano"],
    "experts": replace(DENSE, experts=8, top_k=3, variant="g1_elementwise"),
    "shared expert": replace(DENSE, experts=8, top_k=3, shared_width=24),
}


def trainable(config: LMConfig, precision: str) -> nn.Module:
    torch.manual_seed(0)
    return build_lm(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)


def measured(config: LMConfig, precision: str, batch: int, length: int, checkpointing=False, chunk=0) -> int:
    """Bytes of the storages that autograd keeps of a training loss, weights and tables left out."""
    model = trainable(config, precision).checkpoint_activations(checkpointing)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held, alive = {}, []  # kept tensors stay alive, or two would share one address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    windows = torch.randint(config.vocabulary, (batch, length + 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            TrainingLoss(chunk=chunk)(model, windows)
    return sum(held.values())


def formula(config: LMConfig, precision: str, tokens: int, checkpointing=False, chunk=0) -> int:
    """What is there when the backward pass begins."""
    parts = activation_bytes(config, tokens, precision, checkpointing, chunk)
    return parts["blocks"] + parts["end"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_by_formula_are_those_that_autograd_keeps(name, precision, checkpointing):
    """The growth with the batch: what is kept of the weights does not grow. Within 2 %, where 10 % would do."""
    config, length = CONFIGS[name], 48
    few, many = (measured(config, precision, batch, length, checkpointing) for batch in (1, 5))
    expected = formula(config, precision, 4 * length, checkpointing)
    assert many - few == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["lm_nano", "experts"])
def test_a_checkpointed_block_has_a_whole_block_for_a_moment(name, precision):
    config = CONFIGS[name]
    plain = activation_bytes(config, 100, precision)
    parts = activation_bytes(config, 100, precision, checkpointing=True)
    assert plain["running"] == 0 and parts["running"] == plain["blocks"] / config.layers
    assert parts["blocks"] < plain["blocks"] / 4 and parts["end"] == plain["end"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_chunks_the_loss_keeps_gradients_and_no_logits(precision):
    config = replace(DENSE, vocabulary=2000)
    few, many = (measured(config, precision, batch, 48, chunk=16) for batch in (1, 5))
    grown = formula(config, precision, 240, chunk=16) - formula(config, precision, 48, chunk=16)
    assert many - few == pytest.approx(grown, rel=0.02)
    assert formula(config, precision, 240) - formula(config, precision, 240, chunk=16) > 1_000_000
    assert activation_bytes(config, 240, precision, chunk=16)["loss"] < activation_bytes(config, 240, precision)["loss"]


class Live(TorchDispatchMode):
    """The most bytes at once of storages that operations have made and that are still there, `given` ones left out."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "float32"])
@pytest.mark.parametrize("chunk", [2, 16, 50, 120, 1000], ids=lambda chunk: f"{chunk} of 120")
def test_the_moment_of_a_chunk_is_what_lives_in_it(chunk, precision):
    """Logits and relatives at the peak of the operator, which shows nothing of itself outside of its function."""
    config, tokens, kind = replace(DENSE, vocabulary=2000), 120, PRECISIONS[precision]
    stream, product = (torch.bfloat16 if size == 2 else torch.float32 for size in (kind.stream, kind.product))
    hidden, weight = torch.randn(tokens, config.width, dtype=stream), torch.randn(2000, config.width, dtype=stream)
    targets = torch.randint(2000, (tokens,))
    with Live(hidden, weight, targets) as live:
        loss_and_gradients._init_fn(hidden, weight, targets, chunk, IGNORED, product, True, True, False)
    gradients = hidden.nbytes + 4 * weight.numel()
    copy = 2 * weight.numel() if kind.stream != kind.product else 0
    expected = activation_bytes(config, tokens, precision, chunk=chunk)["loss"] - hidden.nbytes
    moment = live.peak - gradients - copy
    assert 0.9 * expected < moment <= expected


def test_a_chunk_of_all_tokens_saves_nothing():
    config = replace(DENSE, vocabulary=2000)
    whole, chunked = (activation_bytes(config, 240, "autocast", chunk=chunk) for chunk in (0, 240))
    assert whole["end"] + whole["loss"] == pytest.approx(chunked["end"] + chunked["loss"], rel=0.1)


@pytest.mark.parametrize("name", ["lm_nano", "gate elementwise", "experts", "shared expert"])
def test_copies_that_autocast_makes_of_the_weights(name):
    """All that is kept, less what grows with the tokens; with checkpointing the blocks' copies are gone."""
    config, length = CONFIGS[name], 48
    small = 150 * config.layers  # bytes: weights of the QK-norms, tokens of each expert, scalars
    block = trainable(config, "autocast").blocks[0]
    head = 2 * config.vocabulary * config.width
    for checkpointing, blocks in ((False, config.layers), (True, 0)):
        few, many = (measured(config, "autocast", batch, length, checkpointing) for batch in (2, 4))
        assert 2 * few - many == pytest.approx(2 * blocks * copied_numbers(block) + head, abs=small)


def test_the_whole_of_a_small_model_within_ten_percent():
    """What the report says for one GPU, without the moments of the loss, against everything that is kept."""
    for checkpointing in (False, True):
        report = memory_report(SIZES["moe_nano"], 1, 4, 128, checkpointing=checkpointing)
        running = activation_bytes(SIZES["moe_nano"], 512, "autocast", checkpointing)["running"]
        one = 2 * copied_numbers(build_lm("moe_nano", "meta").blocks[0]) if checkpointing else 0
        begin = report["copies"] + report["activations"] - running - one
        assert measured(SIZES["moe_nano"], "autocast", 4, 128, checkpointing) == pytest.approx(begin, rel=0.1)


# ------------------------------------------------------------------------------------ shares
@pytest.fixture
def world(request):
    """A world of so many processes of which only this one is there: what it sends, nobody gets."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [3, 8, 64], indirect=True)
@pytest.mark.parametrize("name", ["dense", "experts"])
def test_shares_and_gathered_blocks_are_those_of_fsdp2(name, world):
    """64 processes share 8 experts: one each for 8 of them, and all gather room for 64."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = CONFIGS[name]
    report = memory_report(config, world, 1, 8)
    model, mesh = build_lm(config), init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert report["parameters"] == report["gradients"] == 4 * held and report["optimizer"] == 8 * held
    model.blocks[0].unshard()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.blocks[0].parameters()}
    assert report["block"] == sum(storages.values())
    if name == "experts" and world == 64:
        assert report["block"] > 4 * 4 * sum(p.numel() for p in model.blocks[0].parameters())


def test_a_share_rounds_up():
    assert [share(torch.empty(10, 3, device="meta"), n) for n in (1, 2, 3, 10, 64)] == [30, 15, 12, 3, 3]
    assert shared_numbers([torch.empty(10, 3), torch.empty(7)], 4) == 9 + 2


# ------------------------------------------------------------------------------------ the report
def test_15A2B_on_8_64_and_512(capsys):
    assert main(["memory", "15A2B"]) == 0
    text = capsys.readouterr().out
    assert "recipe autocast" in text and "1 x 4,096 tokens" in text
    rows = memory_rows("15A2B", [8, 64, 512], 1, None, "none")
    assert text.strip() == format_report("15A2B", rows)
    assert [row["gpus"] for row in rows] == [8, 8, 64, 64, 512, 512]
    assert [row["checkpointing"] for row in rows] == [False, True] * 3
    total = 15_577_751_552
    assert rows[0]["parameters"] == pytest.approx(4 * total / 8, rel=1e-5)
    assert rows[2]["parameters"] == pytest.approx(4 * total / 64, rel=1e-4)
    experts = 24 * 3 * 2048 * 768  # one of 128, in all layers: more GPUs than experts do not make it less
    assert rows[4]["parameters"] == pytest.approx(4 * (experts + (total - 128 * experts) / 512), rel=0.01)
    for row in rows:
        parts = ("parameters", "gradients", "optimizer", "unsharded", "copies", "activations", "loss")
        assert row["total"] == sum(row[name] for name in parts)
    assert all(again["total"] < plain["total"] for plain, again in zip(rows[::2], rows[1::2]))


def test_options_reach_the_report(capsys):
    options = ["--gpus", "4", "--batch", "2", "--length", "100", "--recipe", "mixed", "--chunk", "32"]
    assert main(["memory", "moe_nano", *options, "--variant", "g1_headwise", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    config = build_lm("moe_nano", "meta", variant="g1_headwise").config
    for row, checkpointing in zip(rows, (False, True), strict=True):
        expected = memory_report(config, 4, 2, 100, "mixed", checkpointing, 32)
        assert row == json.loads(json.dumps(expected)) and row["copies"] == 0
    assert main(["memory", "moe_nano", *options]) == 0
    assert "loss in chunks of 32" in capsys.readouterr().out


def test_a_small_model_is_told_in_megabytes_and_wide_numbers_keep_their_columns():
    rows = memory_rows("lm_nano", [1], 1, None, "none")
    text = format_report("lm_nano", rows)
    assert "lm_nano: MB (10^6 bytes)" in text and f"{rows[0]['total'] / 1e6:.2f}" in text
    text = format_report("15A2B", memory_rows("15A2B", [1, MOST], MOST, None, "none"))
    assert "15A2B: GB (10^9 bytes)" in text
    assert [len(line.replace("their input", "all").split()) for line in text.split("\n")[3:7]] == [11] * 4


def test_one_gpu_gathers_nothing():
    report = memory_report(DENSE, 1, 1, 8)
    numbers = sum(p.numel() for p in build_lm(DENSE, "meta").parameters())
    assert report["unsharded"] == 0 and report["parameters"] == 4 * numbers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["swin_nanometre"], "swin_nanometre"),
        (["15A2B", "--gpus", "8", "0"], "gpus 0; accepted: 1 to 1,000,000"),
        (["lm_nano", "--gpus", "1" + 20 * "0"], f"gpus 1{20 * '0'}; accepted: 1 to 1,000,000"),
        (["15A2B", "--batch", "-1"], "batch -1"),
        (["15A2B", "--length", "5000"], "length 5000; accepted: 1 to 4096"),
        (["15A2B", "--recipe", "fp8"], "'fp8'; accepted: autocast, mixed"),
        (["15A2B", "--variant", "g2_headwise"], "'g2_headwise'; accepted: none, g1_elementwise, g1_headwise"),
        (["15A2B", "--chunk", "-2"], "chunk -2"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, capsys):
    assert main(["memory", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_unknown_precision():
    with pytest.raises(InputError, match="float8"):
        activation_bytes(DENSE, 10, "float8")
