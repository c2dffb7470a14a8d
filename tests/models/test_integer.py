"""Integer execution against numpy's int64 arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitwright.core.errors import BitwrightError, InputError
from bitwright.models import integer
from bitwright.models.decoder import Decoder
from bitwright.models.integer import IntegerLinear, integer_execution, integer_matmul


def random_codes(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-128, 128, shape, dtype=np.int8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 600), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_product_is_exact(m: int, k: int, n: int, seed: int, transposed: bool) -> None:
    a, b = random_codes((m, k), seed), random_codes((k, n), seed + 1)
    given_b = b.t().contiguous().t() if transposed else b
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)
    assert np.array_equal(integer_matmul(a, given_b).numpy(), expected)


@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_extreme_operands_do_not_saturate(left: int, right: int) -> None:
    a = torch.full((3, 4096), left, dtype=torch.int8)
    b = torch.full((4096, 5), right, dtype=torch.int8)
    assert (integer_matmul(a, b) == 4096 * left * right).all()


def test_the_path_for_machines_without_an_exact_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random_codes((9, 300), 1), random_codes((300, 11), 2)
    expected = integer_matmul(a, b)
    monkeypatch.setattr(integer, "_int_mm_is_exact", lambda: False)
    other = integer_matmul(a, b)
    assert other.dtype == torch.int32
    assert torch.equal(other, expected)


def test_bad_operands_are_refused() -> None:
    good = torch.zeros(2, 3, dtype=torch.int8)
    with pytest.raises(InputError, match="expected int8"):
        integer_matmul(good.float(), good.t())
    with pytest.raises(InputError, match="expected int8"):
        integer_matmul(good, good)
    with pytest.raises(InputError, match="safe up to 131071"):
        integer_matmul(torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(131072, 1, dtype=torch.int8))
    with pytest.raises(InputError, match="9 bits"):
        IntegerLinear(nn.Linear(4, 4), weight_bits=9)
    with pytest.raises(BitwrightError, match="no linear layers"):
        integer_execution(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 5)])
def test_a_layer_equals_the_formula(bias: bool, weight_bits: int, activation_bits: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 23, bias=bias)
    x = torch.randn(2, 5, 37) * torch.tensor([0.01, 1, 5, 100, 0])[None, :, None]
    w = linear.weight.detach().numpy().astype(np.float64)
    w_top, x_top = 2 ** (weight_bits - 1) - 1, 2 ** (activation_bits - 1) - 1
    w_scale = np.abs(w).max(1, keepdims=True) / w_top
    rows = x.numpy().astype(np.float64).reshape(-1, 37)
    x_scale = np.abs(rows).max(1, keepdims=True) / x_top
    x_scale[x_scale == 0] = 1
    codes = np.rint(rows / x_scale).astype(np.int64) @ np.rint(w / w_scale).astype(np.int64).T
    expected = codes * x_scale * w_scale.T + (linear.bias.detach().numpy() if bias else 0)
    layer = IntegerLinear(linear, weight_bits, activation_bits)
    assert layer.weight_codes.abs().max() == w_top
    np.testing.assert_allclose(layer(x).numpy().reshape(-1, 23), expected, rtol=1e-4, atol=1e-5)


def test_a_network_shares_what_is_not_quantised(tiny: Decoder) -> None:
    twin = integer_execution(tiny)
    assert twin.embedding.weight is tiny.embedding.weight
    assert isinstance(twin.lm_head, IntegerLinear)
    assert isinstance(tiny.lm_head, nn.Linear)
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        exact, integer_logits = tiny(ids), twin(ids)
    error = (integer_logits - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "causal"), [(4, 4, 7, False), (6, 2, 9, True), (3, 1, 1, False)]
)
def test_integer_attention_equals_integer_arithmetic_in_numpy(
    heads: int, kv_heads: int, queries: int, causal: bool
) -> None:
    """The same scheme written head by head in numpy int64, scales included."""
    generator = torch.Generator().manual_seed(heads)
    keys, width = (queries if causal else 11), 8
    q = torch.randn(2, heads, queries, width, generator=generator)
    k, v = (torch.randn(2, kv_heads, keys, width, generator=generator) for _ in range(2))
    out = integer.integer_attention(q, k, v, is_causal=causal, enable_gqa=True).numpy()

    def codes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        return np.rint(x / scale).astype(np.int64), scale

    for batch in range(2):
        for head in range(heads):
            group = head * kv_heads // heads
            (qc, qs), (kc, ks), (vc, vs) = (codes(x[batch, i].numpy()) for x, i in ((q, head), (k, group), (v, group)))
            scores = (qc @ kc.T) * qs * ks.T / np.sqrt(width)
            if causal:
                scores = np.where(np.tril(np.ones((queries, keys), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            pc, ps = codes(weights / weights.sum(axis=-1, keepdims=True) * vs.T)
            # A code may round the other way where the float32 softmax differs in the last place.
            assert np.abs(out[batch, head] - (pc @ vc) * ps).max() < 2 * (ps * np.abs(vc).max()).max()
            assert np.median(np.abs(out[batch, head] - (pc @ vc) * ps)) < 1e-5
    float_out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).numpy()
    assert np.abs(out - float_out).max() < 0.1


def test_integer_attention_takes_masks() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    causal = integer.integer_attention(q, k, v, is_causal=True)
    assert torch.equal(integer.integer_attention(q, k, v, attn_mask=visible), causal)
    added = torch.zeros(5, 5).masked_fill(~visible, -torch.inf)
    assert torch.equal(integer.integer_attention(q, k, v, attn_mask=added), causal)
    with pytest.raises(InputError, match="multiple"):
        integer.integer_attention(q, k[:, :1], v[:, :1])
