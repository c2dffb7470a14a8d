"""Layers that multiply by shifts, and mixtures that route tokens between primitives (ShiftAddViT).

Source: arXiv 2306.06446 (NeurIPS 2023): shift layers, and experts of different speed with a latency-aware balance. Sums
of two powers: APoT, arXiv 1909.13144. Binary attention is in `binary_attention`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.arithmetic.shift_and_add import LOWEST_EXPONENT, powers_of_two
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.shift_and_add import ShiftWeights, fixed_point, matshift, pack_shifts, shift_linear


class _RoundThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _SignedPower(torch.autograd.Function):
    """2^p * s with the released gradient: g s for the power, g (not g 2^p) for the sign."""

    @staticmethod
    def forward(ctx: Any, power: Tensor, sign: Tensor) -> Tensor:
        ctx.save_for_backward(sign)
        return power * sign

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (sign,) = ctx.saved_tensors
        return gradients[0] * sign, gradients[0]


def _round(x: Tensor) -> Tensor:
    made: Tensor = _RoundThrough.apply(x)  # type: ignore[no-untyped-call]
    return made


class ShiftLinear(nn.Module):
    """y = x W^T + b with W = s 2^p, s in -1, 0, 1 and p from -14 to 0, or with `terms=2` a sum of two of these.

    `mode` "ps" learns p and s; "q" keeps real weights and rounds log2|W| in the forward pass (magnitudes clamped to
    2^-15 .. 1). Gradients pass the roundings straight through; those of two terms pass the sum as a whole. Raises
    UnknownNameError for other modes, InputError for other counts of terms and for two terms in mode "ps".
    """

    def __init__(
        self, inputs: int, outputs: int, mode: Literal["ps", "q"] = "ps", bias: bool = True, terms: int = 1
    ) -> None:
        super().__init__()
        if mode not in ("ps", "q"):
            raise UnknownNameError("mode of a shift layer", mode, ("ps", "q"))
        if terms not in (1, 2) or (terms == 2 and mode == "ps"):
            raise InputError(f"A shift layer of {terms} terms in mode {mode}: expected 1, or 2 in mode q.")
        self.mode, self.terms = mode, terms
        start = torch.empty(outputs, inputs)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._set(start)

    def _set(self, weight: Tensor) -> None:
        if self.mode == "q":
            self.weight = nn.Parameter(weight.clone())
        else:
            self.exponent = nn.Parameter(torch.log2(weight.abs().clamp_min(2.0**-15)).round().clamp(LOWEST_EXPONENT, 0))
            self.sign = nn.Parameter(torch.sign(weight))

    @staticmethod
    def from_linear(layer: nn.Linear, mode: Literal["ps", "q"] = "ps", terms: int = 1) -> ShiftLinear:
        """The nearest powers of two (of the logarithm) of a layer's weights. Raises InputError for NaN, infinities."""
        if not torch.isfinite(layer.weight).all():
            raise InputError("The layer's weights hold NaN or infinity, which no power of two stands for.")
        made = ShiftLinear(layer.in_features, layer.out_features, mode, layer.bias is not None, terms)
        made._set(layer.weight.detach())
        if layer.bias is not None and made.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().clone())
        return made

    def shifts(self) -> tuple[Tensor, Tensor]:
        """Exponents and signs as used, (outputs, inputs) each, differentiable; of two terms (2, outputs, inputs) and
        not differentiable."""
        if self.terms == 2:
            exponents, signs = powers_of_two(self.weight.detach().numpy(), 2)
            return torch.from_numpy(exponents).to(self.weight.dtype), torch.from_numpy(signs).to(self.weight.dtype)
        if self.mode == "q":
            magnitude = self.weight.abs().clamp(2.0**-15, 1.0)
            return _round(torch.log2(magnitude)).clamp(LOWEST_EXPONENT, 0), torch.sign(self.weight)
        exponent = _round(self.exponent.clamp(LOWEST_EXPONENT, 0))
        rounded = _round(self.sign)
        return exponent, rounded + (torch.sign(rounded) - rounded).detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), weights rebuilt as powers of two."""
        exponent, sign = self.shifts()
        if self.terms == 2:
            rebuilt = (torch.exp2(exponent) * sign).sum(0)
            return functional.linear(x, rebuilt + (self.weight - self.weight.detach()), self.bias)
        weight: Tensor = _SignedPower.apply(torch.exp2(exponent), sign)  # type: ignore[no-untyped-call]
        return functional.linear(x, weight, self.bias)

    def export(self) -> tuple[np.ndarray[Any, np.dtype[np.int8]], np.ndarray[Any, np.dtype[np.int8]]]:
        """Exponents and signs int8, (outputs, inputs), of two terms (2, outputs, inputs)."""
        exponent, sign = self.shifts()
        return exponent.detach().numpy().astype(np.int8), sign.detach().numpy().astype(np.int8)

    def packed(self) -> tuple[ShiftWeights, ...]:
        """The weights of `kernels.shift_and_add.matshift`, one for each term."""
        exponents, signs = (each.reshape(self.terms, *each.shape[-2:]) for each in self.export())
        return tuple(pack_shifts(exponent, sign) for exponent, sign in zip(exponents, signs, strict=True))

    def integer_forward(self, x: Tensor) -> Tensor:
        """The layer on 16.16 fixed-point activations by arithmetic shifts only: x (..., inputs); not differentiable."""
        return PackedShiftLinear(self).forward(x)


class PackedShiftLinear(nn.Module):
    """A shift layer for inference: 16.16 fixed-point activations, native arithmetic shifts, no multiplication by a
    weight; two terms are two such products, added as integers. Rows of NaN raise InputError."""

    def __init__(self, layer: ShiftLinear) -> None:
        super().__init__()
        self.weights = layer.packed()
        self.bias = None if layer.bias is None else layer.bias.detach().float().numpy().copy()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), in x's type; not differentiable."""
        rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
        if len(self.weights) == 1:
            found = shift_linear(rows, self.weights[0], self.bias)
        else:
            fixed = fixed_point(rows)
            sums = np.sum([matshift(fixed, weights) for weights in self.weights], axis=0)
            found = (sums * 2.0**-16).astype(np.float32) + (0 if self.bias is None else self.bias)
        shaped: Tensor = torch.from_numpy(found).to(x.dtype).reshape(*x.shape[:-1], self.weights[0].outputs)
        return shaped


