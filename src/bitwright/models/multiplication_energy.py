"""Energy of networks of multiplications, shifts and additions on a row-stationary array like Eyeriss. All predicted.

The array has 16 x 12 elements, used as any rectangle of outputs and inputs that they hold; an element keeps 12 inputs,
960 weights and 16 outputs, and all share a buffer of 65,536 values for inputs and outputs; weights come from DRAM.
Tilings are searched with `core.mapping`, every order of the temporal loops, for least energy. A delivery to an element
over the network is charged as the write of its register, a sum passed on to a neighbour at half of that.

As in the released model (GATECH-EIC/ShiftAddViT), every term reads its input and its weight from registers, and the
elements that share an output pass their sum on to the last of them. Unlike there, row-stationary reuse comes from the
search rather than from a fixed formula. Assumptions that decide the result are switches of `Assumptions`.

Sources: arXiv 2306.06446 and its released code for unit energies and assumptions; Chen et al., Eyeriss (ISCA 2016).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import Accelerator, ArrayDimension, ArrayMemory
from bitwright.core.mapping import LoopMapping, map_operator
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Operator
from bitwright.models.multiplication_networks import Layer, Primitive

_SOURCE = "released energy model of ShiftAddViT (arXiv 2306.06446)"
# J of an operation
TABLES: Mapping[str, Mapping[str, float]] = {
    "eyeriss32": {"bits": 32, "multiply": 3.7e-12, "add": 0.9e-12, "shift": 0.13e-12},
    "eyeriss8": {"bits": 8, "multiply": 0.2e-12, "add": 0.03e-12, "shift": 0.024e-12},
}
_UNIT_J = 3.7e-12 / 16  # a register access, per bit
DRAM_J_PER_BIT, BUFFER_J_PER_BIT = 200e-12 / 16, 6 * _UNIT_J
NETWORK_J_PER_BIT, NEIGHBOUR_J_PER_BIT, REGISTER_J_PER_BIT, WEIGHT_REGISTER_J_PER_BIT = (
    2 * _UNIT_J, _UNIT_J, _UNIT_J, 2 * _UNIT_J)  # fmt: skip
REGISTER_INPUTS, REGISTER_WEIGHTS, REGISTER_OUTPUTS, BUFFER_VALUES = 12, 192 * 5, 16, 65536  # values
RECTANGLES = ((16, 12), (12, 16), (24, 8), (8, 24), (48, 4), (32, 6))  # outputs x inputs of 192 elements
SHIFT_BITS = 5  # of a stored weight: 15 exponents of either sign and zero are 31 codes
_FACTORS = 6


@dataclass(frozen=True)
class Assumptions:
    """What the energy of a primitive leaves out.

    `additions_on_chip`: operands, results and sums of additions cost no DRAM, buffer and network. `shift_value_bits`:
    every value of a shift layer, activations included, is moved at that width; None charges activations in full and
    weights at 5 bits. `accumulations`: multiplications and shifts also pay the addition to their sum.
    `registers_per_term`: an element reads its registers at every term, even when the value is that of the term before.
    """

    additions_on_chip: bool = True
    shift_value_bits: int | None = (16 + 5) // 2
    accumulations: bool = False
    registers_per_term: bool = True


RELEASED = Assumptions()
CHARGED = Assumptions(additions_on_chip=False, shift_value_bits=None)


@dataclass(frozen=True)
class Energy:
    """J of computing, registers, the network between elements, the buffer and DRAM."""

    compute_j: float = 0.0
    registers_j: float = 0.0
    network_j: float = 0.0
    buffer_j: float = 0.0
    dram_j: float = 0.0

    @property
    def total_j(self) -> float:
        """All of them."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: Energy) -> Energy:
        return Energy(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, count: float) -> Energy:
        """Of `count` runs."""
        return Energy(*(getattr(self, field.name) * count for field in fields(self)))


def operation_j(primitive: Primitive, table: str = "eyeriss32", assumptions: Assumptions = RELEASED) -> float:
    """J of one term. Raises UnknownNameError for other tables and primitives."""
    if table not in TABLES:
        raise UnknownNameError("table of primitive energies", table, TABLES)
    energies = TABLES[table]
    if primitive not in ("multiply", "add", "shift"):
        raise UnknownNameError("primitive", primitive, ("multiply", "add", "shift"))
    return energies[primitive] + (energies["add"] if assumptions.accumulations and primitive != "add" else 0.0)


def value_bits(primitive: Primitive, table: str = "eyeriss32", assumptions: Assumptions = RELEASED) -> dict[str, float]:
    """Bits of a stored weight (or mask) "W", an input "I" and an output "O"."""
    full = TABLES[table]["bits"]
    if primitive == "shift":
        if assumptions.shift_value_bits is None:
            return {"W": SHIFT_BITS, "I": full, "O": full}
        return dict.fromkeys("WIO", float(assumptions.shift_value_bits))  # whatever the width of other layers
    if primitive == "add" and not assumptions.additions_on_chip:
        return {"W": 1, "I": full, "O": full}
    return {"W": full, "I": full, "O": full}


