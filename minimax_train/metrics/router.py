"""What the routers of a step did, as metrics.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from torch import Tensor


def router_metrics(
    tokens_per_expert_LE: Tensor,
    *,
    entropy_L: Tensor,
    dropped_L: Tensor,
    experts_per_token: int,
    per_layer: bool,
    per_expert: bool,
) -> dict[str, float]:
    """Balance, certainty and losses of the routing.

    Args:
        tokens_per_expert_LE: assignments to each expert in each layer over the whole batch, before any were dropped.
        entropy_L: of the routers' probabilities in nats, summed over tokens.
        dropped_L: assignments over capacity.
        per_layer: also each layer's.
        per_expert: also each expert's share.

    Returns:
        ``expert_load_max`` and ``expert_load_min``: shares of the most and least assigned expert of any layer,
        1 being an equal share; ``router_entropy``: mean per token and layer, at most log E; ``dropped_fraction`` of all
        assignments; the same of a layer with ``/layer_LL`` behind the name, and ``expert_load/layer_LL/expert_EE``, if
        asked for.
    """
    tokens_per_expert_LE = tokens_per_expert_LE.double()
    share_LE = tokens_per_expert_LE / tokens_per_expert_LE.mean(1, keepdim=True)
    assignments_L = tokens_per_expert_LE.sum(1)
    metrics = {
        "expert_load_max": float(share_LE.max()),
        "expert_load_min": float(share_LE.min()),
        "router_entropy": float(entropy_L.sum() * experts_per_token / assignments_L.sum()),
        "dropped_fraction": float(dropped_L.sum() / assignments_L.sum()),
    }
    if per_layer:
        by_layer = {
            "expert_load_max": share_LE.amax(1),
            "expert_load_min": share_LE.amin(1),
            "router_entropy": entropy_L * experts_per_token / assignments_L,
            "dropped_fraction": dropped_L / assignments_L,
        }
        for name, values_L in by_layer.items():
            metrics |= {f"{name}/layer_{layer:02d}": value for layer, value in enumerate(values_L.tolist())}
    if per_expert:
        for layer, shares in enumerate(share_LE.tolist()):
            for expert, share in enumerate(shares):
                metrics[f"expert_load/layer_{layer:02d}/expert_{expert:02d}"] = share
    return metrics
