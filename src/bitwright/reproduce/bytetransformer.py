"""System 50: ByteTransformer, an encoder for sequences of different length without padding (arXiv 2210.03052).

Speed on this machine, beside padded batches, buckets and nested tensors, is measured by benchmarks/packed_encoder.py.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bitwright.core.machine import load_machine
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.grouped_schedule import grouped_schedule, score_touches
from bitwright.kernels.packed_encoder_cost import EncoderShape, Form, encoder_time
from bitwright.kernels.packed_sequences import bias_gelu_, packing_of_lengths, residual_norm
from bitwright.kernels.work import rates_of
from bitwright.models.encoder import Encoder, EncoderConfig, embed_sentences
from bitwright.models.load import load
from bitwright.models.packed_encoder import PackedEncoder
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.models.packed_encoder.PackedEncoder",
    "bitwright.kernels.packed_sequences.packing",
    "bitwright.kernels.packed_sequences.attention",
    "bitwright.kernels.packed_sequences.residual_norm",
    "bitwright.kernels.packed_sequences.bias_gelu_",
    "bitwright.kernels.grouped_schedule.grouped_schedule",
    "bitwright.kernels.packed_encoder_cost.encoder_time",
)
# Milliseconds of 12 layers, batch 16, average length 0.6 of the longest, A100, by longest: ByteTransformer,
# FasterTransformer with packing, FasterTransformer, PyTorch.
GRID = {
    64: (2.09, 1.93, 2.24, 3.2), 128: (3.18, 3.33, 3.62, 4.97), 256: (6.85, 5.49, 6.77, 9.56),
    512: (9.22, 13.79, 18.03, 21.0), 768: (16.3, 28.21, 32.09, 35.31), 1024: (24.70, 45.22, 50.28, 53.21),
}  # fmt: skip
PEERS: tuple[tuple[str, Form], ...] = (
    ("FasterTransformer with packing", "fused, packed linear layers"),
    ("FasterTransformer", "fused"),
    ("PyTorch", "plain"),
)
_PEAKS = (
    "predicted from peak rates, the same for all: kernels that reach less of the peak, as small products do, take a "
    "larger part of the measured time on every side and bring the ratios together"
)


def _quantity(value: float, unit: str = "x", evidence: Evidence = Evidence.EXECUTED) -> Quantity:
    return Quantity(float(value), unit, evidence)


def _lengths(longest: int, batch: int = 16) -> list[int]:
    """Evenly spread from 0.2 to 1 of the longest, as the released benchmark draws them: 0.6 on average."""
    return [round(float(each)) for each in np.linspace(0.2 * longest, longest, batch)]


def encoder_error() -> Quantity:
    """Largest difference of hidden states of real tokens from the padded encoder, BERT-base shape of two layers."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(1000, 768, 2, 12, 3072)).eval()
    lengths = torch.tensor([3, 64, 17, 40])
    ids, mask = torch.randint(0, 1000, (4, 64)), torch.arange(64) < lengths[:, None]
    with torch.inference_mode():
        expected = encoder(ids, mask)
    return _quantity((PackedEncoder(encoder)(ids, mask) - expected)[mask].abs().max().item(), "")


def embedding_error() -> Quantity:
    """Largest difference of MiniLM's sentence embeddings from those with padding."""
    loaded = load("minilm")
    sentences = ["a shell", "tools that build packages from their sources", "documentation " * 60, "x"]
    plain = embed_sentences(loaded.encoder, loaded.text_tokenizer, sentences)
    packed = embed_sentences(loaded.encoder, loaded.text_tokenizer, sentences, run=PackedEncoder(loaded.encoder))
    return _quantity((plain - packed).abs().max().item(), "")


