"""Activation checkpointing: the same outputs and gradients, fewer bytes kept, dropout drawn again as it was."""

import sys
from pathlib import Path

import pytest
import torch
from kept_storages import kept_storages
from torch import nn

from minigated.__main__ import main
from minigated.lm import TrainingLoss, build_lm
from minigated.train import TrainConfig, Trainer
from minigated.vit_sizes import build_vit

SMALL = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 32, "vocabulary": 61}
BACKBONES = ["swin_nano", "rmt_nano", "gated_swinrmt_retention_nano", "gated_swinrmt_swat_nano"]


def language(name: str = "lm_nano", **options) -> nn.Module:
    torch.manual_seed(0)
    return build_lm(name, context=32, **{**SMALL, **options})


def backbone(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_vit(name, **{"drop_path": 0.4, **options})


def windows() -> torch.Tensor:
    return torch.randint(61, (2, 25), generator=torch.Generator().manual_seed(1))


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vision_loss(model, batch):
    return model(batch).square().mean()


def answers(model, loss, batch, on: bool, precision: torch.dtype | None = None) -> list[torch.Tensor]:
    """Loss and gradients of one pass with a fixed seed, then a number drawn after it: the random state it left."""
    model.checkpoint_activations(on).zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        value = loss(model, batch)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]


def same(model, loss, batch, precision=None) -> bool:
    first, second = (answers(model, loss, batch, on, precision) for on in (False, True))
    return len(first) == len(second) > 10 and all(torch.equal(a, b) for a, b in zip(first, second))


# ------------------------------------------------------------------------------------ the same numbers
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("variant", ["none", "g1_elementwise", "g2_headwise", "switch_kv_4top4"])
def test_a_language_model_gives_the_same_bits(variant, precision):
    assert same(language(variant=variant), TrainingLoss(), windows(), precision)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_a_mixture_of_experts_with_its_router_losses(chunk, precision):
    model = language("moe_nano", balance_weight=1.0, z_weight=1.0)
    loss = TrainingLoss(chunk=chunk)
    assert same(model, loss, windows(), precision)
    routings = []
    model(windows()[:, :-1], routings=routings)[0, 0, 0].backward()
    assert len(routings) == 3, "a block that runs again must not report its routing again"


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_with_stochastic_depth_gives_the_same_bits(name):
    model = backbone(name).train()
    assert same(model, vision_loss, images())
    assert not torch.equal(model(images()), model(images())), "the test needs draws that differ"
    assert same(model.eval(), vision_loss, images())


def test_running_means_move_once():
    first, second = (backbone("rmt_nano").checkpoint_activations(on).train() for on in (False, True))
    for model in (first, second):
        torch.manual_seed(2)
        vision_loss(model, images()).backward()
    moved = 0
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        moved += a.ndim > 0 and a.dtype.is_floating_point
        assert torch.equal(a, b)
    assert moved


def test_dropout_inside_a_block_draws_the_same_again():
    model = language()
    for block in model.blocks:
        block.ffn_end = nn.Dropout(0.5)
    assert same(model.train(), TrainingLoss(), windows())


def test_a_second_draw_would_be_seen(monkeypatch):
    real = torch.utils.checkpoint.checkpoint
    forgetful = lambda *args, **kwargs: real(*args, **kwargs, preserve_rng_state=False)
    monkeypatch.setattr("minigated.recompute.checkpoint", forgetful)
    assert not same(backbone("rmt_nano").train(), vision_loss, images())


# ------------------------------------------------------------------------------------ fewer bytes
def kept_bytes(model, loss, batch, on: bool) -> int:
    """Bytes of the storages kept for the backward pass, weights left out."""
    model.checkpoint_activations(on)
    with kept_storages(*model.parameters(), *model.buffers()) as held:
        value = loss(model, batch)
    value.backward()
    return sum(held.values())


@pytest.mark.parametrize("name", ["lm_nano", "moe_nano"])
def test_a_language_model_keeps_one_input_a_block(name):
    few, many = (language(name, layers=n) for n in (2, 6))
    grown = [kept_bytes(many, TrainingLoss(), windows(), on) - kept_bytes(few, TrainingLoss(), windows(), on)
             for on in (False, True)]  # fmt: skip
    inputs = 4 * 2 * 24 * 32 * 4  # blocks, sequences, tokens, width, bytes
    assert grown[0] > 10 * inputs
    # a mixture's router losses are outside of the block and keep what they need of the routing
    assert grown[1] == inputs if name == "lm_nano" else inputs < grown[1] < grown[0] / 3


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_keeps_far_less(name):
    model = backbone(name, depths=(4, 4, 4, 4)).train()
    plain, checkpointed = (kept_bytes(model, vision_loss, images(2), on) for on in (False, True))
    assert checkpointed < plain / 3


