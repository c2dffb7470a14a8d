"""Decode attention by every partition against float64 attention of numpy."""

import threading

import numpy as np
import pytest
import torch

from bitwright.core.errors import InputError
from bitwright.kernels import attention_partition as ap
from bitwright.kernels.decode_attention import PATHS, decode_attention


def reference(query, keys, values, lengths, scale=None):
    q, k, v = (torch.as_tensor(each).double().numpy() for each in (query, keys, values))
    group = q.shape[1] // k.shape[1]
    out, lse = np.zeros((*q.shape[:2], v.shape[3])), np.full(q.shape[:2], -np.inf)
    for b, length in enumerate(lengths):
        for h in range(q.shape[1] if length else 0):
            scores = k[b, h // group, :length] @ q[b, h] * (scale or q.shape[2] ** -0.5)
            weights = np.exp(scores - scores.max())
            lse[b, h] = scores.max() + np.log(weights.sum())
            out[b, h] = weights / weights.sum() @ v[b, h // group, :length]
    return out, lse


def cache(sequences, heads, kv_heads, tokens, channels, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, channels, generator=generator).to(kind)
        for shape, kind in (
            ((sequences, heads), torch.float32),
            ((sequences, kv_heads, tokens), dtype),
            ((sequences, kv_heads, tokens), dtype),
        )
    ]
    return made


def check(found, expected, tolerance=1e-5):
    out, lse = (np.asarray(each) for each in found)
    assert np.abs(out - expected[0]).max() < tolerance
    kept = np.isfinite(expected[1])
    assert np.abs(lse[kept] - expected[1][kept]).max(initial=0) < tolerance
    assert (lse[~kept] == -np.inf).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "tokens"),
    [(1, 1, 64, 1000), (8, 1, 128, 333), (6, 6, 80, 130), (7, 1, 40, 97), (6, 2, 33, 50), (3, 1, 1, 20)],
)
def test_equals_float64_attention(path, dtype, heads, kv_heads, channels, tokens):
    q, k, v = cache(2, heads, kv_heads, tokens, channels, dtype)
    lengths = [tokens, tokens // 3]
    expected = reference(q, k, v, lengths)
    for schedule in ap.SCHEDULES:
        check(
            decode_attention(q, k, v, lengths, schedule=schedule, workers=5, tile=32, path=path, return_lse=True),
            expected,
        )


def test_any_number_of_workers():
    q, k, v = cache(3, 4, 2, 70, 16)
    lengths = [70, 1, 33]
    expected = reference(q, k, v, lengths)
    total = int(ap.tiles_of(lengths, 2, 8).sum())
    for workers in range(1, total + 2):
        check(decode_attention(q, k, v, lengths, workers=workers, tile=8, return_lse=True), expected)


def test_very_ragged_batch():
    q, k, v = cache(4, 8, 1, 65536, 32)
    lengths = [1, 7, 4097, 65536]
    check(decode_attention(q, k, v, lengths, workers=7, threads=2, return_lse=True), reference(q, k, v, lengths), 2e-6)


def test_same_bits_on_any_threads():
    q, k, v = cache(2, 6, 3, 3000, 64)
    first = decode_attention(q, k, v, [3000, 1200], workers=8, tile=64, threads=1)
    for _ in range(10):
        assert torch.equal(first, decode_attention(q, k, v, [3000, 1200], workers=8, tile=64, threads=2))


def test_partition_is_the_one_that_is_given():
    q, k, v = cache(1, 2, 2, 100, 16)
    made = ap.Partition(np.array([10, 10]), np.array([0, 3, 3, 17, 20]))  # one worker has nothing to do
    check(decode_attention(q, k, v, partition=made, tile=10, return_lse=True), reference(q, k, v, [100]))
    with pytest.raises(InputError, match="other lengths"):
        decode_attention(q, k, v, [64], partition=made, tile=10)
    with pytest.raises(InputError, match="order of blocks"):
        decode_attention(q[:, :1], k[:, :1], v[:, :1], partition=made, tile=10)


def test_empty_sequences_and_scale():
    q, k, v = cache(2, 2, 1, 40, 16)
    check(decode_attention(q, k, v, [0, 40], scale=0.5, return_lse=True), reference(q, k, v, [0, 40], 0.5))
    check(decode_attention(q, k, v, [0, 0], return_lse=True), reference(q, k, v, [0, 0]))


def test_strides_types_and_numpy():
    q, k, v = cache(2, 4, 2, 60, 32)
    expected = reference(q, k, v, [60, 60])
    across = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (k, v)]  # (sequence, token, head, channel)
    check(decode_attention(q, *across, return_lse=True), expected)
    found = decode_attention(q.numpy(), k.numpy(), v.numpy(), return_lse=True)
    assert isinstance(found[0], np.ndarray)
    check(found, expected)
    half = decode_attention(q.half(), k.half().requires_grad_(), v.half())
    assert half.dtype == torch.float16
    wide = torch.randn(2, 2, 60, 48)
    check(decode_attention(q, k, wide, return_lse=True), reference(q, k, wide, [60, 60]))


