// Products of +-1 bit planes (arXiv 2409.17870): codes or rounded activations packed into planes, and sums of shifted
// population counts kept in registers of a 4 x 4 tile of results, so that no plane of results is ever stored.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
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
using Words = Array<const uint64_t, 1>;
using Real = Array<const float, 1>;

constexpr size_t kChunk = 8;             // words of 64 bits in one step of a kernel: rows are padded to 512 positions
constexpr size_t kTile = 4;              // rows and columns of a tile of results
constexpr size_t kNearBytes = 32 << 10;  // planes of one tile that are multiplied before the next positions: L1 cache
constexpr size_t kColumnBytes = 256 << 10;  // planes of columns that pass a tile of rows before the next rows: L2 cache
constexpr size_t kGrain = 1 << 16;       // steps for which one more thread is woken (about as long as waking takes)

// Planes of one operand. Layout "plane": (planes, rows, chunks, 8) words; "blocked": (rows / 4, chunks, planes, 4, 8).
struct Planes {
    uint64_t* data;
    size_t rows, planes, chunks, block_stride, row_stride, plane_stride, chunk_stride;

    Planes(const uint64_t* words, size_t count, size_t rows, size_t planes, size_t k, bool blocked)
        : data(const_cast<uint64_t*>(words)), rows(rows), planes(planes), chunks((k + 511) / 512) {
        if (planes < 1 || planes > 8) throw std::invalid_argument("1 to 8 planes");
        const size_t padded = blocked ? (rows + kTile - 1) / kTile * kTile : rows;
        if (count != padded * planes * chunks * kChunk) throw std::invalid_argument("planes of another size");
        row_stride = blocked ? kChunk : chunks * kChunk;
        plane_stride = blocked ? kTile * kChunk : rows * chunks * kChunk;
        chunk_stride = blocked ? planes * kTile * kChunk : kChunk;
        block_stride = blocked ? chunks * chunk_stride : kTile * row_stride;
    }
    // The planes of the only row as rows of one plane.
    Planes planes_as_rows() const {
        Planes view = *this;
        view.rows = planes;
        view.planes = 1;
        view.row_stride = plane_stride;
        view.block_stride = kTile * plane_stride;
        return view;
    }
    // First word of a row; rows beyond the last are read as the last one, and their results dropped.
    uint64_t* at(size_t row, size_t plane) const {
        row = std::min(row, rows - 1);
        return data + row / kTile * block_stride + row % kTile * row_stride + plane * plane_stride;
    }
};

// ---- packing ------------------------------------------------------------------------------------------------------

static void pack_row_portable(const uint8_t* codes, size_t k, const Planes& out, size_t row) {
    for (size_t start = 0; start < k; start += 64) {
        const size_t here = std::min<size_t>(64, k - start);
        for (size_t plane = 0; plane < out.planes; ++plane) {
            uint64_t word = 0;
            for (size_t i = 0; i < here; ++i) word |= static_cast<uint64_t>((codes[start + i] >> plane) & 1) << i;
            out.at(row, plane)[start / 512 * out.chunk_stride + start / 64 % kChunk] = word;
        }
    }
}

static float magnitude_portable(const float* x, size_t k) {
    float most = 0;
    for (size_t i = 0; i < k; ++i) most = std::max(most, std::fabs(x[i]));
    return most;
}

// Codes of clip(round((x / scale + top) / 2), 0, top), ties to even; returns their sum.
static int64_t quantise_row_portable(const float* x, size_t k, float scale, float top, const Planes& out, size_t row) {
    int64_t sum = 0;
    uint8_t codes[64];
    for (size_t start = 0; start < k; start += 64) {
        const size_t here = std::min<size_t>(64, k - start);
        for (size_t i = 0; i < here; ++i) {
            const float code = std::nearbyint((x[start + i] / scale + top) * 0.5f);
            sum += codes[i] = static_cast<uint8_t>(std::clamp(code, 0.0f, top));
        }
        for (size_t plane = 0; plane < out.planes; ++plane) {
            uint64_t word = 0;
            for (size_t i = 0; i < here; ++i) word |= static_cast<uint64_t>((codes[i] >> plane) & 1) << i;
            out.at(row, plane)[start / 512 * out.chunk_stride + start / 64 % kChunk] = word;
        }
    }
    return sum;
}

