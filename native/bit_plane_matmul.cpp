// Products of +-1 bit planes: packing of codes into planes, and sums of shifted population counts (arXiv 2409.17870).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace bitwright {

using Codes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using WordsOut = nb::ndarray<uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr size_t kChunk = 8;  // words of 64 bits in one step of a kernel: rows are padded to 512 positions

// Planes of one operand, (rows, planes, words) or (planes, rows, words), seen through two strides.
struct Planes {
    const uint64_t* data;
    size_t rows, planes, words, row_stride, plane_stride;
    const uint64_t* at(size_t row, size_t plane) const { return data + row * row_stride + plane * plane_stride; }
};

static Planes view(const Words& array, bool rows_first) {
    const size_t a = array.shape(0), b = array.shape(1), words = array.shape(2);
    if (words % kChunk != 0) throw std::invalid_argument("rows of planes are padded to 512 positions");
    if (rows_first) return {array.data(), a, b, words, b * words, words};
    return {array.data(), b, a, words, words, b * words};
}

template <typename Work>
static void in_threads(size_t count, int threads, Work work) {
    const size_t used = std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), std::max<size_t>(count, 1));
    const size_t each = (count + used - 1) / used;
    std::vector<std::thread> running;
    for (size_t at = 1; at < used; ++at)
        running.emplace_back([=] { work(std::min(count, at * each), std::min(count, (at + 1) * each)); });
    work(0, std::min(count, each));
    for (auto& thread : running) thread.join();
}

static void pack_row_portable(const uint8_t* codes, size_t k, uint64_t* out, size_t plane_stride, size_t planes) {
    for (size_t start = 0; start < k; start += 64) {
        const size_t here = std::min<size_t>(64, k - start);
        for (size_t plane = 0; plane < planes; ++plane) {
            uint64_t word = 0;
            for (size_t i = 0; i < here; ++i) word |= static_cast<uint64_t>((codes[start + i] >> plane) & 1) << i;
            out[plane * plane_stride + start / 64] = word;
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw"))) static void pack_row_avx512(const uint8_t* codes, size_t k, uint64_t* out,
                                                                        size_t plane_stride, size_t planes) {
    for (size_t start = 0; start < k; start += 64) {
        const size_t here = std::min<size_t>(64, k - start);
        const __mmask64 valid = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
        const __m512i bytes = _mm512_maskz_loadu_epi8(valid, codes + start);
        for (size_t plane = 0; plane < planes; ++plane)
            out[plane * plane_stride + start / 64] =
                _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(1 << plane)));
    }
}
#endif

// Counts of rows [m, m + M) by columns [n, n + N): sum over planes of popcount(w op a) << (i + j), in Horner's order.
template <bool Xor, size_t M, size_t N>
static void tile_portable(const Planes& w, const Planes& a, size_t m, size_t n, int64_t* out) {
    int64_t count[M][N] = {};
    for (size_t level = w.planes + a.planes - 1; level-- > 0;) {
        for (auto& row : count)
            for (auto& value : row) value *= 2;
        for (size_t i = 0; i < w.planes; ++i) {
            if (level < i || level - i >= a.planes) continue;
            for (size_t x = 0; x < M; ++x)
                for (size_t y = 0; y < N; ++y) {
                    const uint64_t *left = w.at(m + x, i), *right = a.at(n + y, level - i);
                    int64_t total = 0;
                    for (size_t word = 0; word < w.words; ++word)
                        total += std::popcount(Xor ? left[word] ^ right[word] : left[word] & right[word]);
                    count[x][y] += total;
                }
        }
    }
    for (size_t x = 0; x < M; ++x)
        for (size_t y = 0; y < N; ++y) out[x * N + y] = count[x][y];
}

