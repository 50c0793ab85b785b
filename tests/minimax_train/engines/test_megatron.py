"""``engine=megatron`` against ``engine=zero1`` on one rank: grids, bfloat16, overlaps, optimizers, states."""

import gc
import importlib.util
import sys
import types
import weakref
from contextlib import nullcontext

import pytest
import torch

from minimax_train.engines.fused_adam import FUSED_ADAMS, find_fused_adam
from minimax_train.errors import ConfigError
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import TIMEOUT, run_ranks
from support.megatron import on_cpu
from support.runs import DIVISIBLE, ON_GPU, all_whole, tiny_run

SIZES = [*DIVISIBLE, "model.num_layers=2", "model.layer_pattern=LS", "model.aux_loss_coefficient=0.5"]
SIZES += ["recipe.global_batch_size=8", "recipe.micro_batch_size=1", "data.num_streams=4", "recipe.gradient_clip=0.5"]
SIZES += ["logging.norms=1"]
BUCKETS = "engine.bucket_size=3000"
APEX = "engine.fused_adam=apex"
NO_OVERLAP = ["engine.overlap_grad_reduce=false", "engine.overlap_param_gather=false"]


class NaiveFusedAdam(torch.optim.Optimizer):
    """AdamW as apex has it: steps are counted in groups, and moments made where there are none."""

    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                p.mul_(1 - rate * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                m, v = (
                    state["exp_avg"] / (1 - beta1 ** group["step"]),
                    state["exp_avg_sq"] / (1 - beta2 ** group["step"]),
                )
                p.sub_(rate * m / (v.sqrt() + group["eps"]))


@pytest.fixture
def apex(monkeypatch):
    modules = {name: types.ModuleType(name) for name in ("apex", "apex.optimizers", "apex.normalization", "amp_C")}
    modules["apex.optimizers"].FusedAdam = NaiveFusedAdam
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def _whole(state):
    """Master weights and moments, put together from all ranks."""
    found = {"param": all_whole(state["model"])}
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = all_whole({name: moments[kind] for name, moments in state["optimizer"].items()})
    return found


def _two_steps(_, configs, device="cpu"):
    """Of each: losses and gradient norms; weights and moments; figures; whether the states are taken back after a
    third step, and memory is given back."""
    found = []
    for config in configs:
        grid = ProcessGrid.create(device, TIMEOUT, **config.parallel.sizes)
        own = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
        with on_cpu() if device == "cpu" else nullcontext():
            trainer = Trainer(config, grid, own)
            taken = [trainer.metrics(trainer.train_step()) for _ in range(2)]
            state, well = trainer.engine.snapshot(), True
            whole = _whole(state)
            if config.engine.name == "megatron":  # whose snapshots are copies
                trainer.train_step()
                trainer.engine.restore(state)
                again = _whole(trainer.engine.snapshot())
                well = all(torch.equal(x, again[kind][name]) for kind in whole for name, x in whole[kind].items())
                held = weakref.ref(trainer.engine._ddp.buffers[0])
                trainer.loader.close()
                del trainer
                gc.collect()
                well &= held() is None
        numbers = [step[key] for step in taken for key in ("loss", "grad_norm")]
        found.append((numbers, whole, taken[-1], well))
    return found


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """By precision."""
    names = ("float32", "bfloat16")
    folder = tmp_path_factory.mktemp("one")
    configs = [tiny_run(folder / n, *SIZES, "engine=zero1", f"engine.precision={n}") for n in names]
    return dict(zip(names, run_ranks(_two_steps, 1, configs)[0], strict=True))


def _check(found, expected, tolerance=1e-4):
    (numbers, whole, metrics, well), (expected_numbers, expected_whole, theirs, _) = found, expected
    assert well
    assert numbers == pytest.approx(expected_numbers, rel=tolerance / 10)
    norms = {name: value for name, value in theirs.items() if "_norm/" in name}
    assert len(norms) == 14 and {name: metrics[name] for name in norms} == pytest.approx(norms, rel=tolerance)
    for kind, of_kind in expected_whole.items():
        for name, x in of_kind.items():
            assert relative_error(whole[kind][name], x) < tolerance, (kind, name)


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
        for (precision, *_), found in zip(cases, results, strict=True):
            _check(found, right[precision])


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


@pytest.mark.gpu
@pytest.mark.parametrize("fused_adam", FUSED_ADAMS)
def test_on_gpus(tmp_path, fused_adam):
    """Megatron-Core itself, on one GPU and over NCCL."""
    if find_fused_adam(fused_adam) is None:
        pytest.skip(f"{fused_adam} is not installed")
    shared = [*SIZES, *ON_GPU, "engine.precision=bfloat16"]
    reference = [tiny_run(tmp_path / "zero1", *shared, "engine=zero1", "engine.cuda_graphs=false")]
    spawned = {"device": "cuda", "start": "spawn", "timeout_s": 600}
    expected = run_ranks(_two_steps, 1, reference, "cuda", **spawned)[0][0]
    options = ["engine=megatron", BUCKETS, f"engine.fused_adam={fused_adam}"]
    for world in range(1, min(torch.cuda.device_count(), 2) + 1):
        axes = [[], ["parallel.ep=2"]][:world]
        configs = [tiny_run(tmp_path / f"{world} {i}", *shared, *options, *more) for i, more in enumerate(axes)]
        for results in run_ranks(_two_steps, world, configs, "cuda", **spawned):
            for found in results:
                _check(found, expected, tolerance=2e-2)
