"""A run's memory and speed on a number of GPUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from minimax_train.config import Config
from minimax_train.engines import ENGINES
from minimax_train.engines.stages import held_layers
from minimax_train.errors import require
from minimax_train.kernels.dispatch import AUTO
from minimax_train.metrics.flops import training_flops
from minimax_train.model import ModelConfig, ModelPart
from minimax_train.model.memory import (
    MARGIN,
    RECOMPUTATIONS,
    ActivationMemory,
    choose_recomputation,
    recomputation_shown,
)
from minimax_train.model.sharding import ParameterLayout
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallel.pipeline import SCHEDULES
from minimax_train.parallelize import parts_of_ranks, whole_layouts
from minimax_train.planner.cost import RankWork, StepCost, step_cost
from minimax_train.planner.machine import OVERHEAD_BYTES, Rates
from minimax_train.recipe import Progress, Recipe, Stage, StepPlan, stages_on_grid


@dataclass(frozen=True)
class Cluster:
    """Where a run is to be.

    Attributes:
        world_size: GPUs.
        rates: of each.
        links: between them.
    """

    world_size: int
    rates: Rates
    links: Machine

    @property
    def capacity(self) -> int:
        """Bytes of a GPU for all but what CUDA and NCCL take."""
        return int(self.rates.memory_bytes - OVERHEAD_BYTES)


@dataclass(frozen=True)
class RankPlan:
    """What a GPU of one pipeline rank holds.

    Attributes:
        parts: its stages, in the order of the model.
        memory: bytes by what they are for; most of it at the same time, as PyTorch's allocator counts it.
        activations: of the micro-batches that are under way on it at a time.
    """

    parts: tuple[ModelPart, ...]
    memory: dict[str, int]
    activations: ActivationMemory

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def shown_layers(self) -> str:
        """``"0-9, 40-49"``."""
        return ", ".join(f"{part.layers[0]}-{part.layers[-1]}" for part in self.parts)


@dataclass(frozen=True)
class RunPlan:
    """What a run takes on every GPU, in the first step of its recipe.

    Attributes:
        ranks: by their place on the axis pp.
        recomputation: of each layer, as configured, or the fastest that fits.
        free_bytes: for activations, on the pipeline rank that has least.
        document_tokens: mean length of documents that was assumed.
    """

    config: Config
    grid: GridSizes
    step: StepPlan
    ranks: tuple[RankPlan, ...]
    recomputation: tuple[str, ...]
    free_bytes: int
    cost: StepCost
    document_tokens: float
    cluster: Cluster

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].memory_bytes)

    @property
    def memory(self) -> dict[str, int]:
        """Of the fullest pipeline rank."""
        return self.ranks[self.fullest].memory

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def largest_sequence(self) -> int:
        """Tokens of the longest packed sequence that fits, one in a micro-batch, blocks recomputed; 0 if none does."""
        return min(_largest_sequence(rank.activations, self.free_bytes, self.grid) for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.cluster.capacity

    @property
    def tight_stages(self) -> list[Stage]:
        """Those of the recipe that run on this grid and whose micro-batches do not fit."""
        stages = stages_on_grid(self.config)
        return [stage for stage in stages if not self._holds(stage.micro_batch_size * stage.sequence_length)]

    def _holds(self, tokens: int) -> bool:
        """Whether a micro-batch of so many tokens fits on every rank."""
        tokens //= self.grid.size("cp_tp")
        for rank in self.ranks:
            *states, _ = rank.memory.values()
            free = self.cluster.capacity - sum(states)
            if rank.activations.peak(tokens, _recomputation(self.config, rank.activations, tokens, free)) > free:
                return False
        return True

    @property
    def tokens_per_s(self) -> float:
        return self.step.tokens / self.cost.seconds

    @property
    def mfu(self) -> float:
        tokens = self.step.tokens
        flops = training_flops(self.config.model, tokens, tokens * (self.document_tokens + 1) / 2)
        return flops / self.cost.seconds / (self.grid.world_size * self.cluster.rates.peak_flops_per_s)


class Parameters:
    """What a model's parameters take in engines and grids; what was counted once is looked up.

    Stages of as many layers of each kind take the same.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._kinds = model.layer_pattern * (model.num_layers // len(model.layer_pattern))
        self._layouts: dict[str, dict[str, ParameterLayout]] = {}  # by what owns them, then name
        for name, each in whole_layouts(model).items():
            first, second, *_ = name.split(".")
            owner = f"{first}.{second}" if first == "layers" else first
            self._layouts.setdefault(owner, {})[name] = each
        self._found: dict[tuple, Any] = {}

    def layouts(self, parts: Sequence[ModelPart]) -> dict[str, ParameterLayout]:
        """Of those that are on a pipeline rank."""
        owners = [f"layers.{layer}" for part in parts for layer in part.layers]
        owners += ["embedding"] * any(part.is_first for part in parts)
        owners += ["norm", "head"] * any(part.is_last for part in parts)
        return {name: each for owner in owners for name, each in self._layouts[owner].items()}

    def memory(self, config: Config, grid: GridSizes, parts: Sequence[ModelPart]) -> dict[str, int]:
        """As of :meth:`Engine.memory`."""
        return self._once("memory", self._memory, config, grid, parts)

    def work(self, config: Config, grid: GridSizes, parts: Sequence[ModelPart], micro_batches: int) -> RankWork:
        """Of a step of so many micro-batches."""
        return RankWork(parts, *self._once("work", self._work, config, grid, parts, micro_batches))

    def _memory(self, config: Config, grid: GridSizes, parts: Sequence[ModelPart]) -> dict[str, int]:
        return ENGINES[config.engine.name].memory(config, self.layouts(parts), grid, "cuda")

    def _work(self, config: Config, grid: GridSizes, parts: Sequence[ModelPart], micro_batches: int) -> tuple:
        layouts = self.layouts(parts)
        engine = ENGINES[config.engine.name]
        elements = {name: prod(layout.part(grid)) for name, layout in layouts.items()}
        by_gemms = sum(elements[name] for name in elements if ".mlp." in name) if engine.adds_in_gemms else 0
        taken = engine.data_parallelism(config, layouts, grid, "cuda", micro_batches)
        # Of a host that updates the weights no rates are known.
        on_host = self.memory(config, grid, parts).get("moments") == 0
        return sum(elements.values()), by_gemms, taken._replace(updated=0) if on_host else taken

    def _once(
        self, what: str, count: Callable, config: Config, grid: GridSizes, parts: Sequence[ModelPart], *more: int
    ) -> Any:
        # Parameters are sharded over what tp, ep and etp leave of a stage's ranks, whatever cp takes of these.
        axes = grid.size("dp_cp_tp"), grid.tp, grid.ep, grid.etp, grid.pp > 1
        layers = Counter(self._kinds[layer] for part in parts for layer in part.layers)
        ends = any(part.is_first for part in parts), any(part.is_last for part in parts)
        key = what, config.engine.name, axes, tuple(sorted(layers.items())), ends, more
        if key not in self._found:
            self._found[key] = count(config, grid, parts, *more)
        return self._found[key]


def plan_run(config: Config, cluster: Cluster, document_tokens: float, parameters: Parameters | None = None) -> RunPlan:
    """Of the grid that the configuration names.

    Args:
        document_tokens: mean length of documents; those of a packed sequence are no longer than that.
        parameters: of the model, where several plans of it are made.

    Raises:
        ConfigError: when the configuration cannot run on so many GPUs.
    """
    config.check_world_size(cluster.world_size)
    parameters = Parameters(config.model) if parameters is None else parameters
    grid = GridSizes(cluster.world_size, **config.parallel.sizes)
    step = first_step(config)
    document_tokens = min(document_tokens, step.sequence_length)
    tokens = step.micro_batch_size * step.sequence_length // grid.size("cp_tp")
    every, layers = parts_of_ranks(config), config.model.num_layers
    states = [parameters.memory(config, grid, parts) for parts in every]
    # Each rank chooses for the layers on it, by what the one with the least memory has free.
    free = cluster.capacity - max(sum(each.values()) for each in states)
    kinds = [""] * layers
    ranks: list[RankPlan] = []
    for rank, parts in enumerate(every):
        schedule = config.parallel.pp_schedule
        activations, chosen = rank_activations(
            config, grid, parts, rank=rank, schedule=schedule, tokens=tokens, free_bytes=free
        )
        own = [layer for part in parts for layer in part.layers]
        for layer in own:
            kinds[layer] = chosen[layer]
        kept = f"activations ({recomputation_shown([kinds[layer] for layer in own])})"
        memory = states[rank] | {kept: activations.peak(tokens, kinds)}
        ranks.append(RankPlan(tuple(parts), memory, activations))
    micro_batches = step.micro_batches(grid.size("dp"))
    if grid.pp > 1:  # of a grid that is none of the recipe's own, whose batches nobody has looked at
        most = micro_batches // SCHEDULES[config.parallel.pp_schedule].micro_batches
        require(grid.pp <= most, "parallel.pp", grid.pp, f"must be at most {most}, for {micro_batches} micro-batches")
    work = [parameters.work(config, grid, parts, micro_batches) for parts in every]
    return RunPlan(
        config,
        grid,
        step,
        tuple(ranks),
        tuple(kinds),
        free,
        step_cost(config, step, grid, work, kinds, cluster.rates, cluster.links, document_tokens),
        document_tokens,
        cluster,
    )


def rank_activations(
    config: Config,
    grid: GridSizes,
    parts: Sequence[ModelPart],
    *,
    rank: int,
    schedule: str,
    tokens: int,
    free_bytes: int,
) -> tuple[ActivationMemory, Sequence[str]]:
    """The activations of a pipeline rank, and what each layer of the model would compute again there.

    Args:
        parts: the rank's stages.
        schedule: of the stages, whatever the configuration's.
        tokens: of a micro-batch on one rank, between the attentions.
        free_bytes: for activations.
    """
    held, deferred = None, []
    if grid.pp > 1:
        held, deferred = held_layers(schedule, parts, grid.pp, rank, config.model.num_layers)
    memory = ActivationMemory(
        config.model,
        config.engine.compute_dtype("cuda").itemsize,
        tp=grid.tp,
        ep=grid.ep,
        etp=grid.etp,
        attention_is_called=config.engine.calls_attention(grid),
        held=held,
        deferred=deferred,
    )
    return memory, _recomputation(config, memory, tokens, free_bytes)


def _recomputation(config: Config, memory: ActivationMemory, tokens: int, free_bytes: int) -> Sequence[str]:
    """Of each layer of the model, as configured, or the fastest that fits."""
    requested = config.recipe.activation_checkpointing
    if requested == AUTO:
        return choose_recomputation(memory, tokens, free_bytes)
    return [requested] * config.model.num_layers


def first_step(config: Config) -> StepPlan:
    """Of the recipe."""
    recipe = Recipe(config)
    return recipe.within(Progress(), recipe.enter(Progress(), {}))


def _largest_sequence(activations: ActivationMemory, free_bytes: int, grid: GridSizes) -> int:
    """The memory of a sequence grows with its length."""
    unit = 2 * grid.size("cp_tp")  # zigzag halves a rank's part
    recomputed = RECOMPUTATIONS[-1:] * activations.model.num_layers

    def fits(units: int) -> bool:
        return activations.peak(2 * units, recomputed) <= (1 - MARGIN) * free_bytes

    if not fits(1):
        return 0
    units = 1
    while fits(2 * units) and units < 2**40:
        units *= 2
    lower, upper = units, 2 * units
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(middle) else (lower, middle)
    return lower * unit
