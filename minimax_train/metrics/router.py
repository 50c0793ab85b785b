"""What the routers of a step did, as metrics.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from torch import Tensor


def router_metrics(
    tokens_per_expert_LE: Tensor, *, entropy: float, dropped: float, experts_per_token: int, per_expert: bool
) -> dict[str, float]:
    """Balance, certainty and losses of the routing.

    Args:
        tokens_per_expert_LE: assignments to each expert in each layer over the whole batch, before any were dropped.
        entropy: of the routers' probabilities in nats, summed over tokens and layers.
        dropped: assignments over capacity, in all layers.
        per_expert: also each expert's share.

    Returns:
        ``expert_load_max`` and ``expert_load_min``: shares of the most and least assigned expert of any layer,
        1 being an equal share; ``router_entropy``: mean per token and layer, at most log E; ``dropped_fraction`` of all
        assignments; and ``expert_load/layer_LL/expert_EE`` if asked for.
    """
    tokens_per_expert_LE = tokens_per_expert_LE.double()
    share_LE = tokens_per_expert_LE / tokens_per_expert_LE.mean(1, keepdim=True)
    assignments = float(tokens_per_expert_LE.sum())
    metrics = {
        "expert_load_max": float(share_LE.max()),
        "expert_load_min": float(share_LE.min()),
        "router_entropy": entropy * experts_per_token / assignments,
        "dropped_fraction": dropped / assignments,
    }
    if per_expert:
        for layer, shares in enumerate(share_LE.tolist()):
            for expert, share in enumerate(shares):
                metrics[f"expert_load/layer_{layer:02d}/expert_{expert:02d}"] = share
    return metrics
