"""Weights alone, of another run, into a model that is the same or has other parameters."""

import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from minimax_train.checkpoint.initial_weights import find_weights, load_weights
from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run, weights_of

FAST = ("recipe.steps=2", "recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0")


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def _weights_at_the_start(grid, config):
    return weights_of(Trainer(config, grid, torch.device("cpu")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(_train, 1, tiny_run(folder, *FAST, "checkpoint.interval=1"))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def stored(trained):
    """Parameters of its newest checkpoint, as torch reads them."""
    path = trained / "checkpoints/step-00000002"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    held = {name: torch.empty(entry.size) for name, entry in metadata.items() if name.startswith("model.")}
    dcp.load(held, checkpoint_id=path, no_dist=True)
    return {name.removeprefix("model."): x for name, x in held.items()}


def _apart(stored):
    """A model that lacks two of the parameters, has two of its own, and one in another shape."""
    model = {name: torch.full_like(x, -7.0) for name, x in stored.items()}
    names = list(model)
    unused = [names[0], names[5]]
    for name in unused:
        del model[name]
    model |= {"own": torch.zeros(3), "own.too": torch.ones(2, 2), names[1]: torch.zeros(*stored[names[1]].shape, 1)}
    return model, unused, names[1]


def test_strict_names_what_does_not_fit(trained, stored):
    model, unused, other = _apart(stored)
    there = tuple(stored[other].shape)
    with pytest.raises(ConfigError) as refused:
        load_weights(trained / "checkpoints/step-00000002", model)
    assert str(refused.value) == (
        f"checkpoint.initial_weights='{trained}/checkpoints/step-00000002': not this model's parameters: 2 not in the "
        f"checkpoint: own, own.too; 1 of another shape there: {other} {there} (here {(*there, 1)}); 2 only in the "
        f"checkpoint: {unused[0]}, {unused[1]}; checkpoint.initial_weights_strict=false loads those that fit"
    )
    assert all(bool((x == -7).all()) for name, x in model.items() if name in stored and name != other)
    with pytest.raises(ConfigError) as refused:
        load_weights(
            trained / "checkpoints/step-00000002", {f"own.{i}": torch.zeros(1) for i in range(15)}, strict=False
        )
    first = ", ".join(f"own.{i}" for i in range(12))
    assert f"15 not in the checkpoint: {first} and 3 more; " in str(refused.value)
    assert str(refused.value).endswith("; none fits")


def test_what_fits_is_loaded(trained, stored, capfd):
    model, _, other = _apart(stored)
    load_weights(trained / "checkpoints/step-00000002", model, strict=False)
    for name, x in model.items():
        if name in stored and name != other:
            assert torch.equal(x, stored[name]), name
    assert not model["own"].any() and not model[other].any()
    err = capfd.readouterr().err
    assert err.startswith("note: checkpoint.initial_weights=") and err.count("\n") == 1
    assert f": {len(stored) - 3} of {len(stored)} parameters are loaded; 2 not in the checkpoint: own, own.too; " in err
    load_weights(trained / "checkpoints/step-00000002", {n: torch.zeros_like(x) for n, x in stored.items()})
    assert capfd.readouterr().err == "", "nothing to say where all fits"


def test_into_another_recipe_and_model(trained, stored, tmp_path, capfd):
    """More layers, other experts and another vocabulary on two ranks; the rest is as it would be without."""
    more = ("model.num_layers=6", "model.layer_pattern=LLSLLL", "model.expert_hidden_size=16", "model.vocab_size=290")
    config = tiny_run(tmp_path, *FAST, *more)
    fresh = run_ranks(_weights_at_the_start, 2, config)[0]
    config = tiny_run(tmp_path / "b", *FAST, *more, f"checkpoint.initial_weights={trained}")
    with pytest.raises(AssertionError, match=r"checkpoint\.initial_weights=.*(data\.tokenizer|not this model's)"):
        run_ranks(_weights_at_the_start, 1, config)
    partial = "checkpoint.initial_weights_strict=false"
    config = tiny_run(tmp_path / "c", *FAST, *more, f"checkpoint.initial_weights={trained}", partial)
    capfd.readouterr()
    found = run_ranks(_weights_at_the_start, 2, config)[0]
    fitting = [name for name in found if name in stored and stored[name].shape == found[name].shape]
    assert 10 < len(fitting) < len(found) and len(fitting) < len(stored)
    for name, x in found.items():
        assert torch.equal(x, stored[name] if name in fitting else fresh[name]), name
    assert f": {len(fitting)} of {len(found)} parameters are loaded; " in capfd.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(run, capfd):
    older, newest = (run / f"checkpoints/step-{step:08d}" for step in (1, 2))
    assert find_weights(str(run)) == newest
    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert find_weights(str(run)) == older
    err = capfd.readouterr().err
    told = rf"note: checkpoint.initial_weights='{run}': {shard}: damaged: its SHA-256 is .*; {older} is taken instead\n"
    assert re.fullmatch(told, err), err
    assert newest.is_dir(), "the run is another's"
    with pytest.raises(ConfigError, match=rf"^checkpoint.initial_weights='{newest}': {shard}: damaged"):
        find_weights(str(newest))
    (older / ".metadata").unlink()
    with pytest.raises(ConfigError, match=rf"^checkpoint.initial_weights='{run}': {shard}: damaged"):
        find_weights(str(run))


def test_strict_needs_weights(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^checkpoint.initial_weights_strict=False: must be true without checkpoint.in"
    ):
        tiny_run(tmp_path, "checkpoint.initial_weights_strict=false")
