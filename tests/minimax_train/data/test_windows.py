"""Shared windows against sets of tuples."""

import random

import numpy as np

from minimax_train.data.windows import WINDOW, SharedWindows, window_hashes


def _windows(tokens):
    return [tuple(tokens[i : i + WINDOW]) for i in range(len(tokens) - WINDOW + 1)]


def test_equal_windows_and_no_others_have_equal_hashes():
    choose = random.Random(0)
    for length in (0, 63, 64, 65, 700):
        tokens = choose.choices([0, 1, 200_063], k=length)
        tokens[length // 2 :] = tokens[: length - length // 2]  # the half of them comes twice
        hashes = window_hashes(np.array(tokens, dtype=np.int64)).tolist()
        windows = _windows(tokens)
        assert len(hashes) == len(windows)
        assert len(set(hashes)) == len(set(windows)) == len(set(zip(windows, hashes, strict=True)))


def test_windows_are_found_at_any_position():
    choose = random.Random(1)
    held_out = [choose.choices(range(1000), k=length) for length in (63, 64, 200, 500, 127)]
    held_out.append(held_out[1])
    training = [choose.choices(range(1000), k=300) for _ in range(5)]
    training[0][17 : 17 + 64] = held_out[1]  # whole: one window, in two documents
    training[1][0:150] = held_out[2][50:200]  # the second and the third of three windows are at 64 and 128
    training[2][200:300] = held_out[3][300:400]  # the one at 320; five with the copy of the first
    training[3][100:163] = held_out[4][:63]  # one token too few
    everywhere = {window for tokens in training for window in _windows(tokens)}
    expected = [window in everywhere for tokens in held_out for window in _windows(tokens)[::WINDOW]]
    shared = SharedWindows([np.array(tokens) for tokens in held_out])
    for tokens in training:
        shared.look_in(np.array(tokens))
    assert (shared.met, shared.total) == (sum(expected), len(expected)) == (5, 13)
