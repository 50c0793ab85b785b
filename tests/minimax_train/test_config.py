"""What is typed is what a field gets, or one line says which field could not take it."""

import dataclasses
import math
import time

import pytest
import yaml

from minimax_train import fields
from minimax_train.cli import main
from minimax_train.config import Config, load_config, read_config, save_config
from minimax_train.engines import ENGINES
from minimax_train.errors import ConfigError
from minimax_train.parallel.grid import divisors, nearest_divisors

HUB = ("data=hub", "data.name=x")
FILES = ("data=files",)


@pytest.fixture
def ask(capsys):
    """``minimax-train --cfg``: the printed configuration, or the one line that refuses."""

    def asked(*arguments):
        status = main(["--cfg", *map(str, arguments)])
        printed = capsys.readouterr()
        if status == 0:
            return yaml.safe_load(printed.out)
        assert status == 2
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err.strip()

    return asked


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


TYPED = [
    ((), "run_dir", "2024_05_01", "2024_05_01"),
    ((), "run_dir", "runs/lr=1e-3,wd=0", "runs/lr=1e-3,wd=0"),
    ((), "run_dir", "データ/über uns", "データ/über uns"),
    ((), "run_dir", "'a b'", "a b"),
    ((), "run_dir", "1e3", "1e3"),
    ((), "run_dir", "[x]", "[x]"),
    ((), "run_dir", "r/${recipe.steps}-${logging.interval}", "r/300-1"),
    ((), "logging.wandb_name", "off", "off"),
    ((), "logging.wandb_name", "null", None),
    ((), "logging.wandb_name", "'null'", "null"),
    (HUB, "data.revision", "7e53211", "7e53211"),
    (HUB, "data.revision", "007", "007"),
    (FILES, "data.train_files", "[7e5,'a, b', 0x1, ü=1]", ["7e5", "a, b", "0x1", "ü=1"]),
]


