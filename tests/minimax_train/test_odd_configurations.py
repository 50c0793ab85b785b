"""Every configuration is taken as typed, or refused in one line that names the field; what is taken trains."""

import copy
import functools
import random

import pytest

from minimax_train import compose
from support.odd_configurations import ask, command, random_ones, targeted, train, wrong, wrong_training

SHARES = 4  # so that several workers share them
CASES = [*targeted(300, seed=0), *random_ones(300, seed=0)]


@pytest.fixture(autouse=True)
def files_once(monkeypatch):
    """Hydra merges the same files for most cases: once is enough."""
    merge = functools.cache(compose._files)
    monkeypatch.setattr(compose, "_files", lambda *names: copy.deepcopy(merge(*map(tuple, names))))


@pytest.mark.parametrize("share", range(SHARES))
def test_odd_configurations(tmp_path, share):
    problems, accepted = [], []
    for case in CASES[share::SHARES]:
        answer = ask([*command(case), "--cfg"])
        if problem := wrong(case, answer):
            problems.append((problem, case, answer.err))
        elif answer.status == 0:
            accepted.append(case)
    assert len(accepted) > 10, "the draw must hold configurations that are taken"
    # A tokenizer by name is looked for on the hub, for a minute where there is no network.
    trainable = [case for case in accepted if "data.tokenizer" not in case]
    for case in random.Random(share).sample(trainable, 5):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        answer = train(case, folder)
        if problem := wrong_training(case, answer, folder):
            problems.append((problem, case, answer.err))
    assert not problems, "\n".join(map(str, problems))
