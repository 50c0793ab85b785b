"""The ``kernels`` group of the configuration: which implementation of each op runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minimax_train.apex import NEEDS_APEX, has_apex
from minimax_train.errors import require
from minimax_train.fields import check_fields
from minimax_train.kernels import cross_entropy, experts, lightning, norm, rope, silu, softmax
from minimax_train.kernels.dispatch import NEEDS_CUDA, refusal


@dataclass
class KernelConfig:
    """Which implementation of each op runs; ``auto`` picks the best one for the device and dtype.

    Attributes:
        lightning, softmax: the attentions.
        experts: the experts' GEMMs and what lies between them.
        router: the router's projection, softmax, top-k, and tokens per expert.
        norm: every RMSNorm, with the residual before it or the gate after it.
        rope: rotary embedding.
        silu: SiLU of lightning attention's q, k and v.
        loss: softmax and gradient of the cross-entropy.
    """

    lightning: str = "auto"
    softmax: str = "auto"
    experts: str = "auto"
    router: str = "auto"
    norm: str = "auto"
    rope: str = "auto"
    silu: str = "auto"
    loss: str = "auto"

    def __post_init__(self) -> None:
        check_fields("kernels", self)
        for op, implementations in self._implementations().items():
            problem = refusal(getattr(self, op), implementations)
            require(not problem, f"kernels.{op}", getattr(self, op), problem)

    def check_device(self, device_type: str) -> None:
        """Refuse an implementation that the device cannot run, or that is not installed.

        Raises:
            ConfigError: naming those it can.
        """
        for op, implementations in self._implementations().items():
            able = [name for name in implementations if device_type == "cuda" or name not in NEEDS_CUDA]
            accepted = f"needs a GPU; on {device_type} it must be one of {', '.join(['auto', *able])}"
            require(getattr(self, op) in ("auto", *able), f"kernels.{op}", getattr(self, op), accepted)
        if self.norm == "apex":
            require(has_apex("fused_layer_norm_cuda"), "kernels.norm", self.norm, NEEDS_APEX)

    @staticmethod
    def _implementations() -> dict[str, Mapping[str, object]]:
        return {
            "lightning": lightning.IMPLEMENTATIONS,
            "softmax": softmax.IMPLEMENTATIONS,
            "experts": experts.IMPLEMENTATIONS,
            "router": experts.ROUTER_IMPLEMENTATIONS,
            "norm": norm.IMPLEMENTATIONS,
            "rope": rope.IMPLEMENTATIONS,
            "silu": silu.IMPLEMENTATIONS,
            "loss": cross_entropy.IMPLEMENTATIONS,
        }
