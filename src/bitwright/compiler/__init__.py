"""Transformations of workloads and kernels."""
