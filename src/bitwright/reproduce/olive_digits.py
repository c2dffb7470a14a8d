"""A network without outliers, for contrast: a small vision transformer on handwritten digits, W4A4.

Where nothing is far from the mean, there is little that pairs could save. The first layer sees pixels, which are never
negative, so that its inputs take unsigned pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as memory
from typing import Any

import numpy as np

from bitwright.core import cache

SEEDS = (0, 1, 2)
EPOCHS = 60
RECIPES = ("pairs", "clipped", "absmax")


@memory
def contrast() -> Mapping[str, Any]:
    """Means over seeds: {"accuracy": {"FP32" and recipes: share of 450 images}, "largest weight": deviations,
    "largest input": deviations, "pairs without outliers": percent, "signed first inputs": share}. Executed, cached.

    Raises BitwrightError without scikit-learn.
    """
    import torch

    inputs = {"version": 1, "seeds": SEEDS, "epochs": EPOCHS, "recipes": RECIPES, "torch": torch.__version__}
    found: Mapping[str, Any] = cache.get_or_compute("olive-digits", inputs, _contrast)
    return found


def _contrast() -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are slower on more, and sums keep their order
    try:
        runs = [_run(seed) for seed in SEEDS]
    finally:
        torch.set_num_threads(threads)
    names = ("FP32", *RECIPES)
    found: dict[str, Any] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0] if key != "accuracy"}
    found["accuracy"] = {name: float(np.mean([run["accuracy"][name] for run in runs])) for name in names}
    return found


def _run(seed: int) -> dict[str, Any]:
    import torch
    from torch import nn

    from bitwright.arithmetic.formats.outlier_victim import pair_statistics
    from bitwright.compression.outlier_victim_pairs import PairSettings, apply
    from bitwright.models.multiplication_conversion import SmallVisionTransformer, accuracy, train
    from bitwright.reproduce.handwritten_digits import TESTED, handwritten_digits

    pixels, labels = (torch.from_numpy(each) for each in handwritten_digits(seed))
    images = pixels.reshape(-1, 8, 8)
    torch.manual_seed(seed)
    model = train(SmallVisionTransformer(), images[TESTED:], labels[TESTED:], EPOCHS, 3e-3, seed)
    model.requires_grad_(False)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[float] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, given: seen.append(pair_statistics(given[0].detach().numpy()).largest_sigma)
        )
        for module in linear
    ]
    scores = {"FP32": accuracy(model, images[:TESTED], labels[:TESTED])}
    for handle in handles:
        handle.remove()
    weights = [pair_statistics(module.weight.numpy()) for module in linear]
    signed = 0.0
    for scheme in RECIPES:
        settings = PairSettings(scheme)  # type: ignore[arg-type]
        made, layers = apply(model, 4, 4, lambda network: network(images[TESTED : TESTED + 64]), settings)
        scores[scheme] = accuracy(made, images[:TESTED], labels[:TESTED])
        if scheme == "pairs":
            signed = float("unsigned" not in str(layers[0].activations))
    sizes = [module.weight.numel() for module in linear]
    return {
        "accuracy": scores, "signed first inputs": signed, "largest input": max(seen),
        "largest weight": max(each.largest_sigma for each in weights),
        "pairs without outliers": float(np.average([each.normal_normal for each in weights], weights=sizes)),
    }  # fmt: skip
