// Activations kept for the backward pass in 8, 4 or 2 bits (arXiv 2111.11124): ranges of groups, codes by stochastic or
// nearest rounding, and values again. A tensor is (outer, groups, inner): its groups are the middle axis.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "clones.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

template <typename T>
using Flat = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kGrain = 1 << 15;  // values that one thread takes at a time

// Random bits of one position: a multiplicative hash of its number and the seed (the finaliser of MurmurHash3).
inline uint32_t random_bits(uint32_t position, uint32_t seed) {
    uint32_t x = position * 0x9E3779B9u ^ seed;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// Rows of `inner` values: row r belongs to group r % groups.
struct Shape {
    size_t rows, groups, inner;
    size_t grain() const { return std::max<size_t>(1, kGrain / std::max<size_t>(inner, 1)); }
};

Shape shape_of(size_t values, size_t groups, size_t inner) {
    if (groups == 0 || inner == 0 || values % (groups * inner)) throw std::invalid_argument("groups do not divide");
    return {values / inner, groups, inner};
}

}  // namespace

// Least and largest value; NaN, if there is one, makes both NaN.
BITWRIGHT_CLONES static void row_range(const float* x, size_t count, float* low, float* high) {
    constexpr size_t kLanes = 16;
    using Floats = float __attribute__((vector_size(4 * kLanes)));
    using Masks = int32_t __attribute__((vector_size(4 * kLanes)));
    const float infinity = std::numeric_limits<float>::infinity();
    Floats least = Floats{} + infinity, most = Floats{} - infinity;
    Masks unordered{};
    for (size_t i = 0; i < count; i += kLanes) {
        Floats value = Floats{} + x[0];
        if (i + kLanes <= count) std::memcpy(&value, x + i, 4 * kLanes);
        else std::memcpy(&value, x + i, 4 * (count - i));
        least = value < least ? value : least;
        most = value > most ? value : most;
        unordered |= value != value;
    }
    bool bad = false;
    *low = infinity, *high = -infinity;
    for (size_t lane = 0; lane < kLanes; ++lane) {
        *low = std::min(*low, least[lane]);
        *high = std::max(*high, most[lane]);
        bad = bad || unordered[lane];
    }
    if (bad) *low = *high = std::numeric_limits<float>::quiet_NaN();
}

// Codes of one row, a byte each; `first` is the number of its first value.
BITWRIGHT_CLONES static void row_codes(const float* x, size_t count, float low, float per_value, float most,
                                       bool stochastic, uint32_t seed, uint32_t first, uint8_t* codes) {
    if (stochastic)
        for (size_t i = 0; i < count; ++i) {
            const uint32_t random = random_bits(first + static_cast<uint32_t>(i), seed) >> 8;
            const float value = (x[i] - low) * per_value + static_cast<float>(static_cast<int32_t>(random)) * 0x1p-24f;
            const float bounded = value > 0 ? (value < most ? value : most) : 0.0f;
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(bounded));
        }
    else
        for (size_t i = 0; i < count; ++i) {
            const float value = (x[i] - low) * per_value + 0.5f;
            const float bounded = value > 0 ? (value < most ? value : most) : 0.0f;
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(bounded));
        }
}

BITWRIGHT_CLONES static void row_values(const uint8_t* codes, size_t count, float low, float step, float* x) {
    for (size_t i = 0; i < count; ++i) x[i] = static_cast<float>(codes[i]) * step + low;
}

