// A Llama-like decoder on weights in few bits: tokens in, logits out, one parallel region per call.
//
// Every phase of a layer cuts rows of its matrices (units of 32), or tokens, or heads, into one part per thread; threads
// meet at a barrier between phases. What a number is computed from does not depend on the cut nor on how many tokens a
// call has, so logits are the same bits for any number of threads and for a prompt in one call or in many.
//
// Queries and keys are rotated in neighbouring pairs (2i, 2i + 1), as the rows lie in GGUF files, so that the thread that
// computes a pair also rotates it; scores do not change when queries and keys are reordered alike.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "clones.hpp"
#include "decode_attention.hpp"
#include "low_bit_rows.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

using decoding::Half;

namespace {

constexpr size_t kUnit = 32;    // rows of a matrix that go to one thread: a group of the activations they become
constexpr size_t kTokens = 32;  // of a prompt, which pass through a layer together

template <typename T, size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

}  // namespace

BITWRIGHT_CLONES static void rms_norm(const float* x, const float* weight, size_t size, float eps, float* out) {
    constexpr size_t kSums = 16;
    float sums[kSums] = {};
    for (size_t i = 0; i + kSums <= size; i += kSums)
        for (size_t j = 0; j < kSums; ++j) sums[j] += x[i + j] * x[i + j];
    float total = 0;
    for (float sum : sums) total += sum;
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
    for (size_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * factor);
}

// Turns pairs of neighbours by the angles whose cosines and sines are given, (size / 2) each.
BITWRIGHT_CLONES static void rotate_pairs(float* x, size_t size, const float* cosines, const float* sines) {
    for (size_t i = 0; i < size / 2; ++i) {
        const float first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * cosines[i] - second * sines[i];
        x[2 * i + 1] = second * cosines[i] + first * sines[i];
    }
}

// e^x with a relative error of 2e-7; below -87 it is e^-87.
static inline float exponential(float x) {
    const float turns = std::max(x, -87.0f) * 1.44269504f;
    const float shifted = turns + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
    uint32_t whole;
    std::memcpy(&whole, &shifted, sizeof(whole));
    const float f = turns - (shifted - 12582912.0f);
    float value = 1.5403530e-4f;
    value = value * f + 1.3333558e-3f;
    value = value * f + 9.6181291e-3f;
    value = value * f + 5.5504109e-2f;
    value = value * f + 2.4022651e-1f;
    value = value * f + 6.9314718e-1f;
    value = value * f + 1.0f;
    const uint32_t bits = (whole - 0x4b400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return value * power;
}

// gate = silu(gate) * up
BITWRIGHT_CLONES static void swish_product(float* gate, const float* up, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        const float x = gate[i], decay = exponential(-std::fabs(x));  // of the sigmoid on either side of 0
        gate[i] = x * up[i] * ((x < 0 ? decay : 1.0f) / (1.0f + decay));
    }
}

BITWRIGHT_CLONES static void to_half(const float* from, size_t size, Half* to) {
    for (size_t i = 0; i < size; ++i) {
        const auto half = static_cast<_Float16>(from[i]);
        std::memcpy(&to[i].bits, &half, sizeof(half));
    }
}

BITWRIGHT_CLONES static void add(const float* from, size_t size, float* to) {
    for (size_t i = 0; i < size; ++i) to[i] += from[i];
}

namespace {

void store(const float* from, size_t size, float* to) { std::copy_n(from, size, to); }
void store(const float* from, size_t size, Half* to) { to_half(from, size, to); }

struct Sizes {
    size_t vocabulary, hidden, layers, heads, kv_heads, head_dim, feed_forward, capacity;
};

struct Layer {
    std::vector<float> attention_norm, feed_forward_norm;
    LowBitRows query, key, value, output, gate, up, down;
};

class LlamaDecoder {
   public:
    // Cosines and sines (capacity, head_dim / 2) of every position.
    LlamaDecoder(size_t vocabulary, size_t hidden, size_t layers, size_t heads, size_t kv_heads, size_t head_dim,
                 size_t feed_forward, float norm_eps, bool half_cache, Array<const float, 2> cosines,
                 Array<const float, 2> sines)
        : sizes_{vocabulary, hidden, layers, heads, kv_heads, head_dim, feed_forward, cosines.shape(0)},
          eps_(norm_eps), layers_(layers), cosines_(cosines.data(), cosines.data() + cosines.size()),
          sines_(sines.data(), sines.data() + sines.size()) {
        const size_t widths[] = {hidden, heads * head_dim, kv_heads * head_dim, feed_forward};
        for (size_t width : widths)
            if (!width || width % kUnit) throw std::invalid_argument("widths are multiples of 32");
        if (!layers || !vocabulary || heads % kv_heads || head_dim % 2)
            throw std::invalid_argument("heads share key-value heads evenly and have pairs of channels");
        if (!sizes_.capacity || cosines.shape(1) != head_dim / 2 || sines.shape(0) != cosines.shape(0) ||
            sines.shape(1) != cosines.shape(1))
            throw std::invalid_argument("cosines and sines are (capacity, head_dim / 2)");
        const size_t numbers = layers * kv_heads * sizes_.capacity * head_dim;
        if (half_cache) cache_ = Cache<Half>{std::vector<Half>(numbers), std::vector<Half>(numbers)};
        else cache_ = Cache<float>{std::vector<float>(numbers), std::vector<float>(numbers)};
    }

