"""Losses from the device to the host without making the device wait."""

import torch

from minigated.distributed import World, average

CHUNK = 8


class Readback:
    """Collects each step's loss and gradient norm on the device and hands them over in chunks.

    On CUDA a chunk of `CHUNK` steps is copied to pinned memory while training goes on, and read when the
    next chunk is full: the host is then at most two chunks ahead of what it knows, and the device never
    idles for a number. On a CPU there is nothing to wait for and every step is handed over at once.

    Args:
        device: where the losses are.
        world: losses are averaged over its processes, so that all of them decide alike.
    """

    def __init__(self, device: torch.device, world: World):
        self.device, self.world = device, world
        self.chunk = CHUNK if device.type == "cuda" else 1
        self.rows: list[tuple] = []
        self.sent = None

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, asked: bool) -> None:
        """Notes step `step`: scalars on the device, and whether this process was asked to stop."""
        self.rows.append((step, loss.detach().float(), norm.detach().float(), asked))

    def take(self) -> list[tuple[int, float, float, bool]]:
        """What has newly arrived: (step, loss, gradient norm, whether any process was asked to stop)."""
        if len(self.rows) < self.chunk:
            return []
        if self.device.type != "cuda":
            return self.drain()
        before, self.sent = self.sent, self._send()
        return self._read(before)

    def drain(self) -> list[tuple[int, float, float, bool]]:
        """Everything that is left; waits for the device."""
        before, self.sent = self.sent, None
        return self._read(before) + (self._read(self._send()) if self.rows else [])

    def _send(self):
        steps, losses, norms, asked = zip(*self.rows)
        self.rows = []
        table = torch.stack([torch.stack(losses), torch.stack(norms)])  # [2, steps]
        if self.world.size > 1:
            flag = torch.full((1, len(steps)), float(any(asked)), device=self.device)
            table = average(torch.cat([table, flag]), self.world)  # [3, steps]
        if self.device.type != "cuda":
            return steps, table, None
        host = torch.empty(table.shape, pin_memory=True)
        host.copy_(table, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return steps, host, arrived

    @staticmethod
    def _read(sent) -> list[tuple[int, float, float, bool]]:
        if sent is None:
            return []
        steps, table, arrived = sent
        if arrived is not None:
            arrived.synchronize()
        losses, norms, *asked = table.tolist()
        flags = asked[0] if asked else [0.0] * len(steps)
        return [(step, loss, norm, flag > 0) for step, loss, norm, flag in zip(steps, losses, norms, flags)]
