"""Attention in linear time with binary queries and keys, whose products are masked sums of rows (ShiftAddViT, step 1).

Queries and keys become 0/1 codes by one of two quantisers:

    mean   one bit per element: 1 where the normalised value exceeds the mean of its tensor
    hash   `bits` per token by kernel-based supervised hashing, one projection shared by queries and keys: a Gaussian
           kernel to a few support tokens, projected and compared with 0; fitted so that alike tokens share bits

Source: arXiv 2306.06446 (NeurIPS 2023), linear attention with binary queries and keys; the hash is that of EcoFormer
(arXiv 2209.09004, NeurIPS 2022), section on self-supervised hash functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.kernels.shift_and_add import matadd, pack_mask

QUANTISERS = ("mean", "hash")
RELEASED_SPARSE_ABOVE = 0.02  # of the training-only branch
_RATE, _MOMENTUM = 5e-4, 0.9  # of the released fit


class _Binary(torch.autograd.Function):
    """1 where a value exceeds the mean of its tensor, else 0; gradient of clamp(value, 0, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        made: Tensor = (x > x.mean()).to(x.dtype)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        made: Tensor = gradients[0] * ((x >= 0) & (x <= 1)).to(x.dtype)
        return made


class _Positive(torch.autograd.Function):
    """1 where a value is positive, else 0; the gradient passes strictly between 0 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        made: Tensor = gradients[0] * ((x > 0) & (x < 1)).to(x.dtype)
        return made


def binarise(x: Tensor) -> Tensor:
    """x normalised over its last axis, then 0 or 1 around the tensor's mean; differentiable."""
    made: Tensor = _Binary.apply(functional.normalize(x, dim=-1))  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True)
class HashSettings:
    """Bits per code, support tokens, steps of gradient descent per bit, and how many of the most and of the least
    alike tokens each token is fitted to (defaults: the released PVTv2 configuration). Raises InputError below 1."""

    bits: int = 16
    supports: int = 25
    iterations: int = 100
    neighbours: int = 10

    def __post_init__(self) -> None:
        if min(self.bits, self.supports, self.iterations, self.neighbours) < 1:
            raise InputError(f"{self}: expected 1 or more of each.")


