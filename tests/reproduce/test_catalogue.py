import pytest

from bitwright.core.errors import BitwrightError, UnknownNameError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce import catalogue
from bitwright.reproduce.claims import Claim, Verdict, check


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
    page = catalogue.markdown(catalogue.systems())
    assert sum(line.startswith("| ") for line in page.splitlines()) == 77
