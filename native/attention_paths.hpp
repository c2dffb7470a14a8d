// Included once per instruction set by attention.cpp, between #pragma GCC target: BYTES of a vector, ROWS and WIDE, the
// rows and vectors of a tile of results in registers, are macros.

constexpr size_t kLanes = BYTES / 4;
using Floats = float __attribute__((vector_size(BYTES), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(BYTES), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }

// 2^x for x <= 0 (below -126 it is 2^-126), relative error below 3e-7.
inline Floats exp2_negative(Floats x) {
    x = x < -126.0f ? Floats{} - 126.0f : x;
    const Integers power = __builtin_convertvector(x - 0.5f, Integers);
    const Floats rest = x - __builtin_convertvector(power, Floats);
    Floats value = Floats{} + 1.5403530e-4f;
    value = value * rest + 1.3333558e-3f;
    value = value * rest + 9.6181291e-3f;
    value = value * rest + 5.5504109e-2f;
    value = value * rest + 2.4022651e-1f;
    value = value * rest + 6.9314718e-1f;
    value = value * rest + 1.0f;
    return value * (Floats)((power + 127) << 23);
}

// tanh(x) from e^(-2 |x|).
inline Floats tanh_of(Floats x) {
    const Integers sign = (Integers)x & INT32_MIN;
    const Floats small = exp2_negative((Floats)((Integers)x | INT32_MIN) * 2.88539008f);
    return (Floats)((Integers)((1.0f - small) / (1.0f + small)) | sign);
}

inline float sum_of(Floats x) {
    float total = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) total += x[lane];
    return total;
}

