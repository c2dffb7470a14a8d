"""Training with activations kept in 8 bits: the forward pass is exact, and what autograd keeps for the backward pass is
stored in 8, 4 or 2 bits and restored when gradients are computed. Noise enters the gradients only.

`compress` sets it up for the layers of a model, each with running estimates of its ranges, which are part of the
model's state; `compressed_activations` does it for everything that autograd keeps inside a `with` block. Both pack
through saved-tensor hooks, so that outputs are those of the plain model bit for bit, and both work together with
`torch.utils.checkpoint` and fused attention. Kept as they are: parameters and their views, integers and masks, small
tensors, statistics of normalisations (last axis of one), and tensors with NaN or infinity.

Source: arXiv 2111.11124. Unlike its release, codes saturate, groups without range are exact, and every kept tensor has
a copy of the ranges it was packed with, so that a module may run several times before the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.activation_quantisation import (
    BITS,
    GroupLayout,
    QuantisedActivation,
    Rounding,
    dequantise,
    group_layout,
    group_ranges,
    quantise,
)

LEAST_VALUES = 1024  # smaller tensors are kept as they are


@dataclass(frozen=True)
class Setting:
    """How activations are kept: `bits` 8, 4 or 2; `groups` ranges per tensor (the heads of attention); `decay` of the
    running estimates of the ranges, None for the ranges of each tensor itself; rounding; one copy of a tensor that
    several operators keep (`share`); seed of the stochastic rounding."""

    bits: int = 8
    groups: int = 1
    decay: float | None = 0.9
    rounding: Rounding = "stochastic"
    share: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"Activations are kept in {', '.join(map(str, BITS))} bits, not {self.bits}.")
        if self.groups < 1:
            raise InputError(f"{self.groups} groups asked for; expected at least one.")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise InputError(f"The decay of running ranges is from 0 to below 1, or None, not {self.decay}.")
        if self.rounding not in ("stochastic", "nearest"):
            raise InputError(f"Rounding is stochastic or nearest, not {self.rounding!r}.")


@dataclass
class Ranges:
    """Running estimates of the ranges of the tensors that one forward pass keeps, by their place in its order: least
    values and ranges, float32 (groups,) each."""

    low: dict[int, torch.Tensor] = field(default_factory=dict)
    span: dict[int, torch.Tensor] = field(default_factory=dict)

    def knows(self, place: int, groups: int) -> bool:
        """Whether there is an estimate for a tensor of so many groups."""
        return place in self.low and len(self.low[place]) == groups

    def update(self, place: int, low: torch.Tensor, span: torch.Tensor, decay: float) -> None:
        """estimate <- decay * estimate + (1 - decay) * new; the first one as it is."""
        known = self.knows(place, len(low))
        self.low[place] = decay * self.low[place] + (1 - decay) * low if known else low
        self.span[place] = decay * self.span[place] + (1 - decay) * span if known else span


@dataclass(eq=False)
class Entry:
    """A packed tensor and a weak reference to the storage it was made from: while one holds it, no other storage gets
    its address."""

    packed: QuantisedActivation
    source: Any


@dataclass(frozen=True)
class Kept:
    """What the hooks give autograd in place of a tensor: a packed one, which others may share, and its own shape."""

    entry: Entry
    shape: torch.Size


_entries: WeakValueDictionary[Any, Entry] = WeakValueDictionary()


def _key(x: torch.Tensor) -> tuple[Any, ...]:
    """The same for tensors of the same values at the same place; contiguous ones may differ in shape."""
    view = x.numel() if x.is_contiguous() else (x.shape, x.stride())
    return (x.untyped_storage()._cdata, x.storage_offset(), view, x._version, x.dtype)


def _shared(x: torch.Tensor) -> Entry | None:
    found = _entries.get(_key(x))
    return found if found is not None and not found.source.expired() else None


observers: list[Callable[[Any], Any]] = []  # called with everything that the hooks give autograd


class Packer:
    """The two hooks of one place of a network, with its ranges. `heads_first`: tensors with three axes are those of
    batched products, (batch * heads, rows, columns)."""

    def __init__(self, setting: Setting, heads_first: bool = False) -> None:
        self.setting, self.ranges, self.training, self.heads_first = setting, Ranges(), True, heads_first
        self._place = self._count = 0

    def begin(self, training: bool) -> None:
        """A forward pass begins: places are counted anew."""
        self._place, self.training = 0, training

    def layout(self, x: torch.Tensor) -> GroupLayout:
        """The groups of a tensor: heads at axis 1 of four, or folded into axis 0 of three, as batched products keep
        them; else channels of the last axis. One group where none of these divides."""
        groups, shape = self.setting.groups, tuple(x.shape)
        if self.heads_first and len(shape) == 3 and shape[0] % groups == 0:
            return GroupLayout(groups, shape[1] * shape[2])
        if shape[1 if len(shape) == 4 else -1] % groups == 0:
            return group_layout(shape, groups)
        return GroupLayout(1, x.numel())

    def pack(self, x: torch.Tensor) -> Any:
        """The hook that autograd calls with every tensor it would keep."""
        kept = self._pack(x)
        for observer in observers:
            observer(kept)
        return kept

    def _pack(self, x: torch.Tensor) -> Any:
        if not _compressible(x):
            return x
        if self.setting.share and (found := _shared(x)) is not None:
            self._place += 1
            return Kept(found, x.shape)
        layout = self.layout(x)
        low, span = group_ranges(x, layout)
        if not (torch.isfinite(low).all() and torch.isfinite(span).all()):
            return x  # gradients shall show what went wrong
        if self.setting.decay is not None:
            place, self._place = self._place, self._place + 1
            if self.training or not self.ranges.knows(place, layout.groups):
                self.ranges.update(place, low, span, self.setting.decay)
            low, span = self.ranges.low[place], self.ranges.span[place]
        self._count += 1
        seed = self.setting.seed * 0x9E3779B1 + self._count * 0x85EBCA77
        packed = quantise(x, layout, low, span, self.setting.bits, self.setting.rounding, seed)
        entry = Entry(packed, StorageWeakRef(x.untyped_storage()))  # type: ignore[no-untyped-call]
        if self.setting.share:
            _entries[_key(x)] = entry
        return Kept(entry, x.shape)

    @staticmethod
    def unpack(kept: Any) -> torch.Tensor:
        """The hook that autograd calls for the backward pass."""
        return dequantise(kept.entry.packed).view(kept.shape) if isinstance(kept, Kept) else kept


def _compressible(x: torch.Tensor) -> bool:
    base = x._base if x._base is not None else x
    if isinstance(base, nn.Parameter) or (x.is_leaf and x.requires_grad):
        return False
    return x.is_floating_point() and x.numel() >= LEAST_VALUES and x.shape[-1] > 1 and x.device.type == "cpu"


@contextmanager
def compressed_activations(setting: Setting | None = None, packer: Packer | None = None) -> Iterator[Packer]:
    """Keep what autograd saves inside the block in few bits: `with compressed_activations(Setting(groups=12)): ...`.

    Give the `packer` of an earlier block to go on with its running ranges.
    """
    used = packer or Packer(setting or Setting())
    used.begin(torch.is_grad_enabled())
    with saved_tensors_hooks(used.pack, used.unpack):
        yield used


class MatMul(nn.Module):
    """a @ b as a module, so that `compress` finds the products of an explicit attention."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(..., m, k) by (..., k, n)."""
        return a @ b


