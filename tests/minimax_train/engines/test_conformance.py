"""Every engine trains the same; 50 steps, and all pairs of engines: ``python tests/lib/support/conformance.py``."""

import pytest

from minimax_train.engines import ENGINES
from support.compare import relative_error
from support.conformance import CLIP, KINDS, POISONED, Run, configure, import_deepspeed, train
from support.distributed import run_ranks

STEPS = 2  # of each engine


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """Of one rank."""
    run = Run(configure(tmp_path_factory.mktemp("one"), "fsdp", STEPS * len(KINDS) + 2), STEPS)
    return run_ranks(train, 1, [run] * len(KINDS))[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of two ranks, by kind: one run, in which each engine goes on from the checkpoint of the one before."""
    folder = tmp_path_factory.mktemp("two")
    import_deepspeed()
    runs = [Run(configure(folder, kind, STEPS * len(KINDS) + 2), STEPS) for kind in KINDS]
    return dict(zip(KINDS, run_ranks(train, 2, runs)[0], strict=True))


def test_every_engine_is_held_to_it(right):
    assert {options[0].removeprefix("engine=") for options in KINDS.values()} == set(ENGINES)
    assert all(norm > CLIP and flops > 0 for each in right for _, _, norm, flops in each.steps), "clipping"


@pytest.mark.parametrize("kind", KINDS)
def test_losses_norms_and_flops_are_those_of_one_rank(results, right, kind):
    assert not results[kind].differences(right)


def test_weights_are_those_of_one_rank(results, right):
    for name, weight in list(results.values())[-1].weights.items():
        assert relative_error(weight, right[-1].weights[name]) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stops_the_run(results, kind):
    found = results[kind]
    assert found.message.startswith(f"step {found.steps[-1][0] + 1}: loss nan, gradient norm nan; not finite: ")
    assert f"parameters: {POISONED};" in found.message and "gradients: embedding.weight, layers.0." in found.message
    assert found.kept, "neither the step that failed nor a later one may touch the weights"
