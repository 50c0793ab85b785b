"""In which order streams use memory, and how long it lives, with a CPU playing the streams."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.context.lightning import lightning_attention_cp
from minimax_train.parallel.context.softmax import softmax_attention_cp
from minimax_train.parallel.experts import ExpertParallel, dispatchers, overlap
from support.streams import Link, Streams

GRIDS = [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2)]
T, K, E, D, F = 15, 2, 6, 6, 12


@pytest.fixture
def streams(monkeypatch):
    streams = Streams("/parallel/")

    def after(axis, xs):
        axis._stream = axis._stream or streams.make()
        return streams.on(axis._stream, *(x.event for x in xs))

    monkeypatch.setattr(overlap.CommunicationStream, "_after", after)
    monkeypatch.setattr(overlap, "record_event", streams.record_event)
    monkeypatch.setattr(overlap, "wait_event", streams.wait_event)
    return streams


def _problems(streams, ep, etp, groups):
    """Of two layers after one another, forward and backward."""
    torch.manual_seed(0)
    shapes = [(T, D), (T, K), (E // ep, 2 * F // etp, D), (E // ep, D, F // etp)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    experts = torch.arange(T * K).view(T, K) % E  # as many tokens to one rank as to any other
    links = (Link(streams, 0, size) for size in (ep, etp))
    expert_layer = ExpertParallel(*links, num_experts=E, token_groups=groups)
    with streams:
        y = expert_layer(*leaves[:2], experts, *leaves[2:], implementation="torch")
        y = expert_layer(y, leaves[1], experts, *leaves[2:], implementation="torch")
        for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
            gradient.clone()
    return streams.problems


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_streams_wait_for_each_other(streams, sizes, groups):
    assert not _problems(streams, *sizes, groups)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_gemms_that_do_not_wait_are_found(monkeypatch, streams, sizes, groups):
    monkeypatch.setattr(overlap, "wait_event", lambda event: None)
    assert any("used while still in use" in problem for problem in _problems(streams, *sizes, groups))


def _keep_nothing(monkeypatch):
    def init(transfer, tensor, event, source=None):
        transfer.tensor, transfer.event, transfer._kept = tensor, event, None

    monkeypatch.setattr(overlap.Transfer, "__init__", init)


def _keep_nothing_that_is_sent_back(monkeypatch):
    def combine(trip, *args):
        before = len(trip._returning)
        original(trip, *args)
        for transfer in trip._returning[before:]:
            transfer._kept = None

    original = overlap.OverlappedRoundTrip.combine
    monkeypatch.setattr(overlap.OverlappedRoundTrip, "combine", combine)


def _keep_no_assignments(monkeypatch):
    original = dispatchers.TokenDispatcher.plan
    monkeypatch.setattr(dispatchers.TokenDispatcher, "plan", lambda dispatcher: original(dispatcher)[:0])


# With one group, where tokens that stay are computed first.
STAYING = [(ep, etp) for ep, etp in GRIDS if ep > 1 and etp == 1]
MISTAKES = [
    *((_keep_nothing, sizes, 4) for sizes in GRIDS),
    *((_keep_nothing, sizes, 1) for sizes in STAYING),
    *((_keep_nothing_that_is_sent_back, sizes, 4) for sizes in GRIDS),
    *((_keep_nothing_that_is_sent_back, sizes, 1) for sizes in STAYING),
    *((_keep_no_assignments, sizes, 4) for sizes in GRIDS if sizes[0] == 1),
]


@pytest.mark.parametrize(("mistake", "sizes", "groups"), MISTAKES)
def test_memory_given_up_too_early_is_found(monkeypatch, streams, mistake, sizes, groups):
    mistake(monkeypatch)
    assert any("handed out while still in use" in problem for problem in _problems(streams, *sizes, groups))


def _problems_of_attention(streams, attend, kind, ranks=3):
    """Of two layers after one another on every rank; a sequence of one document, and one of several."""
    shapes = [(12, 2, 4), (12, 2, 4), (12, 2, 4)]
    for lengths in ([12 * ranks], [5, 1, 20, 12 * ranks - 26]):
        layout, whole = SequenceLayout(kind, ranks), Documents.from_lengths(lengths)
        for rank in range(ranks):
            q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
            shard, link = layout.shard(whole, rank), Link(streams, rank, ranks)
            with streams:
                out = attend(attend(q, k, v, shard, link), k, v, shard, link)
                for gradient in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
                    gradient.clone()
    return streams.problems


def _lightning(method):
    def attend(q, k, v, shard, link):
        # A head with a short memory and one with a long memory.
        slopes = torch.tensor([9.0, 0.1])
        return lightning_attention_cp(q, k, v, slopes, shard, link, method=method, implementation="chunked")

    return attend


def _softmax(method):
    def attend(q, k, v, shard, link):
        return softmax_attention_cp(q, k, v, shard, link, scale=0.5, method=method, implementation="blocked")

    return attend


ATTENTIONS = [
    *((_lightning, method) for method in ("lasp_plus", "scan", "ring")),
    *((_softmax, method) for method in ("ring", "allgather")),
]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("attention", "method"), ATTENTIONS)
def test_attention_waits_for_transfers(streams, attention, method, kind):
    assert not _problems_of_attention(streams, attention(method), kind)


@pytest.mark.parametrize(("attention", "method"), ATTENTIONS)
def test_attention_that_does_not_wait_is_found(monkeypatch, streams, attention, method):
    monkeypatch.setattr(Streams, "wait_event", lambda streams, event: None)
    assert any(
        "used while still in use" in problem for problem in _problems_of_attention(streams, attention(method), "zigzag")
    )
