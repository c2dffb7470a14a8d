"""Products of torch tensors in number formats: rounding, exact kernels, accumulators of few bits, attention.

Rounded values of most formats of 8 bits and fewer are exact in bfloat16, and codes of integers in int8; such products
run on the bfloat16 and int8 instructions of the processor, which add in float32 and int32, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.arithmetic import formats, logarithmic_multiplication
from bitwright.arithmetic.formats.base import Encoded, NumberFormat
from bitwright.arithmetic.formats.elements import IntegerElement
from bitwright.arithmetic.formats.integer import AsymmetricInteger
from bitwright.arithmetic.formats.logarithmic import LogarithmicElement
from bitwright.arithmetic.formats.scaled import Scaled
from bitwright.core.errors import InputError
from bitwright.models.integer import MAX_INNER, integer_matmul

ACCUMULATORS = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """Rows (rows, k) of a product: `values`, float32 or int8, times `scale` (rows, 1), or 1 where there is none.

    `bf16` says that the values are exact in bfloat16; `adder`: that they are codes multiplied by adding them (L-Mul).
    """

    values: Tensor
    scale: Tensor | None = None
    bf16: bool = False
    adder: LogarithmicElement | None = None

    @property
    def real(self) -> Tensor:
        """What the operand stands for, float32."""
        values = self.values.float()
        return values if self.scale is None else values * self.scale


@dataclass(frozen=True)
class Accumulation:
    """Running sums of a product: None is float32; else sums of `size` products are added and rounded to `dtype`.

    Values beyond the largest finite number saturate.
    """

    dtype: torch.dtype | None = None
    size: int = 32

    @property
    def name(self) -> str:
        """What `parse` makes this of."""
        return next((f"{name}/{self.size}" for name, dtype in ACCUMULATORS.items() if dtype == self.dtype), "fp32")

    @staticmethod
    def parse(text: str) -> Accumulation:
        """From "fp32", "bf16", "fp8_e4m3/16". Raises InputError for anything else."""
        name, slash, size = text.partition("/")
        if text == "fp32":
            return Accumulation()
        if name not in ACCUMULATORS or (slash and not (size.isdigit() and int(size))):
            raise InputError(
                f"Accumulation in {text!r} asked for; expected fp32, or one of {', '.join(ACCUMULATORS)}, rounded "
                'after every 32 products or every n with "/n".'
            )
        return Accumulation(ACCUMULATORS[name], int(size) if slash else 32)

    def round(self, sums: Tensor) -> Tensor:
        """`sums` rounded to the accumulator's format, float32."""
        if self.dtype is None:
            return sums
        top = torch.finfo(self.dtype).max
        return sums.clamp(-top, top).to(self.dtype).float()


@dataclass(frozen=True)
class Rounding:
    """Rounds tensors (..., k) to one format along the last axis; without a format it leaves them."""

    form: NumberFormat | None = None

    def __call__(self, rows: Tensor) -> Operand:
        """`rows` (rows, k) float32 as an operand."""
        if self.form is None:
            return Operand(rows)
        if isinstance(self.form, Scaled) and isinstance(self.form.granularity, str):
            return self._one_scale(self.form, rows)
        values = self.values(rows)
        return Operand(values, bf16=bool((values.bfloat16().float() == values).all()))

    @staticmethod
    def _one_scale(form: Scaled, rows: Tensor) -> Operand:
        encoded = form.encode(rows)
        scale = torch.from_numpy(encoded.scale.reshape(-1, 1)).to(rows.device)
        if isinstance(form.element, LogarithmicElement):
            unit = np.float32(form.element.unit)
            values = torch.from_numpy(form.integers(encoded.codes) * unit).float().to(rows.device)
            return Operand(values, scale / float(unit), adder=form.element)
        if isinstance(form.element, IntegerElement):
            return Operand(torch.from_numpy(encoded.codes.view(np.int8)).to(rows.device), scale)
        ones = Encoded(encoded.codes, np.ones((), np.float32), None, encoded.shape)
        return Operand(torch.from_numpy(form.decode(ones)).to(rows.device), scale, bf16=True)

    def values(self, x: Tensor) -> Tensor:
        """x (..., k) rounded: same shape and dtype."""
        if self.form is None:
            return x
        rounded: Tensor = formats.fake_quantise(self.form, x)
        return rounded


