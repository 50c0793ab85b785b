"""``engine=deepspeed`` against ``engine=zero1`` on one rank: grids, bfloat16, and states in host memory."""

from unittest import mock

import pytest
import torch

from minimax_train.engines.deepspeed import DeepSpeedEngine
from support.compare import relative_error
from support.conformance import freeing, import_deepspeed
from support.distributed import run_ranks
from support.memory import Held
from support.runs import ON_GPU, tiny_run
from support.two_steps import SIZES, NaiveAdamW, build_trainer, take_two_steps

OFFLOAD, FULL = "engine.offload_optimizer=true", "recipe.activation_checkpointing=full"


class NaiveCPUAdam(NaiveAdamW):
    """In place of DeepSpeed's, which takes minutes to compile; steps are counted in states."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] += 1
                self.update(p, group, self.state[p]["step"])


def _two_steps(_, configs, device="cpu"):
    found = []
    for config in configs:
        trainer = build_trainer(config, device)
        held = _held_after_the_blocks(trainer.engine)
        found.append(take_two_steps(trainer))
        assert not any(held)
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
        for (precision, *_), found in zip(cases, results, strict=True):
            # Weights' norms are of weights as they compute, rounded.
            found.check(right[precision], of_norms=4e-3)


def _needed(_, config):
    """Bytes that the engine, when it is built, says that it will need beside activations; and those that it holds more
    when all gradients of a step's last micro-batch are there."""
    choose, ends = DeepSpeedEngine._choose_recomputation, []
    with (
        Held() as held,
        mock.patch.object(DeepSpeedEngine, "_choose_recomputation", autospec=True, side_effect=choose) as chosen,
        mock.patch(
            "minimax_train.engines.deepspeed_zero.ZeroOptimizer.end_micro_batch", lambda *_: ends.append(held.now)
        ),
    ):
        trainer = build_trainer(config, "cpu")
        built, plan = held.now, trainer.plan()
        trainer.engine.run(trainer.next_batches(plan), plan)
    trainer.loader.close()
    return chosen.call_args.args[1], ends[-1] - built


def test_what_is_left_for_activations(tmp_path):
    """Gradients, and the buffer in which they are reduced, are there only in a backward pass."""
    sizes = ["model.hidden_size=80", "model.expert_hidden_size=200", "recipe.eval_interval=0"]
    config = tiny_run(tmp_path, *SIZES, *sizes, "engine=deepspeed", "engine.stage=1", "engine.precision=bfloat16")
    config.check_world_size(1)
    import_deepspeed()
    ((said, held),) = run_ranks(_needed, 1, config)
    assert held == pytest.approx(said, rel=0.05)


def _of_norms(_, config):
    """Bytes that norms by group take beside what a step holds, and those of all gradients."""
    with Held() as held:
        trainer = build_trainer(config, "cpu")
        plan = trainer.plan()
        trainer.engine.run(trainer.next_batches(plan), plan)
        before = held.most = held.now
        trainer.engine.norms()
    trainer.loader.close()
    return held.most - before, sum(4 * x.numel() for x in trainer.engine.parameters.values())


def test_norms_hold_one_gradient_at_a_time(tmp_path):
    config = tiny_run(tmp_path, *SIZES, "model.num_layers=8", "engine=deepspeed", "engine.stage=1")
    config.check_world_size(1)
    import_deepspeed()
    ((more, gradients),) = run_ranks(_of_norms, 1, config)
    assert more < gradients / 3


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
    in_host_memory, on_gpu = found
    assert in_host_memory.numbers == pytest.approx(on_gpu.numbers, rel=1e-3)
    for name, weight in in_host_memory.states["master"].items():
        assert relative_error(weight, on_gpu.states["master"][name]) < 1e-3, name
    assert in_host_memory.metrics["peak_memory_gib"] < on_gpu.metrics["peak_memory_gib"]
