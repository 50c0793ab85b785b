"""A checkpoint from elsewhere: what is in it is read, not run."""

import collections
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from minimax_train.checkpoint.reading import CheckpointFiles
from minimax_train.convert.checkpoint import CheckpointReader
from minimax_train.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    """Of tensors in all kinds of data and an object."""
    state = {"model": {"a": torch.arange(7.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}, "object": _Creates("")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


class _Creates:
    """Creates a file when it is unpickled, if it has a name for it."""

    def __init__(self, name):
        self.name = str(name)

    def __reduce__(self):
        return (open, (self.name, "w")) if self.name else (str, ("harmless",))


def _spoil(checkpoint, change):
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("where", ["planner_data", "version", "state_dict_metadata"])
@pytest.mark.parametrize("reads", [lambda path: CheckpointFiles(path).read_metadata(), CheckpointReader])
def test_an_index_cannot_run_code(checkpoint, tmp_path, where, reads):
    _spoil(checkpoint, lambda index: setattr(index, where, {"a": _Creates(tmp_path / "created")}))
    with pytest.raises(ConfigError, match=r"checkpoint/\.metadata: refused: it asks for (_io|io)\.open, "):
        reads(checkpoint)
    assert not (tmp_path / "created").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # which it would have, unpickled by torch
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
        pickle.dumps(collections.Counter()),
    ],
)
def test_classes_an_index_does_not_need(checkpoint, opcodes):
    (checkpoint / ".metadata").write_bytes(opcodes)
    with pytest.raises(ConfigError, match=r"\.metadata: (refused: it asks for|damaged: not the index)"):
        CheckpointFiles(checkpoint).read_metadata()


def test_objects_are_not_unpickled(checkpoint, tmp_path):
    """A parameter that the index calls an object, which torch would unpickle."""

    def change(index):
        index.state_dict_metadata["model.a"] = BytesStorageMetadata()
        place = next(key for key in index.storage_data if key.fqn == "object")
        index.storage_data[type(place)("model.a")] = index.storage_data[place]

    _spoil(checkpoint, change)
    state = {"model": {"a": torch.zeros(7)}}
    with pytest.raises(ConfigError, match=r"\.metadata: refused: model\.a is a pickled object, must be a tensor$"):
        CheckpointFiles(checkpoint).load(state, no_dist=True)
    assert torch.equal(state["model"]["a"], torch.zeros(7))


def test_shards_lie_in_the_checkpoint(checkpoint):
    _spoil(checkpoint, lambda index: setattr(next(iter(index.storage_data.values())), "relative_path", "../other"))
    with pytest.raises(ConfigError, match=r"\.metadata: damaged: .*'\.\./other' is no file of the checkpoint's folder"):
        CheckpointFiles(checkpoint).read_metadata()


def test_what_torch_writes_is_read(checkpoint):
    state = {"model": {"a": torch.zeros(7), "b": torch.zeros(3, 5, dtype=torch.bfloat16)}}
    CheckpointFiles(checkpoint).load(state, no_dist=True)
    assert torch.equal(state["model"]["a"], torch.arange(7.0)) and bool((state["model"]["b"] == 1).all())
