// What instructions this CPU has, detected once.
#pragma once

namespace bitwright {

struct Cpu {
    bool avx2 = false;    // AVX2 and FMA
    bool avx512 = false;  // AVX-512 F, BW, DQ and VL
    bool vnni = false;    // AVX-512 VNNI, with avx512
    bool bf16 = false;    // AVX-512 BF16, with avx512
};

inline const Cpu& cpu() {
    static const Cpu found = [] {
        Cpu here;
#if defined(__x86_64__)
        here.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        here.avx512 = here.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        here.vnni = here.avx512 && __builtin_cpu_supports("avx512vnni");
        here.bf16 = here.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
        return here;
    }();
    return found;
}

}  // namespace bitwright
