"""Rounding errors of a format on normal data or on the tensors of a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError

EXAMPLES = (
    "int8/row", "int4/row", "int4/32", "uint4/128", "fp8_e4m3/row", "fp8_e5m2/row", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4",
    "mxint8", "bfp16_64", "bfp12_32", "bipolar4/row", "ovp4/row", "ovp8/row",
)  # fmt: skip
_NORMAL = (64, 4096)


@dataclass(frozen=True)
class TensorError:
    """What a tensor loses in a format. `bits` are stored bits per element; `operand` its hardware operand or ""."""

    name: str
    tensor: str
    bits: float
    operand: str
    statistics: formats.ErrorStatistics

    def to_json(self) -> dict[str, Any]:
        """JSON values of every field."""
        found = self.statistics
        exact = bool(np.isinf(found.sqnr_db))
        return {
            "format": self.name, "tensor": self.tensor, "bits_per_element": self.bits, "operand": self.operand or None,
            "relative_mse": found.relative_mse, "sqnr_db": None if exact else float(found.sqnr_db),
            "largest_error": found.largest, "evidence": "executed",
        }  # fmt: skip


def _error(name: str, tensor: str, x: NDArray[np.float32]) -> TensorError:
    form = formats.parse(name)
    statistics = formats.error_statistics(form, x)  # first: it says what is wrong with the tensor
    return TensorError(name, tensor, form.bits_per_element(x.shape), form.operand or "", statistics)


@cache
def _normal() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=_NORMAL).astype(np.float32)


def normal_error(name: str) -> TensorError:
    """On normally distributed values, 64 rows of 4096. Raises InputError for unknown formats."""
    return _error(name, f"normal {_NORMAL[0]} x {_NORMAL[1]}", _normal())


def file_errors(name: str, path: Path, tensor: str | None = None) -> tuple[TensorError, ...]:
    """On the array of a .npy file, or on one tensor or all tensors of two axes of a .safetensors file.

    Raises InputError for unknown formats, files that cannot be read and tensors that are not there or not real.
    """
    formats.parse(name)
    if path.suffix == ".npy":
        if tensor is not None:
            raise InputError(f"{path} holds one array; --tensor chooses one of a .safetensors file.")
        try:
            x = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"Cannot read the array in {path}: {error}") from None
        return (_error(name, path.name, x),)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is neither a .npy nor a .safetensors file.")
    from bitwright.models.safetensors_folder import StoredTensors

    stored = StoredTensors([path])
    names = [tensor] if tensor is not None else [key for key, shape in stored.shapes.items() if len(shape) == 2]
    if tensor is not None and tensor not in stored.shapes:
        raise InputError(f"{path} holds no tensor {tensor!r}; it holds {len(stored.shapes)}, "
                         f"{next(iter(stored.shapes), 'none')!r} first.")  # fmt: skip
    if not names:
        raise InputError(f"{path} holds no tensor of two axes; name one.")
    read = {key: stored.read(key) for key in names}
    for key, values in read.items():
        if not values.is_floating_point():
            raise InputError(f"{path}: {key!r} holds {values.dtype}; number formats round floating-point tensors.")
    return tuple(_error(name, key, values.float().numpy()) for key, values in read.items())
