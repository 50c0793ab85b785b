"""Initial weights as a function of the seed, the parameter's name and each element's place, and of nothing else.

Every element is drawn by hashing its global index (a counter-based generator), so each rank makes just the shard it
holds, and the model is the same on any number of ranks and whatever the sharding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_BLOCK = 1 << 22  # elements drawn at a time


@dataclass(frozen=True)
class Normal:
    """Zero-mean normal; ``row_gain`` maps row indices (dimension 0, int64) to factors of the standard deviation."""

    std: float
    row_gain: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Constant:
    value: float


Initializer = Normal | Constant


def xavier(fan_in: int, fan_out: int, gain: float = 1.0, row_gain: Callable | None = None) -> Normal:
    """Xavier normal: standard deviation ``gain * sqrt(2 / (fan_in + fan_out))``."""
    return Normal(gain * math.sqrt(2 / (fan_in + fan_out)), row_gain)


def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place, sharded or not.

    Raises:
        AssertionError: when a parameter is left without an initializer.
    """
    rules = initializers(model)
    for name, parameter in model.named_parameters():
        fill(parameter, rules[name], seed, name)


def initializers(model: nn.Module) -> dict[str, Initializer]:
    """Of every parameter, by its full name.

    Each module that owns parameters says how through ``initializers() -> {relative name: Initializer}``.

    Raises:
        AssertionError: when a parameter is left without an initializer.
    """
    rules: dict[str, Initializer] = {}
    for prefix, module in model.named_modules():
        own = getattr(module, "initializers", dict)()
        rules |= {f"{prefix}.{name}" if prefix else name: rule for name, rule in own.items()}
    names = {name for name, _ in model.named_parameters()}
    assert names == rules.keys(), f"initializers do not match: {sorted(names ^ rules.keys())}"
    return rules


@torch.no_grad()
def fill(parameter: Tensor, rule: Initializer, seed: int, name: str) -> None:
    """Fill one parameter, or the shard of it that is on this rank, in place.

    Args:
        name: of the parameter in the whole model.
    """
    _fill(parameter, rule, _key(seed, name))


def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _fill(parameter: Tensor, rule: Initializer, key: int) -> None:
    local, offset = parameter, (0,) * parameter.dim()
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        local = parameter.to_local()
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        assert tuple(local.shape) == tuple(shape)
    if local.numel() == 0 or local.is_meta:
        return
    if isinstance(rule, Constant):
        local.fill_(rule.value)
        return
    strides = [math.prod(parameter.shape[dim + 1 :]) for dim in range(parameter.dim())]
    inner = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim in range(1, parameter.dim()):
        index = torch.arange(local.shape[dim], device=local.device) + offset[dim]
        inner = inner[..., None] + index * strides[dim]
    rows_per_block = max(1, _BLOCK // max(1, inner.numel()))
    for start in range(0, local.shape[0], rows_per_block):
        rows = torch.arange(start, min(start + rows_per_block, local.shape[0]), device=local.device) + offset[0]
        column = (slice(None), *[None] * inner.dim())
        values = standard_normal(rows[column] * strides[0] + inner, key) * rule.std
        if rule.row_gain is not None:
            values *= rule.row_gain(rows)[column]
        local[start : start + len(rows)] = values.to(local.dtype)


def standard_normal(index: Tensor, key: int) -> Tensor:
    """Independent standard normals, one per index: SplitMix64 of ``key + index``, then Box-Muller.

    Args:
        index: int64, any shape and device.
        key: int64, a stream of its own for each value.

    Returns:
        float32 of the shape of the index; the same on every device but for the last bits of log and cos.
    """
    bits = _mix(index * _signed(0x9E3779B97F4A7C15) + key)
    radius = ((bits >> 40) & 0xFFFFFF).float().add_(1.0).mul_(2.0**-24)
    angle = ((bits >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    return radius.log_().mul_(-2.0).sqrt_() * angle.cos_()


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014) in wrapping int64 arithmetic."""
    z = (z ^ ((z >> 30) & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (1 << 33) - 1)
