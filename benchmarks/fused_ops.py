"""Experts, norms, RoPE, SiLU, loss and AdamW on one GPU, each beside plain PyTorch: rows for ``kernels.py --op``.

Times are medians of plain calls, gradients included where it says so; at these sizes the device is what is waited for.
A share of the copy rate is the bytes that the op must read and write once, over the time, over the rate of a copy in
the same run. A share of the GEMM rate is 6 FLOP per token and active weight, over the time, over the rate of a dense
GEMM in the same run: 8192^3, and in brackets one of the experts' own size (all routed tokens, one expert). The expert
layer and those dense GEMMs take turns of a third of a second, the layer's GEMMs of a tenth, so that all run at the
clock that the power limit allows for long; a GEMM's first 15 ms are faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import extra_memory, gemm, gemm_rate, times, times_in_turns
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from minimax_train.apex import has_apex
from minimax_train.engines.fused_adam import find_fused_adam
from minimax_train.kernels.adamw import adamw_, squared_norm
from minimax_train.kernels.cross_entropy import linear_cross_entropy
from minimax_train.kernels.experts import (
    Permutation,
    choose_implementation,
    expert_mlp,
    has_quack,
    pytorch,
    route,
    router_logits,
)
from minimax_train.kernels.norm import add_rms_norm, gated_rms_norm, rms_norm
from minimax_train.kernels.rope import rotary_table, rotate_heads
from minimax_train.kernels.silu import silu_qkv

# Tokens, hidden, expert hidden, experts, assignments per token.
EXPERTS = [(16_384, 6144, 9216, 32, 2), (65_536, 1024, 2816, 16, 2)]
NORMS = [(32_768, 6144), (32_768, 8192), (131_072, 1024)]
SILUS = [(32_768, 64), (131_072, 8)]  # tokens, heads
VOCABULARY = 200_064
PARAMETERS = [2**20 + 16, 2**29, 2**30 + 16]
SHARES = "share_of_dense", "share_of_dense_of_its_size"


def _randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale).requires_grad_()


def _print(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def _header(*cells: str) -> None:
    _print(*cells)
    _print(*("---" for _ in cells))


def experts(rate: float) -> list[dict]:
    dense = gemm_rate(8192, 8192, 8192)
    print(f"dense 8192^3 GEMM {dense / 1e12:.0f} TFLOP/s in its first 15 ms")
    rows = []
    for configuration in EXPERTS:
        rows += _expert_layer(*configuration, rate=rate)
        torch.cuda.empty_cache()
    return rows


def _expert_layer(T: int, D: int, hidden: int, E: int, K: int, *, rate: float) -> list[dict]:
    _header(f"experts {D} x {hidden}, E={E}, top-{K}, {T} tokens", "ms", "TFLOP/s, or share of copy rate", "of dense")
    x, router = _randn(T, D), _randn(E, D, scale=D**-0.5)
    gate_up, down = _randn(E, 2 * hidden, D, scale=D**-0.5), _randn(E, D, hidden, scale=hidden**-0.5)
    pieces, d_y = torch.zeros(T, dtype=torch.int64, device="cuda"), torch.randn_like(x)
    one = torch.ones((), device="cuda")

    def layer(implementation: str, router_implementation: str) -> tuple[Tensor, ...]:
        logits, h = router_logits(x, router, implementation=router_implementation)
        weights, assigned, _, sums, _ = route(logits, K, pieces, 1, implementation=router_implementation)
        y = expert_mlp(h, weights, assigned, gate_up, down, implementation=implementation)
        return torch.autograd.grad([y, sums.square().sum()], [x, router, gate_up, down], [d_y, one])

    flop = {"dense, 8192^3": 2 * 8192**3, "dense, own size": 4 * T * K * hidden * D}
    runs: dict[str, Callable[[], object]] = {
        "dense, 8192^3": gemm(8192, 8192, 8192),
        "dense, own size": gemm(T * K, 2 * hidden, D),
    }
    for name, router_name in [*((name, "triton") for name in _names(x)), ("grouped", "torch")]:
        runs[f"{name}: forward + backward"] = partial(layer, name, router_name)
    ms = times_in_turns(runs)
    rates = {name: flop.get(name, 18 * T * K * D * hidden) / ms[name] * 1e3 for name in runs}
    rows = []
    for name, achieved in rates.items():
        shares = achieved / rates["dense, 8192^3"], achieved / rates["dense, own size"]
        _print(name, ms[name], f"{achieved / 1e12:.0f}", "{:.3f} ({:.3f})".format(*shares))
        row = {"op": "experts", "name": name, "tokens": T, "hidden": D, "expert_hidden": hidden, "experts": E}
        rows.append(row | {"both_ms": ms[name]} | dict(zip(SHARES, shares, strict=True)))
    weights = (tensor.detach() for tensor in (x, router, gate_up, down))
    return rows + _expert_parts(*weights, pieces=pieces, K=K, rate=rate, dense=rates["dense, 8192^3"])


def _names(x: Tensor) -> list[str]:
    return ["quack", "triton"] if has_quack(x.device) else ["triton"]


def _expert_parts(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, pieces: Tensor, K: int, rate: float, dense: float
) -> list[dict]:
    """What the layer is made of, in the order it runs."""
    from minimax_train.kernels.experts import triton

    (T, D), E, rows = x.shape, len(down), []

    def part(name: str, run: Callable[[], object], *, moved: int | None = None) -> None:
        ms = times(run, repeats=8)
        row = {"op": "experts", "name": name, "tokens": T, "hidden": D, "ms": ms}
        if moved:
            row |= {"share_of_copy": moved / (ms * 1e-3) / rate}
            _print(name, ms, row["share_of_copy"], "")
        else:
            _print(name, ms, "", "")
        rows.append(row)

    logits, _ = router_logits(x, router)
    weights, assigned, *_ = route(logits, K, pieces, 1)
    permutation = Permutation.by_expert(assigned, E, triton)
    for name in ("triton", "torch"):
        part(f"router projection, {name}", lambda n=name: router_logits(x, router, implementation=n), moved=x.nbytes)
        part(f"route, {name}", lambda n=name: route(logits, K, pieces, 1, implementation=n))
    part("sort by expert", lambda: triton.sort_by_expert(assigned, E))
    part("sort by expert, torch.sort", lambda: pytorch.sort_by_expert(assigned, E))
    part("permute", lambda: permutation.permute(x), moved=(1 + K) * x.nbytes)
    x_RD = permutation.permute(x)
    part("permute, indexing", lambda: x[permutation.assignment_R // K], moved=(1 + K) * x.nbytes)
    part("unpermute", lambda: permutation.unpermute(x_RD), moved=(1 + K) * x.nbytes)
    added = partial(permutation.unpermute, x_RD, None, x, 2.0)
    part("unpermute, residual added", added, moved=(2 + K) * x.nbytes)
    gemms, flop = {}, {}
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in (gate_up, down)]
    for name in _names(x):
        for label, count, run in _gemms(name, x_RD, gate_up, down, sums, permutation, weights):
            gemms[label], flop[label] = run, count * 2 * len(x_RD) * down[0].numel()
    for label, ms in times_in_turns(gemms, turn_ms=100, rounds=3).items():
        _print(label, ms, f"{flop[label] / ms * 1e-9:.0f}", flop[label] / ms * 1e3 / dense)
        rows.append({"op": "experts", "name": label, "tokens": T, "hidden": D, "ms": ms})
    return rows


def _gemms(
    name: str,
    x_RD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    sums: Sequence[Tensor],
    permutation: Permutation,
    weights: Tensor,
) -> list[tuple[str, int, Callable[[], object]]]:
    """The six GEMMs, the first and the third with SwiGLU, gradients of weights as tensors of their own and added to
    ``sums``: label, how many GEMMs of R x D x F, and the call."""
    gemms, _ = choose_implementation(x_RD, down.shape[2], name)
    offsets_E, weights_R = permutation.offsets_E, permutation.permute_weights(weights)
    hidden, act = gemms.up(x_RD, gate_up, offsets_E, weights_R)
    # The gradient of y may be any tensor of its shape.
    d_hidden, _, _ = gemms.d_hidden(x_RD, hidden, down, offsets_E, weights_R)
    return [
        (f"{name}: gate, up and activation", 2, lambda: gemms.up(x_RD, gate_up, offsets_E, weights_R)),
        (f"{name}: down", 1, lambda: gemms.down(act, down, offsets_E)),
        (f"{name}: d gate, d up and activation", 1, lambda: gemms.d_hidden(x_RD, hidden, down, offsets_E, weights_R)),
        (f"{name}: d down", 1, lambda: gemms.d_down(x_RD, act, offsets_E)),
        (f"{name}: d down, added in float32", 1, lambda: gemms.d_down(x_RD, act, offsets_E, sums[1], True)),
        (f"{name}: d gate_up", 2, lambda: gemms.d_gate_up(d_hidden, x_RD, offsets_E)),
        (f"{name}: d gate_up, added in float32", 2, lambda: gemms.d_gate_up(d_hidden, x_RD, offsets_E, sums[0], True)),
        (f"{name}: dx", 2, lambda: gemms.dx(d_hidden, gate_up, offsets_E)),
    ]


def _both_directions(
    op: str,
    label: str,
    runs: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    leaves: list[Tensor],
    moved: tuple[int, ...],
    rate: float,
) -> list[dict]:
    rows = []
    for name, run in runs.items():
        outs = run()
        outs = (outs,) if torch.is_tensor(outs) else outs
        d_outs = [torch.randn(out.shape, device=out.device, dtype=out.dtype) for out in outs]
        forward = times(run, repeats=10)
        backward = times(lambda o=outs, d=d_outs: torch.autograd.grad(o, leaves, d, retain_graph=True), repeats=10)
        shares = [size / (ms * 1e-3) / rate for size, ms in zip(moved, (forward, backward), strict=True)]
        _print(label, name, f"{forward:.3f} ({shares[0]:.2f})", f"{backward:.3f} ({shares[1]:.2f})")
        rows.append(
            {"op": op, "name": f"{label}, {name}", "forward_ms": forward, "backward_ms": backward}
            | {"forward_share_of_copy": shares[0], "backward_share_of_copy": shares[1]}
        )
    return rows


def norm(rate: float) -> list[dict]:
    rows, names = [], ["triton", "torch", *(["apex"] if has_apex("fused_layer_norm_cuda") else [])]
    _header("norm", "implementation", "forward ms (share of the copy rate)", "backward")
    for T, D in NORMS:
        x, second, weight = _randn(T, D), _randn(T, D), torch.ones(D, device="cuda", dtype=torch.bfloat16)
        weight.requires_grad_()
        kinds = {
            "alone": ([x, weight], (2, 3), lambda i, x=x, w=weight: rms_norm(x, w, 1e-5, implementation=i)),
            "residual": (
                [x, second, weight],
                (3, 5),
                lambda i, x=x, f=second, w=weight: add_rms_norm(x, f, w, alpha=3.5566, eps=1e-5, implementation=i),
            ),
            "gate": (
                [x, second, weight],
                (3, 5),
                lambda i, x=x, g=second, w=weight: gated_rms_norm(x, g, w, eps=1e-6, implementation=i),
            ),
        }
        for kind, (leaves, tensors, run) in kinds.items():
            runs = {name: lambda r=run, n=name: r(n) for name in names}
            moved = tuple(count * x.nbytes for count in tensors)
            rows += _both_directions("norm", f"{kind}, {T} x {D}", runs, leaves, moved, rate)
    return rows


def rope(rate: float) -> list[dict]:
    rows = []
    _header("rotary embedding", "implementation", "forward ms (share of the copy rate)", "backward")
    T, K, R = 32_768, 128, 64
    cos, sin = rotary_table(torch.arange(T, device="cuda"), R, 10_000.0)
    for H in (64, 8):
        x = _randn(T, H * K)
        for name in ("triton", "torch"):

            def run(x: Tensor, name: str = name) -> Tensor:
                return rotate_heads(x, cos, sin, head_dim=K, implementation=name)

            projected, held = x * 1, x.detach().clone()
            edge = torch.autograd.graph.get_gradient_edge(projected)
            out = run(projected)
            d_out = torch.randn_like(out)
            forward = times(lambda run=run, held=held: run(held), repeats=10)
            backward = times(lambda o=out, e=edge, d=d_out: torch.autograd.grad(o, e, d, retain_graph=True), repeats=10)
            # In place, half of each head is read and written; the gradient is read and written whole.
            shares = [size / (ms * 1e-3) / rate for size, ms in ((x.nbytes, forward), (2 * x.nbytes, backward))]
            cells = [f"{ms:.3f} ({share:.2f})" for ms, share in zip((forward, backward), shares, strict=True)]
            _print(f"{T} tokens, {H} heads", name, *cells)
            rows.append(
                {"op": "rope", "name": f"{H} heads, {name}", "forward_ms": forward, "backward_ms": backward}
                | {"forward_share_of_copy": shares[0], "backward_share_of_copy": shares[1]}
            )
    return rows


def silu(rate: float) -> list[dict]:
    rows = []
    _header("SiLU of q, k, v", "implementation", "forward ms (share of the copy rate)", "backward")
    for T, H in SILUS:
        x = _randn(T, H * 3 * 128)
        runs = {name: lambda x=x, n=name: silu_qkv(x, head_dim=128, implementation=n) for name in ("triton", "torch")}
        # x has the three tensors of T x H x K; their gradients are three tensors, as attention's backward makes them.
        rows += _both_directions("silu", f"{T} tokens, {H} heads", runs, [x], (2 * x.nbytes, 3 * x.nbytes), rate)
    return rows


def _materialised(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), labels, reduction="sum")


def _liger() -> Callable | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda x, weight, labels: fused(weight, x, labels)


def loss(rate: float) -> list[dict]:
    rows = []
    dense = gemm_rate(8192, 8192, 8192)
    losses = {
        "triton": lambda *args: linear_cross_entropy(*args, implementation="triton")[0],
        "torch, in blocks": lambda *args: linear_cross_entropy(*args, implementation="torch")[0],
        "all logits": _materialised,
    }
    if liger := _liger():
        losses["liger-kernel"] = liger
    _header(f"loss, vocabulary {VOCABULARY}", "tokens x hidden", "forward + backward ms", "of dense GEMM", "extra GiB")
    for T, D, names in ((16_384, 1024, losses), (16_384, 6144, losses), (2**20, 1024, ["triton"])):
        x, weight = _randn(T, D), _randn(VOCABULARY, D, scale=D**-0.5)
        labels = torch.randint(VOCABULARY, (T,), device="cuda")
        for name in names:

            def both(run: Callable = losses[name], x: Tensor = x, weight: Tensor = weight) -> tuple[Tensor, ...]:
                return torch.autograd.grad(run(x, weight, labels), [x, weight])  # noqa: B023

            extra = extra_memory(both) / 2**30
            ms = times(both, repeats=1 if T > 100_000 else 3, warm_up=0)
            share = 6 * T * D * VOCABULARY / (ms * 1e-3) / dense
            _print(name, f"{T} x {D}", ms, share, extra)
            row = {"op": "loss", "name": name, "tokens": T, "hidden": D, "both_ms": ms}
            rows.append(row | {"share_of_dense": share, "extra_gib": extra})
        del x, weight
        torch.cuda.empty_cache()
    return rows


def adamw(rate: float) -> list[dict]:
    """The update and the norm of flat float32 gradients; the floor is the bytes of :mod:`minimax_train.kernels.adamw`.

    Moments are float32 but where a name says otherwise; the copy is one of the weights, in bfloat16.
    """
    rows = []
    _header("AdamW, parameters", "implementation", "ms", "bytes a parameter", "share of the copy rate")
    options: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    for N in PARAMETERS:
        master, grad, exp_avg, exp_avg_sq = (torch.zeros(N, device="cuda") for _ in range(4))
        grad.normal_()
        weight, *halves = (torch.zeros(N, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        (one, step), (frozen, not_finite) = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
        ours = partial(
            adamw_, master, grad, step=one, learning_rate=one * 1e-4, grad_scale=one, frozen=frozen,
            not_finite=not_finite, **options,
        )  # fmt: skip
        peer = partial(
            torch_adamw, [master], [grad], [exp_avg], [exp_avg_sq], [], [step], fused=True, found_inf=frozen,
            amsgrad=False, maximize=False, lr=1e-4, **options,
        )  # fmt: skip
        runs: dict[str, tuple[int, Callable[[], object]]] = {
            "triton": (30, partial(ours, exp_avg, exp_avg_sq, weight)),
            "triton, no copy": (28, partial(ours, exp_avg, exp_avg_sq)),
            "triton, bfloat16 moments": (22, partial(ours, *halves, weight)),
            "torch, fused": (28, peer),
            "torch, fused, then the copy": (30, lambda peer=peer, w=weight, m=master: (peer(), w.copy_(m))),
            "triton, norm": (4, partial(squared_norm, grad)),
            "torch, norm": (4, partial(torch._foreach_norm, [grad])),
        }
        if (fused_adam := find_fused_adam("apex")) is not None:
            parameter = torch.nn.Parameter(master)
            parameter.grad = grad
            runs["apex, fused"] = 28, fused_adam([parameter], lr=1e-4, weight_decay=0.1).step
            del parameter
        for name, (size, run) in runs.items():
            ms = times(run)
            share = size * N / (ms * 1e-3) / rate
            _print(N, name, ms, size, share)
            rows.append({"op": "adamw", "name": name, "parameters": N, "ms": ms, "share_of_copy": share})
        del master, grad, exp_avg, exp_avg_sq, weight, halves, ours, peer, runs, run
        torch.cuda.empty_cache()
    return rows


OPS = {"experts": experts, "norm": norm, "rope": rope, "silu": silu, "loss": loss, "adamw": adamw}
