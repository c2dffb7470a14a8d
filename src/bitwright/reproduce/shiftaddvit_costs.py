"""Costs of ShiftAddViT's networks: energy on a row-stationary array and latency on a GPU. Everything here is predicted.

Energy: `models.multiplication_energy`, with the released assumptions and with additions and shifts charged in full.

GPU: roofline of every layer on an RTX A6000 (float32 on the vector units, batch 32), as `core.cost` has it. Additions
of float32 take the place of multiply-accumulates one for one. A shift takes two integer instructions (shift; multiply
by the sign and add) on units half as many as those of float32; its weights take two bytes (exponent, sign). Softmax,
normalisation, activations, codes and the exchange of tokens with experts are passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product

from bitwright.core import cost
from bitwright.core.machine import load_machine
from bitwright.core.operators import Operand, pointwise
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Kind, Operator, Role, Tensor
from bitwright.models.multiplication_energy import (
    CHARGED,
    RELEASED,
    Assumptions,
    network_energy,
    operator_energy,
    total,
)
from bitwright.models.multiplication_networks import (
    NETWORKS,
    Attention,
    Layer,
    Linear,
    Primitive,
    network_layers,
    product_layer,
)
from bitwright.reproduce.claims import Claim

PAPER = ("DeiT-T", "PVTv1-T", "PVTv2-B0")
VARIANTS: Mapping[str, tuple[Attention, Linear, Linear]] = {  # attention, its projections, MLP
    "original": ("original", "multiply", "multiply"),
    "softmax": ("softmax", "multiply", "multiply"),
    "linear": ("linear", "multiply", "multiply"),
    "additive": ("additive", "multiply", "multiply"),
    "mixtures": ("additive", "mixture", "mixture"),  # the released recipe
    "shifts and mixtures": ("additive", "shift", "mixture"),
}
CONVERTED = ("mixtures", "shifts and mixtures")
ASSUMED: Mapping[str, Assumptions] = {"as released": RELEASED, "charged in full": CHARGED}
HEADLINE_PERCENT, HEADLINE_LATENCY = 42.9, 5.18
GPU, BATCH = "a6000", 32
GPU_PARTS = ("whole", "linear attention", "primitives", "exchange of tokens", "bound")
INSTRUCTIONS = {"multiply": 1, "add": 1, "shift": 2}  # of a term
# mJ of a product of (rows, inputs) by (inputs, outputs) multiplied and shifted, found with the released code
RELEASED_LAYERS_MJ = {
    (3136, 64, 512): (4.7121, 1.3671), (3136, 512, 64): (4.5916, 1.3294),
    (784, 128, 1024): (4.4241, 1.2771), (784, 1024, 128): (4.3115, 1.2419),
}  # fmt: skip
RELEASED_ADDITIONS_MJ = {(16, 3136, 32): 0.037098, (3136, 32, 32): 0.075665}


def variant_layers(network: str, variant: str) -> tuple[Layer, ...]:
    """Layers of a network as `VARIANTS` says. Raises UnknownNameError for other networks."""
    attention, projections, mlp = VARIANTS[variant]
    return network_layers(network, attention, projections, mlp)


@cache
def energy_j(network: str, variant: str, assumptions: Assumptions) -> float:
    """J of one image."""
    return total(network_energy(variant_layers(network, variant), assumptions=assumptions)).total_j


def saving_percent(network: str, variant: str, assumptions: Assumptions) -> float:
    """Energy that a conversion saves of the original network's."""
    return 100 * (1 - energy_j(network, variant, assumptions) / energy_j(network, "original", assumptions))


def _layer_j(shape: tuple[int, int, int], primitive: Primitive) -> Quantity:
    rows, inputs, outputs = shape
    layer = product_layer("layer", "mlp", primitive, 1, rows, outputs, inputs, 1, primitive != "add")
    return _predicted(operator_energy(layer.operator, primitive).total_j, "J")


def _layer_saving(shape: tuple[int, int, int]) -> Quantity:
    return _predicted(100 * (1 - _layer_j(shape, "shift").value / _layer_j(shape, "multiply").value), "%")


# ---- GPU ---------------------------------------------------------------------------------------------------------


