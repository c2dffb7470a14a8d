// Included once per instruction set by gated_linear_attention.cpp, between #pragma GCC target: LANES floats are a
// vector. Widths of rows in scratch space are whole vectors; what pads them is zero.

using V = float __attribute__((vector_size(4 * LANES)));
using Loose = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));

inline V fill(float value) { return V{} + value; }
inline V load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, V value) { *reinterpret_cast<Loose*>(to) = value; }

// 2^x for x <= 127, with a relative error of 2e-7; NaN stays NaN, below 2^-126 is 0.
inline V exp2(V x) {
    const V kept = x < -126.0f ? fill(-126.0f) : x;
    const V shifted = kept + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
    const Words whole = reinterpret_cast<Words>(shifted) - 0x4b400000u;
    const V f = kept - (shifted - 12582912.0f);
    V value = fill(1.5403530e-4f);
    value = value * f + 1.3333558e-3f;
    value = value * f + 9.6181291e-3f;
    value = value * f + 5.5504109e-2f;
    value = value * f + 2.4022651e-1f;
    value = value * f + 6.9314718e-1f;
    value = value * f + 1.0f;
    value = value * reinterpret_cast<V>((whole + 127u) << 23);
    return x < -126.0f ? V{} : value;
}

template <size_t kRows, size_t kParts>
inline void product_block(const float* a, size_t a_row, size_t a_step, const float* b, size_t b_row, size_t inner,
                          float* c, size_t c_row, bool add) {
    V sums[kRows][kParts];
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (size_t i = 0; i < kParts; ++i) sums[r][i] = add ? load(c + r * c_row + i * LANES) : V{};
    for (size_t k = 0; k < inner; ++k) {
        V part[kParts];
#pragma GCC unroll 4
        for (size_t i = 0; i < kParts; ++i) part[i] = load(b + k * b_row + i * LANES);
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
            const V factor = fill(a[r * a_row + k * a_step]);
#pragma GCC unroll 4
            for (size_t i = 0; i < kParts; ++i) sums[r][i] += factor * part[i];
        }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (size_t i = 0; i < kParts; ++i) store(c + r * c_row + i * LANES, sums[r][i]);
}

template <size_t kParts>
inline void product_strip(size_t rows, const float* a, size_t a_row, size_t a_step, const float* b, size_t b_row,
                          size_t inner, float* c, size_t c_row, bool add) {
    constexpr size_t kRows = LANES == 16 ? (kParts == 4 ? 6 : 8) : 4;
    size_t row = 0;
    for (; row + kRows <= rows; row += kRows)
        product_block<kRows, kParts>(a + row * a_row, a_row, a_step, b, b_row, inner, c + row * c_row, c_row, add);
    for (; row + 2 <= rows; row += 2)
        product_block<2, kParts>(a + row * a_row, a_row, a_step, b, b_row, inner, c + row * c_row, c_row, add);
    for (; row < rows; ++row)
        product_block<1, kParts>(a + row * a_row, a_row, a_step, b, b_row, inner, c + row * c_row, c_row, add);
}

// c (rows, columns) = or += a b; a (row, k) lies at a[row * a_row + k * a_step]; columns are whole vectors.
inline void product(size_t rows, size_t columns, size_t inner, const float* a, size_t a_row, size_t a_step,
                    const float* b, size_t b_row, float* c, size_t c_row, bool add) {
    constexpr size_t kMost = LANES == 16 ? 4 : 2;
    size_t at = 0;
    for (; at + kMost * LANES <= columns; at += kMost * LANES)
        product_strip<kMost>(rows, a, a_row, a_step, b + at, b_row, inner, c + at, c_row, add);
    for (; at < columns; at += LANES)
        product_strip<1>(rows, a, a_row, a_step, b + at, b_row, inner, c + at, c_row, add);
}

