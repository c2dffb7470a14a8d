"""Networks on engines given by figures: consistency with exact counts, equal areas, the published comparison."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.core.operators import Operand, attention, convolution, product
from bitwright.core.workload import Gemm, Role, Workload
from bitwright.engine.digit_profiles import measure_profile, normal_profile
from bitwright.engine.network_cost import (
    EngineFigures,
    Memories,
    choose_operand,
    equal_area,
    mean_utilisation,
    network_cost,
    same_statistics,
    speed_up,
)
from bitwright.engine.published_engines import (
    multiply_accumulate_array,
    opt4c_array,
    opt4e_array,
    throughput_ratio,
)
from bitwright.engine.serial_cycles import array_cycles, normal_operand
from bitwright.models.trace_configuration import trace_configuration
from bitwright.models.vision_shapes import mobilenet_v3_large, mobilevit_s

ENT = encodings.get("ent")
NORMAL = normal_profile()
SPARSE = normal_profile(3.0)
DENSE = normal_profile(60.0)
MAC = EngineFigures("mac", "parallel", 8, 4, 1e9, 100.0, element_energy_j=2e-12)
SERIAL = EngineFigures("serial", "serial", 4, 8, 2e9, 30.0, element_energy_j=1e-12, column_area_um2=20.0)


def linear(m, n, k, name="fc"):
    left, right, out = Operand("x", (m, k), "int8"), Operand("w", (k, n), "int8", Role.WEIGHT), Operand("y", (m, n))
    return product(name, left, right, out, 1, m, n, k)


def test_parallel_engine_by_hand():
    cost = network_cost(Workload("one", (linear(20, 10, 33),)), replace(MAC, depth=2, tile_overhead=3, start_cycles=5))
    (layer,) = cost.products
    cycles = 3 * 3 * (17 + 3) + 5
    assert layer.cycles == cycles
    assert layer.latency_s == pytest.approx(cycles / 1e9, rel=1e-9, abs=0)
    assert layer.utilisation == pytest.approx(20 * 10 * 33 / (cycles * 8 * 4 * 2))
    assert layer.buffer_read_bytes == 20 * 33 * 3 + 33 * 10 * 3
    assert layer.memory_bytes == 20 * 33 + 33 * 10 + 20 * 10  # everything fits the buffer: each tensor once
    assert layer.energy_j == pytest.approx(cycles * 32 * 2e-12, rel=1e-9, abs=0)
    assert (cost.macs, cost.cycles, cost.utilisation) == (20 * 10 * 33, cycles, layer.utilisation)


def test_memory_bounds_the_latency():
    work = Workload("one", (linear(20, 10, 33),))
    slow = network_cost(work, MAC, memories=Memories(bandwidth_bytes_per_s=1e6, memory_energy_j_per_byte=1e-9))
    assert slow.latency_s == pytest.approx((20 * 33 + 33 * 10 + 200) / 1e6)
    assert slow.energy_j > network_cost(work, MAC).energy_j


@pytest.mark.parametrize("lanes", [1, 4])
def test_serial_engine_agrees_with_exact_cycles(lanes):
    a, w = normal_operand(200, 96, 30, seed=1), normal_operand(50, 96, 10, seed=2)
    engine = replace(SERIAL, lanes=lanes, pass_overhead=2, tile_overhead=3)
    statistics = same_statistics(measure_profile(a), measure_profile(w))
    (layer,) = network_cost(Workload("one", (linear(200, 50, 96),)), engine, statistics).products
    exact = array_cycles(w, 200, 8, 4, ENT, lanes=lanes, pass_overhead=2, tile_overhead=3)
    other = array_cycles(a, 50, 8, 4, ENT, lanes=lanes, pass_overhead=2, tile_overhead=3)
    assert layer.encoded == "right"
    assert exact.cycles < other.cycles
    assert layer.cycles == pytest.approx(exact.cycles, rel=0.02)
    digits = int(ENT.nonzero_digits(w, 8).sum())
    assert layer.buffer_read_bytes == pytest.approx(w.size * 50 * 9 / 8 + digits * 200, rel=0.01)
    assert layer.least_busy_column < layer.average_column < layer.busiest_column <= layer.cycles


def test_the_operand_with_fewer_digits_is_encoded():
    gemm = Gemm(1, 64, 64, 64)
    square = replace(SERIAL, rows=8)
    assert choose_operand(square, gemm, SPARSE, DENSE)[0] == "left"
    assert choose_operand(square, gemm, DENSE, SPARSE)[0] == "right"
    assert choose_operand(square, gemm, NORMAL, NORMAL)[0] == "right"  # a tie goes to the weights, encoded beforehand
    # One line of weights leaves most columns without work, however few its digits.
    assert choose_operand(replace(SERIAL, rows=2), Gemm(1, 64, 1, 64), DENSE, SPARSE)[0] == "left"


def test_batches_of_small_products_share_columns():
    channels = 16
    data = Operand("x", (1, channels, 12, 12), "int8")
    weight = Operand("w", (channels, 1, 3, 3), "int8", Role.WEIGHT)
    depthwise = convolution("dw", data, weight, Operand("y", (1, channels, 10, 10)), [1, 1], [1, 1], channels)
    work = Workload("dw", (depthwise,))
    apart = network_cost(work, SERIAL, same_statistics(NORMAL))
    packed = network_cost(work, replace(SERIAL, packs_batch=True), same_statistics(NORMAL))
    assert packed.cycles < apart.cycles / 3
    assert packed.utilisation > 3 * apart.utilisation
    assert packed.macs == apart.macs == channels * 100 * 9


def test_attention_scores_stay_on_the_chip():
    q, k, v, out = (Operand(name, (1, 2, 16, 8), "int8") for name in "qkvo")
    operator = attention("a", q, k, v, out, batch=1, heads=2, kv_heads=2, queries=16, keys=16, depth=8, value_depth=8)
    first, second = network_cost(Workload("a", (operator,)), SERIAL, same_statistics(NORMAL)).products
    assert (first.name, second.name) == ("a[0]", "a[1]")
    assert first.memory_bytes == 2 * (16 * 8 * 2)
    assert second.memory_bytes == 2 * (16 * 8 * 2)


def test_equal_area_charges_what_is_shared():
    engine = replace(SERIAL, adder_area_um2=50.0, elements_per_adder=8)
    found = equal_area(engine, MAC)
    assert found.area_um2 <= MAC.area_um2 < replace(found, columns=found.columns + 1).area_um2
    assert found.area_um2 == found.columns * (4 * 30 + 20) + math.ceil(found.columns * 4 / 8) * 50
    assert equal_area(replace(engine, column_area_um2=500.0), MAC).columns < found.columns
    with pytest.raises(InputError, match="One column"):
        equal_area(replace(engine, column_area_um2=1e6), MAC)


def test_published_throughputs_at_equal_area():
    mac = multiply_accumulate_array()
    assert throughput_ratio(opt4c_array(), mac, 2.22) == pytest.approx(2.7, rel=0.05)
    assert throughput_ratio(opt4e_array(), mac, 2.22) == pytest.approx(3.6, rel=0.05)
    assert throughput_ratio(opt4c_array(), mac, NORMAL.digits) == pytest.approx(2.7, rel=0.05)
    # With the idle cycles of all-zero groups the same elements reach less.
    assert throughput_ratio(opt4c_array(), mac, NORMAL.issue_cycles) == pytest.approx(2.48, abs=0.02)


@pytest.mark.parametrize("name", ["gpt2", "vit", "mobilenet", "mobilevit"])
def test_networks(name):
    work = {
        "gpt2": lambda: trace_configuration("gpt2", tokens=1024), "vit": lambda: trace_configuration("vit-b-16"),
        "mobilenet": mobilenet_v3_large, "mobilevit": mobilevit_s,
    }[name]()  # fmt: skip
    mac = multiply_accumulate_array()
    base = network_cost(work, mac)
    for engine in (opt4c_array(), opt4e_array()):
        cost = network_cost(work, equal_area(engine, mac), same_statistics(NORMAL))
        assert cost.macs == base.macs == work.macs
        assert 1 < speed_up(cost, base) < throughput_ratio(engine, mac, NORMAL.issue_cycles) * 1.1
        for layer in cost.products:
            assert 0 < layer.utilisation < layer.sync_utilisation + 1e-9
            assert layer.sync_utilisation <= 1
            assert layer.energy_j >= 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [opt4c_array, opt4e_array])
def test_depthwise_layers_are_used_less_than_pointwise_ones(make, packed):
    engine = replace(make(), packs_batch=packed)
    cost = network_cost(mobilenet_v3_large(), engine, same_statistics(NORMAL))
    blocks = [layer for layer in cost.products if layer.name.startswith("blocks") and "squeeze" not in layer.name]
    depthwise = [layer for layer in blocks if layer.name.endswith("depthwise")]
    pointwise = [layer for layer in blocks if not layer.name.endswith("depthwise")]
    assert len(depthwise) == 15
    assert mean_utilisation(depthwise) < mean_utilisation(pointwise)
    if packed:  # the columns are full, and wait for each other more often
        assert np.mean([each.sync_utilisation for each in depthwise]) < np.mean(
            [each.sync_utilisation for each in pointwise]
        )


def test_bad_input():
    with pytest.raises(InputError, match="kind"):
        replace(MAC, kind="analog")
    with pytest.raises(InputError, match="clock_hz"):
        replace(MAC, clock_hz=0.0)
    with pytest.raises(InputError, match="rows"):
        replace(MAC, rows=0)
    with pytest.raises(InputError, match="packs_batch"):
        replace(MAC, packs_batch=True)
    with pytest.raises(InputError, match="even width"):
        replace(SERIAL, bits=7)
    work = Workload("one", (linear(4, 4, 4),))
    with pytest.raises(InputError, match="digit statistics"):
        network_cost(work, SERIAL)
    with pytest.raises(InputError, match="needs mbe"):
        network_cost(work, replace(SERIAL, encoding="mbe"), same_statistics(NORMAL))
    with pytest.raises(InputError, match="no matrix products"):
        network_cost(Workload("none", ()), MAC)
    with pytest.raises(InputError, match="different work"):
        speed_up(network_cost(work, MAC), network_cost(Workload("two", (linear(4, 4, 8),)), MAC))
    with pytest.raises(InputError, match="memories"):
        Memories(buffer_bytes=0)
    with pytest.raises(InputError, match="above 0"):
        throughput_ratio(opt4c_array(), MAC, 0.0)
