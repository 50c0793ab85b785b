"""Odd configurations: what ``minimax-train`` is asked that nobody should ask, and what it may answer.

    PYTHONPATH=tests/lib python tests/lib/support/odd_configurations.py
        [--targeted 5000] [--random 5000] [--trained 500] [--seed 1]

*Targeted*: one field given an odd value of any type. *Random*: many fields at once, of plausible values. An answer is a
configuration that holds what was typed, or one line that names the field. *Trained*: two steps of a small model; an
answer is a checkpoint of finite numbers, or one line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import random
import re
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from minimax_train import cli
from minimax_train.config import Config
from minimax_train.engines import ENGINES, EngineConfig
from support.commands import Command

# Groups are parts of the configuration; a whole group cannot be given a value.
INTEGERS = ["-1", "0", "1", "2", "3", "7", "64", "1000", "1000000000", str(2**31), str(2**63), "9" * 30]
NUMBERS = [
    "1e-300",
    "1e-30",
    "1e-9",
    "0.5",
    "1.0",
    "1e3",
    "1e30",
    "1e308",
    "1e999",
    "inf",
    "-inf",
    "nan",
    "-1e-9",
    "-0.0",
]
WORDS = ["true", "false", "yes", "off", "null", "None", "~", "auto", "x", "2024_05_01", "7e53211", "1_0", "0x10", "012"]
TEXTS = [
    "",
    "' '",
    "a b",
    "é",
    "a=b",
    "${seed}",
    "${nothing}",
    "${now:%S}",
    "???",
    "'quo'ted'",
    "a,b",
    "[a",
    "{a",
    "a\nb",
]
LISTS = ["[]", "[1]", "[a]", "[['a']]", "[null]", "{}", "{a: 1}", "[a,b]", "[1.5,true]"]
ODD = INTEGERS + NUMBERS + WORDS + TEXTS + LISTS

# Small enough to train in a moment; every other field has its default.
SMALL = {
    "model.vocab_size": "300",
    "model.hidden_size": "16",
    "model.num_layers": "2",
    "model.layer_pattern": "LS",
    "model.num_heads": "2",
    "model.num_kv_heads": "1",
    "model.head_dim": "8",
    "model.rotary_dim": "4",
    "model.num_experts": "3",
    "model.expert_hidden_size": "12",
    "data.sequence_length": "32",
    "data.num_streams": "1",
    "data.num_workers": "0",
    "data.tokenizer_documents": "8",
    "recipe.steps": "2",
    "recipe.global_batch_size": "1",
    "recipe.micro_batch_size": "1",
    "recipe.warmup_steps": "0",
    "recipe.decay_steps": "0",
    "recipe.eval_interval": "0",
    "device": "cpu",
    "cache_dir": "null",
}
# What random configurations draw from, beside the odd values.
PLAUSIBLE: dict[str, Sequence[str]] = {
    "model.vocab_size": ["300", "301", "512"],
    "model.hidden_size": ["8", "15", "16", "40"],
    "model.num_layers": ["1", "2", "3"],
    "model.layer_pattern": ["LS", "L", "S", "LLS", "SL"],
    "model.num_heads": ["1", "2", "3", "6"],
    "model.num_kv_heads": ["1", "2", "3"],
    "model.head_dim": ["4", "6", "8"],
    "model.rotary_dim": ["2", "4", "6"],
    "model.rope_base": ["100", "1e4", "1e7"],
    "model.norm_eps": ["1e-12", "1e-6", "1e-3"],
    "model.residual_scale": ["0.5", "1", "3.5565588200778455"],
    "model.num_experts": ["1", "2", "3", "8"],
    "model.experts_per_token": ["1", "2", "3"],
    "model.expert_hidden_size": ["4", "12", "33"],
    "model.aux_loss_coefficient": ["0", "1e-2", "1"],
    "model.aux_loss_scope": ["rank", "sequence", "global"],
    "model.capacity_factor": ["null", "0.5", "1", "1.25"],
    "model.capacity_scope": ["rank", "sequence", "global"],
    "cache_dir": ["null", "cache"],
    "data.sequence_length": ["1", "2", "31", "32", "100"],
    "data.num_streams": ["1", "2", "3"],
    "data.num_workers": ["0", "0", "0", "1", "2"],
    "data.shuffle_documents": ["1", "4", "1000"],
    "data.packing": ["split", "truncate", "best_fit"],
    "data.exclude_held_out": ["true", "false"],
    "data.medium_length": ["2", "40"],
    "data.long_length": ["3", "80"],
    "data.max_epochs": ["100000", "null"],
    "parallel.layout": ["zigzag", "contiguous"],
    "parallel.cp": ["1", "1", "1", "2"],
    "parallel.tp": ["1", "1", "1", "2"],
    "parallel.token_groups": ["1", "2"],
    "parallel.pp": ["1", "1", "1", "2"],
    "parallel.pp_schedule": ["1f1b", "interleaved_1f1b", "zero_bubble", "dualpipe_v"],
    "parallel.pp_layers": ["[]", "[]", "[1,1]", "[1,2]"],
    "deterministic": ["false", "true"],
    "parallel.check_replicas": ["0", "0", "3"],
    "engine.reshard_after_forward": ["true", "false", "null"],
    "engine.shard_within": ["null", "1", "2"],
    "engine.precision": ["auto", "float32", "bfloat16", "float64"],
    "recipe.steps": ["1", "2", "3", "null"],
    "recipe.global_batch_size": ["1", "2", "3", "4", "null"],
    "recipe.micro_batch_size": ["1", "2"],
    "recipe.learning_rate": ["1e-5", "1e-3", "1"],
    "recipe.min_learning_rate": ["0", "1e-6", "1e-4", "null"],
    "recipe.decay_shape": ["exponential", "linear", "cosine"],
    "recipe.warmup_steps": ["0", "1", "2"],
    "recipe.decay_steps": ["0", "1", "2", "null"],
    "recipe.adam_beta1": ["0", "0.9"],
    "recipe.adam_beta2": ["0", "0.95", "0.999"],
    "recipe.adam_eps": ["1e-15", "1e-8", "1e-5"],
    "recipe.weight_decay": ["0", "0.1"],
    "recipe.outliers": ["ignore", "log", "skip", "rollback"],
    "recipe.outlier_sigmas": ["1", "6"],
    "recipe.outlier_window": ["4", "128"],
    "recipe.outlier_limit": ["1", "8"],
    "recipe.gradient_clip": ["null", "1", "0.1"],
    "recipe.activation_checkpointing": ["none", "selective", "full", "auto"],
    "recipe.tokens": ["64", "100.5"],
    "recipe.epochs": ["0.01", "1"],
    "recipe.batch_tokens": ["[64]", "[32, 64 from 50]"],
    "recipe.decay_tokens": ["32", "64"],
    "recipe.critical_batch": ["true", "false"],
    "recipe.critical_batch_tokens": ["1", "2e8"],
    "recipe.critical_batch_exponent": ["0.01", "4.76"],
    "recipe.scale": ["1", "0.5"],
    "recipe.batch_scale": ["1", "0.5"],
    "recipe.length_scale": ["1", "0.5"],
    "recipe.late_source": ["stdlib", "null"],
    "recipe.eval_interval": ["0", "1", "2"],
    "recipe.eval_sequences": ["1", "3"],
    "checkpoint.folder": ["null", "elsewhere/a", "memory://runs/a"],
    "checkpoint.interval": ["0", "1", "2"],
    "checkpoint.async_save": ["true", "false"],
    "checkpoint.keep": ["0", "1", "2"],
    "checkpoint.keep_every": ["0", "1", "2"],
    "checkpoint.keep_best": ["0", "1"],
    "checkpoint.leave_within_s": ["25", "100"],
    "checkpoint.initial_weights_strict": ["true", "false"],
    "checkpoint.resume": ["auto", "never"],
    "logging.interval": ["1", "2", "5"],
    "logging.norms": ["0", "1", "3"],
    "logging.per_layer": ["true", "false"],
    "logging.profile_steps": ["[]", "[1]", "[2,3]"],
    "logging.profile_ranks": ["[0]", "[0,1]"],
    "logging.tensorboard": ["true", "false"],
    "logging.expert_load": ["true", "false"],
    "seed": ["0", "1", "12345"],
}


@functools.cache
def field_types(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted key of every field that takes a value, and its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if name not in {f.name for f in dataclasses.fields(kind)}:
            continue
        if hint is EngineConfig:
            hint = ENGINES[EngineConfig.name].config_type
        found |= field_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
    return found


@dataclasses.dataclass
class Answer:
    """Of one command: exit status (or the name of what went wrong), output, and how long it took."""

    status: int | str
    out: str
    err: str
    seconds: float


def ask(arguments: Sequence[str], limit_s: int = 20) -> Answer:
    """``minimax-train`` in this process."""
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit_s)
    status: int | str
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(list(arguments))
    except TimeoutError:
        status = f"no answer in {limit_s} s"
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return Answer(status, out.getvalue(), err.getvalue(), time.perf_counter() - started)


def targeted(count: int, seed: int) -> Iterator[dict[str, str]]:
    """One odd value in an otherwise small configuration."""
    draw = random.Random(seed)
    keys = list(field_types())
    cases = [(key, value) for key in keys for value in ODD]
    draw.shuffle(cases)
    for key, value in cases[:count]:
        yield {**SMALL, key: value}


def random_ones(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Many fields at once: plausible values, now and then an odd one."""
    draw = random.Random(seed)
    keys = list(field_types())
    for _ in range(count):
        case = dict(SMALL)
        for key in draw.sample(list(PLAUSIBLE), draw.randint(1, 12)):
            case[key] = draw.choice(PLAUSIBLE[key])
        if draw.random() < 0.3:
            case[draw.choice(keys)] = draw.choice(ODD)
        yield case


