// Products by shifts and masked sums without a multiplication (arXiv 2306.06446).
//
// Shifts: a block of rows of x lies across the lanes of a vector. For one position k every shift of it, with either
// sign, is made once and kept in a table in the first-level cache; each weight is the place of its entry, so that a
// term costs one addition from memory instead of a shift, a sign and an addition.
// Masked sums: the 16 sums of every subset of four rows of v are made once; four positions of a mask choose one of
// them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "clones.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

constexpr size_t kVector = 64;            // bytes of an entry of a table
constexpr size_t kTile = 16;              // columns whose sums stay in registers
constexpr size_t kTableBytes = 24 << 10;  // tables of the positions that are added at once: first-level cache
constexpr size_t kGrain = 1 << 20;        // additions of vectors for which one more thread is started

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_PATHS
#endif

std::string best_path() {
#ifdef WITH_PATHS
    if (__builtin_cpu_supports("x86-64-v4")) return "avx512";
    if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
    return "portable";
}

// Pieces [first, last) of `count`, each taken by the next free thread.
void in_pieces(size_t count, int threads, const std::function<void(size_t, size_t)>& work) {
    const size_t pieces = 8 * static_cast<size_t>(std::max(threads, 1));
    parallel_for(count, count / pieces, threads, [&](size_t first, size_t last, int) { work(first, last); });
}

// Threads worth starting for so many additions of vectors.
int worthwhile(size_t additions, int threads) {
    return static_cast<int>(std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), 1 + additions / kGrain));
}

// ---- shifts -------------------------------------------------------------------------------------------------------

// x (m, k), places (k, padded): byte of an entry among shifts [0, count), their negatives [count, 2 count) and zero.
struct ShiftJob {
    const int32_t* x;
    const uint16_t* places;
    size_t m, n, k, padded;
    int first, count;     // smallest shift and how many there are
    const float* bias;    // (n,), where results are floats:
    double unit;          // sum * unit + bias, rounded once
    size_t entries() const { return 2 * static_cast<size_t>(count) + 1; }
    size_t positions() const { return std::max<size_t>(1, kTableBytes / (entries() * kVector)); }
};

// Masks (batch, m, words) of 64 positions; v (batch, k, n); out (batch, m, n).
template <typename T, typename Out>
struct MaskJob {
    const uint64_t* masks;
    const T* v;
    Out* out;
    size_t batch, m, words, k, n;
};

constexpr size_t kMaskRows = 256;  // rows whose sums stay in the cache while the tables of a word are read

#define BYTES 16
#define TILE 8
namespace portable {
#include "shift_and_add_paths.hpp"
}
#undef BYTES
#undef TILE

#ifdef WITH_PATHS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define BYTES 32
#define TILE 8
namespace avx2 {
#include "shift_and_add_paths.hpp"
}
#undef BYTES
#undef TILE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define BYTES 64
#define TILE 16
namespace avx512 {
#include "shift_and_add_paths.hpp"
}
#undef BYTES
#undef TILE
#pragma GCC pop_options
#endif

template <typename T, typename Out>
void shift_all(const ShiftJob& job, Out* out, const std::string& path, int threads) {
    constexpr size_t kRows = kVector / sizeof(T);
    auto work = portable::shift_rows<T, Out>;
#ifdef WITH_PATHS
    if (path == "avx2") work = avx2::shift_rows<T, Out>;
    if (path == "avx512") work = avx512::shift_rows<T, Out>;
#endif
    const size_t blocks = (job.m + kRows - 1) / kRows;
    in_pieces(blocks, worthwhile(blocks * job.padded * job.k, threads),
               [&](size_t first, size_t last) { work(job, out, first, last); });
}

void check_path(const std::string& path) {
    static const char* const names[] = {"portable", "avx2", "avx512"};
    const auto rank = [](const std::string& name) { return std::find(names, names + 3, name) - names; };
    if (rank(path) > rank(best_path())) throw std::invalid_argument("no such path on this CPU");
}

// Places (k, padded) of exponents and signs (n, k), shifts from `first` to `first + count - 1`; columns n.. are zeros.
void shift_places(Array<const int8_t, 2> exponents, Array<const int8_t, 2> signs, int first, int count,
                  Array<uint16_t, 2> places) {
    const size_t n = exponents.shape(0), k = exponents.shape(1), padded = places.shape(1);
    if (signs.shape(0) != n || signs.shape(1) != k || places.shape(0) != k || padded % kTile || padded < n)
        throw std::invalid_argument("shapes of exponents, signs and places");
    const auto zero = static_cast<uint16_t>(2 * count * static_cast<int>(kVector));
    std::fill(places.data(), places.data() + k * padded, zero);
    for (size_t row = 0; row < n; ++row)
        for (size_t at = 0; at < k; ++at) {
            const int sign = signs.data()[row * k + at], place = -exponents.data()[row * k + at] - first;
            if (sign == 0) continue;
            if (place < 0 || place >= count) throw std::invalid_argument("exponent out of range");
            places.data()[at * padded + row] =
                static_cast<uint16_t>((place + (sign < 0 ? count : 0)) * static_cast<int>(kVector));
        }
}

