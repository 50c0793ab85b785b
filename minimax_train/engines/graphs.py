"""A micro-batch's forward and backward pass as CUDA graphs, replayed for every micro-batch of the same shape.

A graph replays the kernels it was captured from, with the same arguments. So everything that differs between
micro-batches must be in device memory, at addresses that stay: tokens, labels, and documents, whose number and longest
length are bounded (:class:`minimax_train.documents.DeviceDocuments`). For each bound there is a recording
(``capture.py``): one graph, but for what the host must plan anew each time, the experts of expert parallelism and the
attention of context parallelism, which it calls between two graphs. All share one memory pool, since no two run at the
same time, and nothing is kept in it from one replay to the next.

The first micro-batch of a shape runs without a graph: it compiles kernels, and computes what they cache. So does the
first whose gradients are added to others, for adding takes other kernels than writing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from minimax_train.capture import Latest, Recording, latest
from minimax_train.data import MicroBatch
from minimax_train.documents import DeviceDocuments
from minimax_train.parallel.context.layout import SequenceShard
from minimax_train.phases import Phases
from minimax_train.recipe import StepPlan

# Bounds on the number of documents are powers of two, from as many as there are when they have this mean length: few
# micro-batches have more, and each bound is another recording.
SHORT = 256


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class MicroBatchGraphs:
    """Records and replays.

    Args:
        run: forward and backward pass of a micro-batch, given its step's plan. What it computes it leaves in tensors
            that stay where they are.
        phases: marks replays as ``graph``.
        note: told why micro-batches run without a graph, where they do.
    """

    def __init__(
        self, run: Callable[[MicroBatch, StepPlan], None], device: torch.device, phases: Phases,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._run, self._phases, self._note, self._works = run, phases, note, True
        self._stream = torch.cuda.Stream(device)
        self._shape: Hashable = None
        self._tensors: tuple[Tensor, ...] = ()
        self._documents: dict[int, DeviceDocuments] = {}
        self._shard = Latest[SequenceShard]()
        self._recordings: dict[Hashable, Recording] = {}
        self._warm = set[bool]()  # True: a step's first micro-batch has run, with its kernels; False: a later one
        self._pool = None

    def run(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        """Forward and backward pass of a micro-batch on the device.

        Args:
            is_first, is_last: of a step: ``run`` differs between them, and each combination has graphs of its own.
        """
        if not self._works:
            self._run(batch, plan)
            return
        shape = len(batch.tokens_T), batch.num_sequences, plan.rope_base  # baked into a graph, with the bound
        if shape != self._shape:
            self.forget()
            self._shape, self._pool = shape, torch.cuda.graph_pool_handle()
        kind = is_first, is_last
        if (warms_up := is_first not in self._warm) and self._recordings:
            self._forget_recordings()  # whose memory this pass could need
            self._pool = torch.cuda.graph_pool_handle()
        bound = _power_of_two(max(len(batch.documents), len(batch.tokens_T) // SHORT))
        inputs, documents = self._filled(batch, bound, plan.sequence_length)
        if (recording := self._recordings.get((bound, kind))) is not None:
            with self._phases("graph"):
                self._on_stream(recording.replay)
            return
        recording = Recording(self._pool)
        try:
            if warms_up:
                recording.is_repeatable = is_first  # a later one has added to gradients, in part
                self._on_stream(lambda: self._run(inputs, plan))
                self._warm.add(is_first)
            else:
                recording.record(lambda: self._run(inputs, plan), self._stream)
                self._recordings[bound, kind] = recording
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Transfers that it made are made again: by all ranks, if this is the first recording.
            if not recording.is_repeatable or (recording.has_run and self._recordings):
                raise
            self._works = False
            recording.forget()
            self.forget()
            self._note(f"no CUDA graphs: a micro-batch cannot be captured: {str(error).partition(chr(10))[0]}")
            self._run(batch, plan)
        finally:
            documents.forget()

    def forget(self) -> None:
        """Let go of all graphs and their memory."""
        self._forget_recordings()
        self._warm.clear()
        self._documents.clear()
        self._tensors, self._shape = (), None

    def _forget_recordings(self) -> None:
        for recording in self._recordings.values():
            recording.forget()
        self._recordings.clear()

    def _on_stream(self, run: Callable[[], None]) -> None:
        """On the stream of captures, for which libraries keep workspaces of their own."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def _filled(self, batch: MicroBatch, bound: int, longest: int) -> tuple[MicroBatch, DeviceDocuments]:
        """The inputs of a bound's graphs, with this micro-batch in them."""
        news = batch.tokens_T, batch.labels_T, batch.origins_T
        self._tensors = self._tensors or tuple(map(torch.empty_like, news))
        for x, new in zip(self._tensors, news, strict=True):
            x.copy_(new)
        if bound not in self._documents:
            self._documents[bound] = DeviceDocuments.of_shape(
                num_documents=bound, num_tokens=len(batch.tokens_T), max_length=longest, device=batch.tokens_T.device
            )
        documents = self._documents[bound]
        documents.fill(batch.documents)
        tokens_T, labels_T, origins_T = self._tensors
        inputs = replace(batch, tokens_T=tokens_T, labels_T=labels_T, origins_T=origins_T, documents=documents)
        if batch.shard is not None:
            self._shard.value = latest(batch.shard)
            inputs = replace(inputs, shard=self._shard)
        return inputs, documents
