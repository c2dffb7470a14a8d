// Included once per instruction set by decode_attention.cpp, between #pragma GCC target: LANES floats are a vector.

using V = float __attribute__((vector_size(4 * LANES)));
using Loose = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Shorts = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline V fill(float value) { return V{} + value; }
inline V load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, V value) { *reinterpret_cast<Loose*>(to) = value; }
inline V load(const BFloat16* from) {
    const Words wide = __builtin_convertvector(*reinterpret_cast<const Shorts*>(from), Words) << 16;
    return reinterpret_cast<V>(wide);
}
inline V load(const Half* from) {
#if LANES == 16
    return reinterpret_cast<V>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif LANES == 8
    return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    V out;
    for (size_t i = 0; i < LANES; ++i) out[i] = to_float(from[i]);
    return out;
#endif
}

// Sums of a vector's lanes, of two vectors at a time: groups of kGroup lanes are halved and those of b follow a's.
template <size_t kGroup, size_t kUpper, size_t... kLane>
inline V halves(V a, V b, std::index_sequence<kLane...>) {
    constexpr size_t kHalf = kGroup / 2;
    return __builtin_shufflevector(a, b, static_cast<int>(kLane / kHalf * kGroup + kLane % kHalf + kUpper * kHalf)...);
}
template <size_t kGroup>
inline V fold(V a, V b) {
    constexpr auto kLanes = std::make_index_sequence<LANES>();
    return halves<kGroup, 0>(a, b, kLanes) + halves<kGroup, 1>(a, b, kLanes);
}
// Lane i is the sum over all lanes of sums[i].
inline V lane_sums(const V (&sums)[LANES]) {
    V held[LANES];
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i) held[i] = sums[i];
#if LANES == 16
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) held[i] = fold<16>(held[2 * i], held[2 * i + 1]);
#endif
#if LANES >= 8
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) held[i] = fold<8>(held[2 * i], held[2 * i + 1]);
#endif
    held[0] = fold<4>(held[0], held[1]);
    held[1] = fold<4>(held[2], held[3]);
    return fold<2>(held[0], held[1]);
}

inline float lane_sum(V value) {
    float sum = 0;
    for (size_t i = 0; i < LANES; ++i) sum += value[i];
    return sum;
}

// 2^x with a relative error of 2e-7; NaN stays NaN, below 2^-126 is 2^-126.
inline V exp2(V x) {
    x = x < -126.0f ? fill(-126.0f) : x;
    const V shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
    const Words whole = reinterpret_cast<Words>(shifted) - 0x4b400000u;
    const V f = x - (shifted - 12582912.0f);
    V value = fill(1.5403530e-4f);
    value = value * f + 1.3333558e-3f;
    value = value * f + 9.6181291e-3f;
    value = value * f + 5.5504109e-2f;
    value = value * f + 2.4022651e-1f;
    value = value * f + 6.9314718e-1f;
    value = value * f + 1.0f;
    return value * reinterpret_cast<V>((whole + 127u) << 23);
}

// scores[row * stride + key] = query row . key, for LANES / kRows keys at a time; keys left over one by one.
template <size_t kRows, typename T>
inline void dot(const T* keys, size_t key_stride, size_t count, const float* query, size_t width, float* scores,
                size_t stride) {
    constexpr size_t kKeys = LANES / kRows;
    size_t key = 0;
    for (; key + kKeys <= count; key += kKeys) {
        V sums[LANES] = {};
        const T* row = keys + key * key_stride;
        for (size_t c = 0; c < width; c += LANES) {
            V q[kRows];
#pragma GCC unroll 4
            for (size_t r = 0; r < kRows; ++r) q[r] = load(query + r * width + c);
#pragma GCC unroll 16
            for (size_t i = 0; i < kKeys; ++i) {
                const V k = load(row + i * key_stride + c);
#pragma GCC unroll 4
                for (size_t r = 0; r < kRows; ++r) sums[r * kKeys + i] += k * q[r];
            }
        }
        const V all = lane_sums(sums);
        float made[LANES];
        store(made, all);
        for (size_t r = 0; r < kRows; ++r)
            std::memcpy(scores + r * stride + key, made + r * kKeys, kKeys * sizeof(float));
    }
    for (; key < count; ++key)
        for (size_t r = 0; r < kRows; ++r) {
            V sum = {};
            for (size_t c = 0; c < width; c += LANES)
                sum += load(keys + key * key_stride + c) * load(query + r * width + c);
            scores[r * stride + key] = lane_sum(sum);
        }
}

