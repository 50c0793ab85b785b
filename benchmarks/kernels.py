"""Kernels on one GPU, side by side: time, share of the memory floor, error; a table, and JSON with ``--json``.

    python benchmarks/kernels.py [--op lightning experts norm rope silu loss adamw] [--json FILE]
                                 [--tokens 8192 32768 131072] [--heads 64 8] [--peer]

Peers: ``pip install flash-linear-attention lightning-attn``.

``--op`` says what is measured; ``fused_ops.py`` has all but lightning attention, to which the other arguments apply.
The floor is the bytes an op must read and write once, over the copy rate measured in the same run. Times are medians:
of the device alone (ours: replays of a CUDA graph; peers: the sum of their kernels, without gaps) and of plain calls
(``eager``: with the launches of one training step). Ours reads q, k and v as views of one projection; peers are given
them in the layout they want, not timed. Errors are relative, against the chunked implementation in float64, at 8192
tokens and 8 heads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Callable

import fused_ops
import torch
from timing import copy_rate, graph_times, kernel_times, times
from torch import Tensor

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes

DIM = 128
ATTENTION_2 = "lightning-attention-2"  # one document only


def random_lengths(tokens: int, documents: int) -> list[int]:
    cuts = sorted(random.Random(0).sample(range(1, tokens), documents - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)]


def first_configuration_only() -> None:
    """Keep Triton's autotuner from timing a peer's configurations: minutes of device time; its errors stay the same."""
    from triton.runtime import autotuner

    autotuner.Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]


def lightning_implementations(peer: bool) -> dict[str, Callable]:
    def ours(name: str) -> Callable:
        return lambda q, k, v, slopes_H, documents: lightning_attention(
            q, k, v, slopes_H, documents, implementation=name
        )[0]

    found = {"triton": ours("triton"), "chunked": ours("chunked")}
    if peer:
        from fla.ops.simple_gla import chunk_simple_gla

        def fla(q, k, v, slopes_H, documents):
            return chunk_simple_gla(
                q[None], k[None], v[None], scale=1.0, g_gamma=-slopes_H, cu_seqlens=documents.cu_seqlens.long()
            )[0][0]

        found["fla"] = fla
        if importlib.util.find_spec("lightning_attn"):
            from lightning_attn.ops import lightning_attn_func

            def attention_2(q, k, v, slopes_H, documents):
                return lightning_attn_func(*(x.transpose(0, 1)[None] for x in (q, k, v)), slopes_H)[0].transpose(0, 1)

            found[ATTENTION_2] = attention_2
    return found


def head_major(x_THK: Tensor) -> Tensor:
    """The same tensor with a head's tokens side by side."""
    return x_THK.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = {"fla": Tensor.contiguous, ATTENTION_2: head_major}  # what spares an implementation a copy


