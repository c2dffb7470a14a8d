"""Attention on the packed cache against float64 attention on the same decoded numbers."""

import numpy as np
import pytest

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError
from bitwright.kernels.block_floating_attention import PackedHeads, decode_attention


def packed(x, name):
    form = formats.parse(name)
    encoded = form.encode(x)
    raw = form.pack(encoded)
    bits = form.code_bits
    size = x.size * bits // 8
    codes = raw[:size].reshape(*x.shape[:2], -1)
    exponents = raw[size:].reshape(*x.shape[:2], -1)
    return PackedHeads(codes, exponents, bits), form.decode(encoded)


def reference(query, keys, values, scale):
    heads = query.shape[0] // keys.shape[0]
    out = np.empty(query.shape)
    for head, q in enumerate(query.astype(np.float64)):
        scores = keys[head // heads].astype(np.float64) @ q * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[head // heads].astype(np.float64)
    return out


@pytest.mark.parametrize("name", ["bfp12_16", "bfp12_32", "bfp12_64", "bfp16_32", "bfp16_64"])
@pytest.mark.parametrize(("heads", "kv_heads", "channels", "tokens"), [(9, 3, 64, 100), (8, 1, 128, 33), (2, 2, 64, 1)])
@pytest.mark.parametrize("vectors", [True, False])
def test_equals_attention_on_the_decoded_cache(name, heads, kv_heads, channels, tokens, vectors):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(2, kv_heads, tokens + 3, channels)).astype(np.float32)
    x[0, :, :, 5] *= 30  # a large channel
    x[1, :, 0] = 0
    query = rng.normal(size=(heads, channels)).astype(np.float32)
    (keys, plain_keys), (values, plain_values) = (packed(each, name) for each in x)
    for threads in (1, 2):
        found = decode_attention(query, keys, values, tokens, threads=threads, vectors=vectors)
        expected = reference(query, plain_keys[:, :tokens], plain_values[:, :tokens], channels**-0.5)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(plain_values).max()


@pytest.mark.parametrize(("name", "channels"), [("bfp12_48", 96), ("bfp12_80", 160), ("bfp12_112", 224)])
def test_blocks_that_end_within_32_channels(name, channels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 2, 9, channels)).astype(np.float32) * np.exp2(rng.integers(-6, 6, (2, 2, 9, channels)))
    query = rng.normal(size=(4, channels)).astype(np.float32)
    (keys, plain_keys), (values, plain_values) = (packed(each.astype(np.float32), name) for each in x)
    expected = reference(query, plain_keys, plain_values, channels**-0.5)
    for vectors in (True, False):
        found = decode_attention(query, keys, values, 9, vectors=vectors)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(plain_values).max()


def test_extreme_scores_keep_the_largest():
    x = np.zeros((1, 4, 64), np.float32)
    x[0, 2] = 1000
    cache, plain = packed(x, "bfp12_32")
    found = decode_attention(np.full((1, 64), 50, np.float32), cache, cache)
    assert np.array_equal(found[0], plain[0, 2])


def test_bad_input():
    cache, _ = packed(np.ones((2, 4, 64), np.float32), "bfp12_32")
    query = np.ones((4, 64), np.float32)
    for made, message in (
        (lambda: decode_attention(query.astype(np.float64), cache, cache), "float32"),
        (lambda: decode_attention(query[:, :32].copy(), cache, cache), "do not fit"),
        (lambda: decode_attention(query[:3], cache, cache), "do not fit"),
        (lambda: decode_attention(query, cache, cache, 5), "holds 1 to 4"),
        (lambda: decode_attention(query, cache, cache, 0), "0 tokens"),
        (lambda: decode_attention(query * np.float32(np.nan), cache, cache), "NaN"),
        (lambda: PackedHeads(cache.codes, cache.exponents, 6), "4 or 8 bits"),
        (lambda: PackedHeads(cache.codes, cache.exponents[:1], 4), "different caches"),
        (lambda: PackedHeads(cache.codes[..., :20], cache.exponents, 4), "multiples of 32"),
        (lambda: decode_attention(query, cache, packed(np.ones((2, 4, 64), np.float32), "bfp16_32")[0]), "belong"),
    ):
        with pytest.raises(InputError, match=message):
            made()