def test_large_scores():
    q, k, v = cache(1, 1, 1, 300, 64)
    check(decode_attention(q * 40, k, v, workers=6, tile=16, return_lse=True), reference(q * 40, k, v, [300]), 1e-4)


def test_pages_in_any_order():
    q, k, v = cache(2, 4, 2, 96, 32)
    lengths = [96, 41]
    order = np.random.default_rng(0).permutation(16)[:12].reshape(2, 6)
    pages = [torch.full((16, 2, 16, 32), float("nan")) for _ in range(2)]
    for b in range(2):
        for at, page in enumerate(order[b]):
            for paged, plain in zip(pages, (k, v), strict=True):
                paged[page] = plain[b, :, at * 16 : at * 16 + 16]
    for tile in (8, 16, 24, 96):
        check(
            decode_attention(q, *pages, lengths, page_table=order, tile=tile, workers=3, return_lse=True),
            reference(q, k, v, lengths),
        )


def test_a_fault_of_a_peer_is_an_error_and_no_hang():
    q, k, v = cache(1, 1, 1, 16, 16)
    table = np.zeros((1, 64), np.int64)
    table[0, 40] = 7  # a page that does not exist, met by one worker of many
    caught = []

    def call():
        with pytest.raises(InputError, match="names page 7"):
            decode_attention(q, k, v, page_table=table, tile=16, workers=16, threads=2)
        caught.append(True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert caught
    table[0, 40] = 0
    decode_attention(q, k, v, page_table=table, tile=16, workers=16, threads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_are_written_and_seen(dtype):
    q, k, v = cache(2, 4, 2, 50, 16, dtype)
    lengths = [50, 33]
    new = [torch.randn(2, 2, 16).to(dtype) for _ in range(2)]
    after = [each.clone() for each in (k, v)]
    for each, rows in zip(after, new, strict=True):
        for b, length in enumerate(lengths):
            each[b, :, length - 1] = rows[b]
    for schedule in ap.SCHEDULES:
        mine = [each.clone() for each in (k, v)]
        found = decode_attention(q, *mine, lengths, append=(new[0], new[1]), schedule=schedule, workers=4, tile=8,
                                 return_lse=True)  # fmt: skip
        check(found, reference(q, *after, lengths))
        assert torch.equal(mine[0], after[0])
        assert torch.equal(mine[1], after[1])


def test_nan_in_the_cache_spreads():
    q, k, v = cache(1, 2, 2, 100, 16)
    k[0, 0, 77, 3] = float("nan")
    found = decode_attention(q, k, v, workers=3, tile=16)
    assert torch.isnan(found[0, 0]).all()
    assert torch.isfinite(found[0, 1]).all()


def test_bad_input():
    q, k, v = cache(2, 4, 2, 20, 16)
    read_only = k.numpy().copy()
    read_only.flags.writeable = False
    new = (torch.zeros(2, 2, 16), torch.zeros(2, 2, 16))
    for make, message in (
        (lambda: decode_attention(q[:, :3], k, v), "do not fit"),
        (lambda: decode_attention(q.long(), k, v), "floating"),
        (lambda: decode_attention(q[0], k, v), "floating"),
        (lambda: decode_attention(q * float("nan"), k, v), "NaN"),
        (lambda: decode_attention(q, k.double(), v.double()), "float64"),
        (lambda: decode_attention(q, k, v.half()), "not of one cache"),
        (lambda: decode_attention(q, k[:, :, :10], v), "not of one cache"),
        (lambda: decode_attention(q[:1], k, v), "sequences"),
        (lambda: decode_attention(q, k, v, [20, 21]), "room for 20"),
        (lambda: decode_attention(q, k, v, [20]), "2 sequences"),
        (lambda: decode_attention(q, k, v, ["a", 2]), "whole numbers"),
        (lambda: decode_attention(q, k.transpose(2, 3), v), "next to each other"),
        (lambda: decode_attention(q, k, v, workers=0), "workers"),
        (lambda: decode_attention(q, k, v, tile=0), "Tiles"),
        (lambda: decode_attention(q, k, v, schedule="fixed", splits=129), "128"),
        (lambda: decode_attention(q, k, v, path="neon"), "avx512"),
        (lambda: decode_attention(q, k, v, page_table=np.zeros((3, 1))), "page table"),
        (lambda: decode_attention(q, k, v, [0, 3], append=new), "length 0"),
        (lambda: decode_attention(q, k, v, append=(new[0], new[1].half())), "New values"),
        (lambda: decode_attention(q, read_only, v.numpy(), append=new), "read-only"),
        (lambda: decode_attention(q, k[:, :, :0], v[:, :, :0]), "not float32"),
    ):
        with pytest.raises(InputError, match=message):
            make()
