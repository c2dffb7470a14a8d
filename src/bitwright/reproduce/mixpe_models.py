"""MixPE in networks: equivalence on layers of MiniLM, perplexity of SmolLM2-135M with 4-bit weights."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from bitwright.arithmetic.late_dequantisation import matmul, quantise_tokens, quantise_weights
from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity

_VERSION = 1
WINDOWS, WINDOW = 16, 512
Weights = Literal["float32", "asymmetric", "symmetric"]


def minilm_difference() -> Quantity:
    """Largest relative difference to float64 products of dequantised weights, over all linear layers of MiniLM, int8
    and float16 activations."""
    from torch import nn

    from bitwright.kernels import late_dequantisation as kernel
    from bitwright.models.load import load

    layers = [m.weight.detach().numpy().T for m in load("minilm").encoder.modules() if isinstance(m, nn.Linear)]
    rng, worst = np.random.default_rng(0), 0.0
    for at, w in enumerate(layers):
        weights = quantise_weights(w, group=128)
        packed = kernel.pack(weights)
        codes, scale = quantise_tokens(rng.normal(size=(8, w.shape[0])))
        half = rng.normal(size=(8, w.shape[0])).astype(np.float16)
        for x, token in ((codes, scale), (half, None)):
            found = kernel.matmul(x, packed, token)
            real = x.astype(np.float64) if token is None else x * token.astype(np.float64)[:, None]
            expected = real @ weights.dequantise()
            worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
            if at < 6 and not np.array_equal(found, matmul(x, weights, token)):
                worst = float("inf")
    return Quantity(worst, "", Evidence.EXECUTED, f"{len(layers)} layers of MiniLM, W4 g = 128, kernel")


def smollm2_perplexity(weights: Weights, activations: Literal["float", "int8"] = "float") -> float:
    """Perplexity of SmolLM2-135M, round to nearest, groups of 128, executed by the kernel; cached by content."""
    from bitwright.models.late_dequantised_linear import late_dequantised
    from bitwright.models.load import load, weight_paths
    from bitwright.models.perplexity import perplexity, read_text, text_ids

    text = read_text()
    files = [cache.file_digest(path) for path in weight_paths("smollm2-135m")]
    inputs: dict[str, Any] = {
        "model": files, "text": text.digest, "weights": weights, "activations": activations,
        "windows": [WINDOWS, WINDOW], "version": _VERSION,
    }  # fmt: skip

    def compute() -> float:
        loaded = load("smollm2-135m")
        ids = text_ids(loaded.text_tokenizer, text, WINDOWS * WINDOW + 1)
        model = loaded.decoder
        if weights != "float32":
            model = late_dequantised(model, 128, weights == "symmetric", activations)
        return perplexity(model, ids, window=WINDOW).value

    return float(cache.get_or_compute("mixpe-perplexity", inputs, compute))


def perplexity_ratio(weights: Weights, activations: Literal["float", "int8"]) -> Quantity:
    """Perplexity over that of float32 weights."""
    plain, found = smollm2_perplexity("float32"), smollm2_perplexity(weights, activations)
    source = f"SmolLM2-135M, {found:.2f} over {plain:.2f}, {WINDOWS} windows of {WINDOW} tokens"
    return Quantity(found / plain, "x", Evidence.EXECUTED, source)
