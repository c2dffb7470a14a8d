"""Cycle counts against figures of SCALE-Sim v3 (`Total Cycles`, scratchpads that never stall, no prefetch)."""

import numpy as np
import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.workload import Gemm
from bitwright.engine.systolic import SystolicArray, buffer_accesses, cycles, gemm_cycles, utilisation


@pytest.mark.parametrize(
    ("dataflow", "m", "n", "k", "expected"),
    [("os", 512, 512, 512, 146_943), ("os", 128, 64, 256, 2543), ("ws", 128, 64, 256, 3551)],
)
def test_equals_scale_sim(dataflow, m, n, k, expected):
    assert cycles(SystolicArray(32, 32, dataflow=dataflow), m, n, k, "scale-sim") == expected


@pytest.mark.parametrize(
    ("rows", "columns", "dataflow", "expected"),
    [(4, 6, "os", [223, 101, 87, 8]), (4, 6, "ws", [249, 152, 55, 12]),
     (8, 8, "os", [67, 68, 33, 14]), (8, 8, "ws", [104, 161, 37, 22])],
)  # fmt: skip
def test_equals_scale_sim_on_ragged_shapes(rows, columns, dataflow, expected):
    """Figures of a run of scalesim 3.0.0 (COMPUTE_REPORT.csv, `Total Cycles`)."""
    m, n, k = np.array([(13, 7, 20), (5, 17, 9), (16, 8, 3), (1, 1, 1)]).T
    assert cycles(SystolicArray(rows, columns, dataflow=dataflow), m, n, k, "scale-sim").tolist() == expected


def test_vectorised_over_a_network():
    array = SystolicArray(16, 16)
    shapes = [(1, 2, 3), (16, 16, 16), (17, 33, 100)]
    m, n, k = np.array(shapes).T
    assert cycles(array, m, n, k).tolist() == [int(cycles(array, *shape)) for shape in shapes]
    gemms = [Gemm(3, *shape) for shape in shapes]
    assert gemm_cycles(array, gemms).tolist() == [3 * int(cycles(array, *shape)) for shape in shapes]


def test_long_products_approach_full_utilisation():
    array = SystolicArray(16, 16)
    assert utilisation(array, 16, 16, 10**6) == pytest.approx(1, abs=1e-4)
    assert utilisation(array, 1, 16, 10**6) == pytest.approx(1 / 16, rel=1e-4)


@pytest.mark.parametrize("dataflow", ["os", "ws"])
def test_buffer_accesses_equal_a_walk_over_the_tiles(dataflow):
    array = SystolicArray(4, 3, dataflow=dataflow)
    m, n, k = 10, 8, 9
    reads_a = reads_b = results = 0
    for first in range(0, m if dataflow == "os" else k, 4):
        for column in range(0, n, 3):
            rows, columns = min(4, (m if dataflow == "os" else k) - first), min(3, n - column)
            if dataflow == "os":
                reads_a, reads_b, results = reads_a + rows * k, reads_b + columns * k, results + rows * columns
            else:
                reads_a, reads_b = reads_a + rows * m, reads_b + rows * columns
                results += m * columns * (1 if first == 0 else 2)
    assert buffer_accesses(array, Gemm(2, m, n, k)) == (2 * reads_a, 2 * reads_b, 2 * results)


def test_bad_input():
    with pytest.raises(UnknownNameError, match="Did you mean 'multiply-accumulate'"):
        SystolicArray(processing_element="multiply-acumulate")
    with pytest.raises(InputError, match="rows is 0"):
        SystolicArray(rows=0)
    with pytest.raises(InputError, match="at least 16"):
        SystolicArray(accumulator_bits=15)
    with pytest.raises(InputError, match="whole numbers >= 1"):
        cycles(SystolicArray(), 0, 1, 1)
    with pytest.raises(InputError, match="use multiplier 'booth'"):
        SystolicArray(processing_element="compressed-accumulation", multiplier="tool")
    with pytest.raises(UnknownNameError, match="convention"):
        cycles(SystolicArray(), 1, 1, 1, "other")
