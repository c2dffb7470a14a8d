// Included once per instruction set by shift_and_add.cpp, between #pragma GCC target: BYTES of a vector and TILE, the
// columns whose sums stay in registers, are macros.

template <typename T>
using Lanes __attribute__((vector_size(BYTES), may_alias)) = T;
using Eight __attribute__((vector_size(32), aligned(4), may_alias)) = int32_t;

// 8 x 8 numbers of 4 bytes, rows to columns.
template <typename T>
inline void transpose8(const T* from, size_t from_stride, T* to, size_t to_stride) {
    using V = Eight;
    V r[8], s[8];
    for (size_t i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const V*>(from + i * from_stride);
    for (size_t i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (size_t i = 0; i < 8; i += 4)
        for (size_t j = 0; j < 2; ++j) {
            r[i + j] = __builtin_shufflevector(s[i + j], s[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[i + j + 2] = __builtin_shufflevector(s[i + j], s[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (size_t j = 0; j < 4; ++j) {
        *reinterpret_cast<V*>(to + j * to_stride) = __builtin_shufflevector(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<V*>(to + (j + 4) * to_stride) =
            __builtin_shufflevector(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Rows [rows, columns] of `from` as columns of `to`; whole blocks of 8 x 8 numbers of 4 bytes in vectors.
template <typename From, typename To>
inline void transpose(const From* from, size_t from_stride, To* to, size_t to_stride, size_t rows, size_t columns) {
    constexpr bool kBlocks = BYTES >= 32 && sizeof(From) == 4 && std::is_same_v<From, To>;
    const size_t whole_rows = kBlocks ? rows / 8 * 8 : 0, whole_columns = kBlocks ? columns / 8 * 8 : 0;
    if constexpr (kBlocks)
        for (size_t i = 0; i < whole_rows; i += 8)
            for (size_t j = 0; j < whole_columns; j += 8)
                transpose8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    for (size_t i = 0; i < rows; ++i)
        for (size_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
            to[j * to_stride + i] = static_cast<To>(from[i * from_stride + j]);
}

// Sums of kTile columns over `positions` tables; registers hold TILE vectors of BYTES bytes at a time.
template <typename T>
inline void add_entries(const uint8_t* tables, size_t table_bytes, const uint16_t* places, size_t padded,
                        size_t positions, T* sums) {
    using V = Lanes<T>;
    for (size_t part = 0; part < kVector; part += BYTES)
        for (size_t column = 0; column < kTile; column += TILE) {
            uint8_t* to = reinterpret_cast<uint8_t*>(sums) + column * kVector + part;
            V held[TILE];
#pragma GCC unroll 16
            for (size_t i = 0; i < TILE; ++i) held[i] = *reinterpret_cast<const V*>(to + i * kVector);
            for (size_t k = 0; k < positions; ++k) {
                const uint8_t* table = tables + k * table_bytes + part;
                const uint16_t* place = places + k * padded + column;
#pragma GCC unroll 16
                for (size_t i = 0; i < TILE; ++i) held[i] += *reinterpret_cast<const V*>(table + place[i]);
            }
#pragma GCC unroll 16
            for (size_t i = 0; i < TILE; ++i) *reinterpret_cast<V*>(to + i * kVector) = held[i];
        }
}

// Blocks [first, last) of rows; T int32 where no sum can leave it.
template <typename T, typename Out>
inline void shift_rows(const ShiftJob& job, Out* out, size_t first, size_t last) {
    using V = Lanes<T>;
    using U = std::make_unsigned_t<T>;
    using W = Lanes<U>;
    constexpr size_t kRows = kVector / sizeof(T);
    const size_t at_once = job.positions(), entries = job.entries(), table_bytes = entries * kVector;
    std::vector<uint8_t> space(at_once * table_bytes + job.padded * kVector + at_once * kVector + kVector);
    uint8_t* tables = space.data() + (kVector - reinterpret_cast<uintptr_t>(space.data()) % kVector) % kVector;
    T* sums = reinterpret_cast<T*>(tables + at_once * table_bytes);
    T* columns = sums + job.padded * kRows;  // of x: (positions, rows)
    std::vector<float> made(std::is_same_v<Out, float> ? job.n * kRows : 0);
    for (size_t block = first; block < last; ++block) {
        const size_t row = block * kRows, rows = std::min(kRows, job.m - row);
        std::memset(sums, 0, job.padded * kVector);
        std::memset(columns, 0, at_once * kVector);
        for (size_t start = 0; start < job.k; start += at_once) {
            const size_t positions = std::min(at_once, job.k - start);
            transpose(job.x + row * job.k + start, job.k, columns, kRows, rows, positions);
            for (size_t k = 0; k < positions; ++k)
                for (size_t part = 0; part < kVector; part += BYTES) {
                    uint8_t* table = tables + k * table_bytes + part;
                    const V x = *reinterpret_cast<const V*>(reinterpret_cast<uint8_t*>(columns + k * kRows) + part);
                    uint8_t* negative = table + static_cast<size_t>(job.count) * kVector;
                    for (int i = 0; i < job.count; ++i) {
                        const V shifted = x >> static_cast<T>(job.first + i);
                        *reinterpret_cast<V*>(table + static_cast<size_t>(i) * kVector) = shifted;
                        *reinterpret_cast<W*>(negative + static_cast<size_t>(i) * kVector) = W{} - (W)shifted;
                    }
                    *reinterpret_cast<V*>(table + (entries - 1) * kVector) = V{};
                }
            for (size_t column = 0; column < job.padded; column += kTile)
                add_entries<U>(tables, table_bytes, job.places + start * job.padded + column, job.padded, positions,
                               reinterpret_cast<U*>(sums + column * kRows));
        }
        if constexpr (std::is_same_v<Out, float>) {
            for (size_t column = 0; column < job.n; ++column)
                for (size_t lane = 0; lane < kRows; ++lane) {
                    const double sum = static_cast<double>(sums[column * kRows + lane]);
                    made[column * kRows + lane] = static_cast<float>(sum * job.unit + job.bias[column]);
                }
            transpose(made.data(), kRows, out + row * job.n, job.n, job.n, rows);
        } else {
            transpose(sums, kRows, out + row * job.n, job.n, job.n, rows);
        }
    }
}

// The 16 sums of every subset of positions [position, position + 4) of v, for the columns of a vector from `column` on.
template <typename T, typename Out>
inline void subset_sums(const MaskJob<T, Out>& job, size_t batch, size_t position, size_t column, uint8_t* entries) {
    using V = Lanes<T>;
    constexpr size_t kLanes = kVector / sizeof(T);
    const size_t width = std::min(kLanes, job.n - column), positions = std::min<size_t>(4, job.k - position);
    const T* from = job.v + (batch * job.k + position) * job.n + column;
    alignas(kVector) T padded[4 * kLanes];
    const bool whole = width == kLanes && positions == 4;
    if (!whole) {
        std::memset(padded, 0, sizeof(padded));
        for (size_t i = 0; i < positions; ++i) std::memcpy(padded + i * kLanes, from + i * job.n, width * sizeof(T));
    }
    const T* rows = whole ? from : padded;
    const size_t stride = whole ? job.n : kLanes;
    for (size_t part = 0; part < kVector; part += BYTES) {
        V v[4], low[4], high[4];
        for (size_t i = 0; i < 4; ++i) std::memcpy(&v[i], rows + i * stride + part / sizeof(T), BYTES);
        low[0] = V{}, low[1] = v[0], low[2] = v[1], low[3] = v[0] + v[1];
        high[0] = V{}, high[1] = v[2], high[2] = v[3], high[3] = v[2] + v[3];
        for (size_t entry = 0; entry < 16; ++entry)
            *reinterpret_cast<V*>(entries + entry * kVector + part) =
                entry < 4 ? low[entry] : entry % 4 ? high[entry / 4] + low[entry % 4] : high[entry / 4];
    }
}

// Sums of a vector of columns from `column` on, for rows [first, last) of one batch. Sums over 64 positions are kept in
// T (for floats as two chains of at most 8 additions), those over all words in Sum.
template <typename T, typename Sum, typename Out>
inline void mask_columns(const MaskJob<T, Out>& job, size_t batch, size_t column, size_t first, size_t last,
                         uint8_t* table, Sum* sums) {
    using V = Lanes<T>;
    constexpr size_t kLanes = kVector / sizeof(T), kPart = BYTES / sizeof(T);
    const size_t width = std::min(kLanes, job.n - column);
    for (size_t word = 0; word < job.words; ++word) {
        const size_t groups = (std::min<size_t>(64, job.k - word * 64) + 3) / 4;
        for (size_t group = 0; group < groups; ++group)
            subset_sums(job, batch, word * 64 + group * 4, column, table + group * 16 * kVector);
        for (size_t row = first; row < last; ++row) {
            const uint64_t mask = job.masks[(batch * job.m + row) * job.words + word];
            Sum* sum = sums + (row - first) * kLanes;
            for (size_t part = 0; part < kVector; part += BYTES) {
                V even{}, odd{};
                const auto entry = [&](size_t group) {  // of the subset that the mask has in a group
                    const size_t subset = 16 * group + (mask >> (4 * group) & 15);
                    return reinterpret_cast<const V*>(table + subset * kVector + part);
                };
                if (groups == 16) {
#pragma GCC unroll 8
                    for (size_t group = 0; group < 16; group += 2) {
                        even += *entry(group);
                        odd += *entry(group + 1);
                    }
                } else {
                    for (size_t group = 0; group + 1 < groups; group += 2) {
                        even += *entry(group);
                        odd += *entry(group + 1);
                    }
                    if (groups % 2) even += *entry(groups - 1);
                }
                even += odd;
                Sum* to = sum + part / sizeof(T);
                alignas(BYTES) T made[kPart];
                *reinterpret_cast<V*>(made) = even;
                if (word == 0)
                    for (size_t lane = 0; lane < kPart; ++lane) to[lane] = static_cast<Sum>(made[lane]);
                else
                    for (size_t lane = 0; lane < kPart; ++lane) to[lane] += static_cast<Sum>(made[lane]);
            }
        }
    }
    for (size_t row = first; row < last; ++row) {
        const Sum* sum = sums + (row - first) * kLanes;
        Out* to = job.out + (batch * job.m + row) * job.n + column;
        if (width == kLanes)
            for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = static_cast<Out>(sum[lane]);
        else
            for (size_t lane = 0; lane < width; ++lane) to[lane] = static_cast<Out>(sum[lane]);
    }
}

template <typename T, typename Sum, typename Out>
inline void mask_jobs(const MaskJob<T, Out>& job, size_t first, size_t last) {
    constexpr size_t kLanes = kVector / sizeof(T);
    const size_t pieces = (job.m + kMaskRows - 1) / kMaskRows, blocks = (job.n + kLanes - 1) / kLanes;
    std::vector<uint8_t> space(16 * 16 * kVector + kVector);
    uint8_t* table = space.data() + (kVector - reinterpret_cast<uintptr_t>(space.data()) % kVector) % kVector;
    std::vector<Sum> sums(std::min(job.m, kMaskRows) * kLanes);
    for (size_t at = first; at < last; ++at) {
        const size_t row = at % pieces * kMaskRows;
        mask_columns<T, Sum, Out>(job, at / (pieces * blocks), at / pieces % blocks * kLanes, row,
                                         std::min(job.m, row + kMaskRows), table, sums.data());
    }
}

