// Products of int8 weights in blocks of 4 outputs by 1 input with uint8 activations, and what follows them in an
// encoder that keeps its activations transposed (arXiv 2306.16601): scales, zero points, residuals, GELU, rounding to
// int8, statistics of layer norms, attention.
//
// Weights: block rows of 4 outputs; of each, groups of 4 inputs: 4 indices (16 bits) and 16 values, the 4 of an output
// side by side; the last group is filled with zeros. Activations: slabs (slab, row, column of the slab); a plain matrix
// is one slab. A tile is 4 outputs by up to 96 columns.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header of AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "clones.hpp"
#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

constexpr size_t kRows = 4;        // of a block
constexpr size_t kGroup = 4;       // inputs of a group
constexpr size_t kColumns = 96;    // of the widest tile
constexpr size_t kChunk = 16;      // block rows of a piece of work
constexpr size_t kLeastGroups = 1500;  // of the work that a thread takes at a time

// One tile: groups of one block row by `columns` columns of activations whose rows are `stride` bytes apart. Sums start
// from first[row] and go to `sums`, rows `to` apart.
using Tile = void (*)(const uint16_t* index, const int8_t* value, size_t groups, const uint8_t* a, size_t stride,
                      size_t columns, const int32_t* first, int32_t* sums, size_t to);

// Columns of the next tile when `rest` are left.
inline size_t tile_columns(size_t rest) { return rest <= kColumns ? rest : size_t{64}; }

// ---- portable -----------------------------------------------------------------------------------------------------

BITWRIGHT_CLONES void tile_portable(const uint16_t* index, const int8_t* value, size_t groups, const uint8_t* a,
                                    size_t stride, size_t columns, const int32_t* first, int32_t* sums, size_t to) {
    int32_t total[kRows][kColumns];
    for (size_t r = 0; r < kRows; ++r) std::fill(total[r], total[r] + columns, first[r]);
    for (size_t g = 0; g < groups; ++g)
        for (size_t i = 0; i < kGroup; ++i) {
            const uint8_t* row = a + index[g * kGroup + i] * stride;
            for (size_t r = 0; r < kRows; ++r) {
                const int32_t weight = value[(g * kRows + r) * kGroup + i];
                for (size_t c = 0; c < columns; ++c) total[r][c] += weight * row[c];
            }
        }
    for (size_t r = 0; r < kRows; ++r) std::copy(total[r], total[r] + columns, sums + r * to);
}

#if defined(__x86_64__)
// ---- AVX2: 16-bit products of pairs, exact (8-bit multiply-adds would saturate) -----------------------------------

#define WITH_AVX2 __attribute__((target("avx2")))

WITH_AVX2 inline __m128i first_bytes(const uint8_t* from, size_t count) {
    if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    alignas(16) uint8_t bytes[16] = {};
    std::memcpy(bytes, from, count);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
}

WITH_AVX2 void tile_avx2(const uint16_t* index, const int8_t* value, size_t groups, const uint8_t* a, size_t stride,
                         size_t columns, const int32_t* first, int32_t* sums, size_t to) {
    for (size_t from = 0; from < columns; from += 16) {
        const size_t count = std::min<size_t>(16, columns - from);
        __m256i total[kRows][2];
        for (size_t r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm256_set1_epi32(first[r]);
        for (size_t g = 0; g < groups; ++g) {
            // 16 weights as 16-bit numbers: pair p of output r is element 2 r + p
            alignas(32) int32_t pairs[8];
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(value + g * 16));
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), _mm256_cvtepi8_epi16(bytes));
            for (size_t p = 0; p < 2; ++p) {
                const __m128i even = first_bytes(a + index[g * 4 + 2 * p] * stride + from, count);
                const __m128i odd = first_bytes(a + index[g * 4 + 2 * p + 1] * stride + from, count);
                const __m256i low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
                const __m256i high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd));
                for (size_t r = 0; r < kRows; ++r) {
                    const __m256i weight = _mm256_set1_epi32(pairs[2 * r + p]);
                    total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(low, weight));
                    total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(high, weight));
                }
            }
        }
        for (size_t r = 0; r < kRows; ++r) {
            alignas(32) int32_t row[16];
            _mm256_store_si256(reinterpret_cast<__m256i*>(row), total[r][0]);
            _mm256_store_si256(reinterpret_cast<__m256i*>(row + 8), total[r][1]);
            std::copy(row, row + count, sums + r * to + from);
        }
    }
}

// ---- AVX-512 VNNI -------------------------------------------------------------------------------------------------

#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

