"""Widths are enough for the worst operands there are, and one bit less is not."""

from dataclasses import replace

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine import evaluate
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run
from bitwright.engine.legality import check
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations import apply
from bitwright.engine.widths import carry_save_pairs, fit_widths, ranges, required_widths


def narrowed(nest, names, bits):
    """The nest with some words at another width."""
    return replace(nest, values=tuple(replace(v, bits=bits) if v.name in names else v for v in nest.values))


def worst(k):
    return np.full((2, k), -128), np.full((k, 2), -128)


def unchecked(nest, a, b):
    """What the primitives give where `run` refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "check_depth", lambda nest, k: None)
        return run(nest, a, b, modular=True)


@pytest.mark.parametrize(
    ("sequence", "state"),
    [
        ((), "acc"),
        (("opt1",), "acc_s"),
        (("sign_free",), "acc"),
        (("opt1", "sign_free"), "acc_s"),
    ],
)
@pytest.mark.parametrize("k", [1, 4, 8, 100])
def test_accumulators(sequence, state, k):
    needed = required_widths(apply(gemm("os", 2, 2), *sequence), k)[state]
    assert needed == (k * 128 * 128).bit_length() + 1
    a, b = worst(k)
    enough = apply(gemm("os", 2, 2, accumulator_bits=needed), *sequence)
    check(enough, k)
    np.testing.assert_array_equal(run(enough, a, b), a @ b)
    short = apply(gemm("os", 2, 2, accumulator_bits=needed - 1), *sequence)
    with pytest.raises(IllegalTransformation, match=f"Rule 6 .*K = {k} need {needed}"):
        check(short, k)
    assert (run(short, a, b, modular=True) != a @ b).all()


@pytest.mark.parametrize("sequence", [("opt2",), ("opt3",), ("opt4c",)])
def test_the_narrow_state_of_one_bit_weight(sequence):
    nest = apply(gemm("os", 2, 2), *sequence)
    assert (nest.words["acc_s"].bits, nest.words["acc"].bits) == (26, 32)  # three digits of radix 4 less
    k = 8
    needed = required_widths(nest, k)["acc_s"]
    assert needed == (k * 2 * 128).bit_length() + 1  # -2 * -128, the top digit of -128
    a, b = worst(k)
    enough = narrowed(nest, ("acc_s", "acc_c", "acc_bw"), needed)
    check(enough, k)
    np.testing.assert_array_equal(run(enough, a, b), a @ b)
    short = narrowed(nest, ("acc_s", "acc_c", "acc_bw"), needed - 1)
    with pytest.raises(IllegalTransformation, match="Rule 6"):
        check(short, k)
    with pytest.raises(IllegalTransformation, match="Rule 6"):
        run(short, a, b)
    assert (unchecked(short, a, b) != a @ b).all()


def test_partial_sums_of_a_cube():
    nest = gemm("cube", 2, 2, 4)
    assert nest.words["t"].bits == 18  # four products of up to 2^14
    a, b = worst(8)
    np.testing.assert_array_equal(run(nest, a, b), a @ b)
    assert (unchecked(narrowed(nest, ("t",), 17), a, b) != a @ b).all()


def test_products_and_digits():
    nest = gemm("os", 2, 2)
    assert {name: nest.words[name].bits for name in ("d", "m", "p")} == {"d": 3, "m": 10, "p": 16}
    bounds = ranges(nest)
    assert (bounds["m"].low, bounds["m"].high) == (-256, 256)
    assert (bounds["p"].low, bounds["p"].high) == (-127 * 128, 128 * 128)
    assert bounds["acc"] is None
    assert ranges(nest, 3)["acc"].high == 3 * 128 * 128
    assert fit_widths(nest) == nest


def test_a_sum_that_starts_to_grow_with_k_is_widened():
    nest = apply(gemm("cube", 2, 2, 2), "reorder kt kp")
    assert nest.words["t"].bits == 32
    assert required_widths(nest, 64)["t"] > 18


def test_pairs():
    nest = apply(gemm("os", 2, 2), "pipeline p_s")
    pairs = carry_save_pairs(nest)
    assert pairs["p_c"] == ("p_s", "p_c")
    assert pairs["p_s_r"] == ("p_s_r", "p_c_r")


def test_no_terms():
    with pytest.raises(InputError, match="at least one term"):
        required_widths(gemm("os", 2, 2), 0)
