"""Figures with their unit and their evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from numbers import Integral
from typing import Any

from bitwright.core.errors import InputError


class Evidence(StrEnum):
    """How a figure came about."""

    EXECUTED = "executed"  # a program ran on real tensors on this machine, and this was observed
    SYNTHESISED = "synthesised"  # read off gates mapped to a cell library
    SIMULATED = "simulated"  # a cycle-exact or event-exact simulation of a described machine
    PREDICTED = "predicted"  # a model with assumptions
    PUBLISHED = "published"  # somebody else's figure


@dataclass(frozen=True)
class Quantity:
    """A figure a user sees: `value` in `unit` (SI base units or a named count), its evidence, and where it is from."""

    value: float
    unit: str
    evidence: Evidence
    source: str = ""

    def __str__(self) -> str:
        return f"{format_value(self.value, self.unit)} [{self.evidence}]"

    def to_json(self) -> dict[str, Any]:
        """Value, unit and evidence as plain JSON types, and the source when there is one."""
        out: dict[str, Any] = {"value": self.value, "unit": self.unit, "evidence": str(self.evidence)}
        if self.source:
            out["source"] = self.source
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantity:
        """The quantity that `to_json` wrote."""
        return cls(float(data["value"]), data["unit"], Evidence(data["evidence"]), data.get("source", ""))


_PREFIXES = [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""),
             (1e-3, "m"), (1e-6, "u"), (1e-9, "n"), (1e-12, "p"), (1e-15, "f"), (1e-18, "a")]  # fmt: skip
_LONGEST = 64
_POWERS = re.compile(r"(\*\*|\^)\s*[-+(]*\s*\d{2}|(\*\*|\^).*(\*\*|\^)")
_PREFIXED_UNITS = {
    "s",
    "B",
    "B/s",
    "Hz",
    "J",
    "W",
    "FLOP",
    "FLOP/s",
    "OP",
    "OP/s",
    "MAC",
    "MAC/s",
    "J/MAC",
    "m",
    "F",
}


def format_value(value: float, unit: str) -> str:
    """Format a value with three to four significant digits and, for SI units, a prefix: `2.1e-3, "s"` -> `2.1 ms`."""
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    if unit in _PREFIXED_UNITS and value != 0:
        scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s * 0.9995), (_PREFIXES[-1]))
        return f"{value / scale:.4g} {prefix}{unit}"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,} {unit}".strip()
    return f"{value:,.0f} {unit}".strip() if 1e4 <= abs(value) < 1e15 else f"{value:.4g} {unit}".strip()


@cache
def _registry() -> Any:
    import pint  # imported late: building its registry takes a good part of a second

    registry: Any = pint.UnitRegistry()
    for definition in ("FLOP = [floating_point_operation]", "OP = [operation]", "MAC = [multiply_accumulate]",
                       "FLOPS = FLOP / second", "OPS = OP / second", "token = [token]"):  # fmt: skip
        registry.define(definition)
    return registry


def parse_quantity(text: str | float, unit: str) -> float:
    """Read `text` ("2.0 TB/s", "80 GiB", "1.41 GHz") and return its magnitude in `unit`.

    A bare number is refused unless `unit` is empty: a forgotten unit is the commonest mistake in a machine file.

    Raises InputError when the text cannot be read or has another dimension than `unit`.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if unit:
            raise InputError(f'{text!r} has no unit; write for example "{text} {unit}".')
        return float(text)
    if len(str(text)) > _LONGEST or _POWERS.search(str(text)):  # before Pint computes it
        raise InputError(f"Cannot read {str(text)[:_LONGEST]!r} as a quantity in {unit!r}: too long, or a power tower.")
    import pint

    registry = _registry()
    if unit and re.fullmatch(r"[-+.\deE\s]*", str(text)):
        raise InputError(f'{text!r} has no unit; write for example "{text} {unit}".')
    try:
        parsed = registry.Quantity(str(text))
        target = registry.Quantity(1, _spell(unit))
        # Pint's bit is dimensionless, which would let "2 THz" pass as a bandwidth.
        if _information(parsed) != _information(target):
            raise InputError(f"{text!r} is not a quantity in {unit!r}.")
        value = float(parsed.to(target.units).magnitude)
    except InputError:
        raise
    except pint.DimensionalityError:
        raise InputError(f"{text!r} is not a quantity in {unit!r}.") from None
    except Exception as error:  # pint raises tokenizer, syntax, attribute and type errors for malformed text
        raise InputError(f"Cannot read {text!r} as a quantity in {unit!r}: {error}") from None
    if not math.isfinite(value):
        raise InputError(f"{text!r} is not a finite quantity.")
    return value


def _information(quantity: Any) -> float:
    """Power of information (bits or bytes) in a quantity's unit."""
    return float(sum(power for name, power in quantity.unit_items() if name.endswith(("bit", "byte"))))


def _spell(unit: str) -> str:
    return unit.replace("Hz", "hertz") if unit else "dimensionless"


def is_whole(value: object) -> bool:
    """Whether a value is an integer of Python or numpy; True and 2.0 are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