def test_without_gradients_nothing_is_run_again(monkeypatch):
    model, calls = language().checkpoint_activations(), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr("minigated.recompute.checkpoint", None)  # it would copy the random state for nothing
        model(windows())
    assert len(calls) == 1
    TrainingLoss()(model, windows()).backward()
    assert len(calls) == 2  # the second pass stops at the last kept tensor, before the hook


def test_a_probe_and_a_cache_see_every_layer_once():
    model, seen = language().checkpoint_activations(), []
    model(windows(), probe=lambda layer, name, value: seen.append((layer, name))).mean().backward()
    assert len(seen) == len(set(seen)) > 0
    cache = model.new_cache(2, 25)
    model(windows(), cache=cache)
    assert cache[0].length == 25
    model, seen = backbone("rmt_nano").checkpoint_activations(), []
    model(images(), probe=lambda stage, block, name, value: seen.append((stage, block, name))).mean().backward()
    assert len(seen) == len(set(seen)) > 0


# ------------------------------------------------------------------------------------ compiled, spread
TWO_STAGES = {"widths": (32, 64), "depths": (1, 1), "heads": (2, 4), "ffn_ratios": 3.0, "decay_spans": 4.0}
TWO_STAGES |= {"mixers": "gated_swinrmt_swat", "layer_scale": False}


@pytest.mark.parametrize("mode", ["blocks", "whole"])
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_compiled(mode, kind):
    """Stochastic depth included: a compiled backbone draws again what it drew."""
    torch._dynamo.reset()
    if kind == "language":
        model, loss, batch, backend = language(), TrainingLoss(), windows(), "inductor"
    else:
        model = backbone("gated_swinrmt_swat_nano", **TWO_STAGES)
        loss, batch, backend = vision_loss, images(), "aot_eager"
    plain = answers(model.train(), loss, batch, False)
    for part in model.blocks if mode == "blocks" else [model]:
        part.compile(fullgraph=True, dynamic=False, backend=backend)
    for a, b in zip(answers(model, loss, batch, True), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------ from the command line
def test_the_command_trains_the_same_with_both_options(tmp_path, monkeypatch, capsys):
    results, real = [], Trainer.run

    def run(self):
        results.append((self.model, real(self)))
        return results[-1][1]

    monkeypatch.setattr(Trainer, "run", run)
    common = ["train", "lm_nano", "--context", "32", "--batch", "2", "--steps", "3"]
    assert main(common) == main([*common, "--chunk", "20", "--checkpointing"]) == 0
    (plain, first), (chunked, second) = results
    assert not plain.checkpointing and chunked.checkpointing
    assert first.losses != second.losses, "rounded in another order, or the chunks were not used"
    assert first.losses == pytest.approx(second.losses, abs=1e-5)
    assert first.evals[-1]["validation"] == pytest.approx(second.evals[-1]["validation"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["lm_nano", "--chunk", "-1"], "--chunk -1"), (["rmt_nano", "--chunk", "8"], "--chunk 8 with rmt_nano"),
     (["rmt_nano", "--checkpointing"], "--checkpointing with rmt_nano"),
     (["rmt_nano", "--variant", "g1_headwise"], "--variant g1_headwise with rmt_nano")],
)  # fmt: skip
def test_options_that_do_not_fit_are_named(arguments, said, capsys):
    assert main(["train", *arguments]) == 2
    assert said in capsys.readouterr().err


def trained(parallel: str, on: bool, out: Path) -> None:
    """Three steps of a small mixture of experts; every process writes its losses."""
    model = language("moe_nano", balance_weight=1.0).checkpoint_activations(on)
    batch_at = lambda step, rank, world: windows().roll(7 * step + rank, 1)
    config = TrainConfig(steps=3, warmup=0, device="cpu", progress=False, parallel=parallel)
    trainer = Trainer(model, TrainingLoss(chunk=7 if on else 0), batch_at, config)
    torch.save(trainer.run().losses, out / f"{parallel}_{on}_{trainer.world.rank}.pt")


def spread(rank: int, out: Path) -> None:
    for parallel in ("ddp", "fsdp"):
        for on in (False, True):
            trained(parallel, on, out)


def test_spread_over_two_processes_it_trains_the_same(tmp_path):
    """In a process of its own: forking is safe before torch has started threads."""
    import subprocess

    worker = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    assert len(losses) == 8
    for name, values in losses.items():
        assert values == pytest.approx(losses["ddp_False_0"], abs=1e-5), name


if __name__ == "__main__":
    import torch.distributed.fsdp  # noqa: F401 - once, before forking
    from forked_ranks import run_world

    sys.exit(max(run_world(2, spread, Path(sys.argv[1]))))
