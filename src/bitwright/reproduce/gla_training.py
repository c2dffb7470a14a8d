"""Small networks of gated linear attention trained on text and on recall, one per kind of gate, on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core import cache
from bitwright.core.progress import progress
from bitwright.models.gated_linear_attention import GLAConfig, GLATransformer, recall_batch
from bitwright.models.perplexity import packaged_text

TEXT = "kjv-kings.txt"


@dataclass(frozen=True)
class Training:
    """How a network is trained on bytes of a text that comes with Bitwright, the last eighth of it held out."""

    hidden: int = 128
    layers: int = 2
    heads: int = 2
    window: int = 256
    batch: int = 8
    steps: int = 300
    rate: float = 3e-3


@dataclass(frozen=True)
class RecallTraining:
    """How a network is trained to recall the values of keys (`recall_batch`)."""

    hidden: int = 64
    layers: int = 2
    heads: int = 1
    pairs: int = 4
    tokens: int = 32
    symbols: int = 16
    batch: int = 64
    steps: int = 1500
    rate: float = 1e-2


def _train(
    model: GLATransformer, steps: int, rate: float, draw: Callable[[], tuple[Tensor, Tensor]], what: str
) -> None:
    """AdamW as in the paper: weight decay 0.01, gradients clipped to 1, cosine to a tenth of the rate after a warm-up;
    `draw` gives ids and targets, -100 where nothing is asked."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    with progress(what, steps) as advance:
        for step in range(steps):
            warm, turn = min(1.0, (step + 1) / 40), math.cos(math.pi * step / steps)
            optimiser.param_groups[0]["lr"] = rate * warm * (0.55 + 0.45 * turn)
            loss = _loss(model, *draw())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            advance(1)


def _loss(model: GLATransformer, ids: Tensor, targets: Tensor) -> Tensor:
    logits, _ = model(ids)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def perplexity_per_byte(gates: str, seed: int, training: Training = Training()) -> float:
    """exp of the mean loss on the held-out text, after training from a seed; cached."""
    text = packaged_text(TEXT)

    def compute() -> float:
        torch.manual_seed(seed)
        model = GLATransformer(GLAConfig(256, training.hidden, training.layers, training.heads, gates=gates))
        data = torch.frombuffer(bytearray(text.content.encode()), dtype=torch.uint8).long()
        cut = len(data) * 7 // 8
        generator = torch.Generator().manual_seed(seed)
        span = torch.arange(training.window + 1)

        def draw() -> tuple[Tensor, Tensor]:
            starts = torch.randint(cut - training.window, (training.batch, 1), generator=generator)
            ids = data[starts + span]
            return ids[:, :-1], ids[:, 1:]

        _train(model, training.steps, training.rate, draw, f"Training with gates {gates!r}, seed {seed}")
        held_out = data[cut:]
        size = training.window
        ids = torch.stack([held_out[i : i + size + 1] for i in range(0, len(held_out) - size, size)])
        with torch.inference_mode():
            losses = [_loss(model, part[:, :-1], part[:, 1:]) * len(part) for part in torch.split(ids, 32)]
        return math.exp(float(torch.stack(losses).sum()) / len(ids))

    inputs = {"version": 1, "text": text.digest, "gates": gates, "seed": seed, **asdict(training)}
    found: float = cache.get_or_compute("gla-training", inputs, compute)
    return found


def recall_accuracy(gates: str, seed: int = 0, training: RecallTraining = RecallTraining()) -> float:
    """Share of keys whose value a trained network names, on 1,024 sequences it has not seen; cached."""

    def compute() -> float:
        torch.manual_seed(seed)
        model = GLATransformer(
            GLAConfig(
                2 * training.symbols + 1, training.hidden, training.layers, training.heads, gates=gates,
                feed_forward=training.hidden,
            )
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed + 1)

        def draw(batch: int = training.batch) -> tuple[Tensor, Tensor]:
            return recall_batch(batch, training.pairs, training.tokens, generator, training.symbols)

        _train(model, training.steps, training.rate, draw, f"Recall with gates {gates!r}")
        ids, targets = draw(1024)
        with torch.inference_mode():
            named = model(ids)[0].argmax(-1)
        asked = targets >= 0
        return float((named[asked] == targets[asked]).float().mean())

    inputs = {"version": 1, "gates": gates, "seed": seed, **asdict(training)}
    found: float = cache.get_or_compute("gla-recall", inputs, compute)
    return found
