// One query per head against keys and values packed in block floating point: codes of 4 or 8 bits, an exponent byte per
// block of channels. Codes become floats in registers; scores, softmax and the weighted sum are float32.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "clones.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace bitwright {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MatrixOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

namespace {

// Codes (kv_heads, capacity, bytes), exponents (kv_heads, capacity, blocks) biased by 127.
struct Cache {
    const uint8_t* codes;
    const uint8_t* exponents;
    size_t capacity, bytes, blocks;
};

struct Job {
    const float* query;  // (heads, channels)
    float* out;          // (heads, channels)
    Cache keys, values;
    size_t channels, heads_per_kv, tokens;
    int bits;
    bool vectors;
};

struct Steps {
    float of[256];

    explicit Steps(int bits) {  // a code is counted in steps of 2^(exponent - bits + 2)
        for (int stored = 0; stored < 256; ++stored) of[stored] = std::ldexp(1.0f, stored - 127 - bits + 2);
    }
};

float value_of(const uint8_t* codes, size_t channel, int bits) {
    if (bits == 8) return static_cast<float>(static_cast<int8_t>(codes[channel]));
    const int code = (codes[channel / 2] >> (channel % 2 * 4)) & 15;
    return static_cast<float>((code ^ 8) - 8);
}

// scores[t] += query . key t, for the heads that share the keys; out += p[t] * value t.
void scores_portable(const Job& job, const Steps& steps, size_t kv, const float* query, float* scores) {
    const size_t size = job.channels / job.keys.blocks;
    for (size_t t = 0; t < job.tokens; ++t) {
        const uint8_t* codes = job.keys.codes + (kv * job.keys.capacity + t) * job.keys.bytes;
        const uint8_t* exponents = job.keys.exponents + (kv * job.keys.capacity + t) * job.keys.blocks;
        for (size_t head = 0; head < job.heads_per_kv; ++head) {
            float sum = 0;
            for (size_t c = 0; c < job.channels; ++c)
                sum += query[head * job.channels + c] * (value_of(codes, c, job.bits) * steps.of[exponents[c / size]]);
            scores[head * job.tokens + t] = sum;
        }
    }
}

void weighted_portable(const Job& job, const Steps& steps, size_t kv, const float* weights, float* out) {
    const size_t size = job.channels / job.values.blocks;
    for (size_t t = 0; t < job.tokens; ++t) {
        const uint8_t* codes = job.values.codes + (kv * job.values.capacity + t) * job.values.bytes;
        const uint8_t* exponents = job.values.exponents + (kv * job.values.capacity + t) * job.values.blocks;
        for (size_t head = 0; head < job.heads_per_kv; ++head)
            for (size_t c = 0; c < job.channels; ++c)
                out[head * job.channels + c] += weights[head * job.tokens + t] *
                                                (value_of(codes, c, job.bits) * steps.of[exponents[c / size]]);
    }
}

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

// Channels of a chunk: of 16 bytes, 32 codes of 4 bits (even ones, odd ones) or 16 of 8 bits, scaled.
AVX512 inline void chunk(const uint8_t* codes, const uint8_t* exponents, size_t at, size_t size, int bits,
                         const Steps& steps, __m512& first, __m512& second) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * at)));
    const size_t channel = (bits == 4 ? 32 : 16) * at;
    __m512 scale = _mm512_set1_ps(steps.of[exponents[channel / size]]);
    if (bits == 4) {
        if (size % 32)  // the second half of the chunk may lie in the next block
            scale = _mm512_mask_blend_ps(0xff00, scale, _mm512_set1_ps(steps.of[exponents[(channel + 16) / size]]));
        const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(wide, 28), 28);
        first = _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale);
        second = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(wide, 4)), scale);
    } else {
        first = _mm512_mul_ps(_mm512_cvtepi32_ps(wide), scale);
    }
}

