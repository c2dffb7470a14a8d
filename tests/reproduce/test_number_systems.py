"""Claims of the number systems: those that need no long run agree, and every module is well formed."""

import pytest

from bitwright.core.quantity import Evidence
from bitwright.reproduce import bipolar_int, l_mul, mixpe, olive, shiftaddvit
from bitwright.reproduce.catalogue import stored_results, systems
from bitwright.reproduce.claims import Verdict, check


@pytest.mark.parametrize("module", [bipolar_int, l_mul, mixpe, olive, shiftaddvit], ids=lambda module: module.__name__)
def test_what_is_exact_agrees(module):
    exact = [claim for claim in module.claims() if claim.tolerance == 0.0]
    found = [check(claim) for claim in exact]
    assert all(result.verdict is Verdict.AGREES for result in found)
    keys = [(claim.name, claim.conditions) for claim in module.claims()]
    assert len(set(keys)) == len(keys)
    assert all(claim.published.evidence is Evidence.PUBLISHED for claim in module.claims())


def test_weights_of_minilm_in_outlier_pairs():
    names = ("pairs of neighbours", "largest weight")
    results = [check(claim) for claim in olive.claims() if claim.name in names]
    assert [result.verdict for result in results] == [Verdict.AGREES] * 4


def test_the_catalogue_holds_them_and_their_results():
    chosen = [system for system in systems() if system.slug in ("mixpe", "bipolar-int", "shiftaddvit", "bfp-outliers")]
    assert {system.status for system in chosen} == {"complete"}
    assert all(stored_results(system.slug) for system in chosen)