#if defined(__x86_64__)
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vpopcntdq")))

WITH_AVX512 static __mmask64 valid_bytes(size_t here) { return here >= 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1; }

WITH_AVX512 static void store_planes(__m512i bytes, __mmask64 valid, size_t start, const Planes& out, uint64_t* row) {
    uint64_t* word = row + start / 512 * out.chunk_stride + start / 64 % kChunk;
    for (size_t plane = 0; plane < out.planes; ++plane)
        word[plane * out.plane_stride] =
            _mm512_mask_test_epi8_mask(valid, bytes, _mm512_set1_epi8(static_cast<char>(1 << plane)));
}

WITH_AVX512 static void pack_row_avx512(const uint8_t* codes, size_t k, const Planes& out, size_t row) {
    for (size_t start = 0; start < k; start += 64) {
        const __mmask64 valid = valid_bytes(k - start);
        store_planes(_mm512_maskz_loadu_epi8(valid, codes + start), valid, start, out, out.at(row, 0));
    }
}

WITH_AVX512 static float magnitude_avx512(const float* x, size_t k) {
    __m512 most = _mm512_setzero_ps();
    for (size_t i = 0; i < k; i += 16) {
        const __mmask16 valid = k - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (k - i)) - 1);
        most = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(valid, x + i)), most);
    }
    return _mm512_reduce_max_ps(most);
}

WITH_AVX512 static int64_t quantise_row_avx512(const float* x, size_t k, float scale, float top, const Planes& out,
                                               size_t row) {
    const __m512 scales = _mm512_set1_ps(scale), tops = _mm512_set1_ps(top), half = _mm512_set1_ps(0.5f);
    __m512i sum = _mm512_setzero_si512();
    uint64_t* const first = out.at(row, 0);
    for (size_t start = 0; start < k; start += 64) {
        const __mmask64 valid = valid_bytes(k - start);
        __m512i bytes = _mm512_setzero_si512();
        for (int part = 0; part < 4; ++part) {
            const __mmask16 mask = static_cast<__mmask16>(valid >> (16 * part));
            const __m512 values = _mm512_maskz_loadu_ps(mask, x + start + 16 * part);
            __m512 code = _mm512_mul_ps(_mm512_add_ps(_mm512_div_ps(values, scales), tops), half);
            code = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            code = _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), tops);
            const __m128i narrow = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(mask, code));
            switch (part) {  // the place is a constant of the instruction
                case 0: bytes = _mm512_inserti32x4(bytes, narrow, 0); break;
                case 1: bytes = _mm512_inserti32x4(bytes, narrow, 1); break;
                case 2: bytes = _mm512_inserti32x4(bytes, narrow, 2); break;
                default: bytes = _mm512_inserti32x4(bytes, narrow, 3);
            }
        }
        sum = _mm512_add_epi64(sum, _mm512_sad_epu8(bytes, _mm512_setzero_si512()));
        store_planes(bytes, valid, start, out, first);
    }
    return _mm512_reduce_add_epi64(sum);
}
#endif

// The fastest path of this CPU.
static std::string best_path() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw")) return "avx512";
    if (__builtin_cpu_supports("avx2")) return "avx2";
    if (__builtin_cpu_supports("popcnt")) return "popcnt";
#endif
    return "portable";
}

// ---- tiles --------------------------------------------------------------------------------------------------------
// A tile counts, for 4 rows and N <= 4 columns, sum over planes i, j of popcount(w_i op a_j) << (i + j), modulo 2^32:
// counts[4 * row + column], or [4 * column + row] with ColumnsFirst. Planes are paired from the highest i + j down and
// counts doubled in between (Horner), inside a range of positions whose planes stay in the first-level cache.