// `query` and `out` hold the even channels of every 32, then the odd ones, where codes have 4 bits.
template <int kBits, size_t kHeads>
AVX512 void scores_vectors(const Job& job, const Steps& steps, size_t kv, const float* query, float* scores) {
    const size_t size = job.channels / job.keys.blocks, chunks = job.keys.bytes / 16, per = kBits == 4 ? 32 : 16;
    for (size_t t = 0; t < job.tokens; ++t) {
        const uint8_t* codes = job.keys.codes + (kv * job.keys.capacity + t) * job.keys.bytes;
        const uint8_t* exponents = job.keys.exponents + (kv * job.keys.capacity + t) * job.keys.blocks;
        __m512 sums[kHeads];
        for (size_t head = 0; head < kHeads; ++head) sums[head] = _mm512_setzero_ps();
        for (size_t at = 0; at < chunks; ++at) {
            __m512 first, second;
            chunk(codes, exponents, at, size, kBits, steps, first, second);
            for (size_t head = 0; head < kHeads; ++head) {
                const float* q = query + head * job.channels + at * per;
                sums[head] = _mm512_fmadd_ps(first, _mm512_loadu_ps(q), sums[head]);
                if constexpr (kBits == 4) sums[head] = _mm512_fmadd_ps(second, _mm512_loadu_ps(q + 16), sums[head]);
            }
        }
        for (size_t head = 0; head < kHeads; ++head) scores[head * job.tokens + t] = _mm512_reduce_add_ps(sums[head]);
    }
}

template <int kBits, size_t kHeads>
AVX512 void weighted_vectors(const Job& job, const Steps& steps, size_t kv, const float* weights, float* out) {
    const size_t size = job.channels / job.values.blocks, chunks = job.values.bytes / 16, per = kBits == 4 ? 32 : 16;
    for (size_t at = 0; at < chunks; ++at) {  // the sums of a chunk stay in registers
        __m512 first_sum[kHeads], second_sum[kHeads];
        for (size_t head = 0; head < kHeads; ++head) first_sum[head] = second_sum[head] = _mm512_setzero_ps();
        for (size_t t = 0; t < job.tokens; ++t) {
            const uint8_t* codes = job.values.codes + (kv * job.values.capacity + t) * job.values.bytes;
            const uint8_t* exponents = job.values.exponents + (kv * job.values.capacity + t) * job.values.blocks;
            __m512 first, second;
            chunk(codes, exponents, at, size, kBits, steps, first, second);
            for (size_t head = 0; head < kHeads; ++head) {
                const __m512 weight = _mm512_set1_ps(weights[head * job.tokens + t]);
                first_sum[head] = _mm512_fmadd_ps(first, weight, first_sum[head]);
                if constexpr (kBits == 4) second_sum[head] = _mm512_fmadd_ps(second, weight, second_sum[head]);
            }
        }
        for (size_t head = 0; head < kHeads; ++head) {
            _mm512_storeu_ps(out + head * job.channels + at * per, first_sum[head]);
            if constexpr (kBits == 4) _mm512_storeu_ps(out + head * job.channels + at * per + 16, second_sum[head]);
        }
    }
}

// Heads of a group are taken four, two and one at a time.
template <int kBits>
void attend_vectors(const Job& job, const Steps& steps, size_t kv, const float* query, float* scores, float* out,
                    bool weighted) {
    size_t head = 0;
    auto take = [&]<size_t kHeads>() {
        for (; head + kHeads <= job.heads_per_kv; head += kHeads) {
            const size_t first = head * job.channels;
            if (weighted)
                weighted_vectors<kBits, kHeads>(job, steps, kv, scores + head * job.tokens, out + first);
            else
                scores_vectors<kBits, kHeads>(job, steps, kv, query + first, scores + head * job.tokens);
        }
    };
    take.template operator()<4>();
    take.template operator()<3>();
    take.template operator()<2>();
    take.template operator()<1>();
}
#endif

