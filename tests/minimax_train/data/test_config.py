"""The configuration group: what is refused, and the YAML files beside it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

import minimax_train.configs
from minimax_train.data import DataConfig

GROUP = Path(minimax_train.configs.__file__).parent / "data"


def compose(group, **overrides):
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(GROUP / f"{group}.yaml"), overrides)
    return OmegaConf.to_object(config)


def test_the_groups_files():
    assert compose("stdlib") == DataConfig()
    assert compose("files", train_files=["*.txt"]).train_files == ["*.txt"]
    assert compose("hub", name="owner/data", subset=None).name == "owner/data"


@pytest.mark.parametrize(("name", "field"), [("files", "train_files"), ("hub", "name")])
def test_required_fields_are_named(name, field):
    with pytest.raises(ValueError, match=f"data.{field}="):
        compose(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "web"}, r"data.source='web': must be one of stdlib, files, hub"),
        ({"format": "csv"}, r"data.format='csv': must be one of text, json, parquet"),
        ({"sequence_length": 0}, r"data.sequence_length=0: must be between 1 and 2147483647"),
        ({"num_streams": -1}, r"data.num_streams=-1: must be between 1 and 1048576"),
        ({"shuffle_documents": 0}, r"data.shuffle_documents=0: must be between 1 and "),
        ({"tokenizer_documents": 0}, r"data.tokenizer_documents=0: must be between 1 and "),
        ({"tokenizer": ""}, r"data.tokenizer='': must not be empty"),
        ({"source": "files"}, r"data.train_files=\[\]: data.source='files' needs at least one"),
        ({"source": "hub"}, r"data.name=None: data.source='hub' needs"),
        ({"train_files": ["a"]}, r"data.train_files=\['a'\]: is read only with data.source='files'; set that"),
        ({"source": "files", "train_files": ["a"], "revision": "1"}, r"data.revision='1': .* data.source='hub'"),
        ({"text_column": "body"}, r"data.text_column='body': is read only with"),
        ({"bad_documents": "skip"}, r"data.bad_documents='skip': is read only with"),
        ({"bad_documents": "ignore"}, r"data.bad_documents='ignore': must be one of error, skip"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)
