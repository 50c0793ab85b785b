"""The six grouped GEMMs of the experts with SwiGLU among them, and which implementation makes them.

    forward     hidden, act = up(x)                  y = down(act)
    backward    d_hidden, act = d_hidden(dy)         dx, d_gate_up = of d_hidden         d_down = of dy and act

``hidden`` is gate and up of each routed token, kept for backward, in an order that only the implementation knows; the
activation is made again. It is multiplied by the weight of the assignment: so the weight's gradient is ``act . d_act``,
both at hand in ``d_hidden``, and no one needs the experts' output in backward.

Shape legend: R routed tokens sorted by expert, E experts, D hidden, F expert hidden; M, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_takes
from minimax_train.kernels.experts import pytorch


class GroupedGemm(NamedTuple):
    """Both kinds of grouped GEMM. Rows past ``offsets_E[-1]`` are not read; in outputs they are undefined.

    Attributes:
        tokens: ``(a_RM, weight_EMN, offsets_E) -> [R, N]``, the weight possibly a transposed view.
        weights: ``(a_RM, b_RN, offsets_E) -> [E, M, N]``, the sum over each expert's routed tokens of ``a^T b``.
    """

    tokens: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor], Tensor]


def _put(x: Tensor, out: Tensor | None, adds: bool) -> Tensor:
    if out is None:
        return x
    return out.add_(x) if adds else out.copy_(x)


def _tokens_by_expert(a_RM: Tensor, weight_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    out_RN = torch.empty(len(a_RM), weight_EMN.shape[-1], dtype=a_RM.dtype, device=a_RM.device)
    for (start, end), weight_MN in zip(pairwise([0, *offsets_E.tolist()]), weight_EMN.unbind(0), strict=True):
        torch.mm(a_RM[start:end], weight_MN, out=out_RN[start:end])
    return out_RN


def _weights_by_expert(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.stack([a_RM[start:end].T @ b_RN[start:end] for start, end in pairwise([0, *offsets_E.tolist()])])


def _tokens_grouped(a_RM: Tensor, weight_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    return torch._grouped_mm(a_RM, weight_EMN, offs=offsets_E) if len(a_RM) else a_RM @ weight_EMN[0]


def _weights_grouped(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    if not len(a_RM):
        return a_RM.new_zeros(len(offsets_E), a_RM.shape[1], b_RN.shape[1])
    return torch._grouped_mm(a_RM.T, b_RN, offs=offsets_E)


# One GEMM per expert; any device and dtype. A GPU's host waits for the offsets.
BY_EXPERT = GroupedGemm(_tokens_by_expert, _weights_by_expert)
# PyTorch's grouped GEMM: CUDA, bfloat16, rows of a multiple of 16 bytes.
GROUPED = GroupedGemm(_tokens_grouped, _weights_grouped)


class SeparateGemms:
    """Grouped GEMMs, and SwiGLU an op of its own between them. Rows past the last offset are undefined, in and out."""

    def __init__(self, gemm: GroupedGemm, ops: Any) -> None:
        self.gemm, self.ops = gemm, ops

    def up(self, x_RD: Tensor, gate_up_E2FD: Tensor, offsets_E: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up ``[R, 2F]``, and the activation times the weights ``[R, F]``."""
        hidden_R2F = self.gemm.tokens(x_RD, gate_up_E2FD.mT, offsets_E)
        return hidden_R2F, self.ops.swiglu(hidden_R2F, weights_R, offsets_E)

    def down(self, act_RF: Tensor, down_EDF: Tensor, offsets_E: Tensor) -> Tensor:
        return self.gemm.tokens(act_RF, down_EDF.mT, offsets_E)

    def d_hidden(
        self,
        dy_RD: Tensor,
        hidden_R2F: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        weights_R: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of gate and up, the activation times the weights again, and the gradient of the weights.

        Args:
            out: where to write the first two.
        """
        d_act_RF = self.gemm.tokens(dy_RD, down_EDF, offsets_E)
        # The activation may take the memory of its gradient.
        d_hidden_R2F, act_RF = out or (torch.empty_like(hidden_R2F), d_act_RF)
        d_weights_R = self.ops.swiglu_backward(hidden_R2F, weights_R, d_act_RF, act_RF, d_hidden_R2F, offsets_E)
        return d_hidden_R2F, act_RF, d_weights_R

    def dx(self, d_hidden_R2F: Tensor, gate_up_E2FD: Tensor, offsets_E: Tensor) -> Tensor:
        return self.gemm.tokens(d_hidden_R2F, gate_up_E2FD, offsets_E)

    def d_gate_up(
        self, d_hidden_R2F: Tensor, x_RD: Tensor, offsets_E: Tensor, out: Tensor | None = None, adds: bool = False
    ) -> Tensor:
        """``[E, 2F, D]``, gate over up; zero for an expert without tokens.

        Args:
            out: where to write it, contiguous, of any floating dtype.
            adds: rather add it to what is there.
        """
        return _put(self.gemm.weights(d_hidden_R2F, x_RD, offsets_E), out, adds)

    def d_down(
        self, dy_RD: Tensor, act_RF: Tensor, offsets_E: Tensor, out: Tensor | None = None, adds: bool = False
    ) -> Tensor:
        """``[E, D, F]``; zero for an expert without tokens. Arguments as of :meth:`d_gate_up`."""
        return _put(self.gemm.weights(dy_RD, act_RF, offsets_E), out, adds)


@OnDemand
def triton_ops():
    from minimax_train.kernels.experts import triton

    return triton


def _quack(x: Tensor) -> SeparateGemms:
    try:
        from minimax_train.kernels.experts.quack import QuackGemms
    except ImportError as error:
        raise ImportError(f"kernels.experts='quack' needs quack-kernels: pip install .[cuda] ({error})") from error
    return QuackGemms(x)


# By name, for tokens like x: the GEMMs, and the module with what lies between them.
IMPLEMENTATIONS: dict[str, Callable[[Tensor], tuple[SeparateGemms, Any]]] = {
    "quack": lambda x: (_quack(x), triton_ops),
    "triton": lambda x: (SeparateGemms(GROUPED if _is_cuda_bf16(x) else BY_EXPERT, triton_ops), triton_ops),
    "grouped": lambda x: (SeparateGemms(GROUPED, pytorch), pytorch),
    "torch": lambda x: (SeparateGemms(BY_EXPERT, pytorch), pytorch),
}


def _is_cuda_bf16(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def choose_implementation(x: Tensor, expert_hidden: int, implementation: str = AUTO) -> tuple[SeparateGemms, Any]:
    """GEMMs, and the module ``pytorch`` or ``triton``, for tokens like x ``[..., D]`` and experts of that hidden size.

    Args:
        implementation: ``auto``, the fastest that takes this device, dtype and shape; ``quack`` (SwiGLU in the GEMMs'
            epilogues; bfloat16 on Hopper, D and F multiples of 8, extra ``cuda``); ``triton`` (SwiGLU a kernel between
            the GEMMs; not float64); ``grouped`` (PyTorch ops; CUDA, bfloat16) or ``torch`` (one GEMM per expert).

    Raises:
        ImportError: when quack-kernels is asked for and not installed.
    """
    best = "torch"
    if _is_cuda_bf16(x) and x.shape[-1] % 8 == 0 and expert_hidden % 8 == 0:  # rows on 16 bytes, in both GEMMs
        best = "quack" if has_quack(x.device) else "triton"
    gemms, ops = choose("experts", IMPLEMENTATIONS, implementation, best)(x)
    return gemms, triton_ops if implementation == AUTO and triton_takes(x) else ops


@cache
def has_quack(device: torch.device) -> bool:
    """Whether quack-kernels is installed, and the GPU of the kind it was measured on."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import minimax_train.kernels.experts.quack  # noqa: F401
    except ImportError:
        return False
    return True
