"""Weights as codes of 1 to 4 or 8 bits with a float16 scale and minimum for every 32 inputs of a row.

Q4_0, Q4_1 and Q8_0 are the block formats of the ggml repository (ggml-common.h); they are taken over exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.models.gguf import GgufFile

GROUP = 32
STORED_TYPES = ("Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True)
class LowBitCodes:
    """w = scale * code + minimum: `codes` uint8 (rows, inputs), `scales` and `minimums` float16 (rows, inputs / 32).

    With 8 bits w = scale * (code - 128), and `minimums` is None.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    minimums: NDArray[np.float16] | None
    bits: int

    def dequantise(self) -> NDArray[np.float32]:
        """The weights, (rows, inputs)."""
        grouped = self.codes.reshape(*self.scales.shape, GROUP).astype(np.float32)
        scales = self.scales[..., None].astype(np.float32)
        if self.minimums is None:
            return (scales * (grouped - 128)).reshape(self.codes.shape)
        return (scales * grouped + self.minimums[..., None].astype(np.float32)).reshape(self.codes.shape)


def stored_codes(file: GgufFile, name: str) -> LowBitCodes:
    """The codes of a GGUF tensor stored as Q4_0, Q4_1 or Q8_0. Raises InputError for other types."""
    tensor = file.tensors[name]
    kind = tensor.type.name
    if kind not in STORED_TYPES:
        raise InputError(
            f"{file.path}: tensor {name!r} is stored as {kind}; the codes of {', '.join(STORED_TYPES)} are run as they "
            "are, others are rounded again: say to how many bits."
        )
    blocks = file.blocks(name)

    def halves(at: int) -> NDArray[np.float16]:
        return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]

    scales = halves(0)
    if kind == "Q8_0":
        return LowBitCodes(np.ascontiguousarray(blocks[..., 2:] ^ 128).reshape(tensor.shape), scales, None, 8)
    minimums = halves(2) if kind == "Q4_1" else (scales * np.float16(-8))
    packed = blocks[..., 4 if kind == "Q4_1" else 2 :]
    codes = np.concatenate((packed & 15, packed >> 4), -1).reshape(tensor.shape)
    return LowBitCodes(codes, scales, minimums, 4)


def round_to_codes(weights: NDArray[np.float32], bits: int, group: int = GROUP) -> LowBitCodes:
    """Weights (rows, inputs) rounded to the nearest code, with a range for every `group` (32, 64, ...) inputs.

    With 2 to 4 bits the range is from the smallest weight to the largest; with 1 bit the two levels are the mean plus
    and minus the mean distance from it; with 8 bits the range is symmetric. Raises InputError for other bits, groups
    that are not multiples of 32 or do not divide a row, weights that are not finite or too large for float16.
    """
    if bits not in (1, 2, 3, 4, 8):
        raise InputError(f"Weights in {bits} bits asked for; expected 1, 2, 3, 4 or 8.")
    if weights.ndim != 2 or group < GROUP or group % GROUP or weights.shape[1] % group:
        raise InputError(f"Weights {weights.shape} in groups of {group} given; groups are multiples of {GROUP} inputs.")
    if not np.isfinite(weights).all():
        raise InputError("Weights hold NaN or infinity.")
    rows, inputs = weights.shape
    grouped = weights.reshape(rows, inputs // group, group)
    if bits == 8:
        scales, minimums = np.abs(grouped).max(-1) / 127, None
    elif bits == 1:
        centre = grouped.mean(-1)
        distance = np.abs(grouped - centre[..., None]).mean(-1)
        scales, minimums = 2 * distance, centre - distance
    else:
        minimums = grouped.min(-1)
        scales = (grouped.max(-1) - minimums) / (2**bits - 1)
    if max(np.abs(each).max() for each in (scales, minimums) if each is not None) > np.finfo(np.float16).max:
        raise InputError("Weights are too large for float16 scales.")
    half = scales.astype(np.float16)
    low = None if minimums is None else minimums.astype(np.float16)
    # Codes for the scales and minimums that are kept; a scale of 0 leaves every code at 0.
    safe = np.where(half > 0, half, np.float16(1)).astype(np.float32)[..., None]
    offset = np.float32(-128) * safe if low is None else low.astype(np.float32)[..., None]
    codes = np.clip(np.rint((grouped - offset) / safe), 0, 2**bits - 1).astype(np.uint8).reshape(rows, inputs)
    repeats = group // GROUP
    return LowBitCodes(
        codes, half.repeat(repeats, 1), None if low is None else low.repeat(repeats, 1), bits
    )  # fmt: skip
