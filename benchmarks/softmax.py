"""Softmax attention on one GPU: kernels side by side, and what cutting a shared row in ring steps costs.

    python benchmarks/softmax.py [--json FILE] [--quick]

The second table is *emulated* without a link: one GPU plays single ranks of a ring over one long document, zigzag, in
turn; what others would send is at hand, so a transfer is a local copy on the same stream. It shows what the steps,
merges and accumulations cost, not what communication costs. Share: the rank's arithmetic over its time, divided by the
rate of one causal FlashAttention call of 131,072 tokens in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minimax_train.kernels.documents import Documents
from minimax_train.kernels.softmax import flash4, softmax_attention
from minimax_train.parallel.communicator import Pending
from minimax_train.parallel.layout import SequenceLayout
from minimax_train.parallel.softmax import softmax_attention_cp

H, G, K = 64, 8, 128


class HandedOver:
    """A communicator whose other ranks' tensors are at hand: a transfer is a copy."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.stock: Tensor | None = None

    def _random_like(self, x: Tensor) -> Tensor:
        if self.stock is None or self.stock.numel() < x.numel():
            self.stock = torch.randn(x.numel(), device=x.device, dtype=x.dtype)
        return self.stock[: x.numel()].view_as(x)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending:
        for buffer in receives.values():
            buffer.copy_(self._random_like(buffer))
        return Pending(lambda: None)

    def all_gather(self, x: Tensor) -> Pending:
        out = x.new_empty(self.size, *x.shape).copy_(x)
        return Pending(lambda: out)

    def reduce_scatter(self, x: Tensor) -> Pending:
        out = x.sum(0)
        return Pending(lambda: out)


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


def kernels(lengths: list[int], implementation: str, repeats: int) -> dict[str, float]:
    *inputs, grad = _inputs(sum(lengths))
    documents = Documents.from_lengths(lengths, "cuda")

    def forward() -> Tensor:
        return softmax_attention(*inputs, documents, scale=K**-0.5, implementation=implementation)[0]

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


def one_rank(rank: int, size: int, tokens: int, method: str, repeats: int) -> dict[str, float]:
    """Forward and backward of one rank of a zigzag over one document, its transfers handed over."""
    shard = SequenceLayout("zigzag", size).shard(Documents.from_lengths([tokens * size]).to("cuda"), rank)
    *inputs, grad = _inputs(tokens)
    communicator = HandedOver(rank, size)

    def step(backward: bool) -> None:
        out = softmax_attention_cp(*inputs, shard, communicator, scale=K**-0.5, method=method)
        if backward:
            torch.autograd.grad(out, inputs, grad)

    forward_ms, both_ms = (milliseconds(lambda b=b: step(b), repeats) for b in (False, True))
    scores = float((shard.global_tokens_T.double() + 1).sum())
    return {
        "rank": rank,
        "ranks": size,
        "method": method,
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": _flops(scores, False) / forward_ms / 1e9,
        "both_tflops": _flops(scores, True) / both_ms / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="file to write all figures to")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer rows")
    options = parser.parse_args()
    repeats = 1 if options.quick else 5
    implementations = ["flash4", "flash"] if flash4.is_installed() else ["flash"]
    rows: dict[str, list[dict]] = {"kernels": [], "ranks": []}

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {H}:{G} heads of {K}; forward / both")
    for tokens in (8192, 32768, 131072):
        for documents in (1, 64):
            for implementation in implementations:
                row = kernels([tokens // documents] * documents, implementation, repeats if tokens > 2**16 else 5)
                rows["kernels"].append({"implementation": implementation, **row})
                print(
                    f"{implementation:>8} {tokens:7d} tokens {documents:3d} documents  {row['forward_ms']:8.2f} /"
                    f" {row['both_ms']:8.2f} ms  {row['forward_tflops']:5.0f} / {row['both_tflops']:5.0f} TFLOP/s",
                    flush=True,
                )
    whole = next(r for r in rows["kernels"] if r["tokens"] == 131072 and r["documents"] == 1)
    print("emulated ranks of a zigzag over one document, 65,536 tokens each; share of one call's rate")
    cases = [(0, 2), (1, 2), (0, 4), (1, 4), (3, 4), (0, 8), (7, 8)]
    for method, (rank, size) in [("ring", case) for case in cases] + [("allgather", case) for case in cases[:4]]:
        row = one_rank(rank, size, 65536, method, repeats)
        rows["ranks"].append(row)
        shares = [row[key] / whole[key] for key in ("forward_tflops", "both_tflops")]
        print(
            f"{method:>10} rank {rank} of {size}  {row['forward_ms']:8.1f} / {row['both_ms']:8.1f} ms "
            f" {row['forward_tflops']:5.0f} / {row['both_tflops']:5.0f} TFLOP/s  {shares[0]:.3f} / {shares[1]:.3f}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
