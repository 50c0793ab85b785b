"""The expert layer's compute: router, permutation, and the SwiGLU experts as grouped GEMMs.

Read ``mlp.py`` first, the layer; then ``permutation.py`` and ``gemms.py``, what it is made of. ``pytorch.py`` and
``triton.py`` are what lies between the GEMMs, ``quack.py`` is GEMMs with SwiGLU inside. ``routing.py`` is the router.
"""

from minimax_train.kernels.experts.gemms import IMPLEMENTATIONS, choose_implementation, has_quack
from minimax_train.kernels.experts.mlp import Dispatcher, expert_mlp, grouped_experts
from minimax_train.kernels.experts.naive import expert_mlp_naive
from minimax_train.kernels.experts.permutation import Permutation
from minimax_train.kernels.experts.routing import (
    ROUTER_IMPLEMENTATIONS,
    drop_over_capacity,
    load_balancing_loss,
    route,
    router_logits,
)

__all__ = [
    "IMPLEMENTATIONS",
    "ROUTER_IMPLEMENTATIONS",
    "Dispatcher",
    "Permutation",
    "choose_implementation",
    "drop_over_capacity",
    "expert_mlp",
    "expert_mlp_naive",
    "grouped_experts",
    "has_quack",
    "load_balancing_loss",
    "route",
    "router_logits",
]
