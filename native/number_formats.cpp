// Rounding of float32 tensors to codes of at most 8 bits in groups that share a scale, and back through a table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "clones.hpp"

namespace nb = nanobind;

namespace bitwright {

using Reals = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RealsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::shape<256>, nb::c_contig, nb::device::cpu>;

// Largest magnitude of every group of `size` consecutive values; NaN and infinity give a NaN or an infinity.
BITWRIGHT_CLONES
static void group_maxima(const float* x, size_t groups, size_t size, float* maxima) {
    for (size_t g = 0; g < groups; ++g, x += size) {
        uint32_t most = 0;
        for (size_t i = 0; i < size; ++i) most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffffu);
        maxima[g] = std::bit_cast<float>(most);
    }
}

// code = clamp(round_half_even(x / scale), -top, top), two's complement in a byte.
BITWRIGHT_CLONES
static void round_integers(const float* x, const float* scale, size_t groups, size_t size, float top, uint8_t* codes) {
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g];
        for (size_t i = 0; i < size; ++i) {
            const float q = std::min(std::max(__builtin_rintf(x[i] / s), -top), top);
            codes[i] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(q)));
        }
    }
}

// The nearest floating-point number of `mantissa` fraction bits, ties to even, saturating: sign and magnitude code.
BITWRIGHT_CLONES
static void round_floats(const float* x, const float* scale, size_t groups, size_t size, int mantissa, int bias,
                         float largest, int sign_bit, uint8_t* codes) {
    const uint32_t lowest = static_cast<uint32_t>(128 - bias) << 23;  // exponent field of the smallest normal number
    const uint32_t shift = static_cast<uint32_t>(23 - mantissa);
    const float smallest_normal = std::bit_cast<float>(lowest);
    const float per_step = std::ldexp(1.0f, bias - 1 + mantissa);
    const int32_t rebias = (127 - bias) << mantissa;
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g];
        for (size_t i = 0; i < size; ++i) {
            const float scaled = x[i] / s;
            const uint32_t bits = std::bit_cast<uint32_t>(scaled);
            const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
            // Adding 2^(exponent - mantissa + 23) rounds to steps of 2^(exponent - mantissa).
            const uint32_t exponent = std::max(bits & 0x7f800000u, lowest);
            const float around = std::bit_cast<float>(std::min(exponent + (shift << 23), 0x7f000000u));
            const float rounded = std::min((magnitude + around) - around, largest);
            const auto normal = static_cast<int32_t>(std::bit_cast<uint32_t>(rounded) >> shift) - rebias;
            const auto subnormal = static_cast<int32_t>(rounded * per_step);
            const int32_t code = rounded < smallest_normal ? subnormal : normal;
            codes[i] = static_cast<uint8_t>(code | (static_cast<int32_t>(bits >> 31) << sign_bit));
        }
    }
}

// Smallest and largest value of every group; NaN is not there.
BITWRIGHT_CLONES
static void group_extremes(const float* x, size_t groups, size_t size, float* low, float* high) {
    constexpr size_t kLanes = 16;
    for (size_t g = 0; g < groups; ++g, x += size) {
        float least[kLanes], most[kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane) least[lane] = most[lane] = x[0];
        size_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            for (size_t lane = 0; lane < kLanes; ++lane) {
                least[lane] = x[i + lane] < least[lane] ? x[i + lane] : least[lane];
                most[lane] = x[i + lane] > most[lane] ? x[i + lane] : most[lane];
            }
        for (; i < size; ++i) {
            least[0] = std::min(x[i], least[0]);
            most[0] = std::max(x[i], most[0]);
        }
        low[g] = *std::min_element(least, least + kLanes);
        high[g] = *std::max_element(most, most + kLanes);
    }
}

// code = clamp(round_half_even(x / scale) + zero, 0, top).
BITWRIGHT_CLONES
static void round_unsigned(const float* x, const float* scale, const float* zero, size_t groups, size_t size, float top,
                           uint8_t* codes) {
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g], z = zero[g];
        for (size_t i = 0; i < size; ++i) {
            const float q = std::min(std::max(__builtin_rintf(x[i] / s) + z, 0.0f), top);
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(q));
        }
    }
}

// code = clamp(round_half_even((x / scale + top) / 2), 0, top): the odd integer 2 code - top.
BITWRIGHT_CLONES
static void round_bipolar(const float* x, const float* scale, size_t groups, size_t size, float top, uint8_t* codes) {
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g];
        for (size_t i = 0; i < size; ++i) {
            const float q = std::min(std::max(__builtin_rintf((x[i] / s + top) * 0.5f), 0.0f), top);
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(q));
        }
    }
}

constexpr size_t kShares = 16;      // scales tried together
constexpr size_t kShortGroup = 64;  // values of a group whose scales are tried together

