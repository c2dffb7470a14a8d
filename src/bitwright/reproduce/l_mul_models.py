"""L-Mul in real networks: SmolLM2-135M, MiniLM, and a classifier of handwritten digits that is fine-tuned through it.

Every row of a network is cached by itself. "product" rows multiply the operands L-Mul gets exactly, so that the error
of L-Mul stands apart from that of rounding; "e4m3" and "e5m2" are FP8 with one scale per row and exact products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memory
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.arithmetic import formats
from bitwright.core import cache
from bitwright.core.errors import UnknownNameError
from bitwright.models.format_execution import FormatAssignment, execute_in
from bitwright.models.format_products import Accumulation, Operand, product
from bitwright.models.load import LoadedModel, load, weight_paths
from bitwright.models.logarithmic_layers import Scope, calibrated_offsets, with_logarithmic_products
from bitwright.models.perplexity import packaged_text, perplexity, read_text, text_ids
from bitwright.models.retrieval import embed_pairs, openings, retrieval_drift
from bitwright.reproduce.handwritten_digits import TESTED, handwritten_digits

_VERSION = 1
WINDOWS, WINDOW = 4, 512
QUERIES = 64
MANTISSAS = (2, 3, 4, 7)
SCOPES: tuple[Scope, ...] = ("attention", "all")


Change = Callable[[Any], Any]


def _fp8(name: str, scope: str) -> Change:
    form = f"fp8_{name}/row"
    linear = form if scope == "all" else None
    return partial(execute_in, assignment=FormatAssignment(linear, linear, form, form, form))


def _rows() -> dict[str, Change]:
    found: dict[str, Change] = {"FP32": lambda model: model}
    for scope in SCOPES:
        changed = partial(with_logarithmic_products, scope=scope)
        for name in ("e4m3", "e5m2"):
            found[f"{name}, {scope}"] = _fp8(name, scope)
        for m in MANTISSAS:
            found[f"L-Mul {m}, {scope}"] = partial(changed, mantissa=m)
            found[f"product {m}, {scope}"] = partial(changed, mantissa=m, form="product")
        found[f"L-Mul 4 algebraic, {scope}"] = partial(changed, mantissa=4, form="algebraic")
        found[f"L-Mul 4 without constant, {scope}"] = partial(changed, mantissa=4, offset="none")
    return found


ROWS = _rows()
CALIBRATED = "L-Mul 4 calibrated, all"  # a constant per linear layer, from one window of another text


def language_model(row: str) -> float:
    """Perplexity of SmolLM2-135M on 4 windows of 512 tokens; executed, cached. UnknownNameError for other rows."""
    _check(row)
    text = read_text()

    def compute() -> float:
        loaded = _loaded("smollm2-135m")
        model = loaded.decoder
        if row == CALIBRATED:
            other = text_ids(loaded.text_tokenizer, packaged_text("kjv-kings.txt"), WINDOW)
            changed: Any = with_logarithmic_products(
                model, offset=calibrated_offsets(model, lambda net: net(other[None]))
            )
        else:
            changed = ROWS[row](model)
        ids = text_ids(loaded.text_tokenizer, text, WINDOWS * WINDOW + 1)
        return perplexity(changed, ids, window=WINDOW, description=f"Perplexity, {row}").value

    found: float = cache.get_or_compute("l-mul-models", _inputs("smollm2-135m", row, text.digest), compute)
    return found


def sentences(row: str) -> dict[str, float]:
    """`RetrievalDrift` of MiniLM on 64 sentences; executed, cached. Raises UnknownNameError for other rows."""
    _check(row)
    text = read_text()

    def compute() -> dict[str, float]:
        loaded = _loaded("minilm")
        queries, passages = openings(text.content, QUERIES)
        tokenizer = loaded.text_tokenizer
        changed: Any = loaded.encoder
        if row == CALIBRATED:
            other = torch.tensor([tokenizer.encode(openings(packaged_text("kjv-kings.txt").content, 2)[1][0]).ids])
            changed = with_logarithmic_products(changed, offset=calibrated_offsets(changed, lambda net: net(other)))
        else:
            changed = ROWS[row](changed)
        reference, moved = (embed_pairs(model, tokenizer, queries, passages) for model in (loaded.encoder, changed))
        return dict(vars(retrieval_drift(moved, reference)))

    found: dict[str, float] = cache.get_or_compute("l-mul-models", _inputs("minilm", row, text.digest), compute)
    return found


@memory
def operands(values: int = 200_000) -> tuple[Any, Any]:
    """Inputs and weights of the linear layers of SmolLM2-135M on one window: equally many values of every layer."""
    loaded = _loaded("smollm2-135m")
    model, rng = loaded.decoder, np.random.default_rng(0)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    each = -(-values // len(layers))
    inputs, weights = [], [rng.choice(layer.weight.detach().numpy().reshape(-1), each) for layer in layers]

    def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(rng.choice(arguments[0].detach().numpy().reshape(-1), each))

    hooks = [layer.register_forward_pre_hook(take) for layer in layers]
    with torch.inference_mode():
        model(text_ids(loaded.text_tokenizer, read_text(), 256)[None])
    for hook in hooks:
        hook.remove()
    return np.concatenate(inputs), np.concatenate(weights)


def digits_accuracy(name: str, seeds: int = 3) -> dict[str, float]:
    """Share of right answers of a 64-64-10 network on the 450 test digits of scikit-learn, mean over splits and starts.

    Trained in float32 for 30 epochs ("before", executed as `name`), then fine-tuned for 10 with straight-through
    gradients ("after"). `name`: "FP32", "e4m3" or "e5m2", "L-Mul m", with ", sums fp8_e4m3/n" for few-bit sums. Raises
    BitwrightError without scikit-learn.
    """

    def compute() -> dict[str, float]:
        found = [_digits(name, seed) for seed in range(seeds)]
        return {key: float(np.mean([each[key] for each in found])) for key in found[0]}

    kept: dict[str, float] = cache.get_or_compute(
        "l-mul-digits", {"version": _VERSION, "name": name, "seeds": seeds, "torch": torch.__version__}, compute
    )
    return kept


class _Rounded(nn.Module):
    """A linear layer in FP8 with one scale per row, straight-through gradients."""

    def __init__(self, linear: nn.Linear, form: str, sums: str) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.form, self.sums = formats.parse(form), Accumulation.parse(sums)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, inputs) -> (rows, outputs)."""
        left, right = (each + (formats.fake_quantise(self.form, each) - each).detach() for each in (x, self.weight))
        exact = functional.linear(left, right)
        made = product(Operand(left.detach()), Operand(right.detach()), self.sums)
        return exact + (made - exact).detach() + self.bias


