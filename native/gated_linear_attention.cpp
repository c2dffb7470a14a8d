// Gated linear attention of one head: state_t = diag(2^gate_t) state_(t-1) + key_t value_t, output_t = query_t state_t.
// In chunks: products of matrices between chunks through the state, and within a chunk through weights of its values.
// A chunk is cut in sub-chunks, and a pair of them meets at the start of the later one: what decays from the key to
// there and from there to the query are factors of at most 1. Within a sub-chunk the same factors are used (one of them
// grows) while it decays by no more than kSpan powers of two; otherwise every pair of tokens is computed by itself.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

using Tokens = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;   // (tokens, heads, channels)
using TokensOut = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using States = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;   // (sequences, heads, keys, values)
using StatesOut = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

constexpr size_t kWidest = 16;   // floats of the widest vector
constexpr float kSpan = 80.0f;   // powers of two; float32 ends at 2^128

struct Shape {
    size_t heads, keys, values, chunk, sub, padded_keys, padded_values, padded_chunk;
};

// One head of one sequence: pointers to its first token.
struct Sequence {
    const Shape& shape;
    const float *q, *k, *v, *gates;
    float scale;
    float* out;
};

struct Gradients {
    const float* out;
    float *d_q, *d_k, *d_v, *d_gates;
};

size_t padded(size_t count) { return (count + kWidest - 1) / kWidest * kWidest; }

// What is held of one chunk.
struct Chunk {
    size_t count = 0, subs = 0, most_subs;
    std::vector<float> q, k, v, decay, to_start, to_end, q_start, k_end, scaled, out, p, k_turned, k_scaled;
    std::vector<float> totals, before, after, between, whole;
    std::vector<char> factored;

    explicit Chunk(const Shape& s) : most_subs((s.chunk + s.sub - 1) / s.sub) {
        const size_t rows = s.padded_chunk * s.padded_keys;
        for (auto* each : {&q, &k, &decay, &to_start, &to_end, &q_start, &k_end, &scaled, &k_turned, &k_scaled})
            each->assign(rows, 0.0f);
        v.assign(s.padded_chunk * s.padded_values, 0.0f);
        out.assign(s.padded_chunk * s.padded_values, 0.0f);
        p.assign(s.padded_chunk * s.padded_chunk, 0.0f);
        for (auto* each : {&totals, &before, &after}) each->assign(most_subs * s.padded_keys, 0.0f);
        between.assign(most_subs * most_subs * s.padded_keys, 0.0f);
        whole.assign(s.padded_keys, 0.0f);
        factored.assign(most_subs, 0);
    }
};

// Gradients of what a chunk holds.
struct Slopes {
    std::vector<float> out, q, k, v, p, v_turned, state_turned;

    explicit Slopes(const Shape& s) {
        for (auto* each : {&out, &v, &v_turned}) each->assign(s.padded_chunk * s.padded_values, 0.0f);
        for (auto* each : {&q, &k}) each->assign(s.padded_chunk * s.padded_keys, 0.0f);
        p.assign(s.padded_chunk * s.padded_chunk, 0.0f);
        state_turned.assign(s.padded_keys * s.padded_values, 0.0f);
    }
};

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define LANES 16
#include "gated_linear_attention_paths.hpp"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "gated_linear_attention_paths.hpp"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define LANES 4
#include "gated_linear_attention_paths.hpp"
#undef LANES
}  // namespace portable

struct Path {
    decltype(&portable::forward_chunk) forward;
    decltype(&portable::advance_chunk) advance;
    decltype(&portable::backward_chunk) backward;
    decltype(&portable::recur) recur;
};

Path path_of(std::string_view name) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (name == "avx512" && cpu().avx512)
        return {avx512::forward_chunk, avx512::advance_chunk, avx512::backward_chunk, avx512::recur};
    if (name == "avx2" && cpu().avx2)
        return {avx2::forward_chunk, avx2::advance_chunk, avx2::backward_chunk, avx2::recur};
#endif
    return {portable::forward_chunk, portable::advance_chunk, portable::backward_chunk, portable::recur};
}

