// Included once per instruction set by low_bit_rows.cpp, between #pragma GCC target: LANES rows are a vector.

using V = float __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Bytes = uint8_t __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Loose = uint8_t __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

inline V load(const Half* from) {
#if LANES == 16
    // All lanes by a mask: the plain intrinsic starts from an undefined register, of which compilers warn.
    return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif LANES == 8
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    V out;
    for (size_t i = 0; i < LANES; ++i) out[i] = to_float(from[i]);
    return out;
#endif
}

// sum of every lane + its four codes . four activations. Codes of fewer than 8 bits are below 16.
template <int kBits>
inline Ints dot(Ints sum, Bytes codes, int32_t four) {
#if LANES == 16
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes),
                                                      _mm512_set1_epi32(four)));
#elif LANES == 8
    const __m256i a = _mm256_set1_epi32(four), w = reinterpret_cast<__m256i>(codes);
    if constexpr (kBits < 8)
        return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
    return sum + reinterpret_cast<Ints>(even) + reinterpret_cast<Ints>(odd);
#else
    int8_t a[4];
    std::memcpy(a, &four, 4);
    for (size_t r = 0; r < LANES; ++r)
        sum[r] += codes[4 * r] * a[0] + codes[4 * r + 1] * a[1] + codes[4 * r + 2] * a[2] + codes[4 * r + 3] * a[3];
    return sum;
#endif
}

// Vector j of a group's codes, of the rows that begin at `codes`.
template <int kBits>
inline Bytes unpack(const uint8_t* codes, size_t j) {
    if constexpr (kBits == 3) {
        const Bytes upper = unpack<1>(codes + 2 * kVector, j);
        return unpack<2>(codes, j) | reinterpret_cast<Bytes>(reinterpret_cast<Words>(upper) << 2);
    } else {
        constexpr size_t kTogether = 8 / kBits;
        const Bytes packed = reinterpret_cast<Bytes>(*reinterpret_cast<const Loose*>(codes + j / kTogether * kVector));
        if constexpr (kBits == 8) return packed;
        const Words moved = reinterpret_cast<Words>(packed) >> static_cast<uint32_t>(j % kTogether * kBits);
        return reinterpret_cast<Bytes>(moved) & static_cast<uint8_t>((1 << kBits) - 1);
    }
}

// A block of 16 rows by kTokens vectors; out is (tokens, 16) with `stride`.
template <int kBits, size_t kTokens>
inline void block_products(const uint8_t* codes, const Int8Activations& x, size_t token, float* out, size_t stride) {
    const size_t groups = x.inputs / kGroup;
    constexpr size_t kBytes = kBlockRows * kGroup / 8 * kBits, kKinds = kBits == 8 ? 1 : 2;
    const Half* scales = reinterpret_cast<const Half*>(codes + groups * kBytes);
    for (size_t row = 0; row < kBlockRows; row += LANES) {
        V totals[kTokens] = {};
        for (size_t group = 0; group < groups; ++group) {
            Ints sums[kTokens] = {};
            if constexpr (kBits == 8)
                for (size_t t = 0; t < kTokens; ++t) sums[t] -= 128 * x.sums[(token + t) * groups + group];
            const int8_t* inputs = x.codes.data() + token * x.inputs + group * kGroup;
#pragma GCC unroll 8
            for (size_t j = 0; j < 8; ++j) {
                const Bytes w = unpack<kBits>(codes + group * kBytes + 4 * row, j);
#pragma GCC unroll 4
                for (size_t t = 0; t < kTokens; ++t) {
                    int32_t four;
                    std::memcpy(&four, inputs + t * x.inputs + 4 * j, 4);
                    sums[t] = dot<kBits>(sums[t], w, four);
                }
            }
            const Half* of_group = scales + group * kKinds * kBlockRows + row;
            const V scale = load(of_group), minimum = kBits == 8 ? V{} : load(of_group + (kKinds - 1) * kBlockRows);
#pragma GCC unroll 4
            for (size_t t = 0; t < kTokens; ++t) {
                const size_t at = (token + t) * groups + group;
                totals[t] += __builtin_convertvector(sums[t], V) * (scale * x.scales[at]);
                if constexpr (kBits != 8) totals[t] += minimum * x.offsets[at];
            }
        }
        for (size_t t = 0; t < kTokens; ++t) std::memcpy(out + t * stride + row, &totals[t], sizeof(V));
    }
}

template <int kBits>
void products(const uint8_t* codes, const Int8Activations& x, size_t token, size_t tokens, float* out, size_t stride) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) block_products<kBits, 4>(codes, x, token + t, out + t * stride, stride);
    for (; t < tokens; ++t) block_products<kBits, 1>(codes, x, token + t, out + t * stride, stride);
}