def _batched(layer: Layer) -> Operator:
    """The layer for a batch, in the number formats of its primitive."""
    operator = layer.operator
    rows = "b" if operator.kind is Kind.CONVOLUTION or operator.loops["b"] > 1 else "m"
    formats = {"shift": ("int32", "int16", "int32"), "add": ("fp32", "bool", "fp32"), "multiply": ("fp32",) * 3}
    first, second, out = formats[layer.primitive]

    def made(tensor: Tensor, form: str) -> Tensor:
        size = None if tensor.size is None else tensor.size * (1 if tensor.role is Role.WEIGHT else BATCH)
        return replace(tensor, format=form, size=size)

    inputs = (made(operator.inputs[0], first), made(operator.inputs[1], second))
    loops = {**operator.loops, rows: operator.loops[rows] * BATCH}
    return replace(operator, loops=loops, inputs=inputs, outputs=(made(operator.outputs[0], out),))


def _pass(name: str, shape: tuple[int, ...], flops: float = 1.0, reads: int = 1) -> Operator:
    operands = [Operand(f"{name}.{index}", shape) for index in range(reads + 1)]
    return pointwise(name, Kind.ELEMENTWISE, operands[:-1], operands[-1:], shape, flops)


def _passes(network: str, variant: str, exchange: bool) -> list[Operator]:
    attention, projections, mlp = VARIANTS[variant]
    found = []
    for index, stage in enumerate(NETWORKS[network]):
        tokens, width, inner = stage.tokens[0] * stage.tokens[1], stage.width, stage.width * stage.ratio
        block = [_pass("norm", (BATCH, tokens, width), 8.0)] * 2 + [_pass("activation", (BATCH, tokens, inner), 8.0)]
        block += [_pass("residual", (BATCH, tokens, width), reads=2)] * 2
        if attention in ("original", "softmax"):
            keys = tokens // (stage.reduction**2 if attention == "original" else 1)
            block.append(_pass("softmax", (BATCH, stage.heads, tokens, keys), 5.0))
        else:
            block += [_pass("codes", (BATCH, tokens, width), 4.0)] * 2
            block.append(_pass("normalised", (BATCH, tokens, width), 6.0, reads=2))
        for kind, sizes in ((projections, (width, 3 * width, width, width)), (mlp, (width, inner, inner, width))):
            if kind == "mixture" and exchange:  # tokens go to their expert and come back
                block += [_pass("exchange", (BATCH, tokens, size)) for size in sizes]
        found += [replace(each, name=f"stages.{index}.{each.name}") for each in block] * stage.depth
    return found


@cache
def gpu_latency_s(network: str, variant: str, exchange: bool = True, free: bool = False) -> float:
    """Seconds of a batch of 32 images. Without `exchange`, experts find their tokens where they are; `free`: shifts and
    additions take the time of their traffic only."""
    device = load_machine(GPU).device()
    layers = variant_layers(network, variant)
    costs = cost.evaluate([_batched(layer) for layer in layers], device).operators
    seconds = 0.0
    for layer, each in zip(layers, costs, strict=True):
        instructions = 1 if layer.primitive == "multiply" else 0 if free else INSTRUCTIONS[layer.primitive]
        seconds += layer.count * (each.overhead_s + max(instructions * each.compute_s, each.memory_s))
    return seconds + cost.evaluate(_passes(network, variant, exchange), device).time_s


def gpu_factors(network: str, variant: str, start: str) -> dict[str, float]:
    """Speed-up over `start` ("original" or "softmax"): "whole" is the product of "linear attention", "primitives" and
    "exchange of tokens"; "bound" is the whole if shifts and additions took no time and no token moved."""
    before, linear = gpu_latency_s(network, start), gpu_latency_s(network, "linear")
    inside, after = gpu_latency_s(network, variant, False), gpu_latency_s(network, variant)
    return {"whole": before / after, "linear attention": before / linear, "primitives": linear / inside,
            "exchange of tokens": inside / after,
            "bound": before / gpu_latency_s(network, variant, False, True)}  # fmt: skip


# ---- claims ------------------------------------------------------------------------------------------------------

_ABSTRACT = "arXiv 2306.06446, abstract"
_CODE = "its released energy model, run on this shape"
_SEARCH = "another search over tilings, by powers of loop factors; the released one splits every loop over its levels"
_WHICH = (
    "the abstract does not say for which network, against which one and with which layers converted; the released "
    "assumptions leave out the traffic of additions and most of that of shifts"
)
_GPU_WHY = (
    "roofline of one GPU with the shares of linear attention, of the primitives and of moving tokens to experts apart; "
    "the abstract names neither network, batch nor baseline, and its figure includes compiled and tuned kernels. Units "
    "for float32 multiply and add in one instruction, so additions gain nothing there and shifts lose"
)


def _published(value: float, unit: str, source: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, source)


def _predicted(value: float, unit: str, source: str = "") -> Quantity:
    return Quantity(value, unit, Evidence.PREDICTED, source)


