"""Softmax attention on one GPU: the kernels, and FlashAttention-4's own entry point, side by side; one document and 64.

    python benchmarks/softmax.py [--json FILE] [--quick]

Measured; what sharing a row costs is in ``context_parallel.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from minimax_train.kernels.documents import Documents
from minimax_train.kernels.softmax import flash4, softmax_attention

H, G, K = 64, 8, 128
PEER = "FA4 itself"


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median time of a step, after one that warms up. Short steps are queued in numbers, so that launching hides."""

    def once(steps: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / steps

    step()
    steps = max(1, min(50, int(50 / once(1))))
    return statistics.median(once(steps) for _ in range(repeats))


def _inputs(tokens: int) -> list[Tensor]:
    make = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = [torch.randn(tokens, heads, K, **make).requires_grad_() for heads in (H, G, G)]
    return [*inputs, torch.randn(tokens, H, K, **make)]


def _flops(scores: float, backward: bool) -> float:
    return scores * 4 * H * K * (3.5 if backward else 1)


def _attend(implementation: str, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    if implementation != PEER:
        return softmax_attention(q, k, v, documents, scale=K**-0.5, implementation=implementation)[0]
    from flash_attn.cute import flash_attn_varlen_func

    edges, longest = documents.cu_seqlens, documents.max_length
    lengths = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}
    out = flash_attn_varlen_func(q, k, v, **lengths, softmax_scale=K**-0.5, causal=True)
    return out[0] if isinstance(out, tuple) else out


def kernels(lengths: list[int], implementation: str, repeats: int) -> dict[str, float]:
    *inputs, grad = _inputs(sum(lengths))
    documents = Documents.from_lengths(lengths, "cuda")

    def forward() -> Tensor:
        return _attend(implementation, *inputs, documents)

    with torch.no_grad():
        forward_ms = milliseconds(forward, repeats)
    both_ms = milliseconds(lambda: torch.autograd.grad(forward(), inputs, grad), repeats)
    scores = sum(length * (length + 1) / 2 for length in lengths)
    return {
        "tokens": sum(lengths),
        "documents": len(lengths),
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": _flops(scores, False) / forward_ms / 1e9,
        "both_tflops": _flops(scores, True) / both_ms / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file to write all figures to")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args()
    repeats = 1 if options.quick else 5
    implementations = [PEER, "flash4", "flash"] if flash4.is_installed() else ["flash"]
    rows = []

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {H}:{G} heads of {K}; forward / both")
    for tokens in (8192, 32768, 131072):
        for documents in (1, 64):
            for implementation in implementations:
                row = kernels([tokens // documents] * documents, implementation, repeats if tokens > 2**16 else 5)
                rows.append({"implementation": implementation, **row})
                print(
                    f"{implementation:>10} {tokens:7d} tokens {documents:3d} documents  {row['forward_ms']:8.2f} /"
                    f" {row['both_ms']:8.2f} ms  {row['forward_tflops']:5.0f} / {row['both_tflops']:5.0f} TFLOP/s",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
