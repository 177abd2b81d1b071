"""The one training loop of the book: language models, vision models and mixtures of experts alike.

    config = TrainConfig(steps=1000, out="runs/first")
    trainer = Trainer(model, lm_loss, batches.at, config, evaluate=validation)
    result = trainer.run()

The loop asks for three things: `loss_fn(model, batch)` gives a scalar, `batch_at(step, rank, world)` gives a
batch as a pure function of its arguments, `evaluate(model)` gives named numbers. As batches need no state
and the schedule is a function of the step, a resumed run needs the weights, the optimizer and PyTorch's
random state, no more.

The same script runs on several GPUs, one process each, under `torchrun --nproc-per-node=8 script.py`: by default each
holds a copy of the model (`parallel="ddp"`); `parallel="fsdp"` spreads one model over all, see `minigated.sharded`.
`accumulate=4` takes each step's batch in four parts, one after the other, in a quarter of the memory for activations.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from minigated import device
from minigated.captured import CapturedStep
from minigated.distributed import from_leader, objective, require_agreement, setup_distributed, unsent
from minigated.errors import InputError
from minigated.interrupt import Interrupt
from minigated.optimizer import build_optimizer, clip_gradients, learning_rate
from minigated.progress import Clock, Progress
from minigated.readback import Readback
from minigated.recipe import TrainConfig, TrainResult, common_settings
from minigated.resume import open_folder, save
from minigated.sharded import all_finite, shard_model, share_buffers

__all__ = ["TrainConfig", "TrainResult", "Trainer", "learning_rate"]


class Trainer:
    """Trains `model` in place by `config`. Everything wrong with the input is said here, before any training.

    Args:
        model: moved to the device.
        loss_fn: (model, batch) -> scalar tensor, the mean over the batch.
        batch_at: (step, rank, world) -> tensor, or tuple, list or dict of tensors, on the CPU: process
            `rank`'s part of batch number `step`; all parts have the same size, in rows a multiple of
            `config.accumulate`.
        config: see `TrainConfig`.
        evaluate: (model) -> {name: number}; called without gradients, in evaluation mode, uncompiled, under
            the run's precision, by the leading process; with parallel="fsdp" by all, and the leader's numbers count.

    Raises:
        InputError: a device that is not there, a folder that cannot be written or already holds a run, a
            damaged checkpoint, one of another model or of another recipe.
        SystemExit: with status 2, in all processes, after a line that says on which setting they disagree.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable, batch_at: Callable, config: TrainConfig, evaluate=None
    ):
        self.config, self.batch_at, self.evaluate = config, batch_at, evaluate
        self.world = setup_distributed(config.device)
        self.device = device.choose_device(config.device, self.world.local_rank)
        self.precision = device.choose_precision(config.precision, self.device)
        self.compile = device.choose_compile(config.compile, self.device, model)
        require_agreement(common_settings(config, model), self.world)
        self.sharded = config.parallel == "fsdp" and self.world.size > 1
        self.model = shard_model(model, self.device, self.world) if self.sharded else model.to(self.device)
        self.optimizer = build_optimizer(model, config, self.device)
        self.step, self.losses, self.evals = 0, [], []
        self.clock, self.compile_seconds, self.eval_seconds = Clock(), 0.0, 0.0
        self.tokens, self.stopped, self.message, self.random = 0, None, "", None
        self.saved: Path | None = None
        self.progress = Progress(config.name, config.steps, show=False, leads=self.world.leads)
        if config.out is not None:
            open_folder(self)
        self.captured = None
        if self.compile == "graph":
            if self.world.size > 1:
                raise InputError("compile 'graph' records one process; accepted with several: none, blocks, whole")
            self.captured = CapturedStep(self._compute, self.optimizer, self.device)
        self.objective = objective(model, loss_fn, self.device, self.world, self.sharded)

    def run(self, until: int | None = None) -> TrainResult:
        """Trains to the end, or to step `until`; called again, goes on from where it stopped.

        Ctrl-C finishes the running step, saves where there is an output folder, and returns with
        stopped="interrupted"; a command line should exit with 130 then. A second Ctrl-C raises
        KeyboardInterrupt at once. A loss, gradient or weight that is not finite stops the run with
        stopped="not finite"; the model is then spoilt, the newest checkpoint is not.
        """
        if self.stopped == "not finite":
            raise RuntimeError(f"this run is over ({self.message}); make a new model and a new Trainer")
        config, self.stopped, self.message = self.config, None, ""
        last = config.steps if until is None else min(until, config.steps)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with ExitStack() as stack:
            stack.enter_context(device.own_random_state(self.device))
            stack.enter_context(device.kernels(config.deterministic))
            stack.enter_context(device.compiled(self.model, self.compile))
            show = config.progress and self.step < last
            progress = Progress(config.name, config.steps, self.step, show, self.world.leads, config.unit)
            self.progress = stack.enter_context(progress)
            self.interrupt = stack.enter_context(Interrupt(self.progress.say))
            if self.random is None:
                torch.manual_seed(config.seed + self.world.rank)
            else:
                device.set_random_state(self.random, self.device)
            self.model.train()
            self._validate()  # what Ctrl-C skipped
            self._loop(last)
            self.random = device.random_state(self.device)
            self._say_why()
        return self._result()

    # ---------------------------------------------------------------------------------------------- the loop
    def _loop(self, last: int) -> None:
        self.reader, first = Readback(self.device, self.world), True
        batch = self._fetch() if self.step < last else None
        while self.step < last and self.stopped is None:
            begin, count = time.perf_counter(), self._count(batch)
            self.reader.add(self.step, *self._update(batch), self.interrupt.asked)
            if first:  # it compiles, so it is timed apart
                device.synchronize(self.device)
                self.compile_seconds += time.perf_counter() - begin
                self.clock.start()
            else:
                self.tokens += count
            first, self.step = False, self.step + 1
            batch = self._fetch() if self.step < last else None  # the host's work while the device computes
            self._record(self.reader.take())
            if self.interrupt.asked and self.world.size == 1:
                self.stopped = self.stopped or "interrupted"
            if self.stopped or self.step == last or self._due("eval_every") or self._due("save_every"):
                self._settle(last)

    def _fetch(self):
        return device.to_device(self.batch_at(self.step, self.world.rank, self.world.size), self.device)

    def _count(self, batch) -> int:
        """Tokens or images of the whole step, over all processes."""
        first = device.first_tensor(batch)
        return (len(first) if self.config.unit == "images" else first.numel()) * self.world.size

    def _update(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns loss and gradient norm, scalars on the device."""
        rate = learning_rate(self.step, self.config)
        if self.captured is not None:
            return self.captured(batch, rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._compute(batch)

    def _compute(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What a step does on the device, and what a CUDA graph records of it."""
        losses, parts = [], device.micro_batches(batch, self.config.accumulate)
        for number, part in enumerate(parts, start=1):
            with unsent(self.objective, number < len(parts)):  # copies need to agree only once a step
                with device.autocast(self.device, self.precision):
                    loss = self.objective(part) / len(parts)  # parts are equal, so the mean of means is the mean
                loss.backward()
            losses.append(loss.detach())
        norm = clip_gradients(self.model, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(losses[1:], losses[0]), norm

    def _record(self, rows: list[tuple[int, float, float, bool]]) -> None:
        """Takes in what the device has reported; a number that is not finite ends the run."""
        for step, loss, norm, asked in rows:
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    self._spoilt(f"{what} is {value} at step {step}", step)
                    return
            self.losses.append(loss)
            self.stopped = "interrupted" if asked else self.stopped
        if rows:
            seconds = self.clock.read()
            speed = self.tokens / seconds if self.tokens else 0.0
            self.progress.update(len(self.losses), self.losses[-1], speed)

    def _settle(self, last: int) -> None:
        """Waits for the device, then validates and saves what is due; none of it counts as training time."""
        self._record(self.reader.drain())
        device.synchronize(self.device)
        self.clock.stop()
        if self.sharded:
            share_buffers(self.model)
        if self.stopped is None:
            self._validate()
        keep = self.stopped == "interrupted" or self.step == last or self._due("save_every")
        if keep and self.stopped != "not finite" and self.config.out is not None:
            if all_finite(self.model, self.world):
                self.saved = save(self)
            else:
                self._spoilt(f"a weight is not finite after step {self.step - 1}", self.step)
        if self.stopped is None and self.step < last:
            self.clock.start()

    def _due(self, field: str) -> bool:
        every = getattr(self.config, field)
        return every > 0 and self.step % every == 0

    def _validate(self) -> None:
        """Asks `evaluate` where it is due and not yet answered; its random numbers are its own."""
        due = self.step > 0 and (self.step == self.config.steps or self._due("eval_every"))
        if self.evaluate is None or not due or any(row["step"] == self.step for row in self.evals):
            return
        begin, row = time.perf_counter(), None
        if self.world.leads or self.sharded:  # a spread model runs in all processes or in none
            self.model.eval()
            apart = device.own_random_state(self.device), device.plain(self.model)
            with torch.no_grad(), apart[0], apart[1], device.autocast(self.device, self.precision):
                row = {"step": self.step, **{k: float(v) for k, v in self.evaluate(self.model).items()}}
            self.model.train()
            self.progress.note(", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        self.evals.append(from_leader(row, self.world))
        self.eval_seconds += time.perf_counter() - begin

    # ---------------------------------------------------------------------------------------------- the end
    def _spoilt(self, what: str, step: int) -> None:
        kept = f"the last good checkpoint is {self.saved}" if self.saved else "nothing was saved before it"
        self.stopped, self.step = "not finite", step
        self.message = f"{what}; {kept}; try a smaller rate (it was {self.config.rate:g})"

    def _say_why(self) -> None:
        if self.stopped == "interrupted":
            kept = (
                f"resume goes on from {self.saved}" if self.saved else "nothing saved, as there is no `out`"
            )
            self.message = f"interrupted after {self.step} of {self.config.steps} steps; {kept}"
        if self.stopped:
            self.progress.say(self.message)

    def _result(self) -> TrainResult:
        seconds = self.clock.read()
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return TrainResult(
            losses=list(self.losses),
            evals=list(self.evals),
            seconds=seconds,
            tokens_per_second=self.tokens / seconds if self.tokens else 0.0,
            compile_seconds=self.compile_seconds,
            eval_seconds=self.eval_seconds,
            peak_memory=memory,
            stopped=self.stopped,
            message=self.message,
            rates=[learning_rate(step, self.config) for step in range(len(self.losses))],
            checkpoint=str(self.saved) if self.saved else None,
            device=str(self.device),
            precision=self.precision,
            compile=self.compile,
            world=self.world.size,
        )
