"""The work behind `python -m minigated train` and `measure`."""

import dataclasses
import json
import os
from pathlib import Path

import torch

from minigated.data import TextBatches, load_text
from minigated.data.bpe import BytePairTokenizer
from minigated.data.tokenizer import bytes_a_token
from minigated.device import autocast, choose_device, choose_precision
from minigated.distributed import require_agreement, setup_distributed
from minigated.errors import InputError
from minigated.lm import SIZES, LanguageModel, TrainingLoss, build_lm, lm_loss
from minigated.measure import measure, summary
from minigated.recipe import TrainConfig, check_seed
from minigated.run_tokenizer import choose_tokenizer, read_tokenizer, refuse_other_vocabulary
from minigated.train import Trainer
from minigated.variants import parameters
from minigated.vit_sizes import SIZES as VISION_SIZES


def validation_loss(windows: list[torch.Tensor], precision: str, lengths: torch.Tensor | None = None, chunk: int = 0):
    """A function model -> {"validation": nats a token} over windows [B, T + 1] of held-out text.

    Args:
        lengths: bytes each token stands for, [V]; "nats_a_byte" is then reported too, for byte-pair tokens.
        chunk: see `lm_loss`.
    """

    def evaluate(model) -> dict[str, float]:
        device = next(model.parameters()).device
        with torch.no_grad(), autocast(device, precision):
            losses = [lm_loss(model, w.to(device), chunk).item() for w in windows]
        result = {"validation": sum(losses) / len(losses)}
        if lengths is not None:
            nats = sum(loss * w[:, 1:].numel() for loss, w in zip(losses, windows, strict=True))
            result["nats_a_byte"] = nats / sum(lengths[w[:, 1:]].sum().item() for w in windows)
        return result

    return evaluate


