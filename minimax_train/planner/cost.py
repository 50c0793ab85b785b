"""How long a training step takes, and what ranks send each other in it: arithmetic from sizes and measured rates.

With pipeline stages the passes of a step are put together by :func:`minimax_train.parallel.pipeline.timeline`, which
runs the schedule's own table with the seconds of every stage.

Per token of a rank a block reads and writes, besides its GEMMs and its attention (``AttentionCost``), so many numbers
in the dtype of compute, forward and backward together, with D the hidden size and K the experts per token:

    norms, residuals, router, and the sums of their gradients       36 D
    permutation to the experts and back                             11 (K + 1) D

They are fitted to whole steps, as the rates are (``machine.py``), and so contain the bandwidth that is not reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from minimax_train.config import Config, ParallelConfig
from minimax_train.engines.engine import DataParallelism, Transfer
from minimax_train.kernels.dispatch import AUTO
from minimax_train.model import ModelPart
from minimax_train.model.config import ModelConfig
from minimax_train.model.memory import RECOMPUTATIONS
from minimax_train.parallel.cost import Line, Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallel.pipeline import BACKWARD, FORWARD, Pass, Table, table, timeline
from minimax_train.planner.machine import (
    DATA_PARALLEL_SHARE,
    GAPS_S,
    HALF_RATE_WIDTH,
    LAUNCH_S,
    MACHINES,
    STAGE_PASSES,
    TILE_ROWS,
    TRANSFER_S,
    Rates,
)
from minimax_train.recipe import StepPlan

_ITEM = 2  # bytes of a number in bfloat16
_BUSY = 0.985  # the share of a step's time in which kernels run
_ALONE = 1.3  # a block that is computed again takes so much longer than in the forward pass
DOCUMENT_TOKENS = 4000
"""Mean length of documents, where nothing is known of it."""
_BACKWARD = 2.5  # the backward pass of an attention that scores tokens, in forward passes


@dataclass(frozen=True)
class Traffic:
    """What a rank receives in a step, for one axis of the grid.

    Attributes:
        num_bytes: in all.
        seconds: by which the step is longer.
    """

    num_bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.num_bytes + other.num_bytes, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.num_bytes * times, self.seconds * times)


@dataclass(frozen=True)
class StepCost:
    """A step on any rank, of several pipeline ranks the one that computes and communicates longest; routing in balance.

    Attributes:
        compute_s: seconds by what computes.
        traffic: by axis of the grid, those on which anything is sent.
        bubble_s: seconds in which it waits for other pipeline stages.
    """

    compute_s: dict[str, float]
    traffic: dict[str, Traffic]
    bubble_s: float = 0.0

    @property
    def work_s(self) -> float:
        """All but the bubble."""
        traffic_s = sum(part.seconds for part in self.traffic.values())
        return sum(self.compute_s.values()) + self.gaps_s + traffic_s

    @property
    def gaps_s(self) -> float:
        """In which nothing runs, beyond the gaps that are counted among what computes."""
        return sum(self.compute_s.values()) * (1 / _BUSY - 1)

    @property
    def seconds(self) -> float:
        return self.work_s + self.bubble_s


@dataclass(frozen=True)
class RankWork:
    """What is on one pipeline rank.

    Attributes:
        parts: its stages, in the order of the model.
        elements: of the parameters that a rank of these holds.
        added_by_gemms: of these, those whose gradients the GEMMs that make them add up.
        engine: what data parallelism and the optimizer take.
    """

    parts: Sequence[ModelPart]
    elements: int
    added_by_gemms: int
    engine: DataParallelism


def step_cost(
    config: Config,
    plan: StepPlan,
    grid: GridSizes,
    ranks: Sequence[RankWork],
    recomputation: Sequence[str],
    rates: Rates,
    cluster: Machine,
    document_tokens: float,
) -> StepCost:
    """Of one step.

    Args:
        ranks: by their place on the axis pp.
        recomputation: of each layer of the model: ``none``, ``selective`` or ``full``.
        document_tokens: mean length of the documents.

    Raises:
        ValueError: when the micro-batches do not make up the global batch.
    """
    number = plan.micro_batches(grid.size("dp"))
    tokens = plan.micro_batch_size * plan.sequence_length // grid.size("cp_tp")
    orders = pipeline_table(config.parallel, number)
    rank_of = {one.stage: rank for rank, order in enumerate(orders) for one in order}
    kinds, last = {one.kind for order in orders for one in order}, len(rank_of) - 1
    handed_on = tokens * config.model.hidden_size * _ITEM
    # A stage's ranks follow each other, so that those of the next one are on another node unless one has them all.
    transfer = Traffic(handed_on, cluster.link(grid.world_size).send_receive.seconds(handed_on))
    costs: list[StepCost] = []
    tails: list[float] = []  # seconds of a rank after its last pass
    seconds: dict[tuple[str, int], float] = {}  # of a pass
    for rank, work in enumerate(ranks):
        stages = sorted(stage for stage, owner in rank_of.items() if owner == rank)
        compute: dict[str, float] = {}
        traffic: dict[str, Traffic] = {}
        sums = gradient_sums_seconds(work, number, rates)
        for stage, part in zip(stages, work.parts, strict=True):
            passes = _passes(config.model, part, grid, tokens, recomputation, rates, document_tokens)
            if len(ranks) > 1:
                passes["stages by themselves"] = (STAGE_PASSES - 1) * sum(passes.values())
            layers = _layer_traffic(config.model, part, grid, tokens, plan.micro_batch_size, recomputation, cluster)
            # From the stage before in the forward pass, from the one after in the backward pass.
            given = {FORWARD: stage > 0 and rank_of[stage - 1] != rank, BACKWARD: stage < last}
            given[BACKWARD] = given[BACKWARD] and rank_of[stage + 1] != rank
            if received := sum(given.values()):
                layers["pp"] = transfer * received
            device = StepCost(passes, layers).seconds
            passes["waiting for the host"] = max(0.0, host_seconds(config, grid, part, recomputation) - device) * _BUSY
            for what, time in passes.items():
                compute[what] = compute.get(what, 0.0) + time * number
            for axis, sent in layers.items():
                traffic[axis] = traffic.get(axis, Traffic()) + sent * number
            again = sum(recomputation[layer] == "full" for layer in part.layers)
            forward = (sum(passes.values()) - passes["recomputation"]) / 3 / _BUSY
            backward = sum(passes.values()) / _BUSY - forward + sums / len(stages) / number / _BUSY
            for axis, sent in layers.items():
                share = len(part.layers) / (2 * len(part.layers) + again)
                share = share if axis != "pp" else given[FORWARD] / sum(given.values())
                forward, backward = forward + share * sent.seconds, backward + (1 - share) * sent.seconds
            for kind in kinds:
                seconds[kind, stage] = forward if kind == FORWARD else backward / (len(kinds) - 1)
        of_passes = StepCost(compute | {"sums of gradients": sums}, dict(traffic)).work_s
        compute["sums of gradients"] = sums
        compute["optimizer"] = 34 * work.engine.updated / rates.copy_bytes_per_s
        if work.engine.transfers:
            traffic["dp"] = data_parallel_traffic(work.engine.transfers, cluster)
        costs.append(StepCost(compute, traffic))
        tails.append(costs[-1].work_s - of_passes)
    longest = max(costs, key=lambda cost: cost.work_s)
    if len(ranks) == 1:
        return longest
    whole = passes_seconds(config.parallel, number, lambda one: seconds[one.kind, one.stage]) + max(tails)
    return replace(longest, bubble_s=whole - longest.work_s)


def host_seconds(config: Config, grid: GridSizes, part: ModelPart, recomputation: Sequence[str]) -> float:
    """To launch a micro-batch's passes through a part of the model; 0 where a CUDA graph of them is replayed."""
    engine: Any = config.engine
    taken = LAUNCH_S["launches"]
    if engine.name == "zero1" and engine.captures(grid, [recomputation[layer] for layer in part.layers]):
        return 0.0
    if engine.name == "fsdp" and engine.reshards(grid):
        taken += LAUNCH_S["gathers"]
    elif engine.name == "deepspeed" and engine.zero()["stage"] >= 2:
        taken += LAUNCH_S["reductions"]
    again = sum(recomputation[layer] == "full" for layer in part.layers)
    return taken * (len(part.layers) + again / 3)


