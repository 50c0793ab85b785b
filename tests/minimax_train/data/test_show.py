"""What ``minimax-data show`` tells of documents whose every token is known."""

import gzip
import json
import random
import types
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimax_train.config import load_config
from minimax_train.data import cli
from minimax_train.data.config import MixtureSourceConfig
from minimax_train.data.show import show, spans
from minimax_train.data.sources import TRAIN, open_source
from minimax_train.data.survey import survey
from minimax_train.errors import ConfigError
from minimax_train.recipe import Recipe
from support.data import WordTokenizer, documents, random_documents

MODEL = ["model.vocab_size=300", "data.num_streams=3", "data.medium_length=20", "data.long_length=40"]
RECIPE = ["recipe.steps=null", "recipe.min_learning_rate=null", "recipe.decay_steps=null", "recipe.warmup_steps=1"]
RECIPE += ["recipe.global_batch_size=6", "recipe.micro_batch_size=1", "recipe.eval_sequences=8"]


def _write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def _source(name: str, file: str, *more: str) -> list[str]:
    settings = ["format=json", f"train_files=[{file}]", *more]
    return [f"data.sources.{name}.{setting}" for setting in settings]


def _length(text: str) -> int:
    return len(text.split()) + 1


def test_shares_epochs_and_what_runs_out(tmp_path):
    a, b = random_documents(800, longest=30), random_documents(90, seed=1, longest=60)
    tokens_a, tokens_b = (sum(map(_length, texts)) for texts in (a, b))
    config = load_config(
        [
            *MODEL,
            *RECIPE,
            *_source("a", _write(tmp_path / "a.jsonl", a)),
            *_source("b", _write(tmp_path / "b.jsonl", b), "max_epochs=2", "weight=3"),
            "data.sequence_length=50",
            "recipe.stages.first.steps=20",
            "recipe.stages.second.steps=10",
            "recipe.stages.second.sequence_length=100",
            "recipe.stages.second.mixture.a=1",
            "recipe.stages.second.mixture.b=1",
            "recipe.stages.second.lengths.short=2",
            "recipe.stages.second.lengths.long=6",
            "data.sources.a.lengths=[short]",
        ]
    )
    report = show(config, WordTokenizer(), 10**6)
    assert [(s.files, s.documents, s.tokens, s.part) for s in report.sources.values()] == [
        (1, 800, tokens_a, 1.0),
        (1, 90, tokens_b, 1.0),
    ]
    first, second = report.stages
    assert (first.name, first.begin, first.end, second.end) == ("first", 0, 6000, 12000)
    assert first.tokens == pytest.approx({"a": 1500, "b": 4500})
    assert second.tokens == pytest.approx({"a/short": 3000, "b/short": 750, "b/long": 2250})
    assert first.epochs == pytest.approx({"a": 1500 / tokens_a, "b": 4500 / tokens_b})
    long_b = sum(n for n in map(_length, b) if n >= 40)
    assert second.epochs["b/long"] == pytest.approx(2250 / long_b)
    assert report.sources["b"].lengths["long"][1] == pytest.approx(long_b / tokens_b)
    assert 2 * tokens_b > 4500, "b must run out in the second stage"
    used = 4500 / tokens_b
    (short, long) = (
        6000 + (2 - used) * there / share
        for there, share in [(sum(n for n in map(_length, b) if n < 20), 0.125), (long_b, 0.375)]
    )
    assert {(out.component, out.stage): out.tokens for out in report.runs_out} == {
        (name, "second"): pytest.approx(tokens)
        for name, tokens in [("b/short", short), ("b/long", long)]
        if tokens < 12000
    }
    # All of the recipe is packed, for that is less than there is; each of three streams is off by a document at most.
    assert report.tokens == 12000
    for stage in report.stages:
        assert stage.asked == pytest.approx(stage.tokens)
        for component, tokens in stage.tokens.items():
            assert abs(stage.read.get(component, 0) - tokens) <= 3 * 61 * 2, component
        assert sum(stage.read.values()) == 6000


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_packing_of_documents_in_reading_order(tmp_path, policy):
    texts = random_documents(57, longest=60)
    one = ["data.num_streams=1", "data.shuffle_documents=1", "data.sequence_length=32", f"data.packing={policy}"]
    files = ["data=files", "data.format=json", f"data.train_files=[{_write(tmp_path / 'a.jsonl', texts)}]"]
    config = load_config([*MODEL, *files, *one, *RECIPE, "recipe.steps=8"])
    report = show(config, WordTokenizer(), 10**6)
    lengths = list(map(_length, texts))
    drawn = [lengths[i % 57] for i in range(report.packing["split"].documents)]
    ends = list(accumulate(drawn))
    assert sum(n // 32 != (end - 1) // 32 for n, end in zip([0, *ends[:-1]], ends, strict=True)) == (
        report.packing["split"].split
    )
    room, cut, dropped = 32, 0, 0
    for length in drawn:
        cut, dropped = cut + (length > room), dropped + max(0, length - room)
        room = room - length if length < room else 32
    truncate = report.packing["truncate"]
    assert (truncate.split, truncate.truncated, truncate.tokens) == (cut, dropped, sum(drawn))
    assert report.packing["best_fit"].split < report.packing["split"].split