// Squared errors of a short group as bipolar integers under `kShares` scales, summed pairwise.
BITWRIGHT_CLONES
static void bipolar_errors(const float* x, size_t size, const float* scales, float top, float* errors) {
    alignas(64) float off[kShortGroup][kShares];
    alignas(64) float inverse[kShares], limit[kShares];
    for (size_t at = 0; at < kShares; ++at) {
        inverse[at] = 0.5f / scales[at];
        limit[at] = top * scales[at];
    }
    for (size_t i = 0; i < size; ++i) {
        const float magnitude = std::fabs(x[i]);
        for (size_t at = 0; at < kShares; ++at) {
            // the nearest odd integer to v >= 0 is 2 round(v / 2 - 1 / 2) + 1
            const float value = __builtin_rintf(magnitude * inverse[at] - 0.5f) * 2 * scales[at] + scales[at];
            const float apart = magnitude - (value < limit[at] ? value : limit[at]);
            off[i][at] = apart * apart;
        }
    }
    size_t width = std::bit_ceil(size);
    for (size_t i = size; i < width; ++i) std::fill_n(off[i], kShares, 0.0f);
    for (width /= 2; width > 0; width /= 2)
        for (size_t i = 0; i < width; ++i)
            for (size_t at = 0; at < kShares; ++at) off[i][at] += off[i + width][at];
    std::copy_n(off[0], kShares, errors);
}

// The same of a group of any size under one scale, up to `best`: errors of 1,024 values are summed pairwise in float32,
// those sums in double.
BITWRIGHT_CLONES
static double bipolar_error(const float* x, size_t size, float s, float top, double best) {
    constexpr size_t kChunk = 1024;
    alignas(64) float off[kChunk];
    const float inverse = 0.5f / s, limit = top * s;
    double error = 0;
    for (size_t start = 0; start < size && error < best; start += kChunk) {
        const size_t count_here = std::min(size - start, kChunk);
        size_t width = std::bit_ceil(count_here);
        for (size_t i = count_here; i < width; ++i) off[i] = 0;
        const float* from = x + start;
        for (size_t i = 0; i < count_here; ++i) {
            const float magnitude = std::fabs(from[i]);
            const float value = __builtin_rintf(magnitude * inverse - 0.5f) * 2 * s + s;
            const float apart = magnitude - (value < limit ? value : limit);
            off[i] = apart * apart;
        }
        for (width /= 2; width > 0; width /= 2)
            for (size_t i = 0; i < width; ++i) off[i] += off[i + width];
        error += off[0];
    }
    return error;
}

// Of `count` shares of the scale `most` of a group, the one of least squared error as bipolar integers, the first of
// equal ones; 0 where `most` is 0.
static void best_bipolar_scales(const float* x, const float* most, const float* shares, size_t count, size_t groups,
                                size_t size, float top, float* scale) {
    for (size_t g = 0; g < groups; ++g, x += size) {
        double best = HUGE_VAL;
        scale[g] = most[g];
        const auto take = [&](double error, float s) {
            if (error >= best) return;
            best = error;
            scale[g] = s;
        };
        size_t at = 0;
        if (most[g] <= 0) continue;
        for (; size <= kShortGroup && at + kShares <= count; at += kShares) {
            float scales[kShares], errors[kShares];
            for (size_t each = 0; each < kShares; ++each) scales[each] = most[g] * shares[at + each];
            bipolar_errors(x, size, scales, top, errors);
            for (size_t each = 0; each < kShares; ++each) take(errors[each], scales[each]);
        }
        for (; at < count; ++at) take(bipolar_error(x, size, most[g] * shares[at], top, best), most[g] * shares[at]);
    }
}

// The power of two of the nearest logarithm: a sign bit, and exponent - lowest + 1 between 1 and 1 - lowest; 0 for 0.
BITWRIGHT_CLONES
static void round_powers(const float* x, const float* scale, size_t groups, size_t size, int lowest, int sign_bit,
                         uint8_t* codes) {
    constexpr uint32_t kRoot = 0x3504f4u;  // fraction of the first float above the square root of 2
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g];
        for (size_t i = 0; i < size; ++i) {
            const uint32_t bits = std::bit_cast<uint32_t>(x[i] / s), magnitude = bits & 0x7fffffffu;
            const int32_t up = (magnitude & 0x7fffffu) >= kRoot ? 1 : 0;
            const int32_t exponent = static_cast<int32_t>(magnitude >> 23) - 127 + up;
            const int32_t code = std::min(std::max(exponent, lowest), 0) - lowest + 1;
            const int32_t sign = static_cast<int32_t>(bits >> 31) << sign_bit;
            codes[i] = static_cast<uint8_t>(magnitude == 0 ? 0 : code | sign);
        }
    }
}

BITWRIGHT_CLONES
static void look_up_offset(const uint8_t* codes, const float* zero, const float* scale, size_t groups, size_t size,
                           float* x) {
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g], z = zero[g];
        for (size_t i = 0; i < size; ++i) x[i] = (static_cast<float>(codes[i]) - z) * s;
    }
}

BITWRIGHT_CLONES
static void look_up(const uint8_t* codes, const float* table, const float* scale, size_t groups, size_t size, float* x) {
    for (size_t g = 0; g < groups; ++g, x += size, codes += size) {
        const float s = scale[g];
        for (size_t i = 0; i < size; ++i) x[i] = table[codes[i]] * s;
    }
}

