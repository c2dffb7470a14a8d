"""What the claims of MixPE are made of, as far as it needs no synthesis."""

import pytest

from bitwright.core.errors import InputError
from bitwright.models.configurations import configuration
from bitwright.reproduce import mixpe, mixpe_performance
from bitwright.reproduce.mixpe_performance import NETWORKS, TOKENS, Assumptions


@pytest.mark.parametrize("network", NETWORKS)
def test_linear_layers_hold_the_weights_of_all_blocks(network):
    c = configuration(network)
    weights = sum(gemm.batch * gemm.n * gemm.k for gemm in mixpe_performance.linear_layers(network, 5))
    rest = c.parameters - weights  # embeddings, head, norms, biases
    assert 0 < rest < 0.08 * c.parameters
    assert {gemm.m for gemm in mixpe_performance.linear_layers(network, 5)} == {5}


def test_sets_name_their_assumptions():
    texts = [each.text for each in mixpe_performance.sets()]
    assert len(set(texts)) == len(texts)
    assert all("equal area" in text and "500 MHz" in text for text in texts)
    assert {each.workload for each in mixpe_performance.sets()} == set(TOKENS)
    with pytest.raises(InputError, match="Workloads are"):
        mixpe_performance.comparison(Assumptions("MixPE-A8", "INT8", "training"), NETWORKS[0])


def test_claims_are_of_every_kind():
    found = mixpe.claims()
    keys = [(claim.name, claim.conditions) for claim in found]
    assert len(set(keys)) == len(keys)
    speed = [claim for claim in found if claim.name.startswith("speed over")]
    assert len(speed) == len(mixpe_performance.sets())
    assert {claim.published.value for claim in speed} == {2.6}


@pytest.mark.slow
def test_gates_within_the_tolerance_of_the_reference():
    """Like with like at 28 nm: a 4-bit shift-add multiplier is 0.4 to 0.55 of an 8-bit one, the MAC 0.6 to 0.8."""
    names = ("4x8 shift-add", "8x8", "W4A8 MAC", "INT8 MAC")
    areas = {name: mixpe.unit_figures(name, "predictive-28nm")[0] for name in names}
    assert 0.4 < areas["4x8 shift-add"] / areas["8x8"] < 0.55
    assert 0.6 < areas["W4A8 MAC"] / areas["INT8 MAC"] < 0.8
