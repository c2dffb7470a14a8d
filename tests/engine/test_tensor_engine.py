"""Cycle counts against figures of SCALE-Sim v3 (`Total Cycles`, scratchpads that never stall, no prefetch)."""

import numpy as np
import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.workload import Gemm
from bitwright.engine.baselines import gemm
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.stimulus import stimulus
from bitwright.engine.tensor_engine import TensorEngine, buffer_accesses, cycles, utilisation


def engine(rows, columns, dataflow):
    """`rows` of PEs: along M, or weight-stationary along K."""
    stationary = dataflow == "ws"
    return TensorEngine(1 if stationary else rows, columns, dataflow=dataflow, depth=rows if stationary else 1)


@pytest.mark.parametrize(
    ("dataflow", "m", "n", "k", "expected"),
    [("os", 512, 512, 512, 146_943), ("os", 128, 64, 256, 2543), ("ws", 128, 64, 256, 3551)],
)
def test_equals_scale_sim(dataflow, m, n, k, expected):
    assert cycles(engine(32, 32, dataflow), m, n, k, "scale-sim") == expected


@pytest.mark.parametrize(
    ("rows", "columns", "dataflow", "expected"),
    [(4, 6, "os", [223, 101, 87, 8]), (4, 6, "ws", [249, 152, 55, 12]),
     (8, 8, "os", [67, 68, 33, 14]), (8, 8, "ws", [104, 161, 37, 22])],
)  # fmt: skip
def test_equals_scale_sim_on_ragged_shapes(rows, columns, dataflow, expected):
    """Figures of a run of scalesim 3.0.0 (COMPUTE_REPORT.csv, `Total Cycles`)."""
    m, n, k = np.array([(13, 7, 20), (5, 17, 9), (16, 8, 3), (1, 1, 1)]).T
    assert cycles(engine(rows, columns, dataflow), m, n, k, "scale-sim").tolist() == expected


def test_vectorised_over_a_network():
    array = TensorEngine(16, 16)
    shapes = [(1, 2, 3), (16, 16, 16), (17, 33, 100)]
    m, n, k = np.array(shapes).T
    assert cycles(array, m, n, k).tolist() == [int(cycles(array, *shape)) for shape in shapes]


def test_long_products_approach_full_utilisation():
    array = TensorEngine(16, 16)
    assert utilisation(array, 16, 16, 10**6) == pytest.approx(1, abs=1e-4)
    assert utilisation(array, 1, 16, 10**6) == pytest.approx(1 / 16, rel=1e-4)


ENGINES = [
    (TensorEngine(3, 2), 1, 6), (TensorEngine(3, 2, ("opt2",)), 4, 6),
    (TensorEngine(1, 2, dataflow="ws", depth=3), 1, 6),
    (TensorEngine(3, 2, ("opt1",), "cube", 4), 1, 24), (TensorEngine(1, 2, ("opt2",), "tree", 4), 4, 2),
    (TensorEngine(3, 2, ("opt1", "pipeline pp"), "matrix2d"), 1, 6),
]  # fmt: skip


@pytest.mark.parametrize(("array", "passes", "rate"), ENGINES)
def test_cycles_are_those_of_the_verified_stimulus(array, passes, rate):
    """The stimulus says in which cycle every result must leave the hardware; simulation checks that elsewhere."""
    rng = np.random.default_rng(0)
    for m, k, n in ((1, 1, 1), (7, 9, 5), (3, 33, 4)):
        product = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
        assert cycles(array, m, n, k) == stimulus(array, [product], rng).cycles
    assert (array.passes, array.macs_per_cycle) == (passes, rate)


@pytest.mark.parametrize("dataflow", ["os", "ws"])
def test_buffer_accesses_equal_a_walk_over_the_tiles(dataflow):
    array = engine(4, 3, dataflow)
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
    with pytest.raises(UnknownNameError, match="Did you mean 'opt1'"):
        _ = TensorEngine(transformations=("op1",)).nest
    with pytest.raises(UnknownNameError, match="matrix2d"):
        TensorEngine(dataflow="matrix")
    with pytest.raises(UnknownNameError, match="multiplier"):
        TensorEngine(multiplier="wallace")
    with pytest.raises(InputError, match="rows is 0"):
        TensorEngine(rows=0)
    with pytest.raises(InputError, match="at least 16"):
        TensorEngine(accumulator_bits=15)
    with pytest.raises(InputError, match="rows is 1, not 4"):
        _ = TensorEngine(4, 4, dataflow="ws", depth=4).nest
    with pytest.raises(InputError, match=r"whole numbers of 1 to 2\^51"):
        cycles(TensorEngine(), 0, 1, 1)
    with pytest.raises(InputError, match="too large to count"):
        cycles(TensorEngine(), 10**7, 10**7, 10**7)
    with pytest.raises(IllegalTransformation):
        _ = TensorEngine(transformations=("opt2",), multiplier="tool").nest
    with pytest.raises(UnknownNameError, match="convention"):
        cycles(TensorEngine(), 1, 1, 1, "other")
    with pytest.raises(InputError, match="SCALE-Sim has no dataflow 'cube'"):
        cycles(TensorEngine(2, 2, dataflow="cube", depth=2), 1, 1, 1, "scale-sim")
    with pytest.raises(InputError, match="serial"):
        cycles(TensorEngine(2, 2, ("opt4c",)), 1, 1, 1)


