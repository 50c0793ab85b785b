"""What calls between graphs keep."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from minimax_train import capture
from minimax_train.capture import Recording, uncaptured


class _Calls:
    """Stands for a recording: makes its calls, and keeps none."""

    is_calling, is_repeatable = False, True

    def call(self, run, again):
        run()


def test_a_result_that_a_call_keeps_is_kept_once(monkeypatch):
    """Where graphs read it, which so have that memory until the call's backward pass."""
    monkeypatch.setattr(capture, "_lent", lambda x: x)
    monkeypatch.setattr(Recording, "current", _Calls())
    results = []

    @uncaptured
    def exp(x):
        out = x.exp()  # which keeps it for its backward pass
        results.append(StorageWeakRef(out.untyped_storage()))
        return out

    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = exp(1 * x)
    assert results[0].expired()
    memory, loss = StorageWeakRef(y.untyped_storage()), (3 * y).sum()
    del y
    assert not memory.expired()
    loss.backward()
    assert memory.expired()
    torch.testing.assert_close(x.grad, 3 * x.detach().exp())