// out[row][channel] += sum over keys of weights[row * stride + key] * value, kParts vectors of channels in registers.
template <size_t kRows, size_t kParts, typename T>
inline void add_values(const T* values, size_t value_stride, size_t count, const float* weights, size_t stride,
                       size_t at, float* out, size_t width) {
    V sums[kRows][kParts];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (size_t i = 0; i < kParts; ++i) sums[r][i] = load(out + r * width + at + i * LANES);
    for (size_t key = 0; key < count; ++key) {
        const T* row = values + key * value_stride;
        V weight[kRows];
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r) weight[r] = fill(weights[r * stride + key]);
#pragma GCC unroll 8
        for (size_t i = 0; i < kParts; ++i) {
            const V v = load(row + at + i * LANES);
#pragma GCC unroll 4
            for (size_t r = 0; r < kRows; ++r) sums[r][i] += v * weight[r];
        }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (size_t i = 0; i < kParts; ++i) store(out + r * width + at + i * LANES, sums[r][i]);
}

template <size_t kRows, typename T>
inline void weigh(const T* values, size_t value_stride, size_t count, const float* weights, size_t stride, float* out,
                  size_t width) {
    constexpr size_t kMost = LANES == 16 ? (kRows == 4 ? 4 : 8) : 8 / kRows;  // sums of 8 or 16 vectors
    size_t at = 0;
    for (; at + kMost * LANES <= width; at += kMost * LANES)
        add_values<kRows, kMost>(values, value_stride, count, weights, stride, at, out, width);
    for (; kMost > 2 && at + 2 * LANES <= width; at += 2 * LANES)
        add_values<kRows, 2>(values, value_stride, count, weights, stride, at, out, width);
    for (; at < width; at += LANES)
        add_values<kRows, 1>(values, value_stride, count, weights, stride, at, out, width);
}

// Weights 2^(score - most) of `count` keys in place; the running maximum, total and output of the row follow.
inline void soften(float* scores, size_t count, RowState& state, float* out, size_t width) {
    const float low = -std::numeric_limits<float>::infinity();
    V top = fill(low);
    size_t key = 0;
    for (; key + LANES <= count; key += LANES) {
        const V s = load(scores + key);
        top = s > top ? s : top;
    }
    float most = state.most;
    for (size_t i = 0; i < LANES; ++i) most = top[i] > most ? top[i] : most;
    for (size_t i = key; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    if (most > state.most) {
        const float factor = state.most == low ? 0.0f : exp2(fill(state.most - most))[0];
        state.total *= factor;
        for (size_t c = 0; c < width; c += LANES) store(out + c, load(out + c) * factor);
        state.most = most;
    }
    V total = {};
    for (key = 0; key + LANES <= count; key += LANES) {
        const V weight = exp2(load(scores + key) - most);
        store(scores + key, weight);
        total += weight;
    }
    float sum = lane_sum(total);
    for (; key < count; ++key) sum += scores[key] = exp2(fill(scores[key] - most))[0];
    state.total += sum;
}

// One run of keys against all rows of queries of a block; strides in numbers.
template <typename T>
inline void attend_run(const Block& block, const T* keys, size_t key_stride, const T* values, size_t value_stride,
                       size_t count, Scratch& scratch) {
    float* scores = scratch.scores.data();
    const size_t rows = block.rows, stride = block.keys_per_run;
    size_t row = 0;
    auto dots = [&]<size_t kRows>() {
        for (; row + kRows <= rows; row += kRows)
            dot<kRows>(keys, key_stride, count, scratch.query.data() + row * block.query_width, block.query_width,
                       scores + row * stride, stride);
    };
    dots.template operator()<4>();
    dots.template operator()<2>();
    dots.template operator()<1>();
    for (row = 0; row < rows; ++row)
        soften(scores + row * stride, count, scratch.states[row], scratch.out.data() + row * block.out_width,
               block.out_width);
    row = 0;
    auto sums = [&]<size_t kRows>() {
        for (; row + kRows <= rows; row += kRows)
            weigh<kRows>(values, value_stride, count, scores + row * stride, stride,
                         scratch.out.data() + row * block.out_width, block.out_width);
    };
    sums.template operator()<4>();
    sums.template operator()<2>();
    sums.template operator()<1>();
}

template <typename T>
void attend(const Block& block, const T* keys, const T* values, size_t count, Scratch& scratch) {
    if (block.channels == block.query_width && block.value_channels == block.out_width)
        return attend_run(block, keys, block.key_stride, values, block.value_stride, count, scratch);
    // Channels that do not fill vectors: rows are copied, with zeros behind them.
    pad_rows(keys, block.key_stride, count, block.channels, block.query_width, scratch.keys);
    pad_rows(values, block.value_stride, count, block.value_channels, block.out_width, scratch.values);
    attend_run<float>(block, scratch.keys.data(), block.query_width, scratch.values.data(), block.out_width, count,
                      scratch);
}
