"""Post-training quantisation of a network to outlier-victim pairs, weights and activations (OliVe).

Every linear layer keeps its weights as packed pairs with one scale per output channel, found by least squares. Its
inputs are rounded with one scale per layer, found on the first batch of the calibration and fixed from then on. The
head of a language model and the products of attention stay as they are, as in the released quantiser.

For comparison, the same layers can hold plain integers of the same granularity: `scheme` "absmax" (the largest
magnitude is the top of the range) or "clipped" (the scale of least squared error).

Source: arXiv 2304.07493 (ISCA 2023), section on the post-training quantisation framework.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.arithmetic.formats.base import Encoded, NumberFormat, finite
from bitwright.arithmetic.formats.elements import IntegerElement
from bitwright.arithmetic.formats.outlier_victim import (
    SEARCH,
    Keep,
    Normal,
    OutlierVictimPairs,
    best_pairs,
    clipping_search,
)
from bitwright.arithmetic.formats.outlier_victim_products import exponent_integer_matmul
from bitwright.arithmetic.formats.scaled import Scaled
from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.format_products import Accumulation, Operand, product
from bitwright.models.replacement import refuse_joint_projections, refuse_loading, replace_module

Network = TypeVar("Network", bound=nn.Module)
Scheme = Literal["pairs", "clipped", "absmax"]
NormalType = Literal["int", "flint", "adaptive"]
Form = OutlierVictimPairs | Scaled


@dataclass(frozen=True)
class PairSettings:
    """How layers are rounded. `normal` "adaptive" takes integers or flint, per tensor, whichever has the smaller error
    (4 bits; 8 bits have integers); `eight_bit_exponent` is the number of exponent bits of 8-bit outliers, None for 1 to
    4, per tensor, whichever has the smallest error;
    `search_percent` are the scales tried, in percent of |mean| + 3 deviations, as in `range`."""

    scheme: Scheme = "pairs"
    normal: NormalType = "adaptive"
    keep: Keep = "larger"
    eight_bit_exponent: int | None = 4
    search_percent: tuple[int, int, int] = SEARCH

    def __post_init__(self) -> None:
        if self.scheme not in ("pairs", "clipped", "absmax") or self.normal not in ("int", "flint", "adaptive"):
            raise InputError(
                f"Scheme {self.scheme!r} with normal values {self.normal!r}: expected pairs, clipped or absmax, and "
                "int, flint or adaptive."
            )


@dataclass(frozen=True)
class PairLayer:
    """What was made of one layer: formats, bytes of codes and scales, relative squared error of the weights, and the
    scale of its inputs (None where they are not rounded)."""

    name: str
    weights: str
    weight_bytes: int
    weight_error: float
    activations: str | None
    activation_scale: float | None


class PairLinear(nn.Module):
    """y = round(x) @ weight^T + bias from packed codes; weight (outputs, inputs), one scale per output.

    `packed` holds all that is stored of the weights. With `exact` the product is the datapath's: sums of
    exponent-integer products in int64; otherwise products are exact too, but sums are float32.
    """

    bias: Tensor | None
    packed: Tensor
    values: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, form: Form, encoded: Encoded, inputs: Form | None,
        input_scale: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.form, self.inputs, self.input_scale = form, inputs, input_scale
        packed = form.pack(encoded)
        self.register_buffer("packed", torch.from_numpy(packed))
        stored = form.unpack(packed, (self.out_features, self.in_features))  # the product reads what is stored
        self.register_buffer("values", torch.from_numpy(_integers(form, stored)), persistent=False)
        self.register_buffer("scale", torch.from_numpy(stored.scale.reshape(-1, 1).copy()), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.exact = False
        refuse_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), the dtype of x. Raises InputError for NaN and infinities."""
        rows = x.reshape(-1, self.in_features).float()
        if self.inputs is None or self.input_scale is None:
            out = product(Operand(rows), Operand(self.values, self.scale), Accumulation())
        elif self.exact and isinstance(self.form, OutlierVictimPairs) and isinstance(self.inputs, OutlierVictimPairs):
            out = self._exact(self.form, self.inputs, rows)
        else:
            values = torch.from_numpy(_rounded(self.inputs, rows.cpu().numpy(), self.input_scale)).to(x.device)
            out = product(Operand(values, bf16=True), Operand(self.values, self.scale, bf16=True), Accumulation())
            out = out * self.input_scale
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _exact(self, form: OutlierVictimPairs, inputs: OutlierVictimPairs, rows: Tensor) -> Tensor:
        assert self.input_scale is not None
        weights = form.unpack(self.packed.cpu().numpy(), (self.out_features, self.in_features))
        codes = inputs.encode(rows.cpu().numpy(), np.array([self.input_scale], np.float32)).codes
        sums = exponent_integer_matmul(inputs, codes, form, weights.codes)
        scaled = sums * np.float64(self.input_scale) * weights.scale.reshape(1, -1).astype(np.float64)
        return torch.from_numpy(scaled.astype(np.float32)).to(rows.device)


