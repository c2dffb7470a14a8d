// Products with packed 4-bit weights (arXiv 2411.16158): scales and zero points are applied once per group, after the
// group's sum of products with small integers. Every step after that sum is one rounded float32 operation, groups
// ascending, without fused multiply-add, so that results are those of bitwright.arithmetic.late_dequantisation.
//
// Packed weights: blocks of 16 columns; in a block the groups; in a group steps of 8 positions (k), 64 bytes each:
// byte 4 c + i holds the codes of column c at positions i (low half) and i + 4 (high half). Columns are padded to 16,
// groups to a multiple of 8 positions, with codes 0.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

namespace {

constexpr size_t kBlock = 16;  // columns of a block
constexpr size_t kStep = 8;    // positions of a step
constexpr size_t kBytes = 64;  // bytes of a step

struct Shape {
    size_t k, n, group, groups, padded;  // padded: positions of a whole group in packed order

    Shape(size_t k, size_t n, size_t group)
        : k(k), n(n), group(std::min(group, k)), groups((k + this->group - 1) / this->group),
          padded((this->group + kStep - 1) / kStep * kStep) {}
    size_t blocks() const { return (n + kBlock - 1) / kBlock; }
    size_t positions(size_t at) const { return std::min(group, k - at * group); }
    size_t steps(size_t at) const { return (positions(at) + kStep - 1) / kStep; }
    size_t block_bytes() const { return ((groups - 1) * padded / kStep + steps(groups - 1)) * kBytes; }
    size_t width() const { return groups * padded; }  // of a row of activations in packed order
};

// Scales and zero points (groups, n), token scales (m) or null, results (m, n).
struct Tables {
    const float* scale;
    const uint8_t* zero;
    const float* token;
    float* out;
    size_t m, n;
};

// The code of column c at position p of a step.
inline int code_at(const uint8_t* step, size_t c, size_t p) { return (step[4 * c + p % 4] >> (p / 4 * 4)) & 15; }

// ---- portable -----------------------------------------------------------------------------------------------------

#if defined(__GNUC__) && !defined(__clang__)
#define SEPARATE_ROUNDING __attribute__((optimize("fp-contract=off")))
#else
#define SEPARATE_ROUNDING
#endif

SEPARATE_ROUNDING void integers_portable(const Shape& shape, const uint8_t* weights, const int8_t* x,
                                         const int32_t* sums, const Tables& to, size_t first, size_t last) {
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
    for (size_t block = first; block < last; ++block)
        for (size_t row = 0; row < to.m; ++row) {
            const size_t columns = std::min(kBlock, shape.n - block * kBlock);
            float total[kBlock] = {};
            const uint8_t* step = weights + block * shape.block_bytes();
            for (size_t at = 0; at < shape.groups; ++at) {
                int32_t product[kBlock] = {};
                const int8_t* value = x + row * shape.width() + at * shape.padded;
                for (size_t s = 0; s < shape.steps(at); ++s, step += kBytes, value += kStep)
                    for (size_t c = 0; c < kBlock; ++c)
                        for (size_t p = 0; p < kStep; ++p) product[c] += value[p] * code_at(step, c, p);
                for (size_t c = 0; c < columns; ++c) {
                    const size_t entry = at * shape.n + block * kBlock + c;
                    const int32_t difference = product[c] - to.zero[entry] * sums[row * shape.groups + at];
                    total[c] = total[c] + to.scale[entry] * static_cast<float>(difference);
                }
            }
            for (size_t c = 0; c < columns; ++c)
                to.out[row * to.n + block * kBlock + c] = total[c] * to.token[row];
        }
}

SEPARATE_ROUNDING void floats_portable(const Shape& shape, const uint8_t* weights, const float* x, const float* sums,
                                       bool late, const Tables& to, size_t first, size_t last) {
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
    for (size_t block = first; block < last; ++block)
        for (size_t row = 0; row < to.m; ++row) {
            const size_t columns = std::min(kBlock, shape.n - block * kBlock);
            float total[kBlock] = {};
            const uint8_t* step = weights + block * shape.block_bytes();
            for (size_t at = 0; at < shape.groups; ++at) {
                float product[kBlock] = {};
                const float* value = x + row * shape.width() + at * shape.padded;
                const size_t entry = at * shape.n + block * kBlock;
                for (size_t s = 0; s < shape.steps(at); ++s, step += kBytes, value += kStep)
                    for (size_t c = 0; c < columns; ++c)
                        for (size_t p = 0; p < kStep; ++p) {
                            const float code = static_cast<float>(code_at(step, c, p));
                            if (late) {
                                product[c] = product[c] + value[p] * code;
                            } else {
                                const float weight = to.scale[entry + c] * (code - to.zero[entry + c]);
                                total[c] = total[c] + value[p] * weight;
                            }
                        }
                for (size_t c = 0; late && c < columns; ++c) {
                    const float shift = static_cast<float>(to.zero[entry + c]) * sums[row * shape.groups + at];
                    total[c] = total[c] + to.scale[entry + c] * (product[c] - shift);
                }
            }
            for (size_t c = 0; c < columns; ++c) to.out[row * to.n + block * kBlock + c] = total[c];
        }
}

// ---- AVX-512 ------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

WITH_AVX512 inline __m512i broadcast(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm512_set1_epi32(word);
}

WITH_AVX512 inline __mmask16 lanes_of(const Shape& shape, size_t block) {
    const size_t left = shape.n - block * kBlock;
    return left >= kBlock ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
}

WITH_AVX512 inline __m512i zeros_of(const Tables& to, size_t entry, __mmask16 lanes) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, to.zero + entry));
}

