"""How long a training step takes, and what ranks send each other in it: arithmetic from sizes and measured rates.

Per token of a rank a block reads and writes, besides its GEMMs and its attention (``AttentionCost``), so many numbers
in the dtype of compute, forward and backward together, with D the hidden size and K the experts per token:

    norms, residuals, router, and the sums of their gradients       53 D
    permutation to the experts and back                             11 (K + 1) D

They are fitted to whole steps, as the rates are (``machine.py``), and so contain the bandwidth that is not reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from minimax_train.config import Config
from minimax_train.engines import ENGINES
from minimax_train.kernels.dispatch import AUTO
from minimax_train.model.config import ModelConfig
from minimax_train.model.memory import RECOMPUTATIONS
from minimax_train.model.sharding import ParameterLayout
from minimax_train.parallel.cost import Line, Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.planner.machine import DATA_PARALLEL_SHARE, HALF_RATE_WIDTH, MACHINES, TRANSFER_S, Rates
from minimax_train.recipe import StepPlan

_ITEM = 2  # bytes of a number in bfloat16
_BUSY = 0.985  # the share of a step's time in which kernels run
_ALONE = 1.3  # a block that is computed again takes so much longer than in the forward pass
DOCUMENT_TOKENS = 4000
"""Mean length of documents, where nothing is known of it."""
_BACKWARD = 2.5  # softmax attention's backward pass, in forward passes


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
    """A step on any rank, routing in balance.

    Attributes:
        compute_s: seconds by what computes.
        traffic: by axis of the grid, those on which anything is sent.
    """

    compute_s: dict[str, float]
    traffic: dict[str, Traffic]

    @property
    def seconds(self) -> float:
        return sum(self.compute_s.values()) / _BUSY + sum(part.seconds for part in self.traffic.values())


def step_cost(
    config: Config,
    plan: StepPlan,
    grid: GridSizes,
    layouts: Mapping[str, ParameterLayout],
    recomputation: Sequence[str],
    rates: Rates,
    cluster: Machine,
    document_tokens: float,
) -> StepCost:
    """Of one step.

    Args:
        layouts: of all parameters.
        recomputation: of each layer: ``none``, ``selective`` or ``full``.
        document_tokens: mean length of the documents.

    Raises:
        ValueError: when the micro-batches do not make up the global batch.
    """
    micro_batches = plan.micro_batches(grid.size("dp"))
    tokens = plan.micro_batch_size * plan.sequence_length // grid.size("cp_tp")
    passes = _passes(config.model, grid, tokens, recomputation, rates, document_tokens)
    compute = {what: seconds * micro_batches for what, seconds in passes.items()}
    held = sum(prod(layout.part(grid)) for layout in layouts.values())
    of_engine = ENGINES[config.engine.name].data_parallelism(config, layouts, grid, "cuda", micro_batches)
    # The first micro-batch's gradients are copied to float32, the others' added.
    compute["sums of gradients"] = (6 + 10 * (micro_batches - 1)) * held / rates.copy_bytes_per_s
    compute["optimizer"] = 34 * of_engine.updated / rates.copy_bytes_per_s
    layers = _layer_traffic(config.model, grid, tokens, plan.micro_batch_size, recomputation, cluster)
    traffic = {axis: part * micro_batches for axis, part in layers.items()}
    for span, times, num_bytes in of_engine.transfers:
        seconds = times * cluster.link(span).all_gather.seconds(num_bytes)
        traffic["dp"] = traffic.get("dp", Traffic()) + Traffic(times * num_bytes, DATA_PARALLEL_SHARE * seconds)
    return StepCost(compute, traffic)


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
        seconds = _passes(one, grid, tokens, [recomputation], rates, length)
        head = seconds.pop("head and loss") + summed(model.vocab_size // grid.tp * D)
        by_letter[kind.letter] = sum(seconds.values()) + summed(kind.parameters(model) / grid.tp + D * experts)
    # The gradient of the whole matrix is written as zeros before rows are added to it.
    matrix = model.vocab_size // grid.tp * D
    embedding = _ITEM * (6 * tokens * D + matrix) / rates.copy_bytes_per_s + summed(matrix)
    return StageCosts([by_letter[kind.letter] for kind in model.attentions], embedding, head)


def _passes(
    model: ModelConfig,
    grid: GridSizes,
    tokens: int,
    recomputation: Sequence[str],
    rates: Rates,
    document_tokens: float,
) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward pass, by what computes."""
    D, K, F, W = model.hidden_size, model.experts_per_token, model.expert_hidden_size, model.num_heads * model.head_dim

    def gemm(flops: float, rate: float, width: float) -> float:
        return flops * tokens * (width + HALF_RATE_WIDTH) / (width * rate)

    def moved(numbers: float) -> float:
        return numbers * tokens * _ITEM / rates.copy_bytes_per_s

    head = gemm(2 * model.vocab_size * D, rates.dense_flops_per_s, min(D, model.vocab_size / grid.tp))
    # Of a layer; only attention and projections differ between layers.
    experts = gemm(6 * K * D * F, rates.expert_flops_per_s, min(D, F / grid.etp))
    small = moved((53 + 11 * (K + 1)) * D)
    dense = scores = attention = again = 0.0
    for kind, how in zip(model.attentions, recomputation, strict=True):
        own_dense = gemm(2 * kind.parameters(model), rates.dense_flops_per_s, min(D, W / grid.tp))
        own_attention = moved(kind.cost(model).moved)
        own_scores = 0.0
        if not own_attention:
            flops = kind.flops(model, (document_tokens + 1) / 2) - 2 * kind.parameters(model)
            own_scores = flops * tokens / rates.attention_flops_per_s
        dense, attention, scores = dense + own_dense, attention + own_attention, scores + own_scores
        if how == "selective":
            # SiLU and gate are computed again from what is read, and written: twice what the backward pass reads.
            again += moved(2 * kind.activations(model).cheap + 5 * D)
        elif how == "full":
            again += _ALONE * (experts + own_dense + own_scores + (small + own_attention) / 3)
    return {
        "experts": 3 * model.num_layers * experts,
        "projections": 3 * dense,
        "head and loss": 3 * head + moved(6 * model.vocab_size),
        "softmax attention": (1 + _BACKWARD) * scores,
        "lightning attention, SiLU, gate": attention,
        "norms, residuals, permutation": model.num_layers * small,
        "recomputation": again,
    }


