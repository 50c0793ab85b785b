"""Grids for a run on a number of GPUs: those that fit, the fastest first."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from math import lcm
from typing import NamedTuple

from minimax_train.config import Config, ParallelConfig, config_on
from minimax_train.engines import ENGINES, EngineConfig
from minimax_train.errors import ConfigError
from minimax_train.kernels.dispatch import AUTO
from minimax_train.model import ModelPart
from minimax_train.model.memory import RECOMPUTATIONS
from minimax_train.parallel.grid import GridSizes, divisors
from minimax_train.parallel.pipeline import SCHEDULES, stages_of_rank
from minimax_train.planner.cost import (
    data_parallel_traffic,
    equal_stages_seconds,
    gradient_sums_seconds,
    micro_batch_seconds,
)
from minimax_train.planner.machine import OVERHEAD_BYTES
from minimax_train.planner.plan import Cluster, Parameters, RunPlan, first_step, plan_run, rank_activations
from minimax_train.recipe import Recipe

BEST = 10
"""So many proposals are made."""
_WORTH = 1.02  # a step must be so many times as fast for another micro-batch to be named


def propose(
    config: Config,
    cluster: Cluster,
    document_tokens: float,
    micro_batches: int | None = None,
    engines: Sequence[EngineConfig] = (),
) -> list[RunPlan]:
    """Plans of grids that the model can be split over and that fit, the fastest first: the best ten, and of grids with
    and without pipeline stages at least the best one each.

    Axes are divisors of the number of GPUs; with pipeline stages, each schedule. ``data.num_streams`` follows data
    parallelism. All other settings are the configuration's.

    Args:
        micro_batches: on each data-parallel rank, times the pipeline stages, so that a step has as many tokens whatever
            their number; whatever global batch that makes. None for the configuration's.
        engines: others to consider.

    Raises:
        ConfigError: when none can run, with the reason of one; or none fits, naming the one that takes least.
    """
    search = _Search(config, cluster, document_tokens, micro_batches)
    every = [found for engine in (config.engine, *engines) for found in search.candidates(engine)]
    plans = search.best(every, BEST)
    for has_stages in (False, True):
        if all((plan.grid.pp > 1) != has_stages for plan in plans):
            plans += search.best([each for each in every if (each[1].grid.pp > 1) == has_stages], 1)
    if plans:
        return sorted(plans, key=lambda plan: -plan.tokens_per_s)
    if search.refused is not None and not search.least:
        raise search.refused
    size = first_step(config).micro_batch_size
    smaller = f"; a micro-batch smaller than recipe.micro_batch_size={size} takes less" if size > 1 else ""
    raise ConfigError(
        f"world_size={cluster.world_size}: no grid fits: the least is {search.least_taken / 2**30:.1f} GiB, with "
        f"{search.least}; a GPU has {cluster.rates.memory_bytes / 2**30:.1f} less {OVERHEAD_BYTES / 2**30:.1f} for "
        f"CUDA and NCCL{smaller}"
    )


def other_micro_batch(plan: RunPlan) -> RunPlan | None:
    """The fastest plan of the same grid and step, cut into larger or smaller micro-batches, that fits.

    None where the plan's own are as fast within 2 %, or where the recipe's first stage sets them. A plan that does not
    fit is slower than any that does. A stage of the recipe that fits must still fit.
    """
    config, step, parameters = plan.config, plan.step, Parameters(plan.config.model)
    best, tight = plan, {stage.name for stage in plan.tight_stages}
    for size in divisors(step.global_batch_size // plan.grid.size("dp")):
        recipe = dataclasses.replace(config.recipe, micro_batch_size=size)
        try:
            own = dataclasses.replace(config, recipe=recipe)
            other = plan_run(own, plan.cluster, plan.document_tokens, parameters)
        except ConfigError:  # the batches of the recipe's other stages, or too few micro-batches for the stages
            continue
        least = _WORTH if best is plan else 1.0
        if not other.fits or any(stage.name not in tight for stage in other.tight_stages):
            continue
        if not best.fits or other.tokens_per_s > least * best.tokens_per_s:
            best = other
    return None if best is plan else best


def engines_with_stages(config: Config) -> list[EngineConfig]:
    """Those to consider besides the configuration's where that runs no pipeline stages."""
    if ENGINES[config.engine.name].runs_stages:
        return []
    able = [engine.config_type() for engine in ENGINES.values() if engine.runs_stages]
    return [dataclasses.replace(engine, precision=config.engine.precision) for engine in able]


class _Candidate(NamedTuple):
    """A grid, and how its stages run.

    Attributes:
        config: of any grid; its engine is the candidate's.
        pipeline: how many stages, and their schedule.
        grid: the sizes.
        micro_batches: of a step on a data-parallel rank.
    """

    config: Config
    pipeline: ParallelConfig
    grid: GridSizes
    micro_batches: int


