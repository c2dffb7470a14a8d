"""Conversion of a vision transformer to shifts and additions, in stages that are fine-tuned one after the other.

    multiply   the network as trained: softmax attention, ordinary linear layers
    additive   binary queries and keys (around the mean, or hashed), linear attention: its products are masked sums
    mixture    every linear layer of the blocks routes tokens between a multiplying and a shifting expert
    shift      every linear layer of the blocks shifts only (what the mixture is there to avoid), one or two powers

`SmallVisionTransformer` is small enough to be trained on a processor in a minute; the conversions take any module whose
attention is `SoftmaxAttention`. Source: arXiv 2306.06446, sections on reparameterisation and the mixture of experts.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.core.progress import progress
from bitwright.models.binary_attention import BinaryLinearAttention, HashSettings
from bitwright.models.multiplication_primitives import MixtureOfPrimitives, PackedShiftLinear, ShiftLinear
from bitwright.models.replacement import replace_module

STAGES = ("multiply", "additive", "mixture", "shift")
FITTED = 64  # images that hashes are fitted to: one batch, as released
Latencies = tuple[float, float] | Callable[[int, int], tuple[float, float]]


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


def additive(
    model: nn.Module, quantiser: Literal["mean", "hash"] = "mean", samples: Tensor | None = None,
    hashing: HashSettings = HashSettings(), sparse_above: float | None = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A copy whose attention is linear with binary queries and keys, projections kept.

    With `quantiser` "hash", queries and keys share the projection of the queries, and hashes are fitted to what each
    attention gets of `samples` (images, as many as the memory of tokens x tokens allows). `sparse_above`: see
    `BinaryLinearAttention`. Raises BitwrightError where there is no `SoftmaxAttention`, InputError for a hash without
    samples and what `fit_hash` refuses.
    """
    if quantiser == "hash" and samples is None:
        raise InputError("A hash is fitted to samples: give images.")

    def convert(layer: SoftmaxAttention) -> nn.Module:
        made = BinaryLinearAttention(
            layer.query.in_features, layer.heads, quantiser=quantiser, hashing=hashing, sparse_above=sparse_above
        )
        for name in ("query", "key", "value", "output"):
            if getattr(made, name) is not None:
                setattr(made, name, getattr(layer, name))
        nn.init.zeros_(made.neighbours.weight)
        return made

    made = _replaced(model, SoftmaxAttention, convert)
    if quantiser == "hash" and samples is not None:
        fit_hashes(made, samples, seed)
    return made


def fit_hashes(model: nn.Module, samples: Tensor, seed: int = 0) -> None:
    """Fit every hash of a model, in place, as its input from `samples` arrives, those before it fitted already.

    Raises BitwrightError where there is none to fit.
    """
    hashed = [each for each in model.modules() if isinstance(each, BinaryLinearAttention) and each.hash is not None]
    if not hashed:
        raise BitwrightError(f"{type(model).__name__} has no attention with a hash to fit.")

    def fit(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, BinaryLinearAttention)
        layer.fit_hash(inputs[0], seed)

    handles = [each.register_forward_pre_hook(fit) for each in hashed]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(samples)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def shifting(model: nn.Module, terms: int = 1) -> nn.Module:
    """A copy whose linear layers in blocks shift only, from the nearest powers of two; `terms=2`: sums of two of them,
    learned as real weights (mode "q"). Raises InputError for other counts."""

    def convert(layer: nn.Linear) -> nn.Module:
        return ShiftLinear.from_linear(layer, "ps" if terms == 1 else "q", terms)

    return _replaced(model, nn.Linear, convert, "blocks.")


