"""Softmax attention with keys and values arriving from the other ranks, round by round.

Shape legend: T tokens on this rank, S keys of a rectangle, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimax_train.kernels.softmax import attention_backward, attention_forward
from minimax_train.kernels.softmax.merge import merge_
from minimax_train.parallel.communicator import Communicator, Pending
from minimax_train.parallel.context.softmax.plan import RankPlan, Round


class _KeyValues:
    """The keys and values of each round's sources, fetched one round ahead.

    A message holds both side by side along the head dim and arrives as two strided views, which every kernel takes.
    """

    def __init__(self, k_TGK: Tensor, v_TGV: Tensor, rounds: tuple[Round, ...], communicator: Communicator) -> None:
        self.k_TGK, self.v_TGV = k_TGK, v_TGV
        self.rounds, self.communicator = rounds, communicator
        self.next: tuple[Pending, dict[int, Tensor]] | None = None

    def start(self, index: int) -> None:
        """Send for a round and receive for it; does nothing past the last one."""
        if index == len(self.rounds):
            return
        this = self.rounds[index]
        sends = {peer: torch.cat([self.k_TGK[keys], self.v_TGV[keys]], -1) for peer, keys in this.sends.items()}
        receives = {read.source: self.buffer(read.rectangle.num_keys) for read in this.reads}
        self.next = self.communicator.exchange(sends, receives), receives

    def buffer(self, tokens: int) -> Tensor:
        """Room for the keys and values of some tokens, or for their gradients."""
        (_, G, K), V = self.k_TGK.shape, self.v_TGV.shape[-1]
        return self.k_TGK.new_empty(tokens, G, K + V)

    def wait(self) -> dict[int, tuple[Tensor, ...]]:
        """By source: keys ``[S, G, K]`` and values ``[S, G, V]`` of the round started last."""
        pending, receives = self.next
        pending.wait()
        dims = [self.k_TGK.shape[-1], self.v_TGV.shape[-1]]
        return {source: packed.split(dims, -1) for source, packed in receives.items()}


class _Sums:
    """A tensor over this rank's tokens of which some ranges are being added to, in a wider dtype.

    Only these ranges are widened: with short documents they are a small part, and a pass over all tokens would cost a
    good part of the attention itself.
    """

    def __init__(self, x_T: Tensor, ranges: tuple[slice, ...], dtype: torch.dtype) -> None:
        self.x_T = x_T
        self.parts = [(tokens, x_T[tokens].to(dtype)) for tokens in ranges]

    def __getitem__(self, tokens: slice) -> Tensor:
        """The wide view of a token range inside one of the ranges."""
        for outer, part in self.parts:
            if outer.start <= tokens.start and tokens.stop <= outer.stop:
                return part[tokens.start - outer.start : tokens.stop - outer.start]
        raise AssertionError(f"{tokens} lies in none of {[outer for outer, _ in self.parts]}")

    def finish(self) -> Tensor:
        """The tensor, its ranges replaced by their sums in its own dtype."""
        for tokens, part in self.parts:
            if part.dtype != self.x_T.dtype:  # else it is a view of it
                self.x_T[tokens] = part
        return self.x_T


class _RingAttention(Function):
    @staticmethod
    def forward(ctx, q_THK, k_TGK, v_TGV, plan: RankPlan, communicator: Communicator, scale, implementation):
        how = {"scale": scale, "implementation": implementation}
        arriving = _KeyValues(k_TGK, v_TGV, plan.rounds, communicator)
        arriving.start(0)
        out_THV, lse_TH = attention_forward(q_THK, k_TGK, v_TGV, plan.local, plan.local, causal=True, **how)
        out = _Sums(out_THV, plan.queries_merged, lse_TH.dtype)
        for index, this in enumerate(plan.rounds):
            key_values = arriving.wait()
            arriving.start(index + 1)
            for read in this.reads:
                rows = read.rectangle.queries
                part = attention_forward(
                    q_THK[rows], *key_values[read.source], read.queries, read.keys, causal=False, **how
                )
                merge_(out[rows], lse_TH[rows], *part)
        out_THV = out.finish()
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, out_THV, lse_TH)
        ctx.plan, ctx.communicator, ctx.how = plan, communicator, how
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV):
        q_THK, k_TGK, v_TGV, out_THV, lse_TH = ctx.saved_tensors
        plan, communicator, how = ctx.plan, ctx.communicator, ctx.how
        arriving = _KeyValues(k_TGK, v_TGV, plan.rounds, communicator)
        arriving.start(0)
        gradients = attention_backward(
            grad_out_THV, q_THK, k_TGK, v_TGV, out_THV, lse_TH, plan.local, plan.local, causal=True, **how
        )
        ranges = (plan.queries_merged, plan.keys_sent, plan.keys_sent)
        grad_q, grad_k, grad_v = (_Sums(x, r, lse_TH.dtype) for x, r in zip(gradients, ranges, strict=True))

        returning: tuple[Pending, Round, dict[int, Tensor]] | None = None
        for index, this in enumerate(plan.rounds):
            key_values = arriving.wait()
            arriving.start(index + 1)
            homeward = {}
            for read in this.reads:
                rows = read.rectangle.queries
                part_q, part_k, part_v = attention_backward(
                    grad_out_THV[rows],
                    q_THK[rows],
                    *key_values[read.source],
                    out_THV[rows],
                    lse_TH[rows],
                    read.queries,
                    read.keys,
                    causal=False,
                    **how,
                )
                grad_q[rows].add_(part_q)
                homeward[read.source] = torch.cat([part_k, part_v], -1)
            _take_home(returning, grad_k, grad_v)
            receives = {peer: arriving.buffer(keys.stop - keys.start) for peer, keys in this.sends.items()}
            returning = communicator.exchange(homeward, receives), this, receives
        _take_home(returning, grad_k, grad_v)
        return grad_q.finish(), grad_k.finish(), grad_v.finish(), None, None, None, None


def _take_home(returning: tuple[Pending, Round, dict[int, Tensor]] | None, grad_k: _Sums, grad_v: _Sums) -> None:
    """Add the gradients that readers of this rank's keys and values have sent back."""
    if returning is None:
        return
    pending, this, receives = returning
    pending.wait()
    for peer, packed in receives.items():
        keys = this.sends[peer]
        part_k, part_v = packed.split([grad_k.x_T.shape[-1], grad_v.x_T.shape[-1]], -1)
        grad_k[keys].add_(part_k)
        grad_v[keys].add_(part_v)


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
    """Attention over the whole row, by exchanging what the plan says.

    Each round: wait for this round's keys and values, start the next round's transfer, compute, merge; the first
    transfer runs beside the attention among the rank's own tokens. The backward pass fetches keys and values again
    and sends each gradient of theirs home while it computes the next. A gradient is rounded to the dtype of the
    inputs once, by the kernel that made it, and summed in float32 at home.

    All ranks issue their exchanges in one order, that of the rounds, whether or not they take part in one: no two can
    wait for each other.

    Arguments and result as in :func:`minimax_train.parallel.context.softmax.softmax_attention_cp`.
    """
    return _RingAttention.apply(q_THK, k_TGK, v_TGV, plan, communicator, scale, implementation)
