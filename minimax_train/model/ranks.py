"""What ranks do together inside one model: arguments of the model and of its parts.

By default one rank computes everything and nothing moves; ``parallelize.py`` makes what a grid needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from minimax_train.kernels.experts import expert_mlp
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.tensor import TensorParallel


@dataclass(frozen=True, eq=False)
class ModelRanks:
    """The ranks that compute one model, as each part of it needs them.

    Attributes:
        tp: the ranks that share heads and vocabulary.
        cp: the ranks that share packed sequences, in the order of the layout; None where none do.
        cp_methods: how attention reaches over them, by the key of ``parallel`` that says so.
        dp_rank, dp_size: this rank among those that train on other packed sequences of the step at the same time.
        sum_counts: by scope of capacity and auxiliary loss, what sums counts, int64, over the ranks that have tokens
            in the scope; a scope that is not there is this rank's alone.
        experts: computes the experts of a layer, with the arguments of :func:`minimax_train.kernels.experts.expert_mlp`
            and the parameters on this rank.
    """

    tp: TensorParallel = field(default_factory=TensorParallel)
    cp: Communicator | None = None
    cp_methods: Mapping[str, str] = field(default_factory=dict)
    dp_rank: int = 0
    dp_size: int = 1
    sum_counts: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    experts: Callable[..., Tensor] = expert_mlp
