// Outlier-victim pairs: rounding to codes of 4 or 8 bits, the search for scales, and back; see
// arithmetic/formats/outlier_victim.py. Rows are deinterleaved into left and right halves of pairs, so that the rounding
// of 16 pairs is a straight vector loop.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "clones.hpp"

namespace nb = nanobind;

namespace bitwright {
namespace {

using Reals = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RealsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DoublesOut = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kLanes = 16;
constexpr size_t kChunk = 2048;  // pairs rounded at a time

// Grids of a format, in units of the integers. `flint`: normal values 0 1 2 3 4 6 8 16 instead of integers.
struct Grid {
    int bits, mantissa, bias;
    float top, first, last, edge;
    bool flint, left;
};

inline float normal_value(float m, float top, bool flint) {
    if (!flint) return std::min(__builtin_rintf(m), top);
    float v = m > 0.5f ? 1.0f : 0.0f;
    v = m > 1.5f ? 2.0f : v;
    v = m > 2.5f ? 3.0f : v;
    v = m > 3.5f ? 4.0f : v;
    v = m > 5.0f ? 6.0f : v;
    v = m > 7.0f ? 8.0f : v;
    return m > 12.0f ? 16.0f : v;
}

// Nearest biased float, ties to the smaller one, within first .. last.
inline float outlier_value(float m, float first, float last, int32_t low, int32_t drop) {
    const float bounded = std::min(std::max(m, first), last);
    const int32_t exponent = std::max(std::bit_cast<int32_t>(bounded) & 0x7f800000, low);
    const float step = std::bit_cast<float>(exponent - drop);
    const float inverse = std::bit_cast<float>(0x7f000000 - (exponent - drop));
    return std::max(__builtin_ceilf(bounded * inverse - 0.5f) * step, first);
}

// Magnitudes of the rounded values of `kLanes` pairs whose scaled magnitudes are l and r.
template <bool Flint, bool Left>
inline void round_lanes(const float* l, const float* r, const Grid& g, float* ql, float* qr) {
    const int32_t low = (127 + g.mantissa + g.bias) << 23, drop = g.mantissa << 23;
    const float top = g.top, first = g.first, last = g.last, edge = g.edge;
    for (size_t i = 0; i < kLanes; ++i) {
        const bool lo = l[i] > edge, ro = r[i] > edge;
        const bool right_wins = ro & (!lo | (!Left & (r[i] > l[i])));
        const bool left_wins = lo & !right_wins;
        const float nl = normal_value(l[i], top, Flint), nr = normal_value(r[i], top, Flint);
        const float ol = outlier_value(l[i], first, last, low, drop), orr = outlier_value(r[i], first, last, low, drop);
        ql[i] = right_wins ? 0.0f : left_wins ? ol : nl;
        qr[i] = left_wins ? 0.0f : right_wins ? orr : nr;
    }
}

// Squared error, in units of the scale, of `pairs` (a multiple of kLanes) with magnitudes l, r under `scale`.
template <bool Flint, bool Left>
inline double squared_error(const float* l, const float* r, size_t pairs, float scale, const Grid& g) {
    float sums[kLanes] = {};
    float ml[kLanes], mr[kLanes], ql[kLanes], qr[kLanes];
    for (size_t at = 0; at < pairs; at += kLanes) {
        for (size_t i = 0; i < kLanes; ++i) {
            ml[i] = l[at + i] / scale;
            mr[i] = r[at + i] / scale;
        }
        round_lanes<Flint, Left>(ml, mr, g, ql, qr);
        for (size_t i = 0; i < kLanes; ++i) {
            const float a = ql[i] - ml[i], b = qr[i] - mr[i];
            sums[i] += a * a + b * b;
        }
    }
    double total = 0;
    for (float each : sums) total += each;
    return total;
}

template <bool Flint, bool Left>
BITWRIGHT_CLONES void search_rows(const float* x, size_t rows, size_t size, const double* base, const double* percents,
                                  size_t candidates, const Grid& g, float* found, double* best) {
    std::vector<double> errors(candidates);
    std::vector<float> left(kChunk), right(kChunk), scales(candidates);
    for (size_t row = 0; row < rows; ++row, x += size) {
        for (size_t c = 0; c < candidates; ++c) {
            const double scale = base[row] * percents[c] / 100;
            scales[c] = static_cast<float>(std::max(scale, double{std::numeric_limits<float>::min()}));
        }
        std::fill(errors.begin(), errors.end(), 0.0);
        for (size_t start = 0; start < size / 2; start += kChunk) {
            const size_t pairs = std::min(kChunk, size / 2 - start);
            const size_t filled = (pairs + kLanes - 1) / kLanes * kLanes;  // zeros round to zeros
            std::fill(left.begin(), left.begin() + filled, 0.0f);
            std::fill(right.begin(), right.begin() + filled, 0.0f);
            for (size_t i = 0; i < pairs; ++i) {
                left[i] = std::fabs(x[2 * (start + i)]);
                right[i] = std::fabs(x[2 * (start + i) + 1]);
            }
            for (size_t c = 0; c < candidates; ++c)
                errors[c] += squared_error<Flint, Left>(left.data(), right.data(), filled, scales[c], g);
        }
        best[row] = std::numeric_limits<double>::infinity();
        found[row] = scales[0];
        for (size_t c = 0; c < candidates; ++c) {
            const double error = errors[c] * scales[c] * scales[c];
            if (error < best[row]) {
                best[row] = error;
                found[row] = scales[c];
            }
        }
    }
}

// Codes of a rounded magnitude; `negative` is 0 or -1 (all bits).
template <bool Flint>
inline int32_t normal_code(float magnitude, int32_t negative, int32_t mask) {
    const int32_t value = static_cast<int32_t>(magnitude);
    if constexpr (!Flint) return ((value ^ negative) - negative) & mask;
    // flint3: 0xx is 0 to 3; of 1xx the position of the next one is the exponent: 110 111 101 100 are 4 6 8 16
    int32_t code = value > 3 ? 6 : value;
    code = value > 4 ? 7 : code;
    code = value > 6 ? 5 : code;
    code = value > 8 ? 4 : code;
    return code | (value > 0 ? negative & 8 : 0);
}

inline int32_t outlier_code(float magnitude, int32_t negative, const Grid& g) {
    const int32_t code = std::bit_cast<int32_t>(magnitude) >> (23 - g.mantissa);
    return (code - ((127 + g.mantissa + g.bias) << g.mantissa)) | (negative & (1 << (g.bits - 1)));
}

template <bool Flint, bool Left>
BITWRIGHT_CLONES void encode_rows(const float* x, const float* scale, size_t rows, size_t size, const Grid& g,
                                  uint8_t* codes) {
    const int32_t identifier = 1 << (g.bits - 1), mask = 2 * identifier - 1;
    const float top = g.top;
    float xl[kLanes], xr[kLanes], l[kLanes], r[kLanes], ql[kLanes], qr[kLanes];
    uint8_t made[2 * kLanes];
    for (size_t row = 0; row < rows; ++row, x += size, codes += size) {
        const float s = scale[row];
        for (size_t start = 0; start < size; start += 2 * kLanes) {
            const size_t pairs = std::min(kLanes, (size - start) / 2);
            const float* from = x + start;
            float tail[2 * kLanes] = {};
            if (pairs < kLanes) {
                std::copy(from, from + 2 * pairs, tail);
                from = tail;
            }
            for (size_t i = 0; i < kLanes; ++i) {
                xl[i] = from[2 * i];
                xr[i] = from[2 * i + 1];
            }
            for (size_t i = 0; i < kLanes; ++i) {
                l[i] = std::fabs(xl[i]) / s;
                r[i] = std::fabs(xr[i]) / s;
            }
            round_lanes<Flint, Left>(l, r, g, ql, qr);
            for (size_t i = 0; i < kLanes; ++i) {
                const int32_t nl = std::bit_cast<int32_t>(xl[i]) >> 31, nr = std::bit_cast<int32_t>(xr[i]) >> 31;
                const bool left = ql[i] > top, right = qr[i] > top;
                const int32_t cl = normal_code<Flint>(ql[i], nl, mask), cr = normal_code<Flint>(qr[i], nr, mask);
                const int32_t bl = outlier_code(ql[i], nl, g), br = outlier_code(qr[i], nr, g);
                made[2 * i] = static_cast<uint8_t>(right ? identifier : left ? bl : cl);
                made[2 * i + 1] = static_cast<uint8_t>(left ? identifier : right ? br : cr);
            }
            std::copy(made, made + 2 * pairs, codes + start);
        }
    }
}

Grid grid(int bits, int mantissa, int bias, float top, float last, bool flint, bool left) {
    const float first = std::ldexp(static_cast<float>((1 << mantissa) + 1), bias);
    return Grid{bits, mantissa, bias, top, first, last, (top + first) / 2, flint, left};
}

size_t row_size(size_t values, size_t rows) {
    if (rows == 0 || values % rows != 0 || values / rows % 2 != 0)
        throw std::invalid_argument("rows of an even number of values");
    return values / rows;
}

void search(Reals x, Doubles base, Doubles percents, int bits, int mantissa, int bias, float top, float last, bool flint,
            bool left, RealsOut found, DoublesOut error) {
    const size_t rows = base.shape(0), size = row_size(x.shape(0), rows);
    if (found.shape(0) != rows || error.shape(0) != rows || percents.shape(0) == 0)
        throw std::invalid_argument("one scale and error per row, and candidates");
    const Grid g = grid(bits, mantissa, bias, top, last, flint, left);
    nb::gil_scoped_release release;
    const auto run = flint ? (left ? &search_rows<true, true> : &search_rows<true, false>)
                           : (left ? &search_rows<false, true> : &search_rows<false, false>);
    run(x.data(), rows, size, base.data(), percents.data(), percents.shape(0), g, found.data(), error.data());
}

void encode(Reals x, Reals scale, int bits, int mantissa, int bias, float top, float last, bool flint, bool left,
            CodesOut codes) {
    const size_t rows = scale.shape(0), size = row_size(x.shape(0), rows);
    if (codes.shape(0) != x.shape(0)) throw std::invalid_argument("as many codes as values");
    const Grid g = grid(bits, mantissa, bias, top, last, flint, left);
    nb::gil_scoped_release release;
    const auto run = flint ? (left ? &encode_rows<true, true> : &encode_rows<true, false>)
                           : (left ? &encode_rows<false, true> : &encode_rows<false, false>);
    run(x.data(), scale.data(), rows, size, g, codes.data());
}

BITWRIGHT_CLONES
size_t decode_rows(const uint8_t* codes, const float* scale, size_t rows, size_t size, const float* normal,
                   const float* outlier, uint8_t identifier, float* x) {
    size_t illegal = 0;
    for (size_t row = 0; row < rows; ++row, x += size, codes += size) {
        const float s = scale[row];
        for (size_t i = 0; i < size; i += 2) {
            const uint8_t a = codes[i], b = codes[i + 1];
            const bool va = a == identifier, vb = b == identifier;
            illegal += va & vb;
            x[i] = (va ? 0.0f : vb ? outlier[a] : normal[a]) * s;
            x[i + 1] = (vb ? 0.0f : va ? outlier[b] : normal[b]) * s;
        }
    }
    return illegal;
}

// Values times scales; the number of pairs that hold two victims.
size_t decode(Codes codes, Reals scale, Reals normal, Reals outlier, int identifier, RealsOut x) {
    const size_t rows = scale.shape(0), size = row_size(codes.shape(0), rows);
    if (codes.shape(0) != x.shape(0) || normal.shape(0) != 256 || outlier.shape(0) != 256)
        throw std::invalid_argument("as many values as codes, and tables of 256 values");
    nb::gil_scoped_release release;
    return decode_rows(codes.data(), scale.data(), rows, size, normal.data(), outlier.data(),
                       static_cast<uint8_t>(identifier), x.data());
}

}  // namespace

void bind_outlier_victim(nb::module_& m) {
    m.def("outlier_victim_search", &search, nb::arg("x"), nb::arg("base"), nb::arg("percents"), nb::arg("bits"),
          nb::arg("mantissa"), nb::arg("bias"), nb::arg("top"), nb::arg("last"), nb::arg("flint"), nb::arg("left"),
          nb::arg("found"), nb::arg("error"));
    m.def("outlier_victim_encode", &encode, nb::arg("x"), nb::arg("scale"), nb::arg("bits"), nb::arg("mantissa"),
          nb::arg("bias"), nb::arg("top"), nb::arg("last"), nb::arg("flint"), nb::arg("left"), nb::arg("codes"));
    m.def("outlier_victim_decode", &decode, nb::arg("codes"), nb::arg("scale"), nb::arg("normal"), nb::arg("outlier"),
          nb::arg("identifier"), nb::arg("x"));
}

}  // namespace bitwright
