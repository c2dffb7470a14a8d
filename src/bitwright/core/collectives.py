"""Cost of collective communication: alpha-beta models of the usual algorithms. Evidence: predicted.

A message of m bytes takes alpha + m / beta over a link (Hockney, 1994), alpha its latency and beta its bandwidth in one
direction; both directions work at once. Formulas after Thakur, Rabenseifner, Gropp, "Optimization of Collective
Communication Operations in MPICH", IJHPCA 2005. With B bytes and n devices:

    ring all-reduce                2 (n-1) (alpha + B/n / beta)
    halving-doubling all-reduce    2 log2(n) alpha + 2 (n-1)/n B / beta          (n a power of two)
    tree all-reduce, broadcast     2 ceil(log2 n) (alpha + B / beta), half of it  (binomial)
    ring all-gather, reduce-scatter, pairwise all-to-all    (n-1) (alpha + B/n / beta)

B is the buffer of one device: the whole vector for all-reduce and broadcast, the gathered result for all-gather, the
input of one device for reduce-scatter and all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import Link, Machine
from bitwright.core.quantity import Evidence

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "point-to-point"]
Bandwidth = Callable[[float], float]  # bytes of a message -> bytes per second

_ALGORITHMS: dict[str, tuple[str, ...]] = {
    "all-reduce": ("ring", "halving-doubling", "tree"),
    "all-gather": ("ring", "halving-doubling"),
    "reduce-scatter": ("ring", "halving-doubling"),
    "all-to-all": ("pairwise",),
    "broadcast": ("tree", "scatter-all-gather"),
    "point-to-point": ("direct",),
}
_DIRECT_TOPOLOGIES = ("all-to-all", "switch", "fat-tree")  # every pair reaches the link's bandwidth at once


@dataclass(frozen=True)
class CollectiveCost:
    """Predicted time of a collective; `steps` are messages one after the other, `sent_bytes` those of one device."""

    time_s: float
    algorithm: str
    steps: int
    sent_bytes: float
    evidence: Evidence = Evidence.PREDICTED


def _messages(kind: str, algorithm: str, size: float, n: int) -> list[tuple[float, int]]:
    """The steps of an algorithm as (bytes of a message, number of such steps)."""
    rounds = math.ceil(math.log2(n))
    halving = [(size / 2 ** (i + 1), 1) for i in range(rounds)]
    if algorithm == "direct":
        return [(size, 1)]
    if algorithm in ("ring", "pairwise"):
        return [(size / n, (2 if kind == "all-reduce" else 1) * (n - 1))]
    if algorithm == "halving-doubling":
        return halving + halving[::-1] if kind == "all-reduce" else halving
    if algorithm == "tree":
        return [(size, (2 if kind == "all-reduce" else 1) * rounds)]
    return [*halving, (size / n, n - 1)]  # scatter-all-gather: binomial scatter, ring all-gather


def _possible(algorithm: str, link: Link, n: int) -> str | None:
    """Why an algorithm cannot be used, None when it can."""
    power = n & (n - 1) == 0
    if algorithm in ("halving-doubling", "scatter-all-gather") and not power:
        return f"{algorithm} needs a power of two of devices, given {n}"
    if n > 2 and algorithm not in ("ring", "direct") and link.topology not in _DIRECT_TOPOLOGIES:
        return f"{algorithm} needs a link between every pair of devices; this one is a {link.topology}"
    return None


def collective(
    kind: Collective, size_bytes: float, devices: int, link: Link, *, algorithm: str = "auto",
    bandwidth: Bandwidth | None = None,
) -> CollectiveCost:  # fmt: skip
    """Time of a collective of `size_bytes` (see the module) over `devices` connected by `link`.

    `algorithm` "auto" takes the fastest the topology allows. `bandwidth` gives the bytes per second a message of some
    bytes reaches, in place of the link's peak. Raises InputError or UnknownNameError for what cannot be.
    """
    if kind not in _ALGORITHMS:
        raise UnknownNameError("collective", kind, _ALGORITHMS)
    if devices < 1 or not math.isfinite(size_bytes) or size_bytes < 0:
        raise InputError(f"{kind}: needs at least one device and zero or more bytes, given {devices} and {size_bytes}.")
    if kind == "point-to-point" and devices != 2:
        raise InputError(f"point-to-point is between 2 devices, given {devices}.")
    if algorithm != "auto" and algorithm not in _ALGORITHMS[kind]:
        raise UnknownNameError(f"algorithm for {kind}", algorithm, _ALGORITHMS[kind])
    if devices == 1 or size_bytes == 0:
        return CollectiveCost(0.0, "none", 0, 0.0)
    choices = _ALGORITHMS[kind] if algorithm == "auto" else (algorithm,)
    costs, reasons = [], []
    for choice in choices:
        reason = _possible(choice, link, devices)
        if reason:
            reasons.append(reason)
            continue
        time_s, steps, sent = 0.0, 0, 0.0
        for message, count in _messages(kind, choice, size_bytes, devices):
            rate = bandwidth(message) if bandwidth else link.bandwidth.value
            if rate <= 0:
                raise InputError(f"The bandwidth for a message of {message} B is {rate} B/s; it must be above zero.")
            time_s += count * (link.latency.value + message / rate)
            steps += count
            sent += count * message
        costs.append(CollectiveCost(time_s, choice, steps, sent))
    if not costs:
        raise InputError(f"{kind} over {link.type}: {'; '.join(reasons)}.")
    return min(costs, key=lambda cost: cost.time_s)


def hierarchical(
    kind: Collective, size_bytes: float, per_node: int, nodes: int, inner: Link, outer: Link, *,
    bandwidth: Bandwidth | None = None, outer_bandwidth: Bandwidth | None = None,
) -> CollectiveCost:  # fmt: skip
    """Time of a collective over `nodes` of `per_node` devices: `inner` links in a node, `outer` between nodes.

    All-reduce: reduce-scatter inside, all-reduce of each device's share between nodes, all-gather inside; all-gather
    and reduce-scatter likewise; broadcast and all-to-all: between nodes, then inside.
    The devices of a node share the network's bandwidth equally. `outer_bandwidth` is per device of a node.
    """
    if kind == "point-to-point":
        raise InputError("point-to-point has no hierarchical form; cost it over the link it takes.")
    if nodes == 1:
        return collective(kind, size_bytes, per_node, inner, bandwidth=bandwidth)

    def share(message: float) -> float:
        return outer_bandwidth(message) if outer_bandwidth else outer.bandwidth.value / per_node

    def inside(what: Collective, size: float) -> CollectiveCost:
        return collective(what, size, per_node, inner, bandwidth=bandwidth)

    def between(what: Collective, size: float, rate: Bandwidth = share) -> CollectiveCost:
        return collective(what, size, nodes, outer, bandwidth=rate)

    part = size_bytes / per_node
    if kind == "all-reduce":
        parts = [inside("reduce-scatter", size_bytes), between("all-reduce", part), inside("all-gather", size_bytes)]
    elif kind == "all-gather":
        parts = [between("all-gather", part), inside("all-gather", size_bytes)]
    elif kind == "reduce-scatter":
        parts = [inside("reduce-scatter", size_bytes), between("reduce-scatter", part)]
    elif kind == "broadcast":
        whole = outer_bandwidth or (lambda message: outer.bandwidth.value)
        parts = [between("broadcast", size_bytes, whole), inside("broadcast", size_bytes)]
    elif kind == "all-to-all":
        # Each device exchanges with its peer of every other node what is for that whole node, then spreads it inside.
        parts = [between("all-to-all", size_bytes), inside("all-to-all", size_bytes)]
    else:
        raise UnknownNameError("collective", kind, _ALGORITHMS)
    used = [cost for cost in parts if cost.steps]
    return CollectiveCost(
        sum(cost.time_s for cost in used), " + ".join(cost.algorithm for cost in used) or "none",
        sum(cost.steps for cost in used), sum(cost.sent_bytes for cost in used),
    )  # fmt: skip


def collective_on(
    machine: Machine, kind: Collective, size_bytes: float, devices: int | None = None, *, algorithm: str = "auto"
) -> CollectiveCost:
    """Time of a collective over the first `devices` devices of a machine (all of them by default), node by node.

    The first link that is not a host link is used inside a node. Raises InputError when the machine has no such link,
    fewer devices, or when several nodes would be filled unevenly.
    """
    total = machine.device_count
    count = total if devices is None else devices
    if not 1 <= count <= total:
        raise InputError(f"Machine {machine.name!r} has {total} devices, asked for {count}.")
    per_node = int(machine.device().count.value)
    links = [link for link in machine.links.values() if link.topology != "host"] or list(machine.links.values())
    if count > 1 and per_node > 1 and not links:
        raise InputError(f"Machine {machine.name!r} has no link between its devices.")
    if count <= per_node:
        if count == 1:
            return CollectiveCost(0.0, "none", 0, 0.0)
        return collective(kind, size_bytes, count, links[0], algorithm=algorithm)
    if count % per_node:
        raise InputError(f"{count} devices do not fill whole nodes of {per_node}.")
    if machine.network is None:
        raise InputError(f"Machine {machine.name!r} has no network between its nodes.")
    if per_node == 1:
        return collective(kind, size_bytes, count, machine.network, algorithm=algorithm)
    if algorithm != "auto":
        raise InputError("Over several nodes the algorithm is hierarchical; leave it to auto.")
    return hierarchical(kind, size_bytes, per_node, count // per_node, links[0], machine.network)
