"""System 76: Mesa, 8-bit storage of activations during training of transformers (arXiv 2111.11124).

Memory against step time, and the peers, are measured by benchmarks/kept_activations.py.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache as memory
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bitwright.core import cache
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.activation_quantisation import dequantise, group_layout, group_ranges, quantise
from bitwright.models.compressed_activations import Packer, Setting, compress, compressed_activations
from bitwright.models.kept_activations import kept_bytes
from bitwright.models.vision_transformer import Block, VisionTransformer, deit
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.handwritten_digits import TESTED, handwritten_digits

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.models.compressed_activations.compress",
    "bitwright.models.compressed_activations.compressed_activations",
    "bitwright.models.kept_activations.kept_bytes",
    "bitwright.kernels.activation_quantisation.quantise",
    "bitwright.kernels.activation_quantisation.dequantise",
)
HEADS = {"Ti": 3, "S": 6, "B": 12}
# Training memory of the released table, MB at batch 128: before and with the released layers.
PUBLISHED_MB = {"Ti": (4171, 1858), "S": (8459, 3840), "B": (17691, 8616)}
# MiB per image that autograd keeps, counted independently of this package with plain PyTorch.
COUNTED_MIB = {"Ti": 33.1, "S": 66.1, "B": 132.2}
BATCH = 128
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 30
VARIANTS: dict[str, Setting | None] = {
    "exact": None,
    "8 bits, heads": Setting(8, 3),
    "8 bits, one range": Setting(8, 1),
    "8 bits, ranges of the tensor": Setting(8, 3, decay=None),
    "4 bits, heads": Setting(4, 3),
    "2 bits, heads": Setting(2, 3),
    "2 bits, heads, nearest": Setting(2, 3, rounding="nearest"),
}
_REFERENCE = "counted with plain PyTorch, independently of this package"
_ALLOCATOR = (
    "the published figure is the peak of a GPU's allocator, with workspaces; ours: kept bytes, parameters, Adam"
)


def _quantity(value: float, unit: str = "x", evidence: Evidence = Evidence.EXECUTED) -> Quantity:
    return Quantity(float(value), unit, evidence)


@memory
def kept_mib(size: str, method: str) -> float:
    """MiB per image that autograd keeps for a DeiT: "plain", "layers" (every operator for itself) or "hooks"."""
    torch.manual_seed(0)
    model, images = deit(size), torch.randn(2, 3, 224, 224)
    if method == "layers":
        model = compress(model, Setting(groups=HEADS[size], share=False))  # type: ignore[assignment]
    packer = Packer(Setting(groups=HEADS[size]))

    def run() -> Any:
        with compressed_activations(packer=packer) if method == "hooks" else nullcontext():
            return model(images)

    return kept_bytes(model, run).total / len(images) / 2**20


def training_mb(size: str, method: str) -> Quantity:
    """Peak memory of a training step at the published batch in MB (2^20 bytes, as the table's tool counts): what is
    kept, parameters, gradients, two moments of Adam, and the float32 tensors of one layer (MLP in and out). The
    released layers also keep the input of each softmax, a byte per score, which ours do not need."""
    model = deit(size)
    parameters = sum(value.numel() for value in model.parameters())
    transient = 2 * 4 * BATCH * 197 * 4 * 64 * HEADS[size]
    if method == "layers":
        transient += BATCH * len(model.blocks) * HEADS[size] * 197 * 197
    return _quantity(kept_mib(size, method) * BATCH + (16 * parameters + transient) / 2**20, "MB", Evidence.PREDICTED)


def gradient_error(groups: int = 3) -> Quantity:
    """Largest relative error of a weight's gradient in a block of DeiT-Ti, 8 bits, over its matrices."""
    torch.manual_seed(0)
    model, x, weights = Block(192, 3), torch.randn(4, 197, 192), torch.randn(4, 197, 192)

    def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
        net.zero_grad()
        (net(x) * weights).sum().backward()
        return {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}

    exact = gradients(model)
    found = gradients(compress(copy.deepcopy(model), Setting(groups=groups)))
    return _quantity(max(
        float((found[name] - value).norm() / value.norm()) for name, value in exact.items() if value.ndim == 2
    ))  # fmt: skip


def head_wise_error() -> Quantity:
    """Mean squared error with a range per head over that with one range, attention weights of MiniLM's six layers."""
    from bitwright.models.load import load

    model = load("minilm").encoder
    found = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        found.append(inputs[0].detach())

    hooks = [layer.register_forward_hook(watch) for layer in model.modules() if isinstance(layer, nn.Linear)]
    tokens = torch.randint(1000, 20000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    ratios = []
    for x in found:
        if x.ndim != 3:
            continue
        errors = []
        for groups in (12, 1):
            layout = group_layout(tuple(x.shape), groups)
            restored = dequantise(quantise(x, layout, *group_ranges(x, layout), seed=1))
            errors.append(float(((restored - x) ** 2).mean()))
        ratios.append(errors[0] / errors[1])
    return _quantity(float(np.median(ratios)))


def _train(seed: int, setting: Setting | None) -> float:
    """Share of test digits that a small vision transformer recognises after training, 0 to 1."""
    pixels, labels = handwritten_digits(seed)
    images, targets = torch.from_numpy(pixels).view(-1, 1, 8, 8), torch.from_numpy(labels)
    torch.manual_seed(seed)
    model = VisionTransformer(96, 3, depth=3, side=8, patch=2, channels=1, classes=10)
    if setting is not None:
        changed = Setting(setting.bits, setting.groups, setting.decay, setting.rounding, setting.share, seed)
        compress(model, changed)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(images) - TESTED, generator=order), 64):
            optimiser.zero_grad()
            loss: torch.Tensor = nn.functional.cross_entropy(model(images[TESTED + batch]), targets[TESTED + batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return float((model(images[:TESTED]).argmax(1) == targets[:TESTED]).float().mean())


def _accuracies() -> dict[str, list[float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small are slower on more
    try:
        return {name: [_train(seed, setting) for seed in SEEDS] for name, setting in VARIANTS.items()}
    finally:
        torch.set_num_threads(threads)


@memory
def accuracies() -> dict[str, list[float]]:
    """Test accuracies on handwritten digits of every variant, one per seed; computed once and cached."""
    inputs = {
        "seeds": list(SEEDS),
        "epochs": EPOCHS,
        "variants": {name: repr(each) for name, each in VARIANTS.items()},
        "version": 1,
    }
    found: dict[str, list[float]] = cache.get_or_compute("compressed-activations-digits", inputs, _accuracies)
    return found


def accuracy_change(name: str) -> Quantity:
    """Mean accuracy of a variant less that of exact training, in points."""
    found = accuracies()
    return _quantity(float(100 * (np.mean(found[name]) - np.mean(found["exact"]))), "points")


def noise_points() -> float:
    """Twice the standard error of the difference of two means of exact training, in points."""
    return float(100 * 2 * np.std(accuracies()["exact"], ddof=1) * (2 / len(SEEDS)) ** 0.5)


def within_noise(name: str) -> Quantity:
    """1 where a variant's mean accuracy is less than the noise below that of exact training."""
    return _quantity(accuracy_change(name).value >= -noise_points(), "")


def _figure(value: float, unit: str, source: str = "arXiv 2111.11124, released table") -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, source)


def claims() -> tuple[Claim, ...]:
    """Memory per image and at the published batch, errors of gradients, accuracy on small images."""
    rows = []
    for size, mib in COUNTED_MIB.items():
        rows.append(Claim(
            "kept for the backward pass, plain", f"DeiT-{size}, 224 x 224, float32, per image",
            _figure(mib, "MiB", _REFERENCE), partial(_kept, size, "plain"), 0.03,
        ))  # fmt: skip
        for method, share in (("layers", 0.29), ("hooks", 0.25)):
            rows.append(Claim(
                "kept for the backward pass, over plain", f"DeiT-{size}, 8 bits, {method}",
                _figure(share, "x", _REFERENCE), partial(_kept_ratio, size, method), 0.03 / share,
            ))  # fmt: skip
    for size, (before, after) in PUBLISHED_MB.items():
        conditions = f"DeiT-{size}, batch {BATCH}, 224 x 224"
        rows.append(Claim(
            "training memory, plain", conditions, _figure(before, "MB"), partial(training_mb, size, "plain"), 0.12,
            _ALLOCATOR,
        ))  # fmt: skip
        rows.append(Claim(
            "training memory, 8 bits", conditions, _figure(after, "MB"), partial(training_mb, size, "layers"), 0.20,
            _ALLOCATOR,
        ))  # fmt: skip
    rows.append(Claim(
        "relative error of a weight's gradient", "block of DeiT-Ti, 8 bits, a range per head; at most 2 %",
        _figure(0.02, "x", "requirement"), gradient_error, 0.0, "", "lower",
    ))  # fmt: skip
    rows.append(Claim(
        "squared error, a range per head over one range", "inputs of MiniLM's linear layers, 8 bits, median",
        _figure(1.0, "x", "requirement: below 1"), head_wise_error, 0.0, "", "lower",
    ))  # fmt: skip
    for name in ("8 bits, heads", "8 bits, one range", "8 bits, ranges of the tensor"):
        rows.append(Claim(
            "accuracy within noise of exact training", f"handwritten digits, {len(SEEDS)} seeds, {name}",
            _figure(1, "", "requirement"), partial(within_noise, name), 0.0,
        ))  # fmt: skip
    for name in ("8 bits, heads", "4 bits, heads", "2 bits, heads", "2 bits, heads, nearest"):
        rows.append(Claim(
            "change of accuracy", f"handwritten digits, {len(SEEDS)} seeds, {name}; DeiT-S on ImageNet: +0.2",
            _figure(0.2, "points"), partial(accuracy_change, name), None,
        ))  # fmt: skip
    return tuple(rows)


def _kept(size: str, method: str) -> Quantity:
    return _quantity(kept_mib(size, method), "MiB")


def _kept_ratio(size: str, method: str) -> Quantity:
    return _quantity(kept_mib(size, method) / kept_mib(size, "plain"))
