// Matrix product whose multiplications add the bit patterns of float32 operands (L-Mul, adder form). Products are summed
// in float32 with k ascending; with few-bit accumulators every `every` products are summed so, added to the total, and
// the total is rounded.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "clones.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

constexpr size_t kColumns = 256;
constexpr uint32_t kSign = 0x80000000u, kLowest = 1u << 23, kHighest = 0x7f7fffffu, kInfinity = 0x7f800000u;

// Bit patterns of the least and greatest normal number of operands and products, and what stands for greater ones.
struct Limits {
    uint32_t least, greatest, beyond;
};

// Least and greatest magnitude in one row of a block of columns: where both stay in range, so does every sum.
struct Range {
    uint32_t least, greatest;
};

// Format of running sums that are narrower than float32: mantissa bits, least normal exponent, largest number.
struct Accumulator {
    int mantissa_bits, lowest_exponent;
    float largest;
};

// total[n] = total[n] + sums[n], rounded to the accumulator's format, ties to even; too large becomes the largest number.
BITWRIGHT_CLONES
void add_rounded(const float* sums, size_t width, const Accumulator& form, float* total) {
    const int drop = 23 - form.mantissa_bits;
    const uint32_t half = (1u << (drop - 1)) - 1, kept = ~((1u << drop) - 1);
    const auto lowest = static_cast<uint32_t>(form.lowest_exponent + 127) << 23;
    const auto largest = std::bit_cast<uint32_t>(form.largest);
    // adding and taking away 1.5 * 2^23 steps of the format rounds to a step
    const float shift = std::ldexp(1.5f, form.lowest_exponent + drop);
    for (size_t n = 0; n < width; ++n) {
        const auto bits = std::bit_cast<uint32_t>(total[n] + sums[n]);
        uint32_t magnitude = bits & ~kSign;
        magnitude = (magnitude > largest && magnitude <= kInfinity) ? largest : magnitude;
        const uint32_t normal = (magnitude + half + ((magnitude >> drop) & 1)) & kept;
        const auto small = std::bit_cast<uint32_t>((std::bit_cast<float>(magnitude) + shift) - shift);
        magnitude = magnitude < lowest ? small : normal;
        total[n] = std::bit_cast<float>(magnitude | (bits & kSign));
    }
}

// sums[n] += a * row[n] for operands of any range: operands and products below the least number add nothing, products
// above the greatest what stands for them.
BITWRIGHT_CLONES
void add_any(float a, const float* row, size_t width, uint32_t offset, const Limits& limits, float* sums) {
    const auto left = std::bit_cast<uint32_t>(a);
    const auto base = static_cast<int64_t>(left & ~kSign) - offset;
    for (size_t n = 0; n < width; ++n) {
        const auto right = std::bit_cast<uint32_t>(row[n]);
        const int64_t wide = base + (right & ~kSign);
        uint32_t sum = wide > limits.greatest ? limits.beyond : static_cast<uint32_t>(wide);
        sum = (wide < limits.least || (right & ~kSign) < limits.least) ? 0 : sum;
        sums[n] += std::bit_cast<float>(sum | ((left ^ right) & kSign));
    }
}

// The same where no sum of bit patterns leaves 31 bits.
BITWRIGHT_CLONES
void add_small(float a, const float* row, size_t width, uint32_t offset, const Limits& limits, float* sums) {
    const auto left = std::bit_cast<uint32_t>(a);
    const auto base = static_cast<int32_t>((left & ~kSign) - offset);
    const auto least = static_cast<int32_t>(limits.least), greatest = static_cast<int32_t>(limits.greatest);
    const auto beyond = static_cast<int32_t>(limits.beyond);
    for (size_t n = 0; n < width; ++n) {
        const auto right = std::bit_cast<uint32_t>(row[n]);
        const auto magnitude = static_cast<int32_t>(right & ~kSign);
        const int32_t wide = base + magnitude;
        int32_t sum = wide > greatest ? beyond : wide;
        sum = std::min(wide, magnitude) < least ? 0 : sum;
        sums[n] += std::bit_cast<float>(static_cast<uint32_t>(sum) | ((left ^ right) & kSign));
    }
}

// sums[n] += a[0] * rows[0][n], then a[1] * rows[1][n] and so on, where no product leaves the range: the sign bits add
// up to their exclusive or, as nothing carries into them.
BITWRIGHT_CLONES
void add_four(const uint32_t* bases, const float* rows, size_t width, float* sums) {
    const uint32_t base0 = bases[0], base1 = bases[1], base2 = bases[2], base3 = bases[3];
    const float *row0 = rows, *row1 = rows + width, *row2 = rows + 2 * width, *row3 = rows + 3 * width;
    for (size_t n = 0; n < width; ++n) {
        float sum = sums[n];
        sum += std::bit_cast<float>(base0 + std::bit_cast<uint32_t>(row0[n]));
        sum += std::bit_cast<float>(base1 + std::bit_cast<uint32_t>(row1[n]));
        sum += std::bit_cast<float>(base2 + std::bit_cast<uint32_t>(row2[n]));
        sum += std::bit_cast<float>(base3 + std::bit_cast<uint32_t>(row3[n]));
        sums[n] = sum;
    }
}