class MixtureOfPrimitives(nn.Module):
    """Tokens go to a multiplying or a shifting linear layer, whichever a router prefers; see `balance_loss`.

    `latencies`: of the two experts, in any unit. `gate_value` "probability" multiplies an expert's output by its
    probability, so that the router learns from the task; "one" (released code) does not. Raises InputError for
    latencies that are not positive.
    """

    def __init__(
        self, inputs: int, outputs: int, latencies: tuple[float, float],
        gate_value: Literal["probability", "one"] = "probability", noise: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(latencies) <= 0 or gate_value not in ("probability", "one"):
            raise InputError(
                f"Latencies {latencies} and gate value {gate_value!r}: expected positive, probability or one."
            )
        self.experts = nn.ModuleList([nn.Linear(inputs, outputs), ShiftLinear(inputs, outputs)])
        self.router = nn.Linear(inputs, 2)
        self.gate_value, self.noise, self.outputs = gate_value, noise, outputs
        self.register_buffer("shares", torch.tensor(latencies) / sum(latencies))
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs); only the chosen expert runs on a token."""
        flat = x.reshape(-1, x.shape[-1])
        logits = self.router(flat)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("The router's gates are not finite.")
        clean = torch.softmax(logits, -1)
        noisy = logits + self.noise * torch.randn_like(logits) if self.training else logits
        chosen = noisy.argmax(-1)
        # the smooth probability that an expert is first under another draw of the noise
        other = noisy.flip(-1)
        load = torch.special.ndtr((logits - other) / max(self.noise, 1e-6))
        self.last = clean, load
        out = flat.new_zeros((flat.shape[0], self.outputs))
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero(as_tuple=True)[0]
            if rows.numel():
                made = expert(flat[rows])
                if self.gate_value == "probability":
                    made = made * clean[rows, index, None]
                out = out.index_copy(0, rows, made)
        return out.reshape(*x.shape[:-1], -1)

    def balance_loss(self) -> Tensor:
        """Squared coefficients of variation of latency-weighted importance and load of the last batch: least when token
        counts are inversely proportional to latencies. Raises InputError before the first batch."""
        if self.last is None:
            raise InputError("The balance of a mixture is that of its last batch; run one first.")
        shares: Any = self.shares

        def variation(x: Tensor) -> Tensor:
            made: Tensor = x.var(unbiased=False) / (x.mean().square() + 1e-10)
            return made

        importance, load = self.last
        return variation(shares * importance.sum(0)) + variation(shares * load.sum(0))
