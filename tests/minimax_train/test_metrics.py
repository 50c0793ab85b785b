"""What a run writes, against the same computed from whole tensors and by hand."""

import gzip
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.guard import TakenStep
from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.left import TimeLeft
from minimax_train.metrics.log import MetricLog
from minimax_train.metrics.norms import GROUPS, group_of, norm_metrics
from minimax_train.phases import PHASES
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, ON_GPU, gradients_of, model_config, overrides, tiny_run, weights_of, write_corpus

EXACT = [*DIVISIBLE, "engine.precision=float64", "recipe.steps=3", "recipe.warmup_steps=1", "recipe.decay_steps=1"]
EXACT += ["recipe.eval_interval=0", "checkpoint.interval=0"]
THREE = ["recipe.global_batch_size=12", "data.num_streams=12"]  # a batch that three ranks can share
# Of these names; written by hand, not by the rules under test.
GROUP_OF = {
    "embedding.weight": "embedding",
    "layers.0.attention_norm.weight": "norms",
    "layers.0.attention.qkv_proj.weight": "lightning_attention",
    "layers.0.attention.gate_proj.weight": "lightning_attention",
    "layers.0.attention.norm.weight": "norms",
    "layers.0.attention.o_proj.weight": "lightning_attention",
    "layers.0.expert_norm.weight": "norms",
    "layers.0.experts.router.weight": "router",
    "layers.0.experts.mlp.gate_up_proj": "experts",
    "layers.0.experts.mlp.down_proj": "experts",
    "layers.2.attention.q_proj.weight": "softmax_attention",
    "layers.2.attention.o_proj.weight": "softmax_attention",
    "norm.weight": "norms",
    "head.weight": "head",
}


def test_every_parameter_has_a_group():
    assert {name: group_of(name, model_config()) for name in GROUP_OF} == GROUP_OF
    assert set(GROUP_OF.values()) == set(GROUPS)


