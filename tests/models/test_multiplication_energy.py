"""Energy of primitives on a row-stationary array, against the closed formula of the released model."""

from dataclasses import replace
from itertools import product

import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models import multiplication_energy
from bitwright.models.multiplication_energy import (
    CHARGED,
    RELEASED,
    Energy,
    network_energy,
    operation_j,
    operator_energy,
    total,
    value_bits,
)
from bitwright.models.multiplication_networks import network_layers, product_layer


def splits(number, parts):
    if parts == 1:
        return [(number,)]
    return [(first, *rest) for first in range(1, number + 1) if number % first == 0
            for rest in splits(number // first, parts - 1)]  # fmt: skip


def closed_formula_j(rows, inputs, outputs, operation, scale):
    """The least energy over all splits of the loops; `scale`: moved bits of a value over 16."""
    unit, best = 3.7e-12 * scale, float("inf")
    dram = 200e-12 * scale
    ifmap, weight, ofmap = rows * inputs, inputs * outputs, rows * outputs
    for (m0, m1, m2, m3), (c0, c1, c2), (n0, n3) in product(splits(outputs, 4), splits(inputs, 3), splits(rows, 2)):
        if m0 > 16 or c0 >= 12 or m0 * c0 >= 960 or m1 * c1 >= 192 or n0 * (c1 * c0 + m2 * m1 * m0) >= 65536:
            continue
        energy = rows * inputs * outputs * operation
        energy += dram * (m3 * ifmap + n3 * weight + ofmap)
        energy += 6 * unit * (m3 * m2 * ifmap + max(2 * (c2 - 1), 1) * ofmap)
        energy += 2 * unit * (m3 * m2 * m1 * ifmap + n3 * weight) + unit * max(c2 * (c1 - 1), 1) * ofmap
        energy += unit * (m3 * m2 * m1 * m0 * ifmap + 2 * c2 * c1 * (c0 - 1) * ofmap) + 2 * unit * rows * weight
        best = min(best, energy)
    return best


@pytest.mark.parametrize("shape", [(196, 64, 96), (49, 128, 32)])
def test_layers_cost_what_the_closed_formula_says(shape):
    rows, inputs, outputs = shape
    ours = {}
    for primitive, operation, bits in (("multiply", 3.7e-12, 32), ("shift", 0.13e-12, 10)):
        layer = product_layer("layer", "mlp", primitive, 1, rows, outputs, inputs, 1)
        ours[primitive] = operator_energy(layer.operator, primitive).total_j
        assert ours[primitive] == pytest.approx(closed_formula_j(*shape, operation, bits / 16), rel=0.15)
    saved = 1 - ours["shift"] / ours["multiply"]
    formula = 1 - closed_formula_j(*shape, 0.13e-12, 10 / 16) / closed_formula_j(*shape, 3.7e-12, 2)
    assert saved == pytest.approx(formula, rel=0.02)


def test_additions_on_chip_pay_for_themselves_and_registers_only():
    layer = product_layer("layer", "attention", "add", 2, 32, 16, 196, 3, False)
    energy = operator_energy(layer.operator, "add")
    assert energy.total_j == pytest.approx(2 * 32 * 16 * 196 * (0.9e-12 + 2 * (1 + 2) * 3.7e-12))
    charged = operator_energy(layer.operator, "add", assumptions=CHARGED)
    assert min(charged.dram_j, charged.buffer_j, charged.network_j) > 0
    assert charged.registers_j < charged.total_j
    # one read of every operand and one write of the sums from DRAM at least: masks of one bit, values of 32
    bits = 2 * (196 * 16 * 1 + 32 * 196 * 32 + 32 * 16 * 32)
    assert charged.dram_j >= bits * 200e-12 / 16 * 0.999


def test_switches():
    assert operation_j("multiply") == 3.7e-12
    assert operation_j("shift", "eyeriss8") == 0.024e-12
    both = replace(RELEASED, accumulations=True)
    assert operation_j("shift", assumptions=both) == pytest.approx(1.03e-12)
    assert operation_j("add", assumptions=both) == 0.9e-12
    assert value_bits("shift") == {"W": 10, "I": 10, "O": 10}
    assert value_bits("shift", assumptions=CHARGED) == {"W": 5, "I": 32, "O": 32}
    assert value_bits("add", assumptions=CHARGED) == {"W": 1, "I": 32, "O": 32}
    layer = product_layer("layer", "mlp", "shift", 1, 49, 64, 96, 1)
    small, large = (operator_energy(layer.operator, "shift", assumptions=each).total_j for each in (RELEASED, CHARGED))
    assert small < large < operator_energy(layer.operator, "multiply").total_j
    held = operator_energy(layer.operator, "shift", assumptions=replace(RELEASED, registers_per_term=False))
    assert held.compute_j == pytest.approx(49 * 64 * 96 * 0.13e-12)
    assert operator_energy(layer.operator, "multiply", "eyeriss8").total_j < small


@pytest.mark.parametrize(("column", "passes"), [(1, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize("per_term", [True, False])
def test_sums_passed_on_to_neighbours(monkeypatch, column, passes, per_term):
    """Of `column` elements that share an output all but the last pass their sum on: a price per bit of each pass."""
    layer = product_layer("layer", "mlp", "multiply", 1, 1, 1, column, 1)
    found = []
    for price in (0.0, 1e-12):
        monkeypatch.setattr(multiplication_energy, "_SEARCHED", {})
        monkeypatch.setattr(multiplication_energy, "RECTANGLES", ((1, column),))
        monkeypatch.setattr(multiplication_energy, "NEIGHBOUR_J_PER_BIT", price)
        how = replace(RELEASED, registers_per_term=per_term)
        found.append(operator_energy(layer.operator, "multiply", assumptions=how))
    bits = value_bits("multiply")["O"]
    passed = passes if per_term else max(passes, 1)  # the released formula: at least one per write of the buffer
    assert found[1].network_j - found[0].network_j == pytest.approx(passed * bits * 1e-12)
    assert replace(found[1], network_j=0.0) == replace(found[0], network_j=0.0)


def test_networks_add_up():
    layers = network_layers("DeiT-T", "additive", "shift", "mixture")
    energies = network_energy(layers)
    assert len(energies) == len(layers)
    whole = total(energies)
    assert whole.total_j == pytest.approx(sum(each.total_j for each in energies.values()))
    assert whole.compute_j == pytest.approx(sum(layer.terms * operation_j(layer.primitive) for layer in layers))
    assert Energy(1.0, 2.0).times(3) + Energy(dram_j=1.0) == Energy(3.0, 6.0, 0.0, 0.0, 1.0)


def test_bad_input():
    layer = product_layer("layer", "mlp", "shift", 1, 4, 4, 4, 1)
    with pytest.raises(UnknownNameError, match="table"):
        operator_energy(layer.operator, "shift", "eyeriss64")
    with pytest.raises(UnknownNameError, match="primitive"):
        operator_energy(layer.operator, "xor")
    with pytest.raises(InputError, match="without layers"):
        network_energy([])
