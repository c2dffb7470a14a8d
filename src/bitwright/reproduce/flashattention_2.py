"""System 65: FlashAttention-2, exact tiled attention (arXiv 2307.08691).

Speed on this machine, beside PyTorch's own flash and math kernels, is measured by benchmarks/attention.py.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.attention import flash, split_k
from bitwright.kernels.attention_cost import Algorithm, AttentionShape, forward_time, gpu, rate
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.attention.flash",
    "bitwright.kernels.attention.split_k",
    "bitwright.kernels.attention_merge.merge",
    "bitwright.kernels.attention_cost.forward_time",
    "bitwright.kernels.attention_cost.rate",
)
GPU = "a100-80g"
# TFLOP/s of forward and backward pass, 16,384 tokens in a batch, hidden size 2048, by tokens of a sequence.
FIGURE_4 = {
    (128, False): {512: 151, 2048: 187, 4096: 196, 8192: 201, 16384: 203},
    (64, False): {512: 132, 2048: 162, 4096: 171, 8192: 175, 16384: 176},
    (64, True): {512: 88, 2048: 140, 4096: 156, 8192: 165, 16384: 171},
    (128, True): {512: 99, 2048: 155, 4096: 173, 8192: 182, 16384: 189},
}
VERSION_1 = {512: 76, 2048: 76, 4096: 80, 8192: 82, 16384: 83}
PLAIN = {512: 53, 2048: 76, 4096: 79, 8192: 86}
_ON_CHIP = (
    "an upper bound: matrix unit at its peak, other operations at theirs, shared memory overlapped; waiting for loads, "
    "synchronisation, adding up the gradient of the queries and registers that spill are not counted, and short "
    "sequences have more of them"
)
_VERSION_1 = (
    "the published measurement has more blocks than one per head and sequence, which is how version 1 is described"
)


def _quantity(value: float, unit: str, evidence: Evidence = Evidence.EXECUTED) -> Quantity:
    return Quantity(float(value), unit, evidence)


def _operands(queries: int, keys: int, heads: int, kv_heads: int, channels: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, tokens, count, channels, generator=generator)
        for tokens, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    ]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The formula with the whole score matrix, float64."""
    group = q.shape[2] // k.shape[2]
    keys, values = (each.double().repeat_interleave(group, 2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) / math.sqrt(q.shape[-1])
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(torch.arange(m) > torch.arange(n)[:, None] + m - n, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), values)


def forward_error(causal: bool) -> Quantity:
    """Largest error over 2e-6 sqrt(keys), several shapes, at most 1."""
    worst = 0.0
    for sizes in ((100, 100, 4, 4, 64), (300, 513, 8, 1, 80), (1, 2000, 9, 3, 64), (257, 97, 2, 2, 256)):
        q, k, v = _operands(*sizes)
        error = (flash(q, k, v, causal=causal) - _plain(q, k, v, causal)).abs().max().item()
        worst = max(worst, error / (2e-6 * math.sqrt(sizes[1])))
    return _quantity(worst, "x")


def backward_error() -> Quantity:
    """Largest error of gradients relative to the largest gradient, grouped heads, causal."""
    given = _operands(130, 300, 6, 2, 64)
    ours, exact = [x.clone().requires_grad_() for x in given], [x.double().requires_grad_() for x in given]
    flash(ours[0], ours[1], ours[2], causal=True).square().sum().backward()
    _plain(exact[0], exact[1], exact[2], True).square().sum().backward()  # type: ignore[no-untyped-call]
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if a.grad is not None and b.grad is not None:
            worst = max(worst, ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    return _quantity(worst, "x")


def split_error() -> Quantity:
    """Largest difference of attention over seven parts of the keys, merged, from the whole."""
    q, k, v = _operands(50, 700, 4, 2, 64)
    return _quantity((split_k(q, k, v, 7) - flash(q, k, v)).abs().max().item(), "")


def identical_gradients() -> Quantity:
    """Share of five runs with threads whose gradients are bit-identical to the first."""
    leaves = [x.requires_grad_() for x in _operands(300, 700, 1, 1, 64)]

    def run() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(flash(leaves[0], leaves[1], leaves[2], threads=2).square().sum(), leaves)

    first = run()
    same = [all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)) for _ in range(5)]
    return _quantity(100 * sum(same) / len(same), "%")


def _shape(tokens: int, channels: int, causal: bool) -> AttentionShape:
    return AttentionShape(16384 // tokens, tokens, 2048 // channels, channels, causal)


def predicted_rate(tokens: int, channels: int, causal: bool, algorithm: Algorithm) -> Quantity:
    """TFLOP/s of forward and backward pass on the A100."""
    found = rate(_shape(tokens, channels, causal), gpu(GPU), algorithm)
    return _quantity(found / 1e12, "TFLOP/s", Evidence.PREDICTED)


def predicted_forward() -> Quantity:
    """TFLOP/s of the fastest forward pass among the shapes of the figure."""
    shapes = [_shape(tokens, channels, causal) for (channels, causal), row in FIGURE_4.items() for tokens in row]
    best = max(shape.forward_flops / forward_time(shape, gpu(GPU)) for shape in shapes)
    return _quantity(best / 1e12, "TFLOP/s", Evidence.PREDICTED)


def _figure(value: float, unit: str, source: str = "arXiv 2307.08691") -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, source)


def claims() -> tuple[Claim, ...]:
    """Exactness, determinism, and the published rates on an A100, predicted."""
    required = partial(_figure, source="requirement")
    rows = [
        Claim("forward error over 2e-6 sqrt(keys)", "float32, several shapes and grouped heads; at most 1",
              required(1, "x"), partial(forward_error, False), 0, "", "lower"),
        Claim("forward error over 2e-6 sqrt(keys)", "the same, causal, aligned at the ends; at most 1",
              required(1, "x"), partial(forward_error, True), 0, "", "lower"),
        Claim("relative error of gradients", "grouped heads, causal; at most 1e-5", required(1e-5, "x"), backward_error,
              0, "", "lower"),
        Claim("difference of merged parts from the whole", "seven parts of 700 keys; at most 3e-6", required(3e-6, ""),
              split_error, 0, "", "lower"),
        Claim("bit-identical gradients", "five runs on two threads", required(100, "%"), identical_gradients, 0),
        Claim("fastest forward pass", "A100, half precision", _figure(230, "TFLOP/s"), predicted_forward, 0.20),
    ]  # fmt: skip
    for (channels, causal), row in FIGURE_4.items():
        for tokens, published in row.items():
            conditions = f"A100, {channels} channels, {tokens} tokens{', causal' if causal else ''}"
            rows.append(Claim(
                "rate of forward and backward pass", conditions, _figure(published, "TFLOP/s"),
                partial(predicted_rate, tokens, channels, causal, "version 2"), 0.20, _ON_CHIP,
            ))  # fmt: skip
    for name, table, note in (("version 1", VERSION_1, _VERSION_1), ("plain", PLAIN, "")):
        for tokens, published in table.items():
            algorithm: Algorithm = "version 1" if name == "version 1" else "plain"
            rows.append(Claim(
                f"rate of {name} attention, forward and backward", f"A100, 128 channels, {tokens} tokens",
                _figure(published, "TFLOP/s"), partial(predicted_rate, tokens, 128, False, algorithm), 0.25, note,
            ))  # fmt: skip
    return tuple(rows)
