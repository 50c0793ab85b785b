"""Router metrics against counts done by hand."""

import math

import pytest
import torch

from minimax_train.metrics.router import router_metrics


def test_router_metrics():
    load = torch.tensor([[6, 0, 3], [2, 3, 4]])  # 9 assignments a layer: 3 tokens of 3 each
    metrics = router_metrics(load, entropy=6 * math.log(2), dropped=9, experts_per_token=3, per_expert=True)
    assert metrics["expert_load_max"] == 2 and metrics["expert_load_min"] == 0
    assert metrics["router_entropy"] == pytest.approx(math.log(2))  # six tokens and layers
    assert metrics["dropped_fraction"] == 0.5
    assert metrics["expert_load/layer_01/expert_02"] == pytest.approx(4 / 3)
    assert len(metrics) == 4 + 6
    assert len(router_metrics(load, entropy=0, dropped=0, experts_per_token=3, per_expert=False)) == 4
