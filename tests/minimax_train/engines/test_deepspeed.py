"""``engine=deepspeed`` against ``engine=zero1`` on one rank: grids, bfloat16, and states in host memory."""

import pytest
import torch

from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.conformance import freeing, import_deepspeed
from support.distributed import TIMEOUT, run_ranks
from support.runs import DIVISIBLE, ON_GPU, tiny_run, weights_of

SIZES = [*DIVISIBLE, "model.num_layers=2", "model.layer_pattern=LS", "model.aux_loss_coefficient=0.5"]
SIZES += ["recipe.global_batch_size=8", "recipe.micro_batch_size=1", "data.num_streams=4", "recipe.gradient_clip=0.5"]
SIZES += ["logging.norms=1"]
OFFLOAD, FULL = "engine.offload_optimizer=true", "recipe.activation_checkpointing=full"


class NaiveCPUAdam(torch.optim.Optimizer):
    """AdamW in place of DeepSpeed's, which takes minutes to compile."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                state["step"] += 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                m, v = (
                    state["exp_avg"] / (1 - beta1 ** state["step"]),
                    state["exp_avg_sq"] / (1 - beta2 ** state["step"]),
                )
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


def _two_steps(_, configs, device="cpu"):
    """Of each: losses and gradient norms; weights; figures."""
    found = []
    for config in configs:
        grid = ProcessGrid.create(device, TIMEOUT, **config.parallel.sizes)
        trainer = Trainer(config, grid, torch.device(device, torch.cuda.current_device() if device == "cuda" else None))
        held = _held_after_the_blocks(trainer.engine)
        taken = [trainer.metrics(trainer.train_step()) for _ in range(2)]
        assert not any(held)
        numbers = [step[key] for step in taken for key in ("loss", "grad_norm")]
        found.append((numbers, weights_of(trainer), taken[-1]))
        trainer.loader.close()
    return found


def _held_after_the_blocks(engine):
    """Bytes of the first block's gathered weights in each forward pass of the final norm, with stage 3."""
    held, names = [], [name for name in engine.parameters if name.startswith("layers.0.")]
    for optimizer in getattr(engine, "_optimizers", {}).values():
        if (offload := getattr(optimizer, "parameter_offload", None)) is not None:

            def look(*_, places=offload._places):
                found = [places[p] for p in map(engine.parameters.get, names) if p in places]
                held.append(sum(x.untyped_storage().nbytes() for x in found))

            engine.model.norm.register_forward_pre_hook(look)
    return held


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """By precision."""
    names = ("float32", "bfloat16")
    folder = tmp_path_factory.mktemp("one")
    configs = [tiny_run(folder / n, *SIZES, "engine=zero1", f"engine.precision={n}") for n in names]
    return dict(zip(names, run_ranks(_two_steps, 1, configs)[0], strict=True))


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [["bfloat16", "engine.stage=1"], ["bfloat16", "engine.stage=2"], ["bfloat16", "engine.stage=2", OFFLOAD]]),
        (2, [["float32", "engine.stage=1", OFFLOAD, "parallel.ep=2"]]),
        (2, [["bfloat16", "engine.stage=3", "recipe.activation_checkpointing=selective"]]),
        (3, [["float32", "engine.stage=3", OFFLOAD, "engine.offload_param=true", "parallel.cp=3", FULL]]),
        (1, [["float32", "engine.stage=2", OFFLOAD], ["float32", "engine.stage=3", OFFLOAD]]),
        (
            4,
            [
                ["float32", "engine.stage=1", "parallel.tp=2", "parallel.ep=2"],
                ["float32", "engine.stage=2", "parallel.tp=2", "parallel.ep=2"],
                ["float32", "engine.stage=0", "parallel.cp=2", "parallel.etp=2"],
            ],
        ),
    ],
    ids=str,
)
def test_steps_are_those_of_one_rank(right, tmp_path, monkeypatch, world, cases):
    configs = []
    for i, (precision, *options) in enumerate(cases):
        options += ["engine=deepspeed", f"engine.precision={precision}"]
        if "engine.stage=3" in options:
            options.append(freeing(tmp_path))
        configs.append(tiny_run(tmp_path / str(i), *SIZES, *options))
        configs[-1].check_world_size(world)
    import_deepspeed()
    monkeypatch.setattr("minimax_train.engines.deepspeed_zero.DeepSpeedCPUAdam", NaiveCPUAdam)
    for results in run_ranks(_two_steps, world, configs):
        for (precision, *_), (numbers, weights, metrics) in zip(cases, results, strict=True):
            expected_numbers, expected, theirs = right[precision]
            assert numbers == pytest.approx(expected_numbers, rel=1e-5)
            norms = {name: value for name, value in theirs.items() if "_norm/" in name}
            # Of weights as they compute, rounded.
            assert len(norms) == 14 and {name: metrics[name] for name in norms} == pytest.approx(norms, rel=4e-3)
            for name, weight in weights.items():
                assert relative_error(weight, expected[name]) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [[OFFLOAD], ["engine.stage=3", OFFLOAD, "engine.offload_param=true"]], ids=str)
def test_in_host_memory(tmp_path, offload):
    """With DeepSpeedCPUAdam itself: the steps are those without, and the GPU holds less."""
    shared = [*SIZES, *ON_GPU, "engine=deepspeed", "engine.precision=bfloat16"]
    found = []
    for name, more in (("host", offload), ("gpu", [])):
        if "engine.stage=3" in more:
            more = [*more, freeing(tmp_path)]
        config = tiny_run(tmp_path / name, *shared, *more)
        config.check_world_size(1)
        ranks = run_ranks(_two_steps, 1, [config], "cuda", device="cuda", start="spawn", timeout_s=600)
        found.append(ranks[0][0])
    (numbers, weights, metrics), on_gpu = found
    assert numbers == pytest.approx(on_gpu[0], rel=1e-3)
    for name, weight in weights.items():
        assert relative_error(weight, on_gpu[1][name]) < 1e-3, name
    assert metrics["peak_memory_gib"] < on_gpu[2]["peak_memory_gib"]
