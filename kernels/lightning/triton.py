"""Lightning attention in Triton: one kernel, run forwards for o and dq and backwards for dk and dv.

With ``A(x, y, z)_i = sum over j <= i of decay^(i - j) (x_i . y_j) z_j`` and A' the same over j >= i,

    o = A(q, k, v)    dq = A(do, v, k)    dk = A'(v, do, q)    dv = A'(k, q, do)

where A's running state is S (transposed for dq) and that of A' is the gradient of S (transposed for dk). On Hopper
dk and dv come from one pass over what they share. ``docs/kernels.md`` counts the bytes and has the measurements.

One program holds one head's state, so the token axis is cut in as many segments as fill the device. What crosses a
cut is summed beforehand, in more parts, in parallel: reading at most y and z of all but one segment once more,
and for a fast head only the few tokens before each cut that have not decayed away.

``states``, ``forward``, ``backward_q`` and ``backward_kv`` are the same kernels without autograd, for ranks that share
documents (:mod:`minimax_train.kernels.lightning.parts`).

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, M documents with a state, F fine segments.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.documents import Documents, to_device
from minimax_train.kernels.lightning import triton_kernels


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, step: int) -> int:
    return -(-size // step)


class Tiles(NamedTuple):
    """How one call is cut: a chunk of C tokens by a slice of the value dim per step, on ``warps`` warps."""

    chunk: int
    slice: int
    warps: int
    stages: int


def choose_tiles(dtype: torch.dtype, K: int, V: int) -> Tiles:
    """The configuration measured best on H200; float32 tiles are small because they take twice the shared memory."""
    if dtype.itemsize == 4:
        return Tiles(32, 32, 4, 2)
    return Tiles(64, 128, 8, 3)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def choose_segments(num_chunks: int, columns: int, device: torch.device) -> tuple[int, int]:
    """Segments of ``attend`` and fine segments of ``partials`` per segment, for ``columns`` independent programs."""
    if device.type != "cuda":
        return 1, 1
    segments = max(1, min(_processors(device) // columns, num_chunks // 4))
    if segments == 1:
        return 1, 1
    return segments, max(1, min(16 // segments, num_chunks // segments // 16))


# In about how many pieces ``states`` sums tokens, of all heads together: two for each processor of an H100.
PIECES = 264


def choose_hopper(x_THK: Tensor) -> bool:
    """Whether the hand-scheduled kernel takes this dtype on this device."""
    return x_THK.element_size() == 2 and _is_hopper(x_THK.device)


class _Table(NamedTuple):
    """Chunks of the documents as the kernels read them, int32; ``starts`` has T and ``owners`` the last as sentinel."""

    starts: Tensor
    infos: Tensor
    owners: Tensor
    count: int


def _table(documents: Documents, size: int) -> _Table:
    chunks = documents.chunks(size)
    ends_M = chunks.starts_M + chunks.lengths_M
    cu_seqlens = documents.cu_seqlens
    begins_M = chunks.starts_M == cu_seqlens[chunks.documents_M]
    ends_document_M = ends_M == cu_seqlens[chunks.documents_M + 1]
    infos_M = begins_M * triton_kernels.BEGINS.value + ends_document_M * triton_kernels.ENDS.value
    infos_M += chunks.lengths_M << triton_kernels.LENGTH_SHIFT.value
    starts = torch.cat([chunks.starts_M, ends_M[-1:]])
    owners = torch.cat([chunks.documents_M, chunks.documents_M[-1:]])
    return _Table(starts.int(), infos_M.int(), owners.int(), len(infos_M))


def _state_rows(documents: Documents, wanted: tuple[int, ...]) -> Tensor:
    """Row of each document's final state among those wanted, int32 ``[N]``; -1 for the others."""
    rows_N = torch.full((len(documents),), -1, dtype=torch.int32)
    rows_N[list(wanted)] = torch.arange(len(wanted), dtype=torch.int32)
    return to_device(rows_N, documents.device)


