"""Measured rates of GPUs, from which a step's time is predicted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What kernels reach on a GPU in training steps, bfloat16.

    Fitted to the whole steps of docs/results.md ("Training steps", "Engines"), of four models with 1 to 8
    micro-batches. Those of one GPU with today's kernels they give back within 6 %.

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
    "h100": Rates(79.1 * 2**30, 989e12, 720e12, 785e12, 600e12, 3.02e12),
    "h200": Rates(139.8 * 2**30, 989e12, 710e12, 700e12, 600e12, 4.25e12),
}

HALF_RATE_WIDTH = 100
"""A GEMM whose smallest dimension is n reaches n / (n + this) of the rate."""

TILE_ROWS = 128
"""A GEMM computes so many rows at a time: half of that is lost, on average, for each expert."""

GAPS_S = 0.18e-3
"""Of a layer's forward and backward pass in a micro-batch: between its some 130 kernels, replayed from a CUDA graph."""

LAUNCH_S = {"launches": 5.7e-3, "gathers": 4.1e-3, "reductions": 2.2e-3}
"""What the host takes for a layer's forward and backward pass in a micro-batch where no CUDA graph is replayed: to
launch its kernels; and where engines do so in every micro-batch, to gather its weights, or to reduce its gradients. The
GPU waits where that takes longer than its own work. Fitted to ``medium`` on one H100 (docs/results.md, "Engines")."""

STAGE_PASSES = 1.05
"""What the passes of pipeline stages take, over those of the same layers in one CUDA graph. Fitted to passes on two
H200 (docs/results.md, "Pipeline stages"): up to 1.1 where backward passes are split."""

TRANSFER_S = {"tp": 60e-6, "cp": 10e-6, "ep": 420e-6, "etp": 110e-6}
"""Added to every transfer of a layer, beyond latency and bytes: streams that wait for each other, kernels that share
the GPU with it, for ``ep`` the host, less what runs beside GEMMs; for ``ep`` times the share of routed tokens that
travel. Fitted to runs on two and four H200."""

DATA_PARALLEL_SHARE = 0.5
"""Of the time of the transfers of data parallelism, how much a step gets longer, though they run beside compute: they
take SMs and memory bandwidth from it. Fitted likewise."""

OVERHEAD_BYTES = 1.5 * 2**30
"""CUDA's context, NCCL's buffers, kernels: not PyTorch's, and so in no figure of its allocator."""
