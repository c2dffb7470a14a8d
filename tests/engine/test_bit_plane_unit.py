"""The bit-plane unit as gates against integer products of bipolar numbers."""

import numpy as np
import pytest

from bitwright.arithmetic.formats.bipolar import decode
from bitwright.core.errors import InputError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl.bit_plane_unit import BitPlaneUnit
from bitwright.engine.standalone_units import unit_gates

LIBRARY = find_library("predictive-28nm")


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 3), (8, 8)])
def test_mapped_unit_multiplies_bipolar_integers(p, q):
    rng, positions, blocks, lanes = np.random.default_rng(p), 8, 3, 64
    w, a = (rng.integers(0, 1 << bits, (blocks, positions, lanes)).astype(np.uint8) for bits in (p, q))
    w[:, :, 0], a[:, :, 0] = 0, (1 << q) - 1  # the largest magnitude
    place = 1 << np.arange(positions)[:, None]
    drive = {name: [] for name in ("a", "b", "shift", "first")}
    for block in range(blocks):
        for i in range(p):
            for j in range(q):
                drive["a"].append(((w[block] >> i & 1) * place).sum(0))
                drive["b"].append(((a[block] >> j & 1) * place).sum(0))
                drive["shift"].append(np.full(lanes, i + j))
                drive["first"].append(np.full(lanes, int(not (block or i or j))))
    unit = BitPlaneUnit(positions)
    for words in drive.values():
        words.extend([words[-1]] * unit.latency)
    waves = {name: np.array(words, np.int64) for name, words in drive.items()}
    words = simulate(unit_gates(unit, LIBRARY).netlist(LIBRARY), waves).outputs["sum"]
    sums = words.astype(np.uint32).view(np.int32)
    expected = (decode(w, p) * decode(a, q)).sum((0, 1))
    assert np.array_equal(sums[blocks * p * q - 1 + unit.latency], expected)


def test_impossible_sizes():
    with pytest.raises(InputError, match="8 to 1024"):
        BitPlaneUnit(4)
