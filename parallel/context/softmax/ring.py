"""Softmax attention with keys and values arriving from the other ranks, round by round.

Shape legend: T tokens on this rank, S keys of a rectangle, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimax_train.kernels.softmax import attention_backward, attention_forward
from minimax_train.kernels.softmax.merge import merge_
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.context.softmax.plan import RankPlan, Round


class _RingAttention(Function):
    @staticmethod
    def forward(ctx, q_THK, k_TGK, v_TGV, plan: RankPlan, communicator: Communicator, scale, implementation):
        how = {"scale": scale, "implementation": implementation}
        wait_for_keys = _send_keys(0, plan, k_TGK, v_TGV, communicator)
        out_THV, lse_TH = attention_forward(q_THK, k_TGK, v_TGV, plan.local, plan.local, causal=True, **how)
        out = _WideRanges(out_THV, plan.queries_merged, lse_TH.dtype)
        for index, this in enumerate(plan.rounds):
            key_values = wait_for_keys()
            wait_for_keys = _send_keys(index + 1, plan, k_TGK, v_TGV, communicator)
            for read in this.reads:
                queries = read.rectangle.queries
                part = attention_forward(
                    q_THK[queries], *key_values[read.source], queries=read.queries, keys=read.keys, causal=False, **how
                )
                merge_(out[queries], lse_TH[queries], *part)
        out_THV = out.finish()
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, out_THV, lse_TH)
        ctx.plan, ctx.communicator, ctx.how = plan, communicator, how
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV):
        q_THK, k_TGK, v_TGV, out_THV, lse_TH = ctx.saved_tensors
        plan, communicator, how = ctx.plan, ctx.communicator, ctx.how
        wait_for_keys = _send_keys(0, plan, k_TGK, v_TGV, communicator)
        gradients = attention_backward(
            grad_out_THV, q_THK, k_TGK, v_TGV, out_THV, lse_TH, plan.local, plan.local, causal=True, **how
        )
        ranges = (plan.queries_merged, plan.keys_sent, plan.keys_sent)
        grad_q, grad_k, grad_v = (_WideRanges(x, r, lse_TH.dtype) for x, r in zip(gradients, ranges, strict=True))
        add_gradients = None
        for index, this in enumerate(plan.rounds):
            key_values = wait_for_keys()
            wait_for_keys = _send_keys(index + 1, plan, k_TGK, v_TGV, communicator)
            sends = {}
            for read in this.reads:
                queries = read.rectangle.queries
                part_q, *part_kv = attention_backward(
                    grad_out_THV[queries],
                    q_THK[queries],
                    *key_values[read.source],
                    out_QHV=out_THV[queries],
                    lse_QH=lse_TH[queries],
                    queries=read.queries,
                    keys=read.keys,
                    causal=False,
                    **how,
                )
                grad_q[queries].add_(part_q)
                sends[read.source] = torch.cat(part_kv, -1)
            if add_gradients:
                add_gradients()
            add_gradients = _send_gradients(sends, this, grad_k, grad_v, communicator)
        if add_gradients:
            add_gradients()
        return *(x.finish() for x in (grad_q, grad_k, grad_v)), None, None, None, None


def _send_keys(
    index: int, plan: RankPlan, k_TGK: Tensor, v_TGV: Tensor, communicator: Communicator
) -> Callable[[], dict[int, tuple[Tensor, ...]]]:
    """Start a round's transfer of keys and values: send what others read, receive what this rank reads.

    A message holds both side by side along the head dim and arrives as two strided views, which every kernel takes.

    Returns:
        What waits for the transfer and returns, by source, keys ``[S, G, K]`` and values ``[S, G, V]``. Past the last
        round nothing is started.
    """
    if index == len(plan.rounds):
        return dict
    this = plan.rounds[index]
    sends = {reader: torch.cat([k_TGK[keys], v_TGV[keys]], -1) for reader, keys in this.sends.items()}
    receives = {read.source: _packed_like(k_TGK, v_TGV, read.rectangle.num_keys) for read in this.reads}
    pending = communicator.exchange(sends, receives)

    def wait() -> dict[int, tuple[Tensor, ...]]:
        pending.wait()
        return {source: packed.split([k_TGK.shape[-1], v_TGV.shape[-1]], -1) for source, packed in receives.items()}

    return wait


def _send_gradients(
    sends: Mapping[int, Tensor], this: Round, grad_k: _WideRanges, grad_v: _WideRanges, communicator: Communicator
) -> Callable[[], None]:
    """Start sending the gradients of a round's keys and values back to their ranks.

    Returns:
        What waits for those of this rank's keys and values, from their readers, and adds them.
    """
    k_TGK, v_TGV = grad_k.x_T, grad_v.x_T
    receives = {reader: _packed_like(k_TGK, v_TGV, keys.stop - keys.start) for reader, keys in this.sends.items()}
    pending = communicator.exchange(sends, receives)

    def add() -> None:
        pending.wait()
        for reader, packed in receives.items():
            part_k, part_v = packed.split([k_TGK.shape[-1], v_TGV.shape[-1]], -1)
            grad_k[this.sends[reader]].add_(part_k)
            grad_v[this.sends[reader]].add_(part_v)

    return add


def _packed_like(k_TGK: Tensor, v_TGV: Tensor, tokens: int) -> Tensor:
    """Room for keys and values of some tokens, or for their gradients, side by side."""
    return k_TGK.new_empty(tokens, k_TGK.shape[1], k_TGK.shape[-1] + v_TGV.shape[-1])


class _WideRanges:
    """A tensor over this rank's tokens of which some ranges are being added to, in a wider dtype.

    Only these ranges are widened: with short documents they are a small part, and a pass over all tokens would cost a
    good part of the attention itself.
    """

    def __init__(self, x_T: Tensor, ranges: tuple[slice, ...], dtype: torch.dtype) -> None:
        self.x_T = x_T
        self.wide = [(tokens, x_T[tokens].to(dtype)) for tokens in ranges]

    def __getitem__(self, tokens: slice) -> Tensor:
        """The wide view of a token range inside one of the ranges."""
        for outer, x in self.wide:
            if outer.start <= tokens.start and tokens.stop <= outer.stop:
                return x[tokens.start - outer.start : tokens.stop - outer.start]
        raise AssertionError(f"{tokens} lies in none of {[outer for outer, _ in self.wide]}")

    def finish(self) -> Tensor:
        """The tensor, its ranges replaced by their sums in its own dtype."""
        for tokens, x in self.wide:
            if x.dtype != self.x_T.dtype:  # else it is a view of it
                self.x_T[tokens] = x
        return self.x_T


def ring_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    plan: RankPlan,
    communicator: Communicator,
    *,
    scale: float,
    implementation: str,
) -> Tensor:
    """Attention over the packed sequence, by sending what the plan says.

    Each round: wait for its keys and values, start the next round's transfer, compute, merge. The first transfer runs
    beside the attention among the rank's own tokens. The backward pass fetches keys and values again; the gradients
    that a rank computes for another's keys and values are sent back to it while the next round is computed. The kernel
    rounds them to the dtype of the inputs, their rank sums them in float32.

    All ranks start their transfers in the same order (the keys and values of a round, then the gradients of the round
    before it), so no two can wait for each other.

    Arguments and result as in :func:`minimax_train.parallel.context.softmax.softmax_attention_cp`.
    """
    return _RingAttention.apply(q_THK, k_TGK, v_TGV, plan, communicator, scale, implementation)