// Four rows of 64 bytes as four vectors of 16 columns by 4 rows; lane l of vector t holds columns 16 l + 4 t and on.
WITH_VNNI inline __attribute__((always_inline)) void interleave_64(const uint8_t* const (&row)[4], __mmask64 mask,
                                                                   bool whole, __m512i (&out)[4]) {
    __m512i in[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) in[i] = whole ? _mm512_loadu_si512(row[i]) : _mm512_maskz_loadu_epi8(mask, row[i]);
    const __m512i low01 = _mm512_unpacklo_epi8(in[0], in[1]), high01 = _mm512_unpackhi_epi8(in[0], in[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(in[2], in[3]), high23 = _mm512_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi16(low01, low23);
    out[1] = _mm512_unpackhi_epi16(low01, low23);
    out[2] = _mm512_unpacklo_epi16(high01, high23);
    out[3] = _mm512_unpackhi_epi16(high01, high23);
}

// Four rows of 16 bytes as one vector of 16 columns by 4 rows, in order.
WITH_VNNI inline __attribute__((always_inline)) __m512i interleave_16(const uint8_t* const (&row)[4], size_t at,
                                                                      __mmask16 mask) {
    __m512i all = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(mask, row[0] + at));
    all = _mm512_inserti32x4(all, _mm_maskz_loadu_epi8(mask, row[1] + at), 1);
    all = _mm512_inserti32x4(all, _mm_maskz_loadu_epi8(mask, row[2] + at), 2);
    all = _mm512_inserti32x4(all, _mm_maskz_loadu_epi8(mask, row[3] + at), 3);
    const __m512i columns = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(columns, all), bytes);
}

// total += 4-way dot products. Written out because compilers copy accumulators of the intrinsic and run out of registers.
WITH_VNNI inline __attribute__((always_inline)) void add_dots(__m512i& total, __m512i bytes, __m512i weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(bytes), "v"(weights));
}

inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1); }

// Wide: the first 64 columns at once (`Whole`: all of them there); Narrow: vectors of 16 columns after them, the last
// one with `columns` % 16 of them.
template <int Wide, bool Whole, int Narrow>
WITH_VNNI void tile_vnni(const uint16_t* index, const int8_t* value, size_t groups, const uint8_t* a, size_t stride,
                         size_t columns, const int32_t* first, int32_t* sums, size_t to) {
    constexpr int kVectors = 4 * Wide + Narrow;
    const __mmask64 mask = columns >= 64 ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
    const __mmask16 last = first_lanes(columns - 64 * Wide - 16 * (Narrow ? Narrow - 1 : 0));
    for (size_t r = 0; r < kRows; ++r)
        for (size_t c = 0; c < columns; c += 16) __builtin_prefetch(sums + r * to + c, 1);
    __m512i total[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) total[r][v] = _mm512_set1_epi32(first[r]);
    for (size_t g = 0; g < groups; ++g, index += 4, value += 16) {
        const uint8_t* const row[4] = {a + index[0] * stride, a + index[1] * stride, a + index[2] * stride,
                                       a + index[3] * stride};
        __m512i in[kVectors];
        if constexpr (Wide == 1) {
            __m512i wide[4];
            interleave_64(row, mask, Whole, wide);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) in[v] = wide[v];
        }
#pragma GCC unroll 3
        for (int v = 0; v < Narrow; ++v)
            in[4 * Wide + v] = interleave_16(row, 64 * Wide + 16 * v, v + 1 == Narrow ? last : __mmask16(0xffff));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            int32_t four;
            std::memcpy(&four, value + 4 * r, 4);
            const __m512i weights = _mm512_set1_epi32(four);
#pragma GCC unroll 6
            for (int v = 0; v < kVectors; ++v) add_dots(total[r][v], in[v], weights);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        int32_t* out = sums + r * to;
        if constexpr (Wide == 1) {
            const __m512i a01 = _mm512_shuffle_i32x4(total[r][0], total[r][1], 0x44);
            const __m512i b01 = _mm512_shuffle_i32x4(total[r][0], total[r][1], 0xee);
            const __m512i a23 = _mm512_shuffle_i32x4(total[r][2], total[r][3], 0x44);
            const __m512i b23 = _mm512_shuffle_i32x4(total[r][2], total[r][3], 0xee);
            const __m512i ordered[4] = {_mm512_shuffle_i32x4(a01, a23, 0x88), _mm512_shuffle_i32x4(a01, a23, 0xdd),
                                        _mm512_shuffle_i32x4(b01, b23, 0x88), _mm512_shuffle_i32x4(b01, b23, 0xdd)};
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
                if (Whole)
                    _mm512_storeu_si512(out + 16 * v, ordered[v]);
                else
                    _mm512_mask_storeu_epi32(out + 16 * v, static_cast<__mmask16>(mask >> (16 * v)), ordered[v]);
            }
        }
#pragma GCC unroll 3
        for (int v = 0; v < Narrow; ++v)
            _mm512_mask_storeu_epi32(out + 64 * Wide + 16 * v, v + 1 == Narrow ? last : __mmask16(0xffff),
                                     total[r][4 * Wide + v]);
    }
}

