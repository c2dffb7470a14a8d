// One query per head against a cache of keys and values, cut over workers exactly as a partition says: a list of
// pieces (block, first tile, tiles), the pieces of a worker one after the other. A block is a key-value head of a
// sequence with the query heads that share it. What is left of a piece are a normalised output and the logarithm of
// its sum of exponentials; whoever finishes the last piece of a block merges them, in the order of the keys.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu.hpp"
#include "decode_attention.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

using Queries = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using CacheArray = nb::ndarray<nb::ro, nb::ndim<4>, nb::device::cpu>;
using Rows = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntegerRows = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Outputs = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

namespace {

using namespace decoding;

// Rows of `channels` numbers as rows of `width` floats.
template <typename T>
void pad_rows(const T* from, size_t stride, size_t count, size_t channels, size_t width, std::vector<float>& to) {
    to.assign(count * width, 0.0f);
    for (size_t row = 0; row < count; ++row)
        for (size_t c = 0; c < channels; ++c) to[row * width + c] = to_float(from[row * stride + c]);
}

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#define LANES 16
#include "decode_attention_paths.hpp"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "decode_attention_paths.hpp"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define LANES 4
#include "decode_attention_paths.hpp"
#undef LANES
}  // namespace portable

constexpr size_t kWidest = 16;              // floats of the widest vector
constexpr size_t kRunBytes = 32 * 1024;     // keys of a run stay in the first-level cache while all rows use them

size_t padded(size_t channels) { return (channels + kWidest - 1) / kWidest * kWidest; }

}  // namespace

namespace decoding {

std::string_view decode_attention_path() { return cpu().avx512 ? "avx512" : cpu().avx2 ? "avx2" : "portable"; }

Block block_of(size_t rows, size_t channels, size_t value_channels, size_t key_stride, size_t value_stride,
               size_t item_bytes) {
    const size_t keys = kRunBytes / std::max<size_t>(channels * item_bytes, 1) / 16 * 16;
    return {rows,       channels,     value_channels, padded(channels), padded(value_channels),
            key_stride, value_stride, std::clamp<size_t>(keys, 16, 256)};
}

void make_room(const Block& block, Scratch& scratch) {
    scratch.query.assign(block.rows * block.query_width, 0.0f);
    scratch.scores.resize(block.rows * block.keys_per_run);
    scratch.out.resize(block.rows * block.out_width);
    scratch.states.resize(block.rows);
}

void begin(const Block& block, const float* query, float scale, Scratch& scratch) {
    std::fill(scratch.out.begin(), scratch.out.end(), 0.0f);
    std::fill(scratch.states.begin(), scratch.states.end(), RowState{-std::numeric_limits<float>::infinity(), 0.0f});
    const float in_powers_of_two = scale * static_cast<float>(1 / kLn2);
    for (size_t row = 0; row < block.rows; ++row)
        for (size_t c = 0; c < block.channels; ++c)
            scratch.query[row * block.query_width + c] = query[row * block.channels + c] * in_powers_of_two;
}

template <typename T>
void attend_by(std::string_view path, const Block& block, const T* keys, const T* values, size_t count,
               Scratch& scratch) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (path == "avx512") return avx512::attend(block, keys, values, count, scratch);
    if (path == "avx2") return avx2::attend(block, keys, values, count, scratch);
#endif
    portable::attend(block, keys, values, count, scratch);
}
template void attend_by(std::string_view, const Block&, const float*, const float*, size_t, Scratch&);
template void attend_by(std::string_view, const Block&, const Half*, const Half*, size_t, Scratch&);
template void attend_by(std::string_view, const Block&, const BFloat16*, const BFloat16*, size_t, Scratch&);

}  // namespace decoding

namespace {

struct Job {
    const float* query;  // (sequences, heads, rows, channels)
    const uint8_t *keys, *values, *new_keys, *new_values;
    size_t key_steps[3], value_steps[3];  // bytes from one sequence (or page), head and token to the next
    const int64_t *lengths, *table, *pieces_block, *pieces_first, *pieces_count;
    size_t sequences, heads, page, pages, pages_per_sequence, tile, item, pieces;
    Block block;
    float scale;
    std::string_view path;
    float *out, *lse;
    // Of every piece: where its partial result lies, or -1 where it is the whole block.
    std::vector<int64_t> slots;
    std::vector<size_t> first_piece;  // of every block, and one past the last
    std::vector<float> partial_out;
    std::vector<double> partial_lse;
    std::unique_ptr<std::atomic<int>[]> missing;  // pieces of a block that are not finished

