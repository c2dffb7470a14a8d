"""Roofline: against hand arithmetic, against published A100 measurements, and for what it must refuse."""

import math

import pytest

from bitwright.core.cost import compute_format, evaluate, roofline
from bitwright.core.errors import InputError
from bitwright.core.machine import load_machine, machine_from_data
from bitwright.core.workload import Kind, Operator, Role, Tensor, Workload


def matmul(m, n, k, fmt="fp16", weight=None, name="mm", batch=1):
    axes = [({"b": 1}, {"m": 1}, {"k": 1}), ({"b": 1}, {"k": 1}, {"n": 1}), ({"b": 1}, {"m": 1}, {"n": 1})]
    return Operator(
        name, Kind.MATMUL, {"b": batch, "m": m, "n": n, "k": k},
        (Tensor("a", axes[0], fmt), Tensor("w", axes[1], weight or fmt, Role.WEIGHT)), (Tensor("o", axes[2], fmt),),
    )  # fmt: skip


def device(extra=None, **changes):
    data = {
        "name": "toy",
        "devices": {"gpu": {
            "cores": 4, "tile": {"m": 32, "n": 32, "k": 16}, "power": "10 W", "launch_overhead": "1 us",
            "compute": {"matrix": {"fp16": "4 TFLOP/s", "int8": "8 TOP/s"}, "vector": {"fp32": "1 TFLOP/s"}},
            "memories": {"dram": {"capacity": "1 GB", "bandwidth": "100 GB/s", "read_energy": "10 pJ/B",
                                  "write_energy": "20 pJ/B"}},
            **changes,
        }},
        "sources": {"devices": "made up for this test"},
    }  # fmt: skip
    return machine_from_data(data, "toy").device()


def test_compute_bound_product_by_hand():
    cost = roofline(matmul(128, 128, 1024), device())
    # 4 x 4 tiles on 4 cores: 4 full waves, no waste
    assert cost.compute_s == pytest.approx(2 * 128 * 128 * 1024 / 4e12, rel=1e-6, abs=0)
    assert cost.memory_s == pytest.approx(2 * (2 * 128 * 1024 + 128 * 128) / 100e9, rel=1e-6, abs=0)
    assert cost.time_s == pytest.approx(1e-6 + max(cost.compute_s, cost.memory_s), rel=1e-6, abs=0)
    assert cost.bound == "compute"
    assert cost.memory_energy_j == pytest.approx(2 * 2 * 128 * 1024 * 10e-12 + 2 * 128 * 128 * 20e-12, rel=1e-6, abs=0)
    assert cost.energy_limit_j == pytest.approx(10 * cost.time_s, rel=1e-6, abs=0)


def test_tile_and_wave_quantisation():
    full = roofline(matmul(128, 128, 1024), device()).compute_s
    one_row_more = roofline(matmul(129, 128, 1024), device()).compute_s  # 5 x 4 tiles: a fifth wave
    assert one_row_more == pytest.approx(full * 5 / 4)
    one_tile = roofline(matmul(32, 32, 1024), device()).compute_s  # one tile on one of four cores
    assert one_tile == pytest.approx(full / 4)
    assert roofline(matmul(128, 128, 1025), device()).compute_s == pytest.approx(full * 1040 / 1024, rel=1e-6, abs=0)


def test_formats():
    assert compute_format(matmul(8, 8, 8, "fp16", "int4")) == "fp16"
    assert compute_format(matmul(8, 8, 8, "int8", "int4")) == "int8"
    assert compute_format(matmul(8, 8, 8, "fp32", "q4_0")) == "fp32"
    toy = device()
    assert roofline(matmul(64, 64, 64, "int8"), toy).format == "int8"
    assert roofline(matmul(64, 64, 64, "int4"), toy).format == "int8"  # widened, and it says so
    assert roofline(matmul(64, 64, 64, "bf16"), toy).format == "fp32"
    with pytest.raises(InputError, match=r"fp64.*It has: fp16, fp32, int8"):
        roofline(matmul(64, 64, 64, "fp64"), toy)


