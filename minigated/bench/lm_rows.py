"""Training steps of language models, ours and transformers', as rows: forward, loss, backward, AdamW.

Weights and optimizer are float32; on a GPU matrix products run in bfloat16 under autocast, as in `minigated.train`. All
models of a case see the same tokens. A step ends with the weights changed, so the check, which compares losses and
gradients before the first step, has to run first. "Recorded" is the step as one CUDA graph.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from minigated.bench.formulas import lm_training
from minigated.bench.peers import named, qwen
from minigated.bench.rows import Prepared, Row
from minigated.cuda_graph import Later, recorded
from minigated.device import autocast, choose_precision
from minigated.interop import from_qwen3, from_qwen3_next
from minigated.lm import TrainingLoss, build_lm, lm_loss
from minigated.lm_config import LMConfig
from minigated.recipe import TrainConfig
from minigated.stacked import stacked
from minigated.variants import parameters

# Accepted between two bfloat16 runs of one deep model, gradients too. Rounding in another order adds up over the layers
# and sends a few tokens of a mixture elsewhere: measured are 0.005 to 0.03. A form that is wrong in every layer is off
# by 0.3 and more; a slip in one layer of many may hide here, which is what the float32 tests are for.
DEEP = 0.06
EAGER, COMPILED, RECORDED, BOTH = "eager", "compiled", "recorded", "compiled and recorded"  # ways to run a step
LOADERS = {"qwen3": from_qwen3, "qwen3_moe": from_qwen3, "qwen3_next": from_qwen3_next}


def windows(config: LMConfig, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Random token windows [B, T + 1]; speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocabulary, (batch, tokens + 1), generator=generator).to(device)


def peer_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean next-token loss of a model of transformers, by its own loss function; no cache."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    return model(input_ids=inputs, labels=targets, shift_labels=targets.contiguous(), use_cache=False).loss


def deep_tolerance(device: torch.device) -> float | None:
    """What the check of a whole model accepts: `DEEP` where products run in bfloat16, the usual elsewhere."""
    return DEEP if choose_precision("auto", device) == "bf16" else None


def watched(model: nn.Module) -> list[nn.Parameter]:
    """Weights whose gradients the check compares: the embedding, the first layer's W_V, the last one's W_O.

    At random weights of deviation 0.02 every model's loss is log V, right or wrong; its gradients are not.
    """
    if hasattr(model, "blocks"):
        first, last, embedding = model.blocks[0].attention, model.blocks[-1].attention, model.embedding
    else:
        first, last = model.model.layers[0].self_attn, model.model.layers[-1].self_attn
        embedding = model.model.embed_tokens
    return [embedding.weight, first.v_proj.weight, last.o_proj.weight]


def loss_and_gradients(loss: Callable[[], Tensor], weights: list[nn.Parameter]) -> list[Tensor]:
    """The loss and the gradient of each weight, none of them kept in the model."""
    value = loss()
    return [value, *torch.autograd.grad(value, weights)]


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step: gradients of `loss`, then AdamW over all weights, one fused kernel on CUDA."""
    device = next(model.parameters()).device
    options = {"lr": 1e-4, "betas": TrainConfig.betas, "weight_decay": 0.1}
    if device.type == "cuda":
        options |= {"lr": torch.tensor(1e-4, device=device), "fused": True, "capturable": True}  # may be recorded
    optimizer = torch.optim.AdamW(model.parameters(), **options)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


def bound(
    loss: Callable, model: nn.Module, batch: Tensor, compiled: bool, precision: str = "auto", backend="inductor"
) -> Callable[[], Tensor]:
    """`loss(model, batch)` under autocast on a GPU, compiled where asked for."""
    device = batch.device
    precision = choose_precision(precision, device)

    def run() -> Tensor:
        with autocast(device, precision):
            return loss(model, batch)

    return torch.compile(run, backend=backend, dynamic=False) if compiled else run


def looked(loss: Callable[[], Tensor], weights: list[nn.Parameter], way: str, device: torch.device) -> list[Tensor]:
    """Loss and gradients, from a recording if the way says so."""
    look = partial(loss_and_gradients, loss, weights)
    return (recorded(look, device) if way in (RECORDED, BOTH) else look)()


def ready(step: Callable[[], Tensor], check, facts: dict, way: str, device: torch.device) -> Prepared:
    """The row of a step, recorded at its first call if the way says so."""
    graph = way in (RECORDED, BOTH)
    return Prepared(Later(step, device) if graph else step, check, facts, deep_tolerance(device), counted=not graph)