WITH_VNNI void tile_of_vnni(const uint16_t* index, const int8_t* value, size_t groups, const uint8_t* a, size_t stride,
                            size_t columns, const int32_t* first, int32_t* sums, size_t to) {
    static constexpr Tile kNarrow[] = {tile_vnni<0, false, 1>, tile_vnni<0, false, 2>, tile_vnni<0, false, 3>,
                                       tile_vnni<1, false, 0>};
    static constexpr Tile kWide[] = {tile_vnni<1, true, 0>, tile_vnni<1, true, 1>, tile_vnni<1, true, 2>};
    const Tile tile = columns < 64 ? kNarrow[(columns + 15) / 16 - 1] : kWide[(columns - 64 + 15) / 16];
    tile(index, value, groups, a, stride, columns, first, sums, to);
}
#endif

std::string best_path() {
    if (cpu().vnni) return "vnni";
    return cpu().avx2 ? "avx2" : "portable";
}

Tile tile_of(const std::string& path) {
    if (path == "portable") return tile_portable;
#if defined(__x86_64__)
    if (path == "vnni" && cpu().vnni) return tile_of_vnni;
    if (path == "avx2" && cpu().avx2) return tile_avx2;
#endif
    throw std::invalid_argument("a path this CPU has not got");
}

// ---- what follows the sums ----------------------------------------------------------------------------------------

// e^x for x <= 88; relative error 2e-7 (reduction to |r| <= ln 2 / 2, Taylor to the sixth power).
inline __attribute__((always_inline)) float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;  // NaN too
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float n = (x * 1.44269504f + rounder) - rounder;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f +
                    r * 1.38888889e-3f)))));
    return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// x Phi(x) with erf by Abramowitz and Stegun 7.1.26, whose absolute error is 1.5e-7.
inline __attribute__((always_inline)) float gelu(float x) {
    const float z = (x < 0 ? -x : x) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * p * exponential(-z * z);  // Phi(-|x|)
    return x * (x < 0 ? tail : 1.0f - tail);
}

inline __attribute__((always_inline)) int32_t rounded(float x, float inverse, float zero, float low, float high) {
    float y = x * inverse + zero;
    y = y > low ? y : low;  // NaN too
    y = y < high ? y : high;
    return static_cast<int32_t>((y + 12582912.0f) - 12582912.0f);
}

enum class Kind { kInt32, kFloat, kUnsigned, kSigned };

struct Epilogue {
    const int32_t* first;   // per output (padded to 4): what sums start from
    const float* scale;     // per output
    const float* bias;      // per output
    const float* add;       // as the result, or null
    bool gelu;
    Kind kind;
    float inverse, zero;    // of the rounding
    void* out;
    float *mean, *spread;   // (chunks of block rows, columns of all slabs) statistics down the columns, or null
};

BITWRIGHT_CLONES void scaled_row(const int32_t* sums, size_t columns, float scale, float bias, const float* add,
                                 bool with_gelu, float* out) {
    if (add)
        for (size_t c = 0; c < columns; ++c) out[c] = (static_cast<float>(sums[c]) * scale + bias) + add[c];
    else
        for (size_t c = 0; c < columns; ++c) out[c] = static_cast<float>(sums[c]) * scale + bias;
    if (with_gelu)
        for (size_t c = 0; c < columns; ++c) out[c] = gelu(out[c]);
}

BITWRIGHT_CLONES void rounded_row(const float* x, size_t columns, float inverse, float zero, bool is_signed,
                                  uint8_t* out) {
    const float low = is_signed ? -128.0f : 0.0f, high = is_signed ? 127.0f : 255.0f;
    for (size_t c = 0; c < columns; ++c) out[c] = static_cast<uint8_t>(rounded(x[c], inverse, zero, low, high));
}

// Merges one block row of `rows` outputs into mean and sum of squared differences of `seen` outputs (Chan et al.).
BITWRIGHT_CLONES void merge_statistics(const float* x, size_t stride, size_t rows, size_t columns, size_t seen,
                                       float* mean, float* spread) {
    const float count = static_cast<float>(rows), before = static_cast<float>(seen);
    const float weight = count / (before + count), product = before * weight;
    const float *x0 = x, *x1 = x + stride, *x2 = x + 2 * stride, *x3 = x + 3 * stride;
    if (rows == 4) {
        for (size_t c = 0; c < columns; ++c) {
            const float own = ((x0[c] + x1[c]) + (x2[c] + x3[c])) * 0.25f, difference = own - mean[c];
            const float d0 = x0[c] - own, d1 = x1[c] - own, d2 = x2[c] - own, d3 = x3[c] - own;
            mean[c] += difference * weight;
            spread[c] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + difference * difference * product;
        }
        return;
    }
    for (size_t c = 0; c < columns; ++c) {
        float sum = 0, squares = 0;
        for (size_t r = 0; r < rows; ++r) sum += x[r * stride + c];
        const float own = sum / count;
        for (size_t r = 0; r < rows; ++r) squares += (x[r * stride + c] - own) * (x[r * stride + c] - own);
        const float difference = own - mean[c];
        mean[c] += difference * weight;
        spread[c] += squares + difference * difference * product;
    }
}