// A state (keys, values) in rows of whole vectors, and back.
std::vector<float> state_in(const Shape& shape, const float* from) {
    std::vector<float> made(shape.padded_keys * shape.padded_values, 0.0f);
    for (size_t c = 0; from && c < shape.keys; ++c)
        std::copy_n(from + c * shape.values, shape.values, &made[c * shape.padded_values]);
    return made;
}
void state_out(const Shape& shape, const std::vector<float>& from, float* to) {
    for (size_t c = 0; c < shape.keys; ++c)
        std::copy_n(&from[c * shape.padded_values], shape.values, to + c * shape.values);
}

struct Call {
    Shape shape;
    size_t sequences;
    const int64_t* offsets;
};

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

Call checked(const Tokens& q, const Tokens& k, const Tokens& v, const Tokens& gates, const Offsets& offsets,
             size_t chunk, size_t sub) {
    const size_t tokens = q.shape(0), heads = q.shape(1), keys = q.shape(2), values = v.shape(2);
    require(k.shape(0) == tokens && v.shape(0) == tokens && gates.shape(0) == tokens && k.shape(1) == heads &&
                v.shape(1) == heads && gates.shape(1) == heads && k.shape(2) == keys && gates.shape(2) == keys,
            "queries, keys, values and gates do not fit");
    require(chunk > 0 && sub > 0 && chunk % sub == 0, "a chunk must be whole sub-chunks");
    require(offsets.shape(0) >= 2 && offsets.data()[0] == 0, "offsets do not fit");
    const size_t sequences = offsets.shape(0) - 1;
    for (size_t i = 0; i < sequences; ++i)
        require(offsets.data()[i] <= offsets.data()[i + 1], "offsets must rise");
    require(static_cast<size_t>(offsets.data()[sequences]) == tokens, "offsets do not fit");
    return {{heads, keys, values, chunk, sub, padded(keys), padded(values), padded(chunk)}, sequences, offsets.data()};
}

template <typename Array>
void require_states(const Array& states, const Call& call) {
    require(states.shape(0) == call.sequences && states.shape(1) == call.shape.heads &&
                states.shape(2) == call.shape.keys && states.shape(3) == call.shape.values,
            "states do not fit");
}

Sequence sequence_at(const Call& call, const float* q, const float* k, const float* v, const float* gates, float scale,
                     float* out, size_t first, size_t head) {
    const Shape& s = call.shape;
    const size_t at = first * s.heads * s.keys + head * s.keys, value_at = first * s.heads * s.values + head * s.values;
    return {s, q + at, k + at, v + value_at, gates + at, scale, out ? out + value_at : nullptr};
}

void gla_forward(Tokens q, Tokens k, Tokens v, Tokens gates, Offsets offsets, std::optional<States> initial,
                 float scale, size_t chunk, size_t sub, bool recurrent, const std::string& path, int threads,
                 TokensOut out, StatesOut last) {
    const Call call = checked(q, k, v, gates, offsets, chunk, sub);
    require_states(last, call);
    if (initial) require_states(*initial, call);
    require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == v.shape(2), "output does not fit");
    const Path with = path_of(path);
    const Shape& shape = call.shape;
    const size_t state_size = shape.keys * shape.values;
    nb::gil_scoped_release release;
    parallel_for(call.sequences * shape.heads, 1, threads, [&](size_t begin, size_t end, int) {
        Chunk held(shape);
        for (size_t item = begin; item < end; ++item) {
            const size_t which = item / shape.heads, head = item % shape.heads;
            const size_t first = static_cast<size_t>(call.offsets[which]);
            const size_t count = static_cast<size_t>(call.offsets[which + 1]) - first;
            const Sequence s = sequence_at(call, q.data(), k.data(), v.data(), gates.data(), scale, out.data(), first, head);
            std::vector<float> state = state_in(shape, initial ? initial->data() + item * state_size : nullptr);
            if (recurrent)
                for (size_t at = 0; at < count; ++at) with.recur(s, at, held, state.data());
            else
                for (size_t at = 0; at < count; at += chunk)
                    with.forward(s, at, std::min(chunk, count - at), held, state.data());
            state_out(shape, state, last.data() + item * state_size);
        }
    });
}