def _norms(grid, config):
    """Of a step by the engine, and by hand from the whole tensors."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    plan = trainer.plan()
    trainer.engine.run(trainer.next_batches(plan), plan)
    found = norm_metrics(trainer.engine.norms())
    by_hand = {}
    for kind, tensors in (("grad_norm", gradients_of(trainer)), ("weight_norm", weights_of(trainer))):
        for name, x in tensors.items():
            key = f"{kind}/{group_of(name, config.model)}"
            by_hand[key] = by_hand.get(key, 0.0) + float(x.double().square().sum())
    return found, {key: value**0.5 for key, value in by_hand.items()}, float(trainer.engine.step(0.1).gradient_norm)


@pytest.mark.parametrize(
    ("engine", "world", "axes"),
    [("zero1", 2, {"tp": 2, "ep": 2}), ("fsdp engine.shard_within=1", 2, {"ep": 2})],
    ids=str,
)
def test_norms_by_group_are_those_of_the_whole_tensors(tmp_path, engine, world, axes):
    sizes = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    config = tiny_run(tmp_path, *EXACT, *THREE, *f"engine={engine}".split(), *sizes)
    for found, by_hand, whole in run_ranks(_norms, world, config, **axes):
        assert found == pytest.approx(by_hand, rel=1e-10) and len(found) == 2 * len(GROUPS)
        squares = sum(value**2 for name, value in found.items() if name.startswith("grad_norm/"))
        assert squares**0.5 == pytest.approx(whole, rel=1e-10)


def _train_with_a_slow_rank(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    read = trainer.next_batches

    def slow(plan):
        if torch.distributed.get_rank() == 2:
            time.sleep(0.2)
        return read(plan)

    trainer.next_batches = slow
    trainer.train()


def _documented():
    """Of docs/metrics.md: a pattern per metric, and whether only a GPU has it."""
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text().partition("## Events")[0]
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| (GPU)?", text, re.MULTILINE)
    return {re.sub("SOURCE|LENGTH|LL|EE|GROUP|PHASE", "[a-z0-9_]+", name): bool(gpu) for name, gpu in rows}


@pytest.fixture(scope="module")
def run_of_three(tmp_path_factory):
    """A run that writes all there is, on three ranks of which one is slow to read its data."""
    folder = tmp_path_factory.mktemp("three")
    given = [x for x in overrides(folder) if not x.startswith(("data=", "data.format", "data.train", "data.valid"))]
    for seed, name in enumerate(("web", "code")):
        given += [
            f"data.sources.{name}.format=json",
            f"data.sources.{name}.train_files=[{write_corpus(folder, 90, seed)}]",
        ]
        given += [f"data.sources.{name}.held_out=0.2"]
    given += [*EXACT, *THREE, "recipe.eval_interval=3", "recipe.eval_sequences=6", "data.medium_length=20"]
    given += ["data.packing=truncate", "data.bad_documents=skip", "recipe.outliers=log", "logging.norms=2"]
    given += ["logging.profile_steps=[2]", "logging.profile_ranks=[0,2]", "logging.expert_load=true"]
    given += ["logging.tensorboard=true", "data.long_length=60"]
    run_ranks(_train_with_a_slow_rank, 3, load_config(given))
    return folder / "run"


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_metric_is_documented_and_no_other(run_of_three):
    documented = _documented()
    written = {name for record in _records(run_of_three / "metrics.jsonl") for name in record} - {"step"}
    assert not {name for name in written if not any(re.fullmatch(pattern, name) for pattern in documented)}
    on_cpu = [pattern for pattern, gpu in documented.items() if not gpu and pattern != "rollbacks"]  # of another policy
    assert not [pattern for pattern in on_cpu if not any(re.fullmatch(pattern, name) for name in written)]
    assert [pattern for pattern, gpu in documented.items() if gpu] == [
        "mfu", "device_seconds/[a-z0-9_]+", "memory_gib", "reserved_memory_gib", "peak_memory_gib",
    ]  # fmt: skip


def test_the_slowest_rank(run_of_three):
    records = [record for record in _records(run_of_three / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["slowest_rank/data"] == 2 and record["slowest_seconds/data"] > 0.2 > record["seconds/data"]
        assert {name.partition("/")[2] for name in record if name.startswith("slowest_")} <= set(PHASES)
        assert record["fullest_memory_gib"] > 0.05 and record["fullest_rank"] in (0, 1, 2)
        assert ("grad_norm/experts" in record) == (record["step"] == 2)
    assert [record["seconds_left"] > 0 for record in records] == [True, True, False]


def test_tensorboard_has_the_same_numbers(run_of_three):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = event_accumulator.EventAccumulator(str(run_of_three / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected = {
        (name, record["step"]): value
        for record in _records(run_of_three / "metrics.jsonl")
        for name, value in record.items()
        if name != "step"
    }
    found = {(name, x.step): x.value for name in board.Tags()["scalars"] for x in board.Scalars(name)}
    assert found == pytest.approx(expected, rel=1e-6)


def test_traces_are_of_the_chosen_steps_and_ranks(run_of_three):
    paths = sorted((run_of_three / "traces").iterdir())
    assert [path.name for path in paths] == [f"step-00000002-rank-{rank}.json.gz" for rank in (0, 2)]
    for path in paths:
        trace = gzip.decompress(path.read_bytes()).decode()
        assert trace.strip()[0] == "{" and trace.strip()[-1] == "}"  # to parse all of it takes seconds
        for name in ("data", "forward", "backward", "norms", "optimizer", "aten::mm"):
            assert f'"name": "{name}"' in trace, name


def _untraced(grid, config):
    return Trainer(config, grid, torch.device("cpu")).tracer.beyond(3)


def test_steps_that_are_not_there_are_not_traced_in_silence(tmp_path):
    config = tiny_run(tmp_path, "logging.profile_steps=[2,99,7]", "logging.profile_ranks=[1]")
    assert run_ranks(_untraced, 2, config) == [
        [],
        ["logging.profile_steps=[7, 99]: no trace, the run ends after step 3"],
    ]


def test_events(run_of_three):
    events = _records(run_of_three / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "checkpoint", "done"]
    assert [event["step"] for event in events] == [0, 3, 3]
    assert "3 ranks" in events[0]["text"] and all(abs(event["time"] - time.time()) < 600 for event in events)
    table = (Path(__file__).parents[2] / "docs/metrics.md").read_text().partition("## Events")[2]
    source = (Path(__file__).parents[2] / "minimax_train/trainer.py").read_text()
    kinds = {*re.findall(r"log\.event\(\s*\"(\w+)\"", source), "stall", "stopped"}
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == kinds


def test_weights_and_biases_goes_on_under_one_id_and_alerts(tmp_path, monkeypatch):
    begun, alerts = [], []

    def init(**given):
        begun.append(given)
        alert = lambda **told: alerts.append(told["title"])  # noqa: E731
        name = given["id"] or f"new-{len(begun)}"
        return SimpleNamespace(id=name, alert=alert, define_metric=lambda *_, **__: None, finish=lambda **_: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=OSError))
    for run, first_step in (("a", 0), ("a", 2), ("b", 0)):
        (tmp_path / run).mkdir(exist_ok=True)
        with MetricLog(
            LoggingConfig(wandb="offline"), tmp_path / run, {}, total_steps=9, first_step=first_step, enabled=True
        ) as log:
            for kind in ("start", "stage", "checkpoint", "outlier", "rollback", "stall", "saved", "stopped", "done"):
                log.event(kind, first_step, kind)
    assert [(given["id"], given["resume"]) for given in begun] == [(None, "allow"), ("new-1", "allow"), (None, "allow")]
    told = [f"{kind}: {run}" for run in "aab" for kind in ("outlier", "rollback", "stall", "stopped")]
    assert alerts == told  # those that docs/metrics.md names


def test_a_step_takes_as_long_as_on_the_device():
    """Whose clock counts, not the host's, which comes late and catches up; an evaluation between two steps does not."""

    class At:
        def __init__(self, ms):
            self.ms = ms

        def elapsed_time(self, later):
            return later.ms - self.ms

    def taken(number, host, paused_s, device_ms):
        event = None if device_ms is None else At(device_ms)
        return TakenStep(number, 10 * number, host - paused_s, paused_s, *[None] * 5, event)

    first, late, next_one = taken(1, 1.0, 0.0, 1300), taken(2, 1.9, 0.0, 1600), taken(3, 2.0, 0.0, 1900)
    assert [late.seconds_since(first), next_one.seconds_since(late)] == pytest.approx([0.3, 0.3])
    evaluated = taken(4, 7.1, 5.0, 7200)
    assert evaluated.seconds_since(next_one) == pytest.approx(0.3)
    assert taken(2, 6.7, 5.0, None).seconds_since(taken(1, 1.0, 0.0, None)) == pytest.approx(0.7)


