"""Lightning attention as the recurrence that defines it: the reference for every other implementation.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minimax_train.documents import Documents


def lightning_attention_naive(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, slopes_H: Tensor, documents: Documents, initial_state_NHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-slope) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``, token by token (MiniMax-01, section 2.2).

    Computes in the dtype of its inputs; autograd gives the gradients. Arguments and results as in
    :func:`minimax_train.kernels.lightning.lightning_attention`.
    """
    decay_H11 = torch.exp(-slopes_H.to(torch.promote_types(q_THK.dtype, slopes_H.dtype)))[:, None, None]
    outputs, final_states = [], []
    for n, (start, end) in enumerate(pairwise(documents.bounds)):
        state_HKV = initial_state_NHKV[n]
        for t in range(start, end):
            state_HKV = decay_H11 * state_HKV + k_THK[t, :, :, None] * v_THV[t, :, None, :]
            outputs.append((state_HKV * q_THK[t, :, :, None]).sum(1))
        final_states.append(state_HKV)
    return torch.stack(outputs), torch.stack(final_states)
