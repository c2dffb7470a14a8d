// Products of unstructured sparse weights with few columns of activations (arXiv 2309.10285): weights stay compressed in
// memory and become dense tiles on chip. Three forms of half-precision weights (m, k), all padded to 128 x 64:
// - words: tiles of 128 x 64; every weight a 32-bit word, its half-precision number below and its place above, row * 64 +
//   (column ^ (row % 8 * 8)); padded to 4 words; optionally in an order in which 32 lanes write to different banks;
// - bitmap: of 16 rows, one bit per weight for each column, and the numbers of the set bits;
// - rows: CSR of blocks of 512 columns with 16-bit columns, multiplied as it is (for more columns of activations).
// Activations (k, n) and results (n, m) are float32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header of AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

constexpr size_t kTileRows = 128, kTileColumns = 64, kBanks = 32, kLanes = 32, kVector = 4;
constexpr size_t kRows = 16;           // rows of a vector of float32
constexpr size_t kSpare = 32;          // numbers and columns behind the last that vectors may read
constexpr size_t kMost = 16;           // columns of activations of a pass
constexpr size_t kRowsColumns = 512;   // columns of a block of the form of rows

inline size_t swizzled(size_t row, size_t column) { return row * kTileColumns + (column ^ (row % 8 * 8)); }
inline size_t bank_of(size_t place) { return place % kTileColumns / 2; }

float float_of(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
    if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
}

// ---- packing ------------------------------------------------------------------------------------------------------

// Words of one tile in the order of memory.
std::vector<uint32_t> words_of(const uint16_t* tile, size_t stride, bool reorder) {
    std::array<std::vector<uint32_t>, kBanks> lists;
    std::array<std::vector<uint16_t>, kBanks> zeros;  // places, of the last rows first
    std::vector<uint32_t> plain;
    for (size_t row = 0; row < kTileRows; ++row)
        for (size_t column = 0; column < kTileColumns; ++column) {
            const size_t place = swizzled(row, column);
            const uint16_t value = tile[row * stride + column];
            const uint32_t word = static_cast<uint32_t>(place) << 16 | value;
            if (!value) zeros[bank_of(place)].push_back(static_cast<uint16_t>(place));
            else if (reorder) lists[bank_of(place)].push_back(word);
            else plain.push_back(word);
        }
    size_t count = plain.size();
    for (const auto& list : lists) count += list.size();
    std::array<size_t, kBanks> length{};
    if (!reorder)
        for (uint32_t word : plain) ++length[bank_of(word >> 16)];
    else
        for (size_t b = 0; b < kBanks; ++b) length[b] = lists[b].size();
    for (; count % kVector; ++count) {  // zeros of the bank with the fewest words; some bank is not full, so has one
        const size_t bank = std::min_element(length.begin(), length.end()) - length.begin();
        const uint32_t word = static_cast<uint32_t>(zeros[bank].back()) << 16;
        zeros[bank].pop_back();
        ++length[bank];
        (reorder ? lists[bank] : plain).push_back(word);
    }
    if (!reorder) return plain;
    std::vector<uint32_t> words(count);
    const size_t vectors = count / kVector, rounds = vectors / kLanes, tail = vectors % kLanes;
    std::array<size_t, kBanks> taken{};
    const auto next = [&] {
        size_t longest = 0;
        for (size_t b = 1; b < kBanks; ++b)
            if (lists[b].size() - taken[b] > lists[longest].size() - taken[longest]) longest = b;
        return lists[longest][taken[longest]++];
    };
    const auto fill = [&](size_t round, size_t lanes) {
        for (size_t v = 0; v < kVector; ++v)
            for (size_t lane = 0; lane < lanes; ++lane) words[round * kLanes * kVector + lane * kVector + v] = next();
    };
    fill(rounds, tail);
    for (size_t round = 0; round < rounds; ++round) fill(round, kLanes);
    return words;
}

// ---- products -----------------------------------------------------------------------------------------------------