def equal_stages_seconds(parallel: ParallelConfig, micro_batches: int, seconds: float) -> float:
    """:func:`passes_seconds` of a model of equal stages, forward and backward pass of all of which take so long for one
    micro-batch; the backward passes twice as long as the forward passes, transfers no time."""
    if parallel.pp == 1:
        return micro_batches * seconds
    kinds = {one.kind for order in pipeline_table(parallel, 2 * parallel.pp) for one in order}
    of_stage = seconds / (parallel.pp * parallel.stages_of_rank)
    shares = {kind: 1 / 3 if kind == FORWARD else 2 / 3 / (len(kinds) - 1) for kind in kinds}
    return passes_seconds(parallel, micro_batches, lambda one: shares[one.kind] * of_stage)


def pipeline_table(parallel: ParallelConfig, micro_batches: int) -> Table:
    """The passes of each pipeline rank, by the schedule of the configuration; one stage on one rank without any."""
    if parallel.pp == 1:
        return _table("1f1b", 1, 1, micro_batches)
    return _table(parallel.pp_schedule, parallel.pp, parallel.stages_of_rank, micro_batches)


_table = lru_cache(64)(table)


def passes_seconds(parallel: ParallelConfig, micro_batches: int, seconds: Callable[[Pass], float]) -> float:
    """From a step's first pass to its last.

    Of many micro-batches some are simulated: every other one takes as long as the slowest rank's passes of it.
    """
    ranks = parallel.pp
    simulated = micro_batches
    if micro_batches >= 4 * ranks:
        simulated = 3 * ranks + micro_batches % ranks
    orders = pipeline_table(parallel, simulated)
    end = max(one.end for rank in timeline(orders, seconds) for one in rank)
    slowest = max(sum(map(seconds, order)) for order in orders) / simulated
    return end + (micro_batches - simulated) * slowest


