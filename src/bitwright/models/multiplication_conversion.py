"""Conversion of a vision transformer to shifts and additions, in stages that are fine-tuned one after the other.

    multiply   the network as trained: softmax attention, ordinary linear layers
    additive   binary queries and keys, linear attention: its products are masked sums
    mixture    every linear layer of the blocks routes tokens between a multiplying and a shifting expert
    shift      every linear layer of the blocks shifts only (what the mixture is there to avoid)

`SmallVisionTransformer` is small enough to be trained on a processor in a minute; the conversions take any module whose
attention is `SoftmaxAttention`. Source: arXiv 2306.06446, sections on reparameterisation and the mixture of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.progress import progress
from bitwright.models.multiplication_primitives import (
    BinaryLinearAttention,
    MixtureOfPrimitives,
    PackedShiftLinear,
    ShiftLinear,
)

STAGES = ("multiply", "additive", "mixture", "shift")
_PARTS = ("query", "key", "value", "output")


class SoftmaxAttention(nn.Module):
    """Multi-head attention. Raises InputError for heads that do not divide the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise InputError(f"{heads} heads do not divide a width of {width}.")
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width), the same shape comes out."""
        batch, tokens, width = x.shape
        split = (layer(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
                 for layer in (self.query, self.key, self.value))  # fmt: skip
        mixed = functional.scaled_dot_product_attention(*split)
        made: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return made


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention: nn.Module = SoftmaxAttention(width, heads)
        self.up: nn.Module = nn.Linear(width, ratio * width)
        self.down: nn.Module = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        made: Tensor = x + self.down(functional.gelu(self.up(self.before_mlp(x))))
        return made


class SmallVisionTransformer(nn.Module):
    """Images (batch, size, size) in `patch` x `patch` patches, `depth` blocks, mean over tokens, `classes` scores.

    Raises InputError for patches that do not divide the image.
    """

    def __init__(
        self, size: int = 8, patch: int = 2, width: int = 32, depth: int = 2, heads: int = 2, ratio: int = 2,
        classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        if size % patch:
            raise InputError(f"Patches of {patch} do not divide images of {size}.")
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(_Block(width, heads, ratio) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, size, size) -> (batch, classes)."""
        p = self.patch
        tiles = images.unfold(1, p, p).unfold(2, p, p)
        x = self.embed(tiles.reshape(len(images), -1, p * p)) + self.positions
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.head(self.norm(x).mean(1))
        return made


def additive(model: nn.Module) -> nn.Module:
    """A copy whose attention is linear with binary queries and keys, projections kept.

    Raises BitwrightError where there is no `SoftmaxAttention`.
    """

    def convert(layer: SoftmaxAttention) -> nn.Module:
        made = BinaryLinearAttention(layer.query.in_features, layer.heads)
        for name in _PARTS:
            setattr(made, name, getattr(layer, name))
        nn.init.zeros_(made.neighbours.weight)
        return made

    return _replaced(model, SoftmaxAttention, convert)


def shifting(model: nn.Module) -> nn.Module:
    """A copy whose linear layers in blocks shift only, from the nearest powers of two."""
    return _replaced(model, nn.Linear, ShiftLinear.from_linear, "blocks.")


def mixture(model: nn.Module, latencies: tuple[float, float] = (6.0, 4.0)) -> nn.Module:
    """A copy whose linear layers in blocks are mixtures; both experts start as twice the
    layer, gates near one half. `latencies` of the multiplying
    and the shifting expert, 6 to 4 in the released code."""

    def convert(layer: nn.Linear) -> nn.Module:
        made = MixtureOfPrimitives(layer.in_features, layer.out_features, latencies)
        doubled = copy.deepcopy(layer)  # gates start near one half and halve what an expert makes
        with torch.no_grad():
            for parameter in doubled.parameters():
                parameter.mul_(2)
            made.router.weight.mul_(0.1)
            made.router.bias.zero_()
        made.experts[0], made.experts[1] = doubled, ShiftLinear.from_linear(doubled)
        return made

    return _replaced(model, nn.Linear, convert, "blocks.")


def measured_latencies(inputs: int, outputs: int, tokens: int, repeats: int = 9) -> tuple[float, float]:
    """Seconds that a multiplying and a natively shifting layer take on this processor for so many tokens: least of
    `repeats` runs of each in turn, what `mixture` takes as latencies. Raises InputError for sizes below 1."""
    if min(inputs, outputs, tokens, repeats) < 1:
        raise InputError(
            f"{tokens} tokens of {inputs} inputs and {outputs} outputs, {repeats} runs: expected 1 or more."
        )
    layer = nn.Linear(inputs, outputs)
    experts, x = (layer, PackedShiftLinear(ShiftLinear.from_linear(layer))), torch.randn(tokens, inputs)
    found: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for run in range(repeats + 1):
            for expert, times in zip(experts, found, strict=True):
                start = perf_counter()
                expert(x)
                if run:  # the first one warms up
                    times.append(perf_counter() - start)
    return min(found[0]), min(found[1])


