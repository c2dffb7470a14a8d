// Loops that do nothing but one kind of operation, in registers: what a core can do at most.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "clones.hpp"
#include "cpu.hpp"

namespace nb = nanobind;

namespace bitwright {

namespace {

constexpr int kChains = 8;  // independent sums, enough to hide the latency of an addition
using Floats = float __attribute__((vector_size(64)));

template <bool Multiply>
[[gnu::always_inline]] inline float chains(uint64_t rounds, float factor) {
    Floats sums[kChains];
    for (int i = 0; i < kChains; ++i) sums[i] = Floats{} + static_cast<float>(i);
    for (uint64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < kChains; ++i) sums[i] = Multiply ? sums[i] * factor + factor : sums[i] + factor;
        asm volatile("" ::"r"(round));  // the rounds are done, though only their number matters
    }
    float total = 0;
    for (int i = 0; i < kChains; ++i) total += sums[i][0];
    return total;
}

}  // namespace

BITWRIGHT_CLONES static float multiply_add(uint64_t rounds) { return chains<true>(rounds, 0.5f); }
BITWRIGHT_CLONES static float add_floats(uint64_t rounds) { return chains<false>(rounds, 0.5f); }

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static float dot_int8(uint64_t rounds) {
    __m512i sums[kChains], ones = _mm512_set1_epi8(1);
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_epi32(i);
    for (uint64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], ones, ones);
        asm volatile("" ::"r"(round));
    }
    float total = 0;
    for (int i = 0; i < kChains; ++i) total += static_cast<float>(_mm512_reduce_add_epi32(sums[i]));
    return total;
}
#endif

// Does so many rounds of a kind of operation; returns the operations of a round, 0 where this CPU lacks the kind.
static int run_rounds(std::string_view kind, uint64_t rounds) {
    nb::gil_scoped_release release;
    [[maybe_unused]] volatile float result = 0;
    if (kind == "multiply-add") return result = multiply_add(rounds), kChains * 16 * 2;
    if (kind == "add") return result = add_floats(rounds), kChains * 16;
    if (kind != "int8 dot product") throw std::invalid_argument("unknown kind of operation");
#if defined(__x86_64__)
    if (cpu().vnni) return result = dot_int8(rounds), kChains * 64 * 2;
#endif
    return 0;
}

void bind_peak_rates(nb::module_& m) {
    m.def("run_rounds", [](const char* kind, uint64_t rounds) { return run_rounds(kind, rounds); }, nb::arg("kind"),
          nb::arg("rounds"));
}

}  // namespace bitwright