static size_t group_size(size_t values, size_t groups) {
    if (groups == 0 || values % groups != 0) throw std::invalid_argument("groups do not divide the values");
    return values / groups;
}

static void magnitudes(Reals x, RealsOut maxima) {
    const size_t size = group_size(x.shape(0), maxima.shape(0));
    nb::gil_scoped_release release;
    group_maxima(x.data(), maxima.shape(0), size, maxima.data());
}

static void encode_integers(Reals x, Reals scale, int top, CodesOut codes) {
    const size_t size = group_size(x.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    nb::gil_scoped_release release;
    round_integers(x.data(), scale.data(), scale.shape(0), size, static_cast<float>(top), codes.data());
}

static void encode_floats(Reals x, Reals scale, int mantissa, int bias, float largest, int sign_bit, CodesOut codes) {
    const size_t size = group_size(x.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    nb::gil_scoped_release release;
    round_floats(x.data(), scale.data(), scale.shape(0), size, mantissa, bias, largest, sign_bit, codes.data());
}

static void decode_codes(Codes codes, Table table, Reals scale, RealsOut x) {
    const size_t size = group_size(codes.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many values as codes");
    nb::gil_scoped_release release;
    look_up(codes.data(), table.data(), scale.data(), scale.shape(0), size, x.data());
}

static void extremes(Reals x, RealsOut low, RealsOut high) {
    const size_t size = group_size(x.shape(0), low.shape(0));
    if (high.shape(0) != low.shape(0)) throw std::invalid_argument("as many largest as smallest values");
    nb::gil_scoped_release release;
    group_extremes(x.data(), low.shape(0), size, low.data(), high.data());
}

static void encode_unsigned(Reals x, Reals scale, Reals zero, int top, CodesOut codes) {
    const size_t size = group_size(x.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    if (zero.shape(0) != scale.shape(0)) throw std::invalid_argument("as many zero points as scales");
    nb::gil_scoped_release release;
    round_unsigned(x.data(), scale.data(), zero.data(), scale.shape(0), size, static_cast<float>(top), codes.data());
}

static void encode_bipolar(Reals x, Reals scale, int top, CodesOut codes) {
    const size_t size = group_size(x.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    nb::gil_scoped_release release;
    round_bipolar(x.data(), scale.data(), scale.shape(0), size, static_cast<float>(top), codes.data());
}

static void bipolar_scales(Reals x, Reals most, Reals shares, int top, RealsOut scale) {
    const size_t size = group_size(x.shape(0), most.shape(0));
    if (scale.shape(0) != most.shape(0)) throw std::invalid_argument("as many scales as groups");
    nb::gil_scoped_release release;
    best_bipolar_scales(x.data(), most.data(), shares.data(), shares.shape(0), most.shape(0), size,
                        static_cast<float>(top), scale.data());
}

static void encode_powers(Reals x, Reals scale, int lowest, int sign_bit, CodesOut codes) {
    const size_t size = group_size(x.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    nb::gil_scoped_release release;
    round_powers(x.data(), scale.data(), scale.shape(0), size, lowest, sign_bit, codes.data());
}

static void decode_unsigned(Codes codes, Reals zero, Reals scale, RealsOut x) {
    const size_t size = group_size(codes.shape(0), scale.shape(0));
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many values as codes");
    if (zero.shape(0) != scale.shape(0)) throw std::invalid_argument("as many zero points as scales");
    nb::gil_scoped_release release;
    look_up_offset(codes.data(), zero.data(), scale.data(), scale.shape(0), size, x.data());
}

void bind_number_formats(nb::module_& m) {
    m.def("group_magnitudes", &magnitudes, nb::arg("x"), nb::arg("maxima"));
    m.def("encode_integers", &encode_integers, nb::arg("x"), nb::arg("scale"), nb::arg("top"), nb::arg("codes"));
    m.def("encode_floats", &encode_floats, nb::arg("x"), nb::arg("scale"), nb::arg("mantissa"), nb::arg("bias"),
          nb::arg("largest"), nb::arg("sign_bit"), nb::arg("codes"));
    m.def("group_extremes", &extremes, nb::arg("x"), nb::arg("low"), nb::arg("high"));
    m.def("encode_unsigned", &encode_unsigned, nb::arg("x"), nb::arg("scale"), nb::arg("zero"), nb::arg("top"),
          nb::arg("codes"));
    m.def("encode_bipolar", &encode_bipolar, nb::arg("x"), nb::arg("scale"), nb::arg("top"), nb::arg("codes"));
    m.def("bipolar_scales", &bipolar_scales, nb::arg("x"), nb::arg("most"), nb::arg("shares"), nb::arg("top"),
          nb::arg("scale"));
    m.def("encode_powers", &encode_powers, nb::arg("x"), nb::arg("scale"), nb::arg("lowest"), nb::arg("sign_bit"),
          nb::arg("codes"));
    m.def("decode_unsigned", &decode_unsigned, nb::arg("codes"), nb::arg("zero"), nb::arg("scale"), nb::arg("x"));
    m.def("decode_codes", &decode_codes, nb::arg("codes"), nb::arg("table"), nb::arg("scale"), nb::arg("x"));
}

}  // namespace bitwright
