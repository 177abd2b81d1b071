"""The attention sink in half a minute on a CPU: one block learns bigram-backcopy (chapter 2).

After a trigger character the next one repeats the one before it, everywhere else attention has nothing to add. A head
whose weights must sum to 1 then needs a place to look at that does no harm. The recipe is small and its own; what the
sink depends on (embedding scale, positions, schedule) is a parameter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigated.attention import Attention, AttentionShape, attention_weights, causal_mask
from minigated.data.toys import BackcopyTask
from minigated.gates import GateSpec, build_gate
from minigated.layers import RMSNorm
from minigated.recipe import TrainConfig
from minigated.train import Trainer

FIRST_QUERY = 4  # earlier queries see too few tokens for their share to say anything


class BackcopyModel(nn.Module):
    """Embedding and learned positions, one block of single-head attention and an MLP, untied output.

    Args:
        vocabulary: tokens, BOS among them. length: positions.
        gate: None, "elementwise" or "headwise", a sigmoid gate at G1.
        width: C = D. embedding_std: deviation of the embeddings at the start; 1 is PyTorch's default.
    """

    def __init__(
        self, vocabulary: int, length: int, gate: str | None = None, width: int = 64, embedding_std: float = 1.0
    ):
        super().__init__()
        shape = AttentionShape(width=width, heads=1, kv_heads=1, head_width=width)
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        with torch.no_grad():
            self.embedding.weight.mul_(embedding_std)
            self.positions.weight.mul_(embedding_std)
        gates = {"g1": build_gate(GateSpec("g1", gate), shape)} if gate else {}
        self.attention_norm, self.attention = RMSNorm(width), Attention(shape, qk_norm=False, gates=gates)
        self.mlp = nn.Sequential(RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary)

    def stream(self, tokens: Tensor) -> Tensor:
        """What enters the block: token plus position, [B, T] -> [B, T, C]."""
        return self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, tokens: Tensor, probe=None) -> Tensor:
        """[B, T] -> logits [B, T, V]."""
        x = self.stream(tokens)
        x = x + self.attention(self.attention_norm(x), probe=probe)
        x = x + self.mlp(x)
        return self.head(self.norm(x))


def backcopy_loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean nats a token over sequences [B, T + 1], the target of position 0 left out (nothing predicts it)."""
    logits = model(sequences[:, :-1])[:, 1:]  # [B, T - 1, V]
    return F.cross_entropy(logits.flatten(0, 1), sequences[:, 2:].flatten())


@torch.no_grad()
def look(model: BackcopyModel, task: BackcopyTask, sequences: Tensor) -> dict[str, float]:
    """What the head does, by the kind of the query's character.

    Args:
        model: trained or not. task: knows the triggers. sequences: fresh ones, [B, T + 1].

    Returns:
        loss_trigger and loss_other (nats), share_trigger and share_other (attention weight on BOS, queries 4 and
        later), uniform (that share if a query looked at all it may see equally), value_ratio (norm of the value at BOS
        over the others'), and with a gate gate_trigger and gate_other (mean score).
    """
    seen: dict = {}
    tokens = sequences[:, :-1]  # [B, T]
    logits = model(tokens, probe=lambda name, value: seen.__setitem__(name, value))
    loss = F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="none").view_as(tokens)
    weights = attention_weights(*seen["qk"], causal_mask(tokens.shape[1], tokens.shape[1]))[:, 0]  # [B, T, T]
    value = model.attention.v_proj(model.attention_norm(model.stream(tokens))).norm(dim=-1)  # [B, T]
    counted = torch.arange(tokens.shape[1]) >= FIRST_QUERY
    trigger = task.is_trigger(tokens) & counted  # [B, T]
    other = ~task.is_trigger(tokens) & counted
    gate = seen["gate_score"][1].mean((-2, -1)) if "gate_score" in seen else None  # [B, T]

    def by_kind(x: Tensor | None) -> tuple[float | None, float | None]:
        return (None, None) if x is None else (x[trigger].mean().item(), x[other].mean().item())

    loss_trigger, loss_other = by_kind(loss)
    share_trigger, share_other = by_kind(weights[..., 0])
    gate_trigger, gate_other = by_kind(gate)
    uniform = sum(1 / (i + 1) for i in range(FIRST_QUERY, tokens.shape[1])) / (tokens.shape[1] - FIRST_QUERY)
    found = {
        "loss_trigger": loss_trigger,
        "loss_other": loss_other,
        "share_trigger": share_trigger,
        "share_other": share_other,
        "uniform": uniform,
        "value_ratio": (value[:, 0].mean() / value[:, 1:].mean()).item(),
    }
    return found if gate is None else found | {"gate_trigger": gate_trigger, "gate_other": gate_other}


def train_backcopy(
    gate: str | None = None,
    steps: int = 300,
    seed: int = 0,
    schedule: int = 1500,
    every: int = 25,
    embedding_std: float = 1.0,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[BackcopyModel, list[dict]]:
    """Trains one model and looks at it as it learns.

    Args:
        gate: None, "elementwise" or "headwise". steps: updates made; `schedule` is where the cosine reaches zero.
        seed: of the weights and of the order of the batches. every: steps between looks.
        embedding_std: see `BackcopyModel`. device: the model is small, so a CPU is as quick as a GPU.

    Returns:
        The model and a list of `look` results, each with its "step".
    """
    task = BackcopyTask(seed=seed)
    fresh = task.fresh(256, seed=seed + 1)
    torch.manual_seed(seed)
    model = BackcopyModel(task.vocabulary, task.tokens.shape[1] - 1, gate, embedding_std=embedding_std)
    config = TrainConfig(
        steps=max(schedule, steps),
        rate=3e-3,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        warmup=50,
        final_ratio=0.0,
        clip=0.0,
        seed=seed,
        device=device,
        eval_every=every,
        progress=progress,
        name=f"backcopy, gate {gate or 'none'}",
    )
    start = {"step": 0, **look(model, task, fresh)}
    trainer = Trainer(model, backcopy_loss, task.batch_at, config, evaluate=lambda m: look(m, task, fresh))
    return model, [start, *trainer.run(until=steps).evals]
