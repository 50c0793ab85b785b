"""Configurations alone: what transformers makes of ours, and that nothing is lost on the way back."""

import random

import pytest
import torch
from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

from minimax_train.convert.hf_config import FLOAT32_MAX, Surroundings, from_hf_config, to_hf_config
from minimax_train.kernels.rope import rotary_table
from minimax_train.model.config import deep_norm_alpha


def there(model):
    return to_hf_config(model, Surroundings(max_position_embeddings=64), torch.float32)


def test_every_float_survives_the_round_trip(lab):
    choose = random.Random(0)
    for _ in range(200):
        head_dim = 2 * choose.randint(1, 64)
        rotary_dim = 2 * choose.randint(0, head_dim // 2)
        highest = 0.99 * FLOAT32_MAX ** (rotary_dim / head_dim) if rotary_dim else 1e7
        base = choose.choice([10000.0, 5e6, choose.uniform(2, 1e7)])
        model = lab.model_config(
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_base=min(base, highest),
            num_layers=choose.choice([2, 6, 80]),
            num_experts=choose.randint(2, 64),
            aux_loss_coefficient=choose.choice([0.0, 0.01, choose.random()]),
            residual_scale=choose.choice([None, 1.0, choose.random()]),
        )
        theirs = there(model).to_dict()
        back = from_hf_config(theirs)
        assert back.rope_base == pytest.approx(model.rope_base, rel=1e-15)
        assert back.aux_loss_coefficient == pytest.approx(model.aux_loss_coefficient, rel=1e-15)
        back.rope_base, back.aux_loss_coefficient = model.rope_base, model.aux_loss_coefficient
        assert back == model
        assert there(from_hf_config(theirs)).to_dict() == theirs


@pytest.mark.parametrize("head_dim", [2, 14, 64, 98, 128])
def test_transformers_rotates_as_many_dimensions_at_our_frequencies(lab, head_dim):
    for rotary_dim in range(0, head_dim + 1, 2):
        model = lab.model_config(head_dim=head_dim, rotary_dim=rotary_dim, rope_base=3.0)
        if rotary_dim and 3.0 ** (head_dim / rotary_dim) > FLOAT32_MAX:
            continue
        frequencies = MiniMaxRotaryEmbedding(there(model)).inv_freq
        ours, _ = rotary_table(torch.tensor([1]), rotary_dim, 3.0)
        assert len(frequencies) == head_dim // 2
        assert int(frequencies.count_nonzero()) == rotary_dim // 2
        assert torch.allclose(frequencies[: rotary_dim // 2].cos(), ours[0], rtol=1e-6)


def test_report_model(lab):
    """MiniMax-Text-01: the factors its authors published for transformers, alpha = (2 x 80)^(1/4)."""
    model = lab.model_config(num_layers=80, layer_pattern="LLLLLLLS", head_dim=128, rotary_dim=64)
    theirs = there(model)
    assert theirs.linear_attn_alpha_factor == theirs.mlp_alpha_factor == 160**0.25 == deep_norm_alpha(80)
    assert [i for i, kind in enumerate(theirs.layer_types) if kind == "full_attention"] == list(range(7, 80, 8))
    assert theirs.rope_parameters == {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.5,
        "rope_theta": 100000000.0,
    }
