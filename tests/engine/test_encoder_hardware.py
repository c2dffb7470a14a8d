"""Encoder hardware in Amaranth's simulator against the digits of `arithmetic.encodings` and plain counting."""

import itertools

import numpy as np
import pytest
from amaranth.hdl import Const, Module, Signal, signed
from amaranth.sim import Simulator

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine import encoder_hardware as hardware


def simulate(module, inputs, outputs, vectors):
    """Combinational: values of `outputs` for each tuple of `vectors` put on `inputs`, (vectors, outputs)."""
    seen = []

    async def drive(context):
        for vector in vectors:
            for signal, value in zip(inputs, vector, strict=True):
                context.set(signal, int(value))
            await context.delay(1e-9)
            seen.append([context.get(signal) for signal in outputs])

    simulator = Simulator(module)
    simulator.add_testbench(drive)
    simulator.run()
    return np.array(seen, np.int64).reshape(len(seen), len(outputs))


def read(codes, bits):
    """Digits of codes; `one` and `two` must exclude each other."""
    one, negative = codes & 1, codes >> bits - 1 & 1
    two = codes >> 1 & 1 if bits == 3 else 0 * codes
    assert not np.any(one & two)
    return (one + 2 * two) * (1 - 2 * negative)


def code_of(encoding, digit):
    """The code of a digit, `negative` as its sign."""
    return abs(digit) | (digit < 0) << hardware.code_bits(encoding) - 1


def operands(bits):
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    if bits <= 8:
        return np.arange(low, high + 1)
    return np.r_[low, low + 1, -1, 0, 1, high, np.random.default_rng(bits).integers(low, high + 1, 1000)]