struct Operands {
    const float* b;  // (k, n)
    size_t n;
    float* out;      // (n, m) or its part of a split
    size_t m;
};

// Dense tile in halves: [row / 16][column][row % 16]. Places wrap within the tile: none is written outside of it.
void spread_words(const uint32_t* words, size_t count, uint16_t* tile) {
    for (size_t i = 0; i < count; ++i) {
        const uint32_t place = words[i] >> 16 & (kTileRows * kTileColumns - 1), row = place / kTileColumns;
        const uint32_t column = place % kTileColumns ^ row % 8 * 8;
        tile[row / kRows * (kTileColumns * kRows) + column * kRows + row % kRows] = static_cast<uint16_t>(words[i]);
    }
}

// out[column of b][16 rows] += halves [k][16] by b (k, n), columns [from, from + count) of b
void add_halves_portable(const uint16_t* halves, const float* b, size_t n, size_t from, size_t count, float* out, size_t m) {
    float total[kMost][kRows];
    for (size_t j = 0; j < count; ++j) std::copy_n(out + (from + j) * m, kRows, total[j]);
    for (size_t k = 0; k < kTileColumns; ++k) {
        float w[kRows];
        for (size_t r = 0; r < kRows; ++r) w[r] = float_of(halves[k * kRows + r]);
        for (size_t j = 0; j < count; ++j)
            for (size_t r = 0; r < kRows; ++r) total[j][r] += w[r] * b[k * n + from + j];
    }
    for (size_t j = 0; j < count; ++j) std::copy_n(total[j], kRows, out + (from + j) * m);
}

void bitmap_portable(const uint16_t* masks, const uint16_t* values, size_t columns, const Operands& to, size_t from,
                     size_t count, float* out) {
    float total[kMost][kRows] = {};
    for (size_t k = 0; k < columns; ++k)
        for (uint32_t mask = masks[k]; mask; mask &= mask - 1) {
            const size_t row = std::countr_zero(mask);
            const float w = float_of(*values++);
            for (size_t j = 0; j < count; ++j) total[j][row] += w * to.b[k * to.n + from + j];
        }
    for (size_t j = 0; j < count; ++j) std::copy_n(total[j], kRows, out + (from + j) * to.m);
}

// One row of a block: totals[n] += values by the rows of b that `index` names
void row_portable(const uint16_t* index, const uint16_t* values, size_t count, const float* b, size_t n, float* totals) {
    for (size_t i = 0; i < count; ++i) {
        const float w = float_of(values[i]);
        const float* row = b + index[i] % kRowsColumns * n;
        for (size_t j = 0; j < n; ++j) totals[j] += w * row[j];
    }
}

#if defined(__x86_64__)
#define BITWRIGHT_SPARSE_TARGET "avx512f,avx512bw,avx512vl,avx512dq,f16c,bmi,bmi2,popcnt"
#define WITH_AVX512 __attribute__((target(BITWRIGHT_SPARSE_TARGET)))

template <int Columns>
WITH_AVX512 void add_halves_avx512(const uint16_t* halves, const float* b, size_t n, float* out, size_t m) {
    __m512 total[Columns];
#pragma GCC unroll 16
    for (int j = 0; j < Columns; ++j) total[j] = _mm512_loadu_ps(out + j * m);
    for (size_t k = 0; k < kTileColumns; ++k) {
        const __m512 w = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + k * kRows)));
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) total[j] = _mm512_fmadd_ps(w, _mm512_set1_ps(b[k * n + j]), total[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < Columns; ++j) _mm512_storeu_ps(out + j * m, total[j]);
}

