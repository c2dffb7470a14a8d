// Weights in 1, 2, 3, 4 or 8 bits, laid out for products with one vector of int8 activations at a time.
//
// w = scale * code + minimum, with one float16 scale and minimum for every group of 32 inputs of a row; 8-bit codes are
// w = scale * (code - 128) and have no minimum. Rows are interleaved in blocks of 16, padded with zeros. Of a block there
// are first the codes, group by group, and then the scales and minimums, group by group, 16 numbers each. The codes of a
// group are 8 vectors of 64 bytes, byte 4 r + i of vector j being the code of row r at input 4 j + i; fewer than 8 bits
// are packed across vectors: with b bits, 8 / b vectors lie in the 64 bytes, the first in the lowest bits. Three bits
// are the two lower bits so, followed by the upper bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "decode_attention.hpp"

namespace bitwright {

constexpr size_t kGroup = 32;     // inputs that share a scale
constexpr size_t kBlockRows = 16;  // rows of a block

// int8 vectors, (tokens, inputs), with a scale for every 32: x ~ scale * code. offset = scale * sum of the codes.
struct Int8Activations {
    size_t inputs;
    std::vector<int8_t> codes;
    std::vector<float> scales, offsets;  // (tokens, inputs / 32)
    std::vector<int32_t> sums;           // of the codes

    Int8Activations(size_t tokens, size_t inputs)
        : inputs(inputs), codes(tokens * inputs), scales(tokens * inputs / kGroup), offsets(scales.size()),
          sums(scales.size()) {}
};

// Rounds inputs [begin, end), multiples of 32, of a token to nearest, ties to even: scale = largest / 127. `x` points to
// input `begin`.
void quantise(const float* x, size_t token, size_t begin, size_t end, Int8Activations& to);

class LowBitRows {
   public:
    LowBitRows() = default;
    // Codes (rows, inputs), a byte each; scales and minimums as bits of float16, (rows, inputs / 32). With 8 bits codes are
    // biased by 128 and minimums null. Throws std::invalid_argument for sizes that are not whole groups.
    LowBitRows(const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums, size_t rows, size_t inputs,
               int bits);

    size_t rows() const { return rows_; }
    size_t inputs() const { return inputs_; }
    size_t bytes() const { return blocks() * block_bytes(); }

    // out[t * stride + row - begin] = row . activations of token first + t, for t < tokens and rows [begin, end);
    // begin is a multiple of 16.
    void products(std::string_view path, const Int8Activations& activations, size_t first, size_t tokens, size_t begin,
                  size_t end, float* out, size_t stride) const;

    // The weights of one row as floats.
    void row(size_t index, float* out) const;

   private:
    size_t blocks() const { return (rows_ + kBlockRows - 1) / kBlockRows; }
    size_t group_bytes() const { return kBlockRows * kGroup / 8 * static_cast<size_t>(bits_); }
    size_t block_bytes() const {
        return inputs_ / kGroup * (group_bytes() + kBlockRows * sizeof(decoding::Half) * (bits_ == 8 ? 1 : 2));
    }

    struct Free {
        void operator()(uint8_t* data) const;
    };
    size_t rows_ = 0, inputs_ = 0;
    int bits_ = 0;
    std::unique_ptr<uint8_t[], Free> data_;
};

// "vnni", "avx2" or "portable", the fastest that this CPU has.
std::string_view low_bit_rows_path();

}  // namespace bitwright