def test_time_left_goes_by_the_last_reports(monkeypatch):
    now = iter([0.0, 100.0, 101.0, 103.0, 104.0])  # the first step takes long
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    left = TimeLeft(1000)
    left.add(1010)
    assert left.seconds(10) == 100
    left.add(1020)
    left.add(1040)
    left.add(1050)
    assert left.seconds(300) == 30


def _train_on_gpu(grid, config):
    Trainer(config, grid, torch.device("cuda", torch.cuda.current_device())).train()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["zero1", "fsdp"])
def test_the_device_tells_how_long_it_was_in_each_phase(tmp_path, engine):
    steps = ["recipe.steps=12", "recipe.eval_interval=0", "checkpoint.interval=0", "logging.interval=3"]
    steps += ["logging.norms=1"]
    config = tiny_run(tmp_path, *ON_GPU, *steps, f"engine={engine}")
    run_ranks(_train_on_gpu, 1, config, start="spawn", device="cuda")
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    parts = {name: value for name, value in last.items() if name.startswith("device_seconds/")}
    runs = {"graph"} if engine == "zero1" else {"forward", "backward"}
    assert parts.keys() >= {f"device_seconds/{name}" for name in {*runs, "optimizer", "norms"}}
    assert all(value > 0 for value in parts.values()) and sum(parts.values()) < 1.05 * last["seconds"]
    assert 0 < last["memory_gib"] <= min(last["peak_memory_gib"], last["reserved_memory_gib"])
