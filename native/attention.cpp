// Exact softmax attention tile by tile, forward and backward (arXiv 2307.08691): scores of a block of queries and a block
// of keys stay in the second-level cache, outputs are rescaled as larger scores come, and one number per query, the
// log-sum-exp, is kept for the backward pass. Memory is linear in the tokens.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

using Rows = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Written = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Plane = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kRows = 96;      // queries of a block
constexpr size_t kColumns = 256;  // keys of a block: 96 x 256 scores are 96 KB
constexpr size_t kPad = 16;       // keys are padded to a vector
constexpr float kLog2E = 1.44269504f;

inline size_t round_up(size_t count, size_t to) { return (count + to - 1) / to * to; }

// One sequence: rows of its queries and keys, and where its transposed keys begin, in padded keys.
struct Sequence {
    size_t q_begin, q_count, k_begin, k_count, t_begin;
    size_t padded() const { return round_up(k_count, kColumns); }
};

// q, out, dout, dq (tokens, heads, channels); k, v, dk, dv (tokens, kv_heads, channels); lse, delta (tokens, heads).
// Transposed keys and values: per sequence and head (channels, padded keys). left, right: keys that a query sees beside
// that at its own place, aligned at the ends; negative: all.
struct AttentionJob {
    const float *q, *k, *v, *keys_t, *values_t, *dout, *delta;
    float *out, *lse, *dk, *dv;
    size_t heads, kv_heads, channels;
    float scale, cap;
    int64_t left, right;

    // Keys [begin, end) that a query sees.
    void range(const Sequence& sequence, size_t row, size_t* begin, size_t* end) const {
        const int64_t keys = static_cast<int64_t>(sequence.k_count);
        const int64_t place = static_cast<int64_t>(row) + keys - static_cast<int64_t>(sequence.q_count);
        const int64_t from = left < 0 ? 0 : std::clamp<int64_t>(place - left, 0, keys);
        const int64_t to = right < 0 ? keys : std::clamp<int64_t>(place + right + 1, 0, keys);
        *begin = static_cast<size_t>(from);
        *end = static_cast<size_t>(std::max(from, to));
    }
};

#define BYTES 16
#define ROWS 4
#define WIDE 2
namespace portable {
#include "attention_paths.hpp"
}
#undef BYTES
#undef ROWS
#undef WIDE

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_PATHS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define BYTES 32
#define ROWS 4
#define WIDE 2
namespace avx2 {
#include "attention_paths.hpp"
}
#undef BYTES
#undef ROWS
#undef WIDE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define BYTES 64
#define ROWS 6
#define WIDE 4
namespace avx512 {
#include "attention_paths.hpp"
}
#undef BYTES
#undef ROWS
#undef WIDE
#pragma GCC pop_options
#endif

std::string fastest_path() {
#ifdef WITH_PATHS
    if (cpu().avx512) return "avx512";
    if (cpu().avx2) return "avx2";
#endif
    return "portable";
}

std::vector<Sequence> sequences_of(const Offsets& q_offsets, const Offsets& k_offsets, size_t queries, size_t keys) {
    if (q_offsets.size() != k_offsets.size() || q_offsets.size() < 1) throw std::invalid_argument("offsets do not match");
    std::vector<Sequence> found;
    size_t padded = 0;
    for (size_t i = 0; i + 1 < q_offsets.size(); ++i) {
        const int64_t q = q_offsets.data()[i], q_end = q_offsets.data()[i + 1];
        const int64_t k = k_offsets.data()[i], k_end = k_offsets.data()[i + 1];
        if (q < 0 || q_end < q || q_end > static_cast<int64_t>(queries) || k < 0 || k_end < k ||
            k_end > static_cast<int64_t>(keys))
            throw std::invalid_argument("offsets do not rise, or leave the rows");
        found.push_back({static_cast<size_t>(q), static_cast<size_t>(q_end - q), static_cast<size_t>(k),
                         static_cast<size_t>(k_end - k), padded});
        padded += found.back().padded();
    }
    return found;
}

