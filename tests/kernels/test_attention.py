"""Attention in tiles, forward and backward, against the plain formula in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.attention import COLUMN_BLOCK, PATHS, ROW_BLOCK, flash, scores_computed, split_k, work
from bitwright.kernels.attention_merge import merge

HERE = PATHS[PATHS.index(_native.attention_path()) :]


def plain(q, k, v, causal=False, window=None, softcap=0.0, scale=None):
    """Outputs and log-sum-exps by the whole score matrix; keys and values repeated for their query heads."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    place = torch.arange(queries)[:, None] + keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= torch.arange(keys) <= place
    if window and window[0] >= 0:
        seen &= torch.arange(keys) >= place - window[0]
    if window and window[1] >= 0:
        seen &= torch.arange(keys) <= place + window[1]
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.transpose(1, 2)


def operands(batch, queries, keys, heads, kv_heads, channels, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [size * torch.randn(batch, tokens, count, channels, generator=generator) for tokens, count in shapes]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.sampled_from([(2, 100, 100, 4, 2, 64), (1, 130, 513, 2, 1, 80), (1, 5, 2, 1, 1, 16), (2, 2, 5, 3, 3, 40),
                           (1, 1, 600, 8, 1, 32), (1, 97, 257, 2, 1, 256), (1, 1, 1, 1, 1, 1)]),
    causal=st.booleans(), window=st.sampled_from([None, (7, 3), (0, 0), (20, -1), (-1, 5)]),
    softcap=st.sampled_from([0.0, 4.0]), path=st.sampled_from(HERE), threads=st.integers(1, 3),
)  # fmt: skip
def test_outputs_sums_and_gradients_are_those_of_the_formula(sizes, causal, window, softcap, path, threads):
    given_ = operands(*sizes)
    ours, exact = (
        [each.clone().to(kind).requires_grad_() for each in given_] for kind in (torch.float32, torch.float64)
    )
    out, lse = flash(
        *ours, causal=causal, window=window, softcap=softcap, path=path, threads=threads, return_lse=True
    )  # fmt: skip
    expected, expected_lse = plain(*exact, causal, window, softcap)
    assert (out - expected).abs().max() < 2e-6 * math.sqrt(sizes[2]) + 1e-6
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    real = expected_lse > -math.inf
    assert (lse - expected_lse)[real].abs().sum() <= 2e-6 * max(1, int(real.sum()))
    slope = torch.randn_like(out)
    (out * slope).sum().backward()
    (expected * slope.double()).sum().backward()
    for found, wanted in zip(ours, exact, strict=True):
        assert (found.grad - wanted.grad).abs().max() <= 2e-5 * max(0.2, float(wanted.grad.abs().max()))


def test_masks_are_aligned_at_the_ends():
    q, k, v = operands(1, 2, 5, 1, 1, 16)
    v = torch.eye(5).view(1, 5, 1, 5)
    q, k = torch.zeros(1, 2, 1, 5), torch.zeros(1, 5, 1, 5)
    weights = flash(q, k, v, causal=True)[0, :, 0]
    assert torch.allclose(weights, torch.tensor([[0.25] * 4 + [0.0], [0.2] * 5]), atol=1e-6)
    q, k, v = torch.zeros(1, 5, 1, 2), torch.zeros(1, 2, 1, 2), torch.eye(2).view(1, 2, 1, 2)
    out, lse = flash(q, k, v, causal=True, return_lse=True)
    assert torch.allclose(out[0, :, 0], torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [0.5, 0.5]]).float(), atol=1e-6)
    assert (lse[0, :3] == -math.inf).all()


@pytest.mark.parametrize("path", HERE)
def test_packed_sequences_are_those_of_their_batches(path):
    lengths, keys = [3, 0, 140, 1, 97], [5, 4, 300, 1, 0]
    q = torch.randn(sum(lengths), 4, 32).requires_grad_()
    k, v = (torch.randn(sum(keys), 2, 32).requires_grad_() for _ in range(2))
    ends_q, ends_k = (torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (lengths, keys))
    out, lse = flash(
        q, k, v, causal=True, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, return_lse=True, path=path, threads=2
    )  # fmt: skip
    out.square().sum().backward()
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    total = 0
    for i in range(len(lengths)):
        rows, columns = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if lengths[i] and keys[i]:
            part, part_lse = plain(*(x[s][None] for x, s in zip(exact, (rows, columns, columns), strict=True)), True)
            assert (out[rows] - part[0]).abs().max() < 2e-5
            real = part_lse[0] > -math.inf
            assert (lse[rows][real] - part_lse[0][real]).abs().max() < 1e-5
            total = total + part.square().sum()
        else:
            assert (out[rows] == 0).all()
    total.backward()
    for found, wanted in zip((q, k, v), exact, strict=True):
        assert (found.grad - wanted.grad).abs().max() < 3e-5 * wanted.grad.abs().max()