def operator_error(name: str) -> Quantity:
    """Largest error of a one-pass operator against float64."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(64, 768, generator=generator) for _ in range(2))
    bias, gain, shift = (torch.randn(768, generator=generator) for _ in range(3))
    if name == "normalisation":
        found = residual_norm(x, bias, residual, gain, shift, 1e-5)
        whole = x.double() + bias.double() + residual.double()
        exact = torch.nn.functional.layer_norm(whole, (768,), gain.double(), shift.double(), 1e-5)
        return _quantity(((found - exact).abs() / exact.abs().clamp_min(1)).max().item(), "")
    exact = torch.nn.functional.gelu(x.double() + bias.double())
    return _quantity((bias_gelu_(x.clone(), bias) - exact).abs().max().item(), "")


def lookup_ratio() -> Quantity:
    """Look-ups of problem sizes one at a time over those of warps, 3,200 problems of two tiles."""
    plan = grouped_schedule([(256, 128)] * 3200, (128, 128), 108)
    return _quantity(plan.lookup_steps(1) / plan.lookup_steps())


def zipf_imbalance() -> Quantity:
    """The most loaded of 108 workers over the mean, lengths from a Zipf distribution up to 1,024."""
    lengths = np.minimum(np.random.default_rng(0).zipf(1.3, 64) * 16, 1024)
    plan = grouped_schedule([(int(each), int(each)) for each in lengths], (128, 128), 108)
    return _quantity(plan.imbalance())


def touch_ratio(share: float) -> Quantity:
    """Score elements that pass memory, padded and separate over fused and packed, lengths from 2 share - 1 to 1."""
    lengths = np.linspace((2 * share - 1) * 512, 512, 256).astype(int).tolist()
    return _quantity(score_touches(lengths, 512, 12, False) / score_touches(lengths, 512, 12, True))


def packed_places() -> Quantity:
    """Share of the places of random batches that packing and restoring keeps or clears rightly."""
    rng = np.random.default_rng(0)
    right = total = 0
    for _ in range(100):
        longest = int(rng.integers(1, 40))
        lengths = rng.integers(0, longest + 1, rng.integers(1, 9))
        x = torch.from_numpy(rng.normal(size=(len(lengths), longest, 4)))
        plan = packing_of_lengths(torch.from_numpy(lengths), longest)
        real = np.arange(longest)[None, :] < lengths[:, None]
        expected = np.where(real[..., None], x.numpy(), 0)
        right += int((plan.unpack(plan.pack(x)).numpy() == expected).sum())
        total += expected.size
    return _quantity(100 * right / total, "%")


def predicted_ratio(longest: int, form: Form) -> Quantity:
    """Predicted time of another form over the packed one, BERT-base, batch 16, A100."""
    rates, shape = rates_of(load_machine("a100-80g").device()), EncoderShape()
    lengths = _lengths(longest)
    times = [encoder_time(shape, lengths, longest, each, rates) for each in (form, "packed")]
    return _quantity(times[0] / times[1], "x", Evidence.PREDICTED)


def _required(value: float, unit: str = "") -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, "requirement")


def claims() -> tuple[Claim, ...]:
    """Exactness of packing, operators and encoder; scheduler and traffic; the published grid, predicted."""
    rows = [
        Claim("places packed and restored", "random lengths, empty sequences too", _required(100, "%"), packed_places,
              0),
        Claim("largest error of hidden states", "two layers of BERT-base, against the padded encoder; at most 1e-5",
              _required(1e-5), encoder_error, 0, "", "lower"),
        Claim("largest error of sentence embeddings", "MiniLM-L6-v2, against the padded encoder; at most 1e-5",
              _required(1e-5), embedding_error, 0, "", "lower"),
        Claim("largest error of bias, residual and normalisation in one pass", "768 wide, float64; at most 1e-6",
              _required(1e-6), partial(operator_error, "normalisation"), 0, "", "lower"),
        Claim("largest error of bias and GELU in one pass", "768 wide, float64; at most 1e-6",
              _required(1e-6), partial(operator_error, "GELU"), 0, "", "lower"),
        Claim("look-ups, sequential over warps of 32", "3,200 problems, 108 workers",
              Quantity(32, "x", Evidence.PUBLISHED, "arXiv 2210.03052"), lookup_ratio, 0.02),
        Claim("imbalance of persistent workers", "64 sequences, lengths of a Zipf distribution", _required(1, "x"),
              zipf_imbalance, None),
        Claim("score elements through memory, padded over packed", "even lengths",
              Quantity(2, "x", Evidence.PUBLISHED, "arXiv 2210.03052: two touches instead of four"),
              partial(touch_ratio, 1.0), 0.0),
        Claim("score elements through memory, padded over packed", "lengths from 0.2 to 1 of the longest",
              Quantity(2 / 0.413, "x", Evidence.PUBLISHED, "mean squared length of 0.413"), partial(touch_ratio, 0.6),
              0.02),
    ]  # fmt: skip
    for longest, (ours, *others) in GRID.items():
        for (name, form), time in zip(PEERS, others, strict=True):
            rows.append(Claim(
                f"speed over {name}", f"BERT-base, batch 16, {longest} tokens, A100, half precision",
                Quantity(time / ours, "x", Evidence.PUBLISHED, "released table"),
                partial(predicted_ratio, longest, form), 0.25 if longest >= 256 else 0.35, _PEAKS,
            ))  # fmt: skip
    return tuple(rows)
