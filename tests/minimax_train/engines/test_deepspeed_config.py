"""What ``engine=deepspeed`` accepts: its fields, and a DeepSpeed JSON beside what the run decides."""

import json
import shutil
from math import prod

import pytest

from minimax_train.engines import ENGINES
from minimax_train.errors import ConfigError
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallelize import whole_layouts
from support.runs import DIVISIBLE, tiny_run


def _configured(folder, given, *more):
    path = folder / "ds.json"
    path.write_text(json.dumps(given) if not isinstance(given, str) else given)
    more = ["recipe.learning_rate=0.001", "recipe.weight_decay=0.1", *more]
    config = tiny_run(folder, "engine=deepspeed", f"engine.config={path}", *more)
    config.check_world_size(2)
    return config.engine


def test_a_json_that_says_what_the_run_says(tmp_path):
    given = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto", "weight_decay": 0.1}},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1e6,
            "overlap_comm": False,
            "round_robin_gradients": True,
        },
    }
    zero = _configured(tmp_path, given).zero()
    assert zero["stage"] == 2 and zero["reduce_bucket_size"] == 1e6 and zero["round_robin_gradients"] is True
    assert zero["offload_optimizer"] is None
    offloaded = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    assert _configured(tmp_path, offloaded).zero()["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert _configured(tmp_path, {}, "engine.stage=0").zero()["stage"] == 0
    assert _configured(tmp_path, {}).zero()["stage"] == 1


def test_a_json_of_stage_3(tmp_path):
    given = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    }
    options = _configured(tmp_path, {"zero_optimization": given})
    assert options.zero() == {key: value for key, value in given.items() if value != "auto"}


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        (
            {"train_batch_size": 8},
            [],
            r"train_batch_size=8: the run decides it: must be 4 \(recipe.global_batch_size\)",
        ),
        ({"gradient_clipping": 0.5}, [], r"gradient_clipping=0.5: .* must be 1.0 \(recipe.gradient_clip\)"),
        ({"optimizer": {"type": "Lion"}}, [], r"optimizer.type='Lion': .* must be 'AdamW' or 'Adam'"),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            [],
            r"optimizer.params.lr=0.1: .* must be 0.001 \(recipe.learning_rate",
        ),
        ({"optimizer": {"params": {"momentum": 0.1}}}, [], r"optimizer.params.momentum: is not read; accepted are lr,"),
        ({"bf16": {"enabled": True}}, [], r"bf16.enabled=True: .* must be False \(engine.precision\)"),
        ({"scheduler": {}}, [], r"scheduler: is not read; accepted are zero_optimization, train_batch_size"),
        ({"zero_optimization": {"stage": 4}}, [], r"zero_optimization.stage=4: must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3}},
            [*DIVISIBLE, "parallel.tp=2"],
            r"parallel.tp=2: must be 1 with engine=deepspeed engine.stage=3",
        ),
        ({}, [*DIVISIBLE, "engine.stage=3", "parallel.ep=2"], r"parallel.ep=2: must be 1 with engine=deepspeed engine"),
        ({}, ["engine.stage=3", "parallel.etp=2"], r"parallel.etp=2: must be 1 with engine=deepspeed engine.stage=3"),
        ({}, ["engine.stage=3", "parallel.check_replicas=1"], r"check_replicas=1: must be 0 with engine=deepspeed eng"),
        ({}, ["engine.stage=2", "engine.offload_param=true"], r"engine.offload_param=True: must be false at engine.st"),
        (
            {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 9}},
            [],
            r"stage3_max_live_parameters: is not read at stage 2; accepted are stage, .*, allgather_bucket_size",
        ),
        ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 9}}, [], r"is not read at stage 3; accepted are"),
        ({"zero_optimization": {"stage": 2}}, ["engine.stage=1"], r"stage=2: must be as engine.stage=1, or left out"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, [], r"zero_hpz_partition_size: is not read at stage 1"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            [],
            r"device='nvme': must be one of cpu, none",
        ),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, [], r"zero_optimization: reduce_bucket_size: "),
        ("[", [], r"ds.json': cannot be read as JSON: "),
        ("[]", [], r"ds.json': must hold a JSON object"),
        ({}, ["engine.stage=0", "engine.offload_optimizer=true"], r"engine.offload_optimizer=True: must be false at"),
    ],
)
def test_refusals(tmp_path, given, more, said):
    with pytest.raises(ConfigError, match=said) as caught:
        _configured(tmp_path, given, *more)
    assert "engine." in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler for DeepSpeedCPUAdam, and there is no 'c\+\+'"):
        _configured(tmp_path, {}, "engine.offload_optimizer=true")


def test_what_a_rank_holds_and_receives(tmp_path):
    """Two ranks in bfloat16: bytes a parameter as docs/engines.md has them, and a bucket of all gradients."""
    layouts, grid = whole_layouts(tiny_run(tmp_path, *DIVISIBLE).model), GridSizes(2)
    numbers = sum(prod(layout.shape) for layout in layouts.values())
    for stage, held, received in ((0, 18, 4), (1, 6 + 6, 4 + 1), (2, 2 + 8, 3 * 4 + 1), (3, 1 + 8, 3 * (2 + 2 * 1))):
        options = ["engine=deepspeed", f"engine.stage={stage}", "engine.precision=bfloat16"]
        config, engine = tiny_run(tmp_path, *DIVISIBLE, *options), ENGINES["deepspeed"]
        memory = engine.memory(config, layouts, grid, "cpu")
        assert memory.pop("gradients being reduced") == (8 if stage == 3 else 4) * numbers
        assert memory.pop("gathered weights", 2 * numbers) == 2 * numbers, "few enough to be kept"
        assert sum(memory.values()) == pytest.approx(held * numbers, rel=0.01)
        step = engine.data_parallelism(config, layouts, grid, "cpu", 3)
        assert sum(x.times * x.num_bytes for x in step.transfers) == pytest.approx(received * numbers, rel=0.01)