// Softmax of a row in place; the exponential is a polynomial of 2^f with a relative error of 2e-7.
BITWRIGHT_CLONES
void softmax(float* row, size_t count) {
    float most = row[0];
    for (size_t t = 0; t < count; ++t) most = row[t] > most ? row[t] : most;
    for (size_t t = 0; t < count; ++t) {
        const float power = std::max((row[t] - most) * 1.4426950408889634f, -126.0f);
        const float whole = __builtin_rintf(power), f = power - whole;
        float value = 1.5403530e-4f;
        value = value * f + 1.3333558e-3f;
        value = value * f + 9.6181291e-3f;
        value = value * f + 5.5504109e-2f;
        value = value * f + 2.4022651e-1f;
        value = value * f + 6.9314718e-1f;
        value = value * f + 1.0f;
        const uint32_t scale = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
        row[t] = value * std::bit_cast<float>(scale);
    }
    double total = 0;
    for (size_t t = 0; t < count; ++t) total += row[t];
    const float inverse = static_cast<float>(1.0 / total);
    for (size_t t = 0; t < count; ++t) row[t] *= inverse;
}

void attend(const Job& job, float scale, size_t first, size_t last) {
    const Steps steps(job.bits);
    const size_t group = job.heads_per_kv * job.channels;
    std::vector<float> query(group), made(group), scores(job.heads_per_kv * job.tokens);
    const bool split = job.vectors && job.bits == 4;
    auto place = [&](size_t c) { return split ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c; };
    for (size_t kv = first; kv < last; ++kv) {
        for (size_t i = 0; i < group; ++i) {
            const size_t head = i / job.channels;
            query[head * job.channels + place(i % job.channels)] = job.query[kv * group + i] * scale;
        }
        std::fill(made.begin(), made.end(), 0.0f);
        auto pass = [&](bool weighted) {
#if defined(__x86_64__)
            if (job.vectors) {
                if (job.bits == 4)
                    attend_vectors<4>(job, steps, kv, query.data(), scores.data(), made.data(), weighted);
                else
                    attend_vectors<8>(job, steps, kv, query.data(), scores.data(), made.data(), weighted);
                return;
            }
#endif
            if (weighted)
                weighted_portable(job, steps, kv, scores.data(), made.data());
            else
                scores_portable(job, steps, kv, query.data(), scores.data());
        };
        pass(false);
        for (size_t head = 0; head < job.heads_per_kv; ++head) softmax(scores.data() + head * job.tokens, job.tokens);
        pass(true);
        for (size_t i = 0; i < group; ++i)
            job.out[kv * group + i] = made[i / job.channels * job.channels + place(i % job.channels)];
    }
}

bool attention_vectors() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

void block_floating_attention(Matrix query, Packed key_codes, Packed key_exponents, Packed value_codes,
                              Packed value_exponents, size_t tokens, int bits, float scale, bool vectors, int threads,
                              MatrixOut out) {
    auto cache = [](const Packed& codes, const Packed& exponents) {
        return Cache{codes.data(), exponents.data(), codes.shape(1), codes.shape(2), exponents.shape(2)};
    };
    const size_t kv_heads = key_codes.shape(0), channels = query.shape(1);
    const bool same = key_codes.shape(1) >= tokens && value_codes.shape(1) >= tokens &&
                      value_codes.shape(0) == kv_heads && out.shape(0) == query.shape(0) && out.shape(1) == channels;
    if (!same || kv_heads == 0 || query.shape(0) % kv_heads || key_codes.shape(2) * 8 != channels * bits)
        throw std::invalid_argument("shapes of queries, keys and values do not fit");
    const Job job{query.data(), out.data(), cache(key_codes, key_exponents), cache(value_codes, value_exponents),
                  channels,     query.shape(0) / kv_heads, tokens, bits, vectors && attention_vectors()};
    nb::gil_scoped_release release;
    parallel_parts(kv_heads, threads, [&](size_t first, size_t last) { attend(job, scale, first, last); });
}

}  // namespace

void bind_block_floating_attention(nb::module_& m) {
    m.def("block_floating_attention", &block_floating_attention, nb::arg("query"), nb::arg("key_codes"),
          nb::arg("key_exponents"), nb::arg("value_codes"), nb::arg("value_exponents"), nb::arg("tokens"),
          nb::arg("bits"), nb::arg("scale"), nb::arg("vectors"), nb::arg("threads"), nb::arg("out"));
}

}  // namespace bitwright