def test_parts_of_the_keys_merge_to_the_whole():
    q, k, v = operands(2, 50, 300, 4, 2, 64)
    whole, lse = flash(q, k, v, return_lse=True)
    parts = [flash(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 7), (7, 190), (190, 300))]
    merged, merged_lse = merge([*parts, (torch.zeros_like(whole), torch.full_like(lse, -math.inf))])
    assert (merged - whole).abs().max() < 1e-6
    assert (merged_lse - lse).abs().max() < 2e-6
    assert (split_k(q, k, v, 7) - whole).abs().max() < 3e-6
    assert (merge([parts[2], merge(parts[:2])])[0] - whole).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [16, 40])
def test_gradients_reach_through_the_log_sum_exp(channels):
    given_ = operands(2, 50, 300, 4, 2, channels)
    slope, slope_lse = torch.randn(2, 50, 4, channels), torch.randn(2, 50, 4)

    def gradients(call, kind=torch.float32):
        leaves = [each.to(kind).requires_grad_() for each in given_]
        out, lse = call(*leaves)
        every = ((out * slope).sum() + (lse * slope_lse).sum(), (lse * slope_lse).sum(), (out * slope).sum())
        return [torch.autograd.grad(each, leaves, retain_graph=True, allow_unused=True) for each in every]

    exact = gradients(plain, torch.float64)
    for call in (lambda q, k, v: flash(q, k, v, return_lse=True), lambda q, k, v: split_k(q, k, v, 7, return_lse=True)):
        for found, wanted in zip(gradients(call), exact, strict=True):
            for a, b in zip(found, wanted, strict=True):
                exact_b = torch.zeros_like(a) if b is None else b
                assert (a - exact_b).abs().max() <= 2e-5 * max(0.2, float(exact_b.abs().max()))


@pytest.mark.parametrize("path", HERE)
def test_large_scores_overflow_nowhere(path):
    q, k, v = operands(1, 40, 300, 2, 2, 64, size=40.0)
    q, k, v = (each.requires_grad_() for each in (q, k, v))
    out, lse = flash(q, k, v, return_lse=True, path=path)
    expected, expected_lse = plain(q.double(), k.double(), v.double())
    assert lse.max() > 1e3
    assert (out - expected).abs().max() < 1e-2
    assert ((lse - expected_lse) / expected_lse).abs().max() < 1e-5
    out.sum().backward()
    assert all(each.grad.isfinite().all() for each in (q, k, v))


