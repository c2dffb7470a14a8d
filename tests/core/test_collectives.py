"""Collectives: formulas against a step-by-step simulation of the messages, executed on real vectors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.collectives import collective, collective_on, hierarchical
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import Link, load_machine, machine_from_data


def link(bandwidth="10 GB/s", latency="5 us", topology="switch"):
    data = {
        "name": "two", "devices": {"d": {"memories": {"m": {"capacity": "1 B"}}}},
        "links": {"l": {"type": "test", "topology": topology, "bandwidth": bandwidth, "latency": latency}},
        "sources": {"devices": "test", "links": "test"},
    }  # fmt: skip
    return machine_from_data(data, "test").links["l"]


class Wires:
    """Devices with clocks; a message occupies its sender's output and its receiver's input for bytes / bandwidth."""

    def __init__(self, n, wire: Link):
        self.ready, self.wire = np.zeros(n), wire
        self.sent = np.zeros(n)

    def step(self, messages):
        """Messages (source, target, bytes) of one step, at the same time; each device then waits for its own."""
        after = self.ready.copy()
        for source, target, size in messages:
            arrival = self.ready[source] + self.wire.latency.value + size / self.wire.bandwidth.value
            after[target] = max(after[target], arrival)
            after[source] = max(after[source], arrival)
            self.sent[source] += size
        self.ready = after


def simulate_ring_all_reduce(data, wire):
    """Ring all-reduce of one fp64 vector per device. Returns results, seconds, bytes sent by device 0."""
    n = len(data)
    chunks = [np.array_split(vector.copy(), n) for vector in data]
    wires = Wires(n, wire)
    for phase in ("reduce", "gather"):
        for step in range(n - 1):
            moving = {}
            for source in range(n):
                index = (source - step + (phase == "gather")) % n
                moving[source] = (index, chunks[source][index].copy())
            wires.step([(source, (source + 1) % n, moving[source][1].nbytes) for source in moving])
            for source, (index, values) in moving.items():
                target = (source + 1) % n
                chunks[target][index] = chunks[target][index] + values if phase == "reduce" else values
    return [np.concatenate(parts) for parts in chunks], wires.ready.max(), wires.sent[0]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_ring_all_reduce_equals_simulated_messages(n):
    rng = np.random.default_rng(n)
    data = [rng.integers(-9, 9, 120 * n).astype(float) for _ in range(n)]
    results, seconds, sent = simulate_ring_all_reduce(data, link())
    for result in results:
        assert np.array_equal(result, np.sum(data, axis=0))  # the simulated messages really reduce
    cost = collective("all-reduce", data[0].nbytes, n, link(), algorithm="ring")
    assert cost.time_s == pytest.approx(seconds)
    assert cost.sent_bytes == pytest.approx(sent)
    assert cost.steps == 2 * (n - 1)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_halving_doubling_equals_simulated_messages(n):
    rng = np.random.default_rng(n)
    data = [rng.integers(-9, 9, 16 * n).astype(float) for _ in range(n)]
    values, ranges, wires = [v.copy() for v in data], [(0, 16 * n)] * n, Wires(n, link())
    distance = n // 2
    while distance:
        before, messages, kept = [v.copy() for v in values], [], list(ranges)
        for rank in range(n):
            low, high = ranges[rank]
            middle = (low + high) // 2
            kept[rank] = (low, middle) if rank & distance == 0 else (middle, high)
            give = (middle, high) if rank & distance == 0 else (low, middle)
            messages.append((rank, rank ^ distance, (give[1] - give[0]) * 8))
            low, high = kept[rank]
            values[rank][low:high] += before[rank ^ distance][low:high]
        ranges = kept
        wires.step(messages)
        distance //= 2
    scattered = wires.ready.max()
    distance = 1
    while distance < n:
        before, old = [v.copy() for v in values], list(ranges)
        wires.step([(rank, rank ^ distance, (old[rank][1] - old[rank][0]) * 8) for rank in range(n)])
        for rank in range(n):
            low, high = old[rank ^ distance]
            values[rank][low:high] = before[rank ^ distance][low:high]
            ranges[rank] = (min(old[rank][0], low), max(old[rank][1], high))
        distance *= 2
    for value in values:
        assert np.array_equal(value, np.sum(data, axis=0))
    size = data[0].nbytes
    assert collective("reduce-scatter", size, n, link(), algorithm="halving-doubling").time_s == pytest.approx(
        scattered
    )
    assert collective("all-reduce", size, n, link(), algorithm="halving-doubling").time_s == pytest.approx(
        wires.ready.max()
    )


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_broadcast_tree_and_pairwise_exchange_equal_simulated_messages(n):
    wires, holders = Wires(n, link()), 1
    while holders < n:
        wires.step([(source, source + holders, 4096) for source in range(holders) if source + holders < n])
        holders *= 2
    assert collective("broadcast", 4096, n, link(), algorithm="tree").time_s == pytest.approx(wires.ready.max())
    wires = Wires(n, link())
    for distance in range(1, n):
        wires.step([(rank, (rank + distance) % n, 4096 / n) for rank in range(n)])
    cost = collective("all-to-all", 4096, n, link())
    assert cost.time_s == pytest.approx(wires.ready.max())
    assert cost.sent_bytes == pytest.approx(wires.sent[0])


@given(st.integers(2, 64), st.floats(1, 1e10))
def test_bounds_every_all_reduce_must_respect(n, size):
    wire = link()
    cost = collective("all-reduce", size, n, wire)
    assert cost.time_s >= 2 * (n - 1) / n * size / wire.bandwidth.value * (1 - 1e-12)  # bandwidth (Patarasuk, Yuan)
    assert cost.time_s >= math.log2(n) * wire.latency.value * (1 - 1e-12)  # latency
    assert cost.time_s <= collective("all-reduce", size, n, wire, algorithm="ring").time_s
    whole = collective("reduce-scatter", size, n, wire, algorithm="ring").time_s
    whole += collective("all-gather", size, n, wire, algorithm="ring").time_s
    assert whole == pytest.approx(collective("all-reduce", size, n, wire, algorithm="ring").time_s)


def test_auto_takes_trees_for_short_and_rings_for_long_messages():
    assert collective("all-reduce", 8, 7, link()).algorithm == "tree"
    assert collective("all-reduce", 8, 8, link()).algorithm == "halving-doubling"
    assert collective("all-reduce", 1e9, 7, link()).algorithm == "ring"
    assert collective("all-reduce", 8, 8, link(topology="ring")).algorithm == "ring"
    assert collective("all-reduce", 8, 1, link()).time_s == 0


def test_bandwidth_may_depend_on_the_message():
    def rate(message):
        return 10e9 * message / (message + 1e6)

    slow = collective("all-gather", 8e6, 8, link(), algorithm="ring", bandwidth=rate)
    assert slow.time_s == pytest.approx(7 * (5e-6 + (1e6 + 1e6) / 10e9))


def test_hierarchical_all_reduce_by_hand():
    inner, outer = link("100 GB/s", "1 us"), link("10 GB/s", "10 us")
    cost = hierarchical("all-reduce", 8e6, 4, 2, inner, outer)
    inside = 2 * 2 * 1e-6 + 2 * 0.75 * 8e6 / 100e9  # halving-doubling each way over four devices
    between = 2 * 10e-6 + 2 * 0.5 * 2e6 / (10e9 / 4)  # each device's 2 MB over its quarter of the network
    assert cost.time_s == pytest.approx(inside + between)
    assert hierarchical("all-reduce", 8e6, 4, 1, inner, outer) == collective("all-reduce", 8e6, 4, inner)


def test_on_a_machine():
    cluster = load_machine("dgx-a100-cluster")
    inside, across = collective_on(cluster, "all-reduce", 1e9, 8), collective_on(cluster, "all-reduce", 1e9, 16)
    assert inside.time_s == pytest.approx(2 * 7 / 8 * 1e9 / 300e9, rel=0.01)
    assert across.time_s > inside.time_s
    assert collective_on(cluster, "all-reduce", 1e9, 1).time_s == 0
    with pytest.raises(InputError, match="128 devices"):
        collective_on(cluster, "all-reduce", 1e9, 129)
    with pytest.raises(InputError, match="whole nodes"):
        collective_on(cluster, "all-reduce", 1e9, 12)


def test_bad_input():
    with pytest.raises(UnknownNameError, match="all-reduce"):
        collective("allreduce", 8, 4, link())
    with pytest.raises(UnknownNameError, match="pairwise"):
        collective("all-to-all", 8, 4, link(), algorithm="ring")
    with pytest.raises(InputError, match="power of two"):
        collective("all-reduce", 8, 6, link(), algorithm="halving-doubling")
    with pytest.raises(InputError, match="every pair"):
        collective("all-to-all", 8, 6, link(topology="ring"))
    with pytest.raises(InputError, match="zero or more bytes"):
        collective("all-reduce", -1, 6, link())
    with pytest.raises(InputError, match="above zero"):
        collective("all-reduce", 8, 6, link(), bandwidth=lambda message: 0.0)