struct Weights {
    const int64_t* start;   // groups before each block row
    const uint16_t* index;
    const int8_t* value;
    size_t m, k;
    size_t blocks() const { return (m + kRows - 1) / kRows; }
};

struct Layout {
    size_t slabs, width, columns;  // columns: of all slabs, the last of them perhaps not full
    size_t of(size_t slab) const { return std::min(width, columns - slab * width); }
};

struct Place {
    size_t slab, column, columns;
};

std::vector<Place> places_of(const Layout& layout) {
    std::vector<Place> places;
    for (size_t slab = 0; slab < layout.slabs; ++slab)
        for (size_t column = 0, count; column < layout.of(slab); column += count)
            places.push_back({slab, column, count = tile_columns(layout.of(slab) - column)});
    return places;
}

// All block rows of a chunk at one place.
void run_piece(Tile tile, const Weights& w, const Layout& layout, const Place& place, size_t chunk, const uint8_t* a,
               const Epilogue& then) {
    const uint8_t* in = a + place.slab * w.k * layout.width + place.column;
    const size_t last = std::min(w.blocks(), (chunk + 1) * kChunk);
    size_t seen = 0;
    const size_t at = chunk * layout.slabs * layout.width + place.slab * layout.width + place.column;
    for (size_t block = chunk * kChunk; block < last; ++block) {
        const size_t groups = w.start[block + 1] - w.start[block], rows = std::min(kRows, w.m - block * kRows);
        const uint16_t* index = w.index + w.start[block] * kGroup;
        const int8_t* value = w.value + w.start[block] * kRows * kGroup;
        const size_t offset = (place.slab * w.m + block * kRows) * layout.width + place.column;
        if (then.kind == Kind::kInt32 && rows == kRows) {
            tile(index, value, groups, in, layout.width, place.columns, then.first + block * kRows,
                 static_cast<int32_t*>(then.out) + offset, layout.width);
            continue;
        }
        alignas(64) int32_t sums[kRows * kColumns];
        alignas(64) float real[kRows * kColumns];
        tile(index, value, groups, in, layout.width, place.columns, then.first + block * kRows, sums, kColumns);
        for (size_t r = 0; r < rows; ++r) {
            const size_t row = offset + r * layout.width;
            if (then.kind == Kind::kInt32) {
                std::copy_n(sums + r * kColumns, place.columns, static_cast<int32_t*>(then.out) + row);
                continue;
            }
            float* to = then.kind == Kind::kFloat ? static_cast<float*>(then.out) + row : real + r * kColumns;
            scaled_row(sums + r * kColumns, place.columns, then.scale[block * kRows + r], then.bias[block * kRows + r],
                       then.add ? then.add + row : nullptr, then.gelu, to);
            if (then.kind != Kind::kFloat)
                rounded_row(to, place.columns, then.inverse, then.zero, then.kind == Kind::kSigned,
                            static_cast<uint8_t*>(then.out) + row);
        }
        if (then.mean) {
            merge_statistics(static_cast<float*>(then.out) + offset, layout.width, rows, place.columns, seen,
                             then.mean + at, then.spread + at);
            seen += rows;
        }
    }
}

BITWRIGHT_CLONES void normalise_row(float* x, const float* mean, const float* inverse_deviation, size_t columns,
                                    float gain, float offset, float inverse, float zero, bool is_signed, uint8_t* out) {
    for (size_t c = 0; c < columns; ++c) x[c] = (x[c] - mean[c]) * inverse_deviation[c] * gain + offset;
    if (!out) return;
    const float low = is_signed ? -128.0f : 0.0f, high = is_signed ? 127.0f : 255.0f;
    for (size_t c = 0; c < columns; ++c) out[c] = static_cast<uint8_t>(rounded(x[c], inverse, zero, low, high));
}

// ---- attention ----------------------------------------------------------------------------------------------------

// Sums (keys, 64), the first `columns` of them, to exponentials of scale * (sum - largest of the column) and their sums
// down the columns.
BITWRIGHT_CLONES void exponentials(const int32_t* sums, size_t keys, size_t columns, float scale, float* out,
                                   float* total) {
    int32_t most[64];
    std::copy_n(sums, 64, most);
    for (size_t k = 1; k < keys; ++k)
        for (size_t c = 0; c < columns; ++c) most[c] = sums[k * 64 + c] > most[c] ? sums[k * 64 + c] : most[c];
    std::fill_n(total, 64, 0.0f);
    for (size_t k = 0; k < keys; ++k)
        for (size_t c = 0; c < columns; ++c) {
            const float e = exponential(static_cast<float>(sums[k * 64 + c] - most[c]) * scale);
            out[k * 64 + c] = e;
            total[c] += e;
        }
}

