// Python module bitwright._native: each kernel registers its own functions.
#include <nanobind/nanobind.h>

namespace bitwright {
void bind_activation_quantisation(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_bit_plane_matmul(nanobind::module_& m);
void bind_block_floating_attention(nanobind::module_& m);
void bind_block_sparse_matmul(nanobind::module_& m);
void bind_decode_attention(nanobind::module_& m);
void bind_digit_histogram(nanobind::module_& m);
void bind_gate_simulation(nanobind::module_& m);
void bind_gated_linear_attention(nanobind::module_& m);
void bind_late_dequantisation(nanobind::module_& m);
void bind_llama_decoder(nanobind::module_& m);
void bind_logarithmic_multiplication(nanobind::module_& m);
void bind_number_formats(nanobind::module_& m);
void bind_outlier_victim(nanobind::module_& m);
void bind_packed_rows(nanobind::module_& m);
void bind_peak_rates(nanobind::module_& m);
void bind_shift_and_add(nanobind::module_& m);
void bind_sparse_matmul(nanobind::module_& m);
void bind_timeline(nanobind::module_& m);
}

NB_MODULE(_native, m) {
    m.doc() = "Native kernels of Bitwright.";
    bitwright::bind_activation_quantisation(m);
    bitwright::bind_attention(m);
    bitwright::bind_bit_plane_matmul(m);
    bitwright::bind_block_floating_attention(m);
    bitwright::bind_block_sparse_matmul(m);
    bitwright::bind_decode_attention(m);
    bitwright::bind_digit_histogram(m);
    bitwright::bind_gate_simulation(m);
    bitwright::bind_gated_linear_attention(m);
    bitwright::bind_late_dequantisation(m);
    bitwright::bind_llama_decoder(m);
    bitwright::bind_logarithmic_multiplication(m);
    bitwright::bind_number_formats(m);
    bitwright::bind_outlier_victim(m);
    bitwright::bind_packed_rows(m);
    bitwright::bind_peak_rates(m);
    bitwright::bind_shift_and_add(m);
    bitwright::bind_sparse_matmul(m);
    bitwright::bind_timeline(m);
}
