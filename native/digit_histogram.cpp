// Histogram of the number of non-zero digits of an int8 tensor, under an encoding given as a 256-entry table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstdint>
#include <stdexcept>

namespace nb = nanobind;

namespace bitwright {

using Int8Array = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DigitCounts = nb::ndarray<const uint8_t, nb::shape<256>, nb::c_contig, nb::device::cpu>;
using Histogram = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// digit_counts[v + 128] is the number of non-zero digits of v; histogram[d] receives how many values have d of them.
void digit_histogram(Int8Array values, DigitCounts digit_counts, Histogram histogram) {
    const int8_t* data = values.data();
    const size_t n = values.shape(0);
    // Count values first (four tables hide the store-to-load latency of repeated values), then fold by digit count.
    std::array<std::array<int64_t, 256>, 4> counts{};
    {
        nb::gil_scoped_release release;
        size_t i = 0;
        for (; i + 4 <= n; i += 4)
            for (size_t lane = 0; lane < 4; ++lane) ++counts[lane][static_cast<uint8_t>(data[i + lane])];
        for (; i < n; ++i) ++counts[0][static_cast<uint8_t>(data[i])];
    }
    for (int value = -128; value < 128; ++value) {
        const size_t digits = digit_counts.data()[value + 128];
        if (digits >= histogram.shape(0)) throw std::invalid_argument("histogram is shorter than the digit counts");
        const auto byte = static_cast<uint8_t>(static_cast<int8_t>(value));
        for (const auto& lane : counts) histogram.data()[digits] += lane[byte];
    }
}

void bind_digit_histogram(nb::module_& m) {
    m.def("digit_histogram", &digit_histogram, nb::arg("values"), nb::arg("digit_counts"), nb::arg("histogram"));
}

}  // namespace bitwright