def packed(model: nn.Module) -> nn.Module:
    """A copy for inference whose shift layers shift integers and whose binary attention adds rows, in native code.

    Raises BitwrightError where there is neither.
    """
    twin = copy.deepcopy(model).eval()
    shifts = [name for name, layer in twin.named_modules() if isinstance(layer, ShiftLinear)]
    attention = [layer for layer in twin.modules() if isinstance(layer, BinaryLinearAttention)]
    if not shifts and not attention:
        raise BitwrightError(f"{type(model).__name__} has no shift layers and no binary attention to pack.")
    for name in shifts:
        parent, _, leaf = name.rpartition(".")
        layer = twin.get_submodule(name)
        assert isinstance(layer, ShiftLinear)
        setattr(twin.get_submodule(parent), leaf, PackedShiftLinear(layer))
    for each in attention:
        each.native = True
    return twin


def _replaced(
    model: nn.Module, kind: type[nn.Module], convert: Callable[..., nn.Module], prefix: str = ""
) -> nn.Module:
    twin = copy.deepcopy(model)
    found = {name: layer for name, layer in twin.named_modules() if type(layer) is kind and name.startswith(prefix)}
    if not found:
        raise BitwrightError(f"{type(model).__name__} has no {kind.__name__} to convert.")
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, convert(layer))
    return twin


def mixtures(model: nn.Module) -> Iterator[MixtureOfPrimitives]:
    """The mixtures of a model."""
    return (module for module in model.modules() if isinstance(module, MixtureOfPrimitives))


def shift_share(model: nn.Module, images: Tensor) -> float:
    """Share of tokens of these images that the routers send to shifting experts, over all mixtures."""
    model.eval()
    with torch.no_grad():
        model(images)
    gates = [each.last[0] for each in mixtures(model) if each.last is not None]
    if not gates:
        raise BitwrightError("The model has no mixtures.")
    chosen = torch.cat([gate.argmax(-1) for gate in gates])
    return float(chosen.double().mean())


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int = 0, balance: float = 0.01,
    batch: int = 64, description: str = "Training",
) -> nn.Module:  # fmt: skip
    """Train in place: AdamW (weight decay 0.05), a cosine rate, `balance` times the balance loss of mixtures."""
    if len(images) != len(labels) or not len(images):
        raise InputError(f"{len(images)} images and {len(labels)} labels: expected as many, at least one.")
    generator = torch.Generator().manual_seed(seed)
    steps = -(-len(images) // batch) * epochs
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate / 50)
    model.train()
    with progress(description, epochs) as advance:
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(images), generator=generator), batch):
                optimiser.zero_grad()
                loss = functional.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.1)
                for each in mixtures(model):
                    loss = loss + balance * each.balance_loss()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
            advance(1)
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).double().mean())


def convert_in_stages(
    images: Tensor, labels: Tensor, seed: int, epochs: int = 30, folder: Path | None = None,
    latencies: tuple[float, float] = (6.0, 4.0), balance: float = 0.01,
) -> dict[str, nn.Module]:  # fmt: skip
    """Train a `SmallVisionTransformer` and convert it: "multiply", from it "additive", from that "mixture" and "shift",
    each fine-tuned for `epochs` at a third of the rate of the first stage, which takes three times as many.

    With `folder`, finished stages are kept there as safetensors, and an interrupted conversion goes on after them.
    """
    from safetensors.torch import load_model, save_model

    torch.manual_seed(seed)
    made: dict[str, nn.Module] = {}
    for stage in STAGES:
        if stage == "multiply":
            model: nn.Module = SmallVisionTransformer(size=images.shape[1])
        elif stage == "additive":
            model = additive(made["multiply"])
        else:
            model = mixture(made["additive"], latencies) if stage == "mixture" else shifting(made["additive"])
        kept = None if folder is None else folder / f"{stage}-{seed}.safetensors"
        if kept is not None and kept.exists():
            load_model(model, kept)
        else:
            count, rate = (3 * epochs, 3e-3) if stage == "multiply" else (epochs, 1e-3)
            train(model, images, labels, count, rate, seed, balance, description=f"Stage {stage}, seed {seed}")
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                half = kept.with_suffix(".part")
                save_model(model, str(half))
                half.replace(kept)
        made[stage] = model.eval()
    return made
