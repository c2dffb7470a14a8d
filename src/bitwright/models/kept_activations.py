"""What autograd keeps for the backward pass, in bytes, counted while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from bitwright.models.compressed_activations import Entry, Kept, observers


@dataclass(frozen=True)
class KeptBytes:
    """Bytes kept for the backward pass: of activations as they are and of packed ones with their ranges."""

    plain: int
    packed: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.plain + self.packed


def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> KeptBytes:
    """Run a forward pass and count what its graph keeps. Parameters and buffers do not count; storages that several
    operators keep count once, whole; of packed tensors (`compressed_activations`) codes and ranges count."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    plain: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address comes twice
    packed: dict[int, Entry] = {}

    def see(given: Any) -> Any:
        if isinstance(given, Kept):
            packed[id(given.entry)] = given.entry
        elif given.untyped_storage().data_ptr() not in own:
            plain[given.untyped_storage().data_ptr()] = given.untyped_storage()
        return given

    observers.append(see)
    try:
        with saved_tensors_hooks(see, lambda x: x):
            result = run()
    finally:
        observers.remove(see)
    del result
    return KeptBytes(
        sum(storage.nbytes() for storage in plain.values()), sum(each.packed.nbytes for each in packed.values())
    )