// Few columns of activations: more sums, over every Parts-th column of weights, hide the latency of additions.
template <int Columns>
WITH_AVX512 void bitmap_avx512(const uint16_t* masks, const uint16_t* values, size_t columns, const float* b, size_t n,
                               float* out, size_t m) {
    constexpr int kParts = Columns >= 8 ? 1 : Columns >= 4 ? 2 : 4;
    __m512 total[kParts][Columns];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
#pragma GCC unroll 16
        for (int j = 0; j < Columns; ++j) total[p][j] = _mm512_setzero_ps();
    for (size_t k = 0; k < columns; k += 4) {  // columns are padded to 64
        uint64_t four;
        std::memcpy(&four, masks + k, 8);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto mask = static_cast<__mmask16>(four >> (16 * i));
            const __m512 packed = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
            const __m512 w = _mm512_maskz_expand_ps(mask, packed);
            values += __builtin_popcount(mask);
#pragma GCC unroll 16
            for (int j = 0; j < Columns; ++j)
                total[i % kParts][j] = _mm512_fmadd_ps(w, _mm512_set1_ps(b[(k + i) * n + j]), total[i % kParts][j]);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < Columns; ++j) {
        __m512 sum = total[0][j];
        if constexpr (kParts >= 2) sum = _mm512_add_ps(sum, total[1][j]);
        if constexpr (kParts == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(total[2][j], total[3][j]));
        _mm512_storeu_ps(out + j * m, sum);
    }
}

template <int Vectors>
WITH_AVX512 void row_avx512(const uint16_t* index, const uint16_t* values, size_t count, const float* b, size_t n,
                            float* totals, __mmask16 last) {
    constexpr int kParts = Vectors == 1 ? 4 : 2;  // of the weights in turn: hides the latency of additions
    __m512 total[kParts][Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        total[0][v] = _mm512_maskz_loadu_ps(v + 1 == Vectors ? last : __mmask16(0xffff), totals + 16 * v);
#pragma GCC unroll 4
        for (int p = 1; p < kParts; ++p) total[p][v] = _mm512_setzero_ps();
    }
    const auto add = [&](float w, size_t column, int part) __attribute__((always_inline, target(BITWRIGHT_SPARSE_TARGET))) {
        const float* row = b + column % kRowsColumns * n;
        const __m512 weight = _mm512_set1_ps(w);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            total[part][v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(row + 16 * v), total[part][v]);
    };  // behind the row's end: numbers of the next rows, whose sums are not stored
    alignas(64) float w[16];
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        _mm512_store_ps(w, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i))));
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) add(w[j], index[i + j], j % kParts);
    }
    const auto mask = static_cast<__mmask16>((1u << (count - i)) - 1);
    _mm512_store_ps(w, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values + i)));
    for (size_t j = 0; i + j < count; j += kParts)  // behind the last: weights 0 by any row
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) add(w[j + p], index[i + j + p], p);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        __m512 sum = _mm512_add_ps(total[0][v], total[1][v]);
        if constexpr (kParts == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(total[2][v], total[3][v]));
        _mm512_mask_storeu_ps(totals + 16 * v, v + 1 == Vectors ? last : __mmask16(0xffff), sum);
    }
}

template <size_t... I>
constexpr auto halves_table(std::index_sequence<I...>) {
    return std::array{add_halves_avx512<static_cast<int>(I) + 1>...};
}
template <size_t... I>
constexpr auto bitmap_table(std::index_sequence<I...>) {
    return std::array{bitmap_avx512<static_cast<int>(I) + 1>...};
}
constexpr auto kHalves = halves_table(std::make_index_sequence<kMost>());
constexpr auto kBitmap = bitmap_table(std::make_index_sequence<kMost>());

// As spread_words; places of 16 words at a time.
WITH_AVX512 void spread_words_avx512(const uint32_t* words, size_t count, uint16_t* tile) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512i word = _mm512_loadu_si512(words + i);
        const __m512i place = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(8191));
        const __m512i row = _mm512_srli_epi32(place, 6);
        const __m512i flip = _mm512_slli_epi32(_mm512_and_si512(row, _mm512_set1_epi32(7)), 3);
        const __m512i column = _mm512_xor_si512(_mm512_and_si512(place, _mm512_set1_epi32(63)), flip);
        const __m512i block = _mm512_slli_epi32(_mm512_srli_epi32(row, 4), 10);
        const __m512i at = _mm512_add_epi32(_mm512_add_epi32(block, _mm512_slli_epi32(column, 4)),
                                            _mm512_and_si512(row, _mm512_set1_epi32(15)));
        alignas(64) uint32_t to[16];
        _mm512_store_si512(to, at);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) tile[to[j]] = static_cast<uint16_t>(words[i + j]);
    }
    spread_words(words + i, count - i, tile);
}
#endif

