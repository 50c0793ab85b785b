"""The cost model against the transfers it was drawn through and others that were measured."""

import pytest

from minimax_train.parallel.cost import H200, NETWORK, NVLINK


@pytest.mark.parametrize(
    ("num_bytes", "measured_s"), [(64e6, 0.26e-3), (1e9, 2.98e-3), (2**26, 264e-6), (2**28, 886e-6)]
)
def test_send_receives_over_nvlink(num_bytes, measured_s):
    assert NVLINK.send_receive_s(num_bytes) == pytest.approx(measured_s, rel=0.04)


@pytest.mark.parametrize(("bytes_per_rank", "measured_s"), [(2**22, 58e-6), (2**24, 102e-6), (2**28, 1060e-6)])
def test_all_gathers_over_nvlink(bytes_per_rank, measured_s):
    assert NVLINK.all_gather_s(bytes_per_rank, 2) == pytest.approx(measured_s, rel=0.04)


def test_transfers():
    assert NVLINK.send_receive_s(0) == NVLINK.all_gather_s(0, 8) == NVLINK.all_gather_s(1e6, 1) == 0
    # Seven other ranks' bytes arrive.
    assert NVLINK.all_gather_s(1e9, 8) == pytest.approx(40e-6 + 7e9 / 263e9)
    assert NETWORK.send_receive_s(5e9) == pytest.approx(0.1, rel=1e-3)


def test_links():
    assert [H200.link(ranks) for ranks in (1, 8, 9, 128)] == [NVLINK, NVLINK, NETWORK, NETWORK]
