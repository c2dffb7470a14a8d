"""Counts of kernels and the time predicted from them."""

import pytest

from bitwright.core.errors import InputError
from bitwright.core.machine import load_machine
from bitwright.kernels.work import Rates, Work, predict, rates_of

RATES = Rates({"fp32": 4e9, "matrix fp16": 64e9}, {"memory": 10e9, "l2": 100e9}, cores=4, start_s=1e-6)


def test_waves_of_pieces_decide_the_arithmetic_time() -> None:
    even = predict(Work({"fp32": 4e9}, {}, pieces=4), RATES)
    assert even.compute_s == pytest.approx(0.25)
    assert even.time_s == pytest.approx(0.25 + 1e-6)
    assert predict(Work({"fp32": 5e9}, {}, pieces=5), RATES).compute_s == pytest.approx(0.5)
    assert predict(Work({"fp32": 4e9}, {}, pieces=4), RATES, threads=1).compute_s == pytest.approx(1.0)


def test_kinds_of_operations_add_up_and_levels_overlap() -> None:
    cost = predict(Work({"fp32": 4e9, "matrix fp16": 64e9}, {"memory": 30e9, "l2": 100e9}), RATES, threads=1)
    assert (cost.compute_s, cost.memory_s) == (pytest.approx(2.0), pytest.approx(3.0))
    assert cost.bound == "memory"
    assert predict(Work({}, {"memory": 1e9, "l2": 100e9}), RATES).bound == "l2"


def test_private_caches_serve_as_many_cores_as_work() -> None:
    rates = Rates({"fp32": 1e9}, {"l1": 10e9}, cores=4, private=frozenset({"l1"}))
    assert predict(Work({}, {"l1": 80e9}, pieces=8), rates).memory_s == pytest.approx(2.0)
    assert predict(Work({}, {"l1": 80e9}, pieces=2), rates).memory_s == pytest.approx(4.0)


def test_rates_of_a_machine_file() -> None:
    device = load_machine("a100-80g").device()
    rates = rates_of(device, {"exponential": 1.0})
    assert device.cores is not None
    assert rates.operations_per_s["matrix fp16"] * device.cores.value == device.compute.matrix["fp16"].value
    assert rates.operations_per_s["exponential"] == 1.0
    bandwidth = device.main_memory.sustained or device.main_memory.bandwidth
    assert bandwidth is not None
    assert rates.bytes_per_s["memory"] == bandwidth.value


def test_unknown_kinds_levels_and_negative_counts_are_refused() -> None:
    with pytest.raises(InputError, match="No rate for 'int4'"):
        predict(Work({"int4": 1}, {}), RATES)
    with pytest.raises(InputError, match="No bandwidth of 'l3'"):
        predict(Work({}, {"l3": 1}), RATES)
    with pytest.raises(InputError, match="at least 0"):
        Work({"fp32": -1}, {})
    with pytest.raises(InputError, match="at least 0"):
        Work({"fp32": float("nan")}, {})
    with pytest.raises(InputError, match="at least one"):
        predict(Work({}, {}), RATES, threads=0)
