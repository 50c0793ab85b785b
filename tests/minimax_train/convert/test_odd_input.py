"""``minimax-convert`` given files that are damaged, incomplete or make no sense: one line that names what, and nothing
left behind. What is accepted all the same must be right: the same logits, the same ids."""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minimax_train.convert import cli
from minimax_train.data.tokenizer import load_tokenizer, train_bpe

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = "model-00001-of-00005.safetensors"
PROGRESS = ("converting ", "writing ", "note: ", "[transformers]")


def convert(*arguments) -> tuple[int, str]:
    """Exit status, and the lines on stderr that are no progress. Whatever the command raises, the test does."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([str(argument) for argument in arguments])
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith(PROGRESS) and " % at " not in line]
    return status, "\n".join(lines)


def refused(direction: str, source: Path, *options: str, status: int = 2) -> str:
    """The one line of a conversion that must fail and leave nothing."""
    target = source.with_name("target")
    before = sorted(source.parent.rglob("*"))
    code, error = convert(direction, source, target, *options)
    assert (code, error.count("\n")) == (status, 0), error
    assert error.startswith("error: ")
    assert sorted(source.parent.rglob("*")) == before
    return error


@pytest.fixture(scope="module")
def made(lab, tmp_path_factory) -> Path:
    """``ours``: a run's checkpoint; ``hf``, ``whole``: its export in several files, and in one; ``back``: imported."""
    folder = tmp_path_factory.mktemp("made")
    lab.save_checkpoint(lab.random_model(lab.model_config()), folder / "ours", tokenizer=True)
    assert convert("to-hf", folder / "ours", folder / "hf", "--max-shard-size", "80KB") == (0, "")
    assert convert("to-hf", folder / "ours", folder / "whole") == (0, "")
    assert convert("from-hf", folder / "hf", folder / "back") == (0, "")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """Of one of them, to be damaged."""

    def copied(name: str) -> Path:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        return Path(shutil.copytree(made / name, tmp_path / "source"))

    return copied


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(change(content)))


def change_tensors(file: Path, change) -> None:
    changed = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}, file)


CONFIGS = {
    "a list": ([1], r"config\.json: holds a JSON list, must hold an object"),
    "no experts": ({"num_local_experts": 0}, r"config\.json: num_local_experts=0: must be a whole number from 1 to"),
    "no block": ({"block_size": 0}, r"config\.json: block_size=0: must be a whole number from 1 to 4096"),
    "endless layers": ({"num_hidden_layers": 10**10, "layer_types": None}, "num_hidden_layers=10000000000: must be"),
    "endless labels": ({"num_labels": 10**10}, "num_labels=10000000000: must be"),
    "huge": ({"hidden_size": 10**30}, "hidden_size=1000000000000000000000000000000: must be a whole number from 1 to"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0: must be"),
    "no head dim": ({"head_dim": 0}, "head_dim=0: must be"),
    "heads that do not divide": (
        {"num_key_value_heads": 4},
        "num_key_value_heads=4: must divide num_attention_heads=6",
    ),
    "more experts than there are": ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most"),
    "two numbers of experts": ({"num_experts": 8}, "num_experts=8: contradicts num_local_experts=4"),
    "a string": ({"vocab_size": "97"}, "transformers refuses it: .*'vocab_size'.*'97'"),
    "a float": ({"vocab_size": 97.0}, r"transformers refuses it: .*'vocab_size'.*97\.0"),
    "a boolean": ({"vocab_size": True}, "transformers refuses it: .*'vocab_size'.*True"),
    "null": ({"vocab_size": None}, "transformers refuses it: .*'vocab_size'.*None"),
    "NaN": ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan: must be a number from 1e-30 to 1\.0"),
    "theta as a string": ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta='1e4': must"),
    "theta of nothing": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, r"rope_theta=0\.0: must be"),
    "two thetas": ({"rope_theta": 5.0}, r"rope_theta=5\.0: contradicts rope_parameters\.rope_theta=100000000\.0"),
    "no such id": ({"eos_token_id": 97}, "eos_token_id=97: must be null, or an id from 0 to 96: vocab_size is 97"),
    "no dtype": ({"dtype": 16}, "dtype=16: must be the name of a dtype"),
    "a kind as a list": (
        {"layer_types": [["linear_attention"], "full_attention"]},
        "transformers refuses it: .*layer_ty",
    ),
}


