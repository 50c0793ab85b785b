"""Where there is no GPU, Triton kernels run through Triton's interpreter and tests marked ``gpu`` are skipped."""

import gc
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, so before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _keep_inherited() -> None:
    gc.freeze()
    gc.enable()


# Garbage of earlier tests may own threads, as a process group of gloo does. A rank forked from here has none of them,
# and would wait for them for ever, should its garbage collector find such an object: also while it still runs what
# other modules have registered for a fork, which comes before this.
os.register_at_fork(before=gc.disable, after_in_parent=gc.enable, after_in_child=_keep_inherited)


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test has printed can hold odd characters, and pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Uninitialised memory that shows up in any result it reaches: NaN, or an index far out of range."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
