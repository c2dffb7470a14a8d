"""A dot product of one-bit planes with its accumulator, as hardware: XNOR, population count, shift, add.

Source: arXiv 2409.17870 (bipolar integers: every plane holds -1 and 1, so all pairs of planes take the same unit).
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.rtl.arithmetic import Component


class BitPlaneUnit(Component):
    """sum <- (0 if `first` else sum) + 2^`shift` * sum over k of +-1 * +-1, one pair of planes per cycle.

    Inputs `a` and `b`: bits of one plane each, `positions` of K; `shift`: i + j of the planes i and j; `first`. Three
    registers lie between them and `sum` (32 bits, modulo 2^32). Raises InputError for other than 8 to 1,024 positions.
    """

    name = "unit"
    latency = 3

    def __init__(self, positions: int = 64) -> None:
        if not 8 <= positions <= 1024:
            raise InputError(f"A bit-plane unit of {positions} positions asked for; expected 8 to 1024.")
        super().__init__()
        self.positions = positions
        for side in ("a", "b"):
            self.add_input(side, unsigned(positions))
        self.add_input("shift", unsigned(4))
        self.add_input("first", unsigned(1))
        self.add_output("sum", signed(32), reset_less=True)

    def elaborate(self) -> Module:
        """Operand registers, the count of equal bits, the running sum."""
        module = Module()

        def late(word: Any, form: Any) -> Any:
            register = Signal(form, reset_less=True)
            module.d.sync += register.eq(word)
            return register

        a, b = (late(self.inputs[side], unsigned(self.positions)) for side in ("a", "b"))
        different = a ^ b
        count = sum((different[at] for at in range(1, self.positions)), different[0])
        bits = self.positions.bit_length() + 2
        dot = late(self.positions - (count << 1), signed(bits))
        shift = late(late(self.inputs["shift"], unsigned(4)), unsigned(4))
        first = late(late(self.inputs["first"], unsigned(1)), unsigned(1))
        total = self.outputs["sum"]
        kept = Signal(signed(32))
        with module.If(~first):
            module.d.comb += kept.eq(total)
        module.d.sync += total.eq((kept + (dot << shift))[:32].as_signed())
        return module
