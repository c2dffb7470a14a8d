"""Generated hardware against exact evaluation: cycle by cycle, on corner and random matrix products.

`amaranth` simulates in Python (pip only; small engines), `icarus` and `verilator` compile a generated self-checking
testbench. Every output is compared in every cycle in which it means something, so the cycle count is checked with the
results. `verify_netlist` does the same with the gates that synthesis made of the hardware.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bitwright.core.errors import UnknownNameError
from bitwright.engine.evaluate import Integers
from bitwright.engine.format_products import product_unit
from bitwright.engine.liberty import Library
from bitwright.engine.rtl import TOP, generate, simulation_design
from bitwright.engine.stimulus import Stimulus, stimulus
from bitwright.engine.synthesis import synthesise_array
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.testbench import SimulationResult, simulate_amaranth, simulate_netlist, simulate_verilog
from bitwright.engine.widths import check_depth, largest_depth

Simulator = Literal["amaranth", "icarus", "verilator"]


@dataclass(frozen=True)
class VerificationReport:
    """`vectors` operand vectors (K positions of tiles; rows of A where B is stationary) of `products` matrix products
    simulated over `cycles` cycles.

    `mismatches` counts wrong outputs; `first_mismatch` describes the first ("" when there is none).
    """

    simulator: str
    products: int
    vectors: int
    cycles: int
    mismatches: int
    first_mismatch: str

    @property
    def passed(self) -> bool:
        """No output differed in any cycle."""
        return self.mismatches == 0


def verify(
    engine: TensorEngine, seed: int = 0, vectors: int = 3000, simulator: Simulator | None = None,
    timeout_s: float = 600, vcd: Path | None = None,
) -> VerificationReport:  # fmt: skip
    """Simulate the generated hardware on corner and random products of at least `vectors` operand vectors.

    Without `simulator`: Icarus when installed, else Amaranth's. Operand gaps, ignored inputs and back-to-back products
    are part of the stimulus. `vcd` receives the waveforms. Raises InputError for engines without hardware, ToolError
    when the simulator is missing, fails, or takes longer than `timeout_s`.
    """
    if simulator is None:
        simulator = "icarus" if shutil.which("iverilog") else "amaranth"
    if simulator not in ("amaranth", "icarus", "verilator"):
        raise UnknownNameError("simulator", simulator, ("amaranth", "icarus", "verilator"))
    driven = random_stimulus(engine, seed, vectors)
    if simulator == "amaranth":
        design, ports = simulation_design(engine)
        result = simulate_amaranth(design, ports, driven.waveforms, vcd)
    else:
        result = simulate_verilog(generate(engine), TOP, driven.waveforms, simulator, timeout_s, vcd)
    return _report(driven, result)


def verify_netlist(engine: TensorEngine, library: Library, seed: int = 0, vectors: int = 300) -> VerificationReport:
    """Map the engine to gates and simulate the whole netlist. Raises as `verify` and `synthesis.synthesise_array`."""
    from bitwright.engine.engine_gates import part_names

    driven = random_stimulus(engine, seed, vectors)
    report = synthesise_array(generate(engine), TOP, library, part_names(engine))
    return _report(driven, simulate_netlist(report.netlist(library), driven.waveforms))


def _report(driven: Stimulus, result: SimulationResult) -> VerificationReport:
    return VerificationReport(
        result.simulator, driven.products, driven.steps, driven.cycles, result.mismatches, result.first_mismatch
    )


def random_stimulus(engine: TensorEngine, seed: int, vectors: int) -> Stimulus:
    """Extreme operands in every combination, shapes that do not fill the engine, then random ones."""
    rng = np.random.default_rng(seed)
    return stimulus(engine, matrix_products(engine, rng, vectors), rng)


def matrix_products(engine: TensorEngine, rng: np.random.Generator, vectors: int) -> list[tuple[Integers, Integers]]:
    """The products that `verify` runs, together at least `vectors` operand vectors; K as deep as the states hold.

    Raises IllegalTransformation for an engine whose states do not even hold one product.
    """
    step, columns = engine.step, engine.columns
    deepest = largest_depth(engine.nest, 16 * step + 48)
    check_depth(engine.nest, max(1, deepest))
    rows = engine.rows if engine.dataflow not in ("ws", "tree") else 4
    words_a, words_b = _operand_words(engine)
    products = [
        (np.full((rows, min(5, deepest)), a, np.int64), np.full((min(5, deepest), columns), b, np.int64))
        for a in words_a[[0, -1]] for b in words_b[[0, -1]]
    ]  # fmt: skip
    shapes = [(1, 1, 1), (rows + 1, 3, columns), (rows, 1, 2 * columns + 1), (2 * rows - 1, 7, columns + 2)]
    steps = 20
    while shapes or steps < vectors:
        m, k, n = shapes.pop() if shapes else (
            int(rng.integers(1, 2 * rows + 1)), int(rng.integers(1, 16 * step + 49)),
            int(rng.integers(1, 2 * columns + 1)),
        )  # fmt: skip
        k = min(k, deepest)
        chosen = rng.integers(0, len(words_a), (m, k)), rng.integers(0, len(words_b), (k, n))
        products.append((words_a[chosen[0]], words_b[chosen[1]]))
        steps += -(-n // columns) * (m * -(-k // step) if engine.dataflow == "ws" else -(-m // engine.rows) * k)
    return products


def _operand_words(engine: TensorEngine) -> tuple[Integers, Integers]:
    """Every word that A and that B may have, the smallest number first."""
    if engine.nest.product:
        unit = product_unit(engine.nest.product)
        return unit.a.words, unit.b.words
    halves = (1 << (bits - 1) for bits in (engine.a_bits, engine.b_bits))
    left, right = (np.arange(-half, half, dtype=np.int64) for half in halves)
    return left, right