static size_t chunks_at_once(const Planes& w, const Planes& a) {
    const uint32_t planes = static_cast<uint32_t>(w.planes + a.planes);
    return std::max<size_t>(1, kNearBytes / (kTile * kChunk * 8) / planes);
}

#define SCALAR_TILE(NAME, TARGET, COUNT)                                                                               \
    template <bool Xor, size_t N, bool ColumnsFirst>                                                                   \
    TARGET static void NAME(const Planes& w, const Planes& a, size_t m, size_t n, uint32_t* counts) {                  \
        std::fill(counts, counts + kTile * kTile, 0);                                                                  \
        for (size_t x = 0; x < kTile; ++x)                                                                             \
            for (size_t y = 0; y < N; ++y) {                                                                           \
                uint64_t total = 0;                                                                                    \
                for (size_t i = 0; i < w.planes; ++i)                                                                  \
                    for (size_t j = 0; j < a.planes; ++j) {                                                            \
                        const uint64_t *left = w.at(m + x, i), *right = a.at(n + y, j);                                \
                        uint64_t count = 0;                                                                            \
                        for (size_t chunk = 0; chunk < w.chunks; ++chunk)                                              \
                            for (size_t word = 0; word < kChunk; ++word) {                                             \
                                const uint64_t l = left[chunk * w.chunk_stride + word];                                \
                                const uint64_t r = right[chunk * a.chunk_stride + word];                               \
                                count += static_cast<uint64_t>(COUNT(Xor ? l ^ r : l & r));                            \
                            }                                                                                          \
                        total += count << (i + j);                                                                     \
                    }                                                                                                  \
                counts[ColumnsFirst ? y * kTile + x : x * kTile + y] = static_cast<uint32_t>(total);                   \
            }                                                                                                          \
    }

SCALAR_TILE(tile_portable, , std::popcount)

#if defined(__x86_64__)
SCALAR_TILE(tile_popcnt, __attribute__((target("popcnt"))), _mm_popcnt_u64)

#define WITH_AVX2 __attribute__((target("avx2")))

// Population counts of 32 bytes from two look-ups of four bits each.
WITH_AVX2 static inline __m256i counts_of_bytes(__m256i bits) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                           0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, nibble));
    return _mm256_add_epi8(low, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble)));
}

template <bool Xor, size_t N, bool ColumnsFirst>
WITH_AVX2 static void tile_avx2(const Planes& w, const Planes& a, size_t m, size_t n, uint32_t* counts) {
    constexpr size_t kChunksInBytes = 15;  // a byte counts 8 in each half of a chunk: 240 at most
    uint64_t total[kTile][kTile] = {};
    for (size_t i = 0; i < w.planes; ++i)
        for (size_t j = 0; j < a.planes; ++j)
            for (size_t x = 0; x < kTile; x += 2) {
                const uint64_t* left[2] = {w.at(m + x, i), w.at(m + x + 1, i)};
                const uint64_t* right[N];
                for (size_t y = 0; y < N; ++y) right[y] = a.at(n + y, j);
                __m256i sums[2][N];
                for (auto& row : sums)
                    for (auto& value : row) value = _mm256_setzero_si256();
                for (size_t first = 0; first < w.chunks; first += kChunksInBytes) {
                    __m256i bytes[2][N];
                    for (auto& row : bytes)
                        for (auto& value : row) value = _mm256_setzero_si256();
                    for (size_t chunk = first; chunk < std::min(w.chunks, first + kChunksInBytes); ++chunk)
                        for (size_t half = 0; half < kChunk; half += 4)
                            for (size_t z = 0; z < 2; ++z) {
                                const auto* from = left[z] + chunk * w.chunk_stride + half;
                                const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                                for (size_t y = 0; y < N; ++y) {
                                    const auto* other = right[y] + chunk * a.chunk_stride + half;
                                    const __m256i column = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other));
                                    const __m256i bits =
                                        Xor ? _mm256_xor_si256(row, column) : _mm256_and_si256(row, column);
                                    bytes[z][y] = _mm256_add_epi8(bytes[z][y], counts_of_bytes(bits));
                                }
                            }
                    for (size_t z = 0; z < 2; ++z)
                        for (size_t y = 0; y < N; ++y)
                            sums[z][y] = _mm256_add_epi64(sums[z][y],
                                                          _mm256_sad_epu8(bytes[z][y], _mm256_setzero_si256()));
                }
                for (size_t z = 0; z < 2; ++z)
                    for (size_t y = 0; y < N; ++y) {
                        alignas(32) uint64_t lanes[4];
                        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[z][y]);
                        total[x + z][y] += (lanes[0] + lanes[1] + lanes[2] + lanes[3]) << (i + j);
                    }
            }
    for (size_t x = 0; x < kTile; ++x)
        for (size_t y = 0; y < kTile; ++y)
            counts[ColumnsFirst ? y * kTile + x : x * kTile + y] = static_cast<uint32_t>(total[x][y]);
}