template <size_t kApart, size_t kUpper, size_t... kLane>
inline V exchange(V a, V b, std::index_sequence<kLane...>) {
    return __builtin_shufflevector(
        a, b,
        static_cast<int>(kUpper ? (kLane & kApart ? LANES + kLane : kLane + kApart)
                                : (kLane & kApart ? LANES + kLane - kApart : kLane))...);
}
template <size_t kApart>
inline void exchange_lanes(V (&rows)[LANES]) {
    constexpr auto kLanes = std::make_index_sequence<LANES>();
#pragma GCC unroll 16
    for (size_t i = 0; i < LANES; ++i)
        if (!(i & kApart)) {
            const V a = rows[i], b = rows[i | kApart];
            rows[i] = exchange<kApart, 0>(a, b, kLanes);
            rows[i | kApart] = exchange<kApart, 1>(a, b, kLanes);
        }
}
// to (columns, rows) = from (rows, columns) transposed, in blocks of LANES rows and columns.
inline void transpose(size_t rows, size_t columns, const float* from, size_t from_row, float* to, size_t to_row) {
    for (size_t row = 0; row < rows; row += LANES)
        for (size_t column = 0; column < columns; column += LANES) {
            V block[LANES];
#pragma GCC unroll 16
            for (size_t i = 0; i < LANES; ++i) block[i] = load(from + (row + i) * from_row + column);
            exchange_lanes<1>(block);
            exchange_lanes<2>(block);
#if LANES >= 8
            exchange_lanes<4>(block);
#endif
#if LANES == 16
            exchange_lanes<8>(block);
#endif
#pragma GCC unroll 16
            for (size_t i = 0; i < LANES; ++i) store(to + (column + i) * to_row + row, block[i]);
        }
}

// Rows [first, first + count) of a head as (count, width), times `factor`; rows up to `padded_rows` are zero.
inline void gather(const float* from, size_t row_step, size_t count, size_t width, float factor, float* to,
                   size_t to_row, size_t padded_rows) {
    for (size_t row = 0; row < count; ++row) {
        const float* source = from + row * row_step;
        float* made = to + row * to_row;
        for (size_t c = 0; c < width; ++c) made[c] = source[c] * factor;
        for (size_t c = width; c < to_row; ++c) made[c] = 0;
    }
    std::fill(to + count * to_row, to + padded_rows * to_row, 0.0f);
}
inline void scatter(const float* from, size_t from_row, size_t count, size_t width, float factor, float* to,
                    size_t row_step) {
    for (size_t row = 0; row < count; ++row)
        for (size_t c = 0; c < width; ++c) to[row * row_step + c] = from[row * from_row + c] * factor;
}

// Loads the rows of a chunk: queries times scale, and from the gates everything that decays.
inline void load_chunk(const Sequence& s, size_t at, size_t count, Chunk& c) {
    const Shape& shape = s.shape;
    const size_t keys = shape.padded_keys, values = shape.padded_values, sub = shape.sub;
    c.count = count, c.subs = (count + sub - 1) / sub;
    const size_t step = shape.heads * shape.keys, value_step = shape.heads * shape.values;
    gather(s.q + at * step, step, count, shape.keys, s.scale, c.q.data(), keys, shape.padded_chunk);
    gather(s.k + at * step, step, count, shape.keys, 1.0f, c.k.data(), keys, shape.padded_chunk);
    gather(s.v + at * value_step, value_step, count, shape.values, 1.0f, c.v.data(), values, shape.padded_chunk);
    // Running sums of the gates within each sub-chunk, in powers of two, and their totals.
    gather(s.gates + at * step, step, count, shape.keys, 1.4426950408889634f, c.decay.data(), keys, shape.padded_chunk);
    for (size_t i = 0; i < c.subs; ++i) {
        const size_t first = i * sub, last = std::min(count, first + sub);
        for (size_t row = first + 1; row < last; ++row)
            for (size_t at_c = 0; at_c < keys; at_c += LANES)
                store(&c.decay[row * keys + at_c], load(&c.decay[row * keys + at_c]) + load(&c.decay[(row - 1) * keys + at_c]));
        const float* total = &c.decay[(last - 1) * keys];
        std::copy(total, total + keys, &c.totals[i * keys]);
        float least = 0;
        for (size_t channel = 0; channel < keys; ++channel) least = std::min(least, total[channel]);
        c.factored[i] = least >= -kSpan;
        for (size_t row = first; row < last; ++row)
            for (size_t at_c = 0; at_c < keys; at_c += LANES) {
                const size_t here = row * keys + at_c;
                const V sum = load(&c.decay[here]);
                const V to_start = exp2(sum), to_end = exp2(load(total + at_c) - sum);
                store(&c.to_start[here], to_start);
                store(&c.to_end[here], to_end);
                store(&c.q_start[here], load(&c.q[here]) * to_start);
                store(&c.k_end[here], load(&c.k[here]) * to_end);
            }
    }
    std::fill(&c.q_start[count * keys], &c.q_start[0] + shape.padded_chunk * keys, 0.0f);
    std::fill(&c.k_end[count * keys], &c.k_end[0] + shape.padded_chunk * keys, 0.0f);
    // between[i][j]: from the end of sub-chunk j to the start of i; for j = i it grows by what i decays.
    // before[i], after[j]: from the start of the chunk to that of i, from the end of j to that of the chunk.
    for (size_t at_c = 0; at_c < keys; at_c += LANES) {
        V sum = {};
        for (size_t i = 0; i < c.subs; ++i) {
            store(&c.before[i * keys + at_c], exp2(sum));
            sum += load(&c.totals[i * keys + at_c]);
        }
        store(&c.whole[at_c], exp2(sum));
        sum = V{};
        for (size_t j = c.subs; j-- > 0;) {
            store(&c.after[j * keys + at_c], exp2(sum));
            sum += load(&c.totals[j * keys + at_c]);
            V gap = {};
            for (size_t i = j + 1; i < c.subs; ++i) {
                store(&c.between[(i * c.most_subs + j) * keys + at_c], exp2(gap));
                gap += load(&c.totals[i * keys + at_c]);
            }
            const V grown = c.factored[j] ? exp2(-load(&c.totals[j * keys + at_c])) : V{};
            store(&c.between[(j * c.most_subs + j) * keys + at_c], grown);
        }
    }
}

