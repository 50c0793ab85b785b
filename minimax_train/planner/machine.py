"""Measured rates of GPUs, from which a step's time is predicted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What kernels reach on a GPU in training steps, bfloat16.

    Fitted to the whole steps of docs/results.md ("Training steps"), of four models with 1 to 8 micro-batches: 19 of one
    GPU, which they give back within 5 %.

    Attributes:
        memory_bytes: of the device that a process can allocate.
        peak_flops_per_s: by the data sheet, as in ``metrics/flops.py``.
        expert_flops_per_s, dense_flops_per_s: of grouped and plain GEMMs whose dimensions are large.
        attention_flops_per_s: softmax attention over documents of some thousand tokens, forward and backward.
        copy_bytes_per_s: bytes read plus bytes written.
    """

    memory_bytes: float
    peak_flops_per_s: float
    expert_flops_per_s: float
    dense_flops_per_s: float
    attention_flops_per_s: float
    copy_bytes_per_s: float


MACHINES = {
    "h100": Rates(79.1 * 2**30, 989e12, 734e12, 782e12, 600e12, 3.02e12),
    "h200": Rates(139.8 * 2**30, 989e12, 667e12, 711e12, 600e12, 4.25e12),
}

HALF_RATE_WIDTH = 100
"""A GEMM whose smallest dimension is n reaches n / (n + this) of the rate."""

TRANSFER_S = {"tp": 60e-6, "cp": 60e-6, "ep": 370e-6, "etp": 170e-6}
"""Added to every transfer of a layer, beyond latency and bytes: streams that wait for each other, kernels that share
the GPU with it, for ``ep`` the host. Fitted to runs on two GPUs; for ``cp`` taken as for ``tp``."""

DATA_PARALLEL_SHARE = 0.75
"""Of the time of the transfers of data parallelism, how much a step gets longer, though they run beside compute: they
take SMs and memory bandwidth from it. Fitted likewise."""

OVERHEAD_BYTES = 1.5 * 2**30
"""CUDA's context, NCCL's buffers, kernels: not PyTorch's, and so in no figure of its allocator."""
