"""Traffic against a brute-force walk of the panel schedule that counts every load into a buffer of fixed size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.core.operators import Operand, attention
from bitwright.core.workload import Gemm, Kind, Operator, Role, Tensor, Workload
from bitwright.engine.digit_profiles import measure_profile, normal_profile
from bitwright.engine.mapping import ScaleGroups, System, map_gemm, map_operator, map_workload, schedule
from bitwright.engine.network_cost import same_statistics
from bitwright.engine.operand_traffic import panel_traffic
from bitwright.engine.stimulus import stimulus
from bitwright.engine.tensor_engine import TensorEngine, cycles

SHAPE = (4, 8)


def walk(lines, tile, streamed, k, room):
    """Load whole tiles of resident lines while they fit, then stream the other operand past them; count elements."""
    loaded = 0
    position = 0
    while position < lines:
        held = 0
        while position < lines:
            step = min(tile, lines - position)
            if (held + step) * k > room:
                break
            held += step
            position += step
        if held == 0:
            return math.inf
        loaded += held * k + streamed * k
    return loaded


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(16, 4000), st.integers(1, 3))
def test_panel_traffic_equals_a_walk_of_the_schedule(m, n, k, buffer_bytes, batch):
    room = buffer_bytes / 2
    unblocked = m * k * math.ceil(n / 8) + n * k * math.ceil(m / 4)
    expected = min(unblocked, walk(m, 4, n, k, room), walk(n, 8, m, k, room))
    # An operand that fits whole needs no tile alignment.
    if min(m, n) * k <= room:
        expected = min(expected, m * k + n * k)
    assert sum(panel_traffic(Gemm(batch, m, n, k), *SHAPE, 1, 1, buffer_bytes)) == expected * batch


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(16, 10**6))
def test_traffic_is_never_below_compulsory(m, n, k, buffer_bytes):
    left, right = panel_traffic(Gemm(1, m, n, k), *SHAPE, 1, 2, buffer_bytes)
    assert left >= m * k
    assert right >= 2 * n * k


def product(name, source, result, weight, m=32, n=16, k=16):
    loops = {"m": m, "n": n, "k": k}
    return Operator(
        name,
        Kind.MATMUL,
        loops,
        (
            Tensor(source, ({"m": 1}, {"k": 1}), "int8"),
            Tensor(weight, ({"k": 1}, {"n": 1}), "int8", Role.WEIGHT),
        ),
        (Tensor(result, ({"m": 1}, {"n": 1}), "int8"),),
    )


SYSTEM = System(clock_hz=1e9, buffer_bytes=2**16, vector_lanes=8, memory_bandwidth=1e9)


def test_a_chain_respects_its_dependencies_and_overlaps_weight_loads():
    array = TensorEngine(rows=4, columns=4)
    workload = Workload("chain", (product("first", "x", "y", "w1"), product("second", "y", "z", "w2")))
    mapped = map_workload(workload, array, SYSTEM)
    result = schedule(mapped, workload.edges(), SYSTEM)
    serial = sum(op.array_cycles / SYSTEM.clock_hz + op.memory_bytes / SYSTEM.memory_bandwidth for op in mapped)
    overlapped = mapped[1].memory_prefetch_bytes / SYSTEM.memory_bandwidth
    assert result.makespan == pytest.approx(serial - overlapped)


def test_unknown_operators_cost_their_bytes():
    operator = Operator(
        "custom", Kind.UNKNOWN, {"i": 10}, (Tensor("a", ({"i": 1},)),), (Tensor("b", ({"i": 1},)),), target="my_op"
    )
    mapped = map_operator(operator, TensorEngine(rows=4, columns=4), SYSTEM)
    assert mapped.memory_bytes == 80
    assert mapped.array_cycles == mapped.vector_cycles == 0


def pointwise(name, kind, sources, result, m=32, n=16):
    axes = ({"m": 1}, {"n": 1})
    inputs = tuple(Tensor(source, axes, "int8") for source in sources)
    return Operator(name, kind, {"m": m, "n": n}, inputs, (Tensor(result, axes, "int8"),), flops_per_point=1)


def test_traffic_of_a_residual_block_equals_a_hand_count():
    workload = Workload(
        "block",
        (
            product("first", "x", "y", "w1"),  # y goes straight on: not stored
            pointwise("add", Kind.ELEMENTWISE, ["y", "x"], "z"),  # x comes from memory; z is read twice: stored
            pointwise("norm", Kind.NORMALISATION, ["z"], "u"),  # z comes straight; u feeds a product: stored
            product("second", "u", "v", "w2"),
            pointwise("last", Kind.ELEMENTWISE, ["v", "z"], "out"),  # z from memory; out is the result: stored
        ),
    )
    size = 32 * 16
    mapped = map_workload(workload, TensorEngine(rows=4, columns=4), SYSTEM)
    assert [operator.memory_read_bytes for operator in mapped] == [size + 256, size, 0, size + 256, size]
    assert [operator.memory_write_bytes for operator in mapped] == [0, size, size, 0, size]


SERIAL = [("opt3",), ("opt4c",), ("opt4e",), ("opt4e", "pipeline m", "sign_free")]


@pytest.mark.parametrize("transformations", SERIAL)
@pytest.mark.parametrize("swapped", [False, True])
def test_serial_cycles_of_constant_operands_equal_the_verified_stimulus(transformations, swapped):
    """Ones have one digit, 85 has four: the ones are encoded, wherever they stand, and every row is alike."""
    engine = TensorEngine(3, 2, transformations)
    m, k, n = 5, 32, 3
    ones, many = (n, m) if swapped else (m, n)
    few, dense = np.ones((ones, k), np.int64), np.full((many, k), 85)
    left, right = (dense, few) if swapped else (few, dense)
    profiles = measure_profile(left, "mbe"), measure_profile(right, "mbe")
    operator = product("p", "x", "y", "w", m, n, k)
    mapped = map_gemm(engine, Gemm(1, m, n, k), operator, 0, same_statistics(*profiles))
    assert mapped.encoded == ("right" if swapped else "left")
    driven = stimulus(engine, [(few, dense.T)], np.random.default_rng(0))
    assert mapped.cycles == pytest.approx(driven.cycles, rel=1e-9)
    assert (mapped.left_words if swapped else mapped.right_words) == pytest.approx(m * n * k)  # one word per digit
    tiles = math.ceil(many / 2)
    assert (mapped.right_words if swapped else mapped.left_words) == 4 * tiles * few.size  # once per pass and tile
    issued = 7 / 4 * m * n * k  # of four ones: four cycles at the lowest bit weight, one at each of three others
    streams = 3 * 2 * (4 if "opt4e" in transformations else 1)
    assert mapped.busy_cycles == pytest.approx(issued / streams)


def test_a_serial_engine_needs_statistics_of_its_encoding():
    engine = TensorEngine(4, 4, ("opt4c",))
    workload = Workload("one", (product("first", "x", "y", "w1"),))
    with pytest.raises(InputError, match="digit statistics"):
        map_workload(workload, engine, SYSTEM)
    with pytest.raises(InputError, match="ent, 8 bits"):
        map_workload(workload, engine, SYSTEM, same_statistics(normal_profile(20, "ent")))
    mapped = map_workload(workload, engine, SYSTEM, same_statistics(normal_profile(20, "mbe")))
    assert sum(mapped[0].encoded_cycles) == mapped[0].array_cycles > mapped[0].busy_cycles > 0


@pytest.mark.parametrize(
    ("dataflow", "rows", "depth"), [("os", 4, 1), ("ws", 1, 4), ("cube", 2, 2), ("tree", 1, 4), ("matrix2d", 4, 1)]
)
def test_parallel_engines_are_busy_for_their_products(dataflow, rows, depth):
    engine = TensorEngine(rows, 4, dataflow=dataflow, depth=depth)
    mapped = map_operator(product("first", "x", "y", "w1"), engine, SYSTEM)
    assert mapped.array_cycles == int(cycles(engine, 32, 16, 16))
    assert mapped.busy_cycles == 32 * 16 * 16 / (rows * 4 * depth)
    assert mapped.encoded_cycles == (0, 0)


def test_grouped_query_heads_read_their_keys_and_values_once():
    """8 query heads, one row of queries each: two groups of four read keys and values once, not four times."""

    def read(kv_heads):
        operands = [Operand(name, (8, 1, 16), "int8") for name in "qkvo"]
        operator = attention(
            "attention", *operands, batch=1, heads=8, kv_heads=kv_heads, queries=1, keys=64, depth=16, value_depth=16
        )
        return map_operator(operator, TensorEngine(4, 4), SYSTEM).memory_read_bytes

    queries, cache = 8 * 16, 2 * 64 * 16
    assert read(8) == queries + 8 * cache
    assert read(2) == queries + 2 * cache


def test_nests_without_hardware_are_not_mapped():
    with pytest.raises(InputError, match="hoist_shift"):
        map_gemm(TensorEngine(2, 2, ("roll bw", "reorder kt bw")), Gemm(1, 8, 8, 8))


def test_groups_of_scales_are_products_of_their_own():
    engine, gemm = TensorEngine(rows=4, columns=8), Gemm(2, 6, 20, 70)
    groups = ScaleGroups(k=32)
    made = map_gemm(engine, gemm, groups=groups)
    assert made.cycles == 2 * (2 * int(cycles(engine, 6, 20, 32)) + int(cycles(engine, 6, 20, 6)))
    whole = map_gemm(engine, gemm)
    assert made.cycles > whole.cycles
    # the operands pass the edges as often, only totals of groups are written
    assert (made.left_words, made.right_words) == (whole.left_words, whole.right_words)
    assert made.result_words == whole.result_words == 2 * 6 * 20
    operator = product("p", "x", "y", "w", 6, 20, 70)
    system = System(1e9, 4096, 8, 1e10)
    plain = map_operator(operator, engine, system)
    grouped = map_operator(operator, engine, system, groups=lambda *_: groups)
    assert plain.vector_cycles == 0
    assert grouped.vector_cycles == 3 * 6 * 20 / 8
    assert (grouped.memory_bytes, grouped.macs) == (plain.memory_bytes, plain.macs)


def test_a_serial_engine_takes_no_groups():
    engine = TensorEngine(rows=2, columns=2, transformations=("opt4c",))
    profile = normal_profile(1.0)
    operator = product("p", "x", "y", "w", 4, 4, 64)
    with pytest.raises(InputError, match="one scale per row"):
        map_gemm(engine, operator.gemms()[0], operator, 0, same_statistics(profile, profile), ScaleGroups(k=32))