// to[row] = from[row] times a factor per channel of the row's sub-chunk.
inline void scale_rows(const Shape& shape, const Chunk& c, const float* from, const float* factors, size_t factor_row,
                       size_t rows, float* to) {
    const size_t keys = shape.padded_keys;
    for (size_t row = 0; row < rows; ++row)
        for (size_t at = 0; at < keys; at += LANES)
            store(to + row * keys + at, load(from + row * keys + at) * load(factors + row / shape.sub * factor_row + at));
}

// Pairs (t, s) within sub-chunk i where factors could overflow: channel by channel. visit(t, s, decay).
template <typename Visit>
inline void pairs(const Shape& shape, const Chunk& c, size_t i, Visit visit) {
    const size_t first = i * shape.sub, last = std::min(c.count, first + shape.sub), keys = shape.padded_keys;
    for (size_t t = first; t < last; ++t)
        for (size_t s = first; s <= t; ++s)
            for (size_t at = 0; at < keys; at += LANES)
                visit(t, s, at, exp2(load(&c.decay[t * keys + at]) - load(&c.decay[s * keys + at])));
}

// p (rows, padded_chunk): weights of the values of the chunk for the chunk's queries; zero above the diagonal.
inline void weights(const Shape& shape, Chunk& c) {
    const size_t keys = shape.padded_keys, wide = shape.padded_chunk, sub = shape.sub;
    transpose(wide, keys, c.k_end.data(), keys, c.k_turned.data(), wide);
    for (size_t i = 0; i < c.subs; ++i) {
        const size_t first = i * sub, last = std::min(c.count, first + sub);
        const size_t columns = std::min(wide, (last + kWidest - 1) / kWidest * kWidest);
        for (size_t channel = 0; channel < keys; ++channel) {
            const float* turned = &c.k_turned[channel * wide];
            float* made = &c.k_scaled[channel * wide];
            for (size_t j = 0; j <= i; ++j) {
                const float factor = c.between[(i * c.most_subs + j) * keys + channel];
                const size_t end = std::min(last, j * sub + sub);
                for (size_t s = j * sub; s < end; ++s) made[s] = turned[s] * factor;
            }
            for (size_t s = last; s < columns; ++s) made[s] = 0;
        }
        product(last - first, columns, keys, &c.q_start[first * keys], keys, 1, c.k_scaled.data(), wide,
                &c.p[first * wide], wide, false);
        if (!c.factored[i]) {
            for (size_t t = first; t < last; ++t) std::fill(&c.p[t * wide + first], &c.p[t * wide] + columns, 0.0f);
            pairs(shape, c, i, [&](size_t t, size_t s, size_t at, V decay) {
                const V terms = load(&c.q[t * keys + at]) * load(&c.k[s * keys + at]) * decay;
                float sum = 0;
                for (size_t lane = 0; lane < LANES; ++lane) sum += terms[lane];
                c.p[t * wide + s] += sum;
            });
        }
        for (size_t t = first; t < last; ++t) std::fill(&c.p[t * wide + t + 1], &c.p[t * wide] + columns, 0.0f);
    }
}

// state = decay of the whole chunk * state + keys . values, with keys decayed to the end of the chunk.
inline void advance(const Shape& shape, Chunk& c, float* state) {
    const size_t keys = shape.padded_keys, values = shape.padded_values;
    scale_rows(shape, c, c.k_end.data(), c.after.data(), keys, c.count, c.scaled.data());
    for (size_t channel = 0; channel < keys; ++channel)
        for (size_t at = 0; at < values; at += LANES)
            store(state + channel * values + at, load(state + channel * values + at) * c.whole[channel]);
    product(keys, values, c.count, c.scaled.data(), 1, keys, c.v.data(), values, state, values, true);
}