inline __attribute__((always_inline)) uint64_t count_bits(const uint16_t* masks, size_t columns) {
    uint64_t bits = 0;
    for (size_t c = 0; c < columns; c += 4) {
        uint64_t four;
        std::memcpy(&four, masks + c, 8);
        bits += static_cast<uint64_t>(std::popcount(four));
    }
    return bits;
}
uint64_t bits_of(const uint16_t* masks, size_t columns) { return count_bits(masks, columns); }
#if defined(__x86_64__)
WITH_AVX512 uint64_t bits_of_avx512(const uint16_t* masks, size_t columns) { return count_bits(masks, columns); }
#else
uint64_t bits_of_avx512(const uint16_t* masks, size_t columns) { return count_bits(masks, columns); }
#endif

std::string best_path() { return cpu().avx512 ? "avx512" : "portable"; }

bool vectors(const std::string& path) {
    if (path == "avx512" && cpu().avx512) return true;
    if (path != "portable") throw std::invalid_argument("a path this CPU has not got");
    return false;
}

void check_operands(Array<const float, 2> b, size_t k, Array<float, 2> out, size_t m) {
    if (b.shape(0) != k || out.shape(0) != b.shape(1) || out.shape(1) != m) throw std::invalid_argument("shapes differ");
}

}  // namespace

// Offsets in vectors of 4 words, tiles + 2 of them, and with `words` given their contents; w (m, k) are halves. Tiles
// of more than `most` words are left out (their entry in `full` is 1).
static void tiled_words_pack(Array<const uint16_t, 2> w, bool reorder, size_t most, int threads,
                             Array<uint32_t, 1> offsets, Array<uint8_t, 1> full, Array<uint32_t, 1> words) {
    const size_t rows = w.shape(0) / kTileRows, columns = w.shape(1) / kTileColumns, tiles = rows * columns;
    if (w.shape(0) % kTileRows || w.shape(1) % kTileColumns || offsets.size() != tiles + 2 || full.size() != tiles)
        throw std::invalid_argument("shapes differ");
    const bool count = words.size() == 0;
    if (!count && words.size() != size_t{offsets.data()[tiles]} * kVector) throw std::invalid_argument("shapes differ");
    nb::gil_scoped_release release;
    std::vector<size_t> counted(tiles);
    parallel_for(tiles, 4, threads, [&](size_t begin, size_t end, int) {
        for (size_t tile = begin; tile < end; ++tile) {
            const uint16_t* from = w.data() + tile / columns * kTileRows * w.shape(1) + tile % columns * kTileColumns;
            if (count) {
                size_t found = 0;
                for (size_t r = 0; r < kTileRows; ++r)
                    for (size_t c = 0; c < kTileColumns; ++c) found += from[r * w.shape(1) + c] != 0;
                found = (found + kVector - 1) / kVector * kVector;
                full.data()[tile] = found > most;
                counted[tile] = found > most ? 0 : found / kVector;
            } else if (!full.data()[tile]) {
                const std::vector<uint32_t> made = words_of(from, w.shape(1), reorder);
                std::copy(made.begin(), made.end(), words.data() + size_t{offsets.data()[tile]} * kVector);
            }
        }
    });
    if (!count) return;
    size_t total = 0;
    for (size_t tile = 0; tile < tiles; ++tile) {
        offsets.data()[tile] = static_cast<uint32_t>(total);
        total += counted[tile];
    }
    offsets.data()[tiles] = offsets.data()[tiles + 1] = static_cast<uint32_t>(total);
}