// `wide`: sums in int64; otherwise the caller knows that none leaves int32.
template <typename Out>
void run_shifts(const ShiftJob& job, size_t place_rows, size_t out_rows, bool wide, const std::string& path,
                int threads, Out* out) {
    if (place_rows != job.k || out_rows != job.m || job.padded < job.n || job.padded % kTile || job.count < 1 ||
        job.first < 0 || job.first + job.count > 31)
        throw std::invalid_argument("shapes of x, places and results");
    check_path(path);
    nb::gil_scoped_release release;
    if constexpr (!std::is_same_v<Out, int32_t>)
        if (wide) return shift_all<int64_t, Out>(job, out, path, threads);
    shift_all<int32_t, Out>(job, out, path, threads);
}

template <typename Out>
void shift_matmul(Array<const int32_t, 2> x, Array<const uint16_t, 2> places, int first, int count, bool wide,
                  const std::string& path, int threads, Array<Out, 2> out) {
    const ShiftJob job{x.data(), places.data(), x.shape(0), out.shape(1), x.shape(1), places.shape(1), first, count,
                       nullptr,  1.0};
    run_shifts(job, places.shape(0), out.shape(0), wide, path, threads, out.data());
}

// Results are floats: sum * unit + bias.
void shift_linear(Array<const int32_t, 2> x, Array<const uint16_t, 2> places, int first, int count, bool wide,
                  Array<const float, 1> bias, double unit, const std::string& path, int threads, Array<float, 2> out) {
    const ShiftJob job{x.data(), places.data(), x.shape(0), out.shape(1), x.shape(1), places.shape(1), first, count,
                       bias.data(), unit};
    if (bias.size() != job.n) throw std::invalid_argument("one bias per column");
    run_shifts(job, places.shape(0), out.shape(0), wide, path, threads, out.data());
}

// The straight loop that the kernel is compared with: one variable shift, one sign and one addition per term.
BITWRIGHT_CLONES
void shift_loop(const int32_t* x, const int8_t* exponents, const int8_t* signs, size_t n, size_t k, size_t first,
                size_t last, int32_t* out) {
    for (size_t row = first; row < last; ++row)
        for (size_t column = 0; column < n; ++column) {
            int32_t sum = 0;
            for (size_t i = 0; i < k; ++i)
                sum += signs[column * k + i] * (x[row * k + i] >> -exponents[column * k + i]);
            out[row * n + column] = sum;
        }
}

void shift_matmul_loop(Array<const int32_t, 2> x, Array<const int8_t, 2> exponents, Array<const int8_t, 2> signs,
                       int threads, Array<int32_t, 2> out) {
    const size_t m = x.shape(0), k = x.shape(1), n = exponents.shape(0);
    if (exponents.shape(1) != k || signs.shape(0) != n || signs.shape(1) != k || out.shape(0) != m || out.shape(1) != n)
        throw std::invalid_argument("shapes of x, exponents, signs and results");
    nb::gil_scoped_release release;
    in_pieces(m, threads, [&](size_t first, size_t last) {
        shift_loop(x.data(), exponents.data(), signs.data(), n, k, first, last, out.data());
    });
}