void forward_chunk(const Sequence& s, size_t at, size_t count, Chunk& c, float* state) {
    const Shape& shape = s.shape;
    const size_t keys = shape.padded_keys, values = shape.padded_values, wide = shape.padded_chunk, sub = shape.sub;
    load_chunk(s, at, count, c);
    weights(shape, c);
    scale_rows(shape, c, c.q_start.data(), c.before.data(), keys, count, c.scaled.data());
    product(count, values, keys, c.scaled.data(), keys, 1, state, values, c.out.data(), values, false);
    for (size_t first = 0; first < count; first += sub) {
        const size_t last = std::min(count, first + sub);
        product(last - first, values, last, &c.p[first * wide], wide, 1, c.v.data(), values, &c.out[first * values],
                values, true);
    }
    advance(shape, c, state);
    const size_t step = shape.heads * shape.values;
    scatter(c.out.data(), values, count, shape.values, 1.0f, s.out + at * step, step);
}

void advance_chunk(const Sequence& s, size_t at, size_t count, Chunk& c, float* state) {
    load_chunk(s, at, count, c);
    advance(s.shape, c, state);
}

// Gradients of a chunk, from its end to its start: `state` at its start, `d_state` at its end (then at its start),
// `gate_sums`: what later tokens add to the gradient of every gate before them.
void backward_chunk(const Sequence& s, const Gradients& g, size_t at, size_t count, Chunk& c, Slopes& d,
                    const float* state, float* d_state, double* gate_sums) {
    const Shape& shape = s.shape;
    const size_t keys = shape.padded_keys, values = shape.padded_values, wide = shape.padded_chunk, sub = shape.sub;
    const size_t value_step = shape.heads * shape.values, step = shape.heads * shape.keys;
    load_chunk(s, at, count, c);
    weights(shape, c);
    gather(g.out + at * value_step, value_step, count, shape.values, 1.0f, d.out.data(), values, wide);

    // Values: from the outputs of the chunk and from the state at its end.
    scale_rows(shape, c, c.k_end.data(), c.after.data(), keys, count, c.scaled.data());
    product(count, values, keys, c.scaled.data(), keys, 1, d_state, values, d.v.data(), values, false);
    for (size_t first = 0; first < count; first += sub) {  // rows from `first` on see the values of this sub-chunk
        const size_t last = std::min(count, first + sub);
        product(last - first, values, count - first, &c.p[first * wide + first], 1, wide, &d.out[first * values],
                values, &d.v[first * values], values, true);
    }

    // Keys, from the state at the end; queries, from the state at the start.
    transpose(keys, values, d_state, values, d.state_turned.data(), keys);
    product(count, keys, values, c.v.data(), values, 1, d.state_turned.data(), keys, d.k.data(), keys, false);
    scale_rows(shape, c, d.k.data(), c.after.data(), keys, count, d.k.data());
    transpose(keys, values, state, values, d.state_turned.data(), keys);
    product(count, keys, values, d.out.data(), values, 1, d.state_turned.data(), keys, d.q.data(), keys, false);
    scale_rows(shape, c, d.q.data(), c.before.data(), keys, count, d.q.data());

    // The state: before the chunk.
    scale_rows(shape, c, c.q_start.data(), c.before.data(), keys, count, c.scaled.data());
    for (size_t channel = 0; channel < keys; ++channel)
        for (size_t at_c = 0; at_c < values; at_c += LANES)
            store(d_state + channel * values + at_c, load(d_state + channel * values + at_c) * c.whole[channel]);
    product(keys, values, count, c.scaled.data(), 1, keys, d.out.data(), values, d_state, values, true);

    // Weights within the chunk.
    transpose(wide, values, c.v.data(), values, d.v_turned.data(), wide);
    for (size_t i = 0; i < c.subs; ++i) {
        const size_t first = i * sub, last = std::min(count, first + sub);
        const size_t columns = (last + kWidest - 1) / kWidest * kWidest;
        product(last - first, columns, values, &d.out[first * values], values, 1, d.v_turned.data(), wide,
                &d.p[first * wide], wide, false);
        for (size_t t = first; t < last; ++t) std::fill(&d.p[t * wide + t + 1], &d.p[t * wide] + columns, 0.0f);
        const size_t factored = c.factored[i] ? last : first;  // keys that take part in products of factors
        scale_rows(shape, c, c.k_end.data(), &c.between[i * c.most_subs * keys], keys, factored, c.scaled.data());
        product(last - first, keys, factored, &d.p[first * wide], wide, 1, c.scaled.data(), keys, &d.q[first * keys],
                keys, true);
        product(factored, keys, last - first, &d.p[first * wide], 1, wide, &c.q_start[first * keys], keys,
                c.scaled.data(), keys, false);
        for (size_t row = 0; row < factored; ++row)
            for (size_t at_c = 0; at_c < keys; at_c += LANES) {
                const float* factor = &c.between[(i * c.most_subs + row / sub) * keys + at_c];
                float* sum = &d.k[row * keys + at_c];
                store(sum, load(sum) + load(&c.scaled[row * keys + at_c]) * load(factor));
            }
    }
    for (size_t here = 0; here < count * keys; here += LANES) {
        store(&d.q[here], load(&d.q[here]) * load(&c.to_start[here]));
        store(&d.k[here], load(&d.k[here]) * load(&c.to_end[here]));
    }
    for (size_t i = 0; i < c.subs; ++i)
        if (!c.factored[i])
            pairs(shape, c, i, [&](size_t t, size_t from, size_t at_c, V decay) {
                const V slope = decay * d.p[t * wide + from];
                float *dq = &d.q[t * keys + at_c], *dk = &d.k[from * keys + at_c];
                store(dq, load(dq) + slope * load(&c.k[from * keys + at_c]));
                store(dk, load(dk) + slope * load(&c.q[t * keys + at_c]));
            });
    // Gates: what a token's query gains less what its key loses, summed over it and all later tokens.
    for (size_t row = count; row-- > 0;)
        for (size_t channel = 0; channel < shape.keys; ++channel) {
            const size_t here = row * keys + channel;
            gate_sums[channel] += static_cast<double>(c.q[here]) * d.q[here] - static_cast<double>(c.k[here]) * d.k[here];
            g.d_gates[(at + row) * step + channel] = static_cast<float>(gate_sums[channel]);
        }
    scatter(d.q.data(), keys, count, shape.keys, s.scale, g.d_q + at * step, step);
    scatter(d.k.data(), keys, count, shape.keys, 1.0f, g.d_k + at * step, step);
    scatter(d.v.data(), values, count, shape.values, 1.0f, g.d_v + at * value_step, value_step);
}

