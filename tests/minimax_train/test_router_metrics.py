"""Router metrics against counts done by hand."""

import math

import pytest
import torch

from minimax_train.metrics.router import router_metrics


def test_router_metrics():
    load = torch.tensor([[6, 0, 3], [2, 3, 4]])  # 9 assignments a layer: 3 tokens of 3 each
    sums = {"entropy_L": torch.tensor([2.0, 4.0]) * math.log(2), "dropped_L": torch.tensor([7.0, 2.0])}
    metrics = router_metrics(load, **sums, experts_per_token=3, per_layer=True, per_expert=True)
    assert metrics["expert_load_max"] == 2 and metrics["expert_load_min"] == 0
    assert metrics["router_entropy"] == pytest.approx(math.log(2))  # six tokens and layers
    assert metrics["dropped_fraction"] == 0.5
    assert metrics["expert_load_max/layer_01"] == pytest.approx(4 / 3)
    assert metrics["expert_load_min/layer_01"] == pytest.approx(2 / 3)
    assert metrics["router_entropy/layer_00"] == pytest.approx(2 / 3 * math.log(2))
    assert metrics["dropped_fraction/layer_00"] == pytest.approx(7 / 9)
    assert metrics["expert_load/layer_01/expert_02"] == pytest.approx(4 / 3)
    assert len(metrics) == 4 + 8 + 6
    assert len(router_metrics(load, **sums, experts_per_token=3, per_layer=False, per_expert=False)) == 4
