"""What autograd keeps for a backward pass, counted by hooks that share nothing with the package's own count."""

import contextlib

import torch


@contextlib.contextmanager
def kept_storages(*own):
    """While it lasts, storages of saved tensors are noted: {address: bytes}, those of the tensors `own` left out."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in own}
    held, alive = {}, []  # kept tensors stay alive, or two would share one address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield held
