// Matrix product whose multiplications add the bit patterns of float32 operands (L-Mul, adder form), sums in float32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <thread>
#include <vector>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BITWRIGHT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BITWRIGHT_CLONES
#endif

namespace bitwright {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// One row of the result: out[n] = sum over k, in order, of a[k] * b[k][n]. `offset` is (bias << 23) less the constant.
BITWRIGHT_CLONES
static void row_product(const float* a, const float* b, size_t k_total, size_t n_total, int32_t offset, float* out) {
    constexpr size_t kColumns = 256;
    constexpr int32_t kLowest = 1 << 23, kHighest = 0x7f7fffff;
    for (size_t start = 0; start < n_total; start += kColumns) {
        const size_t width = std::min(kColumns, n_total - start);
        float sums[kColumns] = {};
        for (size_t k = 0; k < k_total; ++k) {
            const auto left = std::bit_cast<int32_t>(a[k]);
            const int32_t magnitude = left & 0x7fffffff;
            if (magnitude < kLowest) continue;  // zero and subnormal operands: nothing to add
            const int32_t base = magnitude - offset;
            const float* row = b + k * n_total + start;
            for (size_t n = 0; n < width; ++n) {
                const auto right = std::bit_cast<int32_t>(row[n]);
                const int32_t other = right & 0x7fffffff;
                // base + other leaves 31 bits only where the product does; the unsigned sum tells it from a negative one
                const uint32_t wide = static_cast<uint32_t>(base) + static_cast<uint32_t>(other);
                int32_t sum = static_cast<int32_t>(wide);
                const bool over = base > 0 && sum < 0;
                sum = over ? 0x7f800000 : sum;
                sum = (sum > kHighest) ? 0x7f800000 : sum;
                sum = (sum < kLowest || other < kLowest) ? 0 : sum;
                sums[n] += std::bit_cast<float>(sum | ((left ^ right) & static_cast<int32_t>(0x80000000u)));
            }
        }
        std::copy(sums, sums + width, out + start);
    }
}

static void logarithmic_matmul(Matrix a, Matrix b, int32_t offset, int threads, Result out) {
    const size_t m = a.shape(0), k = a.shape(1), n = b.shape(1);
    if (b.shape(0) != k || out.shape(0) != m || out.shape(1) != n) throw std::invalid_argument("shapes do not match");
    nb::gil_scoped_release release;
    const size_t used = std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), std::max<size_t>(m, 1));
    auto rows = [&](size_t first, size_t last) {
        for (size_t r = first; r < last; ++r) row_product(a.data() + r * k, b.data(), k, n, offset, out.data() + r * n);
    };
    std::vector<std::thread> running;
    for (size_t t = 1; t < used; ++t) running.emplace_back(rows, m * t / used, m * (t + 1) / used);
    rows(0, m / used);
    for (auto& thread : running) thread.join();
}

void bind_logarithmic_multiplication(nb::module_& m) {
    m.def("logarithmic_matmul", &logarithmic_matmul, nb::arg("a"), nb::arg("b"), nb::arg("offset"), nb::arg("threads"),
          nb::arg("out"));
}

}  // namespace bitwright