@pytest.mark.parametrize("excludes", [False, True])
def test_held_out_documents_and_windows_in_training(tmp_path, excludes):
    choose = random.Random(0)
    held_out = documents([30, 200, 300, 5, 140])
    train = [" ".join(choose.choices([str(n) for n in range(1000, 2000)], k=90)) for _ in range(40)]
    train[3] = held_out[1]
    words = held_out[2].split()
    train[7] = " ".join(["1500"] * 11 + words[60:200] + ["1700"])  # the windows at 64 and at 128
    train[9] = held_out[0]
    files = [f"data.train_files=[{_write(tmp_path / 'a.jsonl', train)}]"]
    files += [f"data.validation_files=[{_write(tmp_path / 'b.jsonl', held_out)}]"]
    more = ["data.sequence_length=100", "recipe.steps=20", f"data.exclude_held_out={str(excludes).lower()}"]
    config = load_config([*MODEL, "data=files", "data.format=json", *files, *RECIPE, *more])
    report = show(config, WordTokenizer(), 10**6)
    (found,) = report.held_out.values()
    assert (found.documents, found.tokens, found.windows) == (5, 680, 3 + 4 + 2)
    assert (found.found, found.windows_found) == ((0, 2) if excludes else (2, 5))


@pytest.mark.parametrize("kind", ["lines", "gzip", "parquet", "text"])
def test_an_epoch_is_estimated_from_a_part(tmp_path, kind):
    choose = random.Random(kind)
    texts = [" ".join(str(choose.randrange(10**6)) for _ in range(choose.randint(1, 60))) for _ in range(3000)]
    for i in range(3):
        some = texts[:: i + 2]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        if kind == "lines":
            (tmp_path / f"{i}.jsonl").write_text(lines)
        elif kind == "gzip":
            (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        elif kind == "parquet":
            pq.write_table(pa.table({"text": some}), tmp_path / f"{i}.parquet")
        else:
            for number, text in enumerate(some[:300]):
                (tmp_path / f"{i}-{number}.txt").write_text(text)
    total = sum(_length(text) for i in range(3) for text in texts[:: i + 2][: 300 if kind == "text" else None])
    file_format = {"lines": "json", "gzip": "json"}.get(kind, kind)
    config = MixtureSourceConfig(format=file_format, train_files=[f"{tmp_path}/*"])
    source = open_source(config, TRAIN, path="data", bad_documents="error")
    found = survey(source, WordTokenizer(), None, total // 4)
    assert total // 4 <= sum(found.lengths) < total // 2 and found.part < 0.5
    assert found.epoch_tokens == pytest.approx(total, rel=0.08)
    assert survey(source, WordTokenizer(), None, 10 * total).epoch_tokens == total


def test_the_command(tmp_path, capsys):
    words = ["attention", "state", "decay", "token", "expert", "router", "norm", "gate"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=choose.randint(1, 90))) for _ in range(300)]
    config = [*MODEL, *RECIPE, "recipe.steps=20", *_source("web", _write(tmp_path / "a.jsonl", texts), "held_out=0.1")]
    config += [*_source("code", _write(tmp_path / "b.jsonl", texts[:50]), "max_epochs=1"), "data.sequence_length=64"]
    files = ["--json", f"{tmp_path}/report.json", "--pictures", f"{tmp_path}/pictures"]
    assert cli.main(["show", *config, *files, "--tokens", "20_000"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 85
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"][0]["tokens"] == {"code": 3840.0, "web": 3840.0}
    assert f"0 of {report['held_out']['web']['documents']}\n" not in out and "0 of " in out
    assert "warning: code runs out in stage" in out
    for name in ("lengths", "mixture"):
        assert (tmp_path / f"pictures/{name}.png").read_bytes().startswith(b"\x89PNG")
    for wrong, said, status in [
        (["--tokens=0"], "--tokens=0.0: must be between 1", 2),
        (["--pictures", f"{tmp_path}/a.jsonl"], "a.jsonl", 1),
        (["data.sources.web.train_files=[/none/*.jsonl]"], "data.sources.web.train_files", 2),
    ]:
        assert cli.main(["show", *config, "--tokens=1000", *files, *wrong]) == status
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_an_epoch_that_is_not_known_names_the_stage():
    stages = ["recipe.stages.a.steps=2", "recipe.stages.b.epochs=1"]
    made = Recipe(load_config([*MODEL, *RECIPE, *stages]))
    with pytest.raises(ConfigError, match=r"^recipe.stages.b.epochs: .* or give recipe.stages.b.tokens$"):
        list(spans(made, {"stdlib": types.SimpleNamespace(epoch_tokens=None)}))
