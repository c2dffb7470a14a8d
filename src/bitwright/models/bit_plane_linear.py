"""Linear layers on one-bit planes: weights packed once, inputs rounded and packed at each call, exact integer sums.

`bit_plane_execution(model, 2, 8)` runs every linear layer of a PyTorch model so. With `rounded=True` the same layers
multiply the rounded values as ordinary matrices ("fake quantisation"; sums of odd integers are exact in float64, and
scaled in float32 in the same order), which is what the planes must equal: bit for bit, since any other rounding of a
result moves some input of the next layer to its neighbouring code.

Source: arXiv 2409.17870, arXiv 2508.19087.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.bipolar import BipolarOperand, decode, from_encoded
from bitwright.arithmetic.formats.elements import BipolarElement
from bitwright.core.errors import BitwrightError, InputError
from bitwright.kernels.bit_plane_matmul import LinearWeights, PackedPlanes, linear, quantise
from bitwright.models.replacement import refuse_joint_projections, replace_module

Network = TypeVar("Network", bound=nn.Module)


@torch.library.custom_op("bitwright::bit_plane_linear", mutates_args=())
def bit_plane_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor,
    sums: Tensor,
    bias: Tensor,
    weight_bits: int,
    activation_bits: int,
    share: float,
) -> Tensor:
    """`x` (rows, k) float32, rounded to bipolar integers per row, times blocked planes `words` (int64) with their
    scales, offsets, sums of integers and bias (outputs,): float32 (rows, outputs). CPU only."""
    rows, outputs = quantise(x.detach().contiguous().numpy(), activation_bits, share=share), len(scale)
    planes = PackedPlanes(words.numpy().view(np.uint64), outputs, x.shape[1], weight_bits, "blocked")
    parts = (each.numpy() for each in (scale, offset, sums, bias))
    return torch.from_numpy(linear(LinearWeights(planes, *parts), rows))


@bit_plane_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


class BitPlaneLinear(nn.Module):
    """y = x @ weight^T + bias with bipolar integers on both sides; weights stand for `operand`, (outputs, inputs).

    Inputs have one scale per row (token), `share` of its largest magnitude over 2^activation_bits - 1. With several
    operands, each takes the next inputs, and those have scales of their own.
    Raises InputError for widths outside 1 to 8 and sums that could leave int32.
    """

    def __init__(
        self, operands: list[BipolarOperand], bias: Tensor | None, activation_bits: int, share: float = 1.0
    ) -> None:
        super().__init__()
        self.activation = BipolarElement(activation_bits)
        self.bits, self.share = operands[0].bits, share
        self.sizes = [operand.codes.shape[1] for operand in operands]
        self.in_features, self.out_features = sum(self.sizes), operands[0].codes.shape[0]
        if max(self.sizes) * ((1 << self.bits) - 1) * ((1 << activation_bits) - 1) >= 1 << 31:
            raise InputError(
                f"Sums of {self.bits} x {activation_bits} bit products over {max(self.sizes)} inputs could leave "
                "int32; take groups."
            )
        for place, operand in enumerate(operands):
            plus = None if bias is None or place else bias.detach().float().numpy()
            packed = LinearWeights.of(operand, plus)
            self.register_buffer(f"words{place}", torch.from_numpy(packed.planes.words.view(np.int64)))
            for name in ("scale", "offset", "sums", "bias"):
                self.register_buffer(f"{name}{place}", torch.from_numpy(getattr(packed, name)))
        self.operands: list[BipolarOperand] | None = None

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        weight_bits: int,
        activation_bits: int,
        granularity: str | int = "row",
        share: float = 1.0,
        rounded: bool = False,
    ) -> BitPlaneLinear:
        """Weights rounded to "bipolar<bits>" with a scale per "row", "tensor", or group of that many inputs; with
        `rounded`, ordinary matrices are multiplied in place of planes."""
        form = formats.parse(f"bipolar{weight_bits}/{granularity if isinstance(granularity, str) else 'row'}")
        weight = layer.weight.detach().float()
        size = granularity if isinstance(granularity, int) else weight.shape[1]
        if size < 1:
            raise InputError(f"Groups of {size} inputs asked for.")
        operands = [from_encoded(form, form.encode(part.contiguous())) for part in torch.split(weight, size, dim=1)]
        made = cls(operands, layer.bias, activation_bits, share)
        made.operands = operands if rounded else None
        return made

    @property
    def weight_bytes(self) -> int:
        """Stored bytes of the planes and their scales and offsets."""
        groups = range(len(self.sizes))
        words = sum(getattr(self, f"words{place}").nbytes for place in groups)
        return int(
            words + sum(getattr(self, f"{name}{place}").nbytes for place in groups for name in ("scale", "offset"))
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., inputs) to (..., outputs), the dtype of x. Raises InputError for NaN and infinities."""
        rows = x.reshape(-1, self.in_features).float()
        total: Tensor | None = None
        for place, part in enumerate(torch.split(rows, self.sizes, dim=1)):
            if self.operands is None:
                names = ("words", "scale", "offset", "sums", "bias")
                parts = (getattr(self, f"{name}{place}") for name in names)
                out = bit_plane_linear(part, *parts, self.bits, self.activation.bits, self.share)
            else:
                out = self._values(part, place)
            total = out if total is None else total + out
        assert total is not None
        return total.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _values(self, rows: Tensor, place: int) -> Tensor:
        """The same product from ordinary matrices of the rounded values."""
        assert self.operands is not None
        real = rows.detach().numpy()
        scale = np.abs(real).max(axis=1) / np.float32(self.activation.largest) * np.float32(self.share)
        empty = scale == 0  # rows of zeros: no odd integer is zero, the scale is
        scale = np.where(empty, np.float32(1), np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)
        codes, operand = self.activation.encode(real, scale), self.operands[place]
        scale[empty] = 0
        left, right = decode(codes, self.activation.bits), decode(operand.codes, operand.bits)
        sums = (left.astype(np.float64) @ right.T.astype(np.float64)).astype(np.float32)
        of_weights, bias = (getattr(self, f"{name}{place}").numpy() for name in ("scale", "bias"))
        return torch.from_numpy(of_weights * (scale[:, None] * sums) + bias)


def bit_plane_execution(
    model: Network,
    weight_bits: int,
    activation_bits: int,
    granularity: str | int = "row",
    share: float = 1.0,
    keep: Collection[str] = (),
    rounded: bool = False,
) -> Network:
    """A copy of `model`, in evaluation mode, whose linear layers are `BitPlaneLinear`; other parameters are shared.

    `keep` names layers that stay as they are. Raises BitwrightError for a model without other linear layers, InputError
    for names in `keep` that are no linear layers and for `nn.MultiheadAttention`.
    """
    refuse_joint_projections(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(shared))
    layers = {name: module for name, module in twin.named_modules() if isinstance(module, nn.Linear)}
    unknown = set(keep) - set(layers)
    if unknown:
        raise InputError(f"{', '.join(sorted(unknown))} to be kept: no linear layers of {type(model).__name__}.")
    chosen = {name: layer for name, layer in layers.items() if name not in keep}
    if not chosen:
        raise BitwrightError(f"{type(model).__name__} has no linear layers to run on bit planes.")
    for name, layer in chosen.items():
        made = BitPlaneLinear.of(layer, weight_bits, activation_bits, granularity, share, rounded)
        twin = replace_module(twin, name, made)
    return twin.eval()
