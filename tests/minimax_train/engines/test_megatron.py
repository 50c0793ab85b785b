"""``engine=megatron`` against ``engine=zero1`` on one rank: grids, bfloat16, overlaps, optimizers, states."""

import gc
import importlib.util
import sys
import types
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils._pytree import tree_map

from minimax_train.engines.fused_adam import FUSED_ADAMS, find_fused_adam
from minimax_train.errors import ConfigError
from support.distributed import run_ranks
from support.megatron import on_cpu
from support.memory import Held
from support.runs import ON_GPU, tiny_run
from support.two_steps import SIZES, NaiveAdamW, build_trainer, take_two_steps, two_steps_of_zero1, whole_states

BUCKETS = "engine.bucket_size=3000"
APEX = "engine.fused_adam=apex"
NO_OVERLAP = ["engine.overlap_grad_reduce=false", "engine.overlap_param_gather=false"]


class NaiveFusedAdam(NaiveAdamW):
    """As apex has it: steps are counted in groups, and moments made where there are none."""

    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, lr, betas, eps)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.update(p, group, group["step"])


@pytest.fixture
def apex(monkeypatch):
    modules = {name: types.ModuleType(name) for name in ("apex", "apex.optimizers", "apex.normalization", "amp_C")}
    modules["apex.optimizers"].FusedAdam = NaiveFusedAdam
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def _two_steps(_, configs, device="cpu"):
    """Of each also: whether the states are taken back after a third step; and whether memory is given back."""
    found = []
    for config in configs:
        with on_cpu() if device == "cpu" else nullcontext():
            trainer = build_trainer(config, device)
            steps = take_two_steps(trainer)
            state = tree_map(lambda x: x.clone(), trainer.engine.snapshot())
            trainer.train_step()
            trainer.engine.restore(state)
            again = whole_states(trainer.engine.snapshot())
            right = [(again[kind][name], x) for kind, states in steps.states.items() for name, x in states.items()]
            restored = all(torch.equal(a, b) for a, b in right)
            held = weakref.ref(trainer.engine._ddp.buffers[0])
            trainer.loader.close()
            del trainer
            gc.collect()
        found.append((steps, restored, held() is None))
    return found


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (
            2,
            [
                ["bfloat16", BUCKETS, "engine.fused_adam=torch"],
                ["float32", *NO_OVERLAP, APEX, "parallel.tp=2"],
                ["float32", "parallel.cp=2", "parallel.etp=2"],
            ],
        ),
        (4, [["float32", BUCKETS, "parallel.tp=2", "parallel.ep=2"]]),
    ],
    ids=str,
)
def test_steps_are_those_of_one_rank(right, tmp_path, apex, world, cases):
    configs = []
    for i, (precision, *options) in enumerate(cases):
        options += ["engine=megatron", f"engine.precision={precision}"]
        configs.append(tiny_run(tmp_path / str(i), *SIZES, *options))
        configs[-1].check_world_size(world)
    for results in run_ranks(_two_steps, world, configs):
        for (precision, *_), (steps, restored, freed) in zip(cases, results, strict=True):
            assert restored and freed
            steps.check(right[precision])


def _peaks(grid, config):
    """Bytes while a run is begun, and while its state is taken for a save; and those that the engine should hold."""
    with on_cpu(), Held() as held:
        trainer = build_trainer(config, "cpu")
        begun = held.most
        state = trainer.engine.snapshot()
        planned = trainer.engine.memory(config, trainer.engine.layouts, grid, "cpu")
    assert state["model"]
    return begun, held.most, sum(planned.values())


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_is_held_twice(tmp_path, world):
    """Initial weights are drawn where they train; a run that begins anew copies no states, and one rank never does."""
    sizes = ["model.num_layers=24", "model.hidden_size=80", "model.vocab_size=300", "recipe.eval_interval=0"]
    config = tiny_run(tmp_path, *sizes, "engine=megatron", "engine.precision=bfloat16")
    for begun, saved, planned in run_ranks(_peaks, world, config):
        assert planned < begun < 1.12 * planned
        assert saved == begun or world > 1


