"""Comparing tensors by relative error."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in float64; NaN compares as infinitely wrong."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    expected = expected.detach().double()
    error = float((actual.detach().double() - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if error == error else float("inf")
