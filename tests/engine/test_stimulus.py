"""When results must appear: the cycle models of parallel and serial engines against the driven waveforms."""

import numpy as np
import pytest

from bitwright.arithmetic import encodings
from bitwright.engine.rtl.serial import group, lane_count
from bitwright.engine.serial_cycles import array_cycles
from bitwright.engine.stimulus import stimulus
from bitwright.engine.tensor_engine import TensorEngine, cycles


@pytest.mark.parametrize("dataflow", ["os", "ws", "cube", "tree", "matrix2d"])
@pytest.mark.parametrize("sequence", [(), ("opt1",), ("opt2",), ("sign_free", "pipeline pp")])
def test_parallel_engines(dataflow, sequence):
    if (dataflow, sequence) == ("ws", ("opt2",)):
        sequence = ("opt2", "hoist_encode")
    depth = 1 if dataflow in ("os", "matrix2d") else 3
    engine = TensorEngine(1 if dataflow in ("ws", "tree") else 2, 3, sequence, dataflow, depth)
    rng = np.random.default_rng(0)
    for m, k, n in ((1, 1, 1), (5, 9, 7), (2, 17, 3)):
        a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
        driven = stimulus(engine, [(a, b)], rng)
        assert driven.cycles == cycles(engine, m, n, k)
        seen = driven.waveforms
        ports = [port for port in seen.care if port.startswith("result_")]
        shown = {int(value) for port in ports for value in seen.expected[port][seen.care[port]]}
        assert set((a @ b).ravel().tolist()) <= shown


@pytest.mark.parametrize("name", ["opt3", "opt4c", "opt4e"])
@pytest.mark.parametrize("encoding", ["mbe", "ent", "csd"])
@pytest.mark.parametrize("more", [(), ("pipeline m",)])
def test_serial_engines(name, encoding, more):
    engine = TensorEngine(3, 2, (name, *more), encoding=encoding)
    rng, late = np.random.default_rng(1), set()
    for m, k, n in ((1, 1, 1), (3, 33, 2), (7, 20, 5)):
        a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
        model = array_cycles(
            a,
            n,
            engine.rows,
            engine.columns,
            encodings.get(encoding),
            8,
            group(engine),
            lane_count(engine),
            pass_overhead=engine.columns,
        )
        late.add(stimulus(engine, [(a, b)], rng).cycles - model.cycles)
    assert len(late) == 1  # from the last sum to the result at the ports, whatever the operands
    assert late == {3 + sum(engine.output_cycles) + len(more)}


def test_noise_is_only_where_inputs_are_ignored():
    engine = TensorEngine(2, 2)
    a, b = np.full((2, 3), 5), np.full((3, 2), -7)
    quiet = stimulus(engine, [(a, b)], np.random.default_rng(0), noise=False).waveforms
    assert set(quiet.inputs["a_0"].tolist()) == {5}
    noisy = stimulus(engine, [(a, b)], np.random.default_rng(0)).waveforms
    assert set(noisy.inputs["a_0"].tolist()) > {5}
    for port, column in noisy.expected.items():
        if port == "result_0":
            assert (column[noisy.care[port]] == -105).all()