def mixture(model: nn.Module, latencies: Latencies = (6.0, 4.0)) -> nn.Module:
    """A copy whose linear layers in blocks are mixtures; both experts start as twice the
    layer, gates near one half. `latencies` of the multiplying
    and the shifting expert, 6 to 4 in the released code, or a function of a layer's inputs and outputs that gives
    them, such as one of `measured_latencies`."""

    def convert(layer: nn.Linear) -> nn.Module:
        shape = layer.in_features, layer.out_features
        made = MixtureOfPrimitives(*shape, latencies(*shape) if callable(latencies) else latencies)
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
        layer = twin.get_submodule(name)
        assert isinstance(layer, ShiftLinear)
        twin = replace_module(twin, name, PackedShiftLinear(layer))
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
        twin = replace_module(twin, name, convert(layer))
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
    latencies: Latencies = (6.0, 4.0), balance: float = 0.01, stages: Sequence[str] = STAGES,
    quantiser: Literal["mean", "hash"] = "mean", hashing: HashSettings = HashSettings(),
    sparse_above: float | None = None, terms: int = 1,
) -> dict[str, nn.Module]:  # fmt: skip
    """Train a `SmallVisionTransformer` and convert it: "multiply", from it "additive", from that "mixture" and "shift",
    each fine-tuned for `epochs` at a third of the rate of the first stage, which takes three times as many.

    `stages`: those to make; the first two are always made as far as others need them. `quantiser`, `hashing` and
    `sparse_above` are those of `additive`, whose hashes are fitted once, to the first 64 images; `terms` that of
    `shifting`. With `folder`, finished stages are kept there as safetensors with the settings they were made with, and
    an interrupted conversion goes on after them; latencies given as a function are not compared. Raises
    UnknownNameError for other stages, InputError for kept stages of other settings or images and for files that cannot
    be read.
    """
    for name in stages:
        if name not in STAGES:
            raise UnknownNameError("stage of the conversion", name, STAGES)
    last = max((STAGES.index(name) for name in stages), default=0)
    wanted = {*stages, *STAGES[: min(last, 2)]}
    torch.manual_seed(seed)
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    made: dict[str, nn.Module] = {}
    for stage in STAGES:
        if stage not in wanted:
            continue
        if stage == "multiply":
            model: nn.Module = SmallVisionTransformer(size=images.shape[1])
        elif stage == "additive":
            model = additive(made["multiply"], quantiser, images[:FITTED], hashing, sparse_above, seed)
        else:
            model = mixture(made["additive"], latencies) if stage == "mixture" else shifting(made["additive"], terms)
        variant = "" if stage == "multiply" or quantiser == "mean" else "-hash"
        if stage != "multiply" and sparse_above is not None:
            variant += "-sparse"
        if stage == "shift" and terms == 2:
            variant += "-two"
        kept = None if folder is None else folder / f"{stage}{variant}-{seed}.safetensors"
        used: dict[str, object] = {"epochs": epochs, "images and labels": digest}
        if stage != "multiply":
            used |= {"hashing": asdict(hashing) if quantiser == "hash" else None, "sparse_above": sparse_above}
        if stage == "mixture":
            used |= {"balance": balance, "latencies": "by layer" if callable(latencies) else list(latencies)}
        if kept is not None and kept.exists():
            _load_stage(model, kept, used)
        else:
            count, rate = (3 * epochs, 3e-3) if stage == "multiply" else (epochs, 1e-3)
            train(model, images, labels, count, rate, seed, balance, description=f"Stage {stage}, seed {seed}")
            if kept is not None:
                _save_stage(model, kept, used)
        made[stage] = model.eval()
    return made


def _save_stage(model: nn.Module, kept: Path, used: Mapping[str, object]) -> None:
    from safetensors.torch import save_model

    kept.parent.mkdir(parents=True, exist_ok=True)
    half = kept.with_suffix(".part")
    save_model(model, str(half), {"settings": json.dumps(used)})
    half.replace(kept)


def _load_stage(model: nn.Module, kept: Path, used: Mapping[str, object]) -> None:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(str(kept), framework="pt") as stored:
            before: dict[str, object] = json.loads((stored.metadata() or {}).get("settings", "{}"))
        other = sorted(name for name in {*used, *before} if before.get(name) != used.get(name))
        if not other:
            load_model(model, kept)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Cannot read the kept stage {kept} ({reason}); delete it, and it is made again.") from None
    if other:
        raise InputError(f"{kept} was made with other {', '.join(other)}; take another folder, or delete the file.")