def test_attention_counts_only_the_pairs_that_are_used():
    def attention(density):
        loops = {"b": 1, "h": 8, "q": 512, "k": 512, "d": 64, "e": 64}
        q = Tensor("q", ({"b": 1}, {"h": 1}, {"q": 1}, {"d": 1}), "fp16")
        k = Tensor("k", ({"b": 1}, {"h": 1}, {"k": 1}, {"d": 1}), "fp16")
        v = Tensor("v", ({"b": 1}, {"h": 1}, {"k": 1}, {"e": 1}), "fp16")
        out = Tensor("o", ({"b": 1}, {"h": 1}, {"q": 1}, {"e": 1}), "fp16")
        return Operator("att", Kind.ATTENTION, loops, (q, k, v), (out,), density=density)

    full, half = roofline(attention(1.0), device()), roofline(attention(0.5), device())
    assert full.compute_s == pytest.approx(2 * 8 * 512 * 512 * 128 / 4e12, rel=1e-6, abs=0)
    assert half.compute_s == pytest.approx(full.compute_s / 2, rel=1e-6, abs=0)
    assert half.memory_s == full.memory_s


def test_elementwise_is_memory_bound_and_copies_have_no_work():
    axes = ({"n": 1},)
    add = Operator(
        "add", Kind.ELEMENTWISE, {"n": 10**6}, (Tensor("a", axes), Tensor("b", axes)), (Tensor("c", axes),), 1.0
    )
    cost = roofline(add, device())
    assert cost.bound == "memory"
    assert cost.memory_s == pytest.approx(12e6 / 100e9, rel=1e-6, abs=0)
    copy = Operator("copy", Kind.COPY, {"n": 10}, (Tensor("a", axes),), (Tensor("c", axes),))
    assert roofline(copy, device()).bound == "overhead"
    assert roofline(copy, device()).compute_s == 0


# Measured PyTorch fp16 products on one A100, published with LLMCompass (Zhang et al., ISCA 2024; artifact figure 5):
# (m, k, n, milliseconds). They were not used to choose any figure of the machine file.
A100_MEASURED = [
    (128, 12288, 12288, 0.2003), (1024, 12288, 12288, 1.1990), (8192, 12288, 12288, 8.6216), (8192, 2048, 2048, 0.2818),
    (8192, 8192, 8192, 3.9614), (8192, 16384, 16384, 15.0087),
]  # fmt: skip


@pytest.mark.parametrize(("m", "k", "n", "measured_ms"), A100_MEASURED)
def test_a100_products_against_published_measurements(m, k, n, measured_ms):
    """A roofline is a lower bound; for products of 0.1 ms and more it is within 30 % of these measurements."""
    predicted = roofline(matmul(m, n, k), load_machine("a100-80g").device()).time_s * 1e3
    assert 0.70 <= predicted / measured_ms <= 1.0


def test_a_small_product_is_all_call_overhead_in_those_measurements():
    """8192 x 64 x 64 took 29.6 us in a synchronous PyTorch call: the overhead, given as such, explains it."""
    gpu = load_machine("a100-80g").device()
    assert roofline(matmul(8192, 64, 64), gpu).time_s < 0.1 * 29.6e-6
    cost = roofline(matmul(8192, 64, 64), gpu, launch_overhead_s=28e-6)
    assert cost.bound == "overhead"
    assert cost.time_s == pytest.approx(29.6e-6, rel=0.1)


def test_workload_costs_add_up_and_equal_single_costs():
    gpu = load_machine("a100-40g").device()
    operators = tuple(matmul(2**i, 4096, 4096, name=f"mm{i}") for i in range(12))
    total = evaluate(Workload("w", operators), gpu)
    singles = [roofline(operator, gpu) for operator in operators]
    assert list(total.operators) == singles
    assert total.time_s == pytest.approx(sum(cost.time_s for cost in singles), rel=1e-6, abs=0)
    assert math.isclose(sum(total.time_by_bound().values()), total.time_s)
    assert math.isclose(total.time_by_kind()[Kind.MATMUL], total.time_s)
    assert total.operators[0].bound == "memory"
    assert total.operators[-1].bound == "compute"
    times = [cost.time_s for cost in total.operators]
    assert times == sorted(times)


def test_what_cannot_be_costed_is_refused():
    axes = ({"n": 1},)
    reduce = Operator("ar", Kind.COLLECTIVE, {"n": 8}, (Tensor("a", axes),), (Tensor("b", axes),))
    with pytest.raises(InputError, match="collective"):
        roofline(reduce, device())
    with pytest.raises(InputError, match="no bandwidth"):
        roofline(matmul(8, 8, 8), device(memories={"dram": {"capacity": "1 GB"}}))
