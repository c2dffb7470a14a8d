from types import SimpleNamespace

import pytest

from bitwright.core.quantity import Evidence
from bitwright.engine.widths import required_widths
from bitwright.reproduce import bitweight_tpe, tensor_engine_elements
from bitwright.reproduce import tensor_engine_arrays as arrays
from bitwright.reproduce import tensor_engine_claims as engines
from bitwright.reproduce import tensor_engine_digits as digits
from bitwright.reproduce.claims import Verdict, check
from bitwright.reproduce.tensor_engine_exactness import exact_digits, exact_widths
from bitwright.reproduce.tensor_engine_reports import PRINTED_DENSITY, PRINTED_RATIOS, committed_ratios
from bitwright.reproduce.tensor_engine_variants import (
    ARCHITECTURES,
    COMMITTED_SHAPES,
    SERIAL,
    as_published,
    serial_engine,
)


@pytest.mark.parametrize("depth", digits.PARTIAL_PRODUCTS)
@pytest.mark.parametrize("sigma", [10, 20, 30, 40, 50])
def test_average_partial_products_as_the_released_test_bench_counts_them(depth, sigma):
    published = digits.PARTIAL_PRODUCTS[depth][sigma]
    assert digits.average_partial_products(sigma, depth, vectors=8000) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("design", PRINTED_RATIOS)
def test_the_committed_reports_give_the_published_ratios(design):
    assert committed_ratios(design) == pytest.approx(PRINTED_RATIOS[design], rel=0.01)


def test_digit_claims_agree():
    results = [check(claim) for claim in (*digits.all_value_claims(), *digits.normal_data_claims())]
    assert len(results) == 3 * len(digits.HISTOGRAMS) + 1 + 2 + 30 + 10
    assert {result.verdict for result in results} == {Verdict.AGREES}
    assert {result.ours.evidence for result in results if result.ours} == {Evidence.EXECUTED}


def test_exactness_is_counted_not_assumed(monkeypatch):
    assert exact_digits(8) == (512, 512)
    assert exact_widths() == (5, 5)
    monkeypatch.setattr("bitwright.reproduce.tensor_engine_exactness.required_widths", lambda nest, k: {
        name: bits + 1 for name, bits in required_widths(nest, k).items()})  # fmt: skip
    assert exact_widths()[0] < 5


def test_every_claim_is_named_once():
    claims = bitweight_tpe.claims()
    keys = [(claim.name, claim.conditions, claim.published.source) for claim in claims]
    assert len(set(keys)) == len(keys)


def test_element_ranges_need_every_baseline():
    for names in tensor_engine_elements.VARIANTS.values():
        assert set(names) <= set(tensor_engine_elements.ELEMENTS)
    assert set(tensor_engine_elements.PIPELINED) <= set(tensor_engine_elements.ELEMENTS)


def test_every_library_has_its_gate_claims():
    conditions = " ".join(claim.conditions for claim in engines.element_claims())
    for library in ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018"):
        assert library in conditions


def test_committed_and_throughput_claims_agree():
    throughput = [claim for claim in engines.network_claims() if claim.name == "throughput at equal area"]
    results = [check(claim) for claim in (*engines.committed_claims(), *throughput) if claim.tolerance is not None]
    efficiencies = sum(row[3] is not None for row in PRINTED_DENSITY.values())
    assert len(results) == 16 + len(PRINTED_DENSITY) + efficiencies + 4
    assert {result.verdict for result in results} == {Verdict.AGREES}


def test_networks_at_equal_area(monkeypatch, tmp_path):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    results = {}
    for claim in engines.network_claims():
        if claim.name.startswith("end to end") and "OPT4C, digits of MiniLM" in claim.conditions:
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


def test_arrays_are_compared_as_published_and_over_the_best_baseline(monkeypatch):
    """Ratios of figures made up here: the paper's own steps over the single-cycle baseline, ours over the best one."""
    figures = {"plain": (1.0, 4.0), "pipeline p": (2.0, 5.0), "opt1": (3.0, 8.0), "opt1, sign_free": (5.0, 2.0)}
    made = {names: SimpleNamespace(area_efficiency=area, energy_j_per_mac=energy)
            for names, (area, energy) in figures.items()}  # fmt: skip
    kinds = {"baselines": ("plain", "pipeline p"), "transformed": ("opt1", "opt1, sign_free")}
    monkeypatch.setattr(arrays, "measured", lambda a, b, kind: {names: made[names] for names in kinds[kind]})
    architecture = ARCHITECTURES[0]
    for figure, published, over_best in (("area_efficiency", 3.0, 2.5), ("energy_j_per_mac", 0.5, 2.0)):
        kind = ("transformed",)
        assert arrays.array_ratio(architecture, "osu018", figure, kind, True, "plain").value == published
        assert arrays.array_ratio(architecture, "osu018", figure, kind).value == over_best


def test_every_array_of_the_paper_and_of_its_reports_is_claimed_per_library():
    for found, names in (
        (arrays.array_claims(), [architecture.name for architecture in ARCHITECTURES]),
        (arrays.committed_array_claims(), list(COMMITTED_SHAPES)),
    ):
        for name in names:
            for library in arrays.ARRAY_LIBRARIES:
                assert any(name in claim.conditions and library in claim.conditions for claim in found)
    assert set(PRINTED_RATIOS) == {"PE", *COMMITTED_SHAPES}
    for architecture in ARCHITECTURES:
        assert () in architecture.baselines  # the single-cycle Booth baseline
        assert any(as_published(", ".join(names)) for names in architecture.transformed)


def test_element_ratios_are_ours():
    claim = next(c for c in engines.element_claims() if c.name == "OPT1 / MAC PE, frequency")
    assert 1.2 < check(claim).ours.value < 2.5