BITWRIGHT_CLONES void probabilities(const float* e, size_t keys, size_t columns, const float* total, uint8_t* out) {
    float factor[64];
    for (size_t c = 0; c < columns; ++c) factor[c] = 255.0f / total[c];
    for (size_t k = 0; k < keys; ++k)
        for (size_t c = 0; c < columns; ++c)
            out[k * 64 + c] = static_cast<uint8_t>(rounded(e[k * 64 + c], factor[c], 0, 0, 255));
}

// Four rows of `count` <= 4 bytes, column by column.
inline void interleave_4x4(const int8_t* rows, size_t stride, size_t count, int8_t* out) {
#if defined(__x86_64__)
    if (count == 4) {
        __m128i row[4];
        for (size_t r = 0; r < 4; ++r) {
            int32_t four;
            std::memcpy(&four, rows + r * stride, 4);
            row[r] = _mm_cvtsi32_si128(four);
        }
        const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), high = _mm_unpacklo_epi8(row[2], row[3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(low, high));
        return;
    }
#endif
    for (size_t r = 0; r < 4; ++r)
        for (size_t i = 0; i < count; ++i) out[i * 4 + r] = rows[r * stride + i];
}

BITWRIGHT_CLONES void subtract_scaled(const int8_t* values, size_t count, int32_t scale, int32_t* to) {
    for (size_t i = 0; i < count; ++i) to[i] -= scale * values[i];
}

struct Heads {
    size_t heads, channels, width;  // width of a slab
    size_t row(size_t slab, size_t head, size_t channel) const {
        return ((slab * heads + head) * channels + channel) * width;
    }
};

struct Scratch {
    std::vector<int8_t> keys, values;
    std::vector<int32_t> first, sums;
    std::vector<float> real;
    std::vector<uint8_t> probabilities;
};

// One sequence and head: columns [begin, begin + length) of slab `slab`.
void attend(Tile tile, const Heads& heads, size_t slab, size_t begin, size_t length, size_t head, const uint8_t* q,
            int32_t q_zero, const int8_t* k, const int8_t* v, float score_scale, float inverse, float zero,
            const uint16_t* iota, Scratch& at, uint8_t* out) {
    const size_t d = heads.channels, d_groups = d / 4, blocks = (length + 3) / 4, padded = blocks * 4;
    at.keys.assign(padded * d, 0);
    at.values.assign(d * padded, 0);
    at.first.assign(std::max(padded, d), 0);
    at.sums.resize(padded * 64);
    at.real.resize(padded * 64);
    at.probabilities.resize(padded * 64);
    std::fill(at.probabilities.begin() + static_cast<std::ptrdiff_t>(length * 64), at.probabilities.end(), uint8_t{0});
    for (size_t c = 0; c < d; c += 4) {
        const int8_t* rows = k + heads.row(slab, head, c) + begin;
        for (size_t key = 0; key < length; key += 4)
            interleave_4x4(rows + key, heads.width, std::min<size_t>(4, length - key),
                           at.keys.data() + (key / 4 * d_groups + c / 4) * 16);
        for (size_t r = 0; r < 4; ++r) subtract_scaled(rows + r * heads.width, length, q_zero, at.first.data());
    }
    for (size_t c = 0; c < d; ++c) {
        const int8_t* from = v + heads.row(slab, head, c) + begin;
        int8_t* to = at.values.data() + c / 4 * blocks * 16 + c % 4 * 4;
        size_t key = 0;
        for (; key + 4 <= length; key += 4) std::memcpy(to + key * 4, from + key, 4);
        if (key < length) std::memcpy(to + key * 4, from + key, length - key);
    }
    const int32_t zeros[4] = {};
    for (size_t query = 0; query < length; query += 64) {
        const size_t count = std::min<size_t>(64, length - query);
        const uint8_t* from = q + heads.row(slab, head, 0) + begin + query;
        if (count < 64) std::fill(at.sums.begin(), at.sums.end(), 0);
        for (size_t block = 0; block < blocks; ++block)
            tile(iota, at.keys.data() + block * d * 4, d_groups, from, heads.width, count, at.first.data() + block * 4,
                 at.sums.data() + block * 256, 64);
        float total[64];
        const size_t columns = (count + 15) / 16 * 16;
        exponentials(at.sums.data(), length, columns, score_scale, at.real.data(), total);
        probabilities(at.real.data(), length, columns, total, at.probabilities.data());
        for (size_t c = 0; c < d; c += 4) {
            int32_t sums[4 * 64];
            tile(iota, at.values.data() + c * padded, blocks, at.probabilities.data(), 64, count, zeros, sums, 64);
            for (size_t r = 0; r < 4; ++r) {
                float real[64];
                for (size_t i = 0; i < count; ++i) real[i] = static_cast<float>(sums[r * 64 + i]);
                rounded_row(real, count, inverse, zero, false, out + heads.row(slab, head, c + r) + begin + query);
            }
        }
    }
}

