"""Mapping: traffic against a walk through the loop nest, latency against bounds and hand arithmetic, bad input."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.core.machine import load_machine, machine_from_data
from bitwright.core.mapping import map_operator, map_workload
from bitwright.core.mapping_search import temporal_factors
from bitwright.core.workload import Kind, Operator, Role, Tensor


def conv(c, o, y, x, r, s, stride=1, groups=1, batch=1, name="conv"):
    return Operator(
        name, Kind.CONVOLUTION, {"b": batch, "g": groups, "c": c, "o": o, "y": y, "x": x, "r": r, "s": s},
        (Tensor("i", ({"b": 1}, {"g": 1}, {"c": 1}, {"y": stride, "r": 1}, {"x": stride, "s": 1})),
         Tensor("w", ({"g": 1}, {"o": 1}, {"c": 1}, {"r": 1}, {"s": 1}), role=Role.WEIGHT)),
        (Tensor("o", ({"b": 1}, {"g": 1}, {"o": 1}, {"y": 1}, {"x": 1})),),
    )  # fmt: skip


def matmul(m, n, k, b=1):
    return Operator(
        "mm", Kind.MATMUL, {"b": b, "m": m, "n": n, "k": k},
        (Tensor("a", ({"b": 1}, {"m": 1}, {"k": 1})), Tensor("w", ({"k": 1}, {"n": 1}), role=Role.WEIGHT)),
        (Tensor("o", ({"b": 1}, {"m": 1}, {"n": 1})),),
    )  # fmt: skip


def accelerator(**sizes):
    size = {"wreg": 32, "acc": 32, "sram": 640, "dram": 10**9, **sizes}
    cost = {"read_energy": "1 pJ", "write_energy": "2 pJ"}
    wide = {"read_width": "64 bit", "write_width": "64 bit", "granule": "8 bit", **cost}

    def held(name, operands, shared, ports):
        return {"operands": operands, "shared_along": shared, "ports": ports, "size": f"{size[name]} bit", **wide}

    return machine_from_data(
        {
            "name": "toy",
            "accelerator": {
                "dimensions": {"a": {"size": 2, "loop": "output_channel"}, "b": {"size": 2, "loop": "input_channel"}},
                "mac_energy": "1 pJ", "clock": "1 GHz",
                "weight_bits": 8, "input_bits": 8, "output_bits": 8, "partial_sum_bits": 16,
                "memories": {
                    "wreg": held("wreg", ["W"], [], "read-and-write"),
                    "acc": held("acc", ["O"], [], "dedicated"),
                    "sram": held("sram", ["I", "O"], ["a", "b"], "read-and-write"),
                    "dram": held("dram", ["W", "I", "O"], ["a", "b"], "one"),
                },
            },
            "sources": {"accelerator": "made up for this test"},
        },
        "toy",
    ).accelerator  # fmt: skip


TENSOR = {"I": 0, "W": 1}
BITS = {"W": 8, "I": 8}


class Walk:
    """Runs the temporal loops of a mapping one by one and watches the set of elements each memory's tile holds."""

    def __init__(self, operator, array, mapping):
        self.operator, self.array, self.mapping = operator, array, mapping
        self.traffic = {(name, op): [0, 0] for name, memory in array.memories.items() for op in memory.operands}
        for operand in ("W", "I", "O"):
            levels = [name for name, memory in array.memories.items() if operand in memory.operands]
            for lower, upper in zip([None, *levels], levels, strict=False):
                self.link(operand, lower, upper)

    def elements(self, operand, outer, inside, scope):
        """Coordinates touched with the outer temporal indices fixed, over the loops inside and the space of `scope`."""
        tensor = self.operator.outputs[0] if operand == "O" else self.operator.inputs[TENSOR[operand]]
        space = [self.mapping.spatial[dimension] for dimension in scope]
        ranges = [range(factor) for _, factor in inside] + [range(extent) for _, extent in space]
        order, found = self.mapping.temporal, set()
        for indices in product(*ranges):
            value, weight = {}, {}
            for loop, extent in self.mapping.spatial.values():  # space is the innermost part of a loop
                weight[loop] = weight.get(loop, 1) * extent
            for (loop, _), index in zip(space, indices[len(inside) :], strict=True):
                value[loop] = value.get(loop, 0) + index
            for (loop, factor), index in zip(order, [*indices[: len(inside)], *outer], strict=True):
                value[loop] = value.get(loop, 0) + index * weight.get(loop, 1)
                weight[loop] = weight.get(loop, 1) * factor
            found.add(tuple(sum(step * value.get(loop, 0) for loop, step in axis.items()) for axis in tensor.axes))
        return frozenset(found)

    def link(self, operand, lower, upper):
        order, memories = self.mapping.temporal, self.array.memories
        depth = self.mapping.tiles[lower][operand] if lower else 0
        inside, outside = order[:depth], order[depth:]
        everything = tuple(self.array.dimensions)
        upper_scope = memories[upper].shared_along
        lower_scope = memories[lower].shared_along if lower else ()

        def instances(scope):
            count = 1
            for dimension in everything:
                count *= 1 if dimension in scope else self.mapping.spatial[dimension][1]
            return count

        held, visits = None, []
        for reverse in product(*[range(factor) for _, factor in reversed(outside)]):
            outer = reverse[::-1]
            tile = self.elements(operand, outer, inside, everything)
            if tile != held or (operand == "O" and lower is None):
                above = len(self.elements(operand, outer, inside, upper_scope)) * instances(upper_scope)
                below = len(self.elements(operand, outer, inside, lower_scope)) * instances(lower_scope)
                visits.append((tile, above, below))
            held = tile
        seen, remaining = set(), {}
        for tile, _, _ in visits:
            remaining[tile] = remaining.get(tile, 0) + 1
        for tile, above, below in visits:
            if operand != "O":
                self.traffic[upper, operand][0] += above * BITS[operand]
                if lower:
                    self.traffic[lower, operand][1] += below * BITS[operand]
                continue
            if tile in seen:
                self.traffic[upper, "O"][0] += above * 16
                if lower:
                    self.traffic[lower, "O"][1] += below * 16
            seen.add(tile)
            remaining[tile] -= 1
            bits = 8 if lower and remaining[tile] == 0 else 16
            self.traffic[upper, "O"][1] += above * bits
            if lower:
                self.traffic[lower, "O"][0] += below * bits