// Sums of the lanes of 16 vectors of 64-bit counts below 2^32, as 16 32-bit numbers in their order.
WITH_AVX512 static inline __m512i sums_of_lanes(const __m512i* v) {
    __m512i two[8], four[4];
    for (int g = 0; g < 8; ++g) two[g] = _mm512_add_epi32(v[2 * g], _mm512_slli_epi64(v[2 * g + 1], 32));
    for (int h = 0; h < 4; ++h)
        four[h] = _mm512_add_epi32(_mm512_unpacklo_epi64(two[2 * h], two[2 * h + 1]),
                                   _mm512_unpackhi_epi64(two[2 * h], two[2 * h + 1]));
    const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x88),
                                         _mm512_shuffle_i32x4(four[0], four[1], 0xDD));
    const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x88),
                                          _mm512_shuffle_i32x4(four[2], four[3], 0xDD));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
}

// Counts of one pair of planes over `chunks` steps, added to `count`. Rows of blocked planes are kChunk words apart.
template <bool Xor, size_t N, bool ColumnsFirst, bool Blocked>
WITH_AVX512 static inline __attribute__((always_inline)) void count_pair(const uint64_t* left, const uint64_t* right,
                                                                         const Planes& w, const Planes& a,
                                                                         size_t chunks, __m512i* count) {
    const size_t w_row = Blocked ? kChunk : w.row_stride, a_row = Blocked ? kChunk : a.row_stride;
    const size_t w_next = w.chunk_stride, a_next = a.chunk_stride;
    for (; chunks > 0; --chunks, left += w_next, right += a_next) {
        __m512i columns[N];
        for (size_t y = 0; y < N; ++y) columns[y] = _mm512_loadu_si512(right + y * a_row);
        for (size_t x = 0; x < kTile; ++x) {
            const __m512i row = _mm512_loadu_si512(left + x * w_row);
            for (size_t y = 0; y < N; ++y) {
                __m512i& value = count[ColumnsFirst ? y * kTile + x : x * kTile + y];
                const __m512i bits = Xor ? _mm512_xor_si512(row, columns[y]) : _mm512_and_si512(row, columns[y]);
                value = _mm512_add_epi64(value, _mm512_popcnt_epi64(bits));
            }
        }
    }
}

