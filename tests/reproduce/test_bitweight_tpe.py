import pytest

from bitwright.core.quantity import Evidence
from bitwright.reproduce import bitweight_tpe as tpe
from bitwright.reproduce.claims import Verdict, check


@pytest.mark.parametrize("depth", tpe.PARTIAL_PRODUCTS)
@pytest.mark.parametrize("sigma", [10, 20, 30, 40, 50])
def test_average_partial_products_as_the_released_test_bench_counts_them(depth, sigma):
    published = tpe.PARTIAL_PRODUCTS[depth][sigma]
    assert tpe.average_partial_products(sigma, depth, vectors=8000) == pytest.approx(published, rel=0.01)


# Rows of ratios printed beside the committed reports: frequency, cell area, area efficiency, energy per cycle.
@pytest.mark.parametrize(
    ("design", "ratios"),
    [
        ("PE", (1.52, 1.03, 1.47, 1.32)),
        ("output-stationary 16x16", (2.12, 0.96, 2.20, 0.97)),
        ("weight-stationary 16x16", (1.67, 1.13, 1.49, 1.27)),
        ("3D-cube 8x8x8", (1.60, 1.05, 1.52, 1.09)),
    ],
)
def test_the_committed_reports_give_the_published_ratios(design, ratios):
    assert tpe.committed_ratios(design) == pytest.approx(ratios, rel=0.01)


def test_digit_claims_agree():
    results = [check(claim) for claim in tpe.claims() if claim.published.unit != "x"]
    assert len(results) == 13
    assert {result.verdict for result in results} == {Verdict.AGREES}
    assert {result.ours.evidence for result in results if result.ours} == {Evidence.EXECUTED}


def test_every_library_has_its_gate_claims():
    conditions = " ".join(claim.conditions for claim in tpe.claims())
    for library in ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018"):
        assert library in conditions