@pytest.mark.parametrize("objective", ["latency", "energy", "edp"])
@pytest.mark.parametrize(
    "operator",
    [conv(4, 4, 4, 3, 3, 1), conv(4, 4, 2, 2, 2, 2, stride=2), conv(2, 8, 3, 3, 1, 1, stride=2), conv(2, 2, 1, 1, 1, 1),
     matmul(6, 4, 8), matmul(1, 8, 8)],
)  # fmt: skip
@pytest.mark.parametrize("sram", [256, 640, 10**6])
def test_traffic_equals_a_walk_through_the_loops(operator, objective, sram):
    array = accelerator(sram=sram)
    mapping = map_operator(operator, array, objective)
    walk = Walk(operator, array, mapping)
    ours = {(name, op): [t.read_bits, t.write_bits] for name, held in mapping.traffic.items() for op, t in held.items()}
    assert ours == walk.traffic
    energy = operator.macs * 1e-12
    for read, write in walk.traffic.values():
        energy += (read * 1e-12 + write * 2e-12) / 64
    assert mapping.energy_j == pytest.approx(energy, rel=1e-6, abs=0)


def tile_bits(operator, mapping, array):
    """Bits held in every memory, counted element by element."""
    walk = Walk(operator, array, mapping)
    for name, memory in array.memories.items():
        bits = 0
        for operand in memory.operands:
            depth = mapping.tiles[name][operand]
            outside = mapping.temporal[depth:]
            count = len(walk.elements(operand, [0] * len(outside), mapping.temporal[:depth], memory.shared_along))
            bits += count * 8  # at least: partial sums take 16
        yield name, bits


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 6]), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 2), st.sampled_from(["latency", "energy"]),
)  # fmt: skip
def test_no_mapping_beats_the_bounds_or_overfills_a_memory(c, o, y, x, r, stride, objective):
    operator, array = conv(c, o, y, x, r, r, stride), accelerator()
    mapping = map_operator(operator, array, objective)
    assert mapping.compute_cycles >= operator.macs / array.cells
    assert mapping.latency_cycles >= mapping.compute_cycles
    assert 0 < mapping.utilisation <= mapping.spatial_utilisation <= 1
    dram = mapping.traffic["dram"]
    assert mapping.latency_cycles >= (sum(t.read_bits + t.write_bits for t in dram.values())) / 64 - 1e-9
    assert dram["W"].read_bits >= c * o * r * r * 8  # every weight is read
    assert dram["O"].write_bits >= o * y * x * 8  # every output is written
    for name, bits in tile_bits(operator, mapping, array):
        assert bits <= array.memories[name].size.value


def test_latency_of_a_memory_bound_product_by_hand():
    """One row times a large matrix on the TPU-like machine: DRAM carries every weight once at 64 bits per cycle."""
    array = load_machine("tpu-like").accelerator
    mapping = map_operator(matmul(1, 1024, 512), array)
    weights = 1024 * 512 * 8 / 64
    assert mapping.compute_cycles == 1024 / 32 * 512 / 32
    assert weights < mapping.latency_cycles < 1.02 * weights
    assert mapping.traffic["dram"]["W"].read_bits == 1024 * 512 * 8