// Rows (tokens, kv_heads, channels) of every sequence and head as (channels, padded keys), the padding 0.
std::vector<float> transposed(const std::vector<Sequence>& sequences, const float* rows, size_t heads, size_t channels,
                              int threads) {
    size_t padded = 0;
    for (const auto& sequence : sequences) padded += sequence.padded();
    std::vector<float> made(padded * heads * channels);
    parallel_for(sequences.size() * heads, 1, threads, [&](size_t begin, size_t end, int) {
        for (size_t task = begin; task < end; ++task) {
            const Sequence& sequence = sequences[task / heads];
            const size_t head = task % heads, width = sequence.padded();
            float* to = made.data() + sequence.t_begin * heads * channels + head * channels * width;
            const float* from = rows + sequence.k_begin * heads * channels + head * channels;
            for (size_t start = 0; start < sequence.k_count; start += kPad) {
                const size_t stop = std::min(start + kPad, sequence.k_count);
                for (size_t c = 0; c < channels; ++c)
                    for (size_t key = start; key < stop; ++key) to[c * width + key] = from[key * heads * channels + c];
            }
        }
    });
    return made;
}

void check(const Rows& q, const Rows& k, const Rows& v) {
    const size_t heads = q.shape(1), kv_heads = k.shape(1), channels = q.shape(2);
    if (channels == 0 || channels % kPad || k.shape(2) != channels || v.shape(2) != channels || v.shape(0) != k.shape(0) ||
        v.shape(1) != kv_heads || kv_heads == 0 || heads % kv_heads)
        throw std::invalid_argument("shapes of queries, keys and values do not fit");
}

struct Block {
    size_t sequence, head, first, last;
};

void attention_forward(Rows q, Rows k, Rows v, Offsets q_offsets, Offsets k_offsets, float scale, float cap, int64_t left,
                       int64_t right, const std::string& path, int threads, Written out, Plane lse) {
    check(q, k, v);
    const auto sequences = sequences_of(q_offsets, k_offsets, q.shape(0), k.shape(0));
    if (out.size() != q.size() || lse.size() != q.shape(0) * q.shape(1)) throw std::invalid_argument("results do not fit");
    nb::gil_scoped_release release;
    const auto keys_t = transposed(sequences, k.data(), k.shape(1), k.shape(2), threads);
    AttentionJob job{};
    job.q = q.data(), job.k = k.data(), job.v = v.data(), job.keys_t = keys_t.data();
    job.out = out.data(), job.lse = lse.data();
    job.heads = q.shape(1), job.kv_heads = k.shape(1), job.channels = q.shape(2);
    job.scale = scale, job.cap = cap, job.left = left, job.right = right;
    auto rows = portable::forward_rows;
#ifdef WITH_PATHS
    if (path == "avx2") rows = avx2::forward_rows;
    if (path == "avx512") rows = avx512::forward_rows;
#endif
    std::vector<Block> blocks;
    for (size_t s = 0; s < sequences.size(); ++s)
        for (size_t head = 0; head < job.heads; ++head)
            for (size_t last = sequences[s].q_count; last > 0;) {  // the last rows see most keys: they begin
                const size_t first = (last - 1) / kRows * kRows;
                blocks.push_back({s, head, first, last});
                last = first;
            }
    parallel_for(blocks.size(), 1, threads, [&](size_t begin, size_t end, int) {
        for (size_t at = begin; at < end; ++at)
            rows(job, sequences[blocks[at].sequence], blocks[at].head, blocks[at].first, blocks[at].last);
    });
}

