"""Counts and times of sparse products against counts by hand, published figures, and what the kernels do."""

import dataclasses

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.kernels import block_sparse_matmul, sparse_matmul
from bitwright.kernels.block_sparse_cost import (
    ICE_LAKE,
    ZEN_5,
    group_cycles,
    group_instructions,
    tile_widths,
    vnni_cost,
)
from bitwright.kernels.sparse_gpu_cost import (
    OPT,
    Decoding,
    gpus_needed,
    intensity,
    layer_overhead,
    lscd_cost,
    step_time,
)
from bitwright.reproduce.flash_llm import DECODING, decoding, mean_speed, pruned
from bitwright.reproduce.sparse_cpu import SPARSITIES, VALIDATED, block_weights


def test_instructions_of_a_group():
    published = group_instructions(64, "published")
    assert published == {"dot": 16, "shuffle": 8, "blend": 8, "load": 20, "bytes": 20 * 10 + 24 * 6}
    loop = group_instructions(64, "loop")
    assert (loop["dot"], loop["shuffle"]) == (16, 8)
    assert group_instructions(80, "loop")["dot"] == 20
    assert group_instructions(1, "loop")["dot"] == 4


def test_cycles_of_a_group():
    busy = group_cycles(64, 1024, 52, ICE_LAKE, "published")
    assert busy["ports"] == 32 / 2
    assert busy["decode"] == 344 / 16
    assert group_cycles(64, 64, 10, ICE_LAKE, "published", repeats=4)["decode"] == 0  # run again from decoded code
    assert group_cycles(64, 512, 10, ZEN_5)["L2"] == 0
    assert group_cycles(64, 1024, 10, ZEN_5)["L2"] == 4 * 64 / ZEN_5.l2_bytes_per_cycle
    assert group_cycles(64, 512, 10, ZEN_5)["ports"] == 8


def test_tiles_are_those_the_kernel_takes():
    assert [tile_widths(n) for n in (1, 64, 80, 96, 97, 384)] == [[1], [64], [80], [96], [64, 33], [64] * 5 + [64]]
    assert tile_widths(80, "published") == [64, 16]
    for n in range(1, 500):
        assert sum(tile_widths(n)) == n


@pytest.mark.parametrize(("sparsity", "figure"), list(zip(SPARSITIES, VALIDATED[1024, 1024, 64], strict=True)))
def test_published_table(sparsity, figure):
    found = vnni_cost(1024, 1024, 64, sparsity, ICE_LAKE, "published")
    assert found.dense_operations_per_s / 1e9 == pytest.approx(figure, rel=0.2)
    assert found.bound == "decode"


def test_more_work_takes_longer():
    base = vnni_cost(1024, 1024, 64, 0.8, ZEN_5)
    assert vnni_cost(1024, 1024, 64, 0.8, ZEN_5, threads=2).time_s == pytest.approx(base.time_s / 2)
    assert vnni_cost(1024, 1024, 128, 0.8, ZEN_5).time_s == pytest.approx(2 * base.time_s)
    assert vnni_cost(1024, 1024, 64, 0.9, ZEN_5).time_s < base.time_s
    assert vnni_cost(1024, 1024, 64, 1.0, ZEN_5).time_s == 0
    fast = dataclasses.replace(ZEN_5, clock_hz=2 * ZEN_5.clock_hz)
    assert vnni_cost(1024, 1024, 64, 0.8, fast).time_s == pytest.approx(base.time_s / 2)
    for wrong in ((0, 4, 4, 0.5), (4, 4, 4, 1.5)):
        with pytest.raises(InputError, match="expected sizes and a share"):
            vnni_cost(*wrong, ZEN_5)


