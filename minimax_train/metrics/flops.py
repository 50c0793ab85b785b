"""Model FLOPs of training, and their share of what the GPUs could do (MFU)."""

from __future__ import annotations

import torch

from minimax_train.model import ModelConfig

# Dense bfloat16, by the vendor's data sheets; names as the driver gives them.
PEAK_FLOPS_PER_S = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops(config: ModelConfig, tokens: int, scores: float) -> float:
    """Of the forward and backward passes over some tokens; the backward pass is two forward passes.

    Counted are GEMMs (6 per token and parameter that the token passes in layers and head) and what attentions compute
    between them (``AttentionKind.flops``), such as the scores within documents. What is computed again in the backward
    pass is not counted, nor norms and activation functions; assignments that a capacity drops are.

    Args:
        scores: pairs of tokens that a causal attention looks at: ``n (n + 1) / 2`` of each document of n tokens, added
            up.
    """
    D, experts = config.hidden_size, config.experts_per_token * 3 * config.expert_hidden_size
    attentions = sum(kind.flops(config, scores / tokens) for kind in config.attentions)
    gemms = config.num_layers * (config.num_experts + experts) + config.vocab_size
    return 3.0 * tokens * (attentions + 2 * D * gemms)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Of one device; None where it is not known."""
    return PEAK_FLOPS_PER_S.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
