"""Area, clock and energy of whole engines from their parts."""

import numpy as np
import pytest

from bitwright.core.errors import BitwrightError, InputError
from bitwright.engine import engine_gates as module
from bitwright.engine.component_areas import component_areas
from bitwright.engine.engine_gates import (
    EngineGates,
    compose,
    engine_gates,
    normal_products,
    part_counts,
    part_gates,
    skew_registers,
    synthesise_engine,
)
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import generate_part
from bitwright.engine.stimulus import stimulus
from bitwright.engine.synthesis import synthesise
from bitwright.engine.tensor_engine import TensorEngine

LIBRARY = find_library("predictive-28nm")


def test_counted_parts_are_those_of_the_mapped_engine():
    for engine in (TensorEngine(3, 4, ("opt4e",)), TensorEngine(2, 3, dataflow="cube", depth=2)):
        assert synthesise_engine(engine, LIBRARY).instances == part_counts(engine)


@pytest.mark.parametrize(
    "engine",
    [
        TensorEngine(7, 6, ("opt1", "sign_free", "hoist_encode")), TensorEngine(6, 7, ("opt4e",)),
        TensorEngine(6, 7, ("opt2",)), TensorEngine(1, 7, dataflow="tree", depth=4),
        TensorEngine(1, 7, dataflow="ws", depth=4),
    ],
    ids=lambda engine: f"{engine.dataflow}-{'-'.join(engine.transformations)}",
)  # fmt: skip
def test_skew_registers_follow_the_polynomial(engine):
    assert skew_registers(engine) == module._register_bits(engine)


@pytest.mark.parametrize("engine", [TensorEngine(12, 12, ("opt1",)), TensorEngine(8, 8, ("opt4e",), encoding="ent")])
def test_an_engine_composed_from_a_small_one_is_near_the_whole_one(engine):
    whole = engine_gates(engine, LIBRARY)
    composed = compose(part_gates(engine, LIBRARY), engine, whole.macs_per_cycle)
    assert composed.area_um2 == pytest.approx(whole.area_um2, rel=0.02)
    assert composed.skew_area_um2 == pytest.approx(whole.skew_area_um2, rel=0.2)
    assert composed.period_s == pytest.approx(whole.period_s, rel=0.05, abs=0)
    assert composed.energy_j_per_cycle == pytest.approx(whole.energy_j_per_cycle, rel=0.12, abs=0)


def test_the_rate_is_that_of_the_whole_engine():
    engine = TensorEngine(5, 4, ("pipeline p",))
    products = normal_products(engine)
    taken = sum(stimulus(engine, [pair], np.random.default_rng(0), noise=False).waveforms.cycles for pair in products)
    assert engine_gates(engine, LIBRARY).macs_per_cycle == 16 * 5 * 4 * 768 / taken


def test_large_engines_scale_one_of_sixteen_rows_and_count_their_own_cycles():
    engine = TensorEngine(64, 2)
    gates = engine_gates(engine, LIBRARY)
    assert gates.macs_per_cycle == pytest.approx(64 * 2 * 768 / (768 + 64 + 64 + 2), rel=0.01)
    assert gates.instances["pe"] == 128
    with pytest.raises(InputError, match="at most 16 rows and columns"):
        engine_gates(engine, LIBRARY, products=[(np.ones((64, 8), int), np.ones((8, 2), int))])


def test_energy_follows_the_data():
    engine = TensorEngine(2, 2)
    zeros = [(np.zeros((2, 64), int), np.zeros((64, 2), int))]
    busy = [(np.tile([[127, -128], [-128, 127]], 32), np.tile([[127, -128], [-128, 127]], 32).T)]
    assert engine_gates(engine, LIBRARY, products=busy).energy_j_per_mac > 1.5 * (
        engine_gates(engine, LIBRARY, products=zeros).energy_j_per_mac
    )


def test_serial_engines_are_faster_on_few_digits():
    engine = TensorEngine(2, 2, ("opt4c",))
    few = [(np.full((2, 64), 1), np.full((64, 2), 77))]
    many = [(np.full((2, 64), 91), np.full((64, 2), 77))]
    assert engine_gates(engine, LIBRARY, products=few).macs_per_cycle > (
        1.5 * engine_gates(engine, LIBRARY, products=many).macs_per_cycle
    )


def test_energy_of_unequal_streams_is_that_of_each_alone():
    """Short streams wait for the longest in simulation; that wait is neither work nor cycles of theirs."""
    engine = TensorEngine(2, 2, ("opt4c",))
    b = np.random.default_rng(0).integers(-128, 128, (64, 2))
    few, many = (np.full((2, 64), 1), b), (np.full((2, 64), 85), b)
    alone = [engine_gates(engine, LIBRARY, products=[product]).energy_j_per_mac for product in (few, many)]
    together = engine_gates(engine, LIBRARY, products=[few, many]).energy_j_per_mac
    assert together == pytest.approx(np.mean(alone), rel=0.01, abs=0)


def test_a_wrong_netlist_gives_no_figures(monkeypatch):
    engine = TensorEngine(2, 2, ("opt1",))
    good = module.simulate

    def broken(netlist, inputs):
        return good(netlist, {**inputs, "a_0": inputs["a_0"] ^ 1})

    monkeypatch.setattr(module, "simulate", broken)
    with pytest.raises(BitwrightError, match="shows a wrong result"):
        engine_gates(engine, LIBRARY, products=[(np.full((2, 16), 3), np.full((16, 2), 5))])


def test_components_of_an_element():
    engine = TensorEngine(2, 2)
    split = component_areas(engine, LIBRARY)
    assert {"encoder", "partial products", "compressor", "adders", "registers"} <= set(split)
    assert split["adders"] > split["encoder"] > 0
    element, stage = (synthesise(generate_part(engine, name), name, LIBRARY) for name in ("pe", "output_stage"))
    assert sum(split.values()) == pytest.approx(element.area_um2 + stage.area_um2)  # components, and the shared part
    assert split["registers"] == element.sequential_area_um2 > 0
    assert split["output_stage"] == stage.area_um2
    assert "adders" not in component_areas(TensorEngine(2, 2, ("opt1",)), LIBRARY)


def test_energy_and_area_of_composed_gates_by_hand():
    gates = EngineGates(
        "hand", {"pe": 4, "output_stage": 2}, {"pe": 100.0, "output_stage": 30.0}, {"pe": 2e-12, "output_stage": 1e-12},
        5.0, 0.5e-12, 2e-9, 1e-3, 3.0, "hand",
    )  # fmt: skip
    assert gates.area_um2 == 4 * 100 + 2 * 30 + 5
    assert gates.energy_j_per_cycle == pytest.approx(10.5e-12, abs=0)
    assert gates.energy_j_per_mac == pytest.approx((10.5e-12 + 1e-3 * 2e-9) / 3, abs=0)  # leakage for a whole cycle
    assert gates.macs_per_second == pytest.approx(1.5e9)
    assert gates.area_efficiency == pytest.approx(1.5e9 / 465)