// One token after the other; kParts vectors of values stay in registers while the state passes by.
template <size_t kParts>
inline void step_values(const float* q, const float* k, const float* v, const float* alpha, size_t channels,
                        float* state, size_t state_row, float* out) {
    V sums[kParts], value[kParts];
#pragma GCC unroll 8
    for (size_t i = 0; i < kParts; ++i) sums[i] = V{}, value[i] = load(v + i * LANES);
    for (size_t c = 0; c < channels; ++c) {
        const V decay = fill(alpha[c]), key = fill(k[c]), query = fill(q[c]);
        float* row = state + c * state_row;
#pragma GCC unroll 8
        for (size_t i = 0; i < kParts; ++i) {
            const V made = load(row + i * LANES) * decay + key * value[i];
            store(row + i * LANES, made);
            sums[i] += query * made;
        }
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kParts; ++i) store(out + i * LANES, sums[i]);
}

void recur(const Sequence& s, size_t at, Chunk& c, float* state) {
    const Shape& shape = s.shape;
    const size_t step = shape.heads * shape.keys, value_step = shape.heads * shape.values, wide = shape.padded_values;
    gather(s.q + at * step, step, 1, shape.keys, s.scale, c.q.data(), shape.padded_keys, 1);
    gather(s.k + at * step, step, 1, shape.keys, 1.0f, c.k.data(), shape.padded_keys, 1);
    gather(s.v + at * value_step, value_step, 1, shape.values, 1.0f, c.v.data(), wide, 1);
    gather(s.gates + at * step, step, 1, shape.keys, 1.4426950408889634f, c.decay.data(), shape.padded_keys, 1);
    for (size_t channel = 0; channel < shape.padded_keys; channel += LANES)
        store(&c.decay[channel], exp2(load(&c.decay[channel])));
    size_t first = 0;
    for (; first + 4 * LANES <= wide; first += 4 * LANES)
        step_values<4>(c.q.data(), c.k.data(), &c.v[first], c.decay.data(), shape.keys, state + first, wide,
                       &c.out[first]);
    for (; first < wide; first += LANES)
        step_values<1>(c.q.data(), c.k.data(), &c.v[first], c.decay.data(), shape.keys, state + first, wide,
                       &c.out[first]);
    scatter(c.out.data(), wide, 1, shape.values, 1.0f, s.out + at * value_step, value_step);
}
