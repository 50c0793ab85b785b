"""Rotary embedding against complex multiplication; the fused loss against plain cross-entropy."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.kernels import cross_entropy
from minimax_train.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from minimax_train.kernels.documents import Documents
from minimax_train.kernels.rope import apply_rotary, rotary_table
from support.compare import relative_error


@pytest.mark.parametrize(("K", "R"), [(10, 6), (8, 8), (6, 0)])
def test_rotary_is_a_complex_rotation(K, R):
    positions = Documents.from_lengths([3, 1, 9]).positions_T
    assert positions.tolist() == [0, 1, 2, 0, *range(9)]
    x = torch.randn(13, 2, K, dtype=torch.float64)
    out = apply_rotary(x, *rotary_table(positions, R, 100.0))
    for t, position in enumerate(positions.tolist()):
        for i in range(R // 2):
            angle = torch.tensor(position * 100.0 ** (-2 * i / R), dtype=torch.float64)
            pair = torch.complex(x[t, :, i], x[t, :, i + R // 2]) * torch.polar(torch.ones_like(angle), angle)
            torch.testing.assert_close(out[t, :, i], pair.real, rtol=0, atol=2e-6)
            torch.testing.assert_close(out[t, :, i + R // 2], pair.imag, rtol=0, atol=2e-6)
    assert torch.equal(out[..., R:], x[..., R:])


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_loss_equals_cross_entropy(chunk, scale, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(17, (11,))
    labels[[0, 5, 10]] = IGNORE_INDEX
    loss = linear_cross_entropy(x, weight, labels)
    expected = F.cross_entropy(x @ weight.T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected)
    right = torch.autograd.grad(expected * scale, [x, weight])
    for gradient, reference in zip(torch.autograd.grad(loss * scale, [x, weight]), right, strict=True):
        assert relative_error(gradient, reference) < 1e-14


def test_loss_without_gradient():
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 3, IGNORE_INDEX]))
    torch.testing.assert_close(loss, F.cross_entropy((x @ weight.T)[:4], torch.arange(4), reduction="sum"))
