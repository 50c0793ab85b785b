"""Blocked softmax attention against one full masked softmax in float64."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import blocked, softmax_attention
from support.compare import relative_error

MIXES = [[1], [7], [63, 1, 1, 37], [5, 64, 65, 13], [1, 1, 1]]


def _inputs(lengths, H, G, K, V, dtype=torch.float64):
    torch.manual_seed(sum(lengths) + H)
    T = sum(lengths)
    shapes = [(T, H, K), (T, G, K), (T, G, V), (T, H, V)]
    q, k, v, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], grad, Documents.from_lengths(lengths)


@pytest.mark.parametrize("lengths", MIXES)
@pytest.mark.parametrize(("H", "G", "K", "V"), [(6, 2, 5, 7), (4, 4, 8, 8), (3, 1, 12, 3)])
@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_blocked_equals_naive(lengths, H, G, K, V, block, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", block)
    inputs, grad, documents = _inputs(lengths, H, G, K, V, dtype)
    reference = [x.detach().double().requires_grad_() for x in inputs]
    expected, expected_lse = softmax_attention(*reference, documents, scale=0.3, implementation="naive")
    out, lse = softmax_attention(*inputs, documents, scale=0.3, implementation="blocked")
    assert relative_error(out, expected) < tolerance
    # One token that sees only itself may have a log-sum-exp near zero: compare absolutely.
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=10 * tolerance)
    for gradient, right in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, reference, grad.double()), strict=True
    ):
        torch.testing.assert_close(gradient.double(), right, rtol=20 * tolerance, atol=20 * tolerance)


def test_log_sum_exp_of_one_token_is_its_score():
    (q, k, v), _, documents = _inputs([1, 1], 2, 1, 4, 4)
    _, lse = softmax_attention(q, k, v, documents, scale=0.5)
    torch.testing.assert_close(lse, (q * k).sum(-1) * 0.5)


def test_shapes_that_disagree_are_refused():
    (q, k, v), _, documents = _inputs([9], 6, 2, 4, 4)
    with pytest.raises(ValueError, match="multiple of key-value heads"):
        softmax_attention(q[:, :5], k, v, documents, scale=1.0)
    with pytest.raises(ValueError, match="documents of 8 tokens"):
        softmax_attention(q, k, v, Documents.from_lengths([8]), scale=1.0)
    with pytest.raises(ValueError, match=r"kernels.softmax='fast'.*auto, naive, blocked, flash"):
        softmax_attention(q, k, v, documents, scale=1.0, implementation="fast")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", [[513], [1, 700, 64, 259]])
@pytest.mark.parametrize(("H", "G", "K"), [(8, 2, 64), (8, 1, 128)])
def test_flash_equals_naive_on_gpu(lengths, H, G, K):
    inputs, grad, documents = _inputs(lengths, H, G, K, K)
    expected, expected_lse = softmax_attention(*inputs, documents, scale=K**-0.5, implementation="naive")
    half = [x.detach().bfloat16().cuda().requires_grad_() for x in inputs]
    out, lse = softmax_attention(*half, documents.to("cuda"), scale=K**-0.5, implementation="flash")
    assert relative_error(out.cpu(), expected) < 1e-2
    assert relative_error(lse.cpu(), expected_lse) < 1e-2
    gradients = torch.autograd.grad(out, half, grad.bfloat16().cuda())
    for gradient, right in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert relative_error(gradient.cpu(), right) < 2e-2
