"""Evaluation of all orders of a loop nest on a spatial array at once; the model is described in `core.mapping`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.core.machine import Accelerator
from bitwright.core.workload import Kind, Operator, Role, Tensor

Array = NDArray[np.float64]
Positions = dict[str, dict[str, NDArray[np.intp]]]  # memory -> operand -> loops its tile covers, per ordering
OPERANDS = ("W", "I", "O")


@dataclass(frozen=True)
class Nest:
    """An operator prepared for mapping: loop extents, what is unrolled in space, temporal extents, operand tensors."""

    loops: tuple[str, ...]
    extents: Array  # (loops,)
    spatial: dict[str, tuple[str, int]]  # array dimension -> (loop, extent used)
    temporal: dict[str, int]
    tensors: dict[str, Tensor]
    repeat: int
    macs: int

    def relevant(self, operand: str) -> NDArray[np.bool_]:
        """Which loops index the operand, shape (loops,)."""
        used = {loop for axis in self.tensors[operand].axes for loop in axis}
        return np.array([loop in used for loop in self.loops], dtype=bool)

    def unrolled(self, dimensions: Iterable[str]) -> Array:
        """Extent unrolled in space along some array dimensions, per loop, shape (loops,)."""
        out = np.ones(len(self.loops))
        for dimension in dimensions:
            loop, extent = self.spatial[dimension]
            if loop:
                out[self.loops.index(loop)] *= extent
        return out

    def elements(self, operand: str, tile: Array) -> Array:
        """Elements of an operand that a tile of loop extents (..., loops) touches."""
        size = np.ones(tile.shape[:-1])
        for axis in self.tensors[operand].axes:
            span, points = np.ones(tile.shape[:-1]), np.ones(tile.shape[:-1])
            for loop, step in axis.items():
                span += step * (tile[..., self.loops.index(loop)] - 1)
                points = points * tile[..., self.loops.index(loop)]
            size *= np.minimum(span, points)  # a stride wider than the window leaves elements untouched
        stored = self.tensors[operand].size  # padding is in the span, not in memory
        return size if stored is None else np.minimum(size, stored)


def prepare(operator: Operator, accelerator: Accelerator) -> Nest:
    """Name the operands and unroll in space. Loops that index all three operands repeat the nest."""
    if operator.kind is Kind.ATTENTION or operator.kind not in (Kind.MATMUL, Kind.CONVOLUTION):
        raise InputError(f"Operator {operator.name!r} ({operator.kind}) is not a matrix product or a convolution.")
    if operator.attributes.get("transposed"):
        raise InputError(f"Operator {operator.name!r} is a transposed convolution; map_workload maps it as a product.")
    if len(operator.inputs) < 2 or not operator.outputs:
        raise InputError(f"Operator {operator.name!r} needs two inputs and an output to be mapped.")
    first, second = operator.inputs[:2]
    if first.role is Role.WEIGHT and second.role is not Role.WEIGHT:
        first, second = second, first
    tensors = {"I": first, "W": second, "O": operator.outputs[0]}
    used = {name: {loop for axis in tensor.axes for loop in axis} for name, tensor in tensors.items()}
    extents = {loop: extent for loop, extent in operator.loops.items() if extent > 1}
    shared = [loop for loop in extents if all(loop in used[name] for name in OPERANDS)]
    repeat = math.prod(extents.pop(loop) for loop in shared)
    unknown = [loop for loop in extents if not any(loop in used[name] for name in OPERANDS)]
    if unknown:
        raise InputError(f"Operator {operator.name!r}: loops {unknown} index none of its tensors.")

    if operator.kind is Kind.CONVOLUTION:
        names = {"output_channel": "o", "input_channel": "c", "column": "x", "row": "y", "batch": "b"}
    else:
        columns = "n" if "n" in used["W"] else "m"
        names = {"output_channel": columns, "input_channel": "k", "column": "m" if columns == "n" else "n",
                 "row": "", "batch": "b"}  # fmt: skip
    remaining = dict(extents)
    spatial = {}
    for dimension, description in accelerator.dimensions.items():
        loop = names[description.loop]
        extent = min(int(description.size.value), remaining.get(loop, 1))
        spatial[dimension] = (loop if loop in extents else "", extent)
        if loop in remaining:
            remaining[loop] = math.ceil(remaining[loop] / extent)
    for name, tensor in tensors.items():
        axes = tuple({loop: step for loop, step in axis.items() if loop in extents} for axis in tensor.axes)
        stored = None if tensor.size is None else max(1, tensor.size // repeat)
        tensors[name] = replace(tensor, axes=axes, size=stored)
    loops = tuple(extents)
    return Nest(loops, np.array([extents[loop] for loop in loops], dtype=float), spatial, remaining, tensors,
                 repeat, math.prod(extents.values()))  # fmt: skip


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors + [number] * (number > 1)


def temporal_factors(extents: Mapping[str, int], limit: int) -> list[tuple[str, int]]:
    """Split temporal extents into (loop, factor) pairs: prime factors, the smallest merged until `limit` are left."""
    split = {loop: sorted(_prime_factors(extent)) for loop, extent in extents.items() if extent > 1}
    while sum(map(len, split.values())) > limit:
        longest = max(split, key=lambda loop: len(split[loop]))
        factors = split[longest]
        if len(factors) < 2:
            break
        split[longest] = sorted([factors[0] * factors[1], *factors[2:]])
    return [(loop, factor) for loop, factors in split.items() for factor in factors]


def orderings(factors: list[tuple[str, int]]) -> NDArray[np.intp]:
    """All distinct orders of the factors, shape (orderings, factors), as indices into `factors`."""
    if not factors:
        return np.zeros((1, 0), dtype=np.intp)
    alike = [factors.index(factor) for factor in factors]  # equal factors share an index, so their swaps coincide
    return np.unique(np.array(list(permutations(alike)), dtype=np.intp).reshape(-1, len(factors)), axis=0)


class OrderingSearch:
    """Evaluates many orderings of one nest on one accelerator; arrays are (orderings, ...)."""

    def __init__(self, nest: Nest, accelerator: Accelerator, factors: list[tuple[str, int]], orders: NDArray[np.intp]):
        self.nest, self.accelerator = nest, accelerator
        self.count, self.depth = orders.shape
        loop_of = np.array([nest.loops.index(loop) for loop, _ in factors], dtype=np.intp)
        sizes = np.array([factor for _, factor in factors], dtype=float)
        self.loop = loop_of[orders]  # (orderings, depth)
        self.size = sizes[orders]
        step = np.ones((self.count, self.depth + 1, len(nest.loops)))
        for position in range(self.depth):
            step[np.arange(self.count), position + 1, self.loop[:, position]] = self.size[:, position]
        self.extent = np.cumprod(step, axis=1)  # (orderings, depth + 1, loops): temporal extent of every prefix
        inner = np.cumprod(np.concatenate([np.ones((self.count, 1)), self.size], axis=1), axis=1)
        self.compute = float(inner[0, -1])
        self.outer = self.compute / inner
        self.bits = {
            "W": accelerator.weight_bits.value,
            "I": accelerator.input_bits.value,
            "O": accelerator.output_bits.value,
        }
        self.partial = accelerator.partial_sum_bits.value
        self.relevant, self.refills, self.distinct, self.top = {}, {}, {}, {}
        for operand in OPERANDS:
            relevant = nest.relevant(operand)[self.loop] if self.depth else np.zeros((self.count, 0), dtype=bool)
            refills, distinct = np.ones_like(self.outer), np.ones_like(self.outer)
            top = np.ones_like(self.outer)
            for position in range(self.depth - 1, -1, -1):
                here = relevant[:, position]
                refills[:, position] = np.where(here, self.outer[:, position], refills[:, position + 1])
                distinct[:, position] = distinct[:, position + 1] * np.where(here, self.size[:, position], 1)
            for position in range(1, self.depth + 1):
                top[:, position] = np.where(
                    relevant[:, position - 1], 1, top[:, position - 1] * self.size[:, position - 1]
                )
            self.relevant[operand], self.refills[operand] = relevant, refills
            self.distinct[operand], self.top[operand] = distinct, top
        self._tile_cache: dict[tuple[str, str], Array] = {}

    def tile(self, operand: str, scope: tuple[str, ...]) -> Array:
        """Elements of every prefix's tile over the array dimensions of `scope`, shape (orderings, depth + 1)."""
        key = (operand, ",".join(scope))
        if key not in self._tile_cache:
            extents = np.minimum(self.extent * self.nest.unrolled(scope), self.nest.extents)
            self._tile_cache[key] = self.nest.elements(operand, extents)
        return self._tile_cache[key]

    def pick(self, table: Array, position: NDArray[np.intp]) -> Array:
        """One entry of each row of `table`: column `position[i]` of row i."""
        return np.asarray(table[np.arange(self.count), position])

    def stored_bits(self, operand: str, scope: tuple[str, ...]) -> Array:
        """Bits a tile takes in a memory: partial sums until the reduction inside it is complete."""
        elements = self.tile(operand, scope)
        if operand != "O":
            return elements * self.bits[operand]
        outside = set(self.accelerator.dimensions) - set(scope)
        spread = bool(np.any((self.nest.unrolled(outside) > 1) & ~self.nest.relevant("O")))
        done = (self.refills["O"] == self.distinct["O"]) & (not spread)
        return elements * np.where(done, self.bits["O"], self.partial)

    def allocate(self, fill: float) -> tuple[Positions, NDArray[np.bool_]]:
        """Tile positions per memory and operand, greedily from the nearest memory; and which orderings fit at all."""
        names = list(self.accelerator.memories)
        current = {operand: np.zeros(self.count, dtype=np.intp) for operand in OPERANDS}
        feasible = np.ones(self.count, dtype=bool)
        positions: Positions = {}
        for index, name in enumerate(names):
            memory = self.accelerator.memories[name]
            held = memory.operands
            stored = {operand: self.stored_bits(operand, memory.shared_along) for operand in held}
            if index == len(names) - 1:
                whole = sum(stored[operand][:, -1] for operand in held)
                feasible &= whole <= memory.size.value
                positions[name] = {operand: np.full(self.count, self.depth, dtype=np.intp) for operand in held}
                continue
            # What one refill moves, summed over the computation: the tile over all instances times its refills.
            moved = {
                operand: self.tile(operand, tuple(self.accelerator.dimensions)) * self.refills[operand]
                for operand in held
            }
            best = np.full(self.count, np.inf)
            chosen: dict[str, NDArray[np.intp]] = {operand: current[operand].copy() for operand in held}
            smallest = sum(self.pick(stored[operand], current[operand]) for operand in held)
            limit = np.maximum(memory.size.value * (fill if index else 1.0), np.minimum(smallest, memory.size.value))
            for combination in product(range(self.depth + 1), repeat=len(held)):
                used = np.zeros(self.count)
                traffic = np.zeros(self.count)
                allowed = np.ones(self.count, dtype=bool)
                for operand, position in zip(held, combination, strict=True):
                    used += stored[operand][:, position]
                    traffic += moved[operand][:, position]
                    allowed &= current[operand] <= position
                better = allowed & (used <= limit) & (traffic <= best)
                if better.any():
                    best = np.where(better, traffic, best)
                    for operand, position in zip(held, combination, strict=True):
                        chosen[operand] = np.where(better, position, chosen[operand])
            feasible &= np.isfinite(best)
            positions[name] = chosen
            current.update(chosen)
        return positions, feasible

    def evaluate(self, positions: Positions) -> OrderingFigures:
        """Latency, energy and traffic of every ordering for given tile positions."""
        accelerator, nest = self.accelerator, self.nest
        memories = accelerator.memories
        zero = np.zeros(self.count)
        reads: dict[str, dict[str, Array]] = {
            name: {op: zero.copy() for op in memories[name].operands} for name in memories
        }
        writes: dict[str, dict[str, Array]] = {
            name: {op: zero.copy() for op in memories[name].operands} for name in memories
        }
        ports: dict[tuple[str, ...], list[tuple[Array, Array]]] = {}  # port -> (busy cycles, window fraction)
        stall, epilogue = zero.copy(), zero.copy()
        chain = {operand: zero.copy() for operand in OPERANDS}
        first_loads: dict[tuple[str, ...], Array] = {}
        doubled = {name: self._double_buffered(name, positions[name]) for name in memories}

        def instances(name: str) -> float:
            return float(np.prod(nest.unrolled(set(accelerator.dimensions) - set(memories[name].shared_along))))

        def port(name: str, operand: str, direction: str, other: str) -> tuple[str, ...]:
            kind = memories[name].ports
            return (name,) if kind == "one" else (name, direction) if kind == "read-and-write" else (
                name, operand, direction, other)  # fmt: skip

        def transfer(name: str, operand: str, direction: str, other: str, tile: Array, times: Array, bits: float,
                     window: Array, skip_first: bool) -> Array:  # fmt: skip
            """Book `times` transfers of `tile` elements at one memory; returns the cycles of one."""
            memory = memories[name]
            granule = memory.granule.value
            width = memory.read_width.value if direction == "read" else memory.write_width.value
            moved = np.ceil(tile * bits / granule) * granule
            book = reads if direction == "read" else writes
            book[name][operand] += moved * times * instances(name)
            cycles = moved / width
            during = np.maximum(times - 1, 0) if skip_first else times
            key = port(name, operand, direction, other)
            ports.setdefault(key, []).append((cycles * during, window))
            period = self.compute / np.maximum(times, 1)
            np.maximum(stall, np.maximum(cycles - window * period, 0) * during, out=stall)
            if skip_first:
                first_loads[key] = first_loads.get(key, zero) + cycles
            return cycles

        for operand in OPERANDS:
            levels = [name for name in memories if operand in memories[name].operands]
            lower: str | None = None
            for upper in levels:
                scope = memories[upper].shared_along
                own = memories[lower].shared_along if lower else ()
                at = positions[lower][operand] if lower else np.zeros(self.count, dtype=np.intp)
                above, below = self.pick(self.tile(operand, scope), at), self.pick(self.tile(operand, own), at)
                times = self.pick(self.refills[operand], at)
                window = np.ones(self.count)
                if lower:
                    window = np.where(doubled[lower][operand], 1.0, 1 / self.pick(self.top[operand], at))
                if operand != "O":
                    cycles = transfer(upper, operand, "read", "down", above, times, self.bits[operand], window, True)
                    if lower:
                        into = transfer(lower, operand, "write", "up", below, times, self.bits[operand], window, True)
                        cycles = np.maximum(cycles, into)
                    chain[operand] += cycles
                else:
                    new = self.pick(self.distinct["O"], at)
                    if not lower:
                        times = np.full(self.count, self.compute)  # every cycle adds to the nearest accumulators
                        final_bits, new_up = self.partial, times
                    else:
                        final_bits, new_up = self.bits["O"], new
                    again = times - new_up
                    for share, width_bits in ((new_up, final_bits), (again, self.partial)):
                        cycles = transfer(upper, "O", "write", "down", above, share, width_bits, window, False)
                        if lower:
                            out = transfer(lower, "O", "read", "up", below, share, width_bits, window, False)
                            cycles = np.maximum(cycles, out)
                        if lower and share is new_up:
                            last = self.compute / times / self.pick(self.top["O"], at)
                            epilogue += np.maximum(cycles - last, np.minimum(cycles, 1))
                    back = np.maximum(times - new, 0)
                    transfer(upper, "O", "read", "down", above, back, self.partial, window, False)
                    if lower:
                        transfer(lower, "O", "write", "up", below, back, self.partial, window, False)
                lower = upper

        for uses in ports.values():
            busy = sum((cycles for cycles, _ in uses), zero)
            widest = np.maximum.reduce([np.where(cycles > 0, window, 0) for cycles, window in uses])
            np.maximum(stall, busy - self.compute * widest, out=stall)
        prologue = np.maximum.reduce([chain["W"], chain["I"], *first_loads.values()])
        epilogue = epilogue + sum(
            nest.spatial[name][1] - 1 for name, dimension in accelerator.dimensions.items() if dimension.systolic
        )
        energy = np.full(self.count, nest.macs * accelerator.mac_energy.value)
        traffic_energy: dict[str, dict[str, Array]] = {}
        for name, memory in memories.items():
            per_read = memory.read_energy.value / memory.read_width.value
            per_write = memory.write_energy.value / memory.write_width.value
            traffic_energy[name] = {
                op: reads[name][op] * per_read + writes[name][op] * per_write for op in memory.operands
            }
            for part in traffic_energy[name].values():
                energy = energy + part
        latency = self.compute + stall + prologue + epilogue
        return OrderingFigures(latency, stall, prologue, epilogue, energy, reads, writes, traffic_energy)

    def _double_buffered(self, name: str, positions: dict[str, NDArray[np.intp]]) -> dict[str, NDArray[np.bool_]]:
        """Whether a memory can hold an operand's tile twice beside its other tiles, granted in operand order."""
        memory = self.accelerator.memories[name]
        tiles = {op: self.pick(self.stored_bits(op, memory.shared_along), positions[op]) for op in memory.operands}
        free = memory.size.value - sum(tiles.values(), np.zeros(self.count))
        doubled: dict[str, NDArray[np.bool_]] = {}
        for operand in memory.operands:
            doubled[operand] = tiles[operand] <= free
            free = np.where(doubled[operand], free - tiles[operand], free)
        return doubled


@dataclass(frozen=True)
class OrderingFigures:
    """Figures of every loop order tried, one array entry per order: cycles, energy and traffic per memory."""

    latency: Array
    stall: Array
    prologue: Array
    epilogue: Array
    energy: Array
    reads: dict[str, dict[str, Array]]
    writes: dict[str, dict[str, Array]]
    traffic_energy: dict[str, dict[str, Array]]