// out (splits, n, m): part s is the product over its share of the tiles along k. `dense` holds the tiles that `slot`
// (per tile, -1: none) names, halves (128, 64).
static void tiled_words_matmul(Array<const uint32_t, 1> offsets, Array<const uint32_t, 1> words,
                               Array<const int32_t, 1> slot, Array<const uint16_t, 3> dense, Array<const float, 2> b,
                               const std::string& path, int threads, Array<float, 3> out) {
    const size_t splits = out.shape(0), n = out.shape(1), m = out.shape(2), k = b.shape(0);
    const size_t strips = m / kTileRows, columns = k / kTileColumns, tiles = strips * columns;
    if (m % kTileRows || k % kTileColumns || offsets.size() != tiles + 2 || slot.size() != tiles || b.shape(1) != n ||
        !splits || size_t{offsets.data()[tiles]} * kVector != words.size() ||
        (dense.size() && (dense.shape(1) != kTileRows || dense.shape(2) != kTileColumns)))
        throw std::invalid_argument("shapes differ");
    for (size_t tile = 0; tile < tiles; ++tile)
        if (offsets.data()[tile] > offsets.data()[tile + 1] || slot.data()[tile] >= static_cast<int32_t>(dense.shape(0)))
            throw std::invalid_argument("tiles out of order");
    const bool fast = vectors(path);
    nb::gil_scoped_release release;
    const size_t each = (columns + splits - 1) / splits;
    parallel_for(strips * splits, 1, threads, [&](size_t begin, size_t end, int) {
        alignas(64) uint16_t tile[kTileRows * kTileColumns];
        for (size_t piece = begin; piece < end; ++piece) {
            const size_t strip = piece / splits, split = piece % splits;
            float* to = out.data() + split * n * m + strip * kTileRows;
            for (size_t j = 0; j < n; ++j) std::fill_n(to + j * m, kTileRows, 0.0f);
            for (size_t column = split * each; column < std::min(columns, (split + 1) * each); ++column) {
                const size_t at = strip * columns + column, first = size_t{offsets.data()[at]} * kVector;
                const size_t count = size_t{offsets.data()[at + 1]} * kVector - first;
                std::memset(tile, 0, sizeof tile);
                if (slot.data()[at] >= 0) {
                    const uint16_t* from = dense.data() + slot.data()[at] * kTileRows * kTileColumns;
                    for (size_t r = 0; r < kTileRows; ++r)
                        for (size_t c = 0; c < kTileColumns; ++c)
                            tile[r / kRows * (kTileColumns * kRows) + c * kRows + r % kRows] = from[r * kTileColumns + c];
                }
#if defined(__x86_64__)
                if (fast) spread_words_avx512(words.data() + first, count, tile);
#endif
                if (!fast) spread_words(words.data() + first, count, tile);
                const float* in = b.data() + column * kTileColumns * n;
                for (size_t r = 0; r < kTileRows / kRows; ++r)
                    for (size_t from = 0; from < n; from += kMost) {
                        const size_t some = std::min(kMost, n - from);
                        const uint16_t* halves = tile + r * kTileColumns * kRows;
#if defined(__x86_64__)
                        if (fast) kHalves[some - 1](halves, in + from, n, to + r * kRows + from * m, m);
#endif
                        if (!fast) add_halves_portable(halves, in, n, from, some, to + r * kRows, m);
                    }
            }
        }
    });
}

