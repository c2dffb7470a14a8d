// Rounding of float32 tensors to codes of at most 8 bits in groups that share a scale, and back through a table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BITWRIGHT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BITWRIGHT_CLONES
#endif

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

void bind_number_formats(nb::module_& m) {
    m.def("group_magnitudes", &magnitudes, nb::arg("x"), nb::arg("maxima"));
    m.def("encode_integers", &encode_integers, nb::arg("x"), nb::arg("scale"), nb::arg("top"), nb::arg("codes"));
    m.def("encode_floats", &encode_floats, nb::arg("x"), nb::arg("scale"), nb::arg("mantissa"), nb::arg("bias"),
          nb::arg("largest"), nb::arg("sign_bit"), nb::arg("codes"));
    m.def("decode_codes", &decode_codes, nb::arg("codes"), nb::arg("table"), nb::arg("scale"), nb::arg("x"));
}

}  // namespace bitwright
