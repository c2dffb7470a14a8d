"""Sequence parallelism of gated linear attention: a state per head passes from rank to rank, whatever the length.

Source: arXiv 2312.06635, section 4.2 (states of chunks), over torch.distributed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from bitwright.core.errors import BitwrightError, InputError


def state_scan(state: Tensor, decay: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The state with which this rank's part of a sequence begins: ranks hold consecutive parts.

    `state` (batch, heads, keys, values) is what this rank's part makes from nothing, `decay` (batch, heads, keys) its
    gates' product. Each rank receives a state from the one before and sends one to the next: `state.nbytes` per hop.
    Without gradients. Raises InputError for shapes that do not fit, BitwrightError outside a process group.
    """
    if state.ndim != 4 or decay.shape != state.shape[:3]:
        raise InputError(f"State {tuple(state.shape)} and decay {tuple(decay.shape)} do not fit: (batch, heads, keys, "
                         "values) and (batch, heads, keys).")  # fmt: skip
    if not dist.is_initialized():
        raise BitwrightError("No process group: start under torchrun and call torch.distributed.init_process_group.")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start = torch.zeros_like(state)
    if rank > 0:
        dist.recv(start, group=group, group_src=rank - 1)
    if rank + 1 < ranks:
        dist.send((decay[..., None] * start + state).contiguous(), group=group, group_dst=rank + 1)
    return start
