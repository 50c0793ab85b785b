"""An emulated link: one GPU plays one rank of several, and a transfer holds its stream as long as the real one would.

:class:`EmulatedLink` is a Communicator (``minimax_train.parallel.communicator``). What other ranks would have sent is a
local copy of tensors of the right shape, so results are wrong and times are right; correctness is the tests' business.
Each transfer runs on the link's own stream, beside compute, on ``sms`` processors, and takes, the copy included,

    latency + bytes through this rank's link in the busier direction / rate.

States that travel from chunk to chunk (serial LASP, scan; contiguous layout) reach a rank only when all ranks before it
have passed them on: a receive that starts such a journey waits for the hops before this rank as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimax_train.parallel.communicator import Pending

# Two H200 over NVLink: an all-gather of 4 MB takes 39 us, a send-receive of 1 GB 2.98 ms. And a 400 Gb/s card per GPU.
RATES = {"nvlink": (20e-6, 335e9), "network": (30e-6, 50e9)}


@dataclass
class EmulatedLink:
    """One rank's end of an emulated link.

    Attributes:
        rank, size: the rank that is played, and how many there are.
        latency_s, bytes_per_s: of a transfer.
        sms: processors a transfer occupies while it lasts.
        chained: whether states travel from rank to rank, forwards or backwards, to this one past all before it.
        pieces: in how many pieces they travel.
    """

    rank: int
    size: int
    latency_s: float
    bytes_per_s: float
    sms: int = 8
    chained: bool = False
    pieces: int = 1
    _received: int = 0
    _stream: torch.cuda.Stream | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            self._stream = torch.cuda.Stream(priority=-1)

    def all_gather(self, x: Tensor) -> Pending:
        out = x.new_empty(self.size, *x.shape)
        return self._transfer((self.size - 1) * x.nbytes, lambda: out.copy_(x.expand_as(out)), out)

    def reduce_scatter(self, x: Tensor) -> Pending:
        out = torch.empty_like(x[0])
        return self._transfer((self.size - 1) * out.nbytes, lambda: torch.sum(x, 0, out=out), out)

    def all_to_all(self, x: Tensor, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Pending:
        row_bytes = x[:1].nbytes
        outgoing = (sum(sends) - sends[self.rank]) * row_bytes
        incoming = (sum(receives) - receives[self.rank]) * row_bytes

        def fill() -> None:
            for start in range(0, sum(receives), max(1, len(x))):
                target = out[start : min(start + len(x), sum(receives))]
                target.copy_(x[: len(target)])

        return self._transfer(max(outgoing, incoming), fill, out)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending:
        outgoing = sum(x.nbytes for x in sends.values())
        incoming = sum(x.nbytes for x in receives.values())
        extra_hops = 0
        if self.chained and receives and not sends:
            (giver,) = receives
            hops = giver if giver < self.rank else self.size - 1 - giver
            extra_hops = hops if self._received % self.pieces == 0 else 0
            self._received += 1

        def fill() -> None:
            for x in receives.values():
                x.normal_(std=0.02)

        return self._transfer(max(outgoing, incoming), fill, None, extra_hops)

    def _transfer(self, size: int, copy, result: Tensor | None, extra_hops: int = 0) -> Pending:
        seconds = (self.latency_s + size / self.bytes_per_s) * (1 + extra_hops)
        if self._stream is None:
            time.sleep(seconds)
            copy()
            return Pending(lambda: result)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            started = torch.empty(1, dtype=torch.int64, device="cuda")
            _clock[(1,)](started)
            copy()
            # Small programs would share a processor with others; 1024 threads leave a product no registers.
            _hold[(self.sms,)](started, int(seconds * 1e9), num_warps=32)

        def wait() -> Tensor | None:
            torch.cuda.current_stream().wait_stream(self._stream)
            return result

        return Pending(wait)


class FreeLink(EmulatedLink):
    """Transfers that take nothing: once ``moving`` is off, buffers keep what was in them.

    Turn it off after a few calls, when memory is full of numbers like those that would arrive: on zeros a GPU computes
    faster. Integers are always moved: they are counts.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, 0.0, float("inf"))
        self.moving = True

    def _transfer(self, size: int, copy: Callable[[], object], result: Tensor | None, extra_hops: int = 0) -> Pending:
        if self.moving or (result is not None and not result.is_floating_point()):
            copy()
        return Pending(lambda: result)


@triton.jit
def _now():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def _clock(out):
    tl.store(out, _now())


@triton.jit
def _hold(started, nanoseconds):
    """Keep the current stream and some processors busy until a time after ``started``."""
    end = tl.load(started) + nanoseconds
    now = _now()
    while now < end:
        now = _now()