// Rows of a tile have one distance: a last tile that is not full in the layout "plane" goes through `tile_popcnt`.
template <bool Xor, size_t N, bool ColumnsFirst, bool Blocked>
WITH_AVX512 static void tile_avx512(const Planes& w, const Planes& a, size_t m, size_t n, uint32_t* counts) {
    const size_t at_once = chunks_at_once(w, a), w_planes = w.planes, a_planes = a.planes;
    const uint64_t *left = w.at(m, 0), *right = a.at(n, 0);
    __m512i total = _mm512_setzero_si512();
    for (size_t first = 0; first < w.chunks; first += at_once) {
        const size_t chunks = std::min(w.chunks - first, at_once);
        __m512i count[kTile * kTile];
        for (auto& value : count) value = _mm512_setzero_si512();
        for (size_t level = w_planes + a_planes - 1; level-- > 0;) {
            for (size_t x = 0; x < kTile; ++x)
                for (size_t y = 0; y < N; ++y) {
                    __m512i& value = count[ColumnsFirst ? y * kTile + x : x * kTile + y];
                    value = _mm512_add_epi64(value, value);
                }
            for (size_t i = level < a_planes ? 0 : level - a_planes + 1; i < w_planes && i <= level; ++i)
                count_pair<Xor, N, ColumnsFirst, Blocked>(left + i * w.plane_stride, right + (level - i) * a.plane_stride,
                                                          w, a, chunks, count);
        }
        total = _mm512_add_epi32(total, sums_of_lanes(count));
        left += chunks * w.chunk_stride;
        right += chunks * a.chunk_stride;
    }
    _mm512_storeu_si512(counts, total);
}
#endif

using Tile = void (*)(const Planes&, const Planes&, size_t, size_t, uint32_t*);

// Tiles of 1 to 4 columns; `blocked`: rows of both operands are kChunk words apart.
template <bool Xor, bool ColumnsFirst>
static std::array<Tile, kTile> tiles_of(const std::string& path, bool blocked) {
#define EVERY_WIDTH(NAME, ...)                                                                                         \
    std::array<Tile, kTile> {                                                                                          \
        NAME<Xor, 1, ColumnsFirst __VA_OPT__(, ) __VA_ARGS__>, NAME<Xor, 2, ColumnsFirst __VA_OPT__(, ) __VA_ARGS__>,  \
            NAME<Xor, 3, ColumnsFirst __VA_OPT__(, ) __VA_ARGS__>,                                                     \
            NAME<Xor, 4, ColumnsFirst __VA_OPT__(, ) __VA_ARGS__>                                                      \
    }
#if defined(__x86_64__)
    if (path == "avx512" && blocked) return EVERY_WIDTH(tile_avx512, true);
    if (path == "avx512") return EVERY_WIDTH(tile_avx512, false);
    if (path == "avx2") return EVERY_WIDTH(tile_avx2);
    if (path == "popcnt") return EVERY_WIDTH(tile_popcnt);
#endif
    return EVERY_WIDTH(tile_portable);
#undef EVERY_WIDTH
}

// ---- products -----------------------------------------------------------------------------------------------------

// sum over planes of popcount << plane, of every row: what the AND form takes off
static std::vector<uint32_t> weighted_counts(const Planes& side) {
    std::vector<uint32_t> sums(side.rows);
    for (size_t row = 0; row < side.rows; ++row)
        for (size_t plane = 0; plane < side.planes; ++plane)
            for (size_t chunk = 0; chunk < side.chunks; ++chunk)
                for (size_t word = 0; word < kChunk; ++word)
                    sums[row] += static_cast<uint32_t>(
                        std::popcount(side.at(row, plane)[chunk * side.chunk_stride + word]) << plane);
    return sums;
}

