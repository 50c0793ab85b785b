"""The router, and what an expert layer does between its GEMMs, as PyTorch ops: any device and dtype.

``triton.py`` has the same functions. Sorting and moving are gathers and scatters without duplicates, so results are
deterministic.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K assignments per token, R = T * K routed tokens, P spans
of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype)), x_TD


def route(logits_TE: Tensor, k: int, span_T: Tensor, num_spans: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Beside the results it holds ``[P, T]``, by which spans are summed in the same order in every run."""
    probabilities_TE, E = logits_TE.softmax(-1), logits_TE.shape[1]
    weights_TK, experts_TK = probabilities_TE.topk(k, dim=-1)
    slot_TK = span_T[:, None] * E + experts_TK
    counts = torch.zeros(num_spans * E, dtype=torch.int64, device=logits_TE.device)
    counts.scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK).flatten())
    in_span_PT = (span_T == torch.arange(num_spans, device=span_T.device)[:, None]).to(probabilities_TE.dtype)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    entropy = torch.special.entr(probabilities_TE.detach()).sum()
    return weights_TK, experts_TK, counts.view(num_spans, E), in_span_PT @ probabilities_TE, entropy


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``assignment_R``, ``routed_TK`` and ``offsets_E`` of a permutation; -1 is sorted last."""
    sorted_R, assignment_R = (experts_TK.flatten() % (num_experts + 1)).sort(stable=True)
    places_R = torch.arange(len(assignment_R), device=assignment_R.device)
    routed_TK = torch.empty_like(assignment_R).scatter_(0, assignment_R, places_R).view_as(experts_TK)
    experts_E = torch.arange(num_experts, device=assignment_R.device)
    return assignment_R, routed_TK, torch.searchsorted(sorted_R, experts_E, right=True).int()


def permute(x_TD: Tensor, assignment_R: Tensor, routed_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """``[T, D] -> [R, D]``."""
    return x_TD[assignment_R // routed_TK.shape[1]].where(_is_routed_R1(assignment_R, offsets_E), 0)


def unpermute(
    y_RD: Tensor, weights_R: Tensor | None, routed_TK: Tensor, offsets_E: Tensor, x_TD: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """``[R, D] -> [T, D]``, to which ``scale * x`` is added; and ``[R] -> [T, K]``."""
    y_TD = y_RD.where(_is_routed_R1(y_RD, offsets_E), 0)[routed_TK].sum(1)
    y_TD = y_TD if x_TD is None else y_TD.add_(x_TD, alpha=scale)
    return y_TD, None if weights_R is None else weights_R[routed_TK].where(routed_TK < offsets_E[-1], 0)


def _is_routed_R1(like: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)[:, None] < offsets_E[-1]


def swiglu(hidden_R2F: Tensor, weights_R: Tensor, offsets_E: Tensor) -> Tensor:
    """``weight * silu(gate) * up``."""
    gate_RF, up_RF = _wide(hidden_R2F).chunk(2, dim=-1)
    return (F.silu(gate_RF) * up_RF * weights_R[:, None]).to(hidden_R2F.dtype)


def swiglu_backward(
    hidden_R2F: Tensor, weights_R: Tensor, d_act_RF: Tensor, act_RF: Tensor, d_hidden_R2F: Tensor, offsets_E: Tensor
) -> Tensor:
    """The gradient of the weights. Writes the activation, which may take the memory of its gradient, and d_hidden."""
    gate_RF, up_RF = _wide(hidden_R2F).chunk(2, dim=-1)
    d_act_RF, sigmoid_RF = _wide(d_act_RF), gate_RF.sigmoid()
    silu_RF, weights_R1 = gate_RF * sigmoid_RF, weights_R[:, None]
    d_weights_R = (silu_RF * up_RF * d_act_RF).sum(1).to(weights_R.dtype)
    d_act_RF = d_act_RF * weights_R1
    d_gate_RF, d_up_RF = d_hidden_R2F.chunk(2, dim=-1)
    d_gate_RF.copy_(d_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)))
    d_up_RF.copy_(d_act_RF * silu_RF)
    act_RF.copy_(silu_RF * up_RF * weights_R1)
    return d_weights_R


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x
