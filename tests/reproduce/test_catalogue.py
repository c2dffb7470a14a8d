import json

import pytest

from bitwright.core.errors import BitwrightError, UnknownNameError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce import catalogue
from bitwright.reproduce.catalogue_pages import overview, page
from bitwright.reproduce.claims import Claim, ClaimResult, Verdict, check


def test_the_catalogue_has_76_distinct_systems_in_order():
    entries = catalogue.systems()
    assert [entry.number for entry in entries] == [f"{number:02}" for number in range(1, 77)]
    assert len({entry.slug for entry in entries}) == 76
    assert entries[72].title.startswith("HyperZ·Z·W")


def test_a_planned_system_says_so():
    planned = catalogue.system("monolith")
    assert planned.status == "planned"
    with pytest.raises(BitwrightError, match="planned"):
        planned.claims()


def test_an_unknown_system_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'bitweight-tpe'"):
        catalogue.system("bitweigth-tpe")


def test_every_entry_point_exists():
    import importlib

    for entry in catalogue.systems():
        for point in entry.entry_points:
            module, name = point.rsplit(".", 1)
            assert hasattr(importlib.import_module(module), name), point


def figure(value):
    return Quantity(value, "x", Evidence.EXECUTED)


@pytest.mark.parametrize(
    ("ours", "tolerance", "verdict"),
    [(1.03, 0.05, Verdict.AGREES), (0.94, 0.05, Verdict.DIFFERS), (5.0, None, Verdict.REPORTED)],
)
def test_a_verdict_follows_from_the_tolerance(ours, tolerance, verdict):
    assert check(Claim("c", "", figure(1.0), lambda: figure(ours), tolerance)).verdict is verdict


def test_what_cannot_be_measured_is_unavailable_with_the_reason():
    def measure():
        raise BitwrightError("no such library")

    result = check(Claim("c", "", figure(1.0), measure, 0.1))
    assert result.verdict is Verdict.UNAVAILABLE
    assert result.explanation == "no such library"


def test_the_page_has_a_row_per_system():
    page = overview(catalogue.systems())
    assert sum(line.startswith("| ") for line in page.splitlines()) == 77


def test_kept_results_are_those_of_the_claims_of_today():
    kept = {entry.slug: catalogue.stored_results(entry.slug) for entry in catalogue.systems()}
    assert any(kept.values())
    for slug, results in kept.items():
        if results:
            claims = catalogue.system(slug).claims()
            assert [result.name for result in results] == [claim.name for claim in claims], slug
            for result, claim in zip(results, claims, strict=True):
                one, other = result.published, claim.published
                # a published figure may be computed from a formula, whose last bit depends on the processor
                assert one.value == pytest.approx(other.value, rel=1e-12), slug
                assert (one.unit, one.evidence, one.source) == (other.unit, other.evidence, other.source), slug


def test_a_result_survives_json_and_has_its_row_on_the_page():
    result = check(Claim("speed | up", "one core", figure(2.0), lambda: figure(1.0), 0.1, "because of the cache"))
    assert ClaimResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    text = page(catalogue.system("mixpe"), [result])
    assert "| speed \\| up | one core | 2 x | 1 x | executed | differs (1) |" in text
    assert "(1) because of the cache" in text
    assert catalogue.verdict_counts([result]) == "1 differ"
