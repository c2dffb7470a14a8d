import pytest

from bitwright.core.quantity import Evidence
from bitwright.reproduce import bitweight_tpe as tpe
from bitwright.reproduce import tensor_engine_claims as engines
from bitwright.reproduce.claims import Verdict, check
from bitwright.reproduce.tensor_engine_reports import PRINTED_RATIOS, committed_ratios
from bitwright.reproduce.tensor_engine_variants import ARCHITECTURES, SERIAL, serial_engine


@pytest.mark.parametrize("depth", tpe.PARTIAL_PRODUCTS)
@pytest.mark.parametrize("sigma", [10, 20, 30, 40, 50])
def test_average_partial_products_as_the_released_test_bench_counts_them(depth, sigma):
    published = tpe.PARTIAL_PRODUCTS[depth][sigma]
    assert tpe.average_partial_products(sigma, depth, vectors=8000) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("design", PRINTED_RATIOS)
def test_the_committed_reports_give_the_published_ratios(design):
    assert committed_ratios(design) == pytest.approx(PRINTED_RATIOS[design], rel=0.01)


def test_digit_claims_agree():
    results = [check(claim) for claim in tpe._digit_claims()]
    assert len(results) == 13
    assert {result.verdict for result in results} == {Verdict.AGREES}
    assert {result.ours.evidence for result in results if result.ours} == {Evidence.EXECUTED}


def test_every_library_has_its_gate_claims():
    conditions = " ".join(claim.conditions for claim in engines.element_claims())
    for library in ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018"):
        assert library in conditions


def test_committed_and_throughput_claims_agree():
    throughput = [claim for claim in engines.network_claims() if claim.name == "throughput at equal area"]
    results = [check(claim) for claim in (*engines.committed_claims(), *throughput) if claim.tolerance is not None]
    assert len(results) == 16 + 3 + 4
    assert {result.verdict for result in results} == {Verdict.AGREES}


def test_networks_at_equal_area(monkeypatch, tmp_path):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    results = {}
    for claim in engines.network_claims():
        if claim.name.startswith("end to end") and "OPT4C" in claim.conditions:
            results[claim.conditions] = check(claim)
    assert len(results) == 3
    assert {result.verdict for result in results.values()} == {Verdict.AGREES}


def test_bit_slice_claims_name_what_they_assume():
    results = [check(claim) for claim in engines.bit_slice_claims()]
    assert {result.verdict for result in results} <= {Verdict.REPORTED, Verdict.UNAVAILABLE}
    assert all("assum" in result.explanation or "published" in result.explanation for result in results)


def test_every_compared_engine_exists():
    for architecture in ARCHITECTURES:
        for names in (*architecture.baselines, *architecture.transformed):
            assert architecture.engine(names).nest.dataflow == architecture.dataflow
    assert all(serial_engine(names).serial for names in SERIAL)


def test_element_ratios_are_ours():
    claim = next(c for c in engines.element_claims() if c.name == "OPT1 / MAC PE, maximum frequency")
    assert 1.2 < check(claim).ours.value < 2.5