def train_command(args) -> int:
    """Trains a model by name; checkpoints and resumes when --out is given."""
    given = {name: value for name, value in vars(args).items() if name not in ("function", "device")}
    require_agreement(given, setup_distributed(args.device))  # a Trainer sees neither batch nor text
    check_seed(args.seed)
    if args.model in VISION_SIZES:
        return _train_vision(args)
    if args.model not in SIZES:
        raise InputError(f"unknown model {args.model!r}; accepted: {', '.join([*SIZES, *VISION_SIZES])}")
    if args.chunk < 0:
        raise InputError(f"--chunk {args.chunk}; accepted: 0, for all logits at once, or a number of tokens")
    device = choose_device(args.device)
    args.batch = 16 if args.batch is None else args.batch
    corpus = load_text(args.text)
    context = SIZES[args.model].context if args.context is None else args.context
    tokenizer = choose_tokenizer(args.tokenizer, corpus, args.out, args.resume)
    torch.manual_seed(args.seed)
    model = build_lm(args.model, variant=args.variant, context=context, vocabulary=tokenizer.vocabulary)
    model.checkpoint_activations(args.checkpointing)
    windows = {"context": context, "batch": args.batch, "seed": args.seed, "bos_token": tokenizer.bos}
    batches = TextBatches(tokenizer.from_bytes(corpus.train), **windows)
    held_out = list(TextBatches(tokenizer.from_bytes(corpus.validation), **windows).sequential(16))
    config = TrainConfig(
        steps=args.steps, rate=args.rate, warmup=min(200, args.steps // 10), seed=args.seed, device=args.device,
        eval_every=max(1, args.steps // 5), save_every=max(1, args.steps // 5) if args.out else 0,
        out=args.out, resume=args.resume, name=f"{args.model} {args.variant}",
        accumulate=args.accumulate, parallel=args.parallel,
    )  # fmt: skip
    leads = os.environ.get("RANK", "0") == "0"  # under torchrun one process speaks
    if leads:
        told = f"text {corpus.name}" + (f", tokenizer {tokenizer.name}" if args.tokenizer != "bytes" else "")
        print(f"{args.model}, variant {args.variant}: {parameters(model):,} parameters on {device}; {told}")
    lengths = bytes_a_token(tokenizer) if args.tokenizer != "bytes" else None
    evaluate = validation_loss(held_out, choose_precision("auto", device), lengths, args.chunk)
    # a Trainer refuses a folder that holds a run
    trainer = Trainer(model, TrainingLoss(args.accumulate, args.chunk), batches.at, config, evaluate)
    if args.out and leads and args.tokenizer != "bytes":
        tokenizer.save(args.out)
    result = trainer.run()
    if result.checkpoint and leads:
        print(f"saved {result.checkpoint}")
    return {None: 0, "interrupted": 130}.get(result.stopped, 1)


# What `train` takes for a language model alone, and what it is when it was not given.
LANGUAGE_ONLY = {
    "variant": "none", "text": "shakespeare", "tokenizer": "bytes", "context": None, "chunk": 0, "checkpointing": False,
}  # fmt: skip


def _train_vision(args) -> int:
    """Trains a backbone on images and says how often it is right on the validation images."""
    from minigated.data.images import ImageBatches, load_images
    from minigated.experiments.vision_runs import train_one
    from minigated.experiments.vision_table import RECIPE

    if (args.accumulate, args.parallel) != (1, "ddp"):
        given = f"--accumulate {args.accumulate} --parallel {args.parallel}"
        raise InputError(f"{given} with {args.model}; accepted for a vision model: --accumulate 1 --parallel ddp")
    for name, usual in LANGUAGE_ONLY.items():
        if (value := getattr(args, name)) != usual:
            given = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{given} with {args.model}; accepted here for a language model only")
    device, images = choose_device(args.device), load_images(args.images)
    batch = 64 if args.batch is None else args.batch
    config = dataclasses.replace(VISION_SIZES[args.model], classes=len(images.classes), image_size=images.size)
    epochs = args.steps / ImageBatches(images.train, batch).steps_per_epoch
    plan = {**RECIPE, "epochs": epochs, "batch": batch, "rate": args.rate, "warmup": epochs / 10}
    if os.environ.get("RANK", "0") == "0":
        sizes = f"{len(images.train):,} images of {images.size} x {images.size}, {len(images.classes)} classes"
        print(f"{args.model} on {device}; {images.name}: {sizes}")
    result = train_one(config, args.seed, plan, images, device, args.model, args.out, args.resume)
    if result["stopped"]:
        return 1
    print(f"right on validation images: {result['validation']:.1f} % ({100 / len(images.classes):.1f} % by chance)")
    return 0


def open_checkpoint(folder: str) -> tuple[LanguageModel, object]:
    """A model and its tokenizer from a run of this package or from a released checkpoint."""
    from minigated.checkpoint import load_model
    from minigated.interop import load_checkpoint_folder, load_tokenizer

    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"no folder {folder!r}; give a run's --out folder or a downloaded checkpoint's folder")
    if (path / "checkpoints").is_dir() or (path / "training.pt").exists():
        model = load_model(path)
        if not isinstance(model, LanguageModel):
            raise InputError(f"{folder} holds a model of kind {model.kind!r}; accepted: language models")
        run = path if (path / "checkpoints").is_dir() else path.resolve().parent.parent
        tokenizer = read_tokenizer(run)
        refuse_other_vocabulary(tokenizer, model.config.vocabulary, folder)
        return model, tokenizer
    model, tokenizer = load_checkpoint_folder(path), BytePairTokenizer(load_tokenizer(path))
    refuse_other_vocabulary(tokenizer, model.config.vocabulary, folder, padded=True)
    return model, tokenizer


def token_windows(text: str, tokenizer, length: int, count: int) -> list[torch.Tensor]:
    """`count` windows [1, length] of held-out text; BOS first for models that were trained so."""
    data = load_text(text).test
    end = min(len(data), 8 * length * count)  # a token is seldom longer than eight bytes
    while end < len(data) and int(data[end]) & 0xC0 == 0x80:  # inside a character
        end += 1
    bos = {"bos": tokenizer.bos is not None, "bos_token": tokenizer.bos or 0}
    batches = TextBatches(tokenizer.from_bytes(data[:end]), context=length, batch=1, **bos)
    return [w[:, :-1] for w in batches.sequential(count)]


def format_measures(measures: dict) -> str:
    """Per-layer table and the summary line."""
    lines = [f"{'layer':>5}{'first token':>13}{'max |h|':>10}{'gate':>8}{'|Y|':>9}{'|Y gated|':>11}"]
    gate = measures["gate"]
    for i, share in enumerate(measures["first_token_share"]):
        score = f"{gate['mean'][i]:.3f}" if gate else "-"
        lines.append(
            f"{i:>5}{share:>13.4f}{measures['max_activation']['ffn_residual'][i]:>10.1f}{score:>8}"
            f"{measures['mean_abs']['before'][i]:>9.4f}{measures['mean_abs']['after'][i]:>11.4f}"
        )
    total = summary(measures)
    score = "" if total["gate_score"] is None else f", gate score {total['gate_score']:.3f}"
    lines.append(
        f"F-Attn {total['f_attn']:.4f} (uniform attention: {total['uniform']:.4f}), M-Act {total['m_act']:.1f}{score}; "
        f"{measures['tokens']} tokens a sequence"
    )
    return "\n".join(lines)


def measure_command(args) -> int:
    """Loads a checkpoint folder and prints sinks, massive activations and gate scores per layer."""
    for name, value in {"tokens": args.tokens, "sequences": args.sequences}.items():
        if value < 1:
            raise InputError(f"--{name} {value}; accepted: 1 or more")
    device = choose_device(args.device)
    model, tokenizer = open_checkpoint(args.folder)
    length = min(args.tokens, model.config.context)
    windows = token_windows(args.text, tokenizer, length, args.sequences)
    precision = torch.bfloat16 if choose_precision("auto", device) == "bf16" else None
    measures = measure(model.to(device), windows, precision)
    print(json.dumps(measures) if args.json else format_measures(measures))
    return 0