// Wavefronts that stores of 32 lanes need, one per 32-bit word of the busiest bank, and stores: over all tiles.
static std::pair<uint64_t, uint64_t> tiled_words_conflicts(Array<const uint32_t, 1> offsets,
                                                           Array<const uint32_t, 1> words) {
    uint64_t wavefronts = 0, stores = 0;
    for (size_t tile = 0; tile + 2 < offsets.size(); ++tile) {
        const size_t first = size_t{offsets.data()[tile]} * kVector, last = size_t{offsets.data()[tile + 1]} * kVector;
        if (first > last || last > words.size()) throw std::invalid_argument("tiles out of order");
        for (size_t round = first; round < last; round += kLanes * kVector)
            for (size_t v = 0; v < kVector; ++v) {
                std::array<std::vector<uint32_t>, kBanks> hit;
                size_t most = 0;
                for (size_t lane = 0; lane < kLanes && round + lane * kVector < last; ++lane) {
                    const uint32_t place = words.data()[round + lane * kVector + v] >> 16, word = place / 2;
                    auto& list = hit[bank_of(place)];
                    if (std::find(list.begin(), list.end(), word) == list.end()) list.push_back(word);
                    most = std::max(most, list.size());
                }
                wavefronts += most;
                ++stores;
            }
    }
    return {wavefronts, stores};
}

// Masks (m / 16, k) and, where given, the numbers of their set bits, the first of block i at start[i].
static void bitmap_pack(Array<const uint16_t, 2> w, Array<uint16_t, 2> masks, Array<int64_t, 1> start,
                        Array<uint16_t, 1> values) {
    const size_t blocks = w.shape(0) / kRows, k = w.shape(1);
    if (w.shape(0) % kRows || masks.shape(0) != blocks || masks.shape(1) != k || start.size() != blocks + 1)
        throw std::invalid_argument("shapes differ");
    const bool count = values.size() == 0;
    if (!count && values.size() < static_cast<size_t>(start.data()[blocks])) throw std::invalid_argument("shapes differ");
    nb::gil_scoped_release release;
    if (count) start.data()[0] = 0;
    for (size_t block = 0; block < blocks; ++block) {
        const uint16_t* from = w.data() + block * kRows * k;
        int64_t found = start.data()[block];
        for (size_t c = 0; c < k; ++c) {
            uint32_t mask = 0;
            for (size_t r = 0; r < kRows; ++r) {
                if (!from[r * k + c]) continue;
                mask |= 1u << r;
                if (!count) values.data()[found] = from[r * k + c];
                ++found;
            }
            if (count) masks.data()[block * k + c] = static_cast<uint16_t>(mask);
        }
        if (count) start.data()[block + 1] = found;
    }
}

// `values` end with 32 numbers that are not used.
static void bitmap_matmul(Array<const uint16_t, 2> masks, Array<const int64_t, 1> start, Array<const uint16_t, 1> values,
                          Array<const float, 2> b, const std::string& path, int threads, Array<float, 2> out) {
    const size_t blocks = masks.shape(0), k = masks.shape(1), n = b.shape(1), m = blocks * kRows;
    check_operands(b, k, out, m);
    if (start.size() != blocks + 1 || k % 4 || values.size() < kSpare ||
        static_cast<size_t>(start.data()[blocks]) + kSpare != values.size())
        throw std::invalid_argument("shapes differ");
    const bool fast = vectors(path);
    nb::gil_scoped_release release;
    std::atomic<bool> wrong{false};
    parallel_for(blocks, std::max<size_t>(1, blocks / (8 * threads)), threads, [&](size_t begin, size_t end, int) {
        for (size_t block = begin; block < end; ++block) {
            const uint16_t* mask = masks.data() + block * k;
            // as many bits as there are numbers, or reading them would leave the array
            const uint64_t bits = fast ? bits_of_avx512(mask, k) : bits_of(mask, k);
            const int64_t first = start.data()[block];
            if (first < 0 || static_cast<uint64_t>(start.data()[block + 1] - first) != bits) {
                wrong = true;
                return;
            }
            const Operands to{b.data(), n, out.data(), m};
            for (size_t from = 0; from < n; from += kMost) {
                const size_t some = std::min(kMost, n - from);
                float* rows = out.data() + block * kRows;
#if defined(__x86_64__)
                if (fast) kBitmap[some - 1](mask, values.data() + first, k, b.data() + from, n, rows + from * m, m);
#endif
                if (!fast) bitmap_portable(mask, values.data() + first, k, to, from, some, rows);
            }
        }
    });
    if (wrong) throw std::invalid_argument("masks and numbers do not belong together");
}