// Rows [row, row + M) of Blocks blocks of columns.
template <size_t M, size_t Blocks>
WITH_AVX512 void integer_tile(const Shape& shape, const uint8_t* weights, const int8_t* x, const int32_t* sums,
                              const Tables& to, size_t block, size_t row) {
    constexpr size_t kChains = M * Blocks >= 8 ? 1 : 2;  // sums that are added at the end, to hide latency
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* step[Blocks];
    __m512 total[M][Blocks];
    for (size_t b = 0; b < Blocks; ++b) {
        step[b] = weights + (block + b) * shape.block_bytes();
        for (size_t r = 0; r < M; ++r) total[r][b] = _mm512_setzero_ps();
    }
    for (size_t at = 0; at < shape.groups; ++at) {
        __m512i product[kChains][M][Blocks];
        for (auto& chain : product)
            for (auto& each : chain)
                for (auto& sum : each) sum = _mm512_setzero_si512();
        const int8_t* value = x + row * shape.width() + at * shape.padded;
        for (size_t s = 0; s < shape.steps(at); ++s, value += kStep)
            for (size_t b = 0; b < Blocks; ++b, step[b - 1] += kBytes) {
                const __m512i codes = _mm512_loadu_si512(step[b]);
                const __m512i first = _mm512_and_si512(codes, low);
                const __m512i second = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
                for (size_t r = 0; r < M; ++r) {
                    const int8_t* from = value + r * shape.width();
                    auto& one = product[0][r][b];
                    auto& two = product[kChains - 1][r][b];
                    one = _mm512_dpbusd_epi32(one, first, broadcast(from));
                    two = _mm512_dpbusd_epi32(two, second, broadcast(from + 4));
                }
            }
        for (size_t b = 0; b < Blocks; ++b) {
            const __mmask16 lanes = lanes_of(shape, block + b);
            const size_t entry = at * shape.n + (block + b) * kBlock;
            const __m512i zero = zeros_of(to, entry, lanes);
            const __m512 scale = _mm512_maskz_loadu_ps(lanes, to.scale + entry);
            for (size_t r = 0; r < M; ++r) {
                __m512i sum = product[0][r][b];
                if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, product[1][r][b]);
                const __m512i shift = _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[(row + r) * shape.groups + at]));
                const __m512 real = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift));
                total[r][b] = _mm512_add_round_ps(total[r][b], _mm512_mul_round_ps(scale, real, kRound), kRound);
            }
        }
    }
    for (size_t r = 0; r < M; ++r)
        for (size_t b = 0; b < Blocks; ++b)
            _mm512_mask_storeu_ps(to.out + (row + r) * to.n + (block + b) * kBlock, lanes_of(shape, block + b),
                                  _mm512_mul_ps(total[r][b], _mm512_set1_ps(to.token[row + r])));
}

