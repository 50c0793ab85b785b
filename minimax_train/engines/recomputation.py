"""What each layer computes again under an engine: as configured, or the fastest that fits in its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from minimax_train.kernels.dispatch import AUTO
from minimax_train.model.memory import RECOMPUTATIONS, ActivationMemory, choose_recomputation, recomputation_shown
from minimax_train.parallel.grid import WORLD, ProcessGrid
from minimax_train.recipe import StepPlan, stages_on_grid

if TYPE_CHECKING:
    from minimax_train.config import Config


class Recomputation:
    """``recipe.activation_checkpointing`` of a run; made by all ranks together, when their engine holds its states.

    ``auto`` looks at the memory that is free then, on the rank that has the least, and at nothing but the number of
    tokens afterwards, so that the choice is the same on all ranks of a pipeline stage and for all documents. Without a
    GPU it is ``none``.

    Args:
        still_needed: bytes that the engine has yet to allocate on this rank for anything but activations.
        held, deferred: as of :class:`ActivationMemory`; of this rank, whose stages choose for themselves.
        apart: whether evaluations cannot use the memory of training's activations, as that of CUDA graphs.

    Attributes:
        notes: what was chosen, for the person watching.
    """

    def __init__(
        self,
        config: Config,
        grid: ProcessGrid,
        device: torch.device,
        *,
        still_needed: int,
        apart: bool,
        held: Sequence[int] | None = None,
        deferred: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._apart = apart and config.recipe.eval_interval > 0
        self._grid, self._requested, self._free = grid, config.recipe.activation_checkpointing, None
        self._layers = config.model.num_layers
        self._chosen: dict[int, tuple[str, ...]] = {}  # by tokens of a micro-batch
        self.notes: list[str] = []
        if self._requested != AUTO or device.type != "cuda":
            return
        self._memory = ActivationMemory(
            config.model,
            config.engine.compute_dtype(device.type).itemsize,
            **{axis: grid.size(axis) for axis in ("tp", "ep", "etp")},
            attention_is_called=config.engine.calls_attention(grid),
            held=held,
            deferred=deferred,
        )
        free = torch.full((), _free_bytes(device) - still_needed, dtype=torch.int64, device=device)
        dist.all_reduce(free, dist.ReduceOp.MIN, group=grid.group(WORLD))
        self._free = max(0, int(free))
        tokens = (stage.micro_batch_size * stage.sequence_length for stage in stages_on_grid(config))
        self.notes = list(dict.fromkeys(map(self._note, tokens)))

    def kinds(self, plan: StepPlan) -> tuple[str, ...]:
        """Of a step: for each layer one of :data:`minimax_train.model.memory.RECOMPUTATIONS`."""
        return self._kinds(plan.micro_batch_size * plan.sequence_length)

    def _kinds(self, micro_batch_tokens: int) -> tuple[str, ...]:
        if self._free is None:
            return (RECOMPUTATIONS[0] if self._requested == AUTO else self._requested,) * self._layers
        if micro_batch_tokens not in self._chosen:
            tokens = self._tokens(micro_batch_tokens)
            evaluation = self._memory.forward(tokens) if self._apart else 0
            chosen = choose_recomputation(self._memory, tokens, self._free - evaluation)
            self._chosen[micro_batch_tokens] = chosen
        return self._chosen[micro_batch_tokens]

    def _tokens(self, micro_batch_tokens: int) -> int:
        return micro_batch_tokens // self._grid.size("cp_tp")

    def _note(self, micro_batch_tokens: int) -> str:
        tokens, kinds, free = self._tokens(micro_batch_tokens), self._kinds(micro_batch_tokens), self._free or 0
        choices = {name: (name,) * self._layers for name in RECOMPUTATIONS}
        own = [kinds[layer] for layer in self._memory.held_layers]
        if len(set(own)) > 1:
            choices["this"] = kinds
        estimates = (f"{name} {self._memory.peak(tokens, each) / 2**30:.1f}" for name, each in choices.items())
        return (
            f"recipe.activation_checkpointing=auto: {recomputation_shown(own)}, for micro-batches of "
            f"{micro_batch_tokens:,} tokens; estimated GiB of activations: {', '.join(estimates)}; "
            f"free {free / 2**30:.1f}"
        )


def _free_bytes(device: torch.device) -> int:
    """What is left on a GPU: of the device, and of what PyTorch's allocator holds and has not given out."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
