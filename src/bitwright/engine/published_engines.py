"""The serial engines and the baseline of arXiv 2503.06342 as published figures (28 nm), for equal-area comparisons.

Published: element areas 81.27 um2 (OPT4C) and 246 um2 (multiply-accumulate); one OPT4E group stands against one MAC.
Their clocks are published as throughputs: with four non-zero digits in every operand an OPT4C element does half the
work of a MAC, with one twice the work, so its clock is twice that of the MAC, which runs at 1 GHz here.
Encoders and adders have no published area at this node and are not charged: ratios are upper bounds in that respect.
"""

from __future__ import annotations

from bitwright.core.errors import InputError
from bitwright.engine.network_cost import EngineFigures

MAC_AREA_UM2 = 246.0
OPT4C_AREA_UM2 = 81.27
CLOCK_RATIO = 2.0  # OPT4C and OPT4E over the MAC
_MAC_CLOCK_HZ = 1e9


def multiply_accumulate_array(rows: int = 32, columns: int = 32) -> EngineFigures:
    """The systolic baseline: `rows` x `columns` MACs, every tile taking exactly k cycles."""
    return EngineFigures("systolic MAC", "parallel", rows, columns, _MAC_CLOCK_HZ, MAC_AREA_UM2)


def opt4c_array(rows: int = 32, columns: int = 32, encoding: str = "ent") -> EngineFigures:
    """OPT4C: columns of `rows` elements that share one digit stream."""
    clock_hz = CLOCK_RATIO * _MAC_CLOCK_HZ
    return EngineFigures("OPT4C", "serial", rows, columns, clock_hz, OPT4C_AREA_UM2, encoding=encoding)


def opt4e_array(rows: int = 32, columns: int = 32, encoding: str = "ent") -> EngineFigures:
    """OPT4E: columns of `rows` groups of four elements with one state; a group takes the area of a MAC."""
    clock_hz = CLOCK_RATIO * _MAC_CLOCK_HZ
    return EngineFigures("OPT4E", "serial", rows, columns, clock_hz, MAC_AREA_UM2, lanes=4, encoding=encoding)


def throughput_ratio(engine: EngineFigures, baseline: EngineFigures, cycles_per_operand: float) -> float:
    """Throughput over the baseline's on the area of one baseline element, in whole elements, without synchronisation.

    `cycles_per_operand` is what one operand costs one digit stream: its non-zero digits, or issue cycles with the idle
    ones. Raises InputError when it is not positive or an element of the engine does not fit.
    """
    elements = int(baseline.element_area_um2 // engine.element_area_um2)
    if not cycles_per_operand > 0 or elements < 1:
        raise InputError(
            f"{cycles_per_operand} cycles per operand and {elements} elements of {engine.name!r} on the area of one of "
            f"{baseline.name!r}: both must be above 0."
        )
    rate = elements * engine.lanes * engine.depth * engine.clock_hz / cycles_per_operand
    return rate / (baseline.clock_hz * baseline.depth)
