"""Lightning attention: linear attention with a fixed per-head decay, over packed documents.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minimax_train.documents import Documents
from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_takes
from minimax_train.kernels.lightning.chunked import lightning_attention_chunked
from minimax_train.kernels.lightning.naive import lightning_attention_naive
from minimax_train.kernels.lightning.state_passing import StatePassing, TorchStatePassing


def _explicit_states(run: Callable) -> Callable:
    """Implementations that always take and return states, under the signature where both are optional."""

    def with_states(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV, final_state_of):
        if initial_state_NHKV is None:
            dtype = torch.promote_types(q_THK.dtype, torch.float32)
            initial_state_NHKV = q_THK.new_zeros(len(documents), *q_THK.shape[1:], v_THV.shape[-1], dtype=dtype)
        out_THV, final_NHKV = run(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV)
        return out_THV, None if final_state_of is None else final_NHKV[list(final_state_of)]

    return with_states


@OnDemand
def _triton():
    from minimax_train.kernels.lightning import triton

    return triton


IMPLEMENTATIONS = {
    "naive": _explicit_states(lightning_attention_naive),
    "chunked": _explicit_states(lightning_attention_chunked),
    "triton": lambda *args: _triton.lightning_attention_triton(*args),
}
STATE_PASSING: dict[str, Callable[[], StatePassing]] = {
    "naive": lambda: TorchStatePassing(lightning_attention_naive),
    "chunked": lambda: TorchStatePassing(lightning_attention_chunked),
    "triton": lambda: _triton.TritonStatePassing(),
}


def lightning_slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Decay exponents of one layer's heads, float32 ``[H]`` on the CPU, head 0 decaying fastest.

    ``2^(-8 (h + 1) / H) * (1 - l / (N - 1 + 1e-5) + 1e-5)``, the ALiBi slopes damped with depth, evaluated in the
    same order and precision as transformers' ``MiniMaxLightningAttention.get_slope_rate``.
    """
    base = 1 / (2 ** (8 / num_heads))
    damping = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    return base ** (torch.arange(num_heads) + 1) * damping


def _best(q_THK: Tensor) -> str:
    return "triton" if triton_takes(q_THK) else "chunked"


def lightning_state_passing(q_THK: Tensor, implementation: str = AUTO) -> StatePassing:
    """The phases of lightning attention for tensors like q, in one of the implementations.

    Raises:
        ValueError: for an unknown implementation.
    """
    return choose("lightning", STATE_PASSING, implementation, best=_best(q_THK))()


def lightning_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    documents: Documents,
    *,
    initial_state_NHKV: Tensor | None = None,
    final_state_of: Sequence[int] | None = None,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """``o_t = sum over s <= t in the same document of exp(-slope (t - s)) (q_t . k_s) v_s``, unscaled.

    Args:
        q_THK, k_THK, v_THV: any floating dtype; K and V may differ.
        slopes_H: non-negative decay exponents, float32 or float64; not differentiated.
        documents: the packed documents; no state passes from one to the next.
        initial_state_NHKV: state each document starts from, float32 (float64 for float64 inputs); zero if None.
        final_state_of: the documents whose final states are wanted, each once; none if None. A state is 64 KB per
            head at K = V = 128.
        implementation: ``auto``, ``triton`` (not float64), ``chunked`` or ``naive``.

    Returns:
        The output ``[T, H, V]`` in the dtype of v, and the final states asked for, in that order, ``[N', H, K, V]`` in
        float32 (float64 for float64 inputs), or None. Both, and the initial state, are differentiable.

    Raises:
        ValueError: for an unknown implementation, or shapes that do not agree.
    """
    T, H, K = q_THK.shape
    if k_THK.shape != (T, H, K) or v_THV.shape[:2] != (T, H) or slopes_H.shape != (H,) or documents.num_tokens != T:
        raise ValueError(
            f"lightning_attention: shapes disagree: q {tuple(q_THK.shape)}, k {tuple(k_THK.shape)}, "
            f"v {tuple(v_THV.shape)}, slopes {tuple(slopes_H.shape)}, documents of {documents.num_tokens} tokens"
        )
    run = choose("lightning", IMPLEMENTATIONS, implementation, best=_best(q_THK))
    wanted = None if final_state_of is None else tuple(final_state_of)
    return run(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV, wanted)