// The gradient of the queries is summed in a fixed order, so that results do not depend on which thread was faster.
void attention_backward(Rows q, Rows k, Rows v, Rows out, Rows dout, Plane lse, Offsets q_offsets, Offsets k_offsets,
                        float scale, float cap, int64_t left, int64_t right, const std::string& path, int threads,
                        Written dq, Written dk, Written dv) {
    check(q, k, v);
    const auto sequences = sequences_of(q_offsets, k_offsets, q.shape(0), k.shape(0));
    const size_t heads = q.shape(1), kv_heads = k.shape(1), channels = q.shape(2);
    if (out.size() != q.size() || dout.size() != q.size() || dq.size() != q.size() || dk.size() != k.size() ||
        dv.size() != v.size() || lse.size() != q.shape(0) * heads)
        throw std::invalid_argument("results do not fit");
    nb::gil_scoped_release release;
    const auto keys_t = transposed(sequences, k.data(), kv_heads, channels, threads);
    const auto values_t = transposed(sequences, v.data(), kv_heads, channels, threads);
    std::vector<float> delta(q.shape(0) * heads);
    for (size_t row = 0; row < delta.size(); ++row) {
        float sum = 0;
        for (size_t c = 0; c < channels; ++c) sum += out.data()[row * channels + c] * dout.data()[row * channels + c];
        delta[row] = sum;
    }
    AttentionJob job{};
    job.q = q.data(), job.k = k.data(), job.v = v.data(), job.keys_t = keys_t.data(), job.values_t = values_t.data();
    job.dout = dout.data(), job.delta = delta.data(), job.lse = lse.data(), job.dk = dk.data(), job.dv = dv.data();
    job.heads = heads, job.kv_heads = kv_heads, job.channels = channels;
    job.scale = scale, job.cap = cap, job.left = left, job.right = right;
    auto columns = portable::backward_columns;
#ifdef WITH_PATHS
    if (path == "avx2") columns = avx2::backward_columns;
    if (path == "avx512") columns = avx512::backward_columns;
#endif
    // Key-value heads are independent; where they are fewer than threads, each is split, with its own sums of dq.
    const size_t pairs = sequences.size() * kv_heads, workers = static_cast<size_t>(std::max(threads, 1));
    const size_t splits = pairs == 0 || pairs >= workers ? 1 : (workers + pairs - 1) / pairs;
    std::vector<float> sums((splits - 1) * q.size());
    std::fill_n(dq.data(), dq.size(), 0.0f);
    parallel_for(pairs * splits, 1, threads, [&](size_t begin, size_t end, int) {
        for (size_t task = begin; task < end; ++task) {
            const size_t split = task % splits, pair = task / splits;
            const Sequence& sequence = sequences[pair / kv_heads];
            float* to = split == 0 ? dq.data() : sums.data() + (split - 1) * q.size();
            for (size_t first = split * kColumns; first < sequence.k_count; first += splits * kColumns)
                columns(job, sequence, pair % kv_heads, first, std::min(first + kColumns, sequence.k_count), to);
        }
    });
    for (size_t split = 1; split < splits; ++split) {
        const float* from = sums.data() + (split - 1) * q.size();
        for (size_t i = 0; i < q.size(); ++i) dq.data()[i] += from[i];
    }
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention_path", &fastest_path);
    m.def("attention_block", [] { return nb::make_tuple(kRows, kColumns, kPad); });
    m.def("attention_forward", &attention_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("q_offsets"),
          nb::arg("k_offsets"), nb::arg("scale"), nb::arg("cap"), nb::arg("left"), nb::arg("right"), nb::arg("path"),
          nb::arg("threads"), nb::arg("out"), nb::arg("lse"));
    m.def("attention_backward", &attention_backward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"),
          nb::arg("dout"), nb::arg("lse"), nb::arg("q_offsets"), nb::arg("k_offsets"), nb::arg("scale"), nb::arg("cap"),
          nb::arg("left"), nb::arg("right"), nb::arg("path"), nb::arg("threads"), nb::arg("dq"), nb::arg("dk"),
          nb::arg("dv"));
}

}  // namespace bitwright
