"""Softmax attention over a packed sequence that several ranks share.

Shape legend: T tokens on this rank, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from minimax_train.kernels.dispatch import AUTO
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.context.layout import SequenceShard
from minimax_train.parallel.context.softmax.allgather import allgather_attention, gather_plan
from minimax_train.parallel.context.softmax.cost import Sizes, choose_method
from minimax_train.parallel.context.softmax.plan import rank_plan
from minimax_train.parallel.context.softmax.ring import ring_attention

METHODS = ("ring", "allgather")


def softmax_attention_cp(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    shard: SequenceShard,
    communicator: Communicator,
    *,
    scale: float,
    method: str = AUTO,
    implementation: str = AUTO,
) -> Tensor:
    """Causal attention within each document of the packed sequence, for the tokens of this rank.

    Equals :func:`minimax_train.kernels.softmax.softmax_attention` on the whole sequence, output and gradients. Every
    rank of the communicator must call it, with the same methods in the same order.

    Args:
        q_THK, k_TGK, v_TGV: this rank's tokens, any floating dtype, rotary positions already applied.
        shard: which tokens these are.
        communicator: the ranks that share the sequence, in the order of the layout.
        scale: factor of the scores, usually ``K ** -0.5``.
        method: ``ring``, ``allgather``, or ``auto`` for whichever :func:`.cost.choose_method` estimates to be faster.
        implementation: of the kernel, as in :func:`minimax_train.kernels.softmax.attention_forward`.

    Returns:
        The output ``[T, H, V]`` in the dtype of q, differentiable.

    Raises:
        ValueError: for an unknown method or implementation, or shapes that do not agree.
    """
    if shard.rank != communicator.rank or shard.layout.num_ranks != communicator.size:
        raise ValueError(
            f"softmax_attention_cp: the shard is of rank {shard.rank} of {shard.layout.num_ranks}, "
            f"the communicator of rank {communicator.rank} of {communicator.size}"
        )
    if method == AUTO:
        (_, H, K), (_, G, V) = q_THK.shape, v_TGV.shape
        method = choose_method(shard, Sizes(H, G, K, V, q_THK.element_size()))
    if method == "ring":
        attend = partial(ring_attention, plan=rank_plan(shard))
    elif method == "allgather":
        attend = partial(allgather_attention, plan=gather_plan(shard))
    else:
        raise ValueError(f"parallel.softmax_cp={method!r}: must be one of {', '.join([AUTO, *METHODS])}")
    return attend(q_THK, k_TGK, v_TGV, communicator=communicator, scale=scale, implementation=implementation)