// Calls visit(m, n, height, width, counts) for every tile of results; parts of rows, or of columns, per thread.
template <bool Xor, bool ColumnsFirst, typename Visit>
static void count_tiles(const Planes& w, const Planes& a, const std::string& path, int threads, bool split_rows,
                        Visit visit) {
    const bool blocked = w.row_stride == kChunk && (a.row_stride == kChunk);
    const auto tiles = tiles_of<Xor, ColumnsFirst>(path, blocked);
    const auto ragged = tiles_of<Xor, ColumnsFirst>(path == "avx512" ? "popcnt" : path, false);
    const bool filled = w.row_stride == kChunk;  // the last tile of rows too
    const size_t row_tiles = (w.rows + kTile - 1) / kTile, column_tiles = (a.rows + kTile - 1) / kTile;
    const size_t at_once = std::max<size_t>(1, kColumnBytes / (kTile * a.planes * a.chunks * kChunk * 8));
    const auto range = [&](size_t row_first, size_t row_last, size_t column_first, size_t column_last) {
        alignas(64) uint32_t counts[kTile * kTile];
        for (size_t block = column_first; block < column_last; block += at_once)
            for (size_t row = row_first; row < row_last; ++row)
                for (size_t column = block; column < std::min(column_last, block + at_once); ++column) {
                    const size_t m = row * kTile, n = column * kTile;
                    const size_t height = std::min(kTile, w.rows - m), width = std::min(kTile, a.rows - n);
                    (height == kTile || filled ? tiles : ragged)[width - 1](w, a, m, n, counts);
                    visit(m, n, height, width, counts);
                }
    };
    const size_t steps = w.rows * a.rows * w.chunks * w.planes * a.planes;
    const int used = static_cast<int>(std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), 1 + steps / kGrain));
    if (split_rows || row_tiles >= column_tiles)
        parallel_parts(row_tiles, used, [&](size_t first, size_t last) { range(first, last, 0, column_tiles); });
    else
        parallel_parts(column_tiles, used, [&](size_t first, size_t last) { range(0, row_tiles, first, last); });
}

// Calls finish(m, n, height, width, values) for every tile, `values` int32 in the order of the tiles' counts.
template <bool Xor, bool ColumnsFirst, typename Finish>
static void multiply(const Planes& w, const Planes& a, size_t k, const std::string& path, int threads, Finish finish) {
    const uint32_t w_top = (1u << w.planes) - 1, a_top = (1u << a.planes) - 1;
    const uint32_t base = static_cast<uint32_t>(k) * w_top * a_top;  // products are k * tops - 2 * XOR counts
    std::vector<uint32_t> of_w, of_a;
    if (!Xor) of_w = weighted_counts(w), of_a = weighted_counts(a);
    const auto value = [&](uint32_t count, size_t row, size_t column) {
        if (Xor) return static_cast<int32_t>(base - 2 * count);
        return static_cast<int32_t>(4 * count - 2 * a_top * of_w[row] - 2 * w_top * of_a[column] + base);
    };
    if (a.rows == 1 && a.planes > 1) {
        // One column: its planes are columns of one plane each, so that a tile reads every word of weights once.
        std::vector<uint32_t> sums(w.rows);
        count_tiles<Xor, true>(w, a.planes_as_rows(), path, threads, true,
                               [&](size_t m, size_t n, size_t height, size_t width, const uint32_t* counts) {
                                   for (size_t y = 0; y < width; ++y)
                                       for (size_t x = 0; x < height; ++x) sums[m + x] += counts[y * kTile + x] << (n + y);
                               });
        for (size_t m = 0; m < w.rows; m += kTile) {
            int32_t values[kTile * kTile];
            const size_t height = std::min(kTile, w.rows - m);
            for (size_t x = 0; x < height; ++x) values[ColumnsFirst ? x : x * kTile] = value(sums[m + x], m + x, 0);
            finish(m, 0, height, 1, values);
        }
        return;
    }
    count_tiles<Xor, ColumnsFirst>(
        w, a, path, threads, false, [&](size_t m, size_t n, size_t height, size_t width, const uint32_t* counts) {
            int32_t values[kTile * kTile];
            if (Xor) {
                for (size_t at = 0; at < kTile * kTile; ++at) values[at] = static_cast<int32_t>(base - 2 * counts[at]);
            } else {
                for (size_t x = 0; x < height; ++x)
                    for (size_t y = 0; y < width; ++y) {
                        const size_t at = ColumnsFirst ? y * kTile + x : x * kTile + y;
                        values[at] = value(counts[at], m + x, n + y);
                    }
            }
            finish(m, n, height, width, values);
        });
}

