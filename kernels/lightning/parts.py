"""Lightning attention without autograd, in the pieces between which ranks that share documents exchange states.

The state that leaves a document is ``own + exp(-slope * length) * entering``, and so is its gradient, in the other
direction. Only ``own`` can be told before the other ranks have spoken, and it takes the tokens near one end of the
document only: the others have decayed away.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, M documents with a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minimax_train.documents import Documents

# What has decayed below exp(-REACH) is dropped: less of the state it would join than rounding takes, by its dtype.
REACH = {torch.float32: 17.0, torch.float64: 37.0}


class Parts(Protocol):
    """One implementation of the pieces.

    q, k, v, slopes and documents are as for :func:`minimax_train.kernels.lightning.lightning_attention`. States are
    float32 (float64 for float64 inputs), those of the documents ``of``; nothing enters or leaves the other documents.
    :meth:`states` comes first in both passes, and the others take what it found out beside the states: ``crossing``, of
    k and v for :meth:`forward` and :meth:`backward_q`, of q and the gradient for :meth:`backward_kv`.
    """

    def states(
        self,
        y_THK: Tensor,
        z_THV: Tensor,
        slopes_H: Tensor,
        documents: Documents,
        of: tuple[int | None, ...],
        *,
        reverse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Of each document the sum of ``y_t z_t^T``, decayed to its end: ``[M, H, K, V]``; zero for None. And crossing.

        Of k and v that is what its own tokens leave, the last one as it is. In reverse, of q and the gradient of the
        output, it is what its own tokens add to the gradient of the state that enters it: decayed to the place before
        its first token.
        """

    def forward(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        slopes_H: Tensor,
        documents: Documents,
        entering_MHKV: Tensor,
        of: tuple[int, ...],
        crossing: Tensor | None,
    ) -> Tensor:
        """Output ``[T, H, V]`` given the entering states."""

    def backward_q(
        self,
        grad_THV: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        slopes_H: Tensor,
        documents: Documents,
        entering_MHKV: Tensor,
        of: tuple[int, ...],
        crossing: Tensor | None,
    ) -> Tensor:
        """Gradient of q, from that of the output."""

    def backward_kv(
        self,
        grad_THV: Tensor,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        slopes_H: Tensor,
        documents: Documents,
        grad_leaving_MHKV: Tensor,
        of: tuple[int, ...],
        crossing: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of k and v, from those of the output and of the leaving states."""


class PlainParts:
    """The pieces made of whole differentiable attention, ``run(q, k, v, slopes, documents, initial) -> out, final``."""

    def __init__(self, run: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.run = run

    def states(self, y_THK, z_THV, slopes_H, documents, of, *, reverse):
        (_, H, K), V, dtype = y_THK.shape, z_THV.shape[-1], _state_dtype(y_THK)
        states = []
        for n in of:
            if n is None:
                states.append(y_THK.new_zeros(H, K, V, dtype=dtype))
                continue
            tokens = slice(documents.bounds[n], documents.bounds[n + 1])
            y_LHK, z_LHV = y_THK[tokens], z_THV[tokens]
            away_L = torch.arange(len(y_LHK), device=y_LHK.device)
            away_L = away_L + 1 if reverse else away_L.flip(0)
            decay_LH1 = torch.exp(-slopes_H.to(dtype) * away_L[:, None])[..., None]
            states.append(torch.einsum("lhk,lhv->hkv", y_LHK.to(dtype), z_LHV.to(dtype) * decay_LH1))
        return torch.stack(states), None

    def forward(self, q_THK, k_THK, v_THV, slopes_H, documents, entering_MHKV, of, crossing):
        entering_NHKV = entering_MHKV.new_zeros(len(documents), *entering_MHKV.shape[1:])
        entering_NHKV[list(of)] = entering_MHKV
        return self.run(q_THK, k_THK, v_THV, slopes_H, documents, entering_NHKV)[0]

    def backward_q(self, grad_THV, k_THK, v_THV, slopes_H, documents, entering_MHKV, of, crossing):
        # o = A(q, k, v) and dq = A(do, v, k), the state transposed: minimax_train.kernels.lightning.triton.
        return self.forward(grad_THV, v_THV, k_THK, slopes_H, documents, entering_MHKV.mT, of, crossing)

    def backward_kv(self, grad_THV, q_THK, k_THK, v_THV, slopes_H, documents, grad_leaving_MHKV, of, crossing):
        k_THK, v_THV = (x.detach().requires_grad_() for x in (k_THK, v_THV))
        none_NHKV = grad_leaving_MHKV.new_zeros(len(documents), *grad_leaving_MHKV.shape[1:])
        with torch.enable_grad():
            out_THV, leaving_NHKV = self.run(q_THK, k_THK, v_THV, slopes_H, documents, none_NHKV)
            outputs = [out_THV, leaving_NHKV[list(of)]]
            return torch.autograd.grad(outputs, [k_THK, v_THV], [grad_THV, grad_leaving_MHKV])


def _state_dtype(x_THK: Tensor) -> torch.dtype:
    return torch.promote_types(x_THK.dtype, torch.float32)
