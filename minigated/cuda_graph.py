"""A step without arguments as one CUDA graph, so that its time is the device's and not the host's."""

from collections.abc import Callable

import torch

WARM = 3  # calls before the recording, so that every kernel is built and every library has its workspace


def recorded(
    step: Callable[[], object], device: torch.device, before: Callable[[], object] = lambda: None
) -> Callable[[], object]:
    """Records what `step` does on a CUDA device.

    Args:
        step: must neither read a number back nor copy from the host. It is called `WARM` times, then once to record,
            which computes nothing.
        device: a CUDA device.
        before: called before each of the warm calls, e.g. to put a position back.

    Returns:
        A function that replays the recording and returns what `step` returned: the same tensors, written anew.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                before()
                step()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # the default one belongs to whichever device came first
            made = step()

    def replay() -> object:
        graph.replay()
        return made

    return replay


class Later:
    """A step recorded at its first call, which runs it `WARM` times first: a training step moves its weights then."""

    def __init__(self, step: Callable[[], object], device: torch.device):
        self.step, self.device, self.replay = step, device, None

    def __call__(self) -> object:
        if self.replay is None:
            self.replay = recorded(self.step, self.device)
        return self.replay()