@pytest.mark.parametrize("change, message", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_json(copy, change, message):
    source = copy("whole")
    edit(source / "config.json", lambda config: change if isinstance(change, list) else config | change)
    error = refused("from-hf", source)
    assert error.startswith(f"error: {source}/config.json: ")
    assert re.search(message, error), error


def _without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def _map(**changes):
    return lambda index: index | {"weight_map": index["weight_map"] | changes}


INDICES = {
    "not JSON": (lambda file: file.write_text("{"), "not JSON: "),
    "not UTF-8": (lambda file: file.write_bytes(b'{"a": "\xff"}'), "not JSON: 'utf-8' codec can't decode"),
    "a list": (lambda file: file.write_text("[]"), "holds a JSON list, must hold an object"),
    "no weight_map": (lambda file: edit(file, _without("weight_map")), "weight_map=None: must be an object"),
    "an empty weight_map": (lambda file: edit(file, lambda index: {"weight_map": {}}), "weight_map={}: must be an obj"),
    "a number for a file": (
        lambda file: edit(file, _map(**{"lm_head.weight": 3})),
        r"weight_map\['lm_head.weight'\]=3",
    ),
    "a file elsewhere": (
        lambda file: edit(file, _map(**{"lm_head.weight": "../x"})),
        "name of a file beside the index",
    ),
    "a file that is missing": (lambda file: edit(file, _map(**{"lm_head.weight": "x"})), "/x: not a readable safetens"),
    "the wrong file": (
        lambda file: edit(file, _map(**{"lm_head.weight": "model-00001-of-00005.safetensors"})),
        r"lm_head.weight'\]='model-00001-of-00005.safetensors': it is in model-0000[2-5]-of-00005",
    ),
    "a tensor of no file": (
        lambda file: edit(file, _map(more="model-00001-of-00005.safetensors")),
        "'more'.*: no file has it",
    ),
    "the whole model as well": (lambda file: shutil.copy(file.parent / FIRST, file.parent / WEIGHTS), "holds both"),
    "a tensor twice": (
        lambda file: change_tensors(
            file.parent / FIRST, lambda tensors: tensors | {"lm_head.weight": torch.zeros(97, 40)}
        ),
        "holds lm_head.weight, as model-00001-of-00005.safetensors does; a tensor must be in one file",
    ),
}


@pytest.mark.parametrize("damage, message", INDICES.values(), ids=INDICES.keys())
def test_index(copy, damage, message):
    source = copy("hf")
    damage(source / INDEX)
    error = refused("from-hf", source)
    assert re.search(message, error), error


SLOPES, QUERY, DIAGONAL = (f"model.layers.0.self_attn.{x}" for x in ("slope_rate", "query_decay", "diagonal_decay"))
NORM, HEAD = "model.norm.weight", "lm_head.weight"
TENSORS = {
    "one wrong decay": (QUERY, lambda t: t.index_fill(1, torch.tensor([7]), 0.9), "query_decay=0.9 at 7: must be"),
    "a decay that is NaN": (DIAGONAL, lambda t: t * torch.nan, "diagonal_decay=nan at 0: must be 1 there"),
    "other slopes": (SLOPES, lambda t: t * 1.1, "slope_rate=.*: must be the slopes of MiniMax-01"),
    "another block": (
        QUERY,
        lambda t: t[:, :64],
        r"query_decay has shape \(6, 64, 1\), config.json wants \(6, 256, 1\)",
    ),
    "NaN": (
        NORM,
        lambda t: t.index_fill(0, torch.tensor([3]), torch.nan),
        "norm.weight: 1 of 40 values are NaN or inf",
    ),
    "infinity": (HEAD, lambda t: t / 0, "lm_head.weight: 3880 of 3880 values are NaN or infinite as float32"),
    "too large for float32": (HEAD, lambda t: t.double() + 1e60, "lm_head.weight: 3880 of .* infinite as float32"),
    "whole numbers": (NORM, lambda t: t.int(), "model.norm.weight='I32': weights must be one of F32, BF16"),
    "another shape": (NORM, lambda t: t[:39], r"model.norm.weight has shape \(39,\), config.json wants \(40,\)"),
    "one too many": ("model.layers.1.self_attn.slope_rate", lambda t: torch.ones(2), "1 tensors are not of a 2-layer"),
    "missing": (NORM, lambda t: None, "model.norm.weight is missing"),
}


@pytest.mark.parametrize("name, change, message", TENSORS.values(), ids=TENSORS.keys())
def test_tensors(copy, name, change, message):
    source = copy("whole")
    change_tensors(source / WEIGHTS, lambda tensors: tensors | {name: change(tensors.get(name))})
    error = refused("from-hf", source, "--dtype", "float32")
    assert re.search(message, error), error


def test_no_safetensors(copy):
    source = copy("whole")
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused("from-hf", source)


def _shards(checkpoint):
    return sorted(checkpoint.glob("*.distcp"))


def _flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


CHECKPOINTS = {
    "empty index": (
        lambda c: (c / ".metadata").write_bytes(b""),
        r"\.metadata: damaged: not the index of a checkpoint",
    ),
    "index of something else": (
        lambda c: (c / ".metadata").write_bytes(b"\x80\x04K\x01."),
        r"\.metadata: damaged: not",
    ),
    "no index": (lambda c: (c / ".metadata").unlink(), r"neither a checkpoint \(a folder with \.metadata\) nor a run"),
    "a shard missing": (lambda c: _shards(c)[-1].unlink(), r"__0_\d+\.distcp: missing, though .*\.metadata names it"),
    "a shard cut short": (
        lambda c: os.truncate(_shards(c)[0], 900),
        r"__0_0\.distcp: damaged: it has 900 bytes, .* says",
    ),
    "a bit of a weight": (
        lambda c: _flip(_shards(c)[0], 1200),
        r"__0_0\.distcp: damaged: it cannot be read: .*checksum",
    ),
    "no config": (lambda c: (c / "config.yaml").unlink(), r"config\.yaml: no configuration: FileNotFoundError"),
    "config not UTF-8": (
        lambda c: (c / "config.yaml").write_bytes(b"\xff\xfea"),
        r"config\.yaml: no configuration: Uni",
    ),
    "config a list": (
        lambda c: (c / "config.yaml").write_text("- 1"),
        r"config\.yaml: .*holds a list, must hold a map",
    ),
    "config of no model": (
        lambda c: (c / "config.yaml").write_text("model: 3"),
        r"config\.yaml: no model configuration",
    ),
    "tokenizer cut short": (lambda c: os.truncate(c / "tokenizer" / "tokenizer.json", 30), "no tokenizer in .*: EOF"),
    "tokenizer's settings": (
        lambda c: (c / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": {"content": 3}}'),
        "tokenizer' has no end-of-text token",
    ),
}


@pytest.mark.parametrize("damage, message", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoint(copy, damage, message):
    source = copy("ours")
    damage(source)
    error = refused("to-hf", source)
    assert re.search(message, error), error


def test_a_run_whose_newest_checkpoint_is_an_empty_folder(copy):
    source = copy("ours")
    run = source.with_name("run")
    source.rename(run)
    (run / "checkpoints" / "step-00000099").mkdir(parents=True)
    (run / ".metadata").unlink()
    assert re.search("neither a checkpoint|step-00000099: not a whole checkpoint", refused("to-hf", run))


ORIGINS = {
    "not JSON": (lambda file: file.write_text("{"), r"huggingface\.json: not JSON"),
    "a key missing": (
        lambda file: edit(file, _without("decay_dtype")),
        r"huggingface\.json: keys=.*must be config, gen",
    ),
    "a dtype": (
        lambda file: edit(file, lambda o: o | {"decay_dtype": "int3"}),
        "decay_dtype='int3': must be one of bfl",
    ),
    "its config": (
        lambda file: edit(file, lambda o: o | {"config": {"model_type": 3}}),
        r"huggingface\.json: config: mo",
    ),
}


@pytest.mark.parametrize("damage, message", ORIGINS.values(), ids=ORIGINS.keys())
def test_origin_of_a_converted_checkpoint(copy, damage, message):
    source = copy("back")
    damage(source / "huggingface.json")
    (source / "manifest.json").unlink()  # as of an earlier version
    error = refused("to-hf", source)
    assert re.search(message, error), error


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_of_a_run_that_are_not_finite(lab, tmp_path, bad):
    model = lab.random_model(lab.model_config())
    with torch.no_grad():
        model.layers[1].experts.mlp.down_proj[2, :4, 5] = bad
    error = refused("to-hf", lab.save_checkpoint(model, tmp_path / "source"))
    assert "source: model.layers.1.experts.mlp.down_proj: 4 of 960 values are NaN or infinite" in error


def test_weights_that_the_dtype_cannot_hold(lab, tmp_path):
    model = lab.random_model(lab.model_config()).double()
    with torch.no_grad():
        model.norm.weight[7] = 1e39
    source = lab.save_checkpoint(model, tmp_path / "source")
    error = refused("to-hf", source, "--dtype", "bfloat16")
    assert "model.norm.weight: 1 of 40 values are NaN or infinite as bfloat16" in error


def test_broken_tokenizer_beside_a_model(copy):
    source = copy("whole")
    os.truncate(source / "tokenizer.json", 30)
    assert "transformers cannot open the tokenizer: " in refused("from-hf", source)


def test_tokenizer_of_more_ids_than_the_model_has(lab, copy, tmp_path):
    source = copy("whole")
    _tokenizer(tmp_path / "large").save_pretrained(source)
    assert re.search("vocab_size=97: the tokenizer in .* must be at least 280", refused("from-hf", source))
    shutil.rmtree(source)
    lab.save_checkpoint(lab.random_model(lab.model_config()), source)
    _tokenizer(tmp_path / "large").save_pretrained(source / "tokenizer")
    assert re.search("vocab_size=97: the tokenizer in .* must be at least 280", refused("to-hf", source))


def _tokenizer(folder) -> PreTrainedTokenizerFast:
    """As a chat model's: it begins and ends every text, cuts it at 8 tokens, and fills shorter ones up."""
    backend = train_bpe(["some words, some more words and other words"] * 3, 300)
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=ids)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template="{{ messages }}"
    )


def test_exported_tokenizer_gives_the_ids_that_training_had(lab, tmp_path):
    """Training adds nothing to a text and ends documents with the end of text; so must what transformers opens."""
    model = lab.random_model(lab.model_config(vocab_size=280))
    run = lab.save_checkpoint(model, tmp_path / "run")
    _tokenizer(tmp_path).save_pretrained(run / "tokenizer")
    assert convert("to-hf", run, tmp_path / "hf") == (0, "")
    trained, exported = load_tokenizer(run / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Some words, and MORE words: naïve 中文\n\n  than eight tokens hold "
    ids = trained.encode_document(text)
    assert exported(text)["input_ids"] == ids[:-1].tolist()
    assert (exported.eos_token_id, exported.bos_token_id, exported.chat_template) == (ids[-1], None, None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for config in (theirs.config, theirs.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 278, 279)
    with torch.no_grad():
        packed = model(torch.from_numpy(ids[:-1]), lab.Documents.from_lengths([len(ids) - 1]))
        assert torch.allclose(theirs(**exported(text, return_tensors="pt")).logits[0], packed, atol=1e-5)


def test_tokenizer_of_a_checkpoint_not_trained_stays_as_it_is(lab, tmp_path, capsys):
    lab.save_theirs(tmp_path / "hf", vocab_size=280)
    _tokenizer(tmp_path).save_pretrained(tmp_path / "hf")
    assert cli.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert (
        "note: in transformers this tokenizer adds <s> </s> to every text; training does not" in capsys.readouterr().err
    )
    assert convert("to-hf", tmp_path / "back", tmp_path / "again") == (0, "")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes()


def test_target(copy, monkeypatch):
    """What is in the way stays as it was."""
    source = copy("whole")
    folder = source.parent
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    shutil.copytree(source, folder / "new.writing")
    monkeypatch.chdir(folder)
    for target, status, message in (
        (source, 2, "exists already; must be a new or an empty folder"),
        ("/", 2, "exists already"),
        (folder / "file", 2, "exists already"),
        (folder / "loop", 2, "exists already"),
        (folder / "file" / "below", 1, "Not a directory"),
        (folder / "new", 2, f"{folder}/new.writing is in the way: left by a conversion that was killed"),
        (folder / ("n" * 250), 1, "File name too long"),
        (folder / "line\n", 2, "must be a path of printable characters"),
        ("", 2, "must be a path of printable characters"),
    ):
        code, error = convert("from-hf", source, target)
        assert (code, error.count("\n")) == (status, 0) and message in error, (target, error)
    # The draft's own place, given as the source.
    assert convert("from-hf", folder / "new.writing", folder / "new")[0] == 2
    assert {file.name: file.read_bytes() for file in (folder / "new.writing").iterdir()} == before
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert (folder / "file").read_text() == "mine"
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    monkeypatch.chdir(folder / "empty")
    assert "cannot be replaced" in convert("from-hf", source, ".")[1]
    monkeypatch.chdir(folder)
    assert convert("from-hf", source, folder / "link") == (0, "")
    assert (folder / "empty" / ".metadata").is_file()


@pytest.mark.parametrize("direction, name", [("from-hf", "whole"), ("to-hf", "ours")])
def test_no_space(copy, monkeypatch, direction, name):
    source = copy(name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # of a file: writing more fails as on a full disk
    try:
        error = refused(direction, source, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("target.writing.*: cannot be written: .*File too large", error)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 0))
    assert re.search(
        r"target.writing: no space left on the device: \d\.\d MB to be written, 0\.0 MB free",
        refused(direction, source, status=1),
    )


def test_interrupted(copy, monkeypatch):
    source = copy("ours")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.to_hf.__globals__, "write_shards", interrupt)
    target = source.with_name("target")
    assert convert("to-hf", source, target) == (130, f"interrupted: {target} was not written")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("rotary_dim", [-2, 7, 18, 10**30])
def test_rotary_dim(copy, rotary_dim):
    source = copy("whole")
    edit(
        source / "config.json", lambda config: config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    code, error = convert("from-hf", source, source.with_name("target"), "--rotary-dim", rotary_dim)
    assert code == 2 and f"--rotary-dim={rotary_dim}: must be even and between 0 and head_dim=16" in error


ODD = [None, True, 0, -1, 2, 3, 2.0, 0.5, 1e300, 10**30, float("nan"), "", "2", [], [None], {}, {"a": 1}, "\ud800"]


def test_configurations_at_random(lab, copy):
    """Any key of config.json, any odd value: an error in one line, or a model that computes what transformers does."""
    choose, source = random.Random(0), copy("whole")
    target = source.with_name("target")
    config = json.loads((source / "config.json").read_text()) | {"block_size": 256}
    accepted = 0
    for _ in range(60):
        changed = json.loads(json.dumps(config))
        place = choose.choice([changed, changed, changed["rope_parameters"]])
        place[choose.choice(sorted(place))] = choose.choice(ODD)
        (source / "config.json").write_text(json.dumps(changed))
        code, error = convert("from-hf", source, target)
        assert (code == 0 and not error) or (code == 2 and error.count("\n") == 0), (changed, error)
        if code == 0:
            accepted += 1
            theirs = lab.load_theirs(source)
            assert lab.largest_difference(lab.load_ours(target), theirs, (5, 20)) < 1e-5, changed
            shutil.rmtree(target)
    assert accepted > 5


def test_damage_at_random(lab, made, copy):
    """A file of either side cut short, emptied, gone, or a bit of it flipped: an error in one line, or what comes out
    is the same. (A bit of a weight in a safetensors file cannot be found out: there is no checksum.)"""
    choose = random.Random(0)
    theirs, ours = lab.tensors(made / "whole"), lab.load_ours(made / "ours").state_dict()
    for direction, name in [("to-hf", "ours"), ("from-hf", "hf"), ("to-hf", "back")] * 15:
        source = copy(name)
        target = source.with_name("target")
        file = choose.choice(sorted(path for path in source.rglob("*") if path.is_file()))
        damages = ["cut", "emptied", "gone"] + ["flipped"] * 3 * (file.suffix not in (".json", ".yaml"))
        damage, content = choose.choice(damages), file.read_bytes()
        place = choose.randrange(min(len(content), 700))
        if damage == "gone":
            file.unlink()
        elif damage == "flipped":
            _flip(file, place)
        else:
            file.write_bytes(content[: place if damage == "cut" else 0])
        what = (name, file, damage, place)
        code, error = convert(direction, source, target)
        assert (code == 0 and not error) or (code == 2 and error.count("\n") == 0), (what, error)
        if code == 0:
            expected, found = (
                (theirs, lab.tensors(target)) if direction == "to-hf" else (ours, lab.load_ours(target).state_dict())
            )
            assert found.keys() == expected.keys(), what
            assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), what
            shutil.rmtree(target)
