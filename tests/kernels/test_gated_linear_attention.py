"""Gated linear attention against the recurrence in float64 numpy, and gradients against autograd of the recurrence."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels import gated_linear_attention_forms as forms
from bitwright.kernels.gated_linear_attention import MODES, PATHS, gla, state_bytes, work


def recurrence(q, k, v, log_alpha, scale, initial=None):
    """The definition, written with numpy."""
    q, k, v, gates = (each.detach().double().numpy() for each in (q, k, v, log_alpha))
    batch, tokens, heads, keys = q.shape
    state = np.zeros((batch, heads, keys, v.shape[3])) if initial is None else initial.detach().double().numpy().copy()
    out = np.empty(v.shape)
    for t in range(tokens):
        state = np.exp(gates[:, t])[..., None] * state + k[:, t][..., None] * v[:, t][:, :, None]
        out[:, t] = scale * (q[:, t][:, :, None] @ state)[:, :, 0]
    return out, state


def operands(batch=2, tokens=100, heads=2, keys=20, values=40, gates="usual", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    q, k = torch.randn(2, batch, tokens, heads, keys).to(dtype)
    v = torch.randn(batch, tokens, heads, values).to(dtype)
    uniform = torch.rand(batch, tokens, heads, keys)
    log_alpha = {
        "usual": torch.nn.functional.logsigmoid(torch.randn(uniform.shape)) / 16,
        "strong": -20 * uniform,
        "extreme": torch.where(uniform < 0.5, 1e-6, 1 - 1e-6).log(),
        "none": torch.zeros(uniform.shape),
    }[gates]
    return q, k, v, log_alpha.to(dtype), torch.randn(batch, heads, keys, values).to(dtype)


def error(found, expected):
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found.detach().double()) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gates", ["usual", "strong", "extreme", "none"])
@pytest.mark.parametrize(("chunk", "sub"), [(64, 16), (64, 8), (16, 16), (1, 1), (128, 64), (24, 12)])
def test_chunks_equal_the_recurrence(path, gates, chunk, sub):
    q, k, v, log_alpha, start = operands(gates=gates)
    expected = recurrence(q, k, v, log_alpha, 20**-0.5, start)
    found = gla(q, k, v, log_alpha, chunk=chunk, sub=sub, initial_state=start, return_state=True, mode="chunk",
                path=path)  # fmt: skip
    assert max(error(*pair) for pair in zip(found, expected, strict=True)) < 2e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gates", ["usual", "strong", "extreme"])
def test_token_by_token(path, gates):
    q, k, v, log_alpha, start = operands(gates=gates, keys=33, values=70)
    expected = recurrence(q, k, v, log_alpha, 33**-0.5, start)
    found = gla(q, k, v, log_alpha, initial_state=start, return_state=True, mode="recurrent", path=path)
    assert max(error(*pair) for pair in zip(found, expected, strict=True)) < 2e-6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 35), st.integers(1, 35),
    st.sampled_from([(1, 1), (4, 2), (16, 16), (64, 16)]), st.sampled_from(["usual", "strong", "extreme"]),
)  # fmt: skip
def test_any_shape(batch, tokens, heads, keys, values, sizes, gates):
    q, k, v, log_alpha, _ = operands(batch, tokens, heads, keys, values, gates)
    out, state = gla(q, k, v, log_alpha, chunk=sizes[0], sub=sizes[1], mode="chunk", return_state=True)
    expected = recurrence(q, k, v, log_alpha, keys**-0.5)
    assert np.abs(out.numpy() - expected[0]).max() < 2e-5 * max(1, np.abs(expected[0]).max())
    assert np.abs(state.numpy() - expected[1]).max() < 2e-5 * max(1, np.abs(expected[1]).max())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "auto"])
def test_forms_agree_in_float64(mode):
    q, k, v, log_alpha, start = operands(dtype=torch.float64)
    expected = recurrence(q, k, v, log_alpha, 20**-0.5, start)
    for chunk, sub in ((64, 16), (16, 8), (1, 1), (100, 100)):
        found = gla(q, k, v, log_alpha, chunk=chunk, sub=sub, initial_state=start, return_state=True, mode=mode)
        assert max(error(*pair) for pair in zip(found, expected, strict=True)) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gates", ["usual", "strong", "extreme"])
def test_gradients_equal_those_of_the_recurrence(path, gates):
    given = operands(tokens=70, gates=gates)
    slopes = torch.randn(2, 70, 2, 40), torch.randn(2, 2, 20, 40)
    wide = [each.double().requires_grad_() for each in given]
    out, state = forms.recurrent(*wide[:4], 20**-0.5, wide[4])
    expected = torch.autograd.grad([out, state], wide, [each.double() for each in slopes])
    for chunk, sub in ((64, 16), (32, 8), (1, 1)):
        mine = [each.clone().requires_grad_() for each in given]
        found = gla(*mine[:4], chunk=chunk, sub=sub, initial_state=mine[4], return_state=True, mode="chunk", path=path)
        got = torch.autograd.grad(list(found), mine, slopes)
        assert max(error(*pair) for pair in zip(got, expected, strict=True)) < 2e-5


def test_gradients_of_outputs_alone_and_of_the_recurrent_mode():
    given = operands(tokens=50)
    wide = [each.double().requires_grad_() for each in given[:4]]
    expected = torch.autograd.grad(forms.recurrent(*wide, 20**-0.5)[0].square().sum(), wide)
    for mode in ("chunk", "recurrent", "auto"):
        mine = [each.clone().requires_grad_() for each in given[:4]]
        got = torch.autograd.grad(gla(*mine, mode=mode).square().sum(), mine)
        assert max(error(*pair) for pair in zip(got, expected, strict=True)) < 2e-5


def test_closed_form_of_the_gates_gradient_in_float64():
    q, k, v, log_alpha, _ = (each.requires_grad_() for each in operands(dtype=torch.float64))
    out = forms.recurrent(q, k, v, log_alpha, 20**-0.5)[0]
    d_q, d_k, d_gates = torch.autograd.grad(out.sin().sum(), (q, k, log_alpha))
    closed = (q * d_q - k * d_k).flip(1).cumsum(1).flip(1)
    assert (closed - d_gates).abs().max() < 1e-10 * d_gates.abs().max()


def test_operator_checks_of_torch():
    q, k, v, log_alpha, start = (each.requires_grad_() for each in operands(1, 20, 1, 4, 4))
    offsets = torch.tensor([0, 20])
    settings = (0.5, 16, 8, False, 1, "portable")
    torch.library.opcheck(
        torch.ops.bitwright.gated_linear_attention.default, (q, k, v, log_alpha, start, offsets, *settings),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, log_alpha):
            return gla(q, k, v, log_alpha, validate=False)

    given = operands()[:4]
    exported = torch.export.export(Layer(), given)
    assert torch.equal(exported.module()(*given), gla(*given))


def test_strong_gates_for_long_in_bfloat16():
    q, k, v, _, _ = operands(1, 4096, 1, 16, 16, dtype=torch.bfloat16)
    log_alpha = torch.full(q.shape, -20.0 / 16)  # logsigmoid(-20) / 16
    expected = recurrence(q, k, v, log_alpha, 0.25)[0]
    assert error(forms.chunked(q, k, v, log_alpha, 0.25)[0], expected) < 2e-2
    assert error(gla(q, k, v, log_alpha, mode="chunk"), expected) < 2e-2
    first = [each[:, :512].float() for each in (q, k, v, log_alpha)]
    assert not torch.isfinite(gla(*first, mode="parallel")).all()


def test_packed_sequences_begin_anew():
    q, k, v, log_alpha, _ = operands(1, 90, 2, 16, 16)
    bounds, start = torch.tensor([0, 30, 30, 37, 90]), torch.randn(4, 2, 16, 16)
    for mode in ("chunk", "recurrent"):
        for dtype in (torch.float32, torch.float64):
            given = [each.to(dtype) for each in (q, k, v, log_alpha)]
            out, last = gla(*given, cu_seqlens=bounds, initial_state=start.to(dtype), mode=mode, return_state=True)
            for i, (first, end) in enumerate(pairwise(bounds.tolist())):
                part = recurrence(*(each[:, first:end] for each in given), 0.25, start[i : i + 1])
                assert np.abs(last[i : i + 1].numpy() - part[1]).max() < 2e-5
                if first < end:
                    assert error(out[:, first:end], part[0]) < 2e-5


def test_streaming_carries_the_state():
    q, k, v, log_alpha, _ = operands(1, 40, 2, 16, 24)
    whole = gla(q, k, v, log_alpha, mode="chunk")
    first, state = gla(q[:, :25], k[:, :25], v[:, :25], log_alpha[:, :25], mode="chunk", return_state=True)
    steps = [first]
    for t in range(25, 40):
        out, state = gla(*(each[:, t : t + 1] for each in (q, k, v, log_alpha)), initial_state=state, return_state=True)
        steps.append(out)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=2e-5)


def test_parts_of_a_sequence_combine():
    q, k, v, log_alpha, _ = operands(1, 80, 2, 16, 24)
    whole = gla(q, k, v, log_alpha, mode="chunk")
    parts = [tuple(each[:, first : first + 20] for each in (q, k, v, log_alpha)) for first in range(0, 80, 20)]
    states = [gla(*part, mode="chunk", return_state=True)[1] for part in parts]
    starts = forms.combine([part[3].sum(1).exp() for part in parts], states)
    found = [gla(*part, initial_state=start, mode="chunk") for part, start in zip(parts, starts, strict=True)]
    assert error(torch.cat(found, 1), whole.double()) < 1e-6


def test_threads_do_not_change_the_result():
    given = operands(2, 130, 3, 32, 32)[:4]
    assert torch.equal(gla(*given, threads=1, mode="chunk"), gla(*given, threads=2, mode="chunk"))


def test_counts_of_work():
    counted = work(batch=2, tokens=1024, heads=4, keys=64, values=128, chunk=64)
    assert counted.operations["matrix fp32"] == 2 * 1024 * 4 * (4 * 64 * 128 + 64 * 192)
    assert counted.traffic["memory"] == 2 * 1024 * 4 * (3 * 64 + 2 * 128) * 4
    assert counted.pieces == 8
    assert state_bytes(4, 256, 512) == 4 * 524_288
    with pytest.raises(InputError):
        work(0, 1, 1, 1, 1)


def test_bad_input():
    q, k, v, log_alpha, start = operands(1, 10, 2, 8, 8)
    nan = log_alpha.clone()
    nan[0, 3] = float("nan")
    for make, message in (
        (lambda: gla(q, k, v, -log_alpha), "at most 0"),
        (lambda: gla(q, k, v, nan), "at most 0"),
        (lambda: gla(q, k, v, log_alpha, chunk=64, sub=24), "sub-chunks"),
        (lambda: gla(q, k, v, log_alpha, chunk=0), "sub-chunks"),
        (lambda: gla(q, k[..., :4], v, log_alpha), "do not fit"),
        (lambda: gla(q, k, v[:, :5], log_alpha), "do not fit"),
        (lambda: gla(q, k, v, log_alpha[:, :, :1]), "do not fit"),
        (lambda: gla(q[0], k, v, log_alpha), "floating"),
        (lambda: gla(q.long(), k, v, log_alpha), "floating"),
        (lambda: gla(q[:, :0], k[:, :0], v[:, :0], log_alpha[:, :0]), "floating"),
        (lambda: gla(q, k, v, log_alpha, initial_state=start[:, :1]), "initial state"),
        (lambda: gla(q, k, v, log_alpha, cu_seqlens=torch.tensor([0, 5])), "boundaries"),
        (lambda: gla(q, k, v, log_alpha, cu_seqlens=torch.tensor([0, 7, 5, 10])), "boundaries"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(UnknownNameError):
        gla(q, k, v, log_alpha, mode="chunked")
