"""The model's forward and backward pass as one CUDA graph, replayed with other documents."""

import pytest
import torch

from minimax_train.model import HybridModel, initialize
from minimax_train.model.memory import RECOMPUTATIONS
from support.graphs import assert_replays_equal_eager
from support.runs import model_config


@pytest.mark.gpu
@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
def test_gpu_graph_of_the_model(recomputation):
    """Forward and backward: loss, what else a forward pass returns, and every parameter's gradient."""
    config = model_config(hidden_size=96, head_dim=32, rotary_dim=16, expert_hidden_size=72, capacity_factor=1.1)
    model = HybridModel(config).cuda()
    model.set_recomputation([recomputation] * config.num_layers)
    initialize(model, seed=3)
    model.bfloat16()
    tokens_T, labels_T = (torch.randint(300, (2000,), device="cuda") for _ in range(2))

    def run(documents):
        loss = model(tokens_T, documents, labels_T, num_sequences=2)
        total = loss.token_loss + 0.01 * loss.aux_loss
        gradients = torch.autograd.grad(total, list(model.parameters()))
        counts = (loss.tokens_per_expert_LE.float(), loss.dropped_L.float())
        return [loss.token_loss.detach(), loss.aux_loss.detach(), *counts, *gradients]

    halves = [[1000, 1000], [1, 999, 300, 63, 64, 573], [500] * 4]
    assert_replays_equal_eager(run, halves, 40, 1000, 2e-2)
