"""Softmax attention on one GPU: the kernels, and FlashAttention-4's own entry point, side by side; one document and 64.

    python benchmarks/softmax.py [--tokens 8192 32768 131072] [--documents 1 64] [--json FILE]

The implementations take turns of a fifth of a second or one call. What sharing a sequence costs is in
``context_parallel.py``.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from timing import times_in_turns
from torch import Tensor

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import flash4, softmax_attention

H, G, K = 64, 8, 128
PEER = "FA4 itself"
TURN_MS, ROUNDS = 200, 3


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


def rows(lengths: list[int], implementations: list[str]) -> list[dict]:
    """All implementations on the same documents, forward in turn, then with backward."""
    *inputs, grad = _inputs(sum(lengths))
    documents = Documents.from_lengths(lengths, "cuda")
    scores = sum(length * (length + 1) / 2 for length in lengths)

    def forward(name: str) -> Tensor:
        return _attend(name, *inputs, documents=documents)

    def both(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(name), inputs, grad)

    with torch.no_grad():
        forward_ms = times_in_turns({name: partial(forward, name) for name in implementations}, TURN_MS, ROUNDS)
    both_ms = times_in_turns({name: partial(both, name) for name in implementations}, TURN_MS, ROUNDS)
    return [
        {
            "implementation": name,
            "tokens": sum(lengths),
            "documents": len(lengths),
            "forward_ms": forward_ms[name],
            "both_ms": both_ms[name],
            "forward_tflops": _flops(scores, False) / forward_ms[name] / 1e9,
            "both_tflops": _flops(scores, True) / both_ms[name] / 1e9,
        }
        for name in implementations
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--json", help="file to write all figures to")
    options = parser.parse_args()
    implementations = [PEER, "flash4", "flash"] if flash4.is_installed() else ["flash"]
    found = []

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {H}:{G} heads of {K}; forward / both")
    for tokens in options.tokens:
        for documents in options.documents:
            for row in rows([tokens // documents] * documents, implementations):
                found.append(row)
                print(
                    f"{row['implementation']:>10} {tokens:7d} tokens {documents:3d} documents "
                    f"{row['forward_ms']:9.3f} / {row['both_ms']:9.3f} ms  "
                    f"{row['forward_tflops']:5.0f} / {row['both_tflops']:5.0f} TFLOP/s",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
