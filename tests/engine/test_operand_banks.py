"""The banked operand layout of the serial engines."""

import numpy as np
import pytest

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.operand_banks import bank_address, bank_conflicts


def test_every_element_has_its_own_place():
    m, k = np.meshgrid(np.arange(24), np.arange(48), indexing="ij")
    bank, address = bank_address(m, k, depth=48, columns=8)
    places = set(zip(bank.ravel().tolist(), address.ravel().tolist(), strict=True))
    assert len(places) == 24 * 48
    assert set(bank.ravel().tolist()) == set(range(8))
    assert address.max() + 1 == 24 * 48 // 8


def test_columns_in_step_never_meet():
    same = np.full((8, 256), 91)
    assert bank_conflicts(same, encodings.get("ent")).conflicts == 0
    together = bank_conflicts(same, encodings.get("ent"), staggered=False)
    assert together.conflicts == together.fetches * 7 // 8


def test_staggering_helps_columns_that_drift():
    a = np.clip(np.rint(np.random.default_rng(0).normal(0, 25, (16, 3072))), -128, 127).astype(int)
    apart = bank_conflicts(a, encodings.get("ent"))
    together = bank_conflicts(a, encodings.get("ent"), staggered=False)
    assert apart.share < 0.2 * together.share


def test_fetch_times_against_a_walk():
    rng = np.random.default_rng(1)
    a = rng.integers(-128, 128, (3, 36))
    digits = encodings.get("mbe").digits(a, 8) != 0
    seen: dict[tuple[int, int], int] = {}
    for column in range(3):
        cycle = 0
        for weight in range(4):
            for at in range(9):
                place = (at + column * 3) % 9
                seen[cycle, place // 3] = seen.get((cycle, place // 3), 0) + 1
                cycle += max(1, int(digits[column, 4 * place : 4 * place + 4, weight].sum()))
    found = bank_conflicts(a, encodings.get("mbe"))
    assert found.fetches == 3 * 4 * 9
    assert found.conflicts == sum(count - 1 for count in seen.values())


def test_bad_input():
    with pytest.raises(InputError, match="multiple of 7 banks"):
        bank_address(0, 0, 48, 7)
    with pytest.raises(InputError, match="multiple of columns"):
        bank_conflicts(np.ones((3, 10), int), encodings.get("mbe"))
