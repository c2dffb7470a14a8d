"""Lean attention and gated linear attention in the catalogue: claims that need no long run, and well-formed modules."""

import pytest

from bitwright.core.quantity import Evidence
from bitwright.reproduce import gla, gla_training, lean_attention
from bitwright.reproduce.catalogue import system
from bitwright.reproduce.claims import Verdict, check


@pytest.mark.parametrize("module", [lean_attention, gla], ids=lambda module: module.__name__)
def test_claims_are_well_formed(module):
    keys = [(claim.name, claim.conditions) for claim in module.claims()]
    assert len(set(keys)) == len(keys)
    assert all(claim.published.evidence is Evidence.PUBLISHED for claim in module.claims())


def test_exact_claims_of_lean_attention_agree():
    exact = [claim for claim in lean_attention.claims() if claim.tolerance == 0.0 and "tokens" not in claim.name]
    assert len(exact) == 3
    assert all(check(claim).verdict is Verdict.AGREES for claim in exact)


def test_simulated_claims_of_lean_attention():
    found = {
        (claim.name, claim.conditions): check(claim)
        for claim in lean_attention.claims()
        if claim.published.unit == "x" and "a100" in claim.conditions
    }
    assert all(result.ours is not None and result.ours.evidence is Evidence.SIMULATED for result in found.values())
    longest = found["speed over FlashAttention-2 at 512k tokens", "a100-80g"]
    assert longest.verdict is Verdict.AGREES


def test_quick_claims_of_gla():
    slow = ("perplexity", "recall", "1e-12", "gradients", "strong gates")
    quick = [claim for claim in gla.claims() if not any(word in claim.name for word in slow)]
    results = [check(claim) for claim in quick]
    assert not [result.name for result in results if result.verdict in (Verdict.DIFFERS, Verdict.UNAVAILABLE)]
    assert {result.verdict for result, claim in zip(results, quick, strict=True) if claim.tolerance == 0.0} == {
        Verdict.AGREES
    }


def test_training_improves_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    small = gla_training.Training(hidden=32, layers=1, heads=1, window=32, batch=4, steps=30)
    found = gla_training.perplexity_per_byte("channel", 0, small)
    assert 2 < found < 180  # 256 for bytes of equal probability
    assert gla_training.perplexity_per_byte("channel", 0, small) == found
    recall = gla_training.RecallTraining(hidden=16, layers=1, pairs=1, tokens=6, symbols=2, batch=16, steps=40)
    assert 0.4 < gla_training.recall_accuracy("channel", training=recall) <= 1


def test_the_catalogue_holds_them():
    for slug in ("lean-attention", "gla"):
        assert system(slug).status in ("started", "complete")
        for name in system(slug).entry_points:
            assert name.startswith("bitwright.")
