// Products of weights in few bits with int8 activations; the layout is in low_bit_rows.hpp.
#include "low_bit_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "clones.hpp"
#include "cpu.hpp"

namespace bitwright {

namespace {

using decoding::Half;
using decoding::to_float;

constexpr size_t kVector = 64;              // bytes that hold a vector of codes of all rows of a block
constexpr size_t kPage = size_t{2} << 20;  // a huge page: streaming weights misses fewer translations of addresses

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace vnni {
#define LANES 16
#include "low_bit_rows_paths.hpp"
#undef LANES
}  // namespace vnni
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define LANES 8
#include "low_bit_rows_paths.hpp"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#endif
namespace portable {
#define LANES 4
#include "low_bit_rows_paths.hpp"
#undef LANES
}  // namespace portable

using Products = void (*)(const uint8_t*, const Int8Activations&, size_t, size_t, float*, size_t);

template <int kBits>
Products products_by(std::string_view path) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (path == "vnni") return vnni::products<kBits>;
    if (path == "avx2") return avx2::products<kBits>;
#endif
    return portable::products<kBits>;
}

Products products_of(std::string_view path, int bits) {
    switch (bits) {
        case 1: return products_by<1>(path);
        case 2: return products_by<2>(path);
        case 3: return products_by<3>(path);
        case 4: return products_by<4>(path);
        default: return products_by<8>(path);
    }
}

// Puts `value` of `bits` bits at row r and input k of a group, from bit 0 of its vectors.
void put(uint8_t* group, int bits, size_t r, size_t k, unsigned value) {
    const size_t j = k / 4, together = 8 / static_cast<size_t>(bits);
    group[j / together * kVector + 4 * r + k % 4] |= static_cast<uint8_t>(value << (j % together * bits));
}
unsigned take(const uint8_t* group, int bits, size_t r, size_t k) {
    const size_t j = k / 4, together = 8 / static_cast<size_t>(bits);
    return group[j / together * kVector + 4 * r + k % 4] >> (j % together * bits) & ((1u << bits) - 1);
}

}  // namespace

// x by groups; the loops over 32 numbers are vectors of the clone's width.
BITWRIGHT_CLONES static void quantise_groups(const float* x, size_t groups, int8_t* codes, float* scales,
                                             float* offsets, int32_t* sums) {
    using Magnitudes = int32_t __attribute__((vector_size(32)));  // of floats: their order is that of their bits
    for (size_t group = 0; group < groups; ++group, x += kGroup, codes += kGroup) {
        Magnitudes bits[4];
        std::memcpy(bits, x, sizeof(bits));
        for (auto& each : bits) each &= 0x7fffffff;
        Magnitudes top = bits[0] > bits[1] ? bits[0] : bits[1];
        const Magnitudes rest = bits[2] > bits[3] ? bits[2] : bits[3];
        top = top > rest ? top : rest;
        int32_t most = 0;
        for (size_t i = 0; i < 8; ++i) most = std::max(most, top[i]);
        float largest;
        std::memcpy(&largest, &most, sizeof(largest));
        const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int32_t sum = 0;
        for (size_t i = 0; i < kGroup; ++i) {
            const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the integer lies in the low bits
            int32_t whole;
            std::memcpy(&whole, &shifted, sizeof(whole));
            whole -= 0x4b400000;
            codes[i] = static_cast<int8_t>(whole);
            sum += codes[i];
        }
        scales[group] = largest / 127.0f;
        sums[group] = sum;
        offsets[group] = scales[group] * static_cast<float>(sum);
    }
}

void quantise(const float* x, size_t token, size_t begin, size_t end, Int8Activations& to) {
    const size_t group = token * (to.inputs / kGroup) + begin / kGroup;
    quantise_groups(x, (end - begin) / kGroup, to.codes.data() + token * to.inputs + begin, to.scales.data() + group,
                    to.offsets.data() + group, to.sums.data() + group);
}

void LowBitRows::Free::operator()(uint8_t* data) const { std::free(data); }