def lightning_inputs(tokens: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k and v as views into one projection laid out per head, as the model has them, and the output's gradient."""
    qkv_THQ = torch.randn(tokens, heads, 3 * DIM, device="cuda", dtype=dtype)
    return *qkv_THQ.split(DIM, dim=-1), torch.randn(tokens, heads, DIM, device="cuda", dtype=dtype)


def lightning_calls(
    name: str, run: Callable, qkv: list[Tensor], d_out: Tensor, slopes_H: Tensor, documents: Documents
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass alone, without autograd, and both passes, of inputs in the layout the implementation wants."""
    lay_out = LAYOUTS.get(name, Tensor.detach)
    leaves = [lay_out(x).detach().requires_grad_() for x in qkv]
    d_out = lay_out(d_out)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*leaves, slopes_H, documents)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves, slopes_H, documents), leaves, d_out)

    return forward, both


def device_times(name: str, call: Callable[[], object]) -> float:
    """Milliseconds on the device: ours as a graph, gaps included; of the others, which a graph may refuse, kernels."""
    return graph_times(call) if name == "triton" else kernel_times([call])[0]


def lightning_errors(run: Callable) -> dict[str, float]:
    torch.manual_seed(0)
    *qkv, d_out = lightning_inputs(8192, 8)
    slopes_H = torch.tensor([0.917, *lightning_slopes(64, 0, 80)[[8, 24, 40, 56, 63]], 1e-3, 1e-5], device="cuda")
    documents = Documents.from_lengths(random_lengths(8192, 5), "cuda")

    def all_results(run: Callable, dtype: torch.dtype, slopes_H: Tensor) -> list[Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in qkv]
        out = run(*leaves, slopes_H, documents)
        return [out, *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    exact = all_results(lightning_implementations(False)["chunked"], torch.float64, slopes_H.double())
    results = all_results(run, torch.bfloat16, slopes_H)
    return {
        name: ((x.double() - y).norm() / y.norm()).item()
        for name, x, y in zip(("out", "dq", "dk", "dv"), results, exact, strict=True)
    }


def lightning(arguments: argparse.Namespace, rate: float) -> list[dict]:
    rows = []
    implementations = lightning_implementations(arguments.peer)
    print("| name | tokens | heads | docs | forward ms (x floor; eager) | f+b ms (x floor; eager) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tokens in arguments.tokens:
        for heads in arguments.heads:
            for count in arguments.documents:
                tensor = tokens * heads * DIM * 2
                floors = {"forward": 4 * tensor / rate * 1e3, "both": 11 * tensor / rate * 1e3}
                *qkv, d_out = lightning_inputs(tokens, heads)
                slopes_H = lightning_slopes(heads, 0, 80).cuda()
                documents = Documents.from_lengths(random_lengths(tokens, count), "cuda")
                for name, run in implementations.items():
                    if name == "chunked" and (tokens > 32768 or count > 1):
                        continue  # its weights between chunks are quadratic in their number
                    if (name == "fla" and arguments.peer_untuned) or (name == ATTENTION_2 and count > 1):
                        continue
                    forward, both = lightning_calls(name, run, qkv, d_out, slopes_H, documents)
                    row = {"op": "lightning", "name": name, "tokens": tokens, "heads": heads, "documents": count}
                    for label, call in (("forward", forward), ("both", both)):
                        row[f"{label}_eager_ms"] = times(call)
                        row[f"{label}_ms"] = device_times(name, call)
                        row[f"{label}_over_floor"] = row[f"{label}_ms"] / floors[label]
                    rows.append(row)
                    show(row)
                    torch.cuda.empty_cache()
    print("| lightning, error of | o | dq | dk | dv |\n| --- | --- | --- | --- | --- |")
    for name, run in implementations.items():
        if name == ATTENTION_2:
            continue
        errors = lightning_errors(run)  # after the times: a peer is tuned at the first shape it sees
        print(f"| {name} | " + " | ".join(f"{error:.2e}" for error in errors.values()) + " |", flush=True)
        for row in rows:
            if row["name"] == name:
                row |= {f"error_{key}": value for key, value in errors.items()}
    return rows


def show(row: dict) -> None:
    cells = [row["name"], row["tokens"], row["heads"], row["documents"]]
    for label in ("forward", "both"):
        cells.append(f"{row[f'{label}_ms']:.3f} ({row[f'{label}_over_floor']:.2f}; {row[f'{label}_eager_ms']:.3f})")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=["lightning", *fused_ops.OPS], default=["lightning"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 64])
    parser.add_argument(
        "--peer", action="store_true", help="also flash-linear-attention, and Lightning Attention-2 if it is there"
    )
    parser.add_argument("--peer-untuned", action="store_true", help="its errors only, without minutes of tuning")
    parser.add_argument("--json", help="where to write the rows")
    arguments = parser.parse_args()
    if arguments.peer_untuned:
        arguments.peer = True
        first_configuration_only()
    rate = copy_rate()
    machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, bfloat16, K = V = {DIM}; copy {rate / 1e12:.2f} TB/s")
    rows = []
    for op in arguments.op:
        if op == "lightning":
            rows += lightning(arguments, rate)
        else:
            rows += fused_ops.OPS[op](rate)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "copy_bytes_per_second": rate, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
