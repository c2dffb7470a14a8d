"""What `bitwright kernels bench` times of block-sparse and unstructured sparse products."""

from __future__ import annotations

import numpy as np

from bitwright.kernels.benchmark import Case


def block_sparse() -> list[Case]:
    """int8 weights with 80 and 90 % of their (4, 1) blocks dropped, 1024 x 1024 by 64 and 4096 x 1024 by 384."""
    return [_block_sparse(*each) for each in ((1024, 1024, 64, 0.8), (1024, 1024, 64, 0.9), (4096, 1024, 384, 0.8))]


def _block_sparse(outputs: int, inputs: int, tokens: int, sparsity: float) -> Case:
    import torch
    from scipy import sparse

    from bitwright.kernels.block_sparse_matmul import BlockCSR, matmul, slab_width, to_slabs, work

    rng = np.random.default_rng(0)
    kept = np.repeat(rng.random((outputs // 4, inputs)) >= sparsity, 4, axis=0)
    w = (rng.integers(-128, 128, (outputs, inputs)) * kept).astype(np.int8)
    a = rng.integers(0, 128, (inputs, tokens)).astype(np.uint8)
    packed, laid = BlockCSR.from_dense(w), to_slabs(a, slab_width(tokens))
    x, dense = torch.from_numpy(a.T.astype(np.int8)), torch.from_numpy(w).t()
    csr, real = sparse.csr_array(w.astype(np.float32)), a.astype(np.float32)
    return Case(
        "block-sparse", f"{outputs}x{inputs} by {tokens}, {100 * sparsity:.0f} % zeros",
        lambda threads: matmul(packed, laid, tokens=tokens, threads=threads),
        {"torch int8": lambda threads: torch._int_mm(x, dense), "scipy CSR fp32": lambda threads: csr @ real},
        work(packed, tokens), {}, 2.0 * outputs * inputs * tokens,
    )  # fmt: skip


def sparse_products() -> list[Case]:
    """float16 weights 4096 x 4096 with 80 % zeros, in the form for 1, 8 and 16 columns."""
    return [_sparse_product(n) for n in (1, 8, 16)]


def _sparse_product(n: int) -> Case:
    import warnings

    import torch

    from bitwright.kernels.sparse_matmul import best_form, matmul, work

    rng = np.random.default_rng(0)
    w = rng.normal(size=(4096, 4096)).astype(np.float16)
    w[rng.random(w.shape) < 0.8] = 0
    b = rng.normal(size=(4096, n)).astype(np.float32)
    form, real = best_form(w, n), torch.from_numpy(w.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's CSR is in beta
        csr = real.to_sparse_csr()
    half, columns = real.bfloat16(), torch.from_numpy(b)
    x = columns.t().contiguous().bfloat16()
    return Case(
        "sparse", f"4096x4096 by {n}, 80 % zeros", lambda threads: matmul(form, b, threads=threads),
        {
            "torch bf16, dense": lambda threads: torch.nn.functional.linear(x, half).float(),
            "torch CSR fp32": lambda threads: csr @ columns,
        },
        work(form, n), {}, 2.0 * 4096 * 4096 * n,
    )  # fmt: skip