#if defined(__x86_64__)
template <bool Xor, size_t M, size_t N>
__attribute__((target("popcnt"))) static void tile_popcnt(const Planes& w, const Planes& a, size_t m, size_t n,
                                                          int64_t* out) {
    int64_t count[M][N] = {};
    for (size_t level = w.planes + a.planes - 1; level-- > 0;) {
        for (auto& row : count)
            for (auto& value : row) value *= 2;
        for (size_t i = 0; i < w.planes; ++i) {
            if (level < i || level - i >= a.planes) continue;
            for (size_t x = 0; x < M; ++x)
                for (size_t y = 0; y < N; ++y) {
                    const uint64_t *left = w.at(m + x, i), *right = a.at(n + y, level - i);
                    int64_t total = 0;
                    for (size_t word = 0; word < w.words; ++word)
                        total += _mm_popcnt_u64(Xor ? left[word] ^ right[word] : left[word] & right[word]);
                    count[x][y] += total;
                }
        }
    }
    for (size_t x = 0; x < M; ++x)
        for (size_t y = 0; y < N; ++y) out[x * N + y] = count[x][y];
}

template <bool Xor, size_t M, size_t N>
__attribute__((target("avx512f,avx512vpopcntdq"))) static void tile_avx512(const Planes& w, const Planes& a, size_t m,
                                                                           size_t n, int64_t* out) {
    __m512i count[M][N];
    for (auto& row : count)
        for (auto& value : row) value = _mm512_setzero_si512();
    for (size_t level = w.planes + a.planes - 1; level-- > 0;) {
        for (auto& row : count)
            for (auto& value : row) value = _mm512_add_epi64(value, value);
        for (size_t i = 0; i < w.planes; ++i) {
            if (level < i || level - i >= a.planes) continue;
            const uint64_t *left[M], *right[N];
            for (size_t x = 0; x < M; ++x) left[x] = w.at(m + x, i);
            for (size_t y = 0; y < N; ++y) right[y] = a.at(n + y, level - i);
            for (size_t word = 0; word < w.words; word += kChunk) {
                __m512i columns[N];
                for (size_t y = 0; y < N; ++y) columns[y] = _mm512_loadu_si512(right[y] + word);
                for (size_t x = 0; x < M; ++x) {
                    const __m512i row = _mm512_loadu_si512(left[x] + word);
                    for (size_t y = 0; y < N; ++y) {
                        const __m512i bits =
                            Xor ? _mm512_xor_si512(row, columns[y]) : _mm512_and_si512(row, columns[y]);
                        count[x][y] = _mm512_add_epi64(count[x][y], _mm512_popcnt_epi64(bits));
                    }
                }
            }
        }
    }
    for (size_t x = 0; x < M; ++x)
        for (size_t y = 0; y < N; ++y) out[x * N + y] = _mm512_reduce_add_epi64(count[x][y]);
}
#endif

using Tile = void (*)(const Planes&, const Planes&, size_t, size_t, int64_t*);

template <bool Xor, size_t M, size_t N>
static Tile tile_of(const std::string& path) {
#if defined(__x86_64__)
    if (path == "avx512") return tile_avx512<Xor, M, N>;
    if (path == "popcnt") return tile_popcnt<Xor, M, N>;
#endif
    return tile_portable<Xor, M, N>;
}

// The fastest path of this CPU.
static std::string best_path() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw")) return "avx512";
    if (__builtin_cpu_supports("popcnt")) return "popcnt";
#endif
    return "portable";
}