def test_a_sum_that_a_state_cannot_hold_is_not_counted():
    narrow = TensorEngine(2, 2, ("opt2",), accumulator_bits=17)
    assert cycles(narrow, 9, 9, 3) > 0
    with pytest.raises(IllegalTransformation, match=r"'acc_s' has 11 bits; sums over K = 4 need 12.*up to 3"):
        cycles(narrow, 9, 9, [3, 4])
    assert cycles(TensorEngine(2, 2, ("opt1",), accumulator_bits=16), 9, 9, 4000) > 0  # wraps as its result does


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 2.5}, r"rows is 2\.5; expected a whole number"),
        ({"rows": True}, "rows is True; expected a whole number"),
        ({"columns": "4"}, "columns is '4'; expected a whole number"),
        ({"transformations": "opt1"}, r"a tuple of names such as \('opt1',\), not 'opt1'"),
        ({"transformations": (1,)}, "a tuple of names"),
        ({"transformations": {"opt1"}}, "a tuple of names"),
        ({"dataflow": None}, "dataflow is None; expected a name"),
        ({"encoding": 5}, "encoding is 5; expected a name"),
    ],
)
def test_arguments_of_other_types_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TensorEngine(**options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"rows": 0}, "rows is 0"), ({"columns": -2}, "columns is -2"), ({"rows": 2.5}, r"rows is 2\.5"),
     ({"accumulator_bits": 0}, "accumulator_bits is 0")],
)  # fmt: skip
def test_impossible_sizes_of_baselines_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        gemm("os", **{"rows": 2, "columns": 2, **sizes})


def test_transformations_may_be_a_list_and_numpy_sizes_are_sizes():
    assert TensorEngine(np.int64(2), 2, ["opt1"]) == TensorEngine(2, 2, ("opt1",))


@pytest.mark.parametrize("sequence", [("split kt 64 kb",), ("roll bw",)])
def test_nests_without_hardware_are_not_counted(sequence):
    with pytest.raises(InputError, match=r"hardware|unroll"):
        cycles(TensorEngine(2, 2, sequence), 64, 64, 64)


@pytest.mark.parametrize("dataflow", ["os", "ws"])
def test_one_bit_weight_at_a_time_reads_everything_once_per_pass(dataflow):
    shape = {"os": (2, 2), "ws": (1, 2)}[dataflow]
    more = {"dataflow": dataflow, "depth": 2 if dataflow == "ws" else 1}
    sequence = ("opt2", "hoist_encode") if dataflow == "ws" else ("opt2",)
    plain, serial = (TensorEngine(*shape, steps, **more) for steps in ((), sequence))
    gemm_shape = Gemm(3, 5, 7, 16)
    a, b, results = buffer_accesses(plain, gemm_shape)
    tiles = results // (3 * 5 * 7)  # partial sums of weight-stationary tiles: written, and read but for the first
    assert serial.passes == 4
    assert buffer_accesses(serial, gemm_shape) == (4 * a, 4 * b, (4 * (tiles + 1) - 1) * 3 * 5 * 7)


def test_extents_beyond_any_product_are_refused():
    for extents in ((1 << 63, 1, 1), (1, (1 << 64) - 1, 1), (1, 1, (1 << 51) + 1)):
        with pytest.raises(InputError, match=r"1 to 2\^51"):
            cycles(TensorEngine(), *extents)


def test_arrays_that_are_not_square_read_each_operand_per_tile_of_the_other():
    accesses = buffer_accesses(TensorEngine(2, 4), Gemm(1, 10, 12, 16))  # 5 row tiles, 3 column tiles
    assert accesses == (3 * 10 * 16, 5 * 16 * 12, 10 * 12)