@cache
def rounding(name: str) -> Rounding:
    """The rounding of a format by its name."""
    return Rounding(formats.parse(name))


def product(x: Operand, weight: Operand, accumulation: Accumulation) -> Tensor:
    """x (m, k) @ weight (n, k)^T, float32: exact products, or L-Mul where both operands are of its kind; sums as
    `accumulation` says. Raises InputError for only one operand of that kind."""
    if x.adder or weight.adder:
        return _added(x, weight, accumulation)
    if accumulation.dtype is not None:
        left, right = x.real, weight.real
        total = left.new_zeros(left.shape[0], right.shape[0])
        for start in range(0, left.shape[1], accumulation.size):
            chunk = slice(start, start + accumulation.size)
            total = accumulation.round(total + left[:, chunk] @ right[:, chunk].t())
        return total
    if x.values.dtype == weight.values.dtype == torch.int8 and x.values.shape[-1] <= MAX_INNER:
        sums = integer_matmul(x.values, weight.values.t()).float()
    elif x.bf16 and weight.bf16:
        with _bfloat16_kernels():
            sums = functional.linear(x.values, weight.values)
    else:
        return functional.linear(x.real, weight.real)
    if x.scale is not None:
        sums.mul_(x.scale)
    return sums if weight.scale is None else sums.mul_(weight.scale.t())


def _added(x: Operand, weight: Operand, accumulation: Accumulation) -> Tensor:
    if x.adder is None or x.adder != weight.adder:
        raise InputError("Codes that are multiplied by adding them (lmul_e4m3, ...) need the same on both sides.")
    left, right = x.values.cpu().numpy(), weight.values.t().cpu().numpy()
    made = logarithmic_multiplication.matmul(
        left, right, x.adder.mantissa_bits, threads=torch.get_num_threads(), accumulation=accumulation.name,
        exponents=x.adder.name.removeprefix("lmul_"),
    )  # fmt: skip
    sums = torch.from_numpy(made).to(x.values.device)
    for scale in (x.scale, None if weight.scale is None else weight.scale.t()):
        if scale is not None:
            sums.mul_(scale)
    return sums