def _chunk_ends(documents: Documents, size: int) -> Tensor:
    """The chunk after the last of each document, on the host, ``[N]``."""
    return ((documents.cu_seqlens_cpu.diff() + size - 1) // size).cumsum(0)


def _runs(documents: Documents, size: int, wanted: tuple[int, ...] | None) -> Tensor:
    """From each chunk, how many a backward walk makes before it meets the next end of a document wanted; int32."""
    ends_N = _chunk_ends(documents, size) - 1
    stops = ends_N if wanted is None else ends_N[sorted(wanted)]
    stops = torch.cat([stops.new_tensor([-1]), stops])
    chunks_M = torch.arange(int(ends_N[-1]) + 1)
    runs_M = chunks_M - stops[torch.searchsorted(stops, chunks_M) - 1]
    return to_device(runs_M.int(), documents.device)


class _Run(NamedTuple):
    """What all kernels of one call share."""

    slopes_H: Tensor
    documents: Documents
    tiles: Tiles
    segments: int
    per: int
    table: _Table
    hopper: bool
    wanted: tuple[int, ...] | None
    state_rows: Tensor

    @classmethod
    def plan(
        cls, x_THK: Tensor, V: int, slopes_H: Tensor, documents: Documents, wanted: tuple[int, ...] | None
    ) -> _Run:
        H, K = x_THK.shape[1:]
        tiles = choose_tiles(x_THK.dtype, K, V)
        table = documents.derive(("lightning table", tiles.chunk), lambda d: _table(d, tiles.chunk))
        columns = H * _ceil_div(max(K, V), tiles.slice)
        segments, per = choose_segments(table.count, columns, x_THK.device)
        # No segment may be empty: nothing would write the state it hands on.
        segments = min(segments, table.count)
        per = min(per, table.count // segments)
        hopper = max(K, V) <= 128 and choose_hopper(x_THK)
        state_rows = table.owners  # any pointer: not followed unless states are mapped
        if wanted is not None:
            state_rows = documents.derive(("lightning state rows", wanted), lambda d: _state_rows(d, wanted))
        return cls(slopes_H, documents, tiles, segments, per, table, hopper, wanted, state_rows)

    def _shared(self, K: int, V: int, dtype: torch.dtype) -> dict:
        C, width, warps, stages = self.tiles
        return {
            "C": C,
            "BK": max(16, _power_of_two(K)),
            "BV": min(width, max(16, _power_of_two(V))),
            "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
            "num_warps": warps,
            "num_stages": stages,
        }

    @property
    def _where(self) -> tuple[Tensor, ...]:
        table = self.table
        return (self.slopes_H, table.starts, table.infos, table.owners, self.state_rows, self.documents.cu_seqlens)

    def _copy_engine_takes(self, *tensors: Tensor) -> bool:
        """Whether the Hopper kernels can read these: the copy engine wants everything on 16 bytes."""
        return self.hopper and all(
            x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
            for x in tensors
        )

    def _hopper(self, K: int, V: int) -> tuple:
        # Gluon is imported only where it can run.
        from minimax_train.kernels.lightning import hopper_kernels

        BK, BV = (max(64, _power_of_two(size)) for size in (K, V))
        return hopper_kernels, {"K": K, "V": V, "C": self.tiles.chunk, "BK": BK, "BV": BV}

    def partials(self, y_THK: Tensor, z_THV: Tensor, *, reverse: bool) -> Tensor | None:
        """What fine segments add to states that cross cuts, float32 ``[F', H, K, V]``; None where nothing is cut."""
        if self.segments == 1:
            return None
        _, H, K = y_THK.shape
        V = z_THV.shape[-1]
        fine = self.segments * self.per
        partial_FHKV = torch.empty(fine - self.per, H, K, V, dtype=torch.float32, device=y_THK.device)
        where = (self.slopes_H, self.table.starts, self.table.owners, self.documents.cu_seqlens)
        if self._copy_engine_takes(y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            C, BK, BV = shape["C"], shape["BK"], shape["BV"]
            hopper.partials[H, fine - self.per](
                *hopper.descriptors((y_THK, C, BK), (z_THV, C, BV)), partial_FHKV,
                *where, self.table.count, fine, self.per,
                H=H, REVERSE=reverse, STAGES=hopper.STAGES_PARTIALS, num_warps=8, **shape,
            )  # fmt: skip
            return partial_FHKV
        shared = self._shared(K, V, y_THK.dtype)
        triton_kernels.partials[_ceil_div(V, shared["BV"]), H, fine - self.per](
            y_THK, z_THV, partial_FHKV, *where,
            *y_THK.stride()[:2], *z_THV.stride()[:2], self.table.count, fine, self.per,
            H=H, K=K, V=V, REVERSE=reverse, **shared,
        )  # fmt: skip
        return partial_FHKV

    def attend(
        self,
        x_THK: Tensor,
        y_THK: Tensor,
        z_THV: Tensor,
        initial_NHKV: Tensor | None,
        partial_FHKV: Tensor | None,
        *,
        reverse: bool,
        final_NHKV: Tensor | None = None,
        initial_mapped: bool = False,
        final_mapped: bool = False,
    ) -> Tensor:
        """``A(x, y, z)``, or A' in reverse, ``[T, H, V]``; fills ``final_NHKV`` if given.

        Mapped states are those of some documents only, by ``state_rows``.
        """
        T, H, K = x_THK.shape
        V = z_THV.shape[-1]
        out_THV = torch.empty(T, H, V, dtype=z_THV.dtype, device=z_THV.device)
        shared = self._shared(K, V, x_THK.dtype)
        states = (initial_NHKV, final_NHKV, partial_FHKV)
        fine = self.segments * self.per
        state_strides = [stride for state in states for stride in (state.stride() if state is not None else [0] * 4)]
        flags = {
            "REVERSE": reverse,
            "HAS_INITIAL": initial_NHKV is not None,
            "HAS_FINAL": final_NHKV is not None,
            "HAS_PARTIAL": partial_FHKV is not None,
            "INITIAL_MAPPED": initial_mapped,
            "FINAL_MAPPED": final_mapped,
            "FINE": _power_of_two(fine),
        }
        if self._copy_engine_takes(x_THK, y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            C, BK, BV = shape["C"], shape["BK"], shape["BV"]
            # The kernel takes no None: a state that is not there is any pointer that it will not follow.
            initial, final, partial = (self.slopes_H if state is None else state for state in states)
            hopper.attend[H, self.segments](
                *hopper.descriptors((x_THK, C, BK), (y_THK, C, BK), (z_THV, C, BV // 2), (out_THV, C, BV // 2)),
                out_THV, initial, final, partial, *self._where, *out_THV.stride()[:2], *state_strides,
                T, self.table.count, fine, self.per, STAGES=hopper.STAGES, num_warps=4, **shape, **flags,
            )  # fmt: skip
            return out_THV
        triton_kernels.attend[_ceil_div(V, shared["BV"]), H, self.segments](
            x_THK, y_THK, z_THV, out_THV, *states, *self._where,
            *x_THK.stride()[:2], *y_THK.stride()[:2], *z_THV.stride()[:2], *out_THV.stride()[:2], *state_strides,
            self.table.count, fine, self.per,
            H=H, K=K, V=V, **shared, **flags,
        )  # fmt: skip
        return out_THV

    def dk_dv(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        do_THV: Tensor,
        d_final_NHKV: Tensor | None,
        d_partial_FHKV: Tensor | None,
        d_initial_NHKV: Tensor | None,
        *,
        mapped: bool,
    ) -> tuple[Tensor, Tensor]:
        """``A'(v, do, q)`` and ``A'(k, q, do)``, in one pass where the kernel for it runs; fills ``d_initial_NHKV``."""
        if not self._copy_engine_takes(q_THK, k_THK, v_THV, do_THV):
            states = (_transposed(d_final_NHKV), _transposed(d_partial_FHKV))
            dk = self.attend(v_THV, do_THV, q_THK, *states, reverse=True, initial_mapped=mapped)
            states = (d_final_NHKV, d_partial_FHKV)
            dv = self.attend(
                k_THK, q_THK, do_THV, *states, reverse=True, final_NHKV=d_initial_NHKV, initial_mapped=mapped
            )
            return dk, dv
        T, H, K = q_THK.shape
        V = v_THV.shape[-1]
        dk_THK = torch.empty(T, H, K, dtype=k_THK.dtype, device=k_THK.device)
        dv_THV = torch.empty(T, H, V, dtype=v_THV.dtype, device=v_THV.device)
        hopper, shape = self._hopper(K, V)
        C, BK, BV = shape["C"], shape["BK"], shape["BV"]
        states = (d_final_NHKV, d_initial_NHKV, d_partial_FHKV)
        state_strides = [stride for state in states for stride in (state.stride() if state is not None else [0] * 4)]
        fine = self.segments * self.per
        keys = [(x, C, BK) for x in (q_THK, k_THK)]
        values = [(x, C, BV) for x in (v_THV, do_THV)]
        initial, final, partial = (self.slopes_H if state is None else state for state in states)
        key = ("lightning runs", C, self.wanted)
        runs = self.documents.derive(key, lambda documents: _runs(documents, C, self.wanted))
        *where, cu_seqlens = self._where
        hopper.attend_dk_dv[H, self.segments](
            *hopper.descriptors(*keys, *values, (dk_THK, C, BK), (dv_THV, C, BV)),
            dk_THK, dv_THV, initial, final, partial, *where, runs, cu_seqlens,
            *dk_THK.stride()[:2], *dv_THV.stride()[:2], *state_strides, T, self.table.count, fine, self.per,
            HAS_INITIAL=d_final_NHKV is not None, HAS_FINAL=d_initial_NHKV is not None,
            HAS_PARTIAL=d_partial_FHKV is not None, INITIAL_MAPPED=mapped, FINE=_power_of_two(fine),
            STAGES=hopper.STAGES_BACKWARD, num_warps=4, **shape,
        )  # fmt: skip
        return dk_THK, dv_THV

    def states(self, y_THK: Tensor, z_THV: Tensor, edges_M2: Tensor, *, reverse: bool) -> Tensor:
        """What token ranges add to the state that leaves them, float32 ``[M, H, K, V]``; zero of an empty range."""
        _, H, K = y_THK.shape
        V, columns, C = z_THV.shape[-1], len(edges_M2) * H, self.tiles.chunk
        places = torch.empty(columns + 2, dtype=torch.int32, device=y_THK.device)
        padded = _power_of_two(columns)
        triton_kernels.share_pieces[(1,)](
            places, self.slopes_H, edges_M2, columns, H=H, C=C, COLUMNS=padded, PIECES=PIECES
        )
        pieces_PKV = torch.empty(PIECES + columns, K, V, dtype=torch.float32, device=y_THK.device)
        where = (pieces_PKV, places, self.slopes_H, edges_M2, columns)
        flags = {"H": H, "COLUMNS": padded, "REVERSE": reverse}
        if self._copy_engine_takes(y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            blocks = ((y_THK, C, shape["BK"]), (z_THV, C, shape["BV"]))
            hopper.states[(len(pieces_PKV),)](
                *hopper.descriptors(*blocks), *where, STAGES=hopper.STAGES_PARTIALS, num_warps=8, **shape, **flags
            )
        else:
            shared = self._shared(K, V, y_THK.dtype)
            triton_kernels.states[_ceil_div(V, shared["BV"]), len(pieces_PKV)](
                y_THK, z_THV, *where, *y_THK.stride()[:2], *z_THV.stride()[:2], K=K, V=V, **shared, **flags
            )
        out_MHKV = torch.empty(len(edges_M2), H, K, V, dtype=torch.float32, device=y_THK.device)
        triton_kernels.add_pieces[_ceil_div(K * V, 1024), columns](pieces_PKV, out_MHKV, places, KV=K * V, B=1024)
        return out_MHKV


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.transpose(-1, -2)


class _TritonLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, documents, initial_NHKV, final_state_of):
        q_THK, k_THK, v_THV = (_rows_contiguous(x) for x in (q_THK, k_THK, v_THV))
        _, H, K = q_THK.shape
        V = v_THV.shape[-1]
        # Final states of all documents need no map.
        wanted = None if final_state_of in (None, tuple(range(len(documents)))) else final_state_of
        run = _Run.plan(q_THK, V, slopes_H, documents, wanted)
        final_NHKV = None
        if final_state_of is not None:
            final_NHKV = torch.empty(len(final_state_of), H, K, V, dtype=torch.float32, device=q_THK.device)
        partial_FHKV = run.partials(k_THK, v_THV, reverse=False)
        states = (initial_NHKV, partial_FHKV)
        out_THV = run.attend(
            q_THK, k_THK, v_THV, *states, reverse=False, final_NHKV=final_NHKV, final_mapped=wanted is not None
        )
        ctx.save_for_backward(q_THK, k_THK, v_THV, *states)
        ctx.run, ctx.mapped = run, wanted is not None
        ctx.set_materialize_grads(False)
        return out_THV, final_NHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, do_THV, d_final_NHKV):
        q_THK, k_THK, v_THV, initial_NHKV, partial_FHKV = ctx.saved_tensors
        run: _Run = ctx.run
        do_THV = torch.zeros_like(v_THV) if do_THV is None else _rows_contiguous(do_THV)
        d_initial_NHKV = None
        if ctx.needs_input_grad[5]:
            d_initial_NHKV = torch.empty(initial_NHKV.shape, dtype=torch.float32, device=q_THK.device)
        dq = run.attend(do_THV, v_THV, k_THK, _transposed(initial_NHKV), _transposed(partial_FHKV), reverse=False)
        d_partial_FHKV = run.partials(q_THK, do_THV, reverse=True)
        inputs = (q_THK, k_THK, v_THV, do_THV)
        dk, dv = run.dk_dv(*inputs, d_final_NHKV, d_partial_FHKV, d_initial_NHKV, mapped=ctx.mapped)
        if d_initial_NHKV is not None:
            d_initial_NHKV = d_initial_NHKV.to(initial_NHKV.dtype)
        return dq, dk, dv, None, None, d_initial_NHKV, None


def _edges(documents: Documents, of: tuple[int | None, ...], size: int, segments: int, *, reverse: bool) -> Tensor:
    """Token ranges that ``states`` sums, int32 ``[M + S - 1, 2]``: first token, and the first after.

    Some documents, and for each cut between segments what the segment before it (reverse: after it) has of the document
    that crosses it; nothing where none does.
    """
    bounds = documents.bounds
    ranges = [(0, 0) if n is None else (bounds[n], bounds[n + 1]) for n in of]
    ends = _chunk_ends(documents, size).tolist()
    begins = [0, *ends]
    cuts = [ends[-1] * segment // segments for segment in range(1, segments)]
    owners = [bisect_right(ends, cut) for cut in cuts]
    tokens = [bounds[n] + (cut - begins[n]) * size for n, cut in zip(owners, cuts, strict=True)]
    neighbours = [0, *tokens, bounds[-1]]
    for n, token, before, after in zip(owners, tokens, neighbours, neighbours[2:], strict=False):
        crosses = bounds[n] < token
        if reverse:
            ranges.append((token, min(after, bounds[n + 1]) if crosses else token))
        else:
            ranges.append((max(before, bounds[n]), token))
    return to_device(torch.tensor(ranges, dtype=torch.int32), documents.device)


def _plan_part(x_THK: Tensor, V: int, slopes_H: Tensor, documents: Documents, of: tuple[int, ...] | None) -> _Run:
    """``states`` has summed what crosses cuts, of whole segments."""
    return _Run.plan(x_THK, V, slopes_H, documents, of)._replace(per=1)


def states(
    y_THK: Tensor, z_THV: Tensor, slopes_H: Tensor, documents: Documents, of: tuple[int | None, ...], *, reverse: bool
) -> tuple[Tensor, Tensor | None]:
    run = _plan_part(y_THK, z_THV.shape[-1], slopes_H, documents, None)
    cut = (run.tiles.chunk, run.segments)
    key = ("lightning edges", of, *cut, reverse)
    edges_M2 = documents.derive(key, lambda d: _edges(d, of, *cut, reverse=reverse))
    sums_MHKV = run.states(_rows_contiguous(y_THK), _rows_contiguous(z_THV), edges_M2, reverse=reverse)
    return sums_MHKV[: len(of)], sums_MHKV[len(of) :] if run.segments > 1 else None


def forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    documents: Documents,
    entering_MHKV: Tensor,
    of: tuple[int, ...],
    crossing: Tensor | None,
) -> Tensor:
    q_THK, k_THK, v_THV = (_rows_contiguous(x) for x in (q_THK, k_THK, v_THV))
    run = _plan_part(q_THK, v_THV.shape[-1], slopes_H, documents, of)
    return run.attend(q_THK, k_THK, v_THV, entering_MHKV, crossing, reverse=False, initial_mapped=True)


def backward_q(
    grad_THV: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    documents: Documents,
    entering_MHKV: Tensor,
    of: tuple[int, ...],
    crossing: Tensor | None,
) -> Tensor:
    entering_MHVK, crossing = _transposed(entering_MHKV), _transposed(crossing)
    return forward(grad_THV, v_THV, k_THK, slopes_H, documents, entering_MHVK, of, crossing)


def backward_kv(
    grad_THV: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    documents: Documents,
    grad_leaving_MHKV: Tensor,
    of: tuple[int, ...],
    crossing: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q_THK, k_THK, v_THV, grad_THV = (_rows_contiguous(x) for x in (q_THK, k_THK, v_THV, grad_THV))
    run = _plan_part(q_THK, v_THV.shape[-1], slopes_H, documents, of)
    return run.dk_dv(q_THK, k_THK, v_THV, grad_THV, grad_leaving_MHKV, crossing, None, mapped=True)


def lightning_attention_triton(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    documents: Documents,
    initial_state_NHKV: Tensor | None = None,
    final_state_of: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention on a GPU, states and decays in float32, deterministic.

    Token and head strides are free, so q, k and v may be views into one projection. bfloat16, float16 or float32.
    Arguments and results as in :func:`minimax_train.kernels.lightning.lightning_attention`.

    Raises:
        ValueError: for a dtype the kernels do not take, or q, k and v of different dtypes.
    """
    dtypes = {q_THK.dtype, k_THK.dtype, v_THV.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"kernels.lightning='triton' takes q, k, v of one of bfloat16, float16, float32, got {dtypes}")
    return _TritonLightning.apply(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV, final_state_of)
