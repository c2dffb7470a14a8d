"""System 54: ShiftAddViT, a mixture of multiplication primitives (arXiv 2306.06446): exactness, balance, elements."""

from __future__ import annotations

import numpy as np

from bitwright.arithmetic.shift_and_add import masked_sums, shift_matmul
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.standalone_units import Unit, integer_multiplier, product, unit_gates
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.arithmetic.shift_and_add.shift_matmul",
    "bitwright.arithmetic.shift_and_add.masked_sums",
    "bitwright.models.multiplication_primitives.ShiftLinear",
    "bitwright.models.multiplication_primitives.BinaryLinearAttention",
    "bitwright.models.multiplication_primitives.MixtureOfPrimitives",
)
_REFERENCE = "reference mappings with open tools, OSU018, independent of this package and not of the paper"
_EXACT = "follows from the definitions of arXiv 2306.06446"
# area and area efficiency (area x period) over the INT8 multiply-accumulate
GATES = {"int8*shift3": (0.62, 2.2), "int8*mask": (0.52, 4.1)}
LIBRARIES = ("osu018", "predictive-28nm")


def _mac() -> Unit:
    return integer_multiplier(8, 8).accumulating()


def exact_primitives() -> tuple[int, int]:
    """Shift products and masked sums that equal integer arithmetic, and how many were tried."""
    rng, right = np.random.default_rng(0), 0
    x = rng.integers(-(1 << 31), 1 << 31, (6, 50))
    for power in range(-14, 1):
        exponent, sign = np.full((50, 4), power), rng.integers(-1, 2, (50, 4))
        right += bool((shift_matmul(x, exponent, sign) == (x >> -power) @ sign).all())
    mask, v = rng.integers(0, 2, (9, 50)), rng.integers(-(1 << 20), 1 << 20, (50, 5))
    right += bool((masked_sums(mask, v) == mask @ v).all())
    return right, 16


def claims() -> tuple[Claim, ...]:
    """What is exact, and elements in gates. Training, kernels and energy of whole networks are not measured yet."""

    def exact() -> Quantity:
        right, tried = exact_primitives()
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}")

    found = [
        Claim("primitives equal to integer arithmetic", "every exponent from -14 to 0, negative inputs, masked sums",
              Quantity(100, "%", Evidence.PUBLISHED, _EXACT), exact, 0.0),
    ]  # fmt: skip
    note = "ours: multiplier and accumulator merged by the tool, best of five scripts; the reference kept them apart"
    for library in LIBRARIES:
        for name, (area, efficiency) in GATES.items():
            for what, figure in (("area", area), ("area efficiency", efficiency)):

                def ours(name: str = name, what: str = what, library: str = library) -> Quantity:
                    mine, mac = (
                        unit_gates(unit, find_library(library)) for unit in (product(name).accumulating(), _mac())
                    )
                    ratio = mine.area_um2 / mac.area_um2
                    if what == "area efficiency":
                        ratio = 1 / (ratio * (mine.period_s or 0.0) / (mac.period_s or 1.0))
                    return Quantity(ratio, "x", Evidence.SYNTHESISED, library)

                published = Quantity(figure, "x", Evidence.PUBLISHED, _REFERENCE)
                tolerance = 0.2 if library == "osu018" else None
                found.append(
                    Claim(f"{name} over INT8 multiply-accumulate, {what}", f"32-bit accumulator, {library}", published,
                          ours, tolerance, note)
                )  # fmt: skip
    return tuple(found)
