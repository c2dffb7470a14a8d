"""Sparse products against float64 products of the same float16 weights; forms against their published layout."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels import sparse_matmul as kernel
from bitwright.kernels.sparse_matmul import BitmapTiles, BlockedCSR, TiledCSL, best_form, bytes_per_weight, matmul

FORMS = (TiledCSL, BitmapTiles, BlockedCSR)
PATHS = kernel.PATHS[kernel.PATHS.index(_native.sparse_path()) :]


def pruned(rng, m, k, sparsity):
    w = rng.normal(size=(m, k)).astype(np.float16)
    w[rng.random((m, k)) < sparsity] = 0
    return w


def quietly(form, w, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return form.from_dense(w, **options)


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint16), b.view(np.uint16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.9, 0.99, 1.0])
def test_there_and_back_is_exact(form, sparsity):
    w = pruned(np.random.default_rng(0), 300, 700, sparsity)
    w[5], w[:, 9] = 1.5, -2  # a full row and column
    w[130:260] = 0  # an empty strip of tiles
    w[0, :3] = np.array([0x7E01, 0x8000, 0xFC00], np.uint16).view(np.float16)  # NaN with payload, -0, -infinity
    assert same_bits(quietly(form, w).to_dense(), w)


@given(st.integers(1, 300), st.integers(1, 600), st.floats(0, 1), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_random_shapes_there_and_back(m, k, sparsity, reorder, seed):
    w = pruned(np.random.default_rng(seed), m, k, sparsity)
    assert same_bits(quietly(TiledCSL, w, reorder=reorder).to_dense(), w)
    assert same_bits(BitmapTiles.from_dense(w).to_dense(), w)
    assert same_bits(BlockedCSR.from_dense(w).to_dense(), w)


@pytest.mark.parametrize("reorder", [True, False])
def test_words_offsets_and_places(reorder):
    w = pruned(np.random.default_rng(1), 256, 192, 0.8)
    made = TiledCSL.from_dense(w, reorder=reorder)
    counts = np.array([np.count_nonzero(w[r : r + 128, c : c + 64]) for r in (0, 128) for c in (0, 64, 128)])
    vectors = -(-counts // 4)
    assert made.offsets.tolist() == [0, *np.cumsum(vectors), vectors.sum()]
    assert made.nbytes == 16 * vectors.sum() + 4 * (6 + 2)
    first = made.words[: 4 * vectors[0]]
    place = first >> 16
    assert len(set(place.tolist())) == len(place)  # filling has places of zeros, each once
    row, column = place // 64, (place % 64) ^ (place // 64 % 8 * 8)
    assert np.array_equal((first & 0xFFFF).astype(np.uint16), w.view(np.uint16)[row, column])
    assert np.count_nonzero(first & 0xFFFF) == counts[0]


def test_order_of_banks_is_greedy():
    """Every group of 32 lanes takes the fullest of the remaining banks, in the order of the published builder."""
    w = pruned(np.random.default_rng(2), 128, 64, 0.8)
    words = TiledCSL.from_dense(w).words
    vectors = len(words) // 4
    rounds, tail = divmod(vectors, 32)
    steps = [words[rounds * 128 + lane * 4 + v] for v in range(4) for lane in range(tail)]
    steps += [words[r * 128 + lane * 4 + v] for r in range(rounds) for v in range(4) for lane in range(32)]
    banks = [int(word >> 16) % 64 // 2 for word in steps]
    left = np.bincount(banks, minlength=32)
    for bank in banks:
        assert left[bank] == left.max()
        left[bank] -= 1


@pytest.mark.parametrize(
    ("sparsity", "greedy", "plain"), [(0.5, 1.25, 2.95), (0.7, 1.35, 3.2), (0.8, 1.46, 3.5), (0.9, 1.64, 3.75)]
)
def test_bank_conflicts(sparsity, greedy, plain):
    """Figures of a simulator of its own, written for the format."""
    w = pruned(np.random.default_rng(3), 1024, 1024, sparsity)
    assert TiledCSL.from_dense(w).conflicts() == pytest.approx(greedy, rel=0.1)
    assert TiledCSL.from_dense(w, reorder=False).conflicts() == pytest.approx(plain, rel=0.15)


def conflicts_by_hand(words):
    """Of one tile's words: a store is one number of each of 32 vectors."""
    found = []
    for first in range(0, len(words), 128):
        block = words[first : first + 128].reshape(-1, 4)
        for v in range(4):
            half = {int(word >> 16) // 2 for word in block[:, v]}
            found.append(np.bincount([each % 32 for each in half]).max())
    return np.mean(found)


@pytest.mark.parametrize("reorder", [True, False])
def test_conflicts_are_counted_by_bank_and_word(reorder):
    made = TiledCSL.from_dense(pruned(np.random.default_rng(4), 128, 64, 0.7), reorder=reorder)
    assert made.conflicts() == pytest.approx(conflicts_by_hand(made.words))
    assert TiledCSL.from_dense(np.zeros((128, 64), np.float16)).conflicts() == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
@given(
    st.integers(1, 270), st.integers(1, 1100), st.sampled_from([1, 2, 8, 16, 24, 64, 130]),
    st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_products_are_those_in_float64(path, form, m, k, n, sparsity, seed):
    rng = np.random.default_rng(seed)
    w, b = pruned(rng, m, k, sparsity), rng.normal(size=(k, n)).astype(np.float32)
    found = matmul(quietly(form, w), b, threads=2, path=path)
    expected = w.astype(np.float64) @ b.astype(np.float64)
    # k additions in float32, each off by half a unit in the last place of what was added so far
    bound = (np.abs(w).astype(np.float64) @ np.abs(b)) * 2**-24 * (k + 2) + 1e-30
    assert found.shape == (m, n)
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("path", PATHS)
def test_splits_along_k_change_only_the_rounding(path):
    rng = np.random.default_rng(5)
    w, b = pruned(rng, 200, 650, 0.7), rng.normal(size=(650, 9)).astype(np.float16)
    made = TiledCSL.from_dense(w)
    whole = matmul(made, b, split_k=1, path=path)
    for parts in (2, 3, 7, 11):
        found = matmul(made, b, split_k=parts, path=path, threads=2)
        np.testing.assert_allclose(found, whole, atol=2e-4)
        assert np.array_equal(found, matmul(made, b, split_k=parts, path=path, threads=1))


@pytest.mark.parametrize("density", [0.45, 0.49, 0.55, 0.8, 1.0])
def test_tiles_beyond_the_registers_are_kept_dense(density):
    rng = np.random.default_rng(6)
    w = pruned(rng, 256, 128, 0.7)
    w[:128, 64:] = pruned(rng, 128, 64, 1 - density)
    made = TiledCSL.from_dense(w)
    over = -(-np.count_nonzero(w[:128, 64:]) // 4) * 4 > kernel.REGISTER_BUDGET
    assert (made.slot >= 0).tolist() == [False, over, False, False]
    assert made.densest <= kernel.REGISTER_BUDGET
    assert made.nbytes == 4 * len(made.words) + 4 * 6 + over * 128 * 64 * 2
    assert same_bits(made.to_dense(), w)
    b = rng.normal(size=(128, 5)).astype(np.float32)
    for path in PATHS:
        np.testing.assert_allclose(matmul(made, b, path=path), w.astype(float) @ b, atol=1e-4)


def test_bytes():
    w = pruned(np.random.default_rng(7), 2048, 2048, 0.8)
    share = np.count_nonzero(w) / w.size
    wanted = bytes_per_weight(share)
    assert TiledCSL.from_dense(w).nbytes / w.size == pytest.approx(wanted["tiled words"], rel=0.01)
    assert BitmapTiles.from_dense(w).nbytes / w.size == pytest.approx(wanted["bitmap"], rel=0.01)
    assert BlockedCSR.from_dense(w).nbytes / w.size == pytest.approx(wanted["rows"], rel=0.03)
    assert [round(bytes_per_weight(d)["tiled words"] / 2, 2) for d in (0.3, 0.2, 0.1)] == [0.6, 0.4, 0.2]
    assert bytes_per_weight(0.93)["bitmap"] < 2 < bytes_per_weight(0.94)["bitmap"]
    with pytest.raises(InputError, match="share from 0 to 1"):
        bytes_per_weight(1.1)


def test_form_for_a_number_of_columns():
    rng = np.random.default_rng(8)
    assert isinstance(best_form(pruned(rng, 128, 64, 0.5), 1), BitmapTiles)
    assert isinstance(best_form(pruned(rng, 128, 64, 0.9), 16), BlockedCSR)
    with pytest.raises(InputError, match="at least one"):
        best_form(pruned(rng, 128, 64, 0.5), 0)


def test_bad_weights():
    w = pruned(np.random.default_rng(9), 128, 64, 0.2)
    with pytest.warns(UserWarning, match="below 50 %"):
        TiledCSL.from_dense(w, most_words=8192)
    with pytest.raises(InputError, match=r"tiles of \(128, 64\)"):
        TiledCSL.from_dense(w, tile=(64, 64))
    for form in FORMS:
        for wrong in (w.astype(np.float64), w[0], np.empty((0, 4), np.float16), w.astype(int)):
            with pytest.raises(InputError, match="float16 or float32"):
                form.from_dense(wrong)
        for number in (1e5, np.nan, np.inf):
            wide = np.zeros((4, 4), np.float32)
            wide[1, 1] = number
            with pytest.raises(InputError, match="not finite in float16"):
                form.from_dense(wide)
    assert same_bits(BitmapTiles.from_dense(w.astype(np.float32)).to_dense(), w)


def test_bad_activations():
    w = pruned(np.random.default_rng(10), 130, 70, 0.6)
    b = np.ones((70, 3), np.float32)
    for form in FORMS:
        made = form.from_dense(w)
        for wrong in (b.astype(np.float64), b[0], b[:69], b[:, :0]):
            with pytest.raises(InputError, match="Activations are float16 or float32"):
                matmul(made, wrong)
        with pytest.raises(InputError, match="NaN or infinity"):
            matmul(made, np.where(b == 1, np.nan, b).astype(np.float32))
        with pytest.raises(InputError, match="Instruction sets"):
            matmul(made, b, path="sse")
        with pytest.raises(InputError, match="split_k"):
            matmul(made, b, split_k=3)
        assert np.array_equal(matmul(made, b.T.copy().T), matmul(made, b))


def test_broken_forms_are_refused():
    w = pruned(np.random.default_rng(11), 32, 64, 0.6)
    b = np.ones((64, 3), np.float32)
    made = BitmapTiles.from_dense(w)
    broken = BitmapTiles(made.shape, made.masks | 1, made.start, made.values)
    with pytest.raises(ValueError, match="do not belong together"):
        matmul(broken, b)
    rows = BlockedCSR.from_dense(w)
    with pytest.raises(ValueError, match="rows out of order"):
        matmul(BlockedCSR(rows.shape, np.concatenate([rows.start[:1], rows.start[2:0:-1], rows.start[3:]]), rows.index,
                          rows.values), b)  # fmt: skip
