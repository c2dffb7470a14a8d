// Attention of a few queries to one run of keys and values, kept up over runs: what the decode kernels are made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

namespace bitwright::decoding {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 number) {
    const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float to_float(Half half) {
    const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16, rest = half.bits & 0x7fffu;
    if (rest < 0x400u) {  // subnormal
        const float value = static_cast<float>(rest) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t exponent = rest >= 0x7c00u ? 0x7f800000u : ((rest >> 10) + 112) << 23;
    const uint32_t bits = sign | exponent | (rest & 0x3ffu) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// What all pieces of a call share.
struct Block {
    size_t rows, channels, value_channels, query_width, out_width;  // widths are channels padded to whole vectors
    size_t key_stride, value_stride, keys_per_run;
};

struct RowState {
    float most, total;  // in powers of two
};

struct Scratch {
    std::vector<float> query, scores, out, keys, values;
    std::vector<RowState> states;
};

constexpr double kLn2 = 0.69314718055994530942;

// Of queries with so many channels: the rows' widths, and keys of a run that stay in the first-level cache.
Block block_of(size_t rows, size_t channels, size_t value_channels, size_t key_stride, size_t value_stride,
               size_t item_bytes);

// Room for a block in `scratch`, its padding zero.
void make_room(const Block& block, Scratch& scratch);

// The first run starts from here, with queries (rows, channels) times `scale`.
void begin(const Block& block, const float* query, float scale, Scratch& scratch);

// Attends to up to `keys_per_run` keys more: scratch.out and scratch.states follow. T is float, Half or BFloat16.
template <typename T>
void attend_by(std::string_view path, const Block& block, const T* keys, const T* values, size_t count,
               Scratch& scratch);

// "avx512", "avx2" or "portable", the fastest that this CPU has.
std::string_view decode_attention_path();

}  // namespace bitwright::decoding