def _executed_as(network: nn.Sequential, name: str) -> nn.Module:
    kind, _, sums = name.partition(", sums ")
    sums = sums or "fp32"
    if kind == "FP32":
        return network
    if kind in ("e4m3", "e5m2"):
        layers = (_Rounded(each, f"fp8_{kind}/row", sums) if isinstance(each, nn.Linear) else each for each in network)
        return nn.Sequential(*layers)
    return with_logarithmic_products(network, "linear", int(kind.removeprefix("L-Mul ")), accumulation=sums)


def _digits(name: str, seed: int) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are slower on more, and sums keep their order
    try:
        return _trained(name, seed)
    finally:
        torch.set_num_threads(threads)


def _trained(name: str, seed: int) -> dict[str, float]:
    x, wanted = (torch.from_numpy(each) for each in handwritten_digits(seed))
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    torch.random.set_rng_state(state)

    def train(model: nn.Module, epochs: int, rate: float) -> None:
        optimiser = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(x) - TESTED, generator=generator), 64):
                optimiser.zero_grad()
                functional.cross_entropy(model(x[TESTED:][batch]), wanted[TESTED:][batch]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()

    def right(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x[:TESTED]).argmax(-1) == wanted[:TESTED]).double().mean())

    train(network, 30, 3e-3)
    executed = _executed_as(network, name)
    before = right(executed)
    train(executed, 10, 1e-3)
    return {"before": before, "after": right(executed)}


@memory
def _loaded(name: str) -> LoadedModel:
    return load(name)


def _check(row: str) -> None:
    if row not in ROWS and row != CALIBRATED:
        raise UnknownNameError("row", row, (*ROWS, CALIBRATED))


def _inputs(model: str, row: str, text: str) -> dict[str, Any]:
    return {
        "version": _VERSION, "weights": [cache.file_digest(path) for path in weight_paths(model)], "text": text,
        "row": row, "windows": [WINDOWS, WINDOW], "queries": QUERIES,
    }  # fmt: skip
