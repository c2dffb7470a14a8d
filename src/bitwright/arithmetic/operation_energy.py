"""Energy of multiplications, and of the additions that L-Mul puts in their place, from published operation energies.

Operation energies alone flatter whatever replaces a multiplier: `product_energy` also counts the accumulation and, with
`memory_j_per_bit`, the reading of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.core.errors import InputError, UnknownNameError

# J per operation. M. Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm at 0.9 V
TABLES: Mapping[str, Mapping[str, float]] = {
    "horowitz45": {
        "add int8": 0.03e-12, "add int16": 0.05e-12, "add int32": 0.1e-12, "add fp16": 0.4e-12, "add fp32": 0.9e-12,
        "multiply int8": 0.2e-12, "multiply int32": 3.1e-12, "multiply fp16": 1.1e-12, "multiply fp32": 3.7e-12,
    },
}  # fmt: skip
# bits of an operand -> multiplication, and the addition of two encodings; the table has no 8-bit floating-point
# product, so the integer product of that width stands in for it
PRODUCTS = {8: ("multiply int8", "add int8"), 16: ("multiply fp16", "add int16"), 32: ("multiply fp32", "add int32")}


@dataclass(frozen=True)
class ProductEnergy:
    """Energies in J of one multiply-accumulate, and the share that L-Mul saves."""

    multiplication_j: float
    addition_j: float
    accumulation_j: float
    memory_j: float

    @property
    def element_wise_saving(self) -> float:
        """Of the product alone."""
        return 1 - self.addition_j / self.multiplication_j

    @property
    def dot_product_saving(self) -> float:
        """Of product and accumulation."""
        return self._saving(self.accumulation_j)

    @property
    def layer_saving(self) -> float:
        """Of product, accumulation and the weight's share of memory traffic."""
        return self._saving(self.accumulation_j + self.memory_j)

    def _saving(self, both: float) -> float:
        return 1 - (self.addition_j + both) / (self.multiplication_j + both)


def product_energy(
    table: str = "horowitz45", bits: int = 32, accumulation: str = "add fp32", memory_j_per_bit: float = 0.0,
    reuse: float = 1.0,
) -> ProductEnergy:  # fmt: skip
    """Energies of one product of two `bits`-bit floating-point operands (8, 16 or 32) and its accumulation.

    `memory_j_per_bit`: of the memory that weights are read from, each used `reuse` times, which is the number of tokens
    for a linear layer. Raises UnknownNameError for other tables and accumulations, InputError for other widths,
    negative energies and a reuse below 1.
    """
    if table not in TABLES:
        raise UnknownNameError("table of operation energies", table, TABLES)
    energies = TABLES[table]
    if bits not in PRODUCTS:
        raise InputError(f"Energies are known for operands of {', '.join(map(str, PRODUCTS))} bits, not {bits}.")
    if accumulation not in energies or not accumulation.startswith("add"):
        raise UnknownNameError("accumulation", accumulation, [name for name in energies if name.startswith("add")])
    if not memory_j_per_bit >= 0 or not reuse >= 1:
        raise InputError(f"Energies are not negative and reuse is at least 1; got {memory_j_per_bit}, {reuse}.")
    product, addition = (energies[name] for name in PRODUCTS[bits])
    return ProductEnergy(product, addition, energies[accumulation], memory_j_per_bit * bits / reuse)
