// One-pass operators of an encoder over packed rows (arXiv 2210.03052): rows gathered from a padded batch, bias and
// residual and layer normalisation with the rows put back in the last layer, bias and GELU.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "clones.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kGrain = 1 << 14;  // values that one thread takes at a time

size_t rows_at_once(size_t width) { return std::max<size_t>(1, kGrain / std::max<size_t>(width, 1)); }

constexpr size_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

#define INLINE [[gnu::always_inline]] inline

INLINE Floats magnitude(Floats x) { return (Floats)((Integers)x & 0x7FFFFFFF); }
INLINE Floats with_sign(Floats x, Floats of) { return (Floats)((Integers)x | ((Integers)of & INT32_MIN)); }

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial of the rest, |rest| <= ln(2) / 2.
INLINE Floats exp_negative(Floats x) {
    const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
    const Integers power = __builtin_convertvector(bounded * 1.44269504f - 0.5f, Integers);
    const Floats whole = __builtin_convertvector(power, Floats);
    const Floats rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats value = Floats{} + 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    return value * (Floats)((power + 127) << 23);
}

// 1 + erf(x / sqrt(2)) by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
INLINE Floats one_plus_erf(Floats x) {
    const Floats z = magnitude(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    Floats series = t * 1.061405429f - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = (series * t + 0.254829592f) * t;
    return 1.0f + with_sign(1.0f - series * exp_negative(-z * z), x);
}

// 1 + tanh(y), from e^(-2 |y|)
INLINE Floats one_plus_tanh(Floats y) {
    const Floats small = exp_negative(-2.0f * magnitude(y));
    return 1.0f + with_sign((1.0f - small) / (1.0f + small), y);
}

}  // namespace

INLINE Floats gelu(Floats x, bool tanh_form) {
    const Floats twice = tanh_form ? one_plus_tanh(0.79788456f * (x + 0.044715f * x * x * x)) : one_plus_erf(x);
    return 0.5f * x * twice;
}

BITWRIGHT_CLONES static void gelu_row(float* x, const float* bias, size_t width, bool tanh_form) {
    Floats value{}, added{};
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        std::memcpy(&value, x + i, sizeof(value));
        std::memcpy(&added, bias + i, sizeof(added));
        value = gelu(value + added, tanh_form);
        std::memcpy(x + i, &value, sizeof(value));
    }
    if (i == width) return;
    std::memcpy(&value, x + i, 4 * (width - i));
    std::memcpy(&added, bias + i, 4 * (width - i));
    value = gelu(value + added, tanh_form);
    std::memcpy(x + i, &value, 4 * (width - i));
}

// y = norm(x + bias + residual) * gain + shift; the sums of a row stay in `sums`.
BITWRIGHT_CLONES static void norm_row(const float* x, const float* bias, const float* residual, const float* gain,
                                      const float* shift, float epsilon, size_t width, float* sums, float* y) {
    float partial[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
        for (size_t lane = 0; lane < kLanes; ++lane) {
            const float value = x[i + lane] + bias[i + lane] + residual[i + lane];
            sums[i + lane] = value;
            partial[lane] += value;
        }
    for (; i < width; ++i) partial[0] += sums[i] = x[i] + bias[i] + residual[i];
    float total = 0;
    for (float each : partial) total += each;
    const float mean = total / static_cast<float>(width);
    float squares[kLanes] = {};
    for (i = 0; i + kLanes <= width; i += kLanes)
        for (size_t lane = 0; lane < kLanes; ++lane) {
            const float value = sums[i + lane] - mean;
            squares[lane] += value * value;
        }
    for (; i < width; ++i) squares[0] += (sums[i] - mean) * (sums[i] - mean);
    float variance = 0;
    for (float each : squares) variance += each;
    const float scale = 1.0f / std::sqrt(variance / static_cast<float>(width) + epsilon);
    for (i = 0; i < width; ++i) y[i] = (sums[i] - mean) * scale * gain[i] + shift[i];
}

static void bias_gelu(Result x, Row bias, bool tanh_form, int threads) {
    const size_t width = x.shape(1);
    if (bias.size() != width) throw std::invalid_argument("a bias of another width");
    nb::gil_scoped_release release;
    parallel_for(x.shape(0), rows_at_once(width), threads, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; ++row) gelu_row(x.data() + row * width, bias.data(), width, tanh_form);
    });
}

// out[place[row]] = norm(x[row] + bias + residual[row]); without places out[row].
static void residual_norm(Matrix x, Row bias, Matrix residual, Row gain, Row shift, float epsilon, Index place,
                          int threads, Result out) {
    const size_t rows = x.shape(0), width = x.shape(1);
    if (residual.shape(0) != rows || residual.shape(1) != width || bias.size() != width || gain.size() != width ||
        shift.size() != width || out.shape(1) != width || (place.size() && place.size() != rows) ||
        (!place.size() && out.shape(0) != rows))
        throw std::invalid_argument("shapes do not match");
    for (size_t row = 0; row < place.size(); ++row)
        if (place.data()[row] < 0 || static_cast<size_t>(place.data()[row]) >= out.shape(0))
            throw std::invalid_argument("a place outside the result");
    nb::gil_scoped_release release;
    const size_t at_once = rows_at_once(width);
    parallel_for(rows, at_once, threads, [&](size_t begin, size_t end, int) {
        std::vector<float> sums(width);
        for (size_t row = begin; row < end; ++row) {
            const size_t to = place.size() ? static_cast<size_t>(place.data()[row]) : row;
            norm_row(x.data() + row * width, bias.data(), residual.data() + row * width, gain.data(), shift.data(),
                     epsilon, width, sums.data(), out.data() + to * width);
        }
    });
}

void bind_packed_rows(nb::module_& m) {
    m.def("bias_gelu", &bias_gelu, nb::arg("x"), nb::arg("bias"), nb::arg("tanh_form"), nb::arg("threads"));
    m.def("residual_norm", &residual_norm, nb::arg("x"), nb::arg("bias"), nb::arg("residual"), nb::arg("gain"),
          nb::arg("shift"), nb::arg("epsilon"), nb::arg("place"), nb::arg("threads"), nb::arg("out"));
}

}  // namespace bitwright
