"""Timing kernels beside peers: what is compared, and what the counts predict."""

import numpy as np
import pytest
import torch

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels import benchmark
from bitwright.kernels.benchmark import Case, measure, peak_rates, run
from bitwright.kernels.benchmark_cases import CASES
from bitwright.kernels.work import Rates, Work

RATES = Rates({"fp32": 1e9}, {"memory": 1e9}, cores=2)


def test_all_sides_run_on_as_many_threads_and_torch_is_put_back():
    seen = []
    case = Case(
        "k", "c", lambda threads: seen.append(("run", threads, torch.get_num_threads())),
        {"peer": lambda threads: seen.append(("peer", threads, torch.get_num_threads()))}, Work({"fp32": 2e9}, {}, 2),
    )  # fmt: skip
    before = torch.get_num_threads()
    timing = measure(case, RATES, threads=2, repeats=1)
    assert {each[1:] for each in seen} == {(2, 2)}
    assert {each[0] for each in seen} == {"run", "peer"}
    assert torch.get_num_threads() == before
    assert timing.limit.time_s == 1.0
    assert timing.fastest_peer == "peer"
    assert timing.to_json()["times_as_fast_as"]["peer"] == timing.peers_s["peer"] / timing.time_s


def test_rates_that_a_case_brings_are_used():
    case = Case("k", "c", lambda threads: None, {}, Work({"look-ups": 3e9}, {}), {"look-ups": 1e9}, useful=6e9)
    timing = measure(case, RATES, repeats=1)
    assert (timing.limit.time_s, timing.case.operations, timing.fastest_peer) == (3.0, 6e9, "")


def test_every_case_computes_what_its_peers_compute_on_its_threads():
    for name, make in CASES.items():
        for case in make():
            assert case.kernel == name
            assert case.intensity > 0
            shapes = {np.asarray(side(1)).size for side in (case.run, *case.peers.values())}
            assert len(shapes) == 1, case.title


def test_peaks_are_measured_and_ordered():
    rates = peak_rates()
    assert rates["fp32"] > 1.2 * rates["additions"] > 0


def test_unknown_kernels_and_no_repeats_are_refused(monkeypatch):
    monkeypatch.setattr(benchmark, "this_machine", lambda: pytest.fail("measured before names were checked"))
    with pytest.raises(UnknownNameError, match="bit-planes"):
        run(["bit-plane"], CASES)
    with pytest.raises(InputError, match="at least one"):
        measure(Case("k", "c", lambda threads: None, {}, Work({}, {})), RATES, repeats=0)