class KernelHash(nn.Module):
    """0/1 codes of normalised tokens, (batch, heads, tokens, size) -> (batch, heads, tokens, bits), per head.

    Code = kernel(x, supports) - mean kernel of the samples, projected, > 0. The kernel is exp(-d / 2w) of the squared
    distance d, and w is the mean of d over the tokens and supports of an image and head. `fit` comes first.
    """

    def __init__(self, heads: int, size: int, settings: HashSettings = HashSettings()) -> None:
        super().__init__()
        self.settings = settings
        self.supports: Tensor
        self.centre: Tensor
        self.projection: Tensor
        self.fitted: Tensor
        self.register_buffer("supports", torch.zeros(heads, settings.supports, size))
        self.register_buffer("centre", torch.zeros(heads, 1, settings.supports))
        self.register_buffer("projection", torch.zeros(heads, settings.bits, settings.supports))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def _check(self, x: Tensor) -> None:
        heads, _, size = self.supports.shape
        if x.ndim != 4 or x.shape[1] != heads or x.shape[3] != size:
            raise InputError(f"Tokens {tuple(x.shape)} do not fit a hash of (batch, {heads} heads, tokens, {size}).")

    def _kernel(self, x: Tensor) -> Tensor:
        supports = self.supports
        products = x @ supports.transpose(1, 2)
        distances = x.square().sum(-1, keepdim=True) + supports.square().sum(-1)[:, None] - 2 * products
        width = distances.mean((2, 3), keepdim=True).clamp_min(1e-12)  # tokens that all equal the supports: kernel 1
        return torch.exp(-distances / (2 * width))

    def fit(self, x: Tensor, seed: int = 0) -> None:
        """Choose supports among the tokens of x and fit the projection, one bit after the other.

        Every bit lessens what the bits before it left of the likeness of tokens of an image: +1 to the
        `neighbours` most alike, -1 to the least. Descent on tanh(z / 2) instead of the sign of z (SGD with Nesterov
        momentum, as released); a bit is kept as drawn where descent does not help its signs. Deterministic.
        Raises InputError for other shapes, values that are not finite, images of fewer than two neighbourhoods and
        fewer tokens than supports.
        """
        self._check(x)
        images, heads, tokens, size = x.shape
        wanted = self.settings
        if tokens < 2 * wanted.neighbours or images * tokens < wanted.supports:
            raise InputError(
                f"{images} images of {tokens} tokens are too few samples: expected {2 * wanted.neighbours} tokens or "
                f"more ({wanted.neighbours} neighbours, twice) and {wanted.supports} in all (supports)."
            )
        if not bool(torch.isfinite(x).all()):
            raise InputError("A hash was to be fitted to samples that are not finite.")
        generator, x = torch.Generator().manual_seed(seed), x.detach().float()
        with torch.no_grad():
            chosen = torch.randperm(images * tokens, generator=generator)[: wanted.supports]
            self.supports.copy_(x.transpose(0, 1).reshape(heads, -1, size)[:, chosen])
            kernel = self._kernel(x)
            self.centre.copy_(kernel.mean((0, 2))[:, None])
            self.projection.copy_(torch.randn(self.projection.shape, generator=generator))
            rest = wanted.bits * _likeness(x, wanted.neighbours)
            for bit in range(wanted.bits):
                start = self.projection[:, bit]
                fitted, signs = _fit_bit(kernel - self.centre, rest, start, wanted)
                self.projection[:, bit] = fitted
                rest = rest - signs[..., :, None] * signs[..., None, :]
            self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Codes; straight-through gradient where the projection lies between 0 and 1. Raises InputError for other
        shapes and before `fit`."""
        self._check(x)
        if not bool(self.fitted):
            raise InputError("The hash of this attention is not fitted; call fit_hash with samples of its input first.")
        projected = (self._kernel(x) - self.centre) @ self.projection.transpose(1, 2)
        made: Tensor = _Positive.apply(projected)  # type: ignore[no-untyped-call]
        return made


def _likeness(x: Tensor, neighbours: int) -> Tensor:
    """(batch, heads, tokens, tokens): 1 for the most alike tokens of a row, -1 for the least, 0 between."""
    products = x @ x.transpose(2, 3)
    made = torch.zeros_like(products)
    made.scatter_(3, products.topk(neighbours, dim=3).indices, 1.0)
    return made.scatter_(3, products.topk(neighbours, dim=3, largest=False).indices, -1.0)


def _misfit(signs: Tensor, rest: Tensor, bits: int) -> Tensor:
    """- y^T R y / (tokens bits), mean over images and heads."""
    agreement = (signs * (rest @ signs[..., None])[..., 0]).sum(-1)
    return -agreement.mean() / (signs.shape[-1] * bits)


def _fit_bit(kernel: Tensor, rest: Tensor, start: Tensor, settings: HashSettings) -> tuple[Tensor, Tensor]:
    """One bit of every head: its projection (heads, supports) and its signs (batch, heads, tokens)."""

    def project(row: Tensor) -> Tensor:
        return (kernel @ row[..., None])[..., 0]

    def hard(row: Tensor) -> Tensor:
        return torch.where(project(row) > 0, 1.0, -1.0)

    row = start.clone().requires_grad_(True)
    optimiser = torch.optim.SGD([row], lr=_RATE, momentum=_MOMENTUM, nesterov=True)
    with torch.enable_grad():
        for _ in range(settings.iterations):
            optimiser.zero_grad()
            _misfit(torch.tanh(project(row) / 2), rest, settings.bits).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    found = row.detach()
    if not bool(torch.isfinite(found).all()):
        raise BitwrightError("The fit of a hash diverged; give it samples of smaller spread or fewer neighbours.")
    before, after = hard(start), hard(found)
    if _misfit(after, rest, settings.bits) < _misfit(before, rest, settings.bits):
        return found, after
    return start.clone(), before


class BinaryLinearAttention(nn.Module):
    """Attention in linear time with binary queries and keys: Q (K^T V) is masked sums of rows.

    Per head: 0.5 V + Q (K^T V) / pi, normalised per token, plus a depthwise convolution of V over `kernel` tokens.
    `quantiser` "mean" binarises queries and keys by element; "hash" makes one code of `hashing.bits` per token, shared
    by queries and keys (there is no `key` layer), after `fit_hash`. `native=True` is for inference: codes take one bit
    per element and rows are added in native code (`kernels.shift_and_add.matadd`). `sparse_above` (released:
    `RELEASED_SPARSE_ABOVE`) adds, in training only, softmax attention without the weights up to that value.
    Raises InputError for heads that do not divide the width, even kernels and thresholds outside 0 .. 1;
    UnknownNameError for other quantisers.
    """

    def __init__(
        self, width: int, heads: int, kernel: int = 9, quantiser: Literal["mean", "hash"] = "mean", *,
        native: bool = False, hashing: HashSettings = HashSettings(), sparse_above: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or width % heads or kernel % 2 == 0:
            raise InputError(
                f"{heads} heads of width {width} and a kernel of {kernel}: expected a divisor, an odd number."
            )
        if quantiser not in QUANTISERS:
            raise UnknownNameError("quantiser of binary attention", quantiser, QUANTISERS)
        if sparse_above is not None and not 0 <= sparse_above < 1:
            raise InputError(f"Attention weights above {sparse_above}: expected a threshold from 0 to below 1.")
        self.width, self.heads, self.native, self.sparse_above = width, heads, native, sparse_above
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width) if quantiser == "mean" else None
        self.value = nn.Linear(width, width)
        self.hash = KernelHash(heads, width // heads, hashing) if quantiser == "hash" else None
        self.output = nn.Linear(width, width)
        self.neighbours = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)

    def _split(self, made: Tensor) -> Tensor:
        return made.reshape(*made.shape[:2], self.heads, -1).transpose(1, 2)

    def fit_hash(self, samples: Tensor, seed: int = 0) -> None:
        """Fit the hash to inputs of this layer (images, tokens, width). Raises InputError for the mean quantiser, other
        widths and what `KernelHash.fit` refuses."""
        if self.hash is None:
            raise InputError("This attention binarises around the mean; only the hash quantiser is fitted.")
        if samples.ndim != 3 or samples.shape[2] != self.width:
            raise InputError(f"Samples {tuple(samples.shape)} do not fit: expected (images, tokens, {self.width}).")
        with torch.no_grad():
            self.hash.fit(functional.normalize(self._split(self.query(samples)), dim=-1), seed)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width), the same shape comes out. Codes that are all zero give a normalised 0.5 V."""
        query = self._split(self.query(x))
        key = query if self.key is None else self._split(self.key(x))
        value = self._split(self.value(x))
        if self.hash is None:
            of_query, of_key = binarise(query), binarise(key)
        else:
            of_query = of_key = self.hash(functional.normalize(query, dim=-1))
        sums = _native_sums if self.native else _sums
        mixed = 0.5 * value + sums(of_query, of_key, value) / math.pi
        if self.sparse_above is not None and self.training:
            mixed = mixed + _sparse_attention(query, key, value, self.sparse_above)
        mixed = functional.normalize(mixed, dim=-1) + self.neighbours(value)
        made: Tensor = self.output(mixed.transpose(1, 2).reshape(x.shape))
        return made


def _sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query @ (key.transpose(2, 3) @ value)


def _native_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same from packed codes, without gradients."""
    of_query, of_key = (pack_mask(each.detach().numpy() > 0) for each in (query, key.transpose(2, 3)))
    made = matadd(of_query, matadd(of_key, value.detach().float().numpy()))
    return torch.from_numpy(made).to(value.dtype)


def _sparse_attention(query: Tensor, key: Tensor, value: Tensor, above: float) -> Tensor:
    """Softmax attention without the weights up to `above`, not normalised again."""
    weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]), -1)
    return (weights * (weights > above)) @ value
