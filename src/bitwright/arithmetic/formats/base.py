"""Number formats: how a real tensor becomes codes and scales, what the codes mean, and exact products of them.

Every format stores x (..., k), whose last axis is the one a matrix product sums over, as integer codes and scales:
x ~ (integers(codes) - zero) * scale. `integers` is exact and small, so that products of codes are integer products:
a floating-point code is its significand in units of the format's smallest subnormal number.

A format is one module: a frozen dataclass with the methods of `NumberFormat`, and a line in `FAMILIES` of the package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import InputError

Array = Any  # a numpy array or a torch tensor
Granularity = str | int  # "none", "tensor", "row" (one scale per vector along the last axis), or a group size


@dataclass(frozen=True)
class Encoded:
    """Codes of a tensor: x ~ (integers(codes) - zero) * scale, scales repeated over their groups.

    `codes`: integers (..., padded k), the last axis filled up to whole groups or pairs; `scale`: float32 (..., groups),
    each for padded k / groups consecutive codes, or shape () for one scale; `zero`: integers of the shape of `scale`,
    or None for 0; `shape`: that of x.
    """

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32] | None
    shape: tuple[int, ...]


class NumberFormat(Protocol):
    """What every number format does."""

    @property
    def name(self) -> str:
        """The text that `formats.parse` turns into this format."""

    @property
    def code_bits(self) -> int:
        """Bits of one code, scales aside."""

    @property
    def operand(self) -> str | None:
        """What a code is to a hardware product (`engine.format_products.OperandKind`), None when there is none yet."""

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Stored bits of a tensor of that shape over its elements: codes, padding, scales and zero points."""

    def encode(self, x: Array) -> Encoded:
        """Round x (..., k) to codes. Raises InputError for what the format has no code for (NaN, infinities)."""

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """What codes (..., padded k) mean before zero and scale."""

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """The tensor the codes stand for, in its original shape."""

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """All bytes that are stored, codes first."""

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The codes and scales of a tensor of that shape. Raises InputError for another number of bytes."""


def decode_table(integers: NDArray[np.int64], encoded: Encoded) -> NDArray[np.float32]:
    """Values of byte codes through the 256 integers they mean, times their scales, in the original shape."""
    real = np.empty(encoded.codes.size, np.float32)
    codes = np.ascontiguousarray(encoded.codes).reshape(-1)
    _native.decode_codes(codes, integers.astype(np.float32), np.ascontiguousarray(encoded.scale).reshape(-1), real)
    return in_shape(real, encoded)


def in_shape(real: NDArray[np.float32], encoded: Encoded) -> NDArray[np.float32]:
    """Decoded values in the shape the tensor had, without the zeros that fill its last groups."""
    real = real.reshape(encoded.codes.shape)
    return real if real.shape == encoded.shape else np.ascontiguousarray(real[..., : encoded.shape[-1]])


def fake_quantise(number_format: NumberFormat, x: Array) -> Array:
    """x rounded to what the format can represent: same kind (numpy or torch), dtype, device and shape.

    Raises InputError where rounding leaves the range of x's own type.
    """
    _, restore = as_numpy(x)
    with np.errstate(over="ignore"):
        made = number_format.decode(number_format.encode(x))
        largest = float(np.abs(made).max())
        if not largest <= _largest_of(x):
            raise InputError(f"{number_format.name} rounds a value beyond the range of {x.dtype}; scale it down.")
        return restore(made)


def _largest_of(x: Array) -> float:
    """The largest number of x's type that float32 holds as well."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return min(float(torch.finfo(x.dtype).max), float(np.finfo(np.float32).max))
    return min(float(np.finfo(x.dtype).max), float(np.finfo(np.float32).max))


