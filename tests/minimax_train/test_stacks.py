"""Which collective is said to be under way, of flight recorders as NCCL fills them."""

import json

import pytest

from minimax_train import stacks


def _entry(group, name, state, is_p2p=False):
    return {"process_group": ["7", group], "profiling_name": f"nccl:{name}", "state": state, "is_p2p": is_p2p}


# Members of a whole that ended, which stay as scheduled.
COALESCED = [
    _entry("mesh_ep", "all_to_all", "scheduled"),
    _entry("mesh_ep", "all_to_all", "scheduled"),
    _entry("mesh_ep", "coalesced", "completed"),
]
CASES = {
    "nothing": ([], ""),
    "all ended": (COALESCED, ""),
    "a later one of the group": ([*COALESCED, _entry("mesh_ep", "all_gather", "started")], "all_gather (group ep)"),
    "one of another group": (
        [_entry("mesh_dp", "all_reduce", "started"), *COALESCED, _entry("mesh_ep", "all_gather", "scheduled")],
        "all_reduce (group dp)",
    ),
    "several started as one": (
        [_entry("mesh_ep", "all_reduce", "completed"), _entry("mesh_ep", "coalesced", "started")],
        "coalesced (group ep)",
    ),
    "a pair of ranks, whose transfers wait for no others": (
        [_entry("mesh_pp", "send 0->1", "started", True), _entry("mesh_pp", "recv 0<-1", "completed", True)],
        "send 0->1 (group pp)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_oldest_that_can_be_under_way_is_named(monkeypatch, case):
    entries, expected = CASES[case]
    monkeypatch.setattr(
        stacks.c10d, "_dump_nccl_trace_json", lambda *_: json.dumps({"entries": entries}).encode(), raising=False
    )
    monkeypatch.setattr(stacks.c10d, "_dump_fr_trace_json", lambda *_: b'{"entries": []}', raising=False)
    assert stacks.last_collective() == expected