@pytest.mark.parametrize(("group", "key", "text", "value"), TYPED)
def test_a_string_is_the_text_that_was_typed(ask, tmp_path, group, key, text, value):
    """On the command line, in an experiment, and in the configuration that a run saves."""
    name, _, field = key.rpartition(".")
    assert _at(ask(*group, f"{key}={text}"), key) == value
    inner = f"{field}: {text}"
    write(tmp_path / "experiment/mine.yaml", f"{name}:\n  {inner}\n" if name else f"{inner}\n")
    config_dir = ("--config-dir", tmp_path)
    if not text.startswith("["):
        assert _at(ask(*config_dir, *group, "experiment=mine"), key) == value
    config = load_config([*group, *(["data.train_files=[a]"] if group == FILES else []), f"{key}={text}"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def _at(tree, key):
    for name in key.split("."):
        tree = tree[name]
    return tree


def test_home_folders_are_filled_in_everywhere(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    write(tmp_path / "experiment/mine.yaml", "run_dir: ~/x\ndata: {source: files, train_files: [~/a, ~b]}\n")
    said = ask("--config-dir", tmp_path, "experiment=mine")
    assert said.startswith("error: data.train_files='~b': there is no home folder ~b")
    paths = ["data.train_files=[~/a]", "checkpoint.initial_weights=~/w", "data.tokenizer=~/t"]
    config = ask("--config-dir", tmp_path, "experiment=mine", *paths)
    assert config["run_dir"] == "/home/me/x"
    assert config["data"]["train_files"] == ["/home/me/a"]
    assert config["checkpoint"]["initial_weights"] == "/home/me/w"
    assert config["data"]["tokenizer"] == "/home/me/t"


REFUSED = [
    ("run_dir=r/${now:%H%M%S}", r"run_dir=r/\$\{now:%H%M%S\}: only other keys are filled in.*date"),
    ("run_dir=r/${oc.env:RANK}", r"run_dir=r/\$\{oc.env:RANK\}: only other keys"),
    ("run_dir=r/${nothing}", r"run_dir=r/\$\{nothing\}: .*'nothing' not found"),
    ("run_dir=${", r"run_dir=\$\{: "),
    ("run_dir=", r"run_dir='': must not be empty"),
    ("run_dir=a ", r"run_dir='a ': must not begin or end with white space"),
    ("run_dir=a\nb", r"run_dir='a\\nb': must not contain line breaks"),
    ("recipe.steps=a\nb", r"recipe.steps='a\\nb': must be an integer"),
    ("recipe.steps=1,2", r"recipe.steps=1,2: must be one value: there are no sweeps"),
    ("model=tiny,small", r"model=tiny,small: must be one file's name: there are no sweeps"),
    ("recipe.steps=1e3", r"recipe.steps=1e3: must be an integer in digits"),
    ("recipe.steps=2.0", r"recipe.steps=2.0: must be an integer"),
    ("recipe.steps=true", r"recipe.steps=true: must be an integer"),
    ("engine.cuda_graphs=3", r"engine.cuda_graphs=3: must be true or false"),
    ("recipe.activation_checkpointing=2", r"recipe.activation_checkpointing='2': must be one of auto, none, selec"),
    ("recipe.activation_checkpointing=true", r"recipe.activation_checkpointing='true': renamed: use 'full'"),
    ("data.train_files=[['a']]", r"data.train_files=\[\['a'\]\]: must be a list of strings"),
    ("data.train_files=a.txt", r"data.train_files=a.txt: must be a list in brackets"),
    ("seed.x=1", r"seed=\{x: 1\}: must be one value"),
    ("recipe.steps", r"recipe.steps: must be key=value"),
    ("~recipe.steps", r"~recipe.steps: keys cannot be removed"),
    ("model.hidden_size=1000000000", r"model.hidden_size=1000000000: must be between 1 and 1048576$"),
    ("model.residual_scale=1e300", r"model.residual_scale=1e\+300: .* or null for DeepNorm's"),
    ("recipe.adam_eps=0", r"recipe.adam_eps=0.0: must be between 1e-20 and 0.01$"),
    ("data.sequence_length=2000000000", r"recipe.micro_batch_size=4: times data.sequence_length=2000000000 must be"),
    ("model.vocab_size=99999999999999999999", r"model.vocab_size=99999999999999999999: must be between"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_one_line_names_the_key_and_what_it_takes(ask, override, message):
    import re

    said = ask(override)
    assert re.match(f"error: {message}", said), said


def test_of_a_key_given_twice_the_last_counts_and_is_quoted(ask):
    assert ask("recipe.steps=x", "recipe.steps=400", "model=small", "model=tiny")["recipe"]["steps"] == 400
    assert ask("recipe.steps=400", "recipe.steps=x").startswith("error: recipe.steps=x: ")


BAD_FILES = [
    ("recipe:\n  steps: 5\n steps: [\n", ", line 3: "),
    ("recipe:\n  steps: 5\n  steps: 6\n", ", line 3: steps is given twice"),
    ("data:\n  train_files: *.jsonl\n", ", line 2: "),
    ("seed: !!python/object/apply:os.getpid []\n", ", line 1: "),
    (b"run_dir: \xff\n", ": not YAML: 'utf-8' codec"),
    ("- a\n", "=['a']: must hold keys and values"),
    ("hydra:\n  run: {dir: x}\n", ": hydra: Hydra's own settings are not read here"),
    ("recipe:\n  steps: 1e3\n", "recipe.steps=1e3: must be an integer"),
    ("recipe:\n  stps: 5\n", "there is no key 'stps' in recipe. Did you mean recipe.steps?"),
    ("recipe: 5\n", "recipe=5: is a group of keys"),
    ("run_dir: r/${now:%H}\n", "run_dir=r/${now:%H}: only other keys are filled in"),
    ("run_dir: ~\n", "run_dir=null: is not Optional"),
    ("a: &x [*x]\n", ": a part of it contains itself"),
    ("defaults:\n  - mine\n", "files that name each other"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_named(ask, tmp_path, text, message):
    path = write(tmp_path / "experiment/mine.yaml", text)
    said = ask("--config-dir", tmp_path, "experiment=mine")
    expected = f"error: {path}{message}" if message[0] in ":,=" else message
    assert expected in said, said


def test_own_files_come_before_the_packages(ask, tmp_path):
    tiny = yaml.safe_dump({**ask()["model"], "hidden_size": 64})
    one, two = tmp_path / "o w,n=é", tmp_path / "two"
    write(one / "model/tiny.yaml", tiny)
    write(two / "model/tiny.yaml", tiny.replace("hidden_size: 64", "hidden_size: 96"))
    write(two / "model/2024_05.yaml", "defaults: [tiny]\nnum_layers: 16\n")
    write(two / "experiment/mine.yaml", "recipe: {steps: 400}\n")  # without `# @package _global_`
    write(two / "config.yaml", "not: read\n")
    both = ("--config-dir", one, "--config-dir", two)
    assert ask(*both)["model"]["hidden_size"] == 64
    assert ask("--config-dir", two)["model"]["hidden_size"] == 96
    config = ask(*both, "model=2024_05", "experiment=mine")
    assert (config["model"]["hidden_size"], config["model"]["num_layers"]) == (64, 16)
    assert config["recipe"]["steps"] == 400
    write(two / "experiment/other.yml", "seed: 1\n")
    assert "other.yml: is not read; call it other.yaml" in ask("--config-dir", two, "experiment=other")
    assert "files are read from its groups' folders" in ask("--config-dir", two / "model")


# ------------------------------------------------------------------------------------------------ ranges


def _numbers():
    config = load_config()
    groups = {"": config, **{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}}
    for name, group in groups.items():
        if dataclasses.is_dataclass(group):
            for field, what in fields.fields_of(type(group)).items():
                if what.kind in (int, float):
                    yield f"{name}.{field}".lstrip("."), group, field, what


def test_every_number_has_a_range():
    """``fields_of`` refuses a dataclass that has a number without one."""
    for engine in ENGINES.values():
        fields.fields_of(engine.config_type)
    found = list(_numbers())
    assert len(found) > 40
    for key, group, name, what in found:
        beyond = [what.range.least - 1, what.range.greatest * 2, math.nan, math.inf, -math.inf, 10**400, True]
        if what.kind is int:
            beyond += [float(what.range.least)]
        for value in beyond:
            with pytest.raises(ConfigError, match=rf"^{key}=[^\n]*(must be between|of another type)"):
                dataclasses.replace(group, **{name: value})

    @dataclasses.dataclass
    class Unbounded:
        number: int = 3

    Unbounded.__annotations__["number"] = int
    with pytest.raises(AssertionError, match="every number needs a range"):
        fields.fields_of(Unbounded)


def test_divisors_are_found_in_no_time(ask):
    for number in range(1, 200):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert nearest_divisors(12, 5) == "4 or 6"
    assert nearest_divisors(7, 100) == "7"
    started = time.perf_counter()
    ask("data.sequence_length=67108864", "recipe.micro_batch_size=8", "recipe.global_batch_size=8")
    said = ask(
        "data.sequence_length=134217727", "recipe.micro_batch_size=8", "parallel.tp=2", "model.vocab_size=16777213"
    )
    assert "model.vocab_size=16777213; the nearest that do are 1 or 16777213" in said
    assert time.perf_counter() - started < 20