// The largest magnitude of int32 numbers, 2^31 included.
BITWRIGHT_CLONES
int64_t magnitude_of(const int32_t* x, size_t count) {
    int32_t low = 0, high = 0;
    for (size_t i = 0; i < count; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return std::max<int64_t>(high, -static_cast<int64_t>(low));
}

int64_t largest_magnitude(Array<const int32_t, 1> x) { return magnitude_of(x.data(), x.size()); }

// x in units of 2^-fraction_bits, rounded down and clipped to int32; whether there was a NaN.
BITWRIGHT_CLONES
bool fixed_point_values(const float* x, size_t count, float units, int32_t* out) {
    int32_t unordered = 0;
    for (size_t i = 0; i < count; ++i) {
        unordered |= x[i] != x[i];
        const float scaled = __builtin_floorf(x[i] * units);
        const float low = scaled < -2147483648.0f ? -2147483648.0f : scaled;
        out[i] = low >= 2147483648.0f ? INT32_MAX : static_cast<int32_t>(low < 2147483648.0f ? low : 0.0f);
    }
    return unordered != 0;
}

bool fixed_point(Array<const float, 1> x, int fraction_bits, Array<int32_t, 1> out) {
    if (x.size() != out.size()) throw std::invalid_argument("as many results as values");
    nb::gil_scoped_release release;
    return fixed_point_values(x.data(), x.size(), static_cast<float>(int64_t{1} << fraction_bits), out.data());
}

// ---- masked sums --------------------------------------------------------------------------------------------------


template <typename T, typename Out>
void masked_sums(Array<const uint64_t, 3> masks, Array<const T, 3> v, const std::string& path, int threads,
                 Array<Out, 3> out) {
    using Sum = std::conditional_t<std::is_floating_point_v<T>, double, int64_t>;
    const MaskJob<T, Out> job{masks.data(), v.data(), out.data(), masks.shape(0), masks.shape(1), masks.shape(2),
                              v.shape(1), v.shape(2)};
    if (v.shape(0) != job.batch || (job.k + 63) / 64 != job.words || out.shape(0) != job.batch ||
        out.shape(1) != job.m || out.shape(2) != job.n || job.m == 0)
        throw std::invalid_argument("shapes of masks, values and results");
    check_path(path);
    nb::gil_scoped_release release;
    auto work = portable::mask_jobs<T, Sum, Out>;
#ifdef WITH_PATHS
    if (path == "avx2") work = avx2::mask_jobs<T, Sum, Out>;
    if (path == "avx512") work = avx512::mask_jobs<T, Sum, Out>;
#endif
    constexpr size_t kLanes = kVector / sizeof(T);
    const size_t blocks = (job.n + kLanes - 1) / kLanes, pieces = (job.m + kMaskRows - 1) / kMaskRows;
    in_pieces(job.batch * blocks * pieces, worthwhile(job.batch * blocks * job.m * job.words * 16, threads),
               [&](size_t first, size_t last) { work(job, first, last); });
}

// The straight loop that the kernel is compared with; mask (batch, m, k) of bytes 0 and 1.
BITWRIGHT_CLONES
void mask_loop(const uint8_t* mask, const float* v, size_t m, size_t k, size_t n, size_t first, size_t last,
               float* out) {
    for (size_t row = first; row < last; ++row) {  // of all batches
        float* to = out + row * n;
        for (size_t column = 0; column < n; ++column) to[column] = 0;
        for (size_t i = 0; i < k; ++i)
            if (mask[row * k + i])
                for (size_t column = 0; column < n; ++column) to[column] += v[(row / m * k + i) * n + column];
    }
}

void masked_sums_loop(Array<const uint8_t, 3> mask, Array<const float, 3> v, int threads, Array<float, 3> out) {
    const size_t m = mask.shape(1), k = mask.shape(2), n = v.shape(2);
    if (v.shape(0) != mask.shape(0) || v.shape(1) != k || out.shape(0) != v.shape(0) || out.shape(1) != m ||
        out.shape(2) != n || m == 0)
        throw std::invalid_argument("shapes of masks, values and results");
    nb::gil_scoped_release release;
    in_pieces(mask.shape(0) * m, worthwhile(mask.size() * n / 16, threads), [&](size_t first, size_t last) {
        mask_loop(mask.data(), v.data(), m, k, n, first, last, out.data());
    });
}

}  // namespace

void bind_shift_and_add(nb::module_& m) {
    using namespace nb::literals;
    m.def("shift_and_add_path", &best_path);
    m.def("shift_places", &shift_places, "exponents"_a, "signs"_a, "first"_a, "count"_a, "places"_a);
    m.def("shift_matmul32", &shift_matmul<int32_t>, "x"_a, "places"_a, "first"_a, "count"_a, "wide"_a, "path"_a,
          "threads"_a, "out"_a);
    m.def("shift_matmul64", &shift_matmul<int64_t>, "x"_a, "places"_a, "first"_a, "count"_a, "wide"_a, "path"_a,
          "threads"_a, "out"_a);
    m.def("shift_linear", &shift_linear, "x"_a, "places"_a, "first"_a, "count"_a, "wide"_a, "bias"_a, "unit"_a,
          "path"_a, "threads"_a, "out"_a);
    m.def("shift_matmul_loop", &shift_matmul_loop, "x"_a, "exponents"_a, "signs"_a, "threads"_a, "out"_a);
    m.def("largest_magnitude", &largest_magnitude, "x"_a);
    m.def("fixed_point", &fixed_point, "x"_a, "fraction_bits"_a, "out"_a);
    m.def("masked_sums_int32", &masked_sums<int32_t, int64_t>, "masks"_a, "v"_a, "path"_a, "threads"_a, "out"_a);
    m.def("masked_sums_int64", &masked_sums<int64_t, int64_t>, "masks"_a, "v"_a, "path"_a, "threads"_a, "out"_a);
    m.def("masked_sums_float32", &masked_sums<float, float>, "masks"_a, "v"_a, "path"_a, "threads"_a, "out"_a);
    m.def("masked_sums_loop", &masked_sums_loop, "mask"_a, "v"_a, "threads"_a, "out"_a);
}

}  // namespace bitwright
