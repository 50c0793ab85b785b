"""The six matrix products of the experts with SwiGLU among them, and which way of making them is taken.

    forward     hidden, act = up(x)                  y = down(act)
    backward    d_hidden, act = d_hidden(dy)         dx, d_gate_up = of d_hidden         d_down = of dy and act

``hidden`` is gate and up of each row, kept for backward, in an order that only the products know; the activation is
made again. Where choices have weights they multiply the activation.

Shape legend: T tokens, K choices per token, R rows sorted by expert, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, triton_takes
from minimax_train.kernels.experts.grouped import LOOP, GroupedGemm, choose_gemm


class SeparateProducts:
    """Grouped products, and SwiGLU an op of its own between them.

    Rows past the last offset are undefined, in and out. Weights are the choices' ``[T, K]``, found by ``choice_R``.

    Args:
        gemm: the products.
        swiglu: where ``swiglu_into`` and ``swiglu_backward_into`` are.
    """

    def __init__(self, gemm: GroupedGemm, swiglu) -> None:
        self.gemm, self.swiglu = gemm, swiglu

    def up(
        self,
        x_RD: Tensor,
        gate_up_E2FD: Tensor,
        offsets_E: Tensor,
        weights_TK: Tensor | None = None,
        choice_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gate and up ``[R, 2F]``, and the activation times the weights ``[R, F]``."""
        hidden_R2F = self.gemm.rows(x_RD, gate_up_E2FD.mT, offsets_E)
        act_RF = x_RD.new_empty(len(x_RD), hidden_R2F.shape[1] // 2)
        self.swiglu.swiglu_into(hidden_R2F, act_RF, offsets_E, weights_TK, choice_R)
        return hidden_R2F, act_RF

    def down(self, act_RF: Tensor, down_EDF: Tensor, offsets_E: Tensor) -> Tensor:
        return self.gemm.rows(act_RF, down_EDF.mT, offsets_E)

    def d_hidden(
        self,
        dy_RD: Tensor,
        hidden_R2F: Tensor,
        down_EDF: Tensor,
        offsets_E: Tensor,
        weights_TK: Tensor | None = None,
        choice_R: Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of gate and up, the activation times the weights again, and the gradient of the weights.

        Args:
            out: where to write the first two.
        """
        d_act_RF = self.gemm.rows(dy_RD, down_EDF, offsets_E)
        # The activation may take the memory of its gradient.
        d_hidden_R2F, act_RF = out or (torch.empty_like(hidden_R2F), d_act_RF)
        # Choices of no expert have no row that would write theirs.
        d_weights_TK = None if weights_TK is None else torch.zeros_like(weights_TK)
        self.swiglu.swiglu_backward_into(
            hidden_R2F, d_act_RF, act_RF, d_hidden_R2F, offsets_E, weights_TK, choice_R, d_weights_TK
        )
        return d_hidden_R2F, act_RF, d_weights_TK

    def dx(self, d_hidden_R2F: Tensor, gate_up_E2FD: Tensor, offsets_E: Tensor) -> Tensor:
        return self.gemm.rows(d_hidden_R2F, gate_up_E2FD, offsets_E)

    def d_gate_up(self, d_hidden_R2F: Tensor, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """``[E, 2F, D]``, gate over up; zero for an expert without rows."""
        return self.gemm.weights(d_hidden_R2F, x_RD, offsets_E)

    def d_down(self, dy_RD: Tensor, act_RF: Tensor, offsets_E: Tensor) -> Tensor:
        """``[E, D, F]``; zero for an expert without rows."""
        return self.gemm.weights(dy_RD, act_RF, offsets_E)


class PlainSwiGLU:
    """SwiGLU as PyTorch ops, on any device."""

    @staticmethod
    def swiglu_into(hidden_R2F: Tensor, act_RF: Tensor, offsets_E: Tensor, weights=None, choice_R=None) -> None:
        gate_RF, up_RF = _wide(hidden_R2F).chunk(2, dim=-1)
        act_RF.copy_(F.silu(gate_RF) * up_RF * _weight_of_row(weights, choice_R))

    @staticmethod
    def swiglu_backward_into(
        hidden_R2F: Tensor,
        d_act_RF: Tensor,
        act_RF: Tensor,
        d_hidden_R2F: Tensor,
        offsets_E: Tensor,
        weights=None,
        choice_R=None,
        d_weights=None,
    ) -> None:
        gate_RF, up_RF = _wide(hidden_R2F).chunk(2, dim=-1)
        d_act_RF, sigmoid_RF = _wide(d_act_RF), gate_RF.sigmoid()
        silu_RF, weight = gate_RF * sigmoid_RF, _weight_of_row(weights, choice_R)
        if d_weights is not None:
            used_R = torch.arange(len(choice_R), device=choice_R.device) < offsets_E[-1]
            d_weight_R = (silu_RF * up_RF * d_act_RF).sum(1).where(used_R, 0)
            d_weights.view(-1).scatter_(0, choice_R, d_weight_R.to(d_weights.dtype))
        d_act_RF = d_act_RF * weight
        d_gate_RF, d_up_RF = d_hidden_R2F.chunk(2, dim=-1)
        d_gate_RF.copy_(d_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)))
        d_up_RF.copy_(d_act_RF * silu_RF)
        act_RF.copy_(silu_RF * up_RF * weight)


def _weight_of_row(weights_TK: Tensor | None, choice_R: Tensor | None) -> Tensor | float:
    return 1.0 if weights_TK is None else weights_TK.flatten()[choice_R, None]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x


def best_implementation(x: Tensor, expert_hidden: int) -> str:
    """What ``auto`` means: the fastest of those that take this device, dtype and shape."""
    aligned = x.shape[-1] % 8 == 0 and expert_hidden % 8 == 0  # rows on 16 bytes, in both products
    if not (x.is_cuda and x.dtype == torch.bfloat16 and aligned):
        return "loop"
    if not triton_takes(x):
        return "grouped"
    return "quack" if has_quack(x.device) else "triton"


@cache
def has_quack(device: torch.device) -> bool:
    """Whether quack-kernels is installed, and the GPU of the kind it was measured on."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        import minimax_train.kernels.experts.fused  # noqa: F401
    except ImportError:
        return False
    return True


def expert_products(x: Tensor, expert_hidden: int, implementation: str = AUTO) -> SeparateProducts:
    """The products for rows like x ``[..., D]`` and experts of that hidden size, by implementation.

    Raises:
        ImportError: when quack-kernels is asked for and not installed.
    """
    name = best_implementation(x, expert_hidden) if implementation == AUTO else implementation
    if name == "quack":
        try:
            from minimax_train.kernels.experts.fused import FusedProducts
        except ImportError as error:
            raise ImportError(f"kernels.experts='quack' needs quack-kernels: pip install .[cuda] ({error})") from error
        return FusedProducts(x)
    if name == "triton":
        # CPU installs have no triton: imported only when asked for.
        from minimax_train.kernels.experts import triton

        return SeparateProducts(choose_gemm(x), triton)
    return SeparateProducts(LOOP if name == "loop" else choose_gemm(x), PlainSwiGLU)
