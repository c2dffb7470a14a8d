// Zero-delay, bit-parallel simulation of a mapped netlist with toggle counts: 64 independent runs per machine word.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace bitwright {

constexpr size_t kMaxInputs = 6;

using Tables = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using GateInputs = nb::ndarray<const int32_t, nb::shape<-1, kMaxInputs>, nb::c_contig, nb::device::cpu>;
using Stimulus = nb::ndarray<const uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Observed = nb::ndarray<uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Toggles = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LaneMask = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

void require_nets(const Indices& indices, size_t nets) {
    for (size_t i = 0; i < indices.shape(0); ++i)
        require(indices.data()[i] >= 0 && static_cast<size_t>(indices.data()[i]) < nets, "a net index is out of range");
}

// Value of a gate for 64 lanes: fold the truth table input by input (Shannon expansion).
inline uint64_t evaluate(uint64_t table, const uint64_t* in, size_t inputs) {
    uint64_t leaves[1U << kMaxInputs];
    const size_t rows = size_t{1} << inputs;
    for (size_t row = 0; row < rows; ++row) leaves[row] = -(table >> row & 1U);
    for (size_t input = 0, width = rows / 2; width >= 1; ++input, width /= 2)
        for (size_t row = 0; row < width; ++row)
            leaves[row] = leaves[2 * row] ^ (in[input] & (leaves[2 * row] ^ leaves[2 * row + 1]));
    return leaves[0];
}

inline uint64_t evaluate2(uint64_t table, uint64_t a, uint64_t b) {
    const uint64_t f0 = -(table & 1U), f1 = -(table >> 1 & 1U), f2 = -(table >> 2 & 1U), f3 = -(table >> 3 & 1U);
    const uint64_t low = f0 ^ (a & (f0 ^ f1)), high = f2 ^ (a & (f2 ^ f3));
    return low ^ (b & (low ^ high));
}

}  // namespace

// Gates come in topological order. Row r of a gate's truth table is its output when input i equals bit i of r; unused
// inputs are -1 and come last. Each cycle: drive the stimulus, evaluate the gates, observe, count toggles against the
// previous cycle in the lanes of the mask, then let every flip-flop take its data net. Nets start at zero, as do
// flip-flops; constant nets are gates without inputs.
void simulate_gates(Tables tables, GateInputs gate_inputs, Indices gate_outputs, Indices flop_data, Indices flop_outputs,
                    Indices stimulus_nets, Stimulus stimulus, Indices observed_nets, Observed observed, LaneMask lanes,
                    Toggles toggles) {
    const size_t nets = toggles.shape(0), gates = tables.shape(0), flops = flop_data.shape(0);
    const size_t cycles = stimulus.shape(0), driven = stimulus.shape(1), words = stimulus.shape(2);
    require(gate_inputs.shape(0) == gates && gate_outputs.shape(0) == gates, "gate arrays differ in length");
    require(flop_outputs.shape(0) == flops, "flip-flop arrays differ in length");
    require(stimulus_nets.shape(0) == driven, "stimulus and its nets differ in length");
    require(observed.shape(0) == cycles && observed.shape(1) == observed_nets.shape(0) && observed.shape(2) == words,
            "observed must have shape (cycles, observed nets, words)");
    require(lanes.shape(0) == words, "the lane mask must have one word per stimulus word");
    for (const Indices& indices : {gate_outputs, flop_data, flop_outputs, stimulus_nets, observed_nets})
        require_nets(indices, nets);
    std::vector<uint8_t> fan_in(gates);
    for (size_t g = 0; g < gates; ++g) {
        const int32_t* in = gate_inputs.data() + g * kMaxInputs;
        while (fan_in[g] < kMaxInputs && in[fan_in[g]] >= 0) {
            require(static_cast<size_t>(in[fan_in[g]]) < nets, "a net index is out of range");
            ++fan_in[g];
        }
    }
    nb::gil_scoped_release release;
    std::vector<uint64_t> value(nets * words), previous(nets * words), latched(flops * words);
    for (size_t cycle = 0; cycle < cycles; ++cycle) {
        const uint64_t* drive = stimulus.data() + cycle * driven * words;
        for (size_t i = 0; i < driven; ++i)
            for (size_t w = 0; w < words; ++w) value[stimulus_nets.data()[i] * words + w] = drive[i * words + w];
        for (size_t g = 0; g < gates; ++g) {
            const int32_t* in = gate_inputs.data() + g * kMaxInputs;
            const uint64_t table = tables.data()[g];
            uint64_t* out = &value[gate_outputs.data()[g] * words];
            const size_t inputs = fan_in[g];
            for (size_t w = 0; w < words; ++w) {
                if (inputs == 1) {
                    const uint64_t f0 = -(table & 1U), f1 = -(table >> 1 & 1U);
                    out[w] = f0 ^ (value[in[0] * words + w] & (f0 ^ f1));
                } else if (inputs == 2) {
                    out[w] = evaluate2(table, value[in[0] * words + w], value[in[1] * words + w]);
                } else {
                    uint64_t operands[kMaxInputs];
                    for (size_t i = 0; i < inputs; ++i) operands[i] = value[in[i] * words + w];
                    out[w] = evaluate(table, operands, inputs);
                }
            }
        }
        uint64_t* seen = observed.data() + cycle * observed.shape(1) * words;
        for (size_t o = 0; o < observed.shape(1); ++o)
            for (size_t w = 0; w < words; ++w) seen[o * words + w] = value[observed_nets.data()[o] * words + w];
        if (cycle > 0)
            for (size_t net = 0; net < nets; ++net)
                for (size_t w = 0; w < words; ++w)
                    toggles.data()[net] +=
                        std::popcount((value[net * words + w] ^ previous[net * words + w]) & lanes.data()[w]);
        previous = value;
        for (size_t f = 0; f < flops; ++f)
            for (size_t w = 0; w < words; ++w) latched[f * words + w] = value[flop_data.data()[f] * words + w];
        for (size_t f = 0; f < flops; ++f)
            for (size_t w = 0; w < words; ++w) value[flop_outputs.data()[f] * words + w] = latched[f * words + w];
    }
}

void bind_gate_simulation(nb::module_& m) {
    m.def("simulate_gates", &simulate_gates, nb::arg("tables"), nb::arg("gate_inputs"), nb::arg("gate_outputs"),
          nb::arg("flop_data"), nb::arg("flop_outputs"), nb::arg("stimulus_nets"), nb::arg("stimulus"),
          nb::arg("observed_nets"), nb::arg("observed"), nb::arg("lanes"), nb::arg("toggles"));
}

}  // namespace bitwright