def micro_batch_seconds(
    model: ModelConfig,
    parts: Sequence[ModelPart],
    grid: GridSizes,
    plan: StepPlan,
    recomputation: Sequence[str],
    rates: Rates,
    cluster: Machine,
    document_tokens: float,
) -> float:
    """Of one micro-batch through parts of the model, forward and backward; arguments as of :func:`step_cost`."""
    tokens, found = plan.micro_batch_size * plan.sequence_length // grid.size("cp_tp"), 0.0
    for part in parts:
        passes = _passes(model, part, grid, tokens, recomputation, rates, document_tokens)
        traffic = _layer_traffic(model, part, grid, tokens, plan.micro_batch_size, recomputation, cluster)
        found += StepCost(passes, traffic).seconds
    return found


def gradient_sums_seconds(work: RankWork, micro_batches: int, rates: Rates) -> float:
    """Of a step on a rank: the first micro-batch's gradients are copied to float32, the others' added.

    quack's GEMMs write or add float32 instead of writing bfloat16, which takes as long as copying 2.3 and 3.4 bytes a
    parameter (docs/performance.md); of other GEMMs the planner has no rates.
    """
    later, copied = micro_batches - 1, work.elements - work.added_by_gemms
    return ((6 + 10 * later) * copied + (2.3 + 3.4 * later) * work.added_by_gemms) / rates.copy_bytes_per_s


def data_parallel_traffic(transfers: Sequence[Transfer], cluster: Machine) -> Traffic:
    """Of a step."""
    found = Traffic()
    for span, times, num_bytes in transfers:
        taken = times * cluster.link(span).all_gather.seconds(num_bytes)
        found += Traffic(times * num_bytes, DATA_PARALLEL_SHARE * taken)
    return found


@dataclass(frozen=True)
class StageCosts:
    """Seconds of what pipeline stages are made of, forward and backward, for one micro-batch.

    Attributes:
        layers: of each.
        embedding, head: the latter with norm and loss.
    """

    layers: list[float]
    embedding: float
    head: float

    def of(self, part: ModelPart) -> float:
        """Of a stage."""
        ends = self.embedding * part.is_first + self.head * part.is_last
        return ends + sum(self.layers[layer] for layer in part.layers)