# ---------------------------------------------------------------------------------------------- ours
def prepare_ours(
    config: LMConfig, way: str, batch: int, tokens: int, device: torch.device, chunk: int = 0, backend=stacked
) -> Prepared:
    """A model of ours. Unless eager and plain, loss and gradients must be those of the eager plain form."""
    torch.manual_seed(0)
    model, data = build_lm(config, device), windows(config, batch, tokens, device)
    model.train()
    compiled = way in (COMPILED, BOTH)
    loss = bound(
        lambda model, data: TrainingLoss(chunk=chunk)(model, data), model, data, compiled, backend=backend
    )
    weights = watched(model)

    def check():
        plain = bound(lambda model, data: TrainingLoss()(model, data), model, data, False)
        return looked(loss, weights, way, device), loss_and_gradients(plain, weights)

    facts = {"parameters": parameters(model), "way": way, "ffn_width": model.config.ffn_width}
    facts |= {"chunk": chunk} if chunk else {}
    checked = check if way != EAGER or chunk else None
    return ready(training_step(model, loss), checked, facts, way, device)


def our_row(
    name: str, config: LMConfig, way: str, batch: int, tokens: int, device: torch.device, chunk: int = 0, **more
) -> Row:
    """A row of ours; eager, and with all logits at once, it is the reference of the others.

    Args:
        **more: of `prepare_ours`.
    """
    built = config.matched()
    total = parameters(build_lm(built, "meta"))
    return Row(
        f"{name}, {way}",
        partial(prepare_ours, built, way, batch, tokens, device, chunk, **more),
        state="equal" if way != EAGER or chunk else "reference",
        flops=lm_training(built, total, batch, tokens),
        items=batch * tokens,
    )


# ---------------------------------------------------------------------------------------------- transformers
def prepare_peer(
    kind: str, config: LMConfig, way: str, batch: int, tokens: int, device: torch.device, experts: str
) -> Prepared:
    """A model of transformers. Its loss and gradients must be those of ours with its weights.

    With experts both are checked in float32, one sequence, eager; what is compiled must then give what the same model
    gives eager, at the precision and with the tokens that are timed. So nothing is compiled for the check alone.
    """
    torch.manual_seed(0)
    model, data = qwen(kind, config, device, experts), windows(config, batch, tokens, device)
    model.train()
    if kind == "qwen3_moe":
        draw_experts(model)
    loss = bound(lambda model, data: peer_loss(model, data), model, data, way in (COMPILED, BOTH))

    def check():
        ours = LOADERS[kind](model.state_dict(), model.config.to_dict()).to(device)
        plain = bound(lm_loss, ours, data, False)
        if not config.experts:
            return looked(loss, watched(model), way, device), loss_and_gradients(plain, watched(ours))
        # float32, one sequence: their bfloat16 router chooses otherwise near ties
        theirs, plain = (bound(f, m, data[:1], False, "float32") for f, m in ((peer_loss, model), (lm_loss, ours)))
        found, expected = loss_and_gradients(theirs, watched(model)), loss_and_gradients(plain, watched(ours))
        if way != EAGER:
            found += looked(loss, watched(model), way, device)
            expected += loss_and_gradients(bound(peer_loss, model, data, False), watched(model))
        return found, expected

    facts = {"parameters": parameters(model), "way": way, "library": named("transformers")}
    if config.experts:
        checked = "eager, float32, one sequence" + ("" if way == EAGER else f"; as timed: {way} beside eager")
        facts |= {"experts": experts, "checked": checked}
    return ready(training_step(model, loss), check, facts, way, device)


def draw_experts(model: nn.Module) -> None:
    """Gives routers and experts random weights; a router of zeros would send every token to the same experts."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name:
                weight.normal_(std=0.02)


def peer_row(
    kind: str,
    config: LMConfig,
    way: str,
    batch: int,
    tokens: int,
    device: torch.device,
    experts: str = "eager",
) -> Row:
    """A row of transformers with the sizes of `config`, its operations counted by the same formula."""
    names = {"qwen3": "Qwen3", "qwen3_next": "Qwen3-Next", "qwen3_moe": f"Qwen3-MoE ({experts})"}
    gated = {"qwen3_next": "g1_elementwise"}.get(kind, "none")
    total = parameters(build_lm(config, "meta", variant=gated))
    return Row(
        f"transformers {names[kind]}, {way}",
        partial(prepare_peer, kind, config, way, batch, tokens, device, experts),
        flops=lm_training(config, total, batch, tokens),
        items=batch * tokens,
    )
