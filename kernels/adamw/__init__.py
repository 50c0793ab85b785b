"""AdamW (arXiv 1711.05101) and the gradient's norm, each one pass over flat tensors.

Bytes through memory for each parameter, with float32 gradients and states: 28 for the update (master, gradient and two
moments are read, all but the gradient written), 2 more for a bfloat16 copy of the weights; 4 for the norm.

Shape legend: N parameters, flat.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.kernels.adamw import pytorch
from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_or_torch

__all__ = ["IMPLEMENTATIONS", "adamw_", "squared_norm"]


@OnDemand
def _triton():
    from minimax_train.kernels.adamw import triton

    return triton


IMPLEMENTATIONS = {"triton": _triton, "torch": pytorch}


def adamw_(
    master_N: Tensor,
    grad_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    weight_N: Tensor | None = None,
    *,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    frozen: Tensor,
    not_finite: Tensor,
    implementation: str = AUTO,
) -> None:
    """One update in place, as ``torch.optim.adamw.adamw`` makes it; no value is read by the host.

    With ``t = step`` and ``g = grad_scale * grad``::

        m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        master_N: p, float32; float64 with ``torch``. Like all tensors of N contiguous, and fastest where each starts
            at a multiple of 16 bytes.
        grad_N: read only, any floating dtype.
        exp_avg_N, exp_avg_sq_N: m and v, float32 or bfloat16: computed in the dtype of p, rounded to nearest when
            stored. In bfloat16 an average stands still when a step changes it by less than 1/512, so ``1 - beta``
            should be well above that.
        weight_N: a copy of the new p in the dtype of compute, rounded to nearest; None to write none.
        step, learning_rate, grad_scale: scalars on the device; step is 1 in the first update.
        frozen: scalar on the device; where it is not 0 nothing is changed.
        not_finite: scalar on the device, not the one of ``frozen``; set to 1 if any new p is not finite, else left
            as it is.
        implementation: ``auto``, ``triton`` (computes in float32) or ``torch``.
    """
    assert not_finite.data_ptr() != frozen.data_ptr(), "would be read while it is written"
    choose("adamw", IMPLEMENTATIONS, implementation, triton_or_torch(master_N)).adamw_(
        master_N,
        grad_N,
        exp_avg_N,
        exp_avg_sq_N,
        weight_N,
        step=step,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        frozen=frozen,
        not_finite=not_finite,
    )


def squared_norm(grad_N: Tensor, *, implementation: str = AUTO) -> Tensor:
    """The sum of squares of a flat tensor of any floating dtype: float64, scalar, the same in every run.

    Args:
        implementation: ``auto``, ``triton`` (sums some thousands of elements in float32, these sums in float64; takes
            no float64) or ``torch``.
    """
    return choose("adamw", IMPLEMENTATIONS, implementation, triton_or_torch(grad_N)).squared_norm(grad_N)
