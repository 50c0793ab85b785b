"""What is logged of a step: its own sums, and what was measured since the step that was reported before it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from minimax_train.config import Config
from minimax_train.engines import Engine
from minimax_train.metrics.flops import training_flops
from minimax_train.metrics.left import TimeLeft
from minimax_train.metrics.norms import norm_metrics
from minimax_train.metrics.origins import origin_metrics
from minimax_train.metrics.ranks import host_memory_gib, slowest_ranks
from minimax_train.metrics.router import router_metrics
from minimax_train.phases import Phases
from minimax_train.recipe import Progress

if TYPE_CHECKING:
    from minimax_train.guard import TakenStep


class StepMetrics:
    """Metrics of a run's steps, in their order.

    Args:
        peak_flops_per_s: of the device; None where it is not known.
        progress: of the run when this process begins.

    Attributes:
        paused_s: seconds that evaluations and checkpoints have taken, which are not the steps'.
    """

    def __init__(
        self, config: Config, engine: Engine, phases: Phases, peak_flops_per_s: float | None, progress: Progress
    ) -> None:
        self._config, self._engine, self._phases = config, engine, phases
        self._peak_flops_per_s = peak_flops_per_s
        self.paused_s = 0.0
        self.restart(progress)

    def restart(self, progress: Progress) -> None:
        """The run goes on from there: no step was reported before."""
        self._reported: TakenStep | None = None
        self._at, self._step, self._tokens = self.clock(), progress.step, progress.tokens
        self._left = TimeLeft(progress.tokens)

    def clock(self) -> float:
        """Seconds of the host's clock, less what evaluations and checkpoints took."""
        return time.perf_counter() - self.paused_s

    def of(self, taken: TakenStep, end: int) -> dict[str, float]:
        """Of a step that the device is done with; called by all ranks together. Its seconds are the mean since the step
        before that this was asked of.

        Args:
            end: tokens of the whole run.
        """
        model, logging, totals = self._config.model, self._config.logging, taken.totals
        router = router_metrics(
            totals.tokens_per_expert_LE,
            entropy_L=totals.entropy_L,
            dropped_L=totals.dropped_L,
            experts_per_token=model.experts_per_token,
            per_layer=logging.per_layer,
            per_expert=logging.expert_load,
        )
        balance = {"aux_loss": float(totals.aux_loss)} if model.aux_loss_coefficient > 0 else {}
        steps, tokens = taken.number - self._step, taken.tokens - self._tokens
        elapsed = taken.at - self._at if self._reported is None else taken.seconds_since(self._reported)
        self._reported, self._step, self._tokens = taken, taken.number, taken.tokens
        # With those of an evaluation or a checkpoint that came after the report before.
        on_host, on_device = self._phases.take(), self._phases.take_device(taken.number)
        seconds = {f"seconds/{name}": value / steps for name, value in on_host.items()}
        seconds |= {f"device_seconds/{name}": value / steps for name, value in on_device.items()}
        memory = {"host_memory_gib": host_memory_gib(), **self._engine.figures(taken.plan)}
        if dist.get_world_size() > 1:
            used = memory.get("peak_memory_gib", memory["host_memory_gib"])
            seconds |= slowest_ranks({**on_host, **on_device}, used, steps)
        self._left.add(taken.tokens)
        flops = training_flops(model, taken.plan.tokens, float(totals.scores)) * steps / elapsed / dist.get_world_size()
        mfu = {} if self._peak_flops_per_s is None else {"mfu": flops / self._peak_flops_per_s}
        return {
            "loss": float(totals.loss),
            **origin_metrics(self._config.data.origins, totals.loss_by_origin_O, totals.targets_by_origin_O),
            **balance,
            **router,
            "grad_norm": float(taken.report.gradient_norm),
            **({} if taken.norms_2G is None else norm_metrics(taken.norms_2G)),
            "learning_rate": taken.plan.learning_rate,
            "tokens": taken.tokens,
            "batch_tokens": taken.plan.tokens,
            "sequence_length": taken.plan.sequence_length,
            "rope_base": taken.plan.rope_base,
            "tokens_per_second": tokens / elapsed,
            "tflops_per_rank": flops / 1e12,
            **mfu,
            "seconds": elapsed / steps,
            "seconds_left": self._left.seconds(end - taken.tokens),
            **memory,
            **seconds,
        }