BITWRIGHT_CLONES void attend_float(const Heads& heads, size_t slab, size_t begin, size_t length, size_t head,
                                   const float* q, const float* k, const float* v, float scale, Scratch& at, float* out) {
    at.real.resize(length * 64);
    float* e = at.real.data();
    for (size_t query = 0; query < length; query += 64) {
        const size_t count = std::min<size_t>(64, length - query);
        float most[64], total[64] = {};
        for (size_t key = 0; key < length; ++key) {
            float score[64] = {};
            for (size_t c = 0; c < heads.channels; ++c) {
                const float weight = k[heads.row(slab, head, c) + begin + key] * scale;
                const float* row = q + heads.row(slab, head, c) + begin + query;
                for (size_t i = 0; i < count; ++i) score[i] += weight * row[i];
            }
            for (size_t i = 0; i < count; ++i) {
                e[key * 64 + i] = score[i];
                most[i] = key == 0 || score[i] > most[i] ? score[i] : most[i];
            }
        }
        for (size_t key = 0; key < length; ++key)
            for (size_t i = 0; i < count; ++i) total[i] += e[key * 64 + i] = exponential(e[key * 64 + i] - most[i]);
        for (size_t c = 0; c < heads.channels; ++c) {
            float sum[64] = {};
            const float* row = v + heads.row(slab, head, c) + begin;
            for (size_t key = 0; key < length; ++key)
                for (size_t i = 0; i < count; ++i) sum[i] += row[key] * e[key * 64 + i];
            float* to = out + heads.row(slab, head, c) + begin + query;
            for (size_t i = 0; i < count; ++i) to[i] = sum[i] / total[i];
        }
    }
}

BITWRIGHT_CLONES uint16_t largest(const uint16_t* values, size_t count) {
    uint16_t most = 0;
    for (size_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
    return most;
}

using Sequences = Array<const int64_t, 2>;  // (sequences, 3): slab, first column, columns

void check_sequences(const Sequences& sequences, size_t slabs, size_t width) {
    if (sequences.shape(1) != 3) throw std::invalid_argument("sequences are (slab, first column, columns)");
    for (size_t i = 0; i < sequences.shape(0); ++i) {
        const int64_t* each = sequences.data() + 3 * i;
        const auto most = static_cast<int64_t>(width);
        if (each[0] < 0 || each[0] >= static_cast<int64_t>(slabs) || each[1] < 0 || each[2] < 1 || each[1] > most ||
            each[2] > most - each[1] || each[2] > 65532)
            throw std::invalid_argument("a sequence outside of its slab");
    }
}

}  // namespace

static void block_sparse_matmul(Array<const int64_t, 1> start, Array<const uint16_t, 1> index,
                                Array<const int8_t, 1> value, size_t m, size_t columns, Array<const uint8_t, 3> a,
                                Array<const int32_t, 1> first, Array<const float, 1> scale, Array<const float, 1> bias,
                                Array<const float, 3> add, bool with_gelu, float inverse, float zero,
                                Array<float, 3> statistics, const std::string& path, int threads,
                                nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu> out) {
    const Weights w{start.data(), index.data(), value.data(), m, a.shape(1)};
    const Layout layout{a.shape(0), a.shape(2), columns};
    Epilogue then{first.data(), scale.data(), bias.data(), add.size() ? add.data() : nullptr, with_gelu, Kind::kInt32,
                  inverse, zero, out.data(), nullptr, nullptr};
    if (out.dtype() == nb::dtype<float>()) then.kind = Kind::kFloat;
    else if (out.dtype() == nb::dtype<uint8_t>()) then.kind = Kind::kUnsigned;
    else if (out.dtype() == nb::dtype<int8_t>()) then.kind = Kind::kSigned;
    else if (out.dtype() != nb::dtype<int32_t>()) throw std::invalid_argument("results of another type");
    const size_t blocks = w.blocks(), chunks = (blocks + kChunk - 1) / kChunk, all = layout.slabs * layout.width;
    if (start.size() != blocks + 1 || first.size() != blocks * kRows || w.start[0] != 0)
        throw std::invalid_argument("shapes differ");
    for (size_t b = 0; b < blocks; ++b)
        if (w.start[b + 1] < w.start[b]) throw std::invalid_argument("block rows out of order");
    const auto groups = static_cast<size_t>(w.start[blocks]);
    if (index.size() != groups * kGroup || value.size() != groups * kRows * kGroup)
        throw std::invalid_argument("groups are missing");
    if (index.size() && largest(w.index, index.size()) >= w.k)
        throw std::invalid_argument("an index outside of the activations");
    if (columns > all || columns + layout.width <= all || out.shape(0) != layout.slabs || out.shape(1) != m ||
        out.shape(2) != layout.width)
        throw std::invalid_argument("shapes differ");
    if (then.kind != Kind::kInt32 && (scale.size() != m || bias.size() != m)) throw std::invalid_argument("shapes differ");
    if (then.add && add.size() != layout.slabs * m * layout.width) throw std::invalid_argument("shapes differ");
    if (statistics.size()) {
        if (statistics.shape(0) != 2 || statistics.shape(1) != chunks || statistics.shape(2) != all ||
            then.kind != Kind::kFloat)
            throw std::invalid_argument("shapes differ");
        then.mean = statistics.data();
        then.spread = then.mean + chunks * all;
    }
    const Tile tile = tile_of(path);
    nb::gil_scoped_release release;
    const std::vector<Place> places = places_of(layout);
    if (then.mean) std::fill_n(then.mean, 2 * chunks * all, 0.0f);
    // some microseconds of work at a time: less is not worth waking a thread
    const size_t grain = std::max<size_t>(1, kLeastGroups * chunks / std::max<size_t>(1, groups));
    parallel_for(places.size() * chunks, grain, threads, [&](size_t begin, size_t end, int) {
        for (size_t piece = begin; piece < end; ++piece)
            run_piece(tile, w, layout, places[piece / chunks], piece % chunks, a.data(), then);
    });
}