def command(case: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in case.items()]


def refused_well(answer: Answer, case: dict[str, str]) -> str | None:
    """What is wrong with a refusal; None where nothing is."""
    lines = answer.err.strip().splitlines()
    if answer.status not in (1, 2):
        return f"status {answer.status}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"{len(lines)} lines"
    named = [key for key in field_types() if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", lines[0])]
    if answer.status == 2 and not named:
        return "no field is named"
    return None


def holds(typed: str, kind: Any, value: Any) -> bool:
    """Whether a field of a type holds what was typed; of lists only whether it is one of the right type."""
    options = [option for option in typing.get_args(kind) if isinstance(option, type)] or [kind]
    if value is None:
        return type(None) in options and typed.lower() in ("null", "none", "~", "")
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if bool in options:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return isinstance(value, bool) and words.get(typed.lower()) is value
    with contextlib.suppress(ValueError):
        if int in options and float not in options and isinstance(value, int):
            return value == int(typed, 0 if typed.lower().startswith("0x") else 10)
        if float in options and isinstance(value, (int, float)):
            return math.isfinite(value) and value == float(typed)
    if not isinstance(value, str) or str not in options:
        return False
    quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\""
    expanded = str(Path(typed).expanduser()) if typed.startswith("~") else typed
    return value in ((typed[1:-1],) if quoted else (typed, expanded))


def wrong(case: dict[str, str], answer: Answer) -> str | None:
    """What is wrong with the answer to ``--cfg``; None where nothing is."""
    if "Traceback" in answer.err or not isinstance(answer.status, int):
        return f"status {answer.status}"
    if answer.seconds > 5:
        return f"took {answer.seconds:.0f} s"
    if answer.status:
        return refused_well(answer, case)
    tree = yaml.safe_load(answer.out)
    for key, typed in case.items():
        node = tree
        for name in key.split("."):
            node = node[name]
        typed = case.get("seed", "0") if typed == "${seed}" else typed
        if not holds(typed, field_types()[key], node):
            return f"{key}={typed} became {node!r}"
    return None


def corpus(folder: Path) -> list[str]:
    path = folder / "corpus.jsonl"
    draw = random.Random(0)
    lines = [
        " ".join(draw.choices(["state", "decay", "ring", "gate", "expert"], k=draw.randint(2, 40))) for _ in range(40)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return ["data=files", "data.format=json", f"data.train_files=[{path}]", f"data.validation_files=[{path}]"]


def train(case: dict[str, str], folder: Path, limit_s: int = 60) -> Answer:
    """``minimax-train`` to its end, in a fork of this process, in ``folder``."""
    started = time.perf_counter()
    arguments = [*corpus(folder), *command(case)]
    if "run_dir" not in case:
        arguments.append(f"run_dir={folder}/run")
    try:
        status, out, err = Command(folder, arguments).finish(limit_s)
    except AssertionError as error:
        return Answer("hung", "", str(error), time.perf_counter() - started)
    return Answer(status if status >= 0 else f"signal {-status}", out, err, time.perf_counter() - started)


def wrong_training(case: dict[str, str], answer: Answer, folder: Path) -> str | None:
    """What is wrong with a run; None where nothing is."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    if "Traceback" in answer.err or not isinstance(answer.status, int):
        return f"status {answer.status}"
    if answer.status:
        return refused_well(answer, case)
    (run,) = {path.parent for path in folder.glob("**/metrics.jsonl")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not all(math.isfinite(value) for record in records for value in record.values()):
        return "a metric is not finite"
    if not any(record.get("loss", 0) > 0 for record in records):
        return "no loss"
    import torch

    elsewhere = yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["folder"]
    if elsewhere is not None and elsewhere.startswith("memory://"):
        return None
    newest = max((run / "checkpoints" if elsewhere is None else folder / elsewhere).glob("step-*"))
    dcp_to_torch_save(newest, folder / "whole.pt")
    state = torch.load(folder / "whole.pt", weights_only=False)
    bad = [name for name, tensor in state["model"].items() if not torch.isfinite(tensor).all()]
    if bad:
        return f"checkpoint holds NaN in {bad}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targeted", type=int, default=5000)
    parser.add_argument("--random", type=int, default=5000)
    parser.add_argument("--trained", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    failures = 0
    cases = [*targeted(options.targeted, options.seed), *random_ones(options.random, options.seed)]
    accepted = []
    for case in cases:
        answer = ask([*command(case), "--cfg"])
        problem = wrong(case, answer)
        if problem:
            failures += 1
            odd = {key: value for key, value in case.items() if SMALL.get(key) != value}
            print(f"{problem}: {odd}\n    {answer.err.strip()[-400:]}", flush=True)
        elif not answer.status:
            accepted.append(case)
    random.Random(options.seed).shuffle(accepted)
    for case in accepted[: options.trained]:
        with tempfile.TemporaryDirectory() as folder:
            answer = train(case, Path(folder))
            problem = wrong_training(case, answer, Path(folder))
            if problem:
                failures += 1
                odd = {key: value for key, value in case.items() if SMALL.get(key) != value}
                print(f"trained: {problem}: {odd}\n    {answer.err.strip()[-600:]}", flush=True)
    print(
        f"{len(cases)} asked, {len(accepted)} accepted, {min(len(accepted), options.trained)} trained, {failures} wrong"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
