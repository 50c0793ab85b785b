"""A run's memory and speed on a number of GPUs, and the grids that suit it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm

from minimax_train.config import Config, config_on
from minimax_train.engines import ENGINES
from minimax_train.errors import ConfigError
from minimax_train.kernels.dispatch import AUTO
from minimax_train.metrics.flops import training_flops
from minimax_train.model.memory import (
    MARGIN,
    RECOMPUTATIONS,
    ActivationMemory,
    choose_recomputation,
    recomputation_shown,
)
from minimax_train.model.sharding import ParameterLayout
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.grid import GridSizes, divisors
from minimax_train.parallelize import whole_layouts
from minimax_train.planner.cost import StepCost, step_cost
from minimax_train.planner.machine import OVERHEAD_BYTES, Rates
from minimax_train.recipe import Progress, Recipe, StepPlan


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


@dataclass(frozen=True)
class RunPlan:
    """What a run takes on every GPU, in the first step of its recipe.

    Attributes:
        memory: bytes by what they are for; most of it at the same time, as PyTorch's allocator counts it.
        recomputation: of each layer, as configured, or the fastest that fits.
        largest_sequence: tokens of the longest packed sequence that fits, one in a micro-batch, blocks recomputed; 0 if
            none does.
        document_tokens: mean length of documents that was assumed.
    """

    config: Config
    grid: GridSizes
    step: StepPlan
    memory: dict[str, int]
    recomputation: tuple[str, ...]
    cost: StepCost
    largest_sequence: int
    document_tokens: float
    cluster: Cluster

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.cluster.rates.memory_bytes - OVERHEAD_BYTES

    @property
    def tokens_per_s(self) -> float:
        return self.step.tokens / self.cost.seconds

    @property
    def mfu(self) -> float:
        tokens = self.step.tokens
        flops = training_flops(self.config.model, tokens, tokens * (self.document_tokens + 1) / 2)
        return flops / self.cost.seconds / (self.grid.world_size * self.cluster.rates.peak_flops_per_s)


def plan_run(
    config: Config, cluster: Cluster, document_tokens: float, layouts: Mapping[str, ParameterLayout] | None = None
) -> RunPlan:
    """Of the grid that the configuration names.

    Args:
        document_tokens: mean length of documents; those of a packed sequence are no longer than that.

    Raises:
        ConfigError: when the configuration cannot run on so many GPUs.
    """
    config.check_world_size(cluster.world_size)
    layouts = whole_layouts(config.model) if layouts is None else layouts
    grid = GridSizes(cluster.world_size, **config.parallel.sizes)
    recipe = Recipe(config)
    step = recipe.within(Progress(), recipe.enter(Progress(), {}))
    document_tokens = min(document_tokens, step.sequence_length)
    states = ENGINES[config.engine.name].memory(config, layouts, grid, "cuda")
    activations = ActivationMemory(
        config.model, config.engine.compute_dtype("cuda").itemsize, tp=grid.tp, ep=grid.ep, etp=grid.etp
    )
    free = int(cluster.rates.memory_bytes - OVERHEAD_BYTES) - sum(states.values())
    tokens = step.micro_batch_size * step.sequence_length // grid.size("cp_tp")
    kinds = (config.recipe.activation_checkpointing,) * config.model.num_layers
    if config.recipe.activation_checkpointing == AUTO:
        kinds = choose_recomputation(activations, tokens, free)
    return RunPlan(
        config,
        grid,
        step,
        {**states, f"activations ({recomputation_shown(kinds)})": activations.peak(tokens, kinds)},
        kinds,
        step_cost(config, step, grid, layouts, kinds, cluster.rates, cluster.links, document_tokens),
        _largest_sequence(activations, free, grid),
        document_tokens,
        cluster,
    )


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


def propose(
    config: Config, cluster: Cluster, document_tokens: float, micro_batches: int | None = None
) -> list[RunPlan]:
    """Plans of all grids that the model can be split over and that fit, the fastest first.

    Axes are divisors of the number of GPUs. ``data.num_streams`` follows data parallelism. All other settings are the
    configuration's.

    Args:
        micro_batches: on each data-parallel rank, whatever global batch that makes; None for the configuration's.

    Raises:
        ConfigError: when none can run, with the reason of one; or none fits, naming the one that takes least.
    """
    layouts, engine = whole_layouts(config.model), ENGINES[config.engine.name]
    capacity = cluster.rates.memory_bytes - OVERHEAD_BYTES
    plans: list[RunPlan] = []
    refused: ConfigError | None = None
    least, least_taken = "", float("inf")
    for cp, tp, ep, etp in _grids(config, cluster.world_size):
        parallel = dataclasses.replace(config.parallel, token_groups=1, cp=cp, tp=tp, ep=ep, etp=etp)
        taken = sum(engine.memory(config, layouts, GridSizes(cluster.world_size, cp, tp, ep, etp), "cuda").values())
        if taken <= capacity:
            dp, recipe = cluster.world_size // (cp * tp), config.recipe
            data = dataclasses.replace(config.data, num_streams=lcm(config.data.num_streams, dp))
            if micro_batches is not None:
                batch = micro_batches * recipe.micro_batch_size * dp
                recipe = dataclasses.replace(recipe, global_batch_size=batch)
            try:
                candidate = dataclasses.replace(config, data=data, recipe=recipe)
                plan = plan_run(config_on(candidate, parallel), cluster, document_tokens, layouts)
            except ConfigError as error:
                refused = refused or error
                continue
            taken = plan.memory_bytes
            if plan.fits:
                plans.append(plan)
        if taken < least_taken:
            least, least_taken = parallel.shown, taken
    if plans:
        return sorted(plans, key=lambda plan: -plan.tokens_per_s)
    if refused is not None:
        raise refused
    raise ConfigError(
        f"world_size={cluster.world_size}: no grid fits: {least} takes least, {least_taken / 2**30:.1f} GiB of "
        f"{cluster.rates.memory_bytes / 2**30:.1f} on every GPU"
    )


def _grids(config: Config, world_size: int) -> Iterator[tuple[int, int, int, int]]:
    """cp, tp, ep and etp that the model's own sizes allow: expert parallelism as wide as the cluster, tp and etp as a
    node's eight GPUs, which is as far as they pay."""
    model, few = config.model, [n for n in divisors(world_size) if n <= 8]
    heads = [n for n in few if model.num_heads % n == model.num_kv_heads % n == model.vocab_size % n == 0]
    shares = [n for n in few if model.expert_hidden_size % n == 0]
    experts = [n for n in divisors(world_size) if model.num_experts % n == 0]
    for cp, tp, ep, etp in itertools.product(divisors(world_size), heads, experts, shares):
        if world_size % (cp * tp) == 0 == world_size % (ep * etp) and cp <= 64:
            yield cp, tp, ep, etp


def overrides_of(plan: RunPlan, config: Config) -> str:
    """What to pass to ``minimax-train`` besides what the configuration says."""
    own = plan.config
    found = [f"parallel.{axis}={size}" for axis, size in own.parallel.sizes.items() if size > 1]
    if own.data.num_streams != config.data.num_streams:
        found.append(f"data.num_streams={own.data.num_streams}")
    if own.recipe.global_batch_size != config.recipe.global_batch_size:
        found.append(f"recipe.global_batch_size={own.recipe.global_batch_size}")
    return " ".join(found)
