"""Hardware of a format table: the multiply-accumulate of a row's two codes, in gates.

The processing element multiplies codes and adds exact integers; what is done once per scale group (products of scales,
the float32 sum over groups) is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitwright.arithmetic import formats
from bitwright.core.errors import BitwrightError
from bitwright.core.progress import progress
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.engine_gates import engine_gates
from bitwright.engine.format_products import product_name, product_unit
from bitwright.engine.libraries import find_library
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.models.format_execution import FormatAssignment
from bitwright.study.format_table import RowResult

SIZE = 16  # rows and columns of the output-stationary array
_LONGEST_SUM = 1024  # products
AREA, ENERGY = "PE area", "energy per MAC"


def engine_for(assignment: FormatAssignment, size: int = SIZE) -> TensorEngine | None:
    """The array that multiplies activation codes (A) by weight codes (B) exactly; None when there is no such product.

    Raises InputError where exact sums of the product leave the accumulators an engine can have.
    """
    if assignment.weights is None or assignment.activations is None:
        return None
    operands = [formats.parse(name).operand for name in (assignment.activations, assignment.weights)]
    name = product_name(*operands)
    if name is None:
        return None
    unit = product_unit(name)
    bits = max(unit.product_bits, unit.sum_bits(_LONGEST_SUM))
    return TensorEngine(
        size, size, a_bits=unit.a_bits, b_bits=unit.b_bits, accumulator_bits=bits, multiplier=name
    )  # fmt: skip


def with_hardware(results: Sequence[RowResult], library: str) -> tuple[RowResult, ...]:
    """The rows with area of one processing element and energy per multiply-accumulate where their product has hardware.

    Expensive parts come from the cache. A row whose hardware cannot be built says why in its notes. Raises InputError
    for unusable libraries.
    """
    cells = find_library(library)
    costs: dict[TensorEngine, dict[str, Quantity]] = {}
    made = []
    with progress("Processing elements of number formats", len(results)) as advance:
        for result in results:
            try:
                engine = engine_for(result.row.assignment)
                if engine is not None and engine not in costs:
                    gates = engine_gates(engine, cells)
                    source = f"{library}, {engine.multiplier}, {SIZE} x {SIZE} output-stationary array"
                    costs[engine] = {
                        AREA: Quantity(gates.part_area_um2["pe"], "um2", Evidence.SYNTHESISED, source),
                        ENERGY: Quantity(gates.energy_j_per_mac, "J", Evidence.SIMULATED, source + ", gate activity"),
                    }
            except BitwrightError as error:
                engine, reason = None, str(error).splitlines()[0]
            else:
                reason = "no hardware yet"
            if engine is None:
                made.append(replace(result, notes={**result.notes, AREA: reason, ENERGY: reason}))
            else:
                made.append(replace(result, figures={**result.figures, **costs[engine]}))
            advance(1)
    return tuple(made)
