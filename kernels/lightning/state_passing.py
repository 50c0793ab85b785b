"""Lightning attention without autograd, in the phases between which context-parallel ranks exchange states.

As in the state passing of Mamba-2 (arXiv 2405.21060, section 6), a document's final state is a local state, which its
tokens alone determine, plus the initial state decayed over its length:

    final = local + exp(-slope * length) * initial

``local_states`` computes the first term (Mamba-2's ``chunk_state``), the caller exchanges states (``state_passing``),
and ``forward`` computes the output from the initial states (``chunk_scan``). The gradient of a state obeys the same
equation from the end of a document to its start. A local state takes only the tokens near one end of the document: the
others have decayed away.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, M states (of some of the documents).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

# What has decayed below exp(-DECAY_CUTOFF) is dropped, by dtype of the state: less of it than rounding takes.
DECAY_CUTOFF = {torch.float32: 17.0, torch.float64: 37.0}


class StatePassing(ABC):
    """One implementation of the phases.

    q, k, v, slopes and documents are as for :func:`minimax_train.kernels.lightning.lightning_attention`. States are
    float32 (float64 for float64 inputs) and belong to the documents ``state_of``, a tuple of indices; those of all
    other documents are zero. ``split_states`` is what ``local_states`` returned beside its states.
    """

    @abstractmethod
    def local_states(
        self, y_THK, z_THV, slopes_H, documents, state_of, *, reverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of each document the sum of ``y_t z_t^T``, decayed to its last token, ``[M, H, K, V]``.

        Of k and v that is the local part of the final state. In reverse, of q and the gradient of the output, it is
        decayed to the place before the first token: the local part of the gradient of the initial state. An index of
        None asks for a state of zero.

        Returns:
            The states, and the local states at the boundaries of the kernel's own splits, if it has any: ``forward``
            and ``backward_q`` take those of k and v, ``backward_kv`` those of q and the gradient of the output.
        """

    @abstractmethod
    def forward(self, q_THK, k_THK, v_THV, slopes_H, documents, initial_MHKV, state_of, split_states) -> Tensor:
        """Output ``[T, H, V]``, given initial states."""

    def backward_q(self, grad_THV, k_THK, v_THV, slopes_H, documents, initial_MHKV, state_of, split_states) -> Tensor:
        """Gradient of q, from that of the output, given the arguments of the forward pass."""
        # With o = A(q, k, v) and the running state S, dq = A(do, v, k) with the running state S^T.
        split_states = None if split_states is None else split_states.mT
        return self.forward(grad_THV, v_THV, k_THK, slopes_H, documents, initial_MHKV.mT, state_of, split_states)

    @abstractmethod
    def backward_kv(
        self, grad_THV, q_THK, k_THK, v_THV, slopes_H, documents, grad_final_MHKV, state_of, grad_split_states
    ) -> tuple[Tensor, Tensor]:
        """Gradients of k and v, from those of the output and of the final states."""


class TorchStatePassing(StatePassing):
    """Made of whole differentiable attention, ``attend(q, k, v, slopes, documents, initial) -> output, final``."""

    def __init__(self, attend: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.attend = attend

    def local_states(self, y_THK, z_THV, slopes_H, documents, state_of, *, reverse):
        dtype = torch.promote_types(y_THK.dtype, torch.float32)
        states_MHKV = y_THK.new_zeros(len(state_of), *y_THK.shape[1:], z_THV.shape[-1], dtype=dtype)
        for m, n in enumerate(state_of):
            if n is not None:
                y_LHK, z_LHV = (x[documents.bounds[n] : documents.bounds[n + 1]].to(dtype) for x in (y_THK, z_THV))
                away_L = torch.arange(len(y_LHK), device=y_LHK.device)
                away_L = away_L + 1 if reverse else away_L.flip(0)
                decay_LH1 = torch.exp(-slopes_H.to(dtype) * away_L[:, None])[..., None]
                states_MHKV[m] = torch.einsum("lhk,lhv->hkv", y_LHK, z_LHV * decay_LH1)
        return states_MHKV, None

    def forward(self, q_THK, k_THK, v_THV, slopes_H, documents, initial_MHKV, state_of, split_states):
        initial_NHKV = initial_MHKV.new_zeros(len(documents), *initial_MHKV.shape[1:])
        initial_NHKV[list(state_of)] = initial_MHKV
        return self.attend(q_THK, k_THK, v_THV, slopes_H, documents, initial_NHKV)[0]

    def backward_kv(
        self, grad_THV, q_THK, k_THK, v_THV, slopes_H, documents, grad_final_MHKV, state_of, grad_split_states
    ):
        k_THK, v_THV = (x.detach().requires_grad_() for x in (k_THK, v_THV))
        zero_NHKV = grad_final_MHKV.new_zeros(len(documents), *grad_final_MHKV.shape[1:])
        with torch.enable_grad():
            out_THV, final_NHKV = self.attend(q_THK, k_THK, v_THV, slopes_H, documents, zero_NHKV)
            outputs = [out_THV, final_NHKV[list(state_of)]]
            return torch.autograd.grad(outputs, [k_THK, v_THV], [grad_THV, grad_final_MHKV])