    void set_norm(const std::string& name, size_t layer, Array<const float, 1> weight) {
        if (weight.size() != sizes_.hidden) throw std::invalid_argument("a norm has as many weights as channels");
        std::vector<float> held(weight.data(), weight.data() + weight.size());
        if (name == "norm") norm_ = std::move(held);
        else if (name == "attention_norm") layers_.at(layer).attention_norm = std::move(held);
        else if (name == "feed_forward_norm") layers_.at(layer).feed_forward_norm = std::move(held);
        else throw std::invalid_argument("there is no norm " + name);
    }

    void set_matrix(const std::string& name, size_t layer, Array<const uint8_t, 2> codes, Array<const uint16_t, 2> scales,
                    std::optional<Array<const uint16_t, 2>> minimums, int bits) {
        const size_t rows = codes.shape(0), inputs = codes.shape(1);
        auto fits = [&](const auto& numbers) {
            return numbers.shape(0) == rows && numbers.shape(1) == inputs / kGroup;
        };
        const auto [to, wanted_rows, wanted_inputs] = place(name, layer);
        if (rows != wanted_rows || inputs != wanted_inputs || !fits(scales) || (minimums && !fits(*minimums)))
            throw std::invalid_argument("the sizes of " + name + " do not fit");
        *to = LowBitRows(codes.data(), scales.data(), minimums ? minimums->data() : nullptr, rows, inputs, bits);
    }

    size_t length() const { return length_; }
    void truncate(size_t length) {
        if (length > length_) throw std::invalid_argument("a cache is cut, not extended");
        length_ = length;
    }

    // Bytes of weights that one token reads.
    size_t weight_bytes() const {
        size_t bytes = head().bytes() + norm_.size() * sizeof(float);
        for (const Layer& layer : layers_) {
            for (const LowBitRows* each : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up,
                                           &layer.down})
                bytes += each->bytes();
            bytes += 2 * sizes_.hidden * sizeof(float);
        }
        return bytes;
    }

    // Appends token ids; logits (tokens or 1, vocabulary) of all of them, or of the last.
    void forward(Array<const int64_t, 1> ids, const std::string& path, int threads, Array<float, 2> logits) {
        const size_t tokens = ids.size();
        const bool all = logits.shape(0) == tokens;
        if (!tokens || tokens > sizes_.capacity - length_) throw std::invalid_argument("the tokens exceed the cache");
        if ((!all && logits.shape(0) != 1) || logits.shape(1) != sizes_.vocabulary)
            throw std::invalid_argument("logits are (tokens or 1, vocabulary)");
        for (size_t i = 0; i < tokens; ++i)
            if (ids.data()[i] < 0 || static_cast<size_t>(ids.data()[i]) >= sizes_.vocabulary)
                throw std::invalid_argument("a token id is outside the vocabulary");
        check_complete();
        const std::string_view attention_path = path == "vnni" ? decoding::decode_attention_path() : path;
        nb::gil_scoped_release release;
        std::visit(
            [&](auto& cache) {
                for (size_t at = 0; at < tokens; at += kTokens) {
                    const size_t count = std::min(tokens - at, kTokens);
                    Part part{ids.data() + at, count, nullptr, 0, path, attention_path};
                    if (all) part.logits = logits.data() + at * sizes_.vocabulary, part.scored = count;
                    else if (at + count == tokens) part.logits = logits.data(), part.scored = 1;
                    run(cache, part, threads);
                    length_ += count;
                }
            },
            cache_);
    }