@pytest.mark.parametrize("bits", [2, 4, 6, 8, 12, 16, 3, 5, 13])
def test_digits_are_those_of_the_encoding(bits):
    names = [name for name in encodings.names() if bits % 2 == 0 or not encodings.get(name).even_widths]
    module, word = Module(), Signal(signed(bits), name="a")
    outputs = []
    for name in names:
        codes = hardware.encode_digits(module, name, word, name)
        single = [hardware.encode_digit(module, name, word, weight, f"{name}_{weight}") for weight in range(len(codes))]
        flags = [Signal(name="nonzero") for _ in codes]
        module.d.comb += [flag.eq(hardware.nonzero(code, name)) for flag, code in zip(flags, codes, strict=True)]
        assert [signal.name for signal in codes] == [f"{name}_{weight}" for weight in range(len(codes))]
        outputs.append((name, codes, single, flags))
    values = operands(bits)
    seen = simulate(module, [word], [s for _, *groups in outputs for group in groups for s in group], values[:, None])
    columns = iter(seen.T)
    for name, codes, single, flags in outputs:
        expected = encodings.get(name).digits(values, bits)
        assert len(codes) == expected.shape[1]
        for group in (codes, single):
            found = np.stack([next(columns) for _ in group], axis=1)
            assert np.array_equal(read(found, hardware.code_bits(name)), expected), name
        assert np.array_equal(np.stack([next(columns) for _ in flags], axis=1), expected != 0), name


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_stored_digits_are_those_of_ent(bits):
    module, word = Module(), Signal(signed(bits), name="a")
    stored = hardware.encode_stored(module, word)
    codes = [hardware.stored_digit(module, stored, weight) for weight in range(bits // 2)]
    values = operands(bits)
    seen = simulate(module, [word], [*codes, stored], values[:, None])
    assert np.array_equal(read(seen[:, :-1], 3), encodings.get("ent").digits(values, bits))
    assert len(stored) == encodings.get("ent").code_bits(bits) == bits + 1
    assert len(set(seen[:, -1].tolist())) == len(set(values.tolist()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_multiples_of_every_digit(bits):
    module, b = Module(), Signal(signed(bits), name="b")
    minus_b = hardware.negate(module, b)
    digits = (-2, -1, 0, 1, 2)
    cases = []  # digit, signal

    def total(inverted, name):
        signal = Signal(signed(bits + 8), name=name)
        module.d.comb += signal.eq(inverted.word + inverted.increment)
        return signal

    for encoding, digit in itertools.product(encodings.names(), digits):
        if digit not in encodings.get(encoding).digit_set:
            continue
        code = Const(code_of(encoding, digit), hardware.code_bits(encoding))
        natural = bits + (2 if len(code) == 3 else 1)
        for width in (natural, natural + 3):
            name = f"{encoding}_{digit}_{width}"
            cases.append((digit, hardware.select_multiple(module, encoding, code, b, minus_b, width, name)))
            inverted = hardware.select_inverted(module, encoding, code, b, width, f"inverted_{name}")
            cases.append((digit, total(inverted, name)))
            cases.append((4 * digit, total(inverted.shifted(2), name)))
            if not digit:
                signed_zero = code | 1 << len(code) - 1
                name = f"{name}_negative"
                cases.append((0, hardware.select_multiple(module, encoding, signed_zero, b, minus_b, width, name)))
                inverted = hardware.select_inverted(module, encoding, signed_zero, b, width, f"inverted_{name}")
                cases.append((0, total(inverted.shifted(3), name)))
        if digit:
            select = hardware.select_code(module, encoding, code, f"select_{encoding}_{digit}")
            for width in (bits + 2, bits + 5):
                name = f"issued_{encoding}_{digit}_{width}"
                cases.append((digit, hardware.select_issued_multiple(module, select, b, minus_b, width, name)))
                inverted = hardware.select_issued_inverted(module, select, b, width, f"inverted_{name}")
                cases.append((digit, total(inverted, name)))
    values = operands(bits)
    seen = simulate(module, [b], [minus_b, *(signal for _, signal in cases)], values[:, None])
    assert np.array_equal(seen[:, 0], -values)
    assert minus_b.shape() == signed(bits + 1)
    assert all(signal.shape().signed for _, signal in cases)
    assert np.array_equal(seen[:, 1:], values[:, None] * np.array([digit for digit, _ in cases]))


@pytest.mark.parametrize("bits", [4, 8])
def test_products_through_every_encoding(bits):
    """Encoder, select and multiple together: the digits' partial products add up to a * b."""
    module, a, b = Module(), Signal(signed(bits), name="a"), Signal(signed(bits), name="b")
    minus_b = hardware.negate(module, b)
    rows = {}
    for name in encodings.names():
        codes = hardware.encode_digits(module, name, a, name)
        rows[name] = [
            hardware.select_multiple(module, name, code, b, minus_b, bits + 2, f"{name}_row_{weight}")
            for weight, code in enumerate(codes)
        ]
    rng = np.random.default_rng(7)
    extremes = np.array(list(itertools.product((-(1 << bits - 1), -1, 0, (1 << bits - 1) - 1), repeat=2)))
    pairs = np.r_[extremes, rng.integers(-(1 << bits - 1), 1 << bits - 1, (300, 2))]
    seen = iter(simulate(module, [a, b], [row for some in rows.values() for row in some], pairs).T)
    for name, some in rows.items():
        total = sum(next(seen) * encodings.get(name).radix ** weight for weight in range(len(some)))
        assert np.array_equal(total, pairs[:, 0] * pairs[:, 1]), name


def test_a_select_is_the_one_of_the_paper():
    module, code = Module(), Signal(3)
    select = hardware.select_code(module, "ent", code, "select")
    digits = (-2, 1, 2, -1)
    assert simulate(module, [code], [select], [[code_of("ent", digit)] for digit in digits]).ravel().tolist() == [
        0b00, 0b01, 0b10, 0b11,
    ]  # fmt: skip


@pytest.mark.parametrize("total", range(2, 9))
def test_sparse_encoder(total):
    module, word = Module(), Signal(total)
    flags = [word[index] for index in range(total)]
    encoder = hardware.sparse_encoder(module, flags, "sparse")
    assert len(encoder.position) == total
    assert len(encoder.count) == total.bit_length()
    assert {len(position) for position in encoder.position} == {(total - 1).bit_length()}
    patterns = range(1 << total)
    seen = simulate(module, [word], [encoder.count, *encoder.position], [[pattern] for pattern in patterns])
    for pattern, (count, *positions) in zip(patterns, seen.tolist(), strict=True):
        expected = [index for index in range(total) if pattern >> index & 1]
        assert count == len(expected)
        assert positions[:count] == expected
        assert all(position < total for position in positions)  # what is not issued is still an address


def test_flip_top_bit_adds_a_constant():
    for bits in (1, 2, 8):
        module, word, flipped = Module(), Signal(signed(bits)), Signal(bits)
        module.d.comb += flipped.eq(hardware.flip_top_bit(word))
        values = np.arange(-(1 << bits - 1), 1 << bits - 1)
        assert simulate(module, [word], [flipped], values[:, None]).ravel().tolist() == list(range(1 << bits))


def test_the_chain_of_a_word_is_built_once():
    module, word, other = Module(), Signal(signed(8), name="a"), Signal(signed(8), name="c")
    for weight in range(4):
        hardware.encode_digit(module, "ent", word, weight, f"a_{weight}")
    for weight in (3, 0):
        hardware.encode_digit(module, "ent", other, weight, f"c_{weight}")
    assert len(hardware._shared[module]) == 2
    two = Module()
    hardware.encode_digit(two, "ent", word, 0, "a_0")
    assert len(hardware._shared[two]) == 1
    simulate(module, [], [], []), simulate(two, [], [], [])  # both elaborate


def test_bad_input():
    module = Module()
    word, odd, wide, code = Signal(signed(8)), Signal(signed(7)), Signal(signed(18)), Signal(3)
    minus_b = hardware.negate(module, word)
    for call, message in [
        (lambda: hardware.encode_digits(module, "ent", odd), "'ent'.*even width, not 7"),
        (lambda: hardware.encode_digit(module, "mbe", odd, 0, "d"), "'mbe'.*even width, not 7"),
        (lambda: hardware.encode_stored(module, odd), "'ent'.*even width, not 7"),
        (lambda: hardware.encode_digits(module, "csd", wide), "'csd' takes 2 to 16 bits, not 18"),
        (lambda: hardware.encode_digits(module, "csd", Signal(1)), "'csd'.*width 1 is outside"),
        (lambda: hardware.encode_digits(module, "booth", word), "Unknown digit encoding 'booth'"),
        (lambda: hardware.code_bits("naf"), "Unknown digit encoding 'naf'"),
        (lambda: hardware.encode_digit(module, "ent", word, 4, "d"), "digits 0 to 3, not 4"),
        (lambda: hardware.nonzero(code, "csd"), "'csd' has a code of 2 bits, not 3"),
        (lambda: hardware.select_multiple(module, "mbe", code, word, minus_b, 9, "p"), "needs 10 bits; 9"),
        (lambda: hardware.select_multiple(module, "mbe", code, word, word, 10, "p"), "has 9 bits, not 8"),
        (lambda: hardware.select_issued_multiple(module, code, word, minus_b, 10, "p"), "2 bits, not 3"),
        (lambda: hardware.select_issued_multiple(module, code[:2], word, minus_b, 9, "p"), "needs 10 bits; 9"),
        (lambda: hardware.select_inverted(module, "csd", code[:2], word, 8, "p"), "needs 9 bits; 8"),
        (lambda: hardware.select_issued_inverted(module, code[:2], word, 9, "p"), "needs 10 bits; 9"),
        (lambda: hardware.stored_digit(module, Signal(9), 4), "9 bits has no digit 4"),
        (lambda: hardware.stored_digit(module, Signal(8), 0), "8 bits"),
        (lambda: hardware.sparse_encoder(module, [word[0]], "s"), "'s' takes 2 to 8 flags, not 1"),
        (lambda: hardware.sparse_encoder(module, [word[0]] * 9, "s"), "not 9"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    simulate(module, [], [], [])  # what was refused left nothing behind
