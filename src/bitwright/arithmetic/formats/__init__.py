"""Number formats by name; see `base` for what each of them does, and `GRAMMAR` for the names."""

from __future__ import annotations

import re
from collections.abc import Callable

from bitwright.arithmetic.formats.base import (
    Encoded,
    ErrorStatistics,
    NumberFormat,
    error_statistics,
    fake_quantise,
    group_size,
    matmul,
)
from bitwright.arithmetic.formats.elements import FLOATS, BipolarElement, IntegerElement, PowerOfTwoElement
from bitwright.arithmetic.formats.integer import AsymmetricInteger
from bitwright.arithmetic.formats.logarithmic import LOGARITHMIC
from bitwright.arithmetic.formats.outlier_victim import named_pairs
from bitwright.arithmetic.formats.scaled import Scaled
from bitwright.arithmetic.formats.shared_exponent import MICROSCALING, block_floating_point, microscaling
from bitwright.core.errors import InputError

__all__ = [
    "FAMILIES", "GRAMMAR", "Encoded", "ErrorStatistics", "NumberFormat", "error_statistics",
    "fake_quantise", "group_size", "matmul", "parse",
]  # fmt: skip


def granularity(text: str | None) -> str | int:
    """ "row" when there is none, a group size where it is a number, else the word itself."""
    return int(text) if text and text.isdigit() else text or "row"


_SCALE = r"(?:/(none|tensor|row|[0-9]{1,9}))?"
# pattern of the name -> the format; each pattern is matched whole
FAMILIES: dict[str, Callable[[re.Match[str]], NumberFormat]] = {
    rf"int([0-9]{{1,3}}){_SCALE}(,fp16)?": lambda found: Scaled(
        IntegerElement(int(found[1])), granularity(found[2]), 16 if found[3] else 32
    ),
    rf"bipolar([0-9]{{1,3}}){_SCALE}(,fp16)?": lambda found: Scaled(
        BipolarElement(int(found[1])), granularity(found[2]), 16 if found[3] else 32
    ),
    rf"shift([0-9]{{1,3}}){_SCALE}(,fp16)?": lambda found: Scaled(
        PowerOfTwoElement(int(found[1])), granularity(found[2]), 16 if found[3] else 32
    ),
    rf"uint([0-9]{{1,3}}){_SCALE}(,fp16)?": lambda found: AsymmetricInteger(
        int(found[1]), granularity(found[2]), 16 if found[3] else 32
    ),
    rf"({'|'.join(FLOATS)}){_SCALE}(,fp16)?": lambda found: Scaled(
        FLOATS[found[1]], granularity(found[2]), 16 if found[3] else 32
    ),
    rf"({'|'.join(LOGARITHMIC)})(?:/(none|tensor|row))?(,fp16)?": lambda found: Scaled(
        LOGARITHMIC[found[1]], granularity(found[2]), 16 if found[3] else 32
    ),
    rf"({'|'.join(MICROSCALING)})(?:_([0-9]{{1,9}}))?": lambda found: microscaling(
        found[1], int(found[2]) if found[2] else None
    ),
    rf"ovp([0-9]{{1,3}})((?:_\w+?)*){_SCALE}": lambda found: named_pairs(
        int(found[1]), found[2], granularity(found[3])
    ),
    r"bfp([0-9]{1,3})_([0-9]{1,9})": lambda found: block_floating_point(int(found[1]), int(found[2])),
}
GRAMMAR = (
    "int4/32 (2 to 8 bits, a scale per 32 values; or /row, /tensor; ,fp16 for half-precision scales), uint4/128 (with "
    "zero points), bipolar4/row (1 to 8 bits, odd integers), shift5/row (powers of two of 3 to 6 bits), "
    f"{', '.join(FLOATS)} (scales as above, or /none), {', '.join(LOGARITHMIC)} (FP8 codes multiplied by adding them, "
    f"/row, /tensor or /none), {', '.join(MICROSCALING)} (blocks of 32, or as in mxfp4_16), "
    "bfp12_32 (4-bit integers and an 8-bit exponent per 32), ovp4 and ovp8 (outlier-victim pairs, scales as above; "
    "with ovp4_flint, ovp4_unsigned, ovp8_e4m3, ovp4_left, ovp4_bias3 for others)"
)


def parse(text: str) -> NumberFormat:
    """The format of that name. Raises InputError, with the grammar, for unknown names."""
    for pattern, make in FAMILIES.items():
        found = re.fullmatch(pattern, text)
        if found:
            return make(found)
    raise InputError(f"Unknown number format {text!r}. Formats are written: {GRAMMAR}.")