// c[R rows, N vectors] (+)= a(row, k) b(k, :), a at a[row * a_row + k * a_step].
template <int R, int N, bool Add>
inline void tile(size_t depth, const float* a, size_t a_row, size_t a_step, const float* b, size_t ldb, float* c,
                 size_t ldc) {
    Floats sum[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
            sum[r][n] = Add ? load(c + static_cast<size_t>(r) * ldc + static_cast<size_t>(n) * kLanes) : Floats{};
    for (size_t k = 0; k < depth; ++k) {
        Floats right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = load(b + k * ldb + static_cast<size_t>(n) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Floats left = Floats{} + a[static_cast<size_t>(r) * a_row + k * a_step];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] += left * right[n];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(c + static_cast<size_t>(r) * ldc + static_cast<size_t>(n) * kLanes, sum[r][n]);
}

template <int N, bool Add>
inline void panel(size_t rows, size_t depth, const float* a, size_t a_row, size_t a_step, const float* b, size_t ldb,
                  float* c, size_t ldc) {
    size_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) tile<ROWS, N, Add>(depth, a + row * a_row, a_row, a_step, b, ldb, c + row * ldc, ldc);
    for (; row + 2 <= rows; row += 2) tile<2, N, Add>(depth, a + row * a_row, a_row, a_step, b, ldb, c + row * ldc, ldc);
    for (; row < rows; ++row) tile<1, N, Add>(depth, a + row * a_row, a_row, a_step, b, ldb, c + row * ldc, ldc);
}

// c (+)= a b; columns is a multiple of kLanes.
template <bool Add>
inline void product(size_t rows, size_t columns, size_t depth, const float* a, size_t a_row, size_t a_step,
                    const float* b, size_t ldb, float* c, size_t ldc) {
    size_t at = 0;
    for (; at + WIDE * kLanes <= columns; at += WIDE * kLanes)
        panel<WIDE, Add>(rows, depth, a, a_row, a_step, b + at, ldb, c + at, ldc);
    for (; at + 2 * kLanes <= columns; at += 2 * kLanes) panel<2, Add>(rows, depth, a, a_row, a_step, b + at, ldb, c + at, ldc);
    for (; at < columns; at += kLanes) panel<1, Add>(rows, depth, a, a_row, a_step, b + at, ldb, c + at, ldc);
}

// Columns [begin, end) of `row` within a block become scores in units of log2: scale and cap applied; those outside, up
// to `width`, become -infinity. Returns the largest.
inline float finish_scores(const AttentionJob& job, float* row, size_t begin, size_t end, size_t width) {
    const float infinity = std::numeric_limits<float>::infinity();
    std::fill(row, row + begin, -infinity);
    std::fill(row + end, row + width, -infinity);
    Floats most = Floats{} - infinity;
    const float inner = job.cap > 0 ? job.scale / job.cap : job.scale * kLog2E, outer = job.cap * kLog2E;
    for (size_t c = begin / kLanes * kLanes; c < end; c += kLanes) {
        Floats score = load(row + c);
        if (job.cap > 0) {
            // -infinity stays: its tanh would be -1
            const Floats capped = tanh_of(score * inner) * outer;
            score = score == -infinity ? score : capped;
        } else {
            score *= inner;
        }
        store(row + c, score);
        most = score > most ? score : most;
    }
    float largest = -infinity;
    for (size_t lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
    return largest;
}

// Outputs and log-sum-exps of rows [first, last) of one sequence and head.
inline void forward_rows(const AttentionJob& job, const Sequence& sequence, size_t head, size_t first, size_t last) {
    const size_t d = job.channels, rows = last - first, q_row = job.heads * d, k_row = job.kv_heads * d;
    const size_t kv_head = head / (job.heads / job.kv_heads), padded = sequence.padded();
    const float* q = job.q + (sequence.q_begin + first) * q_row + head * d;
    const float* v = job.v + sequence.k_begin * k_row + kv_head * d;
    const float* keys = job.keys_t + sequence.t_begin * job.kv_heads * d + kv_head * d * padded;
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> space(rows * kColumns + rows * d), most(rows, -infinity), total(rows, 0.0f);
    float *scores = space.data(), *out = scores + rows * kColumns;
    size_t begin, end, row_begin, row_end;
    job.range(sequence, first, &begin, &end);
    job.range(sequence, last - 1, &row_begin, &row_end);
    begin = std::min(begin, row_begin), end = std::max(end, row_end);
    for (size_t start = begin / kColumns * kColumns; start < end; start += kColumns) {
        const size_t stop = std::min(start + kColumns, sequence.k_count), width = round_up(stop - start, kPad);
        product<false>(rows, width, d, q, q_row, 1, keys + start, padded, scores, kColumns);
        for (size_t r = 0; r < rows; ++r) {
            float* row = scores + r * kColumns;
            job.range(sequence, first + r, &row_begin, &row_end);
            row_begin = std::clamp(row_begin, start, stop) - start;
            row_end = std::clamp(row_end, start, stop) - start;
            if (row_begin >= row_end) {
                std::fill(row, row + width, 0.0f);
                continue;
            }
            const float largest = std::max(most[r], finish_scores(job, row, row_begin, row_end, width));
            Floats sum{};
            for (size_t c = 0; c < width; c += kLanes) {
                const Floats score = load(row + c);
                const Floats weight = score == -infinity ? Floats{} : exp2_negative(score - largest);
                store(row + c, weight);
                sum += weight;
            }
            const float kept = most[r] == -infinity ? 0.0f : std::exp2(most[r] - largest);
            total[r] = total[r] * kept + sum_of(sum);
            if (kept != 1.0f)
                for (size_t c = 0; c < d; c += kLanes) store(out + r * d + c, load(out + r * d + c) * kept);
            most[r] = largest;
        }
        product<true>(rows, d, stop - start, scores, kColumns, 1, v + start * k_row, k_row, out, d);
    }
    for (size_t r = 0; r < rows; ++r) {
        const float scale = total[r] > 0 ? 1.0f / total[r] : 0.0f;
        float* to = job.out + (sequence.q_begin + first + r) * q_row + head * d;
        for (size_t c = 0; c < d; c += kLanes) store(to + c, load(out + r * d + c) * scale);
        job.lse[(sequence.q_begin + first + r) * job.heads + head] =
            total[r] > 0 ? (most[r] + std::log2(total[r])) / kLog2E : -infinity;
    }
}

// Gradients of the keys and values [first, last) of one sequence and key-value head; those of the queries are added to
// `dq`, which has the shape of the queries.
inline void backward_columns(const AttentionJob& job, const Sequence& sequence, size_t kv_head, size_t first,
                             size_t last, float* dq) {
    const size_t d = job.channels, q_row = job.heads * d, k_row = job.kv_heads * d, padded = sequence.padded();
    const size_t columns = last - first, width = round_up(columns, kPad), group = job.heads / job.kv_heads;
    const float* k = job.k + (sequence.k_begin + first) * k_row + kv_head * d;
    const size_t packed = sequence.t_begin * job.kv_heads * d + kv_head * d * padded + first;
    std::vector<float> space(2 * kRows * kColumns + 2 * columns * d);
    float *weights = space.data(), *slopes = weights + kRows * kColumns, *dk = slopes + kRows * kColumns;
    float* dv = dk + columns * d;
    const float infinity = std::numeric_limits<float>::infinity();
    for (size_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (size_t start = 0; start < sequence.q_count; start += kRows) {
            const size_t rows = std::min(kRows, sequence.q_count - start);
            size_t begin, end, row_begin, row_end;
            job.range(sequence, start, &begin, &end);
            job.range(sequence, start + rows - 1, &row_begin, &row_end);
            if (std::max(end, row_end) <= first || std::min(begin, row_begin) >= last) continue;
            const size_t at = (sequence.q_begin + start) * q_row + head * d;
            const float *q = job.q + at, *dout = job.dout + at;
            product<false>(rows, width, d, q, q_row, 1, job.keys_t + packed, padded, weights, kColumns);
            product<false>(rows, width, d, dout, q_row, 1, job.values_t + packed, padded, slopes, kColumns);
            for (size_t r = 0; r < rows; ++r) {
                float *row = weights + r * kColumns, *slope = slopes + r * kColumns;
                const size_t place = (sequence.q_begin + start + r) * job.heads + head;
                const float sum = job.lse[place] * kLog2E, mean = job.delta[place];
                job.range(sequence, start + r, &row_begin, &row_end);
                row_begin = std::clamp(row_begin, first, last) - first;
                row_end = std::clamp(row_end, first, last) - first;
                if (row_begin >= row_end || !(sum > -infinity)) {
                    std::fill(row, row + width, 0.0f);
                    std::fill(slope, slope + width, 0.0f);
                    continue;
                }
                finish_scores(job, row, row_begin, row_end, width);
                for (size_t c = 0; c < width; c += kLanes) {
                    const Floats score = load(row + c);
                    // rounding may leave a score a little above the sum
                    const Floats below = score - sum > 0.0f ? Floats{} : score - sum;
                    const Floats weight = score == -infinity ? Floats{} : exp2_negative(below);
                    Floats gradient = weight * (load(slope + c) - mean) * job.scale;
                    if (job.cap > 0) {
                        const Floats bent = score * (1.0f / (kLog2E * job.cap));
                        gradient = score == -infinity ? Floats{} : gradient * (1.0f - bent * bent);
                    }
                    store(row + c, weight);
                    store(slope + c, gradient);
                }
            }
            product<true>(columns, d, rows, weights, 1, kColumns, dout, q_row, dv, d);
            product<true>(columns, d, rows, slopes, 1, kColumns, q, q_row, dk, d);
            product<true>(rows, d, columns, slopes, kColumns, 1, k, k_row, dq + at, q_row);
        }
    for (size_t c = 0; c < columns; ++c) {
        const size_t to = (sequence.k_begin + first + c) * k_row + kv_head * d;
        std::copy_n(dk + c * d, d, job.dk + to);
        std::copy_n(dv + c * d, d, job.dv + to);
    }
}