// Codes of 4 or 2 bits, the first in the lowest bits of a byte; the last byte is filled up with zeros.
BITWRIGHT_CLONES static void pack_row(const uint8_t* codes, size_t inner, int bits, uint8_t* packed) {
    const size_t each = 8 / static_cast<size_t>(bits), whole = inner / each;
    if (bits == 4)
        for (size_t i = 0; i < whole; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    else
        for (size_t i = 0; i < whole; ++i)
            packed[i] = static_cast<uint8_t>(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 |
                                             codes[4 * i + 3] << 6);
    if (whole * each == inner) return;
    packed[whole] = 0;
    for (size_t i = 0; whole * each + i < inner; ++i)
        packed[whole] = static_cast<uint8_t>(packed[whole] | codes[whole * each + i] << (i * static_cast<size_t>(bits)));
}

BITWRIGHT_CLONES static void unpack_row(const uint8_t* packed, size_t inner, int bits, uint8_t* codes) {
    const size_t each = 8 / static_cast<size_t>(bits), whole = inner / each;
    if (bits == 4)
        for (size_t i = 0; i < whole; ++i) codes[2 * i] = packed[i] & 15, codes[2 * i + 1] = packed[i] >> 4;
    else
        for (size_t i = 0; i < whole; ++i)
            for (size_t j = 0; j < 4; ++j) codes[4 * i + j] = (packed[i] >> (2 * j)) & 3;
    for (size_t i = whole * each; i < inner; ++i)
        codes[i] = (packed[whole] >> (i % each * static_cast<size_t>(bits))) & ((1 << bits) - 1);
}

static void group_ranges(Flat<const float> x, size_t groups, size_t inner, int threads, Flat<float> low,
                         Flat<float> high) {
    const Shape shape = shape_of(x.size(), groups, inner);
    if (low.size() != groups || high.size() != groups) throw std::invalid_argument("ranges of another size");
    nb::gil_scoped_release release;
    const size_t workers = static_cast<size_t>(std::max(threads, 1));
    std::vector<float> least(workers * groups, std::numeric_limits<float>::infinity());
    std::vector<float> most(workers * groups, -std::numeric_limits<float>::infinity());
    std::vector<uint8_t> invalid(workers * groups, 0);
    parallel_for(shape.rows, shape.grain(), threads, [&](size_t begin, size_t end, int thread) {
        for (size_t row = begin; row < end; ++row) {
            const size_t at = static_cast<size_t>(thread) * groups + row % groups;
            float row_low, row_high;
            row_range(x.data() + row * inner, inner, &row_low, &row_high);
            invalid[at] |= row_low != row_low;
            least[at] = std::min(least[at], row_low);
            most[at] = std::max(most[at], row_high);
        }
    });
    for (size_t group = 0; group < groups; ++group) {
        float l = least[group], h = most[group];
        bool bad = invalid[group];
        for (size_t worker = 1; worker < workers; ++worker) {
            l = std::min(l, least[worker * groups + group]);
            h = std::max(h, most[worker * groups + group]);
            bad = bad || invalid[worker * groups + group];
        }
        low.data()[group] = bad ? std::numeric_limits<float>::quiet_NaN() : l;
        high.data()[group] = bad ? std::numeric_limits<float>::quiet_NaN() : h;
    }
}

static size_t packed_row(size_t inner, int bits) { return (inner * static_cast<size_t>(bits) + 7) / 8; }

static void quantise_groups(Flat<const float> x, size_t groups, size_t inner, int bits, Flat<const float> low,
                            Flat<const float> range, bool stochastic, uint32_t seed, int threads, Flat<uint8_t> codes) {
    const Shape shape = shape_of(x.size(), groups, inner);
    if (bits != 8 && bits != 4 && bits != 2) throw std::invalid_argument("8, 4 or 2 bits");
    if (low.size() != groups || range.size() != groups || codes.size() != shape.rows * packed_row(inner, bits))
        throw std::invalid_argument("ranges or codes of another size");
    nb::gil_scoped_release release;
    const float most = static_cast<float>((1 << bits) - 1);
    parallel_for(shape.rows, shape.grain(), threads, [&](size_t begin, size_t end, int) {
        std::vector<uint8_t> bytes(bits == 8 ? 0 : inner);
        for (size_t row = begin; row < end; ++row) {
            const size_t group = row % groups;
            const float wide = range.data()[group], per_value = wide > 0 ? most / wide : 0.0f;
            uint8_t* out = codes.data() + row * packed_row(inner, bits);
            row_codes(x.data() + row * inner, inner, low.data()[group], per_value, most, stochastic && wide > 0, seed,
                      static_cast<uint32_t>(row * inner), bits == 8 ? out : bytes.data());
            if (bits == 8) continue;
            pack_row(bytes.data(), inner, bits, out);
        }
    });
}

static void dequantise_groups(Flat<const uint8_t> codes, size_t groups, size_t inner, int bits, Flat<const float> low,
                              Flat<const float> range, int threads, Flat<float> x) {
    const Shape shape = shape_of(x.size(), groups, inner);
    if (bits != 8 && bits != 4 && bits != 2) throw std::invalid_argument("8, 4 or 2 bits");
    if (low.size() != groups || range.size() != groups || codes.size() != shape.rows * packed_row(inner, bits))
        throw std::invalid_argument("ranges or codes of another size");
    nb::gil_scoped_release release;
    const unsigned most = (1u << bits) - 1;
    parallel_for(shape.rows, shape.grain(), threads, [&](size_t begin, size_t end, int) {
        std::vector<uint8_t> bytes(bits == 8 ? 0 : inner);
        for (size_t row = begin; row < end; ++row) {
            const size_t group = row % groups;
            const uint8_t* from = codes.data() + row * packed_row(inner, bits);
            if (bits != 8) {
                unpack_row(from, inner, bits, bytes.data());
                from = bytes.data();
            }
            const float step = range.data()[group] / static_cast<float>(most);
            row_values(from, inner, low.data()[group], step, x.data() + row * inner);
        }
    });
}

void bind_activation_quantisation(nb::module_& m) {
    m.def("group_ranges", &group_ranges, nb::arg("x"), nb::arg("groups"), nb::arg("inner"), nb::arg("threads"),
          nb::arg("low"), nb::arg("high"));
    m.def("quantise_groups", &quantise_groups, nb::arg("x"), nb::arg("groups"), nb::arg("inner"), nb::arg("bits"),
          nb::arg("low"), nb::arg("range"), nb::arg("stochastic"), nb::arg("seed"), nb::arg("threads"),
          nb::arg("codes"));
    m.def("dequantise_groups", &dequantise_groups, nb::arg("codes"), nb::arg("groups"), nb::arg("inner"),
          nb::arg("bits"), nb::arg("low"), nb::arg("range"), nb::arg("threads"), nb::arg("x"));
}

}  // namespace bitwright
