"""Micro-batches recorded and replayed, with a stand-in for CUDA graphs on the host: the same steps as without.

Ranks record and replay at different times, as their documents have it, and each replay has another micro-batch.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from minimax_train import parallelize
from minimax_train.capture import Recording, uncaptured
from minimax_train.kernels.experts import expert_mlp
from minimax_train.model.sharding import local
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.host_graphs import HostRecording, record_on_host
from support.runs import UNSTAGED, tiny_run, weights_of

# Steps of several micro-batches, then of one on two data-parallel ranks, of another length and RoPE base.
RUN = ["engine=zero1", "engine.precision=float64", "model.aux_loss_coefficient=0.5", "model.capacity_factor=0.9"]
RUN += ["model.num_experts=6", "recipe.activation_checkpointing=selective", "data.num_streams=4", *UNSTAGED]
RUN += ["data.sequence_length=96", "recipe.global_batch_size=4", "recipe.stages.short.steps=4"]
RUN += ["recipe.stages.long.steps=4", "recipe.stages.long.sequence_length=160", "recipe.stages.long.rope_base=50"]
RUN += ["recipe.stages.long.global_batch_size=2", "recipe.warmup_steps=0", "recipe.learning_rate=1e-2"]


def _experts_called(grid):
    """Where experts are on one rank: for the host they ask for the tokens of each, which no graph can."""
    if grid.size("ep") == 1:
        experts = uncaptured(expert_mlp)
        parallelize.expert_layer = lambda *_: experts


def _run(grid, config, in_graphs, sums_in_graph=False):
    """What steps, evaluations, a return to an earlier state and a diagnosis find; weights; of each step how many
    recordings were made and replayed; how many pieces of memory replays read that were freed."""
    if in_graphs:
        _experts_called(grid)
    trainer = Trainer(config, grid, torch.device("cpu"))
    engine, every = trainer.engine, HostRecording.every
    if in_graphs:
        record_on_host(engine)
        engine._reducing._in_graph = sums_in_graph
    found, made = [], []
    while not trainer.is_over:
        before = len(every), sum(x.replays for x in every)
        taken = trainer.train_step()
        trainer.guard.check()
        found.append((float(taken.totals.loss), float(taken.report.gradient_norm)))
        made.append((len(every) - before[0], sum(x.replays for x in every) - before[1]))
        assert not engine._gathering._under_way and not engine._reducing._under_way
        if taken.number in (2, 6):  # which takes over new weights, before the step does
            found.append(trainer.evaluate(trainer.plan())["validation_loss"])
        if taken.number == 3:
            state = tree_map_only(torch.Tensor, lambda x: local(x).detach().clone(), engine.snapshot())
        if taken.number == 5:
            for x, old in zip(tree_leaves(engine.snapshot()), tree_leaves(state), strict=True):
                local(x).data.copy_(old)
            engine.go_back(engine.snapshot(), 2)
        if taken.number == 7:
            found.append(engine.diagnose(trainer.next_batches(taken.plan), taken.plan))
    assert not engine.notes
    return found, weights_of(trainer), made, sum(x.freed() for x in every)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    (found,) = run_ranks(_run, 1, tiny_run(tmp_path_factory.mktemp("one"), *RUN), False)
    return found


@pytest.mark.parametrize(
    ("world", "axes", "sums_in_graph"),
    [
        (2, {"cp": 2}, False),
        (4, {"cp": 2, "ep": 2}, False),
        (4, {"cp": 2, "ep": 2}, True),  # as where nothing is called between graphs
        (4, {"cp": 2, "tp": 2, "ep": 2}, False),
    ],
    ids=str,
)
def test_replays_compute_what_the_kernels_would(expected, tmp_path, world, axes, sums_in_graph):
    config = tiny_run(tmp_path, *RUN, *(f"parallel.{axis}={size}" for axis, size in axes.items()))
    results = run_ranks(_run, world, config, True, sums_in_graph, **axes)
    for found, weights, _, freed in results:
        assert len(found) == len(expected[0]) and not freed
        for own, right in zip(found, expected[0], strict=True):
            assert own == (right if isinstance(right, str) else pytest.approx(right, rel=1e-9))
        for name, value in expected[1].items():
            assert relative_error(weights[name], value) < 1e-8, name
    by_step = list(zip(*(made for _, _, made, _ in results), strict=True))
    assert any(len(set(made)) > 1 for made in by_step), "some ranks record while others replay"


def _until_recomputed(grid, config):
    _experts_called(grid)
    trainer = Trainer(config, grid, torch.device("cpu"))
    engine = trainer.engine
    record_on_host(engine)
    held = []
    for kind in ("selective", "selective", "full", "full"):
        engine._recomputation.kinds = lambda _, kind=kind: (kind,) * 4
        trainer.train_step()
        held.append(len(engine._graphs._recordings) + len(engine._graphs._tensors))
    return held, engine.notes


def test_graphs_are_let_go_where_blocks_are_computed_again(tmp_path):
    """They hold the memory of an earlier stage's activations."""
    for held, notes in run_ranks(_until_recomputed, 2, tiny_run(tmp_path, *RUN, "parallel.cp=2"), cp=2):
        assert min(held[:2]) > 3 and held[2:] == [0, 0]
        assert len(notes) == 1 and "computed again (full)" in notes[0]


class _Refusing(torch.autograd.Function):
    """Fails while it is captured: in its forward or its backward pass."""

    @staticmethod
    def forward(ctx, x, fails_in):
        ctx.fails_in = fails_in
        _refuse(fails_in == "forward")
        return x.clone()

    @staticmethod
    def backward(ctx, d):
        _refuse(ctx.fails_in == "backward")
        return d, None


def _refuse(fails):
    if fails and Recording.current is not None and not Recording.current.is_calling:
        raise RuntimeError("not permitted when capturing")


def _refused(grid, config, in_graphs, fails_in):
    """Losses and gradient norms of two steps with experts that cannot be captured, or fail when they are called."""

    def experts(*inputs, **options):
        if fails_in == "call" and Recording.current is not None:
            raise RuntimeError("lost a rank")
        return expert_mlp(*inputs, **options)

    called = uncaptured(experts)
    parallelize.expert_layer = lambda *_: (
        lambda x, *more, **options: called(_Refusing.apply(x, fails_in), *more, **options)
    )
    trainer = Trainer(config, grid, torch.device("cpu"))
    if in_graphs:
        record_on_host(trainer.engine)
    taken = [trainer.train_step() for _ in range(2)]
    return [(float(x.totals.loss), float(x.report.gradient_norm)) for x in taken], trainer.engine.notes


def test_what_cannot_be_captured_runs_without(tmp_path):
    """Also where calls have been made before, but not where gradients may have been added up."""
    config = tiny_run(tmp_path, *RUN, "parallel.cp=2")
    plain = run_ranks(_refused, 2, config, False, "", cp=2)
    for (found, notes), (right, _) in zip(run_ranks(_refused, 2, config, True, "forward", cp=2), plain, strict=True):
        assert notes == ["no CUDA graphs: a micro-batch cannot be captured: not permitted when capturing"]
        assert found == [pytest.approx(step, rel=1e-12) for step in right]
    for fails_in, message in [("backward", "not permitted when capturing"), ("call", "lost a rank")]:
        with pytest.raises(AssertionError, match=message):
            run_ranks(_refused, 2, config, True, fails_in, cp=2)
