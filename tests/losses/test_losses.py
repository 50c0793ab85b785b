"""Twenty steps on many grids give the losses, gradient norms and tokens that were recorded."""

import copy
from itertools import combinations

import pytest

from support.losses import RECORDINGS, RUNS, TOLERANCE, differences, read, record

SAME = [(a, b) for a, b in combinations(RUNS, 2) if RUNS[a].what == RUNS[b].what]


def _recorded(name):
    return read(RECORDINGS / f"{name}.json")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_recorded_one(tmp_path, name):
    found = differences(record(RUNS[name], tmp_path), _recorded(name), TOLERANCE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("a", "b"), SAME)
def test_recordings_of_the_same_run_on_two_grids_agree(a, b):
    assert differences(_recorded(a), _recorded(b), TOLERANCE) == []


def test_every_recording_is_of_a_run():
    assert {path.stem for path in RECORDINGS.glob("*.json")} == RUNS.keys()


def test_differences_are_found():
    right = _recorded("evaluated")
    wrong = copy.deepcopy(right)
    assert differences(wrong, right, 0.0) == []
    wrong["steps"]["3"]["loss"] *= 1 + 1e-12
    wrong["steps"]["4"]["grad_norm"] = float("nan")
    del wrong["steps"]["5"]["validation_loss"]
    wrong["steps"]["6"]["tokens"] = "0"
    wrong["rows"]["1"][2][7] += 1
    del wrong["rows"]["11"][-1]
    found = differences(wrong, right, TOLERANCE)
    starts = [
        "step 3: loss",
        "step 4: grad_norm nan",
        "step 5: validation_loss None against",
        "step 6: tokens 0 against",
    ]
    starts += ["step 1, row 2: [", "step 11: 3 rows against 4"]
    assert len(found) == len(starts)
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True)), found