class TrainedPairs(nn.Module):
    """Rounds x (..., k) to the values of a format while a network is trained, with a learned scale (rows,) or ().

    The gradient passes to x as it is; that of the scale is the sum of (rounded - x / scale) times the gradient, as in
    the released code. The scale starts at the searched one. `x` gives its shape.
    """

    def __init__(self, form: OutlierVictimPairs, x: Tensor) -> None:
        super().__init__()
        if form.granularity not in ("row", "tensor"):
            raise InputError(f"Scales are learned per row or tensor, not per {form.granularity!r}.")
        self.form = form
        found = form.encode(x).scale
        self.scale = nn.Parameter(torch.from_numpy(found.copy() if found.ndim else found.reshape(()).copy()))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) -> the same shape. Raises InputError for scales that training made 0 or negative."""
        scaled = x / self.scale
        ones = np.ones(max(1, self.scale.numel()), np.float32)
        with torch.no_grad():
            if not bool((self.scale > 0).all()):
                raise InputError("Training made a scale 0 or negative; take a smaller step.")
            rounded = torch.from_numpy(self.form.decode(self.form.encode(scaled, ones))).to(x.device)
        return (scaled + (rounded - scaled).detach()) * self.scale


def _integers(form: Form, encoded: Encoded) -> NDArray[np.float32]:
    """Codes (rows, k) as float32 integers, the padding left out."""
    values: NDArray[np.float32] = form.integers(encoded.codes).astype(np.float32)
    return np.ascontiguousarray(values[..., : encoded.shape[-1]])


def _rounded(form: Form, rows: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """rows (m, k) in units of `scale`, rounded to the values of the format."""
    given = np.array([scale], np.float32)
    if isinstance(form, OutlierVictimPairs):
        encoded = form.encode(rows, given)
        return form.decode(replace(encoded, scale=np.ones((), np.float32)))
    top = np.float32((1 << (form.code_bits - 1)) - 1)
    rounded: NDArray[np.float32] = np.clip(np.rint(finite(rows, form.name) / given), -top, top)
    return rounded


def _choices(bits: int, settings: PairSettings, granularity: str, signed: bool) -> list[OutlierVictimPairs]:
    """Formats that settings leave open; flint needs a sign."""
    signed = signed or (settings.normal == "flint" and bits == 4)
    made = OutlierVictimPairs(bits, granularity, settings.keep, search_percent=settings.search_percent, signed=signed)
    if not signed and bits == 4:
        return [made]
    if bits == 8:
        chosen = settings.eight_bit_exponent
        return [replace(made, exponent_bits=e, bias=None) for e in ((1, 2, 3, 4) if chosen is None else (chosen,))]
    normals: tuple[Normal, ...] = ("int", "flint") if settings.normal == "adaptive" else (settings.normal,)
    return [replace(made, normal=each, bias=None) for each in normals]


def quantise(x: NDArray[np.float32], bits: int, settings: PairSettings, granularity: str) -> tuple[Form, Encoded]:
    """x (..., k) in the format that `settings` ask for, scales per "row" or "tensor". Raises InputError for other than
    4 or 8 bits, NaN and infinities."""
    if settings.scheme == "pairs":
        return best_pairs(_choices(bits, settings, granularity, signed=bool((x < 0).any())), x)
    if bits not in (4, 8):
        raise InputError(f"Linear layers take weights and activations of 4 or 8 bits, not {bits}.")
    plain = Scaled(IntegerElement(bits), granularity)
    if settings.scheme == "absmax":
        return plain, plain.encode(x)
    rows = finite(x, plain.name).reshape((1, -1) if granularity == "tensor" else (-1, x.shape[-1]))
    scale = clipping_search(rows, bits)
    codes = plain.element.encode(rows, scale).reshape(x.shape)
    return plain, Encoded(codes, scale.reshape(()) if granularity == "tensor" else scale.reshape(*x.shape[:-1], 1),
                          None, x.shape)  # fmt: skip


def apply(
    model: Network,
    weight_bits: int = 4,
    activation_bits: int | None = 4,
    calibration: Callable[[Network], Any] | None = None,
    settings: PairSettings | None = None,
    eight_bit: Collection[str] = (),
    keep_float: Collection[str] = ("lm_head",),
) -> tuple[Network, tuple[PairLayer, ...]]:
    """A copy of `model`, in evaluation mode, whose linear layers hold outlier-victim pairs, and what was done.

    `calibration` runs the model; the first batch that reaches a layer gives its scale. `activation_bits` None rounds
    weights only. Layers whose names end in one of `keep_float` are left alone, those in `eight_bit` get 8 bits on both
    sides. `nn.Linear` and the Conv1D of GPT-2 (weights (inputs, outputs)) are replaced; other parameters are shared.

    Raises InputError for other than 4 or 8 bits, missing or needless calibration, names that the model does not have,
    layers that the calibration does not reach, `nn.MultiheadAttention`, NaN and infinities; BitwrightError for a model
    without linear layers.
    """
    settings = PairSettings() if settings is None else settings
    refuse_joint_projections(model)
    if (activation_bits is None) != (calibration is None):
        raise InputError("Rounded activations, and only they, need a function that runs the model on calibration data.")
    for bits in (weight_bits, *([] if activation_bits is None else [activation_bits])):
        if bits not in (4, 8):
            raise InputError(f"Linear layers take weights and activations of 4 or 8 bits, not {bits}.")
    layers = {name: module for name, module in model.named_modules()
              if _weight(module) is not None and not any(_ends(name, last) for last in keep_float)}  # fmt: skip
    if not layers:
        raise BitwrightError(f"{type(model).__name__} has no linear layers to hold outlier-victim pairs.")
    unknown = sorted(set(eight_bit) - set(layers))
    if unknown:
        raise InputError(f"Layers {', '.join(unknown)} asked for in 8 bits; the model has {', '.join(layers)}.")
    inputs: dict[str, tuple[Form, float]] = {}
    if calibration is not None and activation_bits is not None:
        wanted = {name: 8 if name in eight_bit else activation_bits for name in layers}
        inputs = _input_scales(model, layers, wanted, calibration, settings)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin, made = copy.deepcopy(model, memo=dict(shared)), []
    for name, module in layers.items():
        weight = _weight(module)
        assert weight is not None
        real = weight.detach().float().cpu().numpy()
        form, encoded = quantise(real, 8 if name in eight_bit else weight_bits, settings, "row")
        input_form, input_scale = inputs.get(name, (None, None))
        layer = PairLinear(weight, module.bias, form, encoded, input_form, input_scale)
        twin = replace_module(twin, name, layer)
        made.append(PairLayer(name, form.name, layer.packed.numel(), _relative_error(form, encoded, real),
                              input_form.name if input_form else None, input_scale))  # fmt: skip
    return twin.eval(), tuple(made)


def _ends(name: str, last: str) -> bool:
    return name == last or name.endswith("." + last)


def _weight(module: nn.Module) -> Tensor | None:
    """Weights (outputs, inputs) of a linear layer, None of another module."""
    if isinstance(module, nn.Linear):
        return module.weight
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.t().contiguous()  # type: ignore[operator]
    return None


def _input_scales(
    model: Network,
    layers: dict[str, nn.Module],
    bits: dict[str, int],
    calibration: Callable[[Network], Any],
    settings: PairSettings,
) -> dict[str, tuple[Form, float]]:
    """Format and scale of the inputs of every layer, from the first batch that reaches it."""
    found: dict[str, tuple[Form, float]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if name not in found:
                real = arguments[0].detach().float().cpu().numpy()
                form, encoded = quantise(real, bits[name], settings, "tensor")
                found[name] = form, float(encoded.scale)

        return seen

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        with torch.inference_mode():
            calibration(model)
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(layers) - set(found))
    if missing:
        raise InputError(f"The calibration does not reach {', '.join(missing)}; keep them in floating point.")
    return found


def _relative_error(form: NumberFormat, encoded: Encoded, real: NDArray[np.float32]) -> float:
    power = float(np.square(real, dtype=np.float64).sum())
    return float(np.square(form.decode(encoded).astype(np.float64) - real).sum()) / power if power else 0.0