BITWRIGHT_CLONES
void add_one(uint32_t base, const float* row, size_t width, float* sums) {
    for (size_t n = 0; n < width; ++n) sums[n] += std::bit_cast<float>(base + std::bit_cast<uint32_t>(row[n]));
}

BITWRIGHT_CLONES
Range range_of(const float* row, size_t width) {
    uint32_t least = ~0u, greatest = 0;
    for (size_t n = 0; n < width; ++n) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(row[n]) & ~kSign;
        least = std::min(least, magnitude);
        greatest = std::max(greatest, magnitude);
    }
    return {least, greatest};
}

bool in_range(float a, const Range& range, uint32_t offset, const Limits& limits) {
    const int64_t base = static_cast<int64_t>(std::bit_cast<uint32_t>(a) & ~kSign) - offset;
    return range.least >= limits.least && base + range.least >= limits.least &&
           base + range.greatest <= limits.greatest;
}

// One row of A on one block of columns of B, for k in [first, last): sums[n] += products in order.
void row_product(const float* a, size_t first, size_t last, const float* b, size_t width, const Range* ranges,
                 uint32_t offset, const Limits& limits, float* sums) {
    const auto vanishes = [&](size_t k) { return (std::bit_cast<uint32_t>(a[k]) & ~kSign) < limits.least; };
    const auto plain = [&](size_t k) { return !vanishes(k) && in_range(a[k], ranges[k], offset, limits); };
    const auto fits = [&](size_t k) {
        const int64_t base = static_cast<int64_t>(std::bit_cast<uint32_t>(a[k]) & ~kSign) - offset;
        return base + ranges[k].greatest <= INT32_MAX;
    };
    for (size_t k = first; k < last;) {
        const float* row = b + k * width;
        if (vanishes(k)) {
            ++k;
        } else if (k + 4 <= last && plain(k) && plain(k + 1) && plain(k + 2) && plain(k + 3)) {
            uint32_t bases[4];
            for (size_t each = 0; each < 4; ++each) bases[each] = std::bit_cast<uint32_t>(a[k + each]) - offset;
            add_four(bases, row, width, sums);
            k += 4;
        } else {
            if (plain(k)) add_one(std::bit_cast<uint32_t>(a[k]) - offset, row, width, sums);
            else if (fits(k)) add_small(a[k], row, width, offset, limits, sums);
            else add_any(a[k], row, width, offset, limits, sums);
            ++k;
        }
    }
}

}  // namespace

static void logarithmic_matmul(Matrix a, Matrix b, uint32_t offset, int every, int mantissa_bits, int lowest_exponent,
                               float largest, float least_normal, float greatest, bool saturates, int threads,
                               Result out) {
    const size_t m = a.shape(0), k = a.shape(1), n = b.shape(1);
    if (b.shape(0) != k || out.shape(0) != m || out.shape(1) != n) throw std::invalid_argument("shapes do not match");
    if (every > 0 && (mantissa_bits < 1 || mantissa_bits > 21)) throw std::invalid_argument("accumulator too wide");
    const auto top = std::bit_cast<uint32_t>(greatest);
    const Limits limits{std::bit_cast<uint32_t>(least_normal), top, saturates ? top : kInfinity};
    if (limits.least < kLowest || top > kHighest || top < limits.least) throw std::invalid_argument("no such range");
    nb::gil_scoped_release release;
    const Accumulator form{mantissa_bits, lowest_exponent, largest};
    const size_t chunk = every > 0 ? static_cast<size_t>(every) : std::max<size_t>(k, 1);
    std::vector<Range> ranges(k);
    std::vector<float> packed(k * std::min(kColumns, n));
    for (size_t start = 0; start < n; start += kColumns) {
        const size_t width = std::min(kColumns, n - start);
        for (size_t row = 0; row < k; ++row) {
            std::copy_n(b.data() + row * n + start, width, packed.data() + row * width);
            ranges[row] = range_of(packed.data() + row * width, width);
        }
        auto rows = [&](size_t from, size_t to) {
            for (size_t r = from; r < to; ++r) {
                float total[kColumns] = {};
                for (size_t first = 0; first < k; first += chunk) {
                    float sums[kColumns] = {};
                    row_product(a.data() + r * k, first, std::min(first + chunk, k), packed.data(), width,
                                ranges.data(), offset, limits, sums);
                    if (every > 0) add_rounded(sums, width, form, total);
                    else std::copy(sums, sums + width, total);
                }
                std::copy(total, total + width, out.data() + r * n + start);
            }
        };
        parallel_parts(m, threads, rows);
    }
}

void bind_logarithmic_multiplication(nb::module_& m) {
    m.def("logarithmic_matmul", &logarithmic_matmul, nb::arg("a"), nb::arg("b"), nb::arg("offset"), nb::arg("every"),
          nb::arg("mantissa_bits"), nb::arg("lowest_exponent"), nb::arg("largest"), nb::arg("least_normal"),
          nb::arg("greatest"), nb::arg("saturates"), nb::arg("threads"), nb::arg("out"));
}

}  // namespace bitwright
