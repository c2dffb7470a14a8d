import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import Evidence, Quantity, format_value, parse_quantity


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("2.0 TB/s", "B/s", 2.0e12),
        ("80 GiB", "B", 80 * 2**30),
        ("1.41 GHz", "Hz", 1.41e9),
        ("600 mV", "V", 0.6),
        ("312 TFLOP/s", "FLOP/s", 312e12),
        ("25 Gbit/s", "B/s", 25e9 / 8),
        ("4 pJ/bit", "J/B", 32e-12),
        (3, "", 3.0),
    ],
)
def test_units_are_converted_to_base_units(text, unit, value):
    assert parse_quantity(text, unit) == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("80 GHz", "B"),
        ("2 THz", "B/s"),
        ("fast", "B/s"),
        (80, "B"),
        ("80", "B"),
        ("1e999 B", "B"),
        ("", "B"),
        ("3 zorkmid", "B"),
        ("9**9**9**9 B", "B"),
        ("2 m^99", "m"),
        ("1" * 100 + " B", "B"),
        (True, ""),
    ],
)
def test_what_is_not_a_quantity_in_the_unit_is_refused(text, unit):
    with pytest.raises(InputError):
        parse_quantity(text, unit)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (0, "s", "0 s"),
        (999.99e-6, "s", "1 ms"),
        (-2.5e12, "B/s", "-2.5 TB/s"),
        (146943, "cycles", "146,943 cycles"),
        (1.27, "x", "1.27 x"),
        (float("inf"), "s", "inf s"),
    ],
)
def test_values_are_formatted_with_prefixes(value, unit, text):
    assert format_value(value, unit) == text


def test_a_figure_survives_json():
    figure = Quantity(1.5e-9, "s", Evidence.SYNTHESISED, "predictive 28 nm cells")
    assert Quantity.from_json(figure.to_json()) == figure
    assert "synthesised" in str(figure)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    assert "Did you mean 'gpt3-175b'" in str(UnknownNameError("model", "gpt3", ["gpt2", "gpt3-175b"]))
    error = UnknownNameError("machine", "a10-80g", ["h100", "a100-80g"])
    assert "Did you mean 'a100-80g'" in str(error)
    assert "a100-80g, h100" in str(error)
    assert error.exit_code == 2