template <bool Xor>
static void multiply(const Planes& w, const Planes& a, int64_t k, const std::string& path, int threads, int32_t* out) {
    const Tile full = tile_of<Xor, 4, 4>(path), row = tile_of<Xor, 1, 4>(path);
    const Tile column = tile_of<Xor, 4, 1>(path), single = tile_of<Xor, 1, 1>(path);
    const size_t m_total = w.rows, n_total = a.rows;
    const int64_t most = ((int64_t{1} << w.planes) - 1) * ((int64_t{1} << a.planes) - 1);
    // sum over planes of popcount << plane, of every row: what the AND form takes off
    std::vector<int64_t> of_w, of_a;
    if (!Xor)
        for (const auto* side : {&w, &a}) {
            auto& sums = side == &w ? of_w : of_a;
            sums.resize(side->rows);
            for (size_t r = 0; r < side->rows; ++r)
                for (size_t plane = 0; plane < side->planes; ++plane)
                    for (size_t word = 0; word < side->words; ++word)
                        sums[r] += static_cast<int64_t>(std::popcount(side->at(r, plane)[word])) << plane;
        }
    const int64_t w_weights = (int64_t{1} << w.planes) - 1, a_weights = (int64_t{1} << a.planes) - 1;
    in_threads((m_total + 3) / 4, threads, [&](size_t first, size_t last) {
        int64_t counts[16];
        // Blocks of rows stay in the second-level cache while all columns pass, blocks of columns in the first.
        constexpr size_t kColumns = 64, kBytes = 256 * 1024;
        const size_t rows_at_once = std::max<size_t>(1, kBytes / (w.words * 8 * w.planes * 4));
        for (size_t row_block = first; row_block < last; row_block += rows_at_once)
          for (size_t n_block = 0; n_block < n_total; n_block += kColumns)
            for (size_t block = row_block; block < std::min(last, row_block + rows_at_once); ++block) {
                const size_t m = block * 4, height = std::min<size_t>(4, m_total - m);
                const size_t n_end = std::min(n_total, n_block + kColumns);
                for (size_t n = n_block; n < n_end;) {
                    const size_t width = n_end - n >= 4 ? 4 : 1;
                    if (height == 4) {
                        (width == 4 ? full : column)(w, a, m, n, counts);
                    } else {
                        for (size_t x = 0; x < height; ++x) (width == 4 ? row : single)(w, a, m + x, n, counts + x * width);
                    }
                    for (size_t x = 0; x < height; ++x)
                        for (size_t y = 0; y < width; ++y) {
                            const int64_t count = counts[x * width + y];
                            int64_t value = k * most - 2 * count;
                            if (!Xor)
                                value = 4 * count - 2 * a_weights * of_w[m + x] - 2 * w_weights * of_a[n + y] + k * most;
                            out[(m + x) * n_total + n + y] = static_cast<int32_t>(value);
                        }
                    n += width;
                }
            }
    });
}

static void pack_planes(Codes codes, bool rows_first, int threads, WordsOut out) {
    const size_t rows = codes.shape(0), k = codes.shape(1), words = out.shape(2);
    const size_t planes = rows_first ? out.shape(1) : out.shape(0);
    if ((rows_first ? out.shape(0) : out.shape(1)) != rows || words * 64 < k || words % kChunk)
        throw std::invalid_argument("planes of another size");
    nb::gil_scoped_release release;
    auto pack = pack_row_portable;
#if defined(__x86_64__)
    if (best_path() == "avx512") pack = pack_row_avx512;
#endif
    const size_t row_stride = rows_first ? planes * words : words, plane_stride = rows_first ? words : rows * words;
    in_threads(rows, threads, [&](size_t first, size_t last) {
        for (size_t r = first; r < last; ++r)
            pack(codes.data() + r * k, k, out.data() + r * row_stride, plane_stride, planes);
    });
}

static void bit_plane_matmul(Words weights, bool weight_rows_first, Words activations, bool activation_rows_first,
                             int64_t k, bool use_xor, const std::string& path, int threads, Sums out) {
    const Planes w = view(weights, weight_rows_first), a = view(activations, activation_rows_first);
    if (w.words != a.words) throw std::invalid_argument("operands of different depth");
    if (out.shape(0) != w.rows || out.shape(1) != a.rows) throw std::invalid_argument("result of another size");
    nb::gil_scoped_release release;
    (use_xor ? multiply<true> : multiply<false>)(w, a, k, path, threads, out.data());
}

void bind_bit_plane_matmul(nb::module_& m) {
    m.def("pack_planes", &pack_planes, nb::arg("codes"), nb::arg("rows_first"), nb::arg("threads"), nb::arg("out"));
    m.def("bit_plane_matmul", &bit_plane_matmul, nb::arg("weights"), nb::arg("weight_rows_first"),
          nb::arg("activations"), nb::arg("activation_rows_first"), nb::arg("k"), nb::arg("use_xor"), nb::arg("path"),
          nb::arg("threads"), nb::arg("out"));
    m.def("bit_plane_path", &best_path);
}

}  // namespace bitwright