static void pack_planes(Array<const uint8_t, 2> codes, size_t bits, bool blocked, int threads,
                        Array<uint64_t, 1> words) {
    const size_t rows = codes.shape(0), k = codes.shape(1);
    const Planes out(words.data(), words.size(), rows, bits, k, blocked);
    nb::gil_scoped_release release;
    auto pack = pack_row_portable;
#if defined(__x86_64__)
    if (best_path() == "avx512") pack = pack_row_avx512;
#endif
    parallel_parts(rows, threads, [&](size_t first, size_t last) {
        for (size_t row = first; row < last; ++row) pack(codes.data() + row * k, k, out, row);
    });
}

// Rounds, splits and packs rows in one pass after their magnitudes. `scales` are given, or found as share * magnitude /
// top (1 for zeros); `sums` are those of the bipolar integers.
static void quantise_planes(Array<const float, 2> x, size_t bits, float share, bool given, bool blocked, bool vectors,
                            int threads, Array<float, 1> scales, Array<int64_t, 1> sums, Array<uint64_t, 1> words) {
    const size_t rows = x.shape(0), k = x.shape(1);
    const Planes out(words.data(), words.size(), rows, bits, k, blocked);
    if (scales.size() != rows || sums.size() != rows) throw std::invalid_argument("one scale and sum per row");
    nb::gil_scoped_release release;
    auto magnitude = magnitude_portable;
    auto quantise = quantise_row_portable;
#if defined(__x86_64__)
    if (vectors && best_path() == "avx512") magnitude = magnitude_avx512, quantise = quantise_row_avx512;
#endif
    const float top = static_cast<float>((1 << bits) - 1);
    parallel_parts(rows, threads, [&](size_t first, size_t last) {
        for (size_t row = first; row < last; ++row) {
            const float* from = x.data() + row * k;
            float& scale = scales.data()[row];
            bool empty = false;
            if (!given) {
                scale = magnitude(from, k) / top * share;
                empty = scale == 0;  // no odd integer is zero: the scale is
                scale = empty ? 1.0f : std::max(scale, std::numeric_limits<float>::min());
            }
            sums.data()[row] = 2 * quantise(from, k, scale, top, out, row) - static_cast<int64_t>(k) * static_cast<int64_t>(top);
            if (empty) scale = 0;
        }
    });
}

static bool all_finite(Real x) {
    const float* data = x.data();
    uint32_t most = 0;
    for (size_t i = 0; i < x.size(); ++i) most = std::max(most, std::bit_cast<uint32_t>(data[i]) & 0x7FFFFFFFu);
    return most < 0x7F800000u;
}

static void check(const Planes& w, const Planes& a, const std::string& path) {
    if (w.rows == 0 || a.rows == 0) throw std::invalid_argument("no rows");
    if (path == "avx512" && best_path() != "avx512") throw std::invalid_argument("no AVX-512 here");
}

static void bit_plane_matmul(Words weights, size_t w_bits, bool w_blocked, Words activations, size_t a_bits,
                             bool a_blocked, size_t k, bool use_xor, const std::string& path, int threads,
                             Array<int32_t, 2> out) {
    const size_t columns = out.shape(1);
    const Planes w(weights.data(), weights.size(), out.shape(0), w_bits, k, w_blocked);
    const Planes a(activations.data(), activations.size(), columns, a_bits, k, a_blocked);
    check(w, a, path);
    nb::gil_scoped_release release;
    int32_t* const to = out.data();
    const auto finish = [=](size_t m, size_t n, size_t height, size_t width, const int32_t* values) {
        for (size_t x = 0; x < height; ++x) {
            int32_t* row = to + (m + x) * columns + n;
            if (width == kTile)
                std::copy(values + x * kTile, values + (x + 1) * kTile, row);
            else
                std::copy(values + x * kTile, values + x * kTile + width, row);
        }
    };
    if (use_xor)
        multiply<true, false>(w, a, k, path, threads, finish);
    else
        multiply<false, false>(w, a, k, path, threads, finish);
}

