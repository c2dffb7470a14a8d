"""Claims of OliVe: exact ones, statistics, machines; the long ones on real networks are marked slow."""

import pytest

from bitwright.core.errors import BitwrightError, UnknownNameError
from bitwright.core.quantity import Evidence
from bitwright.reproduce import olive, olive_performance
from bitwright.reproduce.catalogue import system
from bitwright.reproduce.claims import Verdict, check


def named(name):
    return [claim for claim in olive.claims() if claim.name.startswith(name)]


def test_claims_are_well_formed():
    claims = olive.claims()
    keys = [(claim.name, claim.conditions) for claim in claims]
    assert len(set(keys)) == len(keys)
    assert all(claim.published.evidence is Evidence.PUBLISHED for claim in claims)
    assert system("olive").status == "complete"


@pytest.mark.parametrize("name", ["bytes", "exponent-integer", "accumulator", "wrong outputs"])
def test_what_is_exact_agrees(name):
    results = [check(claim) for claim in named(name)]
    assert results
    assert {result.verdict for result in results} == {Verdict.AGREES}


def test_statistics_of_minilm_agree():
    names = ("pairs of neighbours", "largest weight", "relative squared rounding error")
    results = [check(claim) for claim in olive.claims() if claim.name in names]
    assert len(results) == 5
    assert {result.verdict for result in results} == {Verdict.AGREES}


def test_clipping_outliers_costs_more_than_pruning_their_neighbours():
    (claim,) = named("error of clipped outliers")
    assert check(claim).ours.value > 1


def test_decoders_of_a_gpu():
    (claim,) = named("decoders of an RTX")
    assert check(claim).verdict is Verdict.AGREES


def test_gpu_predictions():
    """Bound by computing, times are operations over rates; bound by memory, bits over bandwidth."""
    gemms = olive_performance.linear_layers("OPT-6.7B")
    schemes = olive_performance.gpu_schemes(0.01)
    time, energy = olive_performance.gpu_cost(gemms, schemes["int8"])
    macs = 2048 * (4 * 4096**2 + 2 * 4096 * 16384) * 32
    assert time == pytest.approx(2 * macs / 215.2e12, rel=1e-6)
    assert energy > time * 250
    few = olive_performance.linear_layers("OPT-6.7B", tokens=1)
    bits = (4 * 4096**2 + 2 * 4096 * 16384) * 32 * olive_performance.gobo_weight_bits(0.01)
    assert olive_performance.gpu_cost(few, schemes["GOBO"])[0] == pytest.approx(bits / 8 / 616e9, rel=0.01)
    assert olive_performance.gobo_weight_bits(0.01) == pytest.approx(3.48)
    assert olive_performance.packed_bits("ovp4/row", 4, 64) == 4 + 32 / 64
    with pytest.raises(UnknownNameError):
        olive_performance.linear_layers("LeNet")


def test_gpu_ratios_follow_the_rates_of_tensor_cores():
    found = {peer: olive_performance.ratios("gpu", peer, 0.0046) for peer in ("int8", "GOBO")}
    assert found["int8"][0] == pytest.approx(2, rel=0.02)
    assert found["GOBO"][0] == pytest.approx(4, rel=0.02)


@pytest.mark.eda
def test_machines_within_tolerance_but_for_what_is_explained():
    results = [check(claim) for claim in (*named("speed over"), *named("energy over"))]
    if any(result.verdict is Verdict.UNAVAILABLE for result in results):
        pytest.skip("no synthesis tool")
    differs = {(result.name, result.conditions.split()[0]) for result in results if result.verdict is Verdict.DIFFERS}
    assert differs == {("speed over int8", "RTX"), ("energy over AdaptivFloat", "accelerators")}
    assert all(result.explanation for result in results if result.verdict is Verdict.DIFFERS)


@pytest.mark.slow
def test_pairs_lose_nothing_where_there_are_no_outliers():
    """A vision transformer on digits: few outliers, unsigned pairs for pixels, no large gain and no loss."""
    try:
        found = olive.olive_digits.contrast()
    except BitwrightError as error:
        pytest.skip(str(error))
    assert found["largest weight"] < 28
    assert found["pairs without outliers"] > 99
    assert found["signed first inputs"] == 0
    assert found["accuracy"]["pairs"] >= found["accuracy"]["absmax"] - 0.01
    assert found["accuracy"]["pairs"] >= found["accuracy"]["clipped"] - 0.01


def test_networks_that_are_not_at_hand_stay_published():
    results = [check(claim) for claim in named("SQuAD")]
    assert {result.verdict for result in results} == {Verdict.UNAVAILABLE}


@pytest.mark.slow
def test_retrieval_with_minilm():
    try:
        found = olive.olive_models.drifts()
    except BitwrightError as error:
        pytest.skip(str(error))
    four = {name: found[f"W4A4 {name}"]["cosine"] for name in ("pairs", "int4 clipped", "int4 absmax")}
    assert four["pairs"] > four["int4 clipped"]
    assert four["pairs"] > four["int4 absmax"]
    assert found["W8A8 pairs e4m3"]["cosine"] > 0.98
