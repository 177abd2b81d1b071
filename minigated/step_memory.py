"""What a training step has in memory, seen operation by operation on a CPU (chapter 9).

A step is run on two small batches. What grows from one to the other belongs to the images, what does not to the
weights; either is exact, as every tensor has one size an image. After each operation all storages that are still there
are added up. A step on n images is the same sequence of operations, so its bytes after each of them follow, and their
maximum is the peak, wherever in the step it lies.

Counted are the storages of tensors, not what an operation needs inside of itself (cuDNN's and cuBLAS' workspaces), the
allocator's rounding, or the CUDA context.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigated.tables import SizedTables


def address(tensor: Tensor) -> int:
    """One number for each storage; views share it. While a `StorageWeakRef` lasts, no other storage gets it."""
    return tensor.untyped_storage()._cdata


class Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still there, noted after each operation.

    Args:
        given: tensors that are there anyhow and do not count.
    """

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.given = {address(tensor) for tensor in given}
        self.there, self.trace = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        gone = torch.UntypedStorage._expired  # what `StorageWeakRef.expired` asks, without its two calls
        self.there = {key: one for key, one in self.there.items() if not gone(key)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and address(tensor) not in self.given:
                storage = tensor.untyped_storage()
                self.there[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.trace.append(sum(size for _, size in self.there.values()))
        return result


class Kept:
    """Bytes that autograd keeps of a forward pass, by part of the model; each storage once, for who kept it first.

    Args:
        given: tensors that do not count, weights above all.
        part_of: name of the running module, "" outside of all -> name of a part.
    """

    def __init__(self, model: nn.Module, given: list[Tensor], part_of: Callable[[str], str]):
        self.model, self.part_of = model, part_of
        self.given = {address(tensor) for tensor in given}
        self.found, self.running = {}, [""]

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.given and storage._cdata not in self.found:
            self.found[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), self.part_of(self.running[-1])
        return tensor

    def _left(self, *_) -> None:
        self.running.pop()

    @contextlib.contextmanager
    def watching(self):
        """While it lasts, every tensor kept is noted."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            handles.append(module.register_forward_hook(self._left))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def parts(self) -> dict[str, int]:
        """Bytes by part of what is still there."""
        sums: dict[str, int] = {}
        for reference, size, part in self.found.values():
            if not reference.expired():
                sums[part] = sums.get(part, 0) + size
        return sums


@dataclass
class Step:
    """One step on one batch.

    Attributes:
        images: of the batch. kept: bytes by part when the backward pass begins. trace: bytes after each operation;
        forward: how many of these the forward pass has.
    """

    images: int
    kept: dict[str, int]
    trace: list[int]
    forward: int


def watch(model: nn.Module, loss: Callable[[], Tensor], data: list[Tensor], part_of: Callable[[str], str]) -> Step:
    """Runs forward and backward, and counts.

    Args:
        model: without gradients; it has none afterwards either.
        loss: () -> the loss of the batch `data`, whose first tensor has the images.
        part_of: see `Kept`.
    """
    tables = [x for part in model.modules() if isinstance(part, SizedTables) for x in tree_leaves(part.kept)]
    given = [*model.parameters(), *model.buffers(), *(x for x in tables if isinstance(x, Tensor)), *data]
    live, kept = Live(given), Kept(model, given, part_of)
    with live:
        with kept.watching():
            value = loss()
        parts, forward = kept.parts(), len(live.trace)
        value.backward()
    model.zero_grad(set_to_none=True)
    return Step(len(data[0]), parts, live.trace, forward)


@dataclass
class Growth:
    """Bytes of a step by number of images, from two steps."""

    few: Step
    many: Step

    def __post_init__(self):
        steps = self.few, self.many
        if len({len(step.trace) for step in steps}) > 1 or len({step.forward for step in steps}) > 1:
            counts = [len(step.trace) for step in steps]
            raise AssertionError(f"steps of {counts} operations; a step must be the same whatever its batch")

    def _at(self, few: int, many: int, images: int) -> int:
        slope = (many - few) / (self.many.images - self.few.images)
        return round(few + slope * (images - self.few.images))

    def kept(self, images: int) -> dict[str, int]:
        """What is kept for so many images by part, without what a batch of none would keep."""
        names = dict.fromkeys([*self.few.kept, *self.many.kept])
        pairs = {name: (self.few.kept.get(name, 0), self.many.kept.get(name, 0)) for name in names}
        return {name: self._at(*pair, images) - self._at(*pair, 0) for name, pair in pairs.items()}

    def copies(self) -> int:
        """What a batch of no images would keep: the copies of the weights that autocast makes."""
        return self._at(sum(self.few.kept.values()), sum(self.many.kept.values()), 0)

    def trace(self, images: int) -> list[int]:
        """Bytes after each operation of a step on so many images."""
        return [self._at(few, many, images) for few, many in zip(self.few.trace, self.many.trace)]