   private:
    template <typename T>
    struct Cache {
        std::vector<T> keys, values;  // (layers, key-value heads, capacity, channels)
    };

    // Tokens that pass together; the last `scored` get logits.
    struct Part {
        const int64_t* ids;
        size_t tokens;
        float* logits;
        size_t scored;
        std::string_view path, attention_path;
    };

    // What the threads of a call share. Rows of tokens.
    struct State {
        std::vector<float> x, query, mixed;
        Int8Activations normed, attended, gated;
        State(const Sizes& s, size_t tokens)
            : x(tokens * s.hidden), query(tokens * s.heads * s.head_dim), mixed(query.size()), normed(tokens, s.hidden),
              attended(tokens, s.heads * s.head_dim), gated(tokens, s.feed_forward) {}
    };

    // What a thread has of its own; all is allocated before the threads start, which must all reach every barrier.
    struct Own {
        std::vector<float> made, other, normed;
        decoding::Scratch scratch;
    };

    struct Place {
        LowBitRows* rows;
        size_t outputs, inputs;
    };
    Place place(const std::string& name, size_t layer) {
        const Sizes& s = sizes_;
        if (name == "embedding") return {&embedding_, s.vocabulary, s.hidden};
        if (name == "lm_head") return {&lm_head_, s.vocabulary, s.hidden};
        Layer& of = layers_.at(layer);
        const size_t heads = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
        if (name == "query") return {&of.query, heads, s.hidden};
        if (name == "key") return {&of.key, kv, s.hidden};
        if (name == "value") return {&of.value, kv, s.hidden};
        if (name == "output") return {&of.output, s.hidden, heads};
        if (name == "gate") return {&of.gate, s.feed_forward, s.hidden};
        if (name == "up") return {&of.up, s.feed_forward, s.hidden};
        if (name == "down") return {&of.down, s.hidden, s.feed_forward};
        throw std::invalid_argument("there is no matrix " + name);
    }
    const LowBitRows& head() const { return lm_head_.rows() ? lm_head_ : embedding_; }

    void check_complete() const {
        bool whole = embedding_.rows() && norm_.size();
        for (const Layer& of : layers_) {
            whole = whole && of.attention_norm.size() && of.feed_forward_norm.size();
            for (const LowBitRows* each : {&of.query, &of.key, &of.value, &of.output, &of.gate, &of.up, &of.down})
                whole = whole && each->rows();
        }
        if (!whole) throw std::invalid_argument("the decoder lacks weights");
    }

    // This thread's share [begin, end) of `count`.
    static std::pair<size_t, size_t> share(size_t count, int thread, int used) {
        const size_t at = static_cast<size_t>(thread), parts = static_cast<size_t>(used);
        return {count * at / parts, count * (at + 1) / parts};
    }

    template <typename T>
    void run(Cache<T>& cache, const Part& part, int threads) {
        const Sizes& s = sizes_;
        const decoding::Block block = decoding::block_of(s.heads / s.kv_heads, s.head_dim, s.head_dim, s.head_dim,
                                                         s.head_dim, sizeof(T));
        const size_t most_rows = std::max({(s.heads + 2 * s.kv_heads) * s.head_dim, s.feed_forward, s.hidden});
        const size_t room = part.tokens == 1 ? most_rows : part.tokens * kUnit;
        std::vector<Own> own(static_cast<size_t>(std::max(threads, 1)));
        for (Own& each : own) {
            each.made.resize(room), each.other.resize(room), each.normed.resize(s.hidden);
            decoding::make_room(block, each.scratch);
            each.scratch.keys.reserve(block.keys_per_run * block.query_width);
            each.scratch.values.reserve(block.keys_per_run * block.out_width);
        }
        State state(s, part.tokens);
        Barrier barrier(threads);
        run_threads(threads, [&](int thread, int used) {
            pass(cache, part, block, state, own[static_cast<size_t>(thread)], barrier, thread, used);
        });
    }

