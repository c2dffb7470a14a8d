"""Native CPU kernels and their work and traffic predictions."""