def stage_costs(config: Config) -> StageCosts:
    """By the rates of an H100; of documents of :data:`DOCUMENT_TOKENS`, or as long as a packed sequence."""
    parallel, model, rates = config.parallel, config.model, MACHINES["h100"]
    grid = GridSizes(prod(parallel.sizes.values()), **parallel.sizes)
    tokens = config.recipe.micro_batch_size * config.data.sequence_length // grid.size("cp_tp")
    recomputation, length = config.recipe.activation_checkpointing, min(DOCUMENT_TOKENS, config.data.sequence_length)
    recomputation = RECOMPUTATIONS[0] if recomputation == AUTO else recomputation
    D, experts = model.hidden_size, 3 * model.num_experts * model.expert_hidden_size // (grid.ep * grid.etp)
    head, by_letter = 0.0, dict[str, float]()

    def summed(parameters: float) -> float:
        """Gradients added to those of the micro-batches before."""
        return 10 * parameters / rates.copy_bytes_per_s

    for kind in set(model.attentions):
        one = replace(model, num_layers=1, layer_pattern=kind.letter)
        seconds = _passes(one, ModelPart(range(1)), grid, tokens, [recomputation], rates, length)
        head = seconds.pop("head and loss") + summed(model.vocab_size // grid.tp * D)
        by_letter[kind.letter] = sum(seconds.values()) + summed(kind.parameters(model) / grid.tp + D * experts)
    # The gradient of the whole matrix is written as zeros before rows are added to it.
    matrix = model.vocab_size // grid.tp * D
    embedding = _ITEM * (6 * tokens * D + matrix) / rates.copy_bytes_per_s + summed(matrix)
    return StageCosts([by_letter[kind.letter] for kind in model.attentions], embedding, head)


def _passes(
    model: ModelConfig,
    part: ModelPart,
    grid: GridSizes,
    tokens: int,
    recomputation: Sequence[str],
    rates: Rates,
    document_tokens: float,
) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward pass through a part of the model, by what computes."""
    D, K, F, W = model.hidden_size, model.experts_per_token, model.expert_hidden_size, model.num_heads * model.head_dim

    def gemm(flops: float, rate: float, width: float) -> float:
        return flops * tokens * (width + HALF_RATE_WIDTH) / (width * rate)

    def moved(numbers: float) -> float:
        return numbers * tokens * _ITEM / rates.copy_bytes_per_s

    head = gemm(2 * model.vocab_size * D, rates.dense_flops_per_s, min(D, model.vocab_size / grid.tp))
    # Of a layer; only attention and projections differ between layers.
    rows = tokens * grid.ep * grid.etp * K / model.num_experts  # of an expert here
    experts = gemm(6 * K * D * F, rates.expert_flops_per_s, min(D, F / grid.etp)) * (1 + TILE_ROWS / 2 / rows)
    small = moved((36 + 11 * (K + 1)) * D)
    dense = again = 0.0
    attention: dict[str, float] = {}  # all but the projections, by kind
    layers, attentions = len(part.layers), model.attentions
    for (kind, how), times in Counter((attentions[layer], recomputation[layer]) for layer in part.layers).items():
        own_dense = gemm(2 * kind.parameters(model), rates.dense_flops_per_s, min(D, W / grid.tp))
        own_moved = moved(kind.cost(model).moved)
        own_scores = 0.0
        if not own_moved:
            flops = kind.flops(model, (document_tokens + 1) / 2) - 2 * kind.parameters(model)
            own_scores = flops * tokens / rates.attention_flops_per_s
        dense, row = dense + times * own_dense, f"{kind.name} attention"
        attention[row] = attention.get(row, 0.0) + times * (own_moved + (1 + _BACKWARD) * own_scores)
        if how == "selective":
            # SiLU and gate are computed again from what is read, and written: twice what the backward pass reads.
            again += times * moved(2 * kind.activations(model).cheap + 5 * D)
        elif how == "full":
            again += times * _ALONE * (experts + own_dense + own_scores + (small + own_moved) / 3)
    return {
        "experts": 3 * layers * experts,
        "projections": 3 * dense,
        "head and loss": part.is_last * (3 * head + moved(6 * model.vocab_size)),
        **attention,
        "norms, residuals, permutation": layers * small,
        "gaps between kernels": layers * GAPS_S,
        "recomputation": again,
    }


def _layer_traffic(
    model: ModelConfig,
    part: ModelPart,
    grid: GridSizes,
    tokens: int,
    sequences: int,
    recomputation: Sequence[str],
    cluster: Machine,
) -> dict[str, Traffic]:
    """Of one micro-batch, forward and backward pass through a part of the model, by axis."""
    x = tokens * model.hidden_size * _ITEM  # the residual stream on a rank
    attentions = model.attentions
    counts = Counter((attentions[layer], recomputation[layer]) for layer in part.layers)
    # A layer's passes whose transfers are the forward pass's: as many again where all is computed again.
    layers = sum(times * (3 if how == "full" else 2) for (_, how), times in counts.items())
    found: dict[str, Traffic] = {}

    def add(axis: str, count: float, num_bytes: float, line: Line, share: float = 1.0) -> None:
        one = Traffic(num_bytes, line.seconds(num_bytes) + TRANSFER_S[axis] * share)
        found[axis] = found.get(axis, Traffic()) + one * count

    if (tp := grid.tp) > 1:
        # Gathered before each attention, reduced and scattered after it; likewise embedding and head, once.
        count = 2 * layers + 2 * part.is_first + 2 * part.is_last
        add("tp", count, (tp - 1) * x, cluster.link(tp).all_gather)
    arriving = x * model.experts_per_token if grid.ep > 1 else x
    to_experts_and_back = 2 * layers
    if (ep := grid.ep) > 1:
        others = (ep - 1) / ep  # tokens that stay are computed while these travel
        add("ep", to_experts_and_back, arriving * others, cluster.link(ep * grid.etp).send_receive, others)
    if (etp := grid.etp) > 1:
        add("etp", to_experts_and_back, (etp - 1) * arriving, cluster.link(etp).all_gather)
    if (cp := grid.cp) > 1:
        line = cluster.link(cp * tp).all_gather
        for (kind, how), times in counts.items():
            num_bytes = _ITEM * kind.cost(model).exchanged(tokens * tp, sequences) / tp
            # The backward pass brings them again, and takes their gradients back.
            add("cp", times * (4 if how == "full" else 3), (cp - 1) * num_bytes, line)
    return found
