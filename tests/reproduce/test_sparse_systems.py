"""Block-sparse inference on CPUs and unstructured sparsity on GPUs: claims that take seconds, and the slow ones."""

import pytest

from bitwright.core.quantity import Evidence
from bitwright.reproduce import flash_llm, sparse_cpu
from bitwright.reproduce.claims import Verdict, check
from bitwright.reproduce.sparse_networks import digit_accuracies, minilm_figures


def test_exactness():
    assert sparse_cpu.exact_products() == (80, 80)
    assert sparse_cpu.most_steps() <= 1
    assert sparse_cpu.norm_difference() < 2e-6
    assert flash_llm.exact_forms() == (15, 15)
    assert flash_llm.largest_error() < 1e-6


def test_predictions_agree_where_it_is_claimed():
    found = [check(claim) for claim in flash_llm.claims() if claim.name in ("over dense products", "GPUs needed")]
    assert len(found) == 7
    assert {result.verdict for result in found} == {Verdict.AGREES}
    table = [claim for claim in sparse_cpu.claims() if claim.conditions.startswith("1024x1024x64")]
    assert [check(claim).verdict for claim in table] == [Verdict.AGREES] * 5


def test_claims_name_conditions_and_sources():
    for module in (flash_llm, sparse_cpu):
        claims = module.claims()
        assert len({(claim.name, claim.conditions) for claim in claims}) == len(claims)
        known = (claim for claim in claims if not claim.name.startswith("wavefronts"))  # those were simulated before
        assert all(claim.published.evidence == Evidence.PUBLISHED for claim in known)


@pytest.mark.slow
def test_digits_keep_their_accuracy_in_blocks():
    found = digit_accuracies()
    assert found["dense"] > 0.97
    assert found["longer"] - found["4x1"] < 0.015
    assert found["1x1"] > 0.96


@pytest.mark.slow
def test_minilm_in_codes_and_pruned():
    found = minilm_figures()
    assert found["dense int8 cosine"] > 0.98
    assert found["dense int8 agreement"] > 0.95
    assert found["int8 cosine"] > 0.6
    assert found["int8 agreement"] > found["float agreement"] - 0.1
