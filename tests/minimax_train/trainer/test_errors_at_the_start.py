"""What is wrong for one rank alone ends all of them alike, before they wait for each other."""

import shutil

import torch
import torch.distributed as dist

from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run


def _start(grid, configs):
    try:
        Trainer(configs[dist.get_rank()], grid, torch.device("cpu"))
    except ConfigError as error:
        return str(error), error.on_all_ranks


def test_an_error_of_one_ranks_data_is_raised_on_all_at_the_start(tmp_path):
    """The second rank has more streams than documents; or it sees another file, as of a copy on its own machine."""
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.jsonl").write_text('{"text": "ring state"}\n' * 3)
    config = tiny_run(tmp_path, f"data.train_files=[{few}/a.jsonl]", "recipe.eval_interval=0")
    first, second = run_ranks(_start, 2, [config, config])
    assert first == second
    assert "stream 3 got none of the 3 documents" in first[0] and first[1]

    there, here = tiny_run(tmp_path), tiny_run(tmp_path)
    here.data.train_files = [str(shutil.copy(here.data.train_files[0], tmp_path / "other.jsonl"))]
    first, second = run_ranks(_start, 2, [there, here])
    assert first == second
    assert (
        first[0].startswith("data: 1 ranks, the first of them rank 1, see other training files than rank 0")
        and first[1]
    )