class _Search:
    """For the fastest grids that fit.

    Of each grid it is estimated how fast it is at most: with equal stages and nothing computed again; then, in the
    order of these bounds, with what the first pipeline rank must compute again, which holds the most micro-batches;
    and then its plan is made.

    Attributes:
        refused: why a grid could not run.
        least, least_taken: the grid that takes the least memory, and how many bytes.
    """

    def __init__(self, config: Config, cluster: Cluster, document_tokens: float, micro_batches: int | None) -> None:
        self._config, self._cluster, self._document_tokens = config, cluster, document_tokens
        self._micro_batches, self._parameters = micro_batches, Parameters(config.model)
        self._step = first_step(config)
        self._counts = self._micro_batch_counts()
        self._length = min(document_tokens, self._step.sequence_length)
        self._capacity = cluster.capacity
        self.refused: ConfigError | None = None
        self.least, self.least_taken = "", float("inf")
        sizes = [kind.parameters(config.model) for kind in config.model.attentions]
        layer = sizes.index(min(sizes))
        self._smallest = ModelPart(range(layer, layer + 1), False, False)
        self._of_layers: dict[tuple[int, ...], float] = {}  # seconds of a micro-batch, by cp, tp, ep, etp
        self._of_passes: dict[tuple[int, str, int], float] = {}  # of a step, in those of a micro-batch on one rank

    def candidates(self, engine: EngineConfig) -> Iterator[tuple[float, _Candidate]]:
        """Of one engine, each with its bound."""
        config = dataclasses.replace(self._config, engine=engine)
        for parallel in self._pipelines(config):
            for cp, tp, ep, etp in _grids(config, self._cluster.world_size // parallel.pp):
                grid = GridSizes(self._cluster.world_size, cp, tp, ep, etp, parallel.pp)
                dp, fewest = grid.size("dp"), 1
                if parallel.pp > 1:
                    fewest = parallel.pp * SCHEDULES[parallel.pp_schedule].micro_batches
                number = self._batch(grid) // (self._step.micro_batch_size * dp)
                candidate = _Candidate(config, parallel, grid, number)
                counts = self._counts if self._micro_batches is None else [number * dp]
                if all(count % dp == 0 and count >= fewest * dp for count in counts):
                    yield self._bound(candidate), candidate
                elif self.refused is None:
                    self._plan(candidate)  # which is refused

    def best(self, candidates: Sequence[tuple[float, _Candidate]], number: int) -> list[RunPlan]:
        """Of these so many that fit, the fastest first."""
        plans: list[RunPlan] = []
        waiting = [(bound, i, each, False) for i, (bound, each) in enumerate(candidates)]
        heapq.heapify(waiting)
        while waiting:
            bound, i, candidate, is_close = heapq.heappop(waiting)
            if len(plans) == number and bound * plans[-1].tokens_per_s >= 1:
                break
            if not is_close:
                if closer := self._closer_bound(candidate):
                    heapq.heappush(waiting, (max(bound, closer), i, candidate, True))
                continue
            plan = self._plan(candidate)
            if plan is not None and plan.fits:
                plans = sorted([*plans, plan], key=lambda plan: -plan.tokens_per_s)[:number]
        return plans

    def _bound(self, candidate: _Candidate) -> float:
        """Seconds for a token, of equal stages that compute nothing again."""
        grid, config = candidate.grid, candidate.config
        key = grid.cp, grid.tp, grid.ep, grid.etp
        if key not in self._of_layers:
            requested, every = config.recipe.activation_checkpointing, config.model.num_layers
            kinds = [RECOMPUTATIONS[0] if requested == AUTO else requested] * every
            self._of_layers[key] = self._micro_batch([ModelPart(range(every))], grid, kinds)
        return self._per_token(candidate, self._of_layers[key])

    def _closer_bound(self, candidate: _Candidate) -> float | None:
        """Seconds for a token, as if all pipeline ranks had to compute again what the first has to; None where it does
        not fit."""
        grid, config = candidate.grid, candidate.config
        schedule, of_rank = candidate.pipeline.pp_schedule, candidate.pipeline.stages_of_rank if grid.pp > 1 else 1
        stages = grid.pp * of_rank
        size = config.model.num_layers // stages
        own = stages_of_rank(schedule, grid.pp, of_rank, 0) if grid.pp > 1 else [0]
        parts = [ModelPart(range(size * i, size * (i + 1)), i == 0, i == stages - 1) for i in own]
        states = sum(self._parameters.memory(config, grid, parts).values())
        if states > self._capacity:
            self._note(candidate, states)
            return None
        tokens = self._step.micro_batch_size * self._step.sequence_length // grid.size("cp_tp")
        activations, kinds = rank_activations(
            config, grid, parts, rank=0, schedule=schedule, tokens=tokens, free_bytes=self._capacity - states
        )
        taken = states + activations.peak(tokens, kinds)
        if taken > self._capacity:
            self._note(candidate, taken)
            return None
        return self._per_token(candidate, grid.pp * self._micro_batch(parts, grid, kinds))

    def _micro_batch(self, parts: Sequence[ModelPart], grid: GridSizes, kinds: Sequence[str]) -> float:
        rates, links = self._cluster.rates, self._cluster.links
        return micro_batch_seconds(self._config.model, parts, grid, self._step, kinds, rates, links, self._length)

    def _per_token(self, candidate: _Candidate, of_micro_batch: float) -> float:
        """Seconds for a token, by those of a micro-batch through all layers."""
        config, parallel, grid, number = candidate
        key = parallel.pp, parallel.pp_schedule, number
        if key not in self._of_passes:
            self._of_passes[key] = equal_stages_seconds(parallel, number, 1.0)
        work = self._parameters.work(config, grid, [self._smallest], number)
        once = data_parallel_traffic(work.engine.transfers, self._cluster.links).seconds
        once += gradient_sums_seconds(work, number, self._cluster.rates)
        tokens = self._batch(grid) * self._step.sequence_length
        once *= config.model.num_layers // grid.pp
        return (self._of_passes[key] * of_micro_batch + once) / tokens

    def _pipelines(self, config: Config) -> Iterator[ParallelConfig]:
        """Numbers of pipeline ranks and schedules that the engine runs, whose stages have as many layers each."""
        own = dataclasses.replace(config.parallel, token_groups=1)
        yield own
        if not ENGINES[config.engine.name].runs_stages:
            return
        for pp in divisors(self._cluster.world_size):
            for schedule, (fewest, *_) in SCHEDULES.items():
                if 1 < pp <= config.model.num_layers and config.model.num_layers % (pp * fewest) == 0:
                    yield dataclasses.replace(own, pp=pp, pp_schedule=schedule)

    def _micro_batch_counts(self) -> set[float]:
        """Of a step on all ranks: the first, and those of all stages of the recipe that name no grid of their own."""
        recipe, own = Recipe(self._config), self._config.parallel.sizes
        steps = [(stage, tokens) for stage, tokens in recipe.batches() if stage.parallel.sizes == own]
        counts = {tokens / (stage.sequence_length * stage.micro_batch_size) for stage, tokens in steps}
        return counts | {self._step.global_batch_size / self._step.micro_batch_size}

    def _batch(self, grid: GridSizes) -> int:
        """Packed sequences of a step."""
        if self._micro_batches is None:
            return self._step.global_batch_size
        return self._micro_batches * grid.pp * self._step.micro_batch_size * grid.size("dp")

    def _plan(self, candidate: _Candidate) -> RunPlan | None:
        """None where the configuration refuses it."""
        config, pipeline, grid, _ = candidate
        data = dataclasses.replace(config.data, num_streams=lcm(config.data.num_streams, grid.size("dp")))
        recipe = config.recipe
        if self._micro_batches is not None:
            recipe = dataclasses.replace(recipe, global_batch_size=self._batch(grid))
        try:
            own, parallel = dataclasses.replace(config, data=data, recipe=recipe), _on(pipeline, grid)
            # Of one grid all stages must run on it; with grids of their own they keep these.
            own = config_on(own, parallel) if config.has_other_grids else dataclasses.replace(own, parallel=parallel)
            plan = plan_run(own, self._cluster, self._document_tokens, self._parameters)
        except ConfigError as error:
            self.refused = self.refused or error
            return None
        self._note(candidate, plan.memory_bytes)
        return plan

    def _note(self, candidate: _Candidate, taken: float) -> None:
        if taken < self.least_taken:
            self.least, self.least_taken = _on(candidate.pipeline, candidate.grid).shown, taken


def _on(pipeline: ParallelConfig, grid: GridSizes) -> ParallelConfig:
    return dataclasses.replace(pipeline, cp=grid.cp, tp=grid.tp, ep=grid.ep, etp=grid.etp)


def _grids(config: Config, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """cp, tp, ep and etp of so many ranks that the model's own sizes allow: expert parallelism as wide as all of them,
    tp and etp as a node's eight GPUs, which is as far as they pay."""
    model, few = config.model, [n for n in divisors(ranks) if n <= 8]
    heads = [n for n in few if model.num_heads % n == model.num_kv_heads % n == model.vocab_size % n == 0]
    shares = [n for n in few if model.expert_hidden_size % n == 0]
    experts = [n for n in divisors(ranks) if model.num_experts % n == 0]
    for cp, tp, ep, etp in itertools.product(divisors(ranks), heads, experts, shares):
        if ranks % (cp * tp) == 0 == ranks % (ep * etp) and cp <= 64:
            yield cp, tp, ep, etp


def overrides_of(plan: RunPlan, config: Config) -> str:
    """What to pass to ``minimax-train`` besides what the configuration says."""
    own = plan.config
    found = [f"engine={own.engine.name}"] if own.engine.name != config.engine.name else []
    found += [f"parallel.{axis}={size}" for axis, size in own.parallel.sizes.items() if size > 1]
    if own.parallel.pp_schedule != config.parallel.pp_schedule:
        found.append(f"parallel.pp_schedule={own.parallel.pp_schedule}")
    if own.data.num_streams != config.data.num_streams:
        found.append(f"data.num_streams={own.data.num_streams}")
    if own.recipe.micro_batch_size != config.recipe.micro_batch_size:
        found.append(f"recipe.micro_batch_size={own.recipe.micro_batch_size}")
    if own.recipe.global_batch_size != config.recipe.global_batch_size:
        found.append(f"recipe.global_batch_size={own.recipe.global_batch_size}")
    return " ".join(found)