// out[n][m] = scale_w (scale_a product + offset_a sum_w) + offset_w (scale_a sum_a + k offset_a) + bias, in float32.
static void bit_plane_linear(Words weights, size_t w_bits, bool w_blocked, Words activations, size_t a_bits,
                             bool a_blocked, size_t k, const std::string& path, int threads, Real w_scales,
                             Real w_offsets, Real w_sums, Real bias, Real a_scales, Real a_offsets, Real a_sums,
                             Array<float, 2> out) {
    const size_t rows = out.shape(1);
    const Planes w(weights.data(), weights.size(), rows, w_bits, k, w_blocked);
    const Planes a(activations.data(), activations.size(), out.shape(0), a_bits, k, a_blocked);
    check(w, a, path);
    for (const auto* each : {&w_scales, &w_offsets, &w_sums, &bias})
        if (each->size() != rows) throw std::invalid_argument("one value per row of weights");
    for (const auto* each : {&a_scales, &a_offsets, &a_sums})
        if (each->size() != a.rows) throw std::invalid_argument("one value per row of activations");
    nb::gil_scoped_release release;
    const float *sw = w_scales.data(), *ow = w_offsets.data(), *tw = w_sums.data(), *plus = bias.data();
    const float *sa = a_scales.data(), *oa = a_offsets.data(), *ta = a_sums.data();
    float* const to = out.data();
    multiply<true, true>(w, a, k, path, threads, [=](size_t m, size_t n, size_t height, size_t width,
                                                     const int32_t* values) {
        for (size_t y = 0; y < width; ++y) {
            const float scale = sa[n + y], offset = oa[n + y], last = scale * ta[n + y] + static_cast<float>(k) * offset;
            float* row = to + (n + y) * rows + m;
            for (size_t x = 0; x < height; ++x)
                row[x] = sw[m + x] * (scale * static_cast<float>(values[y * kTile + x]) + offset * tw[m + x]) +
                         ow[m + x] * last + plus[m + x];
        }
    });
}

void bind_bit_plane_matmul(nb::module_& m) {
    m.def("pack_planes", &pack_planes, nb::arg("codes"), nb::arg("bits"), nb::arg("blocked"), nb::arg("threads"),
          nb::arg("words"));
    m.def("quantise_planes", &quantise_planes, nb::arg("x"), nb::arg("bits"), nb::arg("share"), nb::arg("given"),
          nb::arg("blocked"), nb::arg("vectors"), nb::arg("threads"), nb::arg("scales"), nb::arg("sums"),
          nb::arg("words"));
    m.def("bit_plane_matmul", &bit_plane_matmul, nb::arg("weights"), nb::arg("w_bits"), nb::arg("w_blocked"),
          nb::arg("activations"), nb::arg("a_bits"), nb::arg("a_blocked"), nb::arg("k"), nb::arg("use_xor"),
          nb::arg("path"), nb::arg("threads"), nb::arg("out"));
    m.def("bit_plane_linear", &bit_plane_linear, nb::arg("weights"), nb::arg("w_bits"), nb::arg("w_blocked"),
          nb::arg("activations"), nb::arg("a_bits"), nb::arg("a_blocked"), nb::arg("k"), nb::arg("path"),
          nb::arg("threads"), nb::arg("w_scales"), nb::arg("w_offsets"), nb::arg("w_sums"), nb::arg("bias"),
          nb::arg("a_scales"), nb::arg("a_offsets"), nb::arg("a_sums"), nb::arg("out"));
    m.def("all_finite", &all_finite, nb::arg("x"));
    m.def("bit_plane_path", &best_path);
}

}  // namespace bitwright
