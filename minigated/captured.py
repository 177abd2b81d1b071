"""A training step as one CUDA graph: the host starts it once instead of naming its thousands of kernels (chapter 9).

A small backbone's step is a thousand kernels of a few microseconds each. Started one by one they wait for the host. A
graph records them once and starts them together, on memory that stays where it is: batches are copied in.
"""

import torch

from minigated.device import to_device

WARM = 3  # steps before the recording, so that every kernel is built and every library has its workspace


class CapturedStep:
    """Calls `compute` for the first steps, then records it and replays the recording; every call is a training step.

    Args:
        compute: batch -> (loss, gradient norm), scalars on the device; it must end with gradients set to None, and
            must neither read a number back nor copy from the host.
        optimizer: its rate becomes a tensor, as a recording holds numbers fast.
        device: a CUDA device.
    """

    def __init__(self, compute, optimizer: torch.optim.Optimizer, device: torch.device):
        self.compute, self.calls, self.graph = compute, 0, None
        self.rate = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True
        self.stream = torch.cuda.Stream(device)

    def __call__(self, batch, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One step with this batch, always of the same shapes, at this learning rate."""
        self.rate.fill_(rate)
        self.calls += 1
        if self.calls <= WARM:
            return self._aside(batch)
        if self.graph is None:
            self._record(batch)
        else:
            _copy(self.batch, batch)
        self.graph.replay()
        return self.loss.clone(), self.norm.clone()  # the next replay writes over them

    def _aside(self, batch):
        """On a stream of its own, as a recording will be, so that nothing it makes is tied to the main stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            made = self.compute(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return made

    def _record(self, batch) -> None:
        self.batch = to_device(batch, self.rate.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.norm = self.compute(self.batch)


def _copy(to, source) -> None:
    """Every tensor of a batch into its place."""
    if isinstance(to, torch.Tensor):
        to.copy_(source, non_blocking=True)
        return
    pairs = zip(to.values(), source.values()) if isinstance(to, dict) else zip(to, source)
    for place, value in pairs:
        _copy(place, value)