@contextmanager
def _bfloat16_kernels() -> Iterator[None]:
    """Let float32 products, whose operands are exact in bfloat16, run on bfloat16 instructions (float32 sums)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def code_product(x_format: NumberFormat, weight_format: NumberFormat, rows: Tensor, codes: Encoded) -> Tensor:
    """rows (m, k), encoded, times codes (n, k): `formats.matmul`, on the device of `rows`."""
    made = formats.matmul(x_format, x_format.encode(rows), weight_format, codes)
    return torch.from_numpy(made).to(rows.device)


def _each_head(
    multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, width: int
) -> Tensor:  # fmt: skip
    """multiply(left[b, g] (m, k), right[b, g] (n, k)) of every batch and key-value head: (batch, kv_heads, m, n)."""
    out = torch.empty(*left.shape[:3], width, device=left.device)
    for b in range(left.shape[0]):
        for g in range(left.shape[1]):
            out[b, g] = multiply(left[b, g], right[b, g])
    return out


def _multiplier(
    left: str | None, right: str | None, accumulation: str, exact: bool
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    if exact and left is not None and right is not None:
        forms = formats.parse(left), formats.parse(right)
        return lambda a, b: code_product(*forms, a, forms[1].encode(b))
    rounds = [Rounding() if name is None else rounding(name) for name in (left, right)]
    sums = Accumulation.parse(accumulation)
    return lambda a, b: product(rounds[0](a), rounds[1](b), sums)


def attention_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    width: float,
    keys: str | None,
    values: str | None,
    attention: str | None,
    accumulation: str,
    exact: bool,
) -> Tensor:
    """softmax(width * query key^T + mask) value, both products in the named formats.

    Shapes as in `format_execution.format_attention`; `mask` broadcasts to (batch, heads, queries, keys), boolean
    (False: hidden) or added.
    """
    batch, heads, queries, channels = query.shape
    value_channels = value.shape[-1]
    kv_heads, tokens = key.shape[1], key.shape[2]
    grouped = (batch, kv_heads, heads // kv_heads * queries)
    left = query.float().reshape(*grouped, channels)
    scores = _each_head(_multiplier(attention, keys, accumulation, exact), left, key.float(), tokens) * width
    scores = scores.reshape(batch, heads, queries, tokens)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).reshape(*grouped, tokens)
    integers, scale = _value_parts(None if attention is None else values, value.float())
    if attention is None and values is not None:
        integers = rounding(values).values(integers)
    size = value_channels // scale.shape[-1]
    mixed = torch.empty(*grouped, value_channels, device=query.device)
    # integers times integers: the values' codes need no rounding
    multiply = _multiplier(attention, None, accumulation, False)
    adder = _adder(values)
    if attention is not None and adder is not None:
        integers, scale = integers * adder.unit, scale / adder.unit
        multiply = _times_codes(attention, adder, accumulation)
    elif exact and attention is not None and values is not None:
        multiply = _times_integers(attention)
    for part in range(scale.shape[-1]):
        chosen = slice(part * size, (part + 1) * size)
        folded = weights * scale[..., part].unsqueeze(2)
        mixed[..., chosen] = _each_head(multiply, folded, integers[..., chosen].transpose(2, 3), size)
    return mixed.reshape(batch, heads, queries, value_channels).to(query.dtype)


def _adder(name: str | None) -> LogarithmicElement | None:
    element = None if name is None else getattr(formats.parse(name), "element", None)
    return element if isinstance(element, LogarithmicElement) else None


def _times_codes(name: str, adder: LogarithmicElement, accumulation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Product of probabilities (m, k), rounded to the format, and values (n, k) of codes that are added."""
    rounds, sums = rounding(name), Accumulation.parse(accumulation)
    return lambda a, b: product(rounds(a), Operand(b.contiguous(), adder=adder), sums)


def _times_integers(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Product of probabilities (m, k), rounded to the format, and integers (n, k): sums of codes in int64."""
    form, whole = formats.parse(name), AsymmetricInteger()  # whose integers are its codes

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        codes = np.rint(b.cpu().double().numpy()).astype(np.int64)
        integers = Encoded(codes, np.ones((), np.float32), None, tuple(b.shape))
        return torch.from_numpy(formats.matmul(form, form.encode(a), whole, integers)).to(a.device)

    return multiply


def _value_parts(values: str | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values as integers (batch, kv_heads, tokens, channels) and scales (batch, kv_heads, tokens, groups)."""
    if values is None:
        return value, value.new_ones(*value.shape[:3], 1)
    form = formats.parse(values)
    encoded = form.encode(value)
    integers = form.integers(encoded.codes)
    if encoded.scale.ndim == 0 or integers.shape[-1] % encoded.scale.shape[-1]:
        raise InputError(f"Attention with {form.name} for values needs a scale per token.")
    if encoded.zero is not None:
        integers = integers - np.repeat(encoded.zero, integers.shape[-1] // encoded.zero.shape[-1], axis=-1)
    if integers.shape[-1] != value.shape[-1]:
        raise InputError(f"Groups of {form.name} do not divide a head of {value.shape[-1]} channels.")
    real = torch.from_numpy(integers).to(value.device, torch.float32)
    return real, torch.from_numpy(encoded.scale).to(value.device)