def bracket() -> Quantity:
    """Whether the published saving lies between those of the two sets of assumptions: 1 or 0."""
    ends = [max(saving_percent(network, "shifts and mixtures", each) for network in PAPER) for each in ASSUMED.values()]
    text = f"largest saving of {', '.join(PAPER)}: {min(ends):.1f} % charged in full, {max(ends):.1f} % as released"
    return _predicted(float(min(ends) <= HEADLINE_PERCENT <= max(ends)), "", text)


def energy_claims() -> list[Claim]:
    """Layers against the released model, and the saving of whole networks under both sets of assumptions."""
    found = []
    for shape, (multiplied, shifted) in RELEASED_LAYERS_MJ.items():
        where = f"({shape[0]}, {shape[1]}) by ({shape[1]}, {shape[2]}), 32 bits, released assumptions"
        saved = _published(100 * (1 - shifted / multiplied), "%", _CODE)
        found.append(Claim("energy saved by a shift layer", where, saved, partial(_layer_saving, shape), 0.02))
        primitives: tuple[tuple[Primitive, float], ...] = (("multiply", multiplied), ("shift", shifted))
        for primitive, millijoules in primitives:
            energy = _published(millijoules * 1e-3, "J", _CODE)
            measure = partial(_layer_j, shape, primitive)
            found.append(Claim(f"energy of a layer, {primitive}", where, energy, measure, 0.15, _SEARCH))
    for shape, millijoules in RELEASED_ADDITIONS_MJ.items():
        where = f"mask ({shape[0]}, {shape[1]}) on ({shape[1]}, {shape[2]}), 32 bits, released assumptions"
        energy = _published(millijoules * 1e-3, "J", _CODE)
        found.append(Claim("energy of a layer, add", where, energy, partial(_layer_j, shape, "add"), 0.15, _SEARCH))
    headline = _published(HEADLINE_PERCENT, "%", f"{_ABSTRACT}: up to")
    for network, variant, (name, assumptions) in product(PAPER, CONVERTED, ASSUMED.items()):

        def measure_saving(
            network: str = network, variant: str = variant, assumptions: Assumptions = assumptions
        ) -> Quantity:
            return _predicted(saving_percent(network, variant, assumptions), "%")

        where = f"{network}, {variant}, row-stationary array"
        found.append(Claim(f"energy saved, {name}", where, headline, measure_saving, None, _WHICH))
    found.append(Claim(
        "42.9 % lies between both sets of assumptions", "shifts in attention, mixtures in MLPs, best of three networks",
        _published(1, "", f"{_ABSTRACT}: up to 42.9 %"), bracket, 0.0,
    ))  # fmt: skip
    return found


def latency_claims() -> list[Claim]:
    """Factors of the latency on a GPU, against the original networks and against plain softmax attention."""
    found = []
    published = _published(HEADLINE_LATENCY, "x", f"{_ABSTRACT}: up to, on GPUs")
    starts = [(network, start) for network in PAPER for start in ("original", "softmax")
              if start == "original" or not network.startswith("DeiT")]  # fmt: skip
    for (network, start), part in product(starts, GPU_PARTS):

        def measure(network: str = network, start: str = start, part: str = part) -> Quantity:
            factors = gpu_factors(network, "mixtures", start)
            text = ", ".join(f"{name} {factors[name]:.2f} x (2^{math.log2(factors[name]):+.2f})"
                             for name in ("linear attention", "primitives", "exchange of tokens"))  # fmt: skip
            return _predicted(factors[part], "x", text)

        where = f"{network}, mixtures over {start} attention, RTX A6000, batch {BATCH}"
        found.append(Claim(f"speed-up on a GPU, {part}", where, published, measure, None, _GPU_WHY))
    return found


def operation_share(part: str) -> Quantity:
    """Share of multiply-accumulates of DeiT-B in "attention" (with its projections) or in the "mlp", in %."""
    layers = network_layers("DeiT-B")
    parts = ("attention", "projections") if part == "attention" else (part,)
    share = sum(layer.terms for layer in layers if layer.part in parts) / sum(layer.terms for layer in layers)
    return _predicted(100 * share, "%", "counted from shapes")


def cost_claims() -> list[Claim]:
    """Shares of operations, energy and latency."""
    shares = [
        Claim(f"operations in {name}", "DeiT-Base", _published(figure, "%", "arXiv 2306.06446, introduction"),
              partial(operation_share, part), 0.02)
        for part, name, figure in (("attention", "attention", 36), ("mlp", "MLPs", 63))
    ]  # fmt: skip
    return shares + energy_claims() + latency_claims()