// The same for float activations: codes become floats by a look-up in a register. Fused multiply-add rounds like a
// multiplication and an addition, because products of FP16 numbers and codes are exact. Not Late: every weight is
// dequantised, scale * (code - zero), before it is multiplied.
template <bool Late, size_t M, size_t Blocks>
WITH_AVX512 void float_tile(const Shape& shape, const uint8_t* weights, const float* x, const float* sums,
                            const Tables& to, size_t block, size_t row) {
    const __m512 integers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const uint8_t* step[Blocks];
    __m512 total[M][Blocks];
    for (size_t b = 0; b < Blocks; ++b) {
        step[b] = weights + (block + b) * shape.block_bytes();
        for (size_t r = 0; r < M; ++r) total[r][b] = _mm512_setzero_ps();
    }
    for (size_t at = 0; at < shape.groups; ++at) {
        __m512 product[M][Blocks], scale[Blocks], zero[Blocks];
        for (size_t b = 0; b < Blocks; ++b) {
            const __mmask16 lanes = lanes_of(shape, block + b);
            const size_t entry = at * shape.n + (block + b) * kBlock;
            scale[b] = _mm512_maskz_loadu_ps(lanes, to.scale + entry);
            zero[b] = _mm512_cvtepi32_ps(zeros_of(to, entry, lanes));
            for (size_t r = 0; r < M; ++r) product[r][b] = Late ? _mm512_setzero_ps() : total[r][b];
        }
        const float* value = x + row * shape.width() + at * shape.padded;
        for (size_t s = 0; s < shape.steps(at); ++s, value += kStep) {
            __m512i codes[Blocks];
            for (size_t b = 0; b < Blocks; ++b, step[b - 1] += kBytes) codes[b] = _mm512_loadu_si512(step[b]);
#pragma GCC unroll 8
            for (unsigned p = 0; p < kStep; ++p) {
                const unsigned place = p % 4 * 8 + p / 4 * 4;
                for (size_t b = 0; b < Blocks; ++b) {
                    __m512 weight = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[b], place), integers);
                    if constexpr (!Late) weight = _mm512_mul_ps(scale[b], _mm512_sub_ps(weight, zero[b]));
                    for (size_t r = 0; r < M; ++r)
                        product[r][b] =
                            _mm512_fmadd_ps(weight, _mm512_set1_ps(value[r * shape.width() + p]), product[r][b]);
                }
            }
        }
        for (size_t b = 0; b < Blocks; ++b)
            for (size_t r = 0; r < M; ++r) {
                if constexpr (Late) {
                    const __m512 sum = _mm512_set1_ps(sums[(row + r) * shape.groups + at]);
                    const __m512 difference =
                        _mm512_sub_round_ps(product[r][b], _mm512_mul_round_ps(zero[b], sum, kRound), kRound);
                    total[r][b] =
                        _mm512_add_round_ps(total[r][b], _mm512_mul_round_ps(scale[b], difference, kRound), kRound);
                } else {
                    total[r][b] = product[r][b];
                }
            }
    }
    for (size_t r = 0; r < M; ++r)
        for (size_t b = 0; b < Blocks; ++b)
            _mm512_mask_storeu_ps(to.out + (row + r) * to.n + (block + b) * kBlock, lanes_of(shape, block + b),
                                  total[r][b]);
}

