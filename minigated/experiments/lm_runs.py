"""One training run of a language model, measured: what the experiments of chapters 2 and 7 repeat."""

import torch

from minigated.balance import expert_statistics
from minigated.data import TextBatches, data_root, load_text
from minigated.device import autocast, choose_precision
from minigated.errors import InputError
from minigated.lm import TrainingLoss, build_lm, lm_loss
from minigated.measure import measure, summary
from minigated.moe import Routing
from minigated.recipe import TrainConfig
from minigated.train import Trainer
from minigated.variants import parameters

# The files whose code decides the numbers; a record carries their hashes.
FILES = [
    f"minigated/{name}.py"
    for name in (
        *(
            "attention",
            "balance",
            "device",
            "dispatch",
            "gates",
            "layers",
            "lm",
            "lm_config",
            "measure",
            "moe",
            "optimizer",
            "recipe",
            "rope",
            "train",
            "variants",
        ),
        *("data/streams", "data/text", "data/tokens", "experiments/lm_runs"),
    )
]
PROBED = 32  # held-out windows that the measures see


def find_text(name: str):
    """The corpus of that name; "books" is a file `books.txt.xz` in the data folder, which no public home holds."""
    if name != "books":
        return load_text(name)
    path = data_root() / "books.txt.xz"
    if not path.exists():
        raise InputError(
            f"text 'books' is not at {path}; put a large UTF-8 text there (documents separated by <|endoftext|>), "
            f"or choose another with --text, e.g. --text enwik8"
        )
    return load_text(path)


@torch.no_grad()
def evaluate(model, corpus_part, plan: dict, device, precision: str) -> float:
    """Mean nats a byte over the first `windows` windows of a held-out part, over all where it has fewer."""
    batches = TextBatches(corpus_part, context=plan["context"], batch=plan["batch"])
    total, seen = 0.0, 0
    model.eval()
    for batch in batches.sequential(plan["windows"] // plan["batch"]):
        with autocast(device, precision):
            total += lm_loss(model, batch.to(device)).item() * len(batch)
        seen += len(batch)
    model.train()
    return total / seen


@torch.no_grad()
def experts_in_use(model, batches) -> list[dict] | None:
    """`expert_statistics` on held-out tokens, a dict a layer; None for a dense model. Batches [B, T]."""
    if not model.config.experts:
        return None
    passes = []
    for tokens in batches:
        passes.append([])
        model(tokens.to(next(model.parameters()).device), routings=passes[-1])
    return expert_statistics([Routing(*map(torch.cat, zip(*layer))) for layer in zip(*passes)])


def train_one(
    variant: str, seed: int, plan: dict, corpus, device, folder=None, follow: int = 0, points: int = 60
) -> dict:
    """Trains one variant with one seed and measures it.

    Args:
        variant: a name of `VARIANTS`. seed: of weights and batches.
        plan: size, context, batch, steps, warmup, rate, windows (held-out windows for the loss), model (options of
            `LMConfig`; parameters are matched unless it says otherwise, as it must for a mixture of experts, which
            is then trained with its router losses). corpus: the text.
        folder: where checkpoints go, every tenth of the run; it goes on from what it finds there.
        follow: how many times the sink and the largest activation are measured on the way.
        points: about how many points of the training loss are kept; `plan["steps"]` keeps all.

    Returns:
        Test loss in nats a byte (router losses never count), `measures`, `experts`, the loss curve, costs.
    """
    precision = choose_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else None
    held_out = TextBatches(corpus.test, context=plan["context"], batch=8).sequential(PROBED // 8)
    probed = [batch[:, :-1] for batch in held_out]  # [8, T] each
    torch.manual_seed(seed)
    options = {"match_parameters": True} | plan["model"]
    model = build_lm(plan["size"], variant=variant, context=plan["context"], **options)
    batches = TextBatches(corpus.train, context=plan["context"], batch=plan["batch"], seed=seed)
    config = TrainConfig(
        steps=plan["steps"],
        warmup=plan["warmup"],
        rate=plan["rate"],
        seed=seed,
        device=str(device),
        name=f"{variant} #{seed}",
        eval_every=plan["steps"] // follow if follow else 0,
        save_every=plan["steps"] // 10 if folder else 0,
        out=folder and str(folder),
        resume=bool(folder),
    )

    def look(model) -> dict[str, float]:
        return {k: v for k, v in summary(measure(model, probed[:1], dtype)).items() if v is not None}

    loss = TrainingLoss() if model.config.experts else lm_loss
    result = Trainer(model, loss, batches.at, config, look if follow else None).run()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    every = max(1, plan["steps"] // points)
    costs = ("seconds", "compile_seconds", "tokens_per_second", "peak_memory", "stopped")
    spoilt = result.stopped is not None  # a diverged run is a result too, but its weights say nothing
    return {
        "test": None if spoilt else evaluate(model, corpus.test, plan, device, precision),
        "measures": None if spoilt else measure(model, probed, dtype),
        "experts": None if spoilt else experts_in_use(model, probed),
        "followed": result.evals if follow else [],
        "curve": [[i, round(result.losses[i], 4)] for i in range(every - 1, len(result.losses), every)],
        "parameters": parameters(model),
        "ffn_width": model.config.ffn_width,
        **{name: getattr(result, name) for name in costs},
    }
