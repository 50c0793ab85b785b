"""An emulated link: one GPU plays one rank of several, and a transfer holds its stream as long as the real one would.

:class:`EmulatedLink` is a Communicator (``minimax_train.parallel.communicator``). What other ranks would have sent is a
local copy of tensors of the right shape, so results are wrong and times are right; correctness is the tests' business.
Each transfer is one kernel on the link's own stream, beside compute: ``sms`` programs, each on an SM of its own,
which copy and then hold on. It takes, the copy included,

    latency + bytes through this rank's link in the busier direction / rate.

States that travel from chunk to chunk (serial LASP, scan; contiguous layout) reach a rank only when all ranks before it
have passed them on: a receive that starts such a journey waits for the hops before this rank as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimax_train.parallel.communicator import Communicator, Pending

# One line for transfers of all kinds and sizes, unlike the lines of each kind in minimax_train.parallel.cost. Two H200
# over NVLink: an all-gather of 4 MB takes 39 us, a send-receive of 1 GB 2.98 ms. And a 400 Gb/s card per GPU.
RATES = {"nvlink": (20e-6, 335e9), "network": (30e-6, 50e9)}


@dataclass
class EmulatedLink(Communicator):
    """One rank's end of an emulated link.

    Attributes:
        rank, size: the rank that is played, and how many there are.
        latency_s, bytes_per_s: of a transfer.
        sms: SMs a transfer occupies while it lasts.
        chained: whether states travel from rank to rank, forwards or backwards, to this one past all before it.
        pieces: in how many pieces they travel.
        busy_s: what all transfers so far take, one after the other.
    """

    rank: int
    size: int
    latency_s: float
    bytes_per_s: float
    sms: int = 8
    chained: bool = False
    pieces: int = 1
    busy_s: float = 0.0
    _received: int = 0
    _stream: torch.cuda.Stream | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            self._stream = torch.cuda.Stream(priority=-1)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        out = x.new_empty(self.size, *x.shape) if out is None else out
        return self._transfer((self.size - 1) * x.nbytes, x.contiguous(), out)

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        out = torch.empty_like(x[0]) if out is None else out
        return self._transfer((self.size - 1) * out.nbytes, x.contiguous(), out)

    def all_to_all(self, x: Tensor, out: Tensor, input_splits: list[int], output_splits: list[int]) -> Pending[Tensor]:
        row_bytes = x[:1].nbytes
        outgoing = (sum(input_splits) - input_splits[self.rank]) * row_bytes
        incoming = (sum(output_splits) - output_splits[self.rank]) * row_bytes
        return self._transfer(max(outgoing, incoming), x.contiguous(), out[: sum(output_splits)], result=out)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending[None]:
        outgoing = sum(x.nbytes for x in sends.values())
        incoming = sum(x.nbytes for x in receives.values())
        extra_hops = 0
        if self.chained and receives and not sends:
            (giver,) = receives
            hops = giver if giver < self.rank else self.size - 1 - giver
            extra_hops = hops if self._received % self.pieces == 0 else 0
            self._received += 1
        if not sends and not receives:
            return Pending(lambda: None)
        # One of them carries the time of all.
        *others, last = receives.values() if receives else [x[:0] for x in sends.values()]
        for x in others:
            self._transfer(0, _noise(x), x)
        pending = self._transfer(max(outgoing, incoming), _noise(last), last, extra_hops=extra_hops)

        def wait() -> None:
            pending.wait()

        return Pending(wait)

    def _transfer(
        self, size: int, source: Tensor, target: Tensor, *, result: Tensor | None = None, extra_hops: int = 0
    ) -> Pending[Tensor]:
        """Fill ``target`` from ``source``, again from its start if that is shorter, in the time of a size.

        A source of no rows fills nothing.
        """
        received = target if result is None else result
        seconds = (self.latency_s + size / self.bytes_per_s) * (1 + extra_hops if size else 0)
        self.busy_s += seconds
        if self._stream is None:
            time.sleep(seconds)
            _fill(source, target)
            return Pending(lambda: received)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            started = torch.empty(1, dtype=torch.int64, device="cuda")
            _clock[(1,)](started)
            nothing = not target.numel() or not source.numel()
            words = [started[:0], started[:0]] if nothing else _words(source, target)
            sizes = [x.numel() for x in words]
            # 1024 threads leave a GEMM no registers: smaller programs would share an SM with it.
            _carry[(self.sms,)](
                *words, *sizes, started, int(seconds * 1e9), B=4096, EXACT=max(sizes) < 2**20, num_warps=32
            )

        def wait() -> Tensor:
            torch.cuda.current_stream().wait_stream(self._stream)
            return received

        return Pending(wait)


class FreeLink(EmulatedLink):
    """Transfers that take nothing: once ``moving`` is off, buffers keep what was in them.

    Turn it off after a few calls, when memory is full of numbers like those that would arrive: on zeros a GPU computes
    faster. Integers are always moved: they are counts.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, 0.0, float("inf"))
        self.moving = True

    def _transfer(
        self, size: int, source: Tensor, target: Tensor, *, result: Tensor | None = None, extra_hops: int = 0
    ) -> Pending[Tensor]:
        if self.moving or not target.is_floating_point():
            _fill(source, target)
        return Pending(lambda: target if result is None else result)


def _fill(source: Tensor, target: Tensor) -> None:
    if target.numel() and source.numel():
        times = -(-target.numel() // source.numel())
        target.view(-1).copy_(source.view(-1).repeat(times)[: target.numel()])


_noises: dict[torch.dtype, Tensor] = {}


def _noise(like: Tensor) -> Tensor:
    """A million small random numbers: what arrives must not be zero, on which a GPU computes faster."""
    if like.dtype not in _noises:
        _noises[like.dtype] = (0.02 * torch.randn(2**20, device=like.device)).to(like.dtype)
    return _noises[like.dtype]


def _words(*tensors: Tensor) -> list[Tensor]:
    """Their memory in units that copy fastest."""
    flat = [x.view(-1).view(torch.uint8) for x in tensors]
    aligned = all(x.data_ptr() % 8 == 0 and x.numel() % 8 == 0 for x in flat)
    return [x.view(torch.int64) for x in flat] if aligned else flat


@triton.jit
def _now():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def _clock(out):
    tl.store(out, _now())


@triton.jit(do_not_specialize=["source_size", "target_size", "nanoseconds"])
def _carry(source, target, source_size, target_size, started, nanoseconds, B: tl.constexpr, EXACT: tl.constexpr):
    """Fill the target from the source, round and round; then keep stream and SMs until a time is over.

    All of a source that is longer is read: a sum over ranks reads all of theirs. Unless EXACT, whole blocks wrap
    around, which costs no division per word.
    """
    end = tl.load(started) + nanoseconds
    inside = tl.arange(0, B)
    sources, targets = tl.maximum(source_size // B, 1), (target_size + B - 1) // B
    block = tl.program_id(0)
    while block < tl.where(targets > 0, tl.maximum(sources, targets), 0):
        from_source = (block % sources).to(tl.int64) * B + inside
        to_target = (block % targets).to(tl.int64) * B + inside
        if EXACT:
            from_source = to_target % source_size
        words = tl.load(source + from_source, mask=from_source < source_size, other=0)
        tl.store(target + to_target, words, mask=to_target < target_size)
        block += tl.num_programs(0)
    now = _now()
    while now < end:
        now = _now()