    size_t length(size_t block_index) const { return static_cast<size_t>(lengths[block_index / heads]); }
};

// The place of a token in a cache, and how many tokens follow it there without a gap.
const uint8_t* token_at(const Job& job, const uint8_t* cache, const size_t (&steps)[3], size_t sequence, size_t head,
                        size_t token, size_t& follow) {
    if (!job.table) {
        follow = std::numeric_limits<size_t>::max();
        return cache + sequence * steps[0] + head * steps[1] + token * steps[2];
    }
    const int64_t page = job.table[sequence * job.pages_per_sequence + token / job.page];
    if (page < 0 || static_cast<size_t>(page) >= job.pages)
        throw std::invalid_argument("the page table names page " + std::to_string(page) + " for token " +
                                    std::to_string(token) + " of sequence " + std::to_string(sequence));
    follow = job.page - token % job.page;
    return cache + static_cast<size_t>(page) * steps[0] + head * steps[1] + token % job.page * steps[2];
}

void append(const Job& job, size_t block_index) {
    const size_t sequence = block_index / job.heads, head = block_index % job.heads, last = job.length(block_index) - 1;
    size_t follow;
    auto place = [&](const uint8_t* cache, const size_t (&steps)[3]) {
        return const_cast<uint8_t*>(token_at(job, cache, steps, sequence, head, last, follow));
    };
    const size_t key_bytes = job.block.channels * job.item, value_bytes = job.block.value_channels * job.item;
    std::memcpy(place(job.keys, job.key_steps), job.new_keys + block_index * key_bytes, key_bytes);
    std::memcpy(place(job.values, job.value_steps), job.new_values + block_index * value_bytes, value_bytes);
}

void merge(Job& job, size_t block_index) {
    const Block& block = job.block;
    const size_t begin = job.first_piece[block_index], end = job.first_piece[block_index + 1];
    std::vector<double> weights(end - begin);
    for (size_t row = 0; row < block.rows; ++row) {
        double most = -std::numeric_limits<double>::infinity(), total = 0;
        for (size_t piece = begin; piece < end; ++piece) {
            const double lse = job.partial_lse[static_cast<size_t>(job.slots[piece]) * block.rows + row];
            most = lse > most || std::isnan(lse) ? lse : most;
        }
        for (size_t piece = begin; piece < end; ++piece) {
            const double lse = job.partial_lse[static_cast<size_t>(job.slots[piece]) * block.rows + row];
            total += weights[piece - begin] = std::exp(lse - most);
        }
        const size_t at = block_index * block.rows + row;
        float* out = job.out + at * block.value_channels;
        std::fill_n(out, block.value_channels, 0.0f);
        for (size_t piece = begin; piece < end; ++piece) {
            const float weight = static_cast<float>(weights[piece - begin] / total);
            const float* part =
                job.partial_out.data() +
                (static_cast<size_t>(job.slots[piece]) * block.rows + row) * block.value_channels;
            for (size_t c = 0; c < block.value_channels; ++c) out[c] += weight * part[c];
        }
        job.lse[at] = static_cast<float>(most + std::log(total));
    }
}

template <typename T>
void run_piece(Job& job, size_t piece, Scratch& scratch) {
    const Block& block = job.block;
    const size_t index = static_cast<size_t>(job.pieces_block[piece]), length = job.length(index);
    const size_t sequence = index / job.heads, head = index % job.heads;
    const size_t first = static_cast<size_t>(job.pieces_first[piece]) * job.tile;
    const size_t last = std::min(length, first + static_cast<size_t>(job.pieces_count[piece]) * job.tile);
    if (job.new_keys && last == length) append(job, index);
    begin(block, job.query + index * block.rows * block.channels, job.scale, scratch);
    for (size_t token = first; token < last;) {
        size_t follow, count = std::min(last - token, block.keys_per_run);
        const uint8_t* keys = token_at(job, job.keys, job.key_steps, sequence, head, token, follow);
        const uint8_t* values = token_at(job, job.values, job.value_steps, sequence, head, token, follow);
        count = std::min(count, follow);
        attend_by(job.path, block, reinterpret_cast<const T*>(keys), reinterpret_cast<const T*>(values), count, scratch);
        token += count;
    }
    const int64_t slot = job.slots[piece];
    for (size_t row = 0; row < block.rows; ++row) {
        const RowState& state = scratch.states[row];
        const size_t at = (slot < 0 ? index : static_cast<size_t>(slot)) * block.rows + row;
        const double lse = state.most * kLn2 + std::log(static_cast<double>(state.total));
        const float inverse = 1.0f / state.total;
        float* to = (slot < 0 ? job.out : job.partial_out.data()) + at * block.value_channels;
        for (size_t c = 0; c < block.value_channels; ++c) to[c] = scratch.out[row * block.out_width + c] * inverse;
        if (slot < 0) job.lse[at] = static_cast<float>(lse);
        else job.partial_lse[at] = lse;
    }
    if (slot >= 0 && job.missing[index].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(job, index);
}

// Checks that the pieces cover every block once, in order, and finds where partial results go.
void prepare(Job& job) {
    const size_t blocks = job.sequences * job.heads;
    job.slots.assign(job.pieces, -1);
    job.first_piece.assign(blocks + 1, job.pieces);
    job.missing = std::make_unique<std::atomic<int>[]>(blocks);
    size_t piece = 0, slots = 0;
    for (size_t index = 0; index < blocks; ++index) {
        const size_t begin = piece, length = job.length(index), tiles = length ? (length - 1) / job.tile + 1 : 0;
        job.first_piece[index] = begin;
        size_t next = 0;
        for (; piece < job.pieces && static_cast<size_t>(job.pieces_block[piece]) == index; ++piece) {
            if (static_cast<size_t>(job.pieces_first[piece]) != next || job.pieces_count[piece] < 1)
                throw std::invalid_argument("the pieces of the partition leave gaps or overlap");
            next += static_cast<size_t>(job.pieces_count[piece]);
        }
        if (next != tiles) throw std::invalid_argument("the partition was made for other lengths or another tile");
        if (piece - begin > 1)
            for (size_t each = begin; each < piece; ++each) job.slots[each] = static_cast<int64_t>(slots++);
        job.missing[index].store(static_cast<int>(piece - begin));
        if (!tiles) {
            std::fill_n(job.out + index * job.block.rows * job.block.value_channels,
                        job.block.rows * job.block.value_channels, 0.0f);
            std::fill_n(job.lse + index * job.block.rows, job.block.rows, -std::numeric_limits<float>::infinity());
        }
    }
    if (piece != job.pieces) throw std::invalid_argument("the pieces of the partition are not in the order of blocks");
    job.partial_out.resize(slots * job.block.rows * job.block.value_channels);
    job.partial_lse.resize(slots * job.block.rows);
}

template <typename T>
void run(Job& job, const int64_t* bounds, size_t workers, int threads) {
    std::vector<Scratch> scratch(static_cast<size_t>(std::max(threads, 1)));
    const Block& block = job.block;
    parallel_for(workers, 1, threads, [&](size_t begin, size_t end, int thread) {
        Scratch& own = scratch[static_cast<size_t>(thread)];
        if (own.states.empty()) make_room(block, own);
        for (size_t worker = begin; worker < end; ++worker)
            for (size_t piece = static_cast<size_t>(bounds[worker]); piece < static_cast<size_t>(bounds[worker + 1]);
                 ++piece)
                run_piece<T>(job, piece, own);
    });
}

void decode_attention(Queries query, CacheArray keys, CacheArray values, Integers lengths, std::optional<IntegerRows> table,
                      std::optional<Rows> new_keys, std::optional<Rows> new_values, IntegerRows pieces, Integers bounds,
                      const std::string& kind, size_t tile, float scale, const std::string& path, int threads, Outputs out,
                      Sums lse) {
    Job job{};
    job.sequences = query.shape(0), job.heads = query.shape(1);
    job.pieces = pieces.shape(1);
    const bool paged = table.has_value(), appends = new_keys.has_value() && new_values.has_value();
    auto require = [](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(what);
    };
    job.item = keys.itemsize();
    require(keys.itemsize() == values.itemsize() && keys.stride(3) == 1 && values.stride(3) == 1 &&
                keys.shape(3) == query.shape(3) && keys.shape(1) == job.heads && values.shape(1) == job.heads &&
                keys.shape(0) == values.shape(0) && keys.shape(2) == values.shape(2),
            "queries, keys and values do not fit");
    require(paged ? table->shape(0) == job.sequences : keys.shape(0) == job.sequences, "sequences do not fit");
    require(lengths.shape(0) == job.sequences && pieces.shape(0) == 3 && bounds.shape(0) >= 2 && tile > 0,
            "lengths or pieces do not fit");
    require(out.shape(0) == job.sequences && out.shape(1) == job.heads && out.shape(2) == query.shape(2) &&
                out.shape(3) == values.shape(3) && lse.shape(0) == job.sequences && lse.shape(1) == job.heads &&
                lse.shape(2) == query.shape(2),
            "outputs do not fit");
    if (appends)
        require(new_keys->itemsize() == job.item && new_values->itemsize() == job.item &&
                    new_keys->shape(0) == job.sequences && new_keys->shape(1) == job.heads &&
                    new_keys->shape(2) == keys.shape(3) && new_values->shape(0) == job.sequences &&
                    new_values->shape(1) == job.heads && new_values->shape(2) == values.shape(3),
                "new keys and values do not fit");
    job.page = keys.shape(2), job.pages = keys.shape(0), job.pages_per_sequence = paged ? table->shape(1) : 0;
    const size_t room = paged ? job.page * job.pages_per_sequence : job.page;
    for (size_t i = 0; i < job.sequences; ++i)
        require(lengths.data()[i] >= 0 && static_cast<size_t>(lengths.data()[i]) <= room, "a length exceeds the cache");
    const size_t workers = bounds.shape(0) - 1;
    require(bounds.data()[0] == 0 && static_cast<size_t>(bounds.data()[workers]) == job.pieces, "bounds do not fit");
    for (size_t worker = 0; worker < workers; ++worker)
        require(bounds.data()[worker] <= bounds.data()[worker + 1], "bounds do not fit");
    for (size_t i = 0; i < 3; ++i) {
        require(keys.stride(i) >= 0 && values.stride(i) >= 0, "negative strides");
        job.key_steps[i] = static_cast<size_t>(keys.stride(i)) * job.item;
        job.value_steps[i] = static_cast<size_t>(values.stride(i)) * job.item;
    }
    job.query = query.data();
    job.keys = static_cast<const uint8_t*>(keys.data()), job.values = static_cast<const uint8_t*>(values.data());
    if (appends) {
        job.new_keys = static_cast<const uint8_t*>(new_keys->data());
        job.new_values = static_cast<const uint8_t*>(new_values->data());
    }
    job.lengths = lengths.data(), job.table = paged ? table->data() : nullptr;
    job.pieces_block = pieces.data(), job.pieces_first = job.pieces_block + job.pieces;
    job.pieces_count = job.pieces_first + job.pieces;
    job.tile = tile, job.scale = scale, job.path = path, job.out = out.data(), job.lse = lse.data();
    const size_t channels = query.shape(3);
    job.block = block_of(query.shape(2), channels, values.shape(3), static_cast<size_t>(keys.stride(2)),
                         static_cast<size_t>(values.stride(2)), job.item);
    prepare(job);
    require(job.item == (kind == "float32" ? 4u : 2u), "keys and values are not of the type that is named");
    for (size_t i = 0; i < query.size(); ++i) require(std::isfinite(job.query[i]), "queries hold NaN or infinity");
    nb::gil_scoped_release release;
    if (kind == "float32") run<float>(job, bounds.data(), workers, threads);
    else if (kind == "float16") run<Half>(job, bounds.data(), workers, threads);
    else if (kind == "bfloat16") run<BFloat16>(job, bounds.data(), workers, threads);
    else throw std::invalid_argument("keys are float32, float16 or bfloat16");
}

}  // namespace

void bind_decode_attention(nb::module_& m) {
    m.def("decode_attention", &decode_attention, nb::arg("query"), nb::arg("keys"), nb::arg("values"),
          nb::arg("lengths"), nb::arg("table").none(), nb::arg("new_keys").none(), nb::arg("new_values").none(),
          nb::arg("pieces"), nb::arg("bounds"), nb::arg("kind"), nb::arg("tile"), nb::arg("scale"),
          nb::arg("path"), nb::arg("threads"), nb::arg("out"), nb::arg("lse"));
    m.def("decode_attention_path", [] { return std::string(decode_attention_path()); });
}

}  // namespace bitwright
