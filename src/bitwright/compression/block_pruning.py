"""Pruning of linear layers in blocks of weights, at once or gradually while the network is trained.

A block is (outputs, inputs) neighbouring weights; blocks with the lowest scores become 0 together, the same share in
every layer. Blocks of (4, 1) are what `kernels.block_sparse_matmul` multiplies fast. Sources: arXiv 2306.16601
(blocks, score, schedule with training); Zhu and Gupta, arXiv 1710.01878, equation 1 (cubic schedule); Molchanov et al.,
CVPR 2019 (score by gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import InputError

Score = Literal["magnitude", "gradient"]


def block_scores(weight: Tensor, block: tuple[int, int] = (4, 1), gradient: Tensor | None = None) -> Tensor:
    """Sum of |w|, or of |w g| with the weights' gradient, over each block of a weight (outputs, inputs), padded with
    zeros to whole blocks: (block rows, block columns). Raises InputError for other shapes."""
    if weight.dim() != 2 or min(block) < 1 or (gradient is not None and gradient.shape != weight.shape):
        raise InputError(f"Blocks of {block} of weights {tuple(weight.shape)} asked for; expected a matrix of weights.")
    values = (weight if gradient is None else weight * gradient).detach().abs().float()
    down, across = -values.shape[0] % block[0], -values.shape[1] % block[1]
    values = functional.pad(values, (0, across, 0, down))
    rows, columns = values.shape[0] // block[0], values.shape[1] // block[1]
    return values.view(rows, block[0], columns, block[1]).sum((1, 3))


def block_mask(scores: Tensor, shape: Sequence[int], block: tuple[int, int], sparsity: float) -> Tensor:
    """Which weights (outputs, inputs) are kept, bool, when the share `sparsity` of the blocks goes: those with the
    lowest scores, the earlier ones of equals first. Raises InputError for a share outside of 0 to 1."""
    if not 0 <= sparsity <= 1:
        raise InputError(f"A sparsity of {sparsity} is not a share from 0 to 1.")
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[: round(sparsity * scores.numel())]] = False
    whole = kept.view(scores.shape).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def cubic_sparsity(step: int, first: int, last: int, final: float, initial: float = 0.0) -> float:
    """Share of blocks to prune at a step: `initial` up to step `first`, `final` from `last`, between them
    final + (initial - final) (1 - t)^3, fast at first. Raises InputError for steps out of order and shares."""
    if last <= first or not 0 <= initial <= final <= 1:
        raise InputError(f"Pruning from step {first} to {last}, {initial} to {final} asked for; expected to grow.")
    t = min(max((step - first) / (last - first), 0.0), 1.0)
    return final + (initial - final) * (1 - t) ** 3


def sparsity_of(model: nn.Module, keep: Sequence[str] = ()) -> float:
    """Share of zeros in the weights of the linear layers whose last name is not in `keep`."""
    layers = linear_layers(model, keep)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    return zeros / sum(layer.weight.numel() for layer in layers.values())


def prune_blocks(
    model: nn.Module, block: tuple[int, int] = (4, 1), sparsity: float = 0.8, keep: Sequence[str] = ()
) -> None:
    """Prune every linear layer but those whose last name is in `keep` at once, by magnitude, in place.

    Raises InputError as `block_mask`, and for a model without such layers."""
    with torch.no_grad():
        for layer in linear_layers(model, keep).values():
            scores = block_scores(layer.weight, block)
            layer.weight.mul_(block_mask(scores, layer.weight.shape, block, sparsity))


class BlockPruning:
    """Gradual pruning beside a training loop: call `step()` after each step of the optimiser, while the gradients are
    still there. Between `first` and `last` the share grows by `cubic_sparsity`, and every `every` steps masks are made
    anew from all weights (those pruned stay 0 between); after `last` they are kept.

    With `score="gradient"` the sum of |w g| decides, g averaged over steps (decay 0.9). Raises InputError as the
    functions above.
    """

    def __init__(
        self, model: nn.Module, block: tuple[int, int] = (4, 1), sparsity: float = 0.8, first: int = 0, last: int = 100,
        every: int = 1, score: Score = "magnitude", keep: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if score not in ("magnitude", "gradient") or every < 1:
            raise InputError(
                f"Scores are magnitude or gradient, not {score!r}; masks are made every step or less often."
            )
        self.layers, self.block, self.score = linear_layers(model, keep), block, score
        self.sparsity, self.every = sparsity, every
        self.first, self.last, self.steps = first, last, 0
        self._masks: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}
        self.share(0)

    def share(self, step: int) -> float:
        """Share of blocks that are pruned at a step."""
        return cubic_sparsity(step, self.first, self.last, self.sparsity)

    @torch.no_grad()
    def step(self) -> float:
        """Prune what this step asks for; gives the share. Raises InputError for missing gradients."""
        share = self.share(self.steps)
        anew = self.steps <= self.last and (self.steps % self.every == 0 or self.steps == self.last)
        for name, layer in self.layers.items():
            if self.score == "gradient":
                self._average(name, layer)
            if share > 0 and (anew or name not in self._masks):
                scores = block_scores(layer.weight, self.block, self._averages.get(name))
                self._masks[name] = block_mask(scores, layer.weight.shape, self.block, share)
            if name in self._masks:
                layer.weight.mul_(self._masks[name])
        self.steps += 1
        return share

    def _average(self, name: str, layer: nn.Linear) -> None:
        if layer.weight.grad is None:
            raise InputError(f"Layer {name} has no gradient; call step() after backward and before zero_grad.")
        before = self._averages.get(name)
        gradient = layer.weight.grad.abs()
        self._averages[name] = gradient if before is None else 0.9 * before + 0.1 * gradient


def linear_layers(model: nn.Module, keep: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Linear layers by name but those whose last name is in `keep`. Raises InputError for a model without any."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in keep
    }
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layers to prune.")
    return found
