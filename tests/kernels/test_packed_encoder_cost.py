"""Counts of an encoder's kernels on a GPU, padded and packed."""

import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import load_machine
from bitwright.kernels.packed_encoder_cost import EncoderShape, encoder_time, layer_kernels
from bitwright.kernels.work import Rates, rates_of

SHAPE = EncoderShape()


def operations(lengths, longest, form):
    return sum(sum(each.operations.values()) for each in layer_kernels(SHAPE, lengths, longest, form))


def test_operations_are_those_of_the_formula_where_tiles_fit():
    tokens = 4 * 512
    expected = 24 * tokens * 768**2 + 4 * 4 * 512**2 * 768
    for form in ("plain", "fused", "packed"):
        found = operations([512] * 4, 512, form)
        # the product with values is one tile of 128 columns for a head of 64
        assert found == pytest.approx(expected + (0 if form == "packed" else 2 * 4 * 512**2 * 768), rel=1e-9)


def test_padding_is_what_the_forms_save():
    lengths = [128, 256, 384, 512]
    linear = 24 * 768**2
    assert operations(lengths, 512, "plain") > linear * 4 * 512
    assert operations(lengths, 512, "packed") < 0.75 * operations(lengths, 512, "fused")
    both = [operations(lengths, 512, form) for form in ("packed", "fused, packed linear layers", "fused")]
    assert both == sorted(both)


def test_forms_are_ordered_in_time_and_launches_bound_short_sequences():
    rates = rates_of(load_machine("a100-80g").device())
    forms = ("packed", "fused, packed linear layers", "fused", "plain")
    times = [encoder_time(SHAPE, [200, 700, 1024, 500], 1024, form, rates) for form in forms]
    assert times == sorted(times)
    slow = Rates(rates.operations_per_s, rates.bytes_per_s, rates.cores, 1e-3)
    short = encoder_time(SHAPE, [16], 16, "plain", slow)
    assert short == pytest.approx(12 * len(layer_kernels(SHAPE, [16], 16, "plain")) * 1e-3, rel=0.05)


def test_bad_input():
    with pytest.raises(UnknownNameError, match="packed"):
        layer_kernels(SHAPE, [4], 8, "nested")
    with pytest.raises(InputError, match="expected 1 to 8"):
        layer_kernels(SHAPE, [9], 8, "packed")