def matmul(left_format: NumberFormat, left: Encoded, right_format: NumberFormat, right: Encoded) -> NDArray[np.float32]:
    """left (m, k) @ right (n, k)^T from codes: integer sums inside a scale group, groups added in float32 in order.

    Codes whose products are not those of integers (L-Mul) meet their own kind only. Groups of both operands must divide
    one another. Sums that could leave int64 (E5M2 by E5M2) are put together in
    float64 from exact sums of 16-bit halves. Raises InputError for other shapes, and codes that halves do not hold.
    """
    if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[1]:
        raise InputError(f"Product of codes (m, k) and (n, k) asked for; got {left.shape} and {right.shape}.")
    k = left.shape[1]
    table = _own_products(left_format, right_format)
    a, b = (
        _centred(form, item, k) if table is None else item.codes[:, :k].astype(np.int64)
        for form, item in ((left_format, left), (right_format, right))
    )
    size_a, size_b = (_group_size(item, k) for item in (left, right))
    size = min(size_a, size_b)
    if max(size_a, size_b) % size and max(size_a, size_b) < k:
        raise InputError(f"Groups of {size_a} and {size_b} codes do not divide one another.")
    largest = [
        int(np.abs(each).max(initial=0)) for each in ((a, b) if table is None else (table, np.ones(1, np.int64)))
    ]
    wide = largest[0] * largest[1] * min(size, k) >= 1 << 63
    if wide and (max(largest) >= 1 << 46 or k >= 1 << 16):
        raise InputError("Integer sums of these codes do not fit 64 bits; take smaller groups or a narrower format.")
    product = _wide_product if wide else exact_product if table is None else partial(_table_product, table)
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for start in range(0, k, size):
        part = product(a[:, start : start + size], b[:, start : start + size])
        scale_a, scale_b = (
            _rows(item)[:, start // own if _rows(item).shape[1] > 1 else 0]
            for item, own in ((left, size_a), (right, size_b))
        )
        scaled = part.astype(np.float64) * scale_a[:, None].astype(np.float64) * scale_b[None, :].astype(np.float64)
        total += scaled.astype(np.float32)
    return total


def _own_products(left: NumberFormat, right: NumberFormat) -> NDArray[np.int64] | None:
    """Products of all pairs of codes, (256, 256), of formats that have their own."""
    tables = [getattr(form, "products", None) for form in (left, right)]
    if tables[0] is not tables[1]:
        raise InputError(
            f"{left.name} times {right.name}: codes that are multiplied by adding them need the same element on both "
            "sides."
        )
    return tables[0]


def _table_product(table: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros((len(a), len(b)), np.int64)
    for at in range(a.shape[1]):
        total += table[a[:, at, None], b[None, :, at]]
    return total


def exact_product(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """a (m, k) @ b (n, k)^T in int64, through float64 where its 53 bits hold every partial sum."""
    bound = int(np.abs(a).max(initial=0)) * int(np.abs(b).max(initial=0)) * a.shape[1]
    if bound < 1 << 53:
        return np.asarray(np.rint(a.astype(np.float64) @ b.astype(np.float64).T)).astype(np.int64)
    return np.asarray(a @ b.T)


def _wide_product(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """a (m, k) @ b (n, k)^T in float64 from exact sums of products of halves, for integers below 2^46."""
    high_a, high_b, low_a, low_b = a >> 16, b >> 16, a & 0xFFFF, b & 0xFFFF
    high = exact_product(high_a, high_b).astype(np.float64)
    middle = (exact_product(high_a, low_b) + exact_product(low_a, high_b)).astype(np.float64)
    return np.asarray(high * 2.0**32 + (middle * 2.0**16 + exact_product(low_a, low_b)))


@dataclass(frozen=True)
class ErrorStatistics:
    """Rounding error of a tensor: relative mean square error, signal-to-noise ratio (dB), largest absolute error."""

    relative_mse: float
    sqnr_db: float
    largest: float


def error_statistics(number_format: NumberFormat, x: Array) -> ErrorStatistics:
    """How far x moves when it is rounded to the format."""
    real, _ = as_numpy(x)
    error = number_format.decode(number_format.encode(x)).astype(np.float64) - real
    power = float(np.square(real, dtype=np.float64).sum())
    moved = float(np.square(error).sum())
    relative = moved / power if power else (np.inf if moved else 0.0)
    return ErrorStatistics(relative, -10 * np.log10(relative) if relative else np.inf, float(np.abs(error).max()))


def as_numpy(x: Array) -> tuple[NDArray[np.float32], Callable[[NDArray[np.float32]], Array]]:
    """x as float32 on the host, and a function that gives an array of that shape the kind, dtype and device of x.

    Raises InputError for other types, integers and empty tensors.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if not x.is_floating_point() or not x.numel() or not x.dim():
            raise InputError(f"Number formats round floating-point tensors, not {x.dtype} of shape {tuple(x.shape)}.")
        real = x.detach().to("cpu", torch.float32).numpy()
        return real, lambda made: torch.from_numpy(np.ascontiguousarray(made)).to(x.device, x.dtype)
    if not isinstance(x, np.ndarray):
        raise InputError(f"Expected a numpy array or a torch tensor, got {type(x).__name__}.")
    if not np.issubdtype(x.dtype, np.floating) or not x.size or not x.ndim:
        raise InputError(f"Number formats round floating-point tensors, not {x.dtype} of shape {x.shape}.")
    return x.astype(np.float32, copy=False), lambda made: made.astype(x.dtype, copy=False)


def finite(x: Array, name: str) -> NDArray[np.float32]:
    """x as float32 on the host. Raises InputError, naming the format, for NaN and infinite values."""
    real, _ = as_numpy(x)
    bad = int((~np.isfinite(real)).sum())
    if bad:
        raise InputError(
            f"{name} has no code for NaN or infinity; the tensor of shape {real.shape} holds {bad} such values."
        )
    return real


def groups_of(x: NDArray[np.float32], granularity: Granularity, name: str) -> NDArray[np.float32]:
    """x (..., k) as (..., groups, size): what shares a scale. Zeros fill the last group. One scale or none: (1, size).

    Raises InputError for a granularity that is neither "none", "tensor", "row" nor a positive number.
    """
    if granularity in ("tensor", "none"):
        return x.reshape(1, -1)
    if granularity == "row":
        return x[..., None, :]
    if not isinstance(granularity, int) or granularity < 1:
        raise InputError(f"{name}: scales are per tensor, row or group size, or none, not {granularity!r}.")
    missing = -x.shape[-1] % granularity
    if missing:
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, granularity)


def check_granularity(granularity: Granularity, name: str) -> None:
    """Raises InputError for what is neither "none", "tensor", "row" nor a whole number from 1 to 2^31."""
    whole = isinstance(granularity, int) and not isinstance(granularity, bool) and 1 <= granularity < 1 << 31
    if granularity not in ("none", "tensor", "row") and not whole:
        raise InputError(f"{name}: scales are per tensor, row or group of at least one value, not {granularity!r}.")


def check_packed(packed: NDArray[np.uint8], shape: tuple[int, ...], name: str) -> None:
    """Raises InputError for bytes that are no flat uint8 array, and for shapes without values."""
    if not isinstance(packed, np.ndarray) or packed.dtype != np.uint8 or packed.ndim != 1:
        raise InputError(f"{name}: packed bytes are a flat uint8 array, not {type(packed).__name__}.")
    if not shape or min(shape) < 1:
        raise InputError(f"{name}: a tensor of shape {shape} holds nothing; expected at least one value.")


def check_scales(scale: NDArray[np.float32], name: str) -> None:
    """Raises InputError for scales that no encoder makes: NaN, infinite or negative."""
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise InputError(f"{name}: the packed scales hold NaN, infinity or negative numbers; the bytes are damaged.")


def scale_count(shape: tuple[int, ...], granularity: Granularity) -> int:
    """How many scales a tensor of that shape stores."""
    if granularity in ("tensor", "none"):
        return int(granularity == "tensor")
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return rows if granularity == "row" else rows * -(-shape[-1] // int(granularity))


def padded_size(shape: tuple[int, ...], granularity: Granularity) -> int:
    """How many codes a tensor of that shape has, the padding of its last groups included."""
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    return rows * (shape[-1] if isinstance(granularity, str) else -(-shape[-1] // granularity) * granularity)


def pack_codes(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes of `bits` (1 to 16) as one little-endian bit string: code i takes bits i*bits .. i*bits+bits-1."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 8:
        return flat.astype(np.uint8)
    if bits > 8:
        stream = (flat.astype(np.uint16)[:, None] >> np.arange(bits, dtype=np.uint16)) & 1
        return np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")
    mask = np.uint8((1 << bits) - 1)
    eights = np.pad(flat.astype(np.uint8) & mask, (0, -flat.size % 8)).reshape(-1, 8)
    words = np.zeros(len(eights), "<u8")  # eight codes are `bits` bytes
    for place in range(8):
        words |= eights[:, place].astype(np.uint64) << np.uint64(place * bits)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(packed).reshape(-1)[: -(-flat.size * bits // 8)]


def unpack_codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """The inverse of `pack_codes` for `count` codes. Raises InputError for another number of bytes."""
    if packed.dtype != np.uint8 or packed.size != -(-count * bits // 8):
        raise InputError(
            f"{count} codes of {bits} bits are {-(-count * bits // 8)} bytes, not {packed.size} of {packed.dtype}."
        )
    if bits == 8:
        return packed.astype(np.uint16)
    if bits > 8:
        stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits).astype(np.uint16)
        return np.asarray((stream << np.arange(bits, dtype=np.uint16)).sum(axis=1, dtype=np.uint16))
    eights = np.zeros((-(-count // 8), 8), np.uint8)
    eights[:, :bits] = np.pad(packed, (0, -packed.size % bits)).reshape(-1, bits)
    words, codes = eights.view("<u8")[:, 0], np.empty((len(eights), 8), np.uint16)
    mask = np.uint64((1 << bits) - 1)
    for place in range(8):
        codes[:, place] = (words >> np.uint64(place * bits)) & mask
    return codes.reshape(-1)[:count]


def _grouped(integers: NDArray[np.int64], scale: NDArray[np.float32]) -> NDArray[np.int64]:
    if scale.ndim == 0:
        return integers.reshape(-1)
    return integers.reshape(*scale.shape, -1)


def _centred(number_format: NumberFormat, encoded: Encoded, k: int) -> NDArray[np.int64]:
    integers = number_format.integers(encoded.codes)
    if encoded.zero is not None:
        integers = (_grouped(integers, encoded.scale) - encoded.zero[..., None]).reshape(integers.shape)
    return integers[:, :k]


def _rows(encoded: Encoded) -> NDArray[np.float32]:
    if encoded.scale.ndim == 0:
        return np.broadcast_to(encoded.scale, (encoded.shape[0], 1))
    return encoded.scale


def group_size(number_format: NumberFormat) -> int | None:
    """How many consecutive values share a scale; None where a whole row or tensor does."""
    found = getattr(number_format, "block", None) or getattr(number_format, "granularity", None)
    return found if isinstance(found, int) else None


def _group_size(encoded: Encoded, k: int) -> int:
    return (
        k
        if encoded.scale.ndim == 0 or encoded.scale.shape[-1] == 1
        else (encoded.codes.shape[-1] // encoded.scale.shape[-1])
    )
