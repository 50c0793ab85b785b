"""Process groups of the grid: which ranks, over which backend, with which options."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from minimax_train.parallel import grid as grid_module
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.grid import DENSE, EXPERT, EXPERT_TRANSFER_CTAS, JOINED, OVER_STAGES, ProcessGrid
from support.distributed import TIMEOUT, run_ranks

AXES = (*DENSE, *EXPERT, *JOINED, *OVER_STAGES)


def _ranks(grid):
    return {axis: dist.get_process_group_ranks(grid.group(axis)) for axis in AXES}


def test_ranks_of_every_axis():
    """As in the table at the top of parallel/grid.py, of rank 5."""
    assert run_ranks(_ranks, 8, tp=2, cp=2, ep=4)[5] == {
        "pp": [5],
        "epp": [5],
        "dp": [1, 5],
        "cp": [5, 7],
        "tp": [4, 5],
        "edp": [1, 5],
        "ep": [4, 5, 6, 7],
        "etp": [5],
        "dp_cp": [1, 3, 5, 7],
        "cp_tp": [4, 5, 6, 7],
        "dp_cp_tp": list(range(8)),
        "pp_cp_tp": [4, 5, 6, 7],
        "world": list(range(8)),
    }


def test_ranks_of_pipeline_stages():
    """Stages are the slowest axis: ranks 0 to 3, and 4 to 7."""
    assert run_ranks(_ranks, 8, pp=2, tp=2, ep=2)[6] == {
        "pp": [2, 6],
        "epp": [2, 6],
        "dp": [4, 6],
        "cp": [6],
        "tp": [6, 7],
        "edp": [4, 6],
        "ep": [6, 7],
        "etp": [6],
        "dp_cp": [4, 6],
        "cp_tp": [6, 7],
        "dp_cp_tp": [4, 5, 6, 7],
        "pp_cp_tp": [2, 3, 6, 7],
        "world": list(range(8)),
    }


def _timeouts(grid):
    return {axis: grid.group(axis)._get_backend(torch.device("cpu")).options._timeout for axis in AXES}


def test_every_group_has_the_timeout_of_the_run():
    for timeouts in run_ranks(_timeouts, 4, tp=2, ep=2, etp=2):
        assert set(timeouts.values()) == {TIMEOUT}, timeouts


def _groups(grid, axis):
    """Names of the groups of a grid of two ranks, made as over NCCL, where groups have options of their own."""
    with (
        patch.object(grid_module, "transfer_options", lambda *_: "gloo"),
        patch.object(dist, "get_backend_config", lambda *_: "cpu:nccl"),
    ):
        made = ProcessGrid.create("cpu", TIMEOUT, **{axis: 2})
        names = {axis: made.group(axis).group_name for axis in AXES}
        return names | {"apart": made.group_apart("dp_cp_tp").group_name}


@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_transfers_within_a_layer_do_not_take_turns_with_data_parallelism(axis):
    """Over whose group all weights are gathered at once, before the first layer."""
    for names in run_ranks(_groups, 2, axis):
        gathered = names["dp_cp_tp"]
        assert not {names[axis], names["cp_tp"], names["apart"]} & {gathered, names["edp"]}


# ---------------------------------------------------------------------------------------------- on GPUs


def _options(grid):
    """Of the NCCL group of each axis: priority and bound on SMs; and whether all ranks' sum is right."""
    found = {}
    for axis in AXES:
        group = grid.group(axis)
        options = group._get_backend(torch.device("cuda")).options
        communicator = GroupCommunicator(group)
        assert communicator._is_nccl
        total = communicator.all_gather(torch.ones(3, device="cuda")).wait().sum()
        assert total == 3 * communicator.size
        found[axis] = options.is_high_priority_stream, options.config.max_ctas
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "token_groups"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_transfers_beside_products_have_priority(world, token_groups):
    """And those of experts leave them SMs, where there are products beside them."""
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    grid = {"tp": min(world, 2), "ep": min(world, 2), "etp": world // min(world, 2), "token_groups": token_groups}
    for found in run_ranks(_options, world, start="spawn", device="cuda", **grid):
        for axis, (high_priority, max_ctas) in found.items():
            assert high_priority, axis
            bounded = token_groups > 1 and axis in ("ep", "etp")
            assert (max_ctas == EXPERT_TRANSFER_CTAS) == bounded, axis