LowBitRows::LowBitRows(const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums, size_t rows,
                       size_t inputs, int bits)
    : rows_(rows), inputs_(inputs), bits_(bits) {
    if (!rows || !inputs || inputs % kGroup) throw std::invalid_argument("rows of whole groups of 32 inputs are expected");
    if (bits != 8 && (bits < 1 || bits > 4)) throw std::invalid_argument("codes have 1, 2, 3, 4 or 8 bits");
    if ((bits == 8) != (minimums == nullptr)) throw std::invalid_argument("minimums belong to codes of 1 to 4 bits");
    const size_t page = bytes() < kPage ? kVector : kPage;
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(page, (bytes() + page - 1) / page * page)));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kPage) madvise(data_.get(), bytes(), MADV_HUGEPAGE);  // no matter if it cannot
#endif
    std::memset(data_.get(), 0, bytes());
    const size_t groups = inputs / kGroup, kinds = bits == 8 ? 1 : 2;
    for (size_t row = 0; row < rows; ++row) {
        uint8_t* block = data_.get() + row / kBlockRows * block_bytes();
        uint16_t* numbers = reinterpret_cast<uint16_t*>(block + groups * group_bytes());
        const size_t r = row % kBlockRows;
        for (size_t group = 0; group < groups; ++group) {
            numbers[group * kinds * kBlockRows + r] = scales[row * groups + group];
            if (minimums) numbers[(group * kinds + 1) * kBlockRows + r] = minimums[row * groups + group];
            uint8_t* to = block + group * group_bytes();
            for (size_t k = 0; k < kGroup; ++k) {
                const unsigned code = codes[row * inputs + group * kGroup + k];
                if (code >> bits) throw std::invalid_argument("a code does not fit its bits");
                put(to, bits == 3 ? 2 : bits, r, k, bits == 3 ? code & 3 : code);
                if (bits == 3) put(to + 2 * kVector, 1, r, k, code >> 2);
            }
        }
    }
}

void LowBitRows::products(std::string_view path, const Int8Activations& activations, size_t first, size_t tokens,
                          size_t begin, size_t end, float* out, size_t stride) const {
    const Products run = products_of(path, bits_);
    for (size_t row = begin; row < end; row += kBlockRows) {
        const uint8_t* block = data_.get() + row / kBlockRows * block_bytes();
        const size_t count = std::min(end - row, kBlockRows);
        if (count == kBlockRows) {
            run(block, activations, first, tokens, out + row - begin, stride);
            continue;
        }
        for (size_t t = 0; t < tokens; ++t) {  // rows of the last block that are not there
            float whole[kBlockRows];
            run(block, activations, first + t, 1, whole, kBlockRows);
            std::copy_n(whole, count, out + t * stride + row - begin);
        }
    }
}

void LowBitRows::row(size_t index, float* out) const {
    const size_t groups = inputs_ / kGroup, kinds = bits_ == 8 ? 1 : 2, r = index % kBlockRows;
    const uint8_t* block = data_.get() + index / kBlockRows * block_bytes();
    const Half* numbers = reinterpret_cast<const Half*>(block + groups * group_bytes());
    for (size_t group = 0; group < groups; ++group) {
        const float scale = to_float(numbers[group * kinds * kBlockRows + r]);
        const float minimum = bits_ == 8 ? -128 * scale : to_float(numbers[(group * kinds + 1) * kBlockRows + r]);
        const uint8_t* from = block + group * group_bytes();
        for (size_t k = 0; k < kGroup; ++k) {
            unsigned code = take(from, bits_ == 3 ? 2 : bits_, r, k);
            if (bits_ == 3) code |= take(from + 2 * kVector, 1, r, k) << 2;
            out[group * kGroup + k] = scale * static_cast<float>(code) + minimum;
        }
    }
}

std::string_view low_bit_rows_path() { return cpu().vnni ? "vnni" : cpu().avx2 ? "avx2" : "portable"; }

}  // namespace bitwright