def test_gradients_are_the_same_in_every_run():
    q, k, v = (each.requires_grad_() for each in operands(1, 200, 600, 1, 1, 32))

    def gradients():
        return torch.autograd.grad(flash(q, k, v, threads=3).square().sum(), (q, k, v))

    first = gradients()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_half_precision_is_no_worse_than_plain_half_precision():
    q, k, v = (each.bfloat16() for each in operands(1, 80, 80, 2, 2, 64))
    exact, _ = plain(q.double(), k.double(), v.double())
    rough = torch.nn.functional.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
    out = flash(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= 2 * (rough.transpose(1, 2) - exact).abs().max()


def test_memory_is_linear_in_the_tokens():
    import resource

    q, k, v = operands(1, 6000, 6000, 1, 1, 32)
    flash(q[:, :100], k[:, :100], v[:, :100], causal=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flash(q, k, v, causal=True, threads=1)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.1 * 6000 * 6000 * 4


def test_it_is_an_operator_that_can_be_exported():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flash(q, k, v, causal=True, threads=1, path="portable")

    given_ = tuple(operands(1, 9, 9, 2, 1, 16))
    program = torch.export.export(Layer(), given_)
    assert "bitwright.flash_attention" in str(program.graph)
    assert torch.equal(program.module()(*given_), flash(*given_, causal=True, threads=1, path="portable"))
    rows = [each[0].requires_grad_() for each in given_]
    ends = torch.tensor([0, 4, 9])
    torch.library.opcheck(
        torch.ops.bitwright.flash_attention, (*rows, ends, ends, 0.25, 0.0, -1, 0, "portable", 1),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


Q, K = torch.zeros(1, 4, 4, 16), torch.zeros(1, 6, 2, 16)
ENDS = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash(Q[:, :, :3], K, K), "not a multiple"),
        (lambda: flash(Q, K[..., :8], K[..., :8]), "channels"),
        (lambda: flash(Q, K, K[:, :5]), "one shape"),
        (lambda: flash(Q.long(), K, K), "floating-point"),
        (lambda: flash(Q.double(), K, K), "one type"),
        (lambda: flash(Q[0, 0], K, K), "expected"),
        (lambda: flash(torch.cat((Q, Q)), K, K), "Batches of 2"),
        (lambda: flash(Q, K, K, window=(-2, 0)), "window"),
        (lambda: flash(Q, K, K, scale=-1.0), "Scale"),
        (lambda: flash(Q, K, K, softcap=-1.0), "softcap"),
        (lambda: flash(Q, K, K, path="gpu"), "Instruction sets"),
        (lambda: flash(Q, K, K, threads=0), "at least one"),
        (lambda: flash(Q, K, K, cu_seqlens_q=ENDS), "packed rows"),
        (lambda: flash(Q[0], K[0], K[0]), "need whole cumulative"),
        (lambda: flash(Q[0], K[0], K[0], cu_seqlens_q=torch.tensor([0, 3, 2, 4])), "does not rise"),
        (lambda: flash(Q[0], K[0], K[0], cu_seqlens_q=ENDS), "rise from 0 to 6"),
        (lambda: flash(Q[0], K[0], K[0], cu_seqlens_q=ENDS, cu_seqlens_k=torch.tensor([0, 3, 6])), "do not fit"),
        (lambda: split_k(Q, K, K, 2, causal=True), "unmasked"),
        (lambda: split_k(Q, K[:, :0], K[:, :0], 2), "nothing to split"),
        (lambda: split_k(Q, K, K, 0), "at least one part"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_no_keys_and_no_queries():
    out, lse = flash(Q, K[:, :0], K[:, :0], return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert flash(Q[:, :0], K, K).shape == (1, 0, 4, 16)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (96, 256), (97, 97), (300, 700), (700, 300), (513, 513)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, (20, 5)), (True, (255, -1))])
def test_work_counts_the_visited_tiles(tokens: int, keys: int, causal: bool, window: tuple[int, int] | None) -> None:
    rows, columns = np.arange(tokens)[:, None] + keys - tokens, np.arange(keys)[None]
    seen = np.ones((tokens, keys), bool)
    if causal:
        seen &= columns <= rows
    if window is not None:
        left, right = window
        seen &= (columns >= rows - left) if left >= 0 else True
        seen &= (columns <= rows + right) if right >= 0 else True
    visited = 0
    for first in range(0, tokens, ROW_BLOCK):
        block = seen[first : first + ROW_BLOCK]
        places = np.flatnonzero(block.any(0))
        if len(places):
            start = places[0] // COLUMN_BLOCK * COLUMN_BLOCK
            end = min((places[-1] // COLUMN_BLOCK + 1) * COLUMN_BLOCK, -(-keys // 16) * 16)
            visited += len(block) * (end - start)
    assert scores_computed(tokens, keys, causal, window) == visited >= seen.sum()


def test_work_of_a_step() -> None:
    forward, backward = (work(2, 192, 4, 64, kv_heads=2, backward=each) for each in (False, True))
    scores = 2 * 4 * 192 * 192
    assert forward.operations["matrix fp32"] == 4 * scores * 64
    assert backward.operations["matrix fp32"] == 10 * scores * 64
    assert forward.traffic["memory"] == 4 * 2 * 64 * (2 * 192 * 4 + 2 * 192 * 2)
    assert (forward.pieces, backward.pieces) == (2 * 4 * 2, 4)
    with pytest.raises(InputError, match="at least 1"):
        work(0, 1, 1, 1)
