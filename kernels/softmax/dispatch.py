"""Softmax attention without autograd, by any implementation: the differentiable op and the ring both call it.

Shape legend: Q queries, S keys, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from minimax_train.documents import Documents
from minimax_train.kernels.dispatch import AUTO, choose
from minimax_train.kernels.softmax import blocked, flash, flash4, naive

IMPLEMENTATIONS = {"naive": naive, "blocked": blocked, "flash": flash, "flash4": flash4}


def choose_implementation(q_QHK: Tensor, v_SGV: Tensor, requested: str = AUTO) -> ModuleType:
    """The module that attends to these tensors: the one asked for, or the fastest one that takes them.

    On one H200, head dim 128, FlashAttention-4 reaches 650 TFLOP/s, PyTorch's FlashAttention-2 340
    (``docs/results.md``). Looks at shapes, dtypes and the device's kind only: never waits for the device.

    Raises:
        ValueError: for an unknown implementation.
    """
    best = "blocked"
    half = q_QHK.dtype in (torch.float16, torch.bfloat16)
    same_dims = q_QHK.shape[-1] == v_SGV.shape[-1] <= 256 and q_QHK.shape[-1] % 8 == 0
    if q_QHK.is_cuda and half and same_dims:
        # FlashAttention-4 adds up its gradients of q in no fixed order; PyTorch's has a mode in which it does not.
        any_order = not torch.are_deterministic_algorithms_enabled()
        best = "flash4" if any_order and flash4.is_installed() and _is_hopper(q_QHK.device) else "flash"
    return choose("softmax", IMPLEMENTATIONS, requested, best)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def check_shapes(q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, queries: Documents, keys: Documents) -> None:
    """Refuse tensors that do not belong together.

    Raises:
        ValueError: naming all shapes.
    """
    (Q, H, K), (S, G, _) = q_QHK.shape, k_SGK.shape
    wrong_tensors = k_SGK.shape != (S, G, K) or v_SGV.shape[:2] != (S, G) or H % G
    if wrong_tensors or queries.num_tokens != Q or keys.num_tokens != S or len(queries) != len(keys):
        raise ValueError(
            f"softmax attention: shapes disagree: q {tuple(q_QHK.shape)}, k {tuple(k_SGK.shape)}, "
            f"v {tuple(v_SGV.shape)}, {len(queries)} documents of {queries.num_tokens} tokens for queries, "
            f"{len(keys)} documents of {keys.num_tokens} tokens for keys; "
            "query heads must be a multiple of key-value heads"
        )


def attention_forward(
    q_QHK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    queries: Documents,
    keys: Documents,
    *,
    causal: bool,
    scale: float,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Queries of document n attend to the keys of document n: to all of them, or causally.

    Causal means aligned at the end: the last query of a document sees all its keys, the one before it all but the last,
    and so on. There may be more keys of a document than queries; where causal, never fewer.

    Args:
        q_QHK, k_SGK, v_SGV: any floating dtype; query head h reads key-value head ``h // (H // G)``. Keys and values
            may be strided views, contiguous in their last dim.
        queries, keys: where documents, or the parts of them that are here, lie on the query axis and on the key axis.
        scale: factor of the scores.
        implementation: ``auto``, ``flash4`` and ``flash`` (CUDA, 16-bit), ``blocked`` or ``naive``.

    Returns:
        The output ``[Q, H, V]`` in the dtype of q and the log-sum-exp of each query's scaled scores ``[Q, H]`` in
        float32 (float64 for float64 inputs). Nothing is recorded for autograd.

    Raises:
        ValueError: for an unknown implementation, or shapes that do not agree.
    """
    check_shapes(q_QHK, k_SGK, v_SGV, queries, keys)
    run = choose_implementation(q_QHK, v_SGV, implementation).attention_forward
    with torch.no_grad():
        return run(q_QHK, k_SGK, v_SGV, queries, keys, causal, scale)


def attention_backward(
    grad_out_QHV: Tensor,
    q_QHK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    out_QHV: Tensor,
    lse_QH: Tensor,
    queries: Documents,
    keys: Documents,
    *,
    causal: bool,
    scale: float,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that these keys contribute, when each query's softmax may run over more keys than these.

    With ``P = exp(scale q k - lse)``, the weights in the whole softmax, and ``delta = sum(out * grad_out)``, the
    gradient of a score is ``P (grad_out v - delta)`` (arXiv 2205.14135, appendix B.4): the keys that are not here
    enter through ``out`` and ``lse`` only. Contributions of disjoint sets of keys add up.

    Args:
        grad_out_QHV: gradient of the output, in the dtype of q.
        out_QHV, lse_QH: output and log-sum-exp over *all* keys of each query, as :func:`attention_forward` returns
            them or as :func:`minimax_train.kernels.softmax.merge.merge_` leaves them, ``out`` in the dtype of q.
        Others as in :func:`attention_forward`.

    Returns:
        Gradients of q, k and v, in their dtypes.
    """
    check_shapes(q_QHK, k_SGK, v_SGV, queries, keys)
    run = choose_implementation(q_QHK, v_SGV, implementation).attention_backward
    with torch.no_grad():
        return run(grad_out_QHV, q_QHK, k_SGK, v_SGV, out_QHV, lse_QH, queries, keys, causal, scale)