// x (slabs, m, width) float32 in place from the statistics of block_sparse_matmul, and rounded to `codes` where given.
static void normalise_columns(Array<float, 3> x, Array<const float, 3> statistics, Array<const float, 1> gain,
                              Array<const float, 1> offset, float epsilon, float inverse, float zero, bool is_signed,
                              Array<uint8_t, 3> codes, int threads) {
    const size_t slabs = x.shape(0), m = x.shape(1), width = x.shape(2), all = slabs * width;
    const size_t chunks = statistics.shape(1), rows = kChunk * kRows;
    if (statistics.shape(0) != 2 || statistics.shape(2) != all || chunks != (m + rows - 1) / rows || gain.size() != m ||
        offset.size() != m || (codes.size() && codes.size() != x.size()))
        throw std::invalid_argument("shapes differ");
    nb::gil_scoped_release release;
    std::vector<float> mean(all, 0.0f), deviation(all, 0.0f);
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
        const float before = static_cast<float>(chunk * rows), count = static_cast<float>(std::min(rows, m - chunk * rows));
        const float weight = count / (before + count);
        const float* own = statistics.data() + chunk * all;
        const float* spread = own + chunks * all;
        for (size_t c = 0; c < all; ++c) {
            const float difference = own[c] - mean[c];
            mean[c] += difference * weight;
            deviation[c] += spread[c] + difference * difference * before * weight;
        }
    }
    for (float& each : deviation) each = 1.0f / std::sqrt(each / static_cast<float>(m) + epsilon);
    parallel_for(slabs * m, 16, threads, [&](size_t begin, size_t end, int) {
        for (size_t row = begin; row < end; ++row) {
            const size_t slab = row / m, r = row % m;
            normalise_row(x.data() + row * width, mean.data() + slab * width, deviation.data() + slab * width, width,
                          gain.data()[r], offset.data()[r], inverse, zero, is_signed,
                          codes.size() ? codes.data() + row * width : nullptr);
        }
    });
}

static void transposed_attention(Array<const uint8_t, 3> q, int32_t q_zero, Array<const int8_t, 3> k,
                                 Array<const int8_t, 3> v, Sequences sequences, size_t heads, float score_scale,
                                 float inverse, float zero, const std::string& path, int threads,
                                 Array<uint8_t, 3> out) {
    const Heads shape{heads, heads ? q.shape(1) / heads : 0, q.shape(2)};
    if (!heads || q.shape(1) % heads || shape.channels % 4 || k.size() != q.size() || v.size() != q.size() ||
        out.size() != q.size() || k.shape(1) != q.shape(1) || v.shape(1) != q.shape(1) || out.shape(1) != q.shape(1) ||
        k.shape(0) != q.shape(0) || v.shape(0) != q.shape(0) || out.shape(0) != q.shape(0))
        throw std::invalid_argument("shapes differ");
    check_sequences(sequences, q.shape(0), q.shape(2));
    const Tile tile = tile_of(path);
    nb::gil_scoped_release release;
    std::vector<uint16_t> iota(std::max<size_t>(shape.width, shape.channels) + 4);
    std::iota(iota.begin(), iota.end(), uint16_t{0});
    std::vector<Scratch> scratch(threads);
    parallel_for(sequences.shape(0) * heads, 1, threads, [&](size_t begin, size_t end, int thread) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t* each = sequences.data() + i / heads * 3;
            attend(tile, shape, each[0], each[1], each[2], i % heads, q.data(), q_zero, k.data(), v.data(), score_scale,
                   inverse, zero, iota.data(), scratch[thread], out.data());
        }
    });
}