    // One thread's part of a pass through all layers.
    template <typename T>
    void pass(Cache<T>& cache, const Part& part, const decoding::Block& block, State& state, Own& own, Barrier& barrier,
              int thread, int used) {
        const Sizes& s = sizes_;
        const size_t tokens = part.tokens, width = s.heads * s.head_dim;
        auto meet = [&] {
            if (used > 1) barrier.wait();
        };
        const auto [first_token, last_token] = share(tokens, thread, used);
        std::vector<float>&made = own.made, &other = own.other;

        // Rows [begin, end) of a matrix, all at once for one token, else by units: each(begin, end, outputs, stride).
        auto in_steps = [&](size_t begin, size_t end, auto&& each) {
            const size_t step = tokens == 1 ? std::max(end - begin, kUnit) : kUnit;
            for (size_t row = begin; row < end; row += step) each(row, std::min(row + step, end));
        };
        // Units [first, last) of several matrices that lie behind each other: visit(matrix, begin row, end row).
        auto spread = [&](std::initializer_list<const LowBitRows*> matrices, auto&& visit) {
            size_t units = 0;
            for (const LowBitRows* each : matrices) units += each->rows() / kUnit;
            const auto [first, last] = share(units, thread, used);
            size_t at = 0;
            for (const LowBitRows* each : matrices) {
                const size_t here = each->rows() / kUnit, begin = std::max(first, at), end = std::min(last, at + here);
                if (begin < end) visit(*each, (begin - at) * kUnit, (end - at) * kUnit);
                at += here;
            }
        };
        auto normalise = [&](const std::vector<float>& weight, Int8Activations& to) {
            for (size_t t = first_token; t < last_token; ++t) {
                rms_norm(state.x.data() + t * s.hidden, weight.data(), s.hidden, eps_, own.normed.data());
                quantise(own.normed.data(), t, 0, s.hidden, to);
            }
        };
        // x += matrix . activations
        auto add_products = [&](const LowBitRows& matrix, const Int8Activations& from) {
            spread({&matrix}, [&](const LowBitRows& rows, size_t begin, size_t end) {
                in_steps(begin, end, [&](size_t row, size_t stop) {
                    const size_t count = stop - row;
                    rows.products(part.path, from, 0, tokens, row, stop, made.data(), count);
                    for (size_t t = 0; t < tokens; ++t)
                        add(made.data() + t * count, count, state.x.data() + t * s.hidden + row);
                });
            });
        };

        for (size_t t = first_token; t < last_token; ++t)
            embedding_.row(static_cast<size_t>(part.ids[t]), state.x.data() + t * s.hidden);
        for (size_t index = 0; index < s.layers; ++index) {
            const Layer& layer = layers_[index];
            T* keys = cache.keys.data() + index * s.kv_heads * s.capacity * s.head_dim;
            T* values = cache.values.data() + index * s.kv_heads * s.capacity * s.head_dim;

            normalise(layer.attention_norm, state.normed);
            meet();
            spread({&layer.query, &layer.key, &layer.value}, [&](const LowBitRows& rows, size_t begin, size_t end) {
                in_steps(begin, end, [&](size_t row, size_t stop) {
                    const size_t count = stop - row;
                    rows.products(part.path, state.normed, 0, tokens, row, stop, made.data(), count);
                    for (size_t t = 0; t < tokens; ++t) {
                        // Pieces that end with a head, since angles begin anew and a cache holds head after head.
                        for (size_t at = row, piece; at < stop; at += piece) {
                            const size_t channel = at % s.head_dim;
                            piece = std::min(stop - at, s.head_dim - channel);
                            float* numbers = made.data() + t * count + at - row;
                            const size_t position = length_ + t, angle = (position * s.head_dim + channel) / 2;
                            if (&rows != &layer.value)
                                rotate_pairs(numbers, piece, cosines_.data() + angle, sines_.data() + angle);
                            if (&rows == &layer.query) {
                                std::copy_n(numbers, piece, state.query.data() + t * width + at);
                            } else {
                                T* to = &rows == &layer.key ? keys : values;
                                store(numbers, piece, to + (at / s.head_dim * s.capacity + position) * s.head_dim + channel);
                            }
                        }
                    }
                });
            });
            meet();
            attend(keys, values, part, state, block, own.scratch, thread, used);
            meet();
            for (size_t t = first_token; t < last_token; ++t)
                quantise(state.mixed.data() + t * width, t, 0, width, state.attended);
            meet();
            add_products(layer.output, state.attended);
            meet();
            normalise(layer.feed_forward_norm, state.normed);
            meet();
            spread({&layer.gate}, [&](const LowBitRows& rows, size_t begin, size_t end) {
                in_steps(begin, end, [&](size_t row, size_t stop) {
                    const size_t count = stop - row;
                    rows.products(part.path, state.normed, 0, tokens, row, stop, made.data(), count);
                    layer.up.products(part.path, state.normed, 0, tokens, row, stop, other.data(), count);
                    swish_product(made.data(), other.data(), tokens * count);
                    for (size_t t = 0; t < tokens; ++t) quantise(made.data() + t * count, t, row, stop, state.gated);
                });
            });
            meet();
            add_products(layer.down, state.gated);
            meet();
        }
        if (!part.scored) return;
        const size_t skipped = tokens - part.scored;
        if (last_token > skipped) normalise(norm_, state.normed);
        meet();
        const auto [first, last] = share((s.vocabulary + kUnit - 1) / kUnit, thread, used);
        const size_t step = part.scored == 1 ? std::max<size_t>(last - first, 1) : 1;
        for (size_t unit = first; unit < last; unit += step) {
            const size_t begin = unit * kUnit, end = std::min(std::min(unit + step, last) * kUnit, s.vocabulary);
            head().products(part.path, state.normed, skipped, part.scored, begin, end, part.logits + begin, s.vocabulary);
        }
    }

