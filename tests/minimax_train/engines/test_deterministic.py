"""``deterministic=true``: what it switches, and on a GPU that two runs give the same bits."""

import pytest
import torch

from minimax_train.deterministic import use_deterministic_algorithms
from minimax_train.errors import ConfigError
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.distributed import GPU_LINKS, TIMEOUT, run_gpu_ranks
from support.runs import ON_GPU, tiny_run, weights_of


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)


def test_what_is_set():
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    use_deterministic_algorithms(environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_NVLS_ENABLE": "0"}
    assert torch.are_deterministic_algorithms_enabled()


def test_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        use_deterministic_algorithms({"NCCL_NVLS_ENABLE": "1"})
    assert str(caught.value) == "NCCL_NVLS_ENABLE='1': must be 0, or not set, with deterministic=true"
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, "deterministic=true", "kernels.softmax=flash4")
    assert str(caught.value).startswith("kernels.softmax='flash4': its backward pass adds up in no fixed order: ")


def _train(_, configs):
    """Losses, gradient norms and weights of each run."""
    use_deterministic_algorithms()
    found = []
    for config in configs:
        device = torch.device("cuda", torch.cuda.current_device())
        trainer = Trainer(config, ProcessGrid.create("cuda", TIMEOUT, **config.parallel.grid), device)
        steps = [trainer.train_step() for _ in range(6)]
        trainer.guard.check()
        numbers = [(float(step.totals.loss), float(step.report.gradient_norm)) for step in steps]
        by_origin = torch.stack([step.totals.loss_by_origin_O for step in steps])
        found.append((numbers, by_origin, weights_of(trainer)))
        trainer.loader.close()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("link", GPU_LINKS)
def test_two_runs_give_the_same_bits(tmp_path, link):
    """bfloat16, documents that softmax attention's backward pass splits over many blocks; each run twice."""
    more = [*ON_GPU, "data.sequence_length=2112", "recipe.global_batch_size=4", "deterministic=true"]
    cases = [[], ["engine=fsdp"], ["parallel.ep=2"], ["parallel.tp=2"]]
    configs = [
        tiny_run(tmp_path / f"{i}-{again}", *more, *options) for i, options in enumerate(cases) for again in range(2)
    ]
    for results in run_gpu_ranks(_train, link, configs):
        for first, second in zip(results[::2], results[1::2], strict=True):
            assert first[0] == second[0]
            assert torch.equal(first[1], second[1])
            assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
