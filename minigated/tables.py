"""What depends on the size of a feature map: masks and rotation tables, built once a size, never trained."""

from typing import NamedTuple

import torch
from torch import nn


class SizedTables(nn.Module):
    """Makes the tables of a map's size when they are first asked for, and keeps them until another size comes.

    A subclass writes `build`, which returns a NamedTuple. Its tensors are no buffers: what copies a model's buffers,
    an average of weights say, would put tables of another size there. They are float32, also in a model of half
    precision (rounded to bf16, the decay of distant cells would change), and float64 in a float64 model.

    Args:
        size: (height, width) to build at once, so that a compiled model finds its tables ready.
    """

    def __init__(self, size: tuple[int, int] | None = None):
        super().__init__()
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # knows the model's device and dtype
        self.size: tuple[int, int] | None = None
        self.kept: NamedTuple | None = None
        if size is not None and self.anchor.device.type != "meta":
            self._keep(*size)

    def build(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> NamedTuple:
        """The tables of a height x width map."""
        raise AssertionError(f"{type(self).__name__} has no build")

    def forward(self, height: int, width: int) -> NamedTuple:
        """The tables of a height x width map."""
        if self.size != (height, width):
            if torch.compiler.is_compiling():  # a graph cannot keep them: they become a part of it
                return self._made(height, width)
            self._keep(height, width)
        return self.kept

    def _made(self, height: int, width: int) -> NamedTuple:
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)
        return self.build(height, width, self.anchor.device, dtype)

    @torch.inference_mode(False)  # what is kept must serve training too, whoever asks for it first
    def _keep(self, height: int, width: int) -> None:
        with torch._C._DisableFuncTorch():  # nor may it stay wrapped, if that is torch.func.grad
            self.kept, self.size = self._made(height, width), (height, width)

    def _apply(self, function, recurse=True):
        before = self.anchor.device, self.anchor.dtype
        super()._apply(function, recurse)
        if self.size is not None and before != (self.anchor.device, self.anchor.dtype):
            self._keep(*self.size)  # anew rather than rounded, or left empty after meta
        return self