    // Every query head of every token, in this thread's share of them, to the keys up to its own position.
    template <typename T>
    void attend(const T* keys, const T* values, const Part& part, State& state, const decoding::Block& block,
                decoding::Scratch& scratch, int thread, int used) const {
        const Sizes& s = sizes_;
        const size_t shared = s.heads / s.kv_heads;
        // whole groups of heads: the arithmetic of a row depends on how many rows a block has
        const auto [first, last] = share(part.tokens * s.kv_heads, thread, used);
        for (size_t group = first; group < last; ++group) {
            const size_t token = group / s.kv_heads, kv_head = group % s.kv_heads, at = group * shared;
            decoding::begin(block, state.query.data() + at * s.head_dim, 1.0f / std::sqrt(static_cast<float>(s.head_dim)),
                            scratch);
            const size_t from = kv_head * s.capacity * s.head_dim, count = length_ + token + 1;
            for (size_t key = 0; key < count; key += block.keys_per_run)
                decoding::attend_by(part.attention_path, block, keys + from + key * s.head_dim,
                                    values + from + key * s.head_dim, std::min(count - key, block.keys_per_run), scratch);
            for (size_t row = 0; row < block.rows; ++row) {
                const float inverse = 1.0f / scratch.states[row].total;
                for (size_t c = 0; c < s.head_dim; ++c)
                    state.mixed[(at + row) * s.head_dim + c] = scratch.out[row * block.out_width + c] * inverse;
            }
        }
    }

    Sizes sizes_;
    float eps_;
    size_t length_ = 0;
    std::vector<Layer> layers_;
    std::vector<float> norm_, cosines_, sines_;
    LowBitRows embedding_, lm_head_;  // the embedding is the head too where there is no other
    std::variant<Cache<float>, Cache<Half>> cache_;
};

}  // namespace

void bind_llama_decoder(nb::module_& m) {
    nb::class_<LlamaDecoder>(m, "LlamaDecoder")
        .def(nb::init<size_t, size_t, size_t, size_t, size_t, size_t, size_t, float, bool, Array<const float, 2>,
                      Array<const float, 2>>(),
             nb::arg("vocabulary"), nb::arg("hidden"), nb::arg("layers"), nb::arg("heads"), nb::arg("kv_heads"),
             nb::arg("head_dim"), nb::arg("feed_forward"), nb::arg("norm_eps"), nb::arg("half_cache"),
             nb::arg("cosines"), nb::arg("sines"))
        .def("set_norm", &LlamaDecoder::set_norm, nb::arg("name"), nb::arg("layer"), nb::arg("weight"))
        .def("set_matrix", &LlamaDecoder::set_matrix, nb::arg("name"), nb::arg("layer"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("minimums").none(), nb::arg("bits"))
        .def("forward", &LlamaDecoder::forward, nb::arg("ids"), nb::arg("path"), nb::arg("threads"), nb::arg("logits"))
        .def("truncate", &LlamaDecoder::truncate, nb::arg("length"))
        .def_prop_ro("length", &LlamaDecoder::length)
        .def_prop_ro("weight_bytes", &LlamaDecoder::weight_bytes);
    m.def("low_bit_rows_path", [] { return std::string(low_bit_rows_path()); });
}

}  // namespace bitwright