def _layer_traffic(
    model: ModelConfig, grid: GridSizes, tokens: int, sequences: int, recomputation: Sequence[str], cluster: Machine
) -> dict[str, Traffic]:
    """Of one micro-batch, forward and backward pass, by axis."""
    x = tokens * model.hidden_size * _ITEM  # the residual stream on a rank
    # A layer's passes whose transfers are the forward pass's: as many again where all is computed again.
    layers = 2 * model.num_layers + sum(kind == "full" for kind in recomputation)
    found: dict[str, Traffic] = {}

    def add(axis: str, count: float, num_bytes: float, line: Line) -> None:
        one = Traffic(num_bytes, line.seconds(num_bytes) + TRANSFER_S[axis])
        found[axis] = found.get(axis, Traffic()) + one * count

    if (tp := grid.tp) > 1:
        # Gathered before each attention, reduced and scattered after it; likewise embedding and head, once.
        count = 2 * layers + 4
        add("tp", count, (tp - 1) * x, cluster.link(tp).all_gather)
    arriving = x * model.experts_per_token if grid.ep > 1 else x
    to_experts_and_back = 2 * layers
    if (ep := grid.ep) > 1:
        add("ep", to_experts_and_back, arriving * (ep - 1) / ep, cluster.link(ep * grid.etp).send_receive)
    if (etp := grid.etp) > 1:
        add("etp", to_experts_and_back, (etp - 1) * arriving, cluster.link(etp).all_gather)
    if (cp := grid.cp) > 1:
        line = cluster.link(cp * tp).all_gather
        for kind, how in zip(model.attentions, recomputation, strict=True):
            num_bytes = _ITEM * kind.cost(model).exchanged(tokens * tp, sequences) / tp
            # The backward pass brings them again, and takes their gradients back.
            add("cp", 4 if how == "full" else 3, (cp - 1) * num_bytes, line)
    return found