// CSR per block of 512 columns: rows [block * m, (block + 1) * m) of `start` are those of the block; columns count from
// the block's first and wrap within it. `b` ends with 16 rows that are not used.
static void blocked_rows_matmul(Array<const int64_t, 1> start, Array<const uint16_t, 1> index,
                                Array<const uint16_t, 1> values, Array<const float, 2> b, const std::string& path,
                                int threads, Array<float, 2> out) {  // out (m, n)
    const size_t m = out.shape(0), n = out.shape(1), blocks = b.shape(0) / kRowsColumns;
    if (b.shape(0) % kRowsColumns != kRows || b.shape(1) != n || start.size() != blocks * m + 1 || index.size() != values.size() ||
        start.data()[blocks * m] + static_cast<int64_t>(kSpare) != static_cast<int64_t>(index.size()) || start.data()[0] != 0)
        throw std::invalid_argument("shapes differ");
    const bool fast = vectors(path);
    nb::gil_scoped_release release;
    std::atomic<bool> wrong{false};
    parallel_for(m, 64, threads, [&](size_t begin, size_t end, int) {
        std::fill(out.data() + begin * n, out.data() + end * n, 0.0f);
        for (size_t block = 0; block < blocks; ++block) {
            const float* in = b.data() + block * kRowsColumns * n;
            for (size_t row = begin; row < end; ++row) {
                const int64_t first = start.data()[block * m + row], last = start.data()[block * m + row + 1];
                if (first > last || first < 0 || last + static_cast<int64_t>(kSpare) > static_cast<int64_t>(index.size()) ||
                    last - first > static_cast<int64_t>(kRowsColumns)) {
                    wrong = true;
                    return;
                }
                const uint16_t *at = index.data() + first, *numbers = values.data() + first;
                const size_t count = static_cast<size_t>(last - first);
                float* totals = out.data() + row * n;
#if defined(__x86_64__)
                if (fast)
                    for (size_t from = 0; from < n; from += 64) {
                        const size_t some = std::min<size_t>(64, n - from), whole = (some + 15) / 16;
                        const auto last_mask = static_cast<__mmask16>(0xffff >> (16 * whole - some));
                        constexpr decltype(&row_avx512<1>) kRow[] = {row_avx512<1>, row_avx512<2>, row_avx512<3>,
                                                                     row_avx512<4>};
                        kRow[whole - 1](at, numbers, count, in + from, n, totals + from, last_mask);
                    }
#endif
                if (!fast) row_portable(at, numbers, count, in, n, totals);
            }
        }
    });
    if (wrong) throw std::invalid_argument("rows out of order");
}

void bind_sparse_matmul(nb::module_& m) {
    m.def("sparse_path", &best_path);
    m.def("tiled_words_pack", &tiled_words_pack, nb::arg("w"), nb::arg("reorder"), nb::arg("most"), nb::arg("threads"),
          nb::arg("offsets"), nb::arg("full"), nb::arg("words"));
    m.def("tiled_words_matmul", &tiled_words_matmul, nb::arg("offsets"), nb::arg("words"), nb::arg("slot"),
          nb::arg("dense"), nb::arg("b"), nb::arg("path"), nb::arg("threads"), nb::arg("out"));
    m.def("tiled_words_conflicts", &tiled_words_conflicts, nb::arg("offsets"), nb::arg("words"));
    m.def("bitmap_pack", &bitmap_pack, nb::arg("w"), nb::arg("masks"), nb::arg("start"), nb::arg("values"));
    m.def("bitmap_matmul", &bitmap_matmul, nb::arg("masks"), nb::arg("start"), nb::arg("values"), nb::arg("b"),
          nb::arg("path"), nb::arg("threads"), nb::arg("out"));
    m.def("blocked_rows_matmul", &blocked_rows_matmul, nb::arg("start"), nb::arg("index"), nb::arg("values"),
          nb::arg("b"), nb::arg("path"), nb::arg("threads"), nb::arg("out"));
}

}  // namespace bitwright