def test_work_of_block_products_counts_groups():
    w = block_sparse_matmul.BlockCSR.from_dense(block_weights(66, 130, 0.5))
    work = block_sparse_matmul.work(w, 70)
    assert work.operations == {"matrix int8": 2 * 16 * len(w.value) // 16 * 80}
    assert work.traffic["memory"] == w.nbytes + (130 + 4 * 66) * 70
    assert work.pieces == 2 * 2
    with pytest.raises(InputError, match="at least one"):
        block_sparse_matmul.work(w, 0)


def test_work_of_sparse_products():
    w = pruned(200, 600, 0.8)
    words = sparse_matmul.TiledCSL.from_dense(w)
    assert sparse_matmul.work(words, 3).operations == {"fp32": 2.0 * 256 * 640 * 3}
    bitmap = sparse_matmul.BitmapTiles.from_dense(w)
    assert sparse_matmul.work(bitmap, 3).operations == {"fp32": 2.0 * 208 * 640 * 3}
    assert sparse_matmul.work(bitmap, 3).traffic["memory"] == bitmap.nbytes + 12 * 800
    rows = sparse_matmul.BlockedCSR.from_dense(w)
    stored = np.count_nonzero(w)
    assert sparse_matmul.work(rows, 17).operations["fp32"] == pytest.approx(2 * stored * 32, rel=0.01)
    with pytest.raises(InputError, match="at least one"):
        sparse_matmul.work(rows, 0)


@pytest.mark.parametrize(
    ("n", "sparsity", "figure"), [(8, 0.7, 20), (8, 0.8, 25), (8, 0.9, 31), (32, 0.8, 89), (32, 0, 53)]
)
def test_published_products(n, sparsity, figure):
    cost = lscd_cost(36864, 9216, n, sparsity, form="tiled words" if sparsity else "dense")
    assert 2e-12 * 36864 * 9216 * n / cost.time_s == pytest.approx(figure, rel=0.06)


def test_bytes_and_bounds_of_gpu_products():
    w = pruned(256, 256, 0.8)
    form = sparse_matmul.TiledCSL.from_dense(w)
    share = 1 - np.count_nonzero(w) / w.size
    assert lscd_cost(256, 256, 8, share).bytes == pytest.approx(form.nbytes, rel=0.005)
    assert lscd_cost(36864, 9216, 8, 0.5).bound == "memory"
    assert lscd_cost(36864, 9216, 8, 0.95).bound == "expansion"
    assert lscd_cost(36864, 9216, 4096, 0.8).bound == "compute"
    assert lscd_cost(36864, 9216, 8, 0.6, form="bitmap").time_s < lscd_cost(36864, 9216, 8, 0.6).time_s
    assert intensity(36864, 8) == pytest.approx(8, rel=1e-3)
    assert [round(intensity(36864, 8, s), 1) for s in (0.7, 0.8, 0.9)] == [13.3, 20.0, 40.0]
    for sparsity, value in ((0.7, 1.4), (0.8, 1.7), (0.9, 2.1)):
        assert mean_speed(sparsity) == pytest.approx(value, rel=0.15)
    with pytest.raises(InputError, match="expected sizes and a share"):
        lscd_cost(0, 4, 4, 0.5)


def test_decoding():
    how = decoding()
    assert 50e-6 < how.layer_overhead_s < 300e-6
    figure = DECODING["66b", 4, None][0]
    assert 8 / step_time(OPT["66b"], 4, 8, None, how) / 4 == pytest.approx(figure)
    # by hand: one layer of 66B, 4 GPUs, dense, batch 1, nothing kept
    bare = Decoding(0, 0)
    products = 12 * 9216**2 / 4 * 2 / 1.69e12
    sums = 2 * 1.5 * 2 * 9216 / 3e11
    head = 50272 // 4 * 9216 * 2 / 1.69e12
    assert step_time(OPT["66b"], 4, 1, None, bare) == pytest.approx(64 * (products + sums) + head, rel=1e-6)
    assert [gpus_needed(OPT[m], 64, s, how) for m in ("66b", "175b") for s in (0.8, None)] == [2, 4, 4, 8]
    with pytest.raises(InputError, match="more than the products"):
        layer_overhead(OPT["66b"], 4, 8, 1000)
