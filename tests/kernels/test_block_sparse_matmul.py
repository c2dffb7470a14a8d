"""Block-sparse products against numpy integers and torch in float64; scipy's own BSR form as a second reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels import block_sparse_matmul as kernel
from bitwright.kernels.block_sparse_matmul import BlockCSR, Rounding, from_slabs, matmul, matmul_norm, to_slabs

PATHS = kernel.PATHS[kernel.PATHS.index(_native.block_sparse_path()) :]


def block_weights(rng, outputs, inputs, sparsity):
    kept = np.repeat(rng.random((-(-outputs // 4), inputs)) >= sparsity, 4, axis=0)[:outputs]
    return (rng.integers(-128, 128, (outputs, inputs)) * kept).astype(np.int8)


@pytest.mark.parametrize("path", PATHS)
@given(
    st.integers(1, 80), st.integers(1, 90), st.integers(1, 400), st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.sampled_from([16, 40, 64, 100]), st.integers(0, 255), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_sums_equal_integers(path, outputs, inputs, tokens, sparsity, width, zero_point, seed):
    rng = np.random.default_rng(seed)
    w = block_weights(rng, outputs, inputs, sparsity)
    packed = BlockCSR.from_dense(w)
    a = rng.integers(0, 256, (inputs, tokens)).astype(np.uint8)
    expected = w.astype(np.int64) @ (a.astype(np.int64) - zero_point)
    assert np.array_equal(packed.to_dense(), w)
    assert np.array_equal(matmul(packed, a, zero_point=zero_point, path=path, threads=2), expected)
    slabs = matmul(packed, to_slabs(a, width), zero_point=zero_point, tokens=tokens, path=path, threads=2)
    assert np.array_equal(from_slabs(slabs, tokens), expected)
    again = sparse.bsr_array(packed.to_dense(), blocksize=(1, 1)).astype(np.int64)
    assert np.array_equal(again @ (a.astype(np.int64) - zero_point), expected)


@pytest.mark.parametrize("path", PATHS)
def test_extremes_do_not_saturate(path):
    w = np.full((5, 4099), -128, np.int8)
    a = np.full((4099, 70), 255, np.uint8)
    found = matmul(BlockCSR.from_dense(w), a, path=path)
    assert found.shape == (5, 70)
    assert (found == -128 * 255 * 4099).all()
    w[:, ::2] = 127
    assert np.array_equal(matmul(BlockCSR.from_dense(w), a, path=path), w.astype(np.int64) @ a.astype(np.int64))


def test_sizes_of_the_form():
    w = np.zeros((8, 40), np.int8)
    w[0, [1, 5, 7, 8, 39]] = 3  # 5 blocks: 2 groups; the second block row is empty
    packed = BlockCSR.from_dense(w, most_fill=1)
    assert packed.start.tolist() == [0, 2, 2]
    assert packed.index.tolist() == [1, 5, 7, 8, 39, 0, 0, 0]
    assert packed.nbytes == 2 * 16 + 8 * 2 + 3 * 8
    assert packed.blocks == 5
    assert packed.density == 5 / 80
    assert packed.value[:4].tolist() == [3, 3, 3, 3]
    assert packed.value[16:20].tolist() == [3, 0, 0, 0]


def reference(w, a, zero_point, scale, bias, add, gelu):
    y = (w.astype(np.int64) @ (a.astype(np.int64) - zero_point)) * scale[:, None] + bias[:, None]
    y = torch.from_numpy(y if add is None else y + add)
    return (torch.nn.functional.gelu(y) if gelu else y).numpy()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("gelu", "with_add"), [(False, False), (True, False), (False, True), (True, True)])
def test_epilogues_are_those_in_float64(path, gelu, with_add):
    rng = np.random.default_rng(3)
    outputs, inputs, tokens = 50, 77, 133
    w, a = block_weights(rng, outputs, inputs, 0.6), rng.integers(0, 256, (inputs, tokens)).astype(np.uint8)
    scale, bias = (rng.uniform(0.5, 1, outputs) / 20000).astype(np.float32), rng.normal(size=outputs).astype(np.float32)
    add = rng.normal(size=(outputs, tokens)).astype(np.float32) if with_add else None
    packed = BlockCSR.from_dense(w)
    options = {"scale": scale, "bias": bias, "zero_point": 97, "gelu": gelu, "path": path}
    expected = reference(w, a, 97, scale.astype(np.float64), bias, add, gelu)
    np.testing.assert_allclose(matmul(packed, a, add=add, **options), expected, atol=1e-5, rtol=1e-5)
    for rounding in (Rounding(0.031, 41), Rounding(0.027, -3, signed=True)):
        codes = matmul(packed, a, add=add, rounding=rounding, **options)
        exact = np.rint(expected / rounding.scale) + rounding.zero_point
        low, high = (-128, 127) if rounding.signed else (0, 255)
        assert codes.dtype == rounding.dtype
        difference = np.abs(codes.astype(int) - np.clip(exact, low, high))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
        assert np.array_equal(rounding.codes(expected), np.clip(exact, low, high))


@pytest.mark.parametrize("outputs", [7, 64, 200])
@pytest.mark.parametrize("width", [48, 130])
def test_fused_norm_is_the_norm_of_the_product(outputs, width):
    rng = np.random.default_rng(5)
    w, a = block_weights(rng, outputs, 60, 0.5), rng.integers(0, 256, (60, 130)).astype(np.uint8)
    scale, bias, gain, offset = (rng.normal(size=outputs).astype(np.float32) for _ in range(4))
    add = 100 + rng.normal(size=(outputs, 130)).astype(np.float32)  # a mean far from 0
    scale /= 5000
    rounding = Rounding(0.05, 128)
    found, codes = matmul_norm(
        BlockCSR.from_dense(w), to_slabs(a, width), scale=scale, bias=bias, zero_point=3, add=to_slabs(add, width),
        gain=gain, offset=offset, epsilon=1e-6, rounding=rounding, tokens=130, threads=2,
    )  # fmt: skip
    y = torch.from_numpy(reference(w, a, 3, scale.astype(np.float64), bias, add, False))
    mean, variance = y.mean(0), y.var(0, correction=0)
    expected = ((y - mean) / (variance + 1e-6).sqrt()).numpy() * gain[:, None] + offset[:, None]
    # the input of the norm is rounded to float32 near 100: 4e-6 of about 1
    np.testing.assert_allclose(from_slabs(found, 130), expected, atol=3e-5)
    assert np.abs(from_slabs(codes, 130).astype(int) - rounding.codes(expected)).max() <= 1


def test_fused_norm_is_the_norm_of_two_passes():
    rng = np.random.default_rng(6)
    w, a = block_weights(rng, 96, 60, 0.5), rng.integers(0, 256, (60, 70)).astype(np.uint8)
    packed, scale = BlockCSR.from_dense(w), 1e-4
    y = torch.from_numpy(matmul(packed, a, scale=scale))
    two = torch.nn.functional.layer_norm(y.T.double(), (96,), eps=1e-5).T
    fused, codes = matmul_norm(packed, a, scale=scale, gain=1, offset=0, epsilon=1e-5, threads=2)
    assert codes is None
    assert np.abs(fused - two.numpy()).max() < 2e-6


def heads_of(x, slab, begin, count, heads):
    part = torch.from_numpy(x[slab, :, begin : begin + count].astype(np.float64))
    return part.reshape(heads, -1, count).transpose(1, 2)


SEQUENCES = [(0, 0, 1), (0, 1, 30), (0, 40, 90), (1, 3, 66), (1, 69, 64)]


@pytest.mark.parametrize("path", PATHS)
def test_attention_on_codes_is_attention(path):
    rng = np.random.default_rng(7)
    shape, heads = (2, 64, 133), 2
    q = rng.integers(0, 256, shape).astype(np.uint8)
    k, v = (rng.integers(-128, 128, shape).astype(np.int8) for _ in range(2))
    rounding = Rounding(1.0, 128)
    found = kernel.attention(
        q, k, v, SEQUENCES, heads, q_zero_point=131, score_scale=2e-5, value_scale=1.0, rounding=rounding, threads=2,
        path=path,
    )  # fmt: skip
    seen = np.zeros(shape, bool)
    for slab, begin, count in SEQUENCES:
        own_q, own_k, own_v = (heads_of(x, slab, begin, count, heads) for x in (q, k, v))
        weights = torch.softmax(2e-5 * (own_q - 131) @ own_k.transpose(1, 2), -1)
        expected = (weights @ own_v).transpose(1, 2).reshape(64, count).numpy()
        codes = found[slab, :, begin : begin + count]
        # a probability is off by 1/510 at most
        bound = np.abs(v[slab, :, begin : begin + count].astype(float)).sum(1).max() / 510 + 0.51
        assert np.abs((codes - 128.0) - expected).max() < min(bound, 6)
        seen[slab, :, begin : begin + count] = True
    assert (found[~seen] == 128).all()


def test_probabilities_within_a_hundredth():
    """Values that are unit vectors show the probabilities themselves."""
    rng = np.random.default_rng(8)
    q = rng.integers(0, 256, (1, 32, 32)).astype(np.uint8)
    k = rng.integers(-128, 128, (1, 32, 32)).astype(np.int8)
    v = (100 * np.eye(32, dtype=np.int8))[None]
    found = kernel.attention(
        q, k, v, [(0, 0, 32)], 1, q_zero_point=128, score_scale=1e-4, value_scale=0.01, rounding=Rounding(1 / 255)
    )
    expected = torch.softmax(1e-4 * torch.from_numpy(k[0].T.astype(float) @ (q[0].astype(float) - 128)), 0)
    assert np.abs(found[0] / 255 - expected.numpy()).max() < 1e-2


def test_attention_in_floats_is_attention():
    rng = np.random.default_rng(9)
    q, k, v = (rng.normal(size=(2, 64, 133)).astype(np.float32) for _ in range(3))
    found = kernel.attention_float(q, k, v, SEQUENCES, 2, scale=0.2, threads=2)
    for slab, begin, count in SEQUENCES:
        own = [heads_of(x, slab, begin, count, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*own, scale=0.2)
        expected = expected.transpose(1, 2).reshape(64, count).numpy()
        np.testing.assert_allclose(found[slab, :, begin : begin + count], expected, atol=1e-5)


def test_bad_weights():
    rng = np.random.default_rng(0)
    scattered = (rng.integers(1, 128, (64, 64)) * (rng.random((64, 64)) < 0.1)).astype(np.int8)
    with pytest.raises(InputError, match=r"not pruned in these blocks.*block_pruning"):
        BlockCSR.from_dense(scattered)
    assert np.array_equal(BlockCSR.from_dense(scattered, most_fill=1).to_dense(), scattered)
    for weights, message in (
        (np.ones((4, 4)), "int8"), (np.ones(4, np.int8), "int8"), (np.ones((0, 4), np.int8), "int8"),
        (np.ones((4, (1 << 16) + 1), np.int8), "overflow the 16-bit index"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            BlockCSR.from_dense(weights)
    with pytest.raises(InputError, match=r"\(4, 1\)"):
        BlockCSR.from_dense(scattered, block=(1, 4))
    assert BlockCSR.from_dense(np.ones((4, 1 << 16), np.int8)).index.max() == 65535


def test_bad_input():
    w = BlockCSR.from_dense(np.ones((8, 6), np.int8))
    a = np.ones((6, 10), np.uint8)
    for wrong in (a.astype(np.int8), a.astype(float), np.ones((5, 10), np.uint8), np.ones((6, 0), np.uint8), [[1]]):
        with pytest.raises(InputError, match=r"Activations|inputs"):
            matmul(w, wrong)
    with pytest.raises(InputError, match="not contiguous"):
        matmul(w, np.ones((10, 6), np.uint8).T)
    with pytest.raises(InputError, match="give `scale`"):
        matmul(w, a, rounding=Rounding(1.0))
    for options in ({"scale": np.nan}, {"scale": np.ones(7)}, {"scale": 1.0, "bias": np.inf}):
        with pytest.raises(InputError, match="finite number or one for each"):
            matmul(w, a, **options)
    with pytest.raises(InputError, match="zero point"):
        matmul(w, a, zero_point=256)
    with pytest.raises(InputError, match="zero point"):
        Rounding(1.0, -1)
    with pytest.raises(InputError, match="positive scale"):
        Rounding(float("nan"))
    with pytest.raises(InputError, match="last of the slabs"):
        matmul(w, to_slabs(a, 4), tokens=8)
    with pytest.raises(InputError, match="What is added"):
        matmul(w, a, scale=1.0, add=np.ones((8, 10)))
    with pytest.raises(InputError, match="The result is"):
        matmul(w, a, out=np.ones((8, 9), np.int32))
    with pytest.raises(InputError, match="Instruction sets"):
        matmul(w, a, path="sse")
    q, k = np.ones((1, 8, 9), np.uint8), np.ones((1, 8, 9), np.int8)
    options = {"q_zero_point": 1, "score_scale": 1.0, "value_scale": 1.0, "rounding": Rounding(1.0)}
    for sequences in ([(0, 0, 10)], [(1, 0, 1)], [(0, -1, 2)], np.empty((0, 3)), [(0, 0)]):
        with pytest.raises(InputError, match=r"outside|Sequences"):
            kernel.attention(q, k, k, sequences, 2, **options)
    with pytest.raises(InputError, match="has no 3 heads"):
        kernel.attention(q, k, k, [(0, 0, 1)], 3, **options)
    with pytest.raises(InputError, match="multiples of 4"):
        kernel.attention(q, k, k, [(0, 0, 1)], 4, **options)
    with pytest.raises(InputError, match="k is contiguous int8"):
        kernel.attention(q, q, k, [(0, 0, 1)], 2, **options)


def test_indices_outside_are_refused():
    w = BlockCSR.from_dense(np.ones((8, 6), np.int8))
    broken = BlockCSR(w.shape, w.start, np.full_like(w.index, 6), w.value, w.sums, w.blocks)
    with pytest.raises(ValueError, match="outside of the activations"):
        matmul(broken, np.ones((6, 10), np.uint8))


def test_a_cpu_without_the_instructions_is_told_once(monkeypatch):
    kernel.usable_path.cache_clear()
    monkeypatch.setattr(_native, "block_sparse_path", lambda: "portable")
    with pytest.warns(RuntimeWarning, match="lacks the vnni instructions of block-sparse products"):
        assert kernel.usable_path() == "portable"
    kernel.usable_path.cache_clear()


def test_slabs_start_cache_lines():
    assert [kernel.slab_width(n) for n in (1, 17, 64, 65, 96, 97, 4096)] == [16, 32, 64, 128, 128, 64, 64]
    a = np.arange(70 * 5, dtype=np.int64).astype(np.uint8).reshape(5, 70)
    slabs = to_slabs(a, 64)
    assert slabs.ctypes.data % 64 == 0
    assert slabs.shape == (2, 5, 64)
    assert np.array_equal(from_slabs(slabs, 70), a)
    assert (slabs[1, :, 6:] == 0).all()
    with pytest.raises(InputError, match="at least one"):
        kernel.slab_width(0)
    with pytest.raises(InputError, match="cut into slabs"):
        to_slabs(a, 0)