def _array(primitive: Primitive, table: str, assumptions: Assumptions, rectangle: tuple[int, int]) -> Accelerator:
    bits = value_bits(primitive, table, assumptions)
    full = TABLES[table]["bits"]
    narrow = min(bits.values()) if primitive == "shift" and assumptions.shift_value_bits is not None else full

    def given(value: float, unit: str) -> Quantity:
        return Quantity(value, unit, Evidence.PREDICTED, _SOURCE)

    def memory(
        operands: tuple[Literal["W", "I", "O"], ...], bits: float, read: float, write: float, shared: bool
    ) -> ArrayMemory:
        return ArrayMemory(
            operands=operands, size=given(bits, "bit"), read_width=given(full, "bit"),
            write_width=given(full, "bit"), granule=given(1, "bit"), read_energy=given(read * full, "J"),
            write_energy=given(write * full, "J"), shared_along=("outputs", "inputs") if shared else (),
            ports="dedicated",
        )  # fmt: skip

    far = 0.0 if primitive == "add" and assumptions.additions_on_chip else 1.0
    delivery = far * NETWORK_J_PER_BIT
    outputs, inputs = rectangle
    return Accelerator(
        dimensions={
            "outputs": ArrayDimension(size=given(outputs, ""), loop="output_channel"),
            "inputs": ArrayDimension(size=given(inputs, ""), loop="input_channel"),
        },
        mac_energy=given(operation_j(primitive, table, assumptions), "J"), clock=given(250e6, "Hz"),
        weight_bits=given(bits["W"], ""), input_bits=given(bits["I"], ""), output_bits=given(bits["O"], ""),
        partial_sum_bits=given(bits["O"], ""),
        memories={
            "weights": memory(("W",), REGISTER_WEIGHTS * full, WEIGHT_REGISTER_J_PER_BIT, delivery, False),
            "inputs": memory(("I",), REGISTER_INPUTS * narrow, REGISTER_J_PER_BIT, delivery, False),
            "outputs": memory(("O",), REGISTER_OUTPUTS * narrow, REGISTER_J_PER_BIT, REGISTER_J_PER_BIT, False),
            "buffer": memory(("I", "O"), BUFFER_VALUES * narrow, far * BUFFER_J_PER_BIT, far * BUFFER_J_PER_BIT, True),
            "dram": memory(("W", "I", "O"), 1e13, far * DRAM_J_PER_BIT, far * DRAM_J_PER_BIT, True),
        },
    )  # fmt: skip


def _of_mapping(mapping: LoopMapping, terms: int, bits: Mapping[str, float], assumptions: Assumptions) -> Energy:
    traffic, column = mapping.traffic, mapping.spatial["inputs"][1]
    on_chip = traffic["dram"]["O"].energy_j == 0  # additions whose operands and sums cost nothing outside the elements
    delivered = sum(traffic[name][operand].write_bits for name, operand in (("weights", "W"), ("inputs", "I")))
    network = 0.0 if on_chip else delivered * NETWORK_J_PER_BIT
    if assumptions.registers_per_term:
        registers = terms * (bits["W"] * WEIGHT_REGISTER_J_PER_BIT + bits["I"] * REGISTER_J_PER_BIT)
        if not on_chip:  # a column passes its sum on, the last element adds it to its register
            registers += terms / column * 2 * bits["O"] * REGISTER_J_PER_BIT
            network += terms * (column - 1) / column * bits["O"] * NEIGHBOUR_J_PER_BIT
    else:
        registers = traffic["outputs"]["O"].energy_j + sum(
            traffic[name][operand].read_bits * energy
            for name, operand, energy in (
                ("weights", "W", WEIGHT_REGISTER_J_PER_BIT), ("inputs", "I", REGISTER_J_PER_BIT))
        )  # fmt: skip
        network += max(column - 1, 1) * traffic["buffer"]["O"].write_bits * NEIGHBOUR_J_PER_BIT
    return Energy(
        mapping.mac_energy_j, registers, network, sum(each.energy_j for each in traffic["buffer"].values()),
        sum(each.energy_j for each in traffic["dram"].values()),
    )  # fmt: skip


_SEARCHED: dict[object, Energy] = {}


def operator_energy(
    operator: Operator, primitive: Primitive, table: str = "eyeriss32", assumptions: Assumptions = RELEASED
) -> Energy:
    """Energy of one product or convolution with the best tiling found on any rectangle of the array.

    Raises UnknownNameError for other tables and primitives, InputError for operators without products.
    """
    operation_j(primitive, table, assumptions)
    axes = tuple(tuple(tuple(axis.items()) for axis in tensor.axes) for tensor in (*operator.inputs, *operator.outputs))
    key = (operator.kind, tuple(operator.loops.items()), axes, primitive, table, assumptions)
    if key not in _SEARCHED:
        mappings = (
            map_operator(operator, _array(primitive, table, assumptions, rectangle), "energy", max_factors=_FACTORS)
            for rectangle in RECTANGLES
        )
        bits = value_bits(primitive, table, assumptions)
        found = (_of_mapping(mapping, operator.macs, bits, assumptions) for mapping in mappings)
        _SEARCHED[key] = min(found, key=lambda energy: energy.total_j)
    return _SEARCHED[key]


def network_energy(
    layers: Iterable[Layer], table: str = "eyeriss32", assumptions: Assumptions = RELEASED
) -> dict[str, Energy]:
    """Energy by layer name, every run counted. Raises InputError for no layers, and as `operator_energy` does."""
    found = {layer.name: operator_energy(layer.operator, layer.primitive, table, assumptions).times(layer.count)
             for layer in layers}  # fmt: skip
    if not found:
        raise InputError("The energy of a network without layers was asked for.")
    return found


def total(energies: Mapping[str, Energy]) -> Energy:
    """Sum over layers."""
    return sum(energies.values(), Energy())