static void transposed_attention_float(Array<const float, 3> q, Array<const float, 3> k, Array<const float, 3> v,
                                       Sequences sequences, size_t heads, float scale, int threads,
                                       Array<float, 3> out) {
    const Heads shape{heads, heads ? q.shape(1) / heads : 0, q.shape(2)};
    if (!heads || q.shape(1) % heads || k.size() != q.size() || v.size() != q.size() || out.size() != q.size() ||
        k.shape(1) != q.shape(1) || v.shape(1) != q.shape(1) || out.shape(1) != q.shape(1) ||
        k.shape(0) != q.shape(0) || v.shape(0) != q.shape(0) || out.shape(0) != q.shape(0))
        throw std::invalid_argument("shapes differ");
    check_sequences(sequences, q.shape(0), q.shape(2));
    nb::gil_scoped_release release;
    std::vector<Scratch> scratch(threads);
    parallel_for(sequences.shape(0) * heads, 1, threads, [&](size_t begin, size_t end, int thread) {
        for (size_t i = begin; i < end; ++i) {
            const int64_t* each = sequences.data() + i / heads * 3;
            attend_float(shape, each[0], each[1], each[2], i % heads, q.data(), k.data(), v.data(), scale,
                         scratch[thread], out.data());
        }
    });
}

// Groups of each block row, and with `index` and `value` given their contents, from weights (m, k).
static void block_sparse_pack(Array<const int8_t, 2> w, Array<int64_t, 1> start, Array<uint16_t, 1> index,
                              Array<int8_t, 1> value) {
    const size_t m = w.shape(0), k = w.shape(1), blocks = (m + kRows - 1) / kRows;
    if (start.size() != blocks + 1) throw std::invalid_argument("shapes differ");
    const bool count = index.size() == 0;
    int64_t* starts = start.data();
    if (!count && (index.size() != static_cast<size_t>(starts[blocks]) * kGroup ||
                   value.size() != static_cast<size_t>(starts[blocks]) * kGroup * kRows))
        throw std::invalid_argument("groups are missing");
    nb::gil_scoped_release release;
    std::fill(index.data(), index.data() + index.size(), uint16_t{0});
    std::fill(value.data(), value.data() + value.size(), int8_t{0});
    if (count) starts[0] = 0;
    for (size_t block = 0; block < blocks; ++block) {
        const size_t rows = std::min(kRows, m - block * kRows);
        const int8_t* from = w.data() + block * kRows * k;
        size_t found = 0;
        for (size_t i = 0; i < k; ++i) {
            int8_t any = 0;
            for (size_t r = 0; r < rows; ++r) any = static_cast<int8_t>(any | from[r * k + i]);
            if (!any) continue;
            if (!count) {
                const size_t group = starts[block] + found / kGroup, place = found % kGroup;
                index.data()[group * kGroup + place] = static_cast<uint16_t>(i);
                for (size_t r = 0; r < rows; ++r) value.data()[(group * kRows + r) * kGroup + place] = from[r * k + i];
            }
            ++found;
        }
        if (count) starts[block + 1] = starts[block] + static_cast<int64_t>((found + kGroup - 1) / kGroup);
    }
}

void bind_block_sparse_matmul(nb::module_& m) {
    m.def("block_sparse_path", &best_path);
    m.def("block_sparse_pack", &block_sparse_pack, nb::arg("w"), nb::arg("start"), nb::arg("index"), nb::arg("value"));
    m.def("block_sparse_matmul", &block_sparse_matmul, nb::arg("start"), nb::arg("index"), nb::arg("value"),
          nb::arg("m"), nb::arg("columns"), nb::arg("a"), nb::arg("first"), nb::arg("scale"), nb::arg("bias"),
          nb::arg("add"), nb::arg("gelu"), nb::arg("inverse"), nb::arg("zero"), nb::arg("statistics"), nb::arg("path"),
          nb::arg("threads"), nb::arg("out"));
    m.def("normalise_columns", &normalise_columns, nb::arg("x"), nb::arg("statistics"), nb::arg("gain"),
          nb::arg("offset"), nb::arg("epsilon"), nb::arg("inverse"), nb::arg("zero"), nb::arg("is_signed"),
          nb::arg("codes"), nb::arg("threads"));
    m.def("transposed_attention", &transposed_attention, nb::arg("q"), nb::arg("q_zero"), nb::arg("k"), nb::arg("v"),
          nb::arg("sequences"), nb::arg("heads"), nb::arg("score_scale"), nb::arg("inverse"), nb::arg("zero"),
          nb::arg("path"), nb::arg("threads"), nb::arg("out"));
    m.def("transposed_attention_float", &transposed_attention_float, nb::arg("q"), nb::arg("k"), nb::arg("v"),
          nb::arg("sequences"), nb::arg("heads"), nb::arg("scale"), nb::arg("threads"), nb::arg("out"));
}

}  // namespace bitwright
