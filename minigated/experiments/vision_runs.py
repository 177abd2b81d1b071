"""One training run of a backbone on images, measured: what the vision experiments repeat over arms and seeds."""

import os

import torch
import torch.nn.functional as F

from minigated.data.augment import Augment
from minigated.data.augment_config import AugmentConfig
from minigated.data.images import ImageBatches, ImageSet
from minigated.device import autocast, choose_precision
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import parameters
from minigated.vit import VisionTransformer, ViTConfig

# The files whose code decides the numbers; a record carries their hashes.
FILES = [
    f"minigated/{name}.py"
    for name in (
        *("captured", "decay", "decay_passes", "device", "gates", "layers", "optimizer", "recipe", "retention", "swat"),
        *("swat_options", "swat_tables", "swin", "tables", "train", "vit", "vit_mixers", "vit_parts", "windows"),
        *("data/augment", "data/augment_parts", "data/images", "data/splits", "data/streams"),
        *("experiments/vision_runs", "kernels/__init__", "kernels/depthwise_triton"),
        *("kernels/lines_triton", "kernels/local_triton", "kernels/windowed_triton"),
    )
]


def augmentation(images: ImageSet, plan: dict) -> Augment:
    """The plan's augmentation with the classes and statistics of a set of images."""
    return Augment(AugmentConfig.of(images, **plan["augment"]))


def image_loss(augment: Augment):
    """(model, batch) -> cross-entropy with soft labels; a batch is (images, labels, random numbers), see `Augment`."""

    def loss(model, batch):
        pixels, shares = augment.transform(*batch)
        return F.cross_entropy(model(pixels).float(), shares)

    return loss


@torch.no_grad()
def accuracy(model, split, augment: Augment, device, precision: str, batch: int = 1000) -> float:
    """Share of right answers, in per cent, over every image of a split."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in ImageBatches(split, batch).sequential():
        pixels = augment.eval_transform(images.to(device))
        with autocast(device, precision):
            right += (model(pixels).argmax(-1) == labels.to(device)).sum()
    model.train()
    return 100.0 * right.item() / len(split)


def train_one(
    config: ViTConfig, seed: int, plan: dict, images: ImageSet, device, name: str, folder=None, resume: bool = True
) -> dict:
    """Trains one backbone with one seed; the test split is read once, at the end.

    Args:
        config: the backbone. seed: of weights, order and augmentation.
        plan: epochs, batch, rate, warmup (epochs), weight_decay, augment (options of `AugmentConfig`).
        images: the set. name: for the progress bar.
        folder: for checkpoints; with `resume` it goes on from what it finds there.

    Returns:
        Accuracy on validation and test in per cent, the loss curve, costs.
    """
    precision, alone = choose_precision("auto", device), int(os.environ.get("WORLD_SIZE", 1)) == 1
    torch.manual_seed(seed)
    model, augment = VisionTransformer(config), augmentation(images, plan).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # of the convolutions' weights; maps are channel-last
    batches = ImageBatches(images.train.to(device), plan["batch"], seed)
    steps = round(plan["epochs"] * batches.steps_per_epoch)

    def batch_at(step, rank, world):
        drawn = batches.at(step, rank, world)
        return (*drawn, augment.draw(len(drawn[0]), (seed, step, rank)))

    def look(model) -> dict[str, float]:
        return {"validation": accuracy(model, images.validation, augment, device, precision)}

    training = TrainConfig(
        steps=steps,
        rate=plan["rate"],
        warmup=min(max(steps, 0), round(plan["warmup"] * batches.steps_per_epoch)),
        weight_decay=plan["weight_decay"],
        betas=(0.9, 0.999),
        seed=seed,
        device=str(device),
        compile="graph" if device.type == "cuda" and alone else "auto",  # small kernels wait for the host otherwise
        name=f"{name} #{seed}",
        unit="images",
        eval_every=max(1, steps // 5),
        save_every=max(1, steps // 5) if folder else 0,
        out=folder and str(folder),
        resume=bool(folder) and resume,
    )
    result = Trainer(model, image_loss(augment), batch_at, training, look).run()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt(result.message)
    every = max(1, steps // 60)
    spoilt = result.stopped is not None  # a diverged run is a result too, but its weights say nothing
    return {
        "test": None if spoilt else accuracy(model, images.test, augment, device, precision),
        "validation": None if spoilt else result.evals[-1]["validation"],
        "followed": result.evals,
        "curve": [[i, round(result.losses[i], 4)] for i in range(every - 1, len(result.losses), every)],
        "parameters": parameters(model),
        "steps": steps,
        "images_per_second": result.tokens_per_second,
        **{name: getattr(result, name) for name in ("seconds", "compile_seconds", "peak_memory", "stopped")},
    }