void gla_backward(Tokens q, Tokens k, Tokens v, Tokens gates, Offsets offsets, std::optional<States> initial,
                  float scale, Tokens d_out, std::optional<States> d_last, size_t chunk, size_t sub,
                  const std::string& path, int threads, TokensOut d_q, TokensOut d_k, TokensOut d_v, TokensOut d_gates,
                  StatesOut d_initial) {
    const Call call = checked(q, k, v, gates, offsets, chunk, sub);
    require_states(d_initial, call);
    if (initial) require_states(*initial, call);
    if (d_last) require_states(*d_last, call);
    const auto same = [](const auto& a, const auto& b) {
        return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1) && a.shape(2) == b.shape(2);
    };
    require(same(d_out, v) && same(d_v, v) && same(d_q, q) && same(d_k, q) && same(d_gates, q), "gradients do not fit");
    const Path with = path_of(path);
    const Shape& shape = call.shape;
    const size_t state_size = shape.keys * shape.values, padded_size = shape.padded_keys * shape.padded_values;
    nb::gil_scoped_release release;
    parallel_for(call.sequences * shape.heads, 1, threads, [&](size_t begin, size_t end, int) {
        Chunk held(shape);
        Slopes slopes(shape);
        for (size_t item = begin; item < end; ++item) {
            const size_t which = item / shape.heads, head = item % shape.heads;
            const size_t first = static_cast<size_t>(call.offsets[which]);
            const size_t count = static_cast<size_t>(call.offsets[which + 1]) - first;
            const size_t chunks = (count + chunk - 1) / chunk;
            const Sequence s = sequence_at(call, q.data(), k.data(), v.data(), gates.data(), scale, nullptr, first, head);
            const size_t at_keys = static_cast<size_t>(s.q - q.data()), at_values = static_cast<size_t>(s.v - v.data());
            const Gradients g{d_out.data() + at_values, d_q.data() + at_keys, d_k.data() + at_keys,
                              d_v.data() + at_values, d_gates.data() + at_keys};
            // States at the starts of all chunks, computed again rather than kept since the forward pass.
            std::vector<float> states((chunks + 1) * padded_size);
            const std::vector<float> given = state_in(shape, initial ? initial->data() + item * state_size : nullptr);
            std::copy(given.begin(), given.end(), states.begin());
            for (size_t i = 0; i < chunks; ++i) {
                float* next = &states[(i + 1) * padded_size];
                if (i + 1 == chunks && !d_last) break;  // the last state is needed for its own gradient only
                std::copy_n(&states[i * padded_size], padded_size, next);
                with.advance(s, i * chunk, std::min(chunk, count - i * chunk), held, next);
            }
            std::vector<float> d_state = state_in(shape, d_last ? d_last->data() + item * state_size : nullptr);
            std::vector<double> gate_sums(shape.keys, 0.0);
            const float* end_state = &states[chunks * padded_size];
            for (size_t c = 0; d_last && c < shape.keys; ++c)
                for (size_t i = 0; i < shape.values; ++i)
                    gate_sums[c] += static_cast<double>(end_state[c * shape.padded_values + i]) *
                                    d_state[c * shape.padded_values + i];
            for (size_t i = chunks; i-- > 0;)
                with.backward(s, g, i * chunk, std::min(chunk, count - i * chunk), held, slopes,
                              &states[i * padded_size], d_state.data(), gate_sums.data());
            state_out(shape, d_state, d_initial.data() + item * state_size);
        }
    });
}

}  // namespace

void bind_gated_linear_attention(nb::module_& m) {
    m.def("gla_forward", &gla_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("gates"), nb::arg("offsets"),
          nb::arg("initial").none(), nb::arg("scale"), nb::arg("chunk"), nb::arg("sub"), nb::arg("recurrent"),
          nb::arg("path"), nb::arg("threads"), nb::arg("out"), nb::arg("last"));
    m.def("gla_backward", &gla_backward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("gates"),
          nb::arg("offsets"), nb::arg("initial").none(), nb::arg("scale"), nb::arg("d_out"), nb::arg("d_last").none(),
          nb::arg("chunk"), nb::arg("sub"), nb::arg("path"), nb::arg("threads"), nb::arg("d_q"), nb::arg("d_k"),
          nb::arg("d_v"), nb::arg("d_gates"), nb::arg("d_initial"));
    m.def("gla_path", [] { return std::string(cpu().avx512 ? "avx512" : cpu().avx2 ? "avx2" : "portable"); });
}

}  // namespace bitwright