def _held(_, config):
    """Bytes before a save, and after it."""
    with on_cpu(), Held() as held:
        trainer = build_trainer(config, "cpu")
        for _ in range(2):
            trainer.metrics(trainer.train_step())
        gc.collect()
        before = held.now
        trainer.save(trainer.plan(), must_succeed=True)
        gc.collect()
        return before, held.now


def test_a_save_keeps_nothing(tmp_path):
    """Of several ranks the state is a copy."""
    sizes = ["model.num_layers=24", "model.hidden_size=80", "recipe.eval_interval=0", "recipe.steps=9"]
    config = tiny_run(tmp_path, *sizes, "engine=megatron", "engine.precision=bfloat16")
    for before, after in run_ranks(_held, 2, config):
        assert after < 1.05 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["engine.precision=float64"], r"engine.precision='float64': must be one of auto, bfloat16, float32"),
        (
            ["engine.overlap_grad_reduce=false"],
            r"engine.overlap_param_gather=True: must be false with engine.overlap_gr",
        ),
        ([*NO_OVERLAP, BUCKETS], r"engine.bucket_size=3000: must be null with engine.overlap_grad_reduce=false"),
        (
            ["engine.fused_adam=fused"],
            r"engine.fused_adam='fused': must be one of auto, transformer_engine, apex, torch",
        ),
        (["engine.fused_adam=apex"], r"engine.fused_adam='apex': needs NVIDIA's apex .* PyPI's apex is another"),
        (["parallel.pp=2"], r"parallel.pp=2: must be 1 with engine=megatron"),
    ],
)
def test_refused_by_name(tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # PyPI's
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, "engine=megatron", *options).check_world_size(2)


def test_the_norm_of_apex_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"^kernels.norm='apex': needs NVIDIA's apex .* PyPI's apex is another$"):
        tiny_run(tmp_path, "kernels.norm=apex").kernels.check_device("cuda")


def test_megatron_core_and_a_gpu_are_needed(tmp_path, monkeypatch):
    config = tiny_run(tmp_path, "engine=megatron")
    with pytest.raises(ConfigError, match=r"^engine.name='megatron': needs a GPU, .* device=cpu$"):
        config.engine.check_device("cpu")
    config.engine.check_device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"^engine.name='megatron': needs .*: pip install 'minimax-train\[megatron\]'$"
    ):
        config.check_world_size(1)


def _two_steps_of_zero1(grid, config, device):  # of a test module, as a spawned process needs it
    return two_steps_of_zero1(grid, config, device)


@pytest.mark.gpu
@pytest.mark.parametrize("fused_adam", FUSED_ADAMS)
def test_on_gpus(tmp_path, fused_adam):
    """Megatron-Core itself, on one GPU and over NCCL."""
    if find_fused_adam(fused_adam) is None:
        pytest.skip(f"{fused_adam} is not installed")
    shared = [*SIZES, *ON_GPU, "engine.precision=bfloat16"]
    reference = tiny_run(tmp_path / "zero1", *shared, "engine=zero1", "engine.cuda_graphs=false")
    spawned = {"device": "cuda", "start": "spawn", "timeout_s": 600}
    (right,) = run_ranks(_two_steps_of_zero1, 1, reference, "cuda", **spawned)
    options = ["engine=megatron", BUCKETS, f"engine.fused_adam={fused_adam}"]
    for world in range(1, min(torch.cuda.device_count(), 2) + 1):
        axes = [[], ["parallel.ep=2"]][:world]
        configs = [tiny_run(tmp_path / f"{world} {i}", *shared, *options, *more) for i, more in enumerate(axes)]
        for results in run_ranks(_two_steps, world, configs, "cuda", **spawned):
            for steps, restored, freed in results:
                assert restored and freed
                steps.check(right, tolerance=2e-2, of_norms=2e-2)