TAGS: dict[str, tuple[type[nn.Module], ...]] = {
    "fc": (nn.Linear,),
    "matmul": (MatMul,),
    "softmax": (nn.Softmax,),
    "gelu": (nn.GELU,),
    "relu": (nn.ReLU,),
    "layernorm": (nn.LayerNorm,),
    "bn": (nn.BatchNorm1d, nn.BatchNorm2d),
    "conv": (nn.Conv2d,),
}


@dataclass(frozen=True)
class Rule:
    """One line of a policy, applied in order: the modules of a kind (a tag of `TAGS`), all or those at the positions
    `index` in the order of the model, are kept with `bits` and `decay`, or not at all (`enable` off)."""

    tag: str
    index: Sequence[int] | None = None
    enable: bool = True
    bits: int | None = None
    decay: float | None = None


class _Compressed(nn.Module):
    """Holds the running ranges of one module as part of the model's state."""

    def __init__(self, setting: Setting, heads_first: bool) -> None:
        super().__init__()
        self.packer = Packer(setting, heads_first)
        self.running: list[saved_tensors_hooks] = []  # one per forward pass that is under way

    def get_extra_state(self) -> dict[str, dict[int, torch.Tensor]]:
        """The ranges, for `state_dict`."""
        return {"low": dict(self.packer.ranges.low), "range": dict(self.packer.ranges.span)}

    def set_extra_state(self, state: dict[str, dict[int, torch.Tensor]]) -> None:
        """The ranges of a `state_dict`."""
        self.packer.ranges = Ranges(dict(state["low"]), dict(state["range"]))