def test_latency_of_a_compute_bound_product_by_hand():
    array = load_machine("tpu-like").accelerator
    mapping = map_operator(matmul(8192, 32, 32), array)
    assert mapping.compute_cycles == 8192
    assert mapping.spatial_utilisation == 1
    # the input moves in and the output out once each, 32 bytes a row through 8 bytes a cycle: DRAM bound
    assert mapping.latency_cycles >= 2 * 8192 * 32 / 8
    wide = array.model_copy(
        update={
            "memories": {
                **array.memories,
                "dram": array.memories["dram"].model_copy(
                    update={
                        "read_width": array.memories["sram"].read_width,
                        "write_width": array.memories["sram"].read_width,
                    }
                ),
            }
        }
    )
    faster = map_operator(matmul(8192, 32, 32), wide)
    assert faster.latency_cycles < 1.2 * 8192
    assert faster.epilogue_cycles >= 31 + 31  # the systolic array drains


def test_objectives_order_the_results():
    operator, array = conv(16, 16, 14, 14, 3, 3), load_machine("ascend-like").accelerator
    fast, frugal = (map_operator(operator, array, objective) for objective in ("latency", "energy"))
    both = map_operator(operator, array, "edp")
    assert fast.latency_cycles <= min(frugal.latency_cycles, both.latency_cycles)
    assert frugal.energy_j <= min(fast.energy_j, both.energy_j)
    assert both.latency_cycles * both.energy_j <= min(m.latency_cycles * m.energy_j for m in (fast, frugal)) * (
        1 + 1e-9
    )


def test_groups_repeat_the_nest():
    array = load_machine("tpu-like").accelerator
    one, four = map_operator(conv(8, 8, 7, 7, 3, 3), array), map_operator(conv(8, 8, 7, 7, 3, 3, groups=4), array)
    assert four.repeat == 4
    assert four.latency_cycles == pytest.approx(4 * one.latency_cycles)
    assert four.energy_j == pytest.approx(4 * one.energy_j, rel=1e-9, abs=0)


def test_padding_is_not_fetched():
    """Importers state the elements stored: a padded 3x3 window reaches 9x9 where 7x7 are stored."""
    padded = conv(4, 4, 7, 7, 3, 3)
    data = replace(padded.inputs[0], size=4 * 7 * 7)
    stored = replace(padded, inputs=(data, padded.inputs[1]))
    array = accelerator(sram=10**6)
    reads = [map_operator(op, array, "energy").traffic["dram"]["I"].read_bits for op in (padded, stored)]
    assert reads == [4 * 9 * 9 * 8, 4 * 7 * 7 * 8]


def test_transposed_convolution_is_mapped_as_its_product():
    transposed = replace(conv(4, 4, 4, 4, 2, 2), attributes={"transposed": True})
    with pytest.raises(InputError, match="map_workload"):
        map_operator(transposed, accelerator())
    mappings, _ = map_workload([transposed], accelerator())
    assert sum(m.mac_energy_j for m in mappings) == pytest.approx(transposed.macs * 1e-12, rel=1e-9, abs=0)


def test_temporal_factors_keep_the_product():
    factors = temporal_factors({"x": 56, "y": 56, "r": 3, "s": 3, "c": 2, "o": 2}, 7)
    assert len(factors) == 7
    for loop, extent in {"x": 56, "y": 56, "r": 3}.items():
        found = 1
        for name, factor in factors:
            found *= factor if name == loop else 1
        assert found == extent


def test_workload_maps_products_and_names_what_it_leaves_out():
    axes = ({"b": 1}, {"h": 1}, {"q": 1}, {"d": 1})
    attention = Operator(
        "att", Kind.ATTENTION, {"b": 1, "h": 2, "q": 8, "k": 8, "d": 16, "e": 16},
        (Tensor("q", axes), Tensor("k", ({"b": 1}, {"h": 1}, {"k": 1}, {"d": 1})),
         Tensor("v", ({"b": 1}, {"h": 1}, {"k": 1}, {"e": 1}))),
        (Tensor("o", ({"b": 1}, {"h": 1}, {"q": 1}, {"e": 1})),),
    )  # fmt: skip
    relu = Operator("relu", Kind.ELEMENTWISE, {"n": 8}, (Tensor("a", ({"n": 1},)),), (Tensor("b", ({"n": 1},)),), 1.0)
    mappings, left_out = map_workload([matmul(8, 8, 8), relu, attention], load_machine("tpu-like").accelerator)
    assert [mapping.name for mapping in mappings] == ["mm", "att.scores", "att.context"]
    assert left_out == ["relu"]


def test_bad_input():
    array = accelerator()
    with pytest.raises(InputError, match="latency, energy, edp"):
        map_operator(matmul(2, 2, 2), array, "speed")
    with pytest.raises(InputError, match="max_factors"):
        map_operator(matmul(2, 2, 2), array, max_factors=20)
    with pytest.raises(InputError, match="does not fit"):
        map_operator(matmul(64, 64, 64), accelerator(dram=8))
    relu = Operator("relu", Kind.ELEMENTWISE, {"n": 8}, (Tensor("a", ({"n": 1},)),), (Tensor("b", ({"n": 1},)),), 1.0)
    with pytest.raises(InputError, match="not a matrix product"):
        map_operator(relu, array)
