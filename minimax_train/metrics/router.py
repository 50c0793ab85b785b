"""What the routers of a step did, as metrics.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from torch import Tensor


def router_metrics(
    load_LE: Tensor, *, entropy: float, dropped: float, experts_per_token: int, per_expert: bool
) -> dict[str, float]:
    """Balance, certainty and losses of the routing.

    Args:
        load_LE: choices of each expert in each layer over the whole batch, before any were dropped.
        entropy: of the routers' probabilities in nats, summed over tokens and layers.
        dropped: choices over capacity, in all layers.
        per_expert: also each expert's load.

    Returns:
        ``expert_load_max`` and ``expert_load_min``: the most and the least chosen expert of any layer, 1 being an equal
        share; ``router_entropy``: mean per token and layer, at most log E; ``dropped_fraction`` of all choices; and
        ``expert_load/layer_LL/expert_EE`` if asked for.
    """
    load_LE = load_LE.double()
    share_LE, choices = load_LE / load_LE.mean(1, keepdim=True), float(load_LE.sum())
    metrics = {
        "expert_load_max": float(share_LE.max()),
        "expert_load_min": float(share_LE.min()),
        "router_entropy": entropy * experts_per_token / choices,
        "dropped_fraction": dropped / choices,
    }
    if per_expert:
        for layer, shares in enumerate(share_LE.tolist()):
            for expert, share in enumerate(shares):
                metrics[f"expert_load/layer_{layer:02d}/expert_{expert:02d}"] = share
    return metrics