def _enter(module: nn.Module, inputs: Any) -> None:
    kept = module.get_submodule("kept_activations")
    assert isinstance(kept, _Compressed)
    kept.packer.begin(module.training)
    kept.running.append(saved_tensors_hooks(kept.packer.pack, kept.packer.unpack))
    kept.running[-1].__enter__()


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    kept = module.get_submodule("kept_activations")
    assert isinstance(kept, _Compressed)
    kept.running.pop().__exit__(None, None, None)


def _wrap(module: nn.Module, setting: Setting) -> None:
    module.add_module("kept_activations", _Compressed(setting, isinstance(module, MatMul)))
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


def compress(model: nn.Module, setting: Setting | None = None, policy: Sequence[Rule] = ()) -> nn.Module:
    """Keep the activations of a model's layers (kinds in `TAGS`) in few bits while it trains; changes `model`.

    `setting.groups` is the number of heads, whose channels get a range each. `policy` changes or excludes layers.
    Raises UnknownNameError for an unknown tag, InputError for positions a model has not, for groups that divide no
    layer's channels, and for a model that is compressed already.
    """
    base = setting or Setting()
    if any(isinstance(module, _Compressed) for module in model.modules()):
        raise InputError(f"{type(model).__name__} keeps its activations compressed already; compress a model once.")
    chosen: dict[nn.Module, Setting | None] = {}
    by_tag: dict[str, list[nn.Module]] = {}
    for tag, kinds in TAGS.items():
        by_tag[tag] = [module for module in model.modules() if isinstance(module, kinds)]
        chosen.update(dict.fromkeys(by_tag[tag], base))
    if not chosen:
        raise InputError(f"{type(model).__name__} has no layers of the kinds {', '.join(TAGS)}; nothing to compress.")
    linear = [module for module in by_tag["fc"] if isinstance(module, nn.Linear)]
    if linear and all(module.in_features % base.groups for module in linear):
        widths = sorted({module.in_features for module in linear})
        raise InputError(f"{base.groups} groups divide no linear layer's inputs, which are {widths}; choose a divisor.")
    for rule in policy:
        if rule.tag not in TAGS:
            raise UnknownNameError("tag of layers", rule.tag, TAGS)
        places = range(len(by_tag[rule.tag])) if rule.index is None else rule.index
        for place in places:
            if not 0 <= place < len(by_tag[rule.tag]):
                raise InputError(
                    f"The model has {len(by_tag[rule.tag])} {rule.tag} layers; there is no number {place}."
                )
            bits = base.bits if rule.bits is None else rule.bits
            decay = base.decay if rule.decay is None else rule.decay
            changed = Setting(bits, base.groups, decay, base.rounding, base.share, base.seed)
            chosen[by_tag[rule.tag][place]] = changed if rule.enable else None
    for number, (module, each) in enumerate(chosen.items()):
        if each is not None:
            seed = each.seed * 65_537 + number
            _wrap(module, Setting(each.bits, each.groups, each.decay, each.rounding, each.share, seed))
    return model