// Tiles of 8 rows and 2 blocks of columns (8 accumulators are enough to hide latency), then 4 rows, then single rows
// with 4 blocks.
template <typename Rows8, typename Rows4, typename Rows1, typename Tail8, typename Tail4, typename Tail1>
void for_tiles(size_t m, size_t first, size_t last, Rows8 rows8, Rows4 rows4, Rows1 rows1, Tail8 tail8, Tail4 tail4,
               Tail1 tail1) {
    size_t block = first;
    const size_t wide = m % 4 && m < 4 ? 4 : 2;
    for (; block + wide <= last; block += wide) {
        size_t row = 0;
        for (; row + 8 <= m; row += 8) rows8(block, row);
        for (; row + 4 <= m; row += 4) rows4(block, row);
        for (; row < m; ++row) {
            for (size_t b = 0; wide == 2 && b < 2; ++b) tail1(block + b, row);
            if (wide == 4) rows1(block, row);
        }
    }
    for (; block < last; ++block) {
        size_t row = 0;
        for (; row + 8 <= m; row += 8) tail8(block, row);
        for (; row + 4 <= m; row += 4) tail4(block, row);
        for (; row < m; ++row) tail1(block, row);
    }
}

WITH_AVX512 void integers_avx512(const Shape& shape, const uint8_t* w, const int8_t* x, const int32_t* sums,
                                 const Tables& to, size_t first, size_t last) {
    for_tiles(
        to.m, first, last, [&](size_t b, size_t r) { integer_tile<8, 2>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { integer_tile<4, 2>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { integer_tile<1, 4>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { integer_tile<8, 1>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { integer_tile<4, 1>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { integer_tile<1, 1>(shape, w, x, sums, to, b, r); });
}

template <bool Late>
WITH_AVX512 void floats_avx512(const Shape& shape, const uint8_t* w, const float* x, const float* sums,
                               const Tables& to, size_t first, size_t last) {
    for_tiles(
        to.m, first, last, [&](size_t b, size_t r) { float_tile<Late, 8, 2>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { float_tile<Late, 4, 2>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { float_tile<Late, 1, 4>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { float_tile<Late, 8, 1>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { float_tile<Late, 4, 1>(shape, w, x, sums, to, b, r); },
        [&](size_t b, size_t r) { float_tile<Late, 1, 1>(shape, w, x, sums, to, b, r); });
}
#endif

std::string best_path() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return "avx512";
#endif
    return "portable";
}

// Activations in packed order and their sums per row and group, in ascending order.
template <typename T, typename Sum>
void arrange(const Shape& shape, const T* x, size_t m, std::vector<T>& values, std::vector<Sum>& sums) {
    values.assign(m * shape.width(), T{0});
    sums.assign(m * shape.groups, Sum{0});
    for (size_t row = 0; row < m; ++row)
        for (size_t at = 0; at < shape.groups; ++at) {
            const T* from = x + row * shape.k + at * shape.group;
            const size_t count = shape.positions(at);
            std::copy(from, from + count, values.data() + row * shape.width() + at * shape.padded);
            Sum sum{0};
            for (size_t i = 0; i < count; ++i) sum += from[i];
            sums[row * shape.groups + at] = sum;
        }
}

void check(const Shape& shape, size_t bytes, size_t m, const Tables& to, size_t entries, const std::string& path) {
    if (bytes != shape.blocks() * shape.block_bytes()) throw std::invalid_argument("packed weights of another size");
    if (entries != shape.groups * shape.n || to.n != shape.n || to.m != m) throw std::invalid_argument("shapes differ");
    if (path != "portable" && path != best_path()) throw std::invalid_argument("a path this CPU has not got");
}

}  // namespace

static size_t packed_uint4_bytes(size_t k, size_t n, size_t group) {
    const Shape shape(k, n, group);
    return shape.blocks() * shape.block_bytes();
}

static void pack_uint4(Array<const uint8_t, 2> codes, size_t group, Array<uint8_t, 1> packed) {
    const Shape shape(codes.shape(0), codes.shape(1), group);
    if (packed.size() != shape.blocks() * shape.block_bytes()) throw std::invalid_argument("packed weights of another size");
    const uint8_t* from = codes.data();
    uint8_t* const out = packed.data();
    std::fill(out, out + packed.size(), uint8_t{0});
    for (size_t k = 0; k < shape.k; ++k) {
        const size_t at = k / shape.group, inside = k % shape.group, p = inside % kStep;
        const size_t step = at * (shape.padded / kStep) + inside / kStep;
        for (size_t n = 0; n < shape.n; ++n)
            out[n / kBlock * shape.block_bytes() + step * kBytes + 4 * (n % kBlock) + p % 4] |=
                static_cast<uint8_t>(from[k * shape.n + n] << (p / 4 * 4));
    }
}

static void uint4_matmul_int8(Array<const uint8_t, 1> packed, size_t k, size_t n, size_t group,
                              Array<const int8_t, 2> x, Array<const float, 1> token, Array<const float, 2> scale,
                              Array<const uint8_t, 2> zero, const std::string& path, int threads,
                              Array<float, 2> out) {
    const Shape shape(k, n, group);
    const Tables to{scale.data(), zero.data(), token.data(), out.data(), out.shape(0), out.shape(1)};
    check(shape, packed.size(), x.shape(0), to, scale.size(), path);
    if (x.shape(1) != k || zero.size() != scale.size() || token.size() != to.m)
        throw std::invalid_argument("shapes differ");
    nb::gil_scoped_release release;
    std::vector<int8_t> values;
    std::vector<int32_t> sums;
    arrange(shape, x.data(), to.m, values, sums);
    parallel_parts(shape.blocks(), threads, [&](size_t first, size_t last) {
#if defined(__x86_64__)
        if (path == "avx512") return integers_avx512(shape, packed.data(), values.data(), sums.data(), to, first, last);
#endif
        integers_portable(shape, packed.data(), values.data(), sums.data(), to, first, last);
    });
}

static void uint4_matmul_float(Array<const uint8_t, 1> packed, size_t k, size_t n, size_t group,
                               Array<const float, 2> x, Array<const float, 2> scale, Array<const uint8_t, 2> zero,
                               bool late, const std::string& path, int threads, Array<float, 2> out) {
    const Shape shape(k, n, group);
    const Tables to{scale.data(), zero.data(), nullptr, out.data(), out.shape(0), out.shape(1)};
    check(shape, packed.size(), x.shape(0), to, scale.size(), path);
    if (x.shape(1) != k || zero.size() != scale.size()) throw std::invalid_argument("shapes differ");
    nb::gil_scoped_release release;
    std::vector<float> values, sums;
    arrange(shape, x.data(), to.m, values, sums);
    parallel_parts(shape.blocks(), threads, [&](size_t first, size_t last) {
        const uint8_t* w = packed.data();
#if defined(__x86_64__)
        if (path == "avx512" && late) return floats_avx512<true>(shape, w, values.data(), sums.data(), to, first, last);
        if (path == "avx512") return floats_avx512<false>(shape, w, values.data(), sums.data(), to, first, last);
#endif
        floats_portable(shape, w, values.data(), sums.data(), late, to, first, last);
    });
}

void bind_late_dequantisation(nb::module_& m) {
    m.def("late_dequantisation_path", &best_path);
    m.def("packed_uint4_bytes", &packed_uint4_bytes, nb::arg("k"), nb::arg("n"), nb::arg("group"));
    m.def("pack_uint4", &pack_uint4, nb::arg("codes"), nb::arg("group"), nb::arg("packed"));
    m.def("uint4_matmul_int8", &uint4_matmul_int8, nb::arg("packed"), nb::arg("k"), nb::arg("n"), nb::arg("group"),
          nb::arg("x"), nb::arg("token"), nb::arg("scale"), nb::arg("zero"), nb::arg("path"), nb::arg("threads"),
          nb::arg("out"));
    m.def("uint4_matmul_float", &uint4_matmul_float, nb::arg("packed"), nb::arg("k"), nb::arg("n"), nb::arg("group"),
          nb::arg("x"), nb::arg("scale"), nb::arg("zero"), nb::arg("late"), nb::arg("path"), nb::arg("threads"),
          nb::arg("out"));
}

}  // namespace bitwright
