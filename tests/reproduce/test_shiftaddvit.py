"""Claims of ShiftAddViT that need no training: costs; the conversion itself is marked slow."""

import math

import pytest

from bitwright.core.errors import UnknownNameError
from bitwright.core.quantity import Evidence
from bitwright.reproduce import shiftaddvit
from bitwright.reproduce import shiftaddvit_costs as costs
from bitwright.reproduce.claims import Verdict, check


def test_claims_are_well_formed():
    claims = shiftaddvit.claims()
    keys = [(claim.name, claim.conditions) for claim in claims]
    assert len(set(keys)) == len(keys)
    assert all(claim.published.evidence is Evidence.PUBLISHED for claim in claims)


def test_layers_agree_with_the_released_model():
    results = [check(claim) for claim in costs.energy_claims() if claim.tolerance is not None]
    assert len(results) == 15
    assert {result.verdict for result in results} == {Verdict.AGREES}
    assert all(result.ours.evidence is Evidence.PREDICTED for result in results)


def test_operations_of_deit():
    results = [check(claim) for claim in costs.cost_claims() if claim.name.startswith("operations")]
    assert [result.verdict for result in results] == [Verdict.AGREES] * 2


def test_savings_depend_on_what_is_charged():
    for network in costs.PAPER:
        for variant in costs.CONVERTED:
            released, charged = (costs.saving_percent(network, variant, each) for each in costs.ASSUMED.values())
            assert released > charged > 0
    with pytest.raises(UnknownNameError):
        costs.energy_j("LeNet", "original", costs.RELEASED)


@pytest.mark.parametrize("network", costs.PAPER)
def test_factors_of_latency(network):
    factors = costs.gpu_factors(network, "mixtures", "softmax")
    parts = factors["linear attention"] * factors["primitives"] * factors["exchange of tokens"]
    assert factors["whole"] == pytest.approx(parts)
    assert factors["bound"] > factors["whole"]
    assert factors["exchange of tokens"] < 1
    assert factors["linear attention"] > 1
    assert costs.gpu_latency_s(network, "softmax") == pytest.approx(
        factors["whole"] * costs.gpu_latency_s(network, "mixtures")
    )
    assert math.isfinite(factors["bound"])


def test_no_claim_of_cost_is_more_than_a_prediction():
    for claim in costs.cost_claims():
        assert check(claim).ours.evidence is Evidence.PREDICTED


@pytest.mark.slow
def test_integer_execution_of_the_converted_network_keeps_its_accuracy():
    claims = [claim for claim in shiftaddvit.conversion_claims() if claim.name.startswith("accuracy of integer")]
    assert [check(claim).verdict for claim in claims] == [Verdict.AGREES] * 3


@pytest.mark.slow
def test_variants_keep_their_accuracy_on_integers():
    results = {claim.name: check(claim) for claim in shiftaddvit.variant_claims()}
    native = [result.verdict for name, result in results.items() if name.startswith("accuracy of integer")]
    assert native == [Verdict.AGREES] * 2
    assert results["accuracy kept, shift only, sums of two powers"].ours.value > 0.97
    found = shiftaddvit.variants(0)
    assert 0 < found["measured share wanted"] < 1
    assert abs(found["measured shift share"] - found["measured share wanted"]) < 0.1
