"""What goes into a training run and what comes out of it, as plain data: `TrainConfig` and `TrainResult`."""

import dataclasses
import math
from dataclasses import dataclass

from torch import nn

from minigated.errors import InputError, one_of

PRECISIONS = ("auto", "float32", "bf16")
UNITS = ("tokens", "images")
COMPILE_MODES = ("auto", "none", "blocks", "whole", "graph")
PARALLEL = ("ddp", "fsdp")

# What a resumed run may change: where it reports and how often. Everything else changes the numbers.
FREE_ON_RESUME = ("out", "resume", "progress", "name", "save_every", "eval_every", "device", "unit", "parallel")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of one training run; JSON-able by `dataclasses.asdict`.

    Attributes:
        steps: optimizer steps of the whole run; the schedule is stretched over them.
        accumulate: micro-batches that a process cuts its part of each step's batch into. Activations need less memory;
            loss and gradients stay those of the whole batch, dropout's draws aside. A mixture of experts trained with
            `lm.TrainingLoss(accumulate)` is balanced by `balance.RunningCounts`, an approximation: a micro-batch knows
            the counts of those before it, not of those to come.
        rate: peak learning rate.
        betas: AdamW's two decay rates.
        weight_decay: decoupled decay, on tensors of two or more dimensions only.
        warmup: steps of linear warm-up, at most `steps`.
        final_ratio: last rate over peak rate.
        clip: largest global gradient norm; 0 switches clipping off.
        seed: seeds PyTorch's generators (dropout), from 0 to 2**63 - 1; data order belongs to `batch_at`.
        device: "auto" (CUDA if there is one, else CPU), "cpu", "cuda" or "cuda:N".
        precision: "auto" (bf16 on CUDA, float32 on CPU), "float32" or "bf16" (autocast, weights stay
            float32).
        compile: "auto" ("blocks" on CUDA, "none" on CPU), "none", "blocks" (each of `model.blocks`),
            "whole", or "graph" (nothing compiled, the step recorded as a CUDA graph: for models of small kernels).
        parallel: with several processes, "ddp" (each holds the whole model) or "fsdp" (each holds a share of it and of
            the optimizer's state); nothing to a single process.
        eval_every: steps between validations, 0 for the end only.
        save_every: steps between checkpoints, 0 for the end only.
        out: folder of the run; None keeps nothing on disk.
        resume: continue from the newest checkpoint in `out`.
        deterministic: deterministic kernels, for bit-for-bit repetition on a GPU.
        progress: show a bar (or lines, where there is no terminal).
        name: what the bar calls the run.
        unit: what the speed counts, "tokens" (elements of the batch's first tensor) or "images" (its rows).

    Raises:
        InputError: a value is impossible; the message names the field, the value and what is accepted.
    """

    steps: int
    rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup: int = 200
    final_ratio: float = 0.1
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"
    eval_every: int = 0
    save_every: int = 0
    out: str | None = None
    resume: bool = False
    deterministic: bool = False
    progress: bool = True
    name: str = ""
    unit: str = "tokens"
    accumulate: int = 1
    parallel: str = "ddp"

    def __post_init__(self):
        least_values = {"steps": 1, "accumulate": 1, "warmup": 0, "eval_every": 0, "save_every": 0}
        for field, least in least_values.items():
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _require(whole, field, value, f"a whole number of at least {least}")
        check_seed(self.seed)
        _require(_is_number(self.rate) and self.rate > 0, "rate", self.rate, "a number above 0")
        for field in ("weight_decay", "clip"):
            value = getattr(self, field)
            _require(_is_number(value) and value >= 0, field, value, "a number of at least 0")
        ratio = self.final_ratio
        _require(_is_number(ratio) and 0 <= ratio <= 1, "final_ratio", ratio, "a number from 0 to 1")
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        pair = pair and all(_is_number(b) and 0 <= b < 1 for b in self.betas)
        _require(pair, "betas", self.betas, "two numbers from 0 up to, not including, 1")
        _require(self.warmup <= self.steps, "warmup", self.warmup, f"0 to {self.steps}, the steps of the run")
        one_of("precision", self.precision, PRECISIONS)
        one_of("compile mode", self.compile, COMPILE_MODES)
        one_of("unit", self.unit, UNITS)
        one_of("kind of parallel training", self.parallel, PARALLEL)
        if self.out is None and (self.resume or self.save_every):
            what = "resume" if self.resume else f"save_every={self.save_every}"
            raise InputError(f"{what} needs an output folder: give `out`")
        # Paths and lists are accepted and kept as JSON-able plain values.
        object.__setattr__(self, "out", None if self.out is None else str(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))


def check_seed(seed: int) -> None:
    """Refuses what PyTorch's generators cannot start from in every process (the rank is added)."""
    whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63
    _require(whole, "seed", seed, "a whole number from 0 to 2**63 - 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(fine: bool, field: str, value: object, accepted: str) -> None:
    if not fine:
        raise InputError(f"{field} is {value!r}; accepted: {accepted}")


# What processes of one run may each have for themselves.
OWN_OF_EACH_PROCESS = ("device", "progress", "name", "unit")


def common_settings(config: TrainConfig, model: nn.Module) -> dict:
    """What all processes of a run must agree on: {name: value} of the recipe, the model's config and its shapes."""
    common = {name: value for name, value in dataclasses.asdict(config).items() if name not in OWN_OF_EACH_PROCESS}
    built = getattr(model, "config", None)
    if dataclasses.is_dataclass(built) and not isinstance(built, type):
        common |= {f"the model's {name}": value for name, value in dataclasses.asdict(built).items()}
    return common | {f"the shape of {name}": list(value.shape) for name, value in model.named_parameters()}


def refuse_changes(saved: dict, config: TrainConfig) -> None:
    """Refuses to resume under settings that would change the numbers, naming the field and both values."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for field, value in dataclasses.asdict(config).items():
        value = list(value) if isinstance(value, tuple) else value
        before = saved.get(field, defaults[field])  # a run from before the setting was there had its default
        if field not in FREE_ON_RESUME and before != value:
            raise InputError(
                f"cannot resume: {field} was {before!r} in the saved run and is {value!r} now; "
                f"only {', '.join(FREE_ON_RESUME)} may change"
            )


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        losses: training loss of every step from the first, resumed parts included; all finite.
        evals: what `evaluate` returned, each with its "step".
        seconds: training time of all parts, without each part's first step, validation and saving.
        tokens_per_second: tokens, or whatever the config's `unit` says, over `seconds`; 0 where only a first step
            ran.
        compile_seconds: the first step of this process, which compiles; 0 where no step ran.
        eval_seconds: spent in `evaluate`.
        peak_memory: most bytes PyTorch held on the GPU; None on a CPU.
        stopped: None, "interrupted" or "not finite". message: the line that says why, "" for None.
        rates: learning rate of every step in `losses`.
        checkpoint: the newest checkpoint's folder, None without `out`.
        device, precision, compile: what "auto" came to. world: number of processes.
    """

    losses: list[float]
    evals: list[dict]
    seconds: float
    tokens_per_second: float
    compile_seconds: float
    eval_seconds: float
    peak_memory: int | None
    stopped: str | None
    message: str
    rates: list[float]
    checkpoint: str | None
    device: str
    precision: str
    compile: str
    world: int
