"""Lightning attention in Triton: one kernel, run forwards for o and dq and backwards for dk and dv.

With ``A(x, y, z)_i = sum over j <= i of decay^(i - j) (x_i . y_j) z_j`` and A' the same over j >= i,

    o = A(q, k, v)    dq = A(do, v, k)    dk = A'(v, do, q)    dv = A'(k, q, do)

where A's running state is S (transposed for dq) and that of A' is the gradient of S (transposed for dk). On Hopper
dk and dv come from one pass over what they share. ``docs/kernels.md`` counts the bytes and has the measurements.

A program walks tiles one after the other with one head's state, so the tiles are cut in *splits*, as many as fill the
device. The states at split boundaries are computed beforehand, in parallel, by state passing: a first kernel computes
the local states of *sub-splits*, a few to a split, and each program adds up those that contribute to its boundary. That
reads at most y and z of all but one split once more, and for a head with a short memory only the few tokens before each
boundary that have not decayed away.

:class:`TritonStatePassing` runs the same kernels without autograd, for context parallelism.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, M states (of some of the documents), B tiles,
F sub-splits, R token ranges, P blocks of tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.documents import DeviceDocuments, Documents, to_device
from minimax_train.kernels.lightning import triton_kernels
from minimax_train.kernels.lightning.state_passing import StatePassing
from minimax_train.kernels.lightning.tiles import tile_ends


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _ceil_div(size: int, step: int) -> int:
    return -(-size // step)


class TileShape(NamedTuple):
    """What one step of a program works on: C tokens by a slice of the value dim; on how many warps and stages."""

    tokens: int
    values: int
    warps: int
    stages: int


def choose_tile(dtype: torch.dtype, K: int, V: int) -> TileShape:
    """The configuration measured best on H200; float32 tiles are small because they take twice the shared memory."""
    if dtype.itemsize == 4:
        return TileShape(32, 32, 4, 2)
    return TileShape(64, 128, 8, 3)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def choose_splits(num_tiles: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Splits, and sub-splits per split, where each split takes that many programs."""
    if device.type != "cuda":
        return 1, 1
    splits = max(1, min(_num_sms(device) // programs, num_tiles // 4))
    if splits == 1:
        return 1, 1
    return splits, max(1, min(16 // splits, num_tiles // splits // 16))


# In about how many blocks ``local_states`` sums tokens, of all heads together: two for each SM of an H100.
BLOCKS = 264


def choose_hopper(x_THK: Tensor) -> bool:
    """Whether the hand-scheduled kernel takes this dtype on this device."""
    return x_THK.element_size() == 2 and _is_hopper(x_THK.device)


class _Table(NamedTuple):
    """The documents' tiles as ``cut_tiles`` writes them; the device alone knows how many there are."""

    starts: Tensor
    infos: Tensor
    document_ids: Tensor
    count: Tensor


def _table(documents: Documents, size: int) -> _Table:
    T, N = documents.num_tokens, len(documents)
    most = min(T, (T + N * (size - 1)) // size)
    table = _Table(*(torch.empty(B, dtype=torch.int32, device=documents.device) for B in (most + 1, most, most, 1)))
    triton_kernels.cut_tiles[(N,)](documents.cu_seqlens, *table, C=size)
    return table


def _state_rows(documents: Documents, state_of: tuple[int, ...]) -> Tensor:
    """Row of each document's state among those of ``state_of``, int32 ``[N]``; -1 for the other documents."""
    rows_N = torch.full((len(documents),), -1, dtype=torch.int32)
    rows_N[list(state_of)] = torch.arange(len(state_of), dtype=torch.int32)
    return to_device(rows_N, documents.device)


def _runs(documents: Documents, size: int, state_of: tuple[int, ...] | None) -> Tensor:
    """From each tile, how many tiles a backward walk makes before the next end of a document with a state; int32."""
    last_N = tile_ends(documents, size) - 1
    stops = last_N if state_of is None else last_N[sorted(state_of)]
    stops = torch.cat([stops.new_tensor([-1]), stops])
    tiles_B = torch.arange(int(last_N[-1]) + 1)
    runs_B = tiles_B - stops[torch.searchsorted(stops, tiles_B) - 1]
    return to_device(runs_B.int(), documents.device)


def _ranges(documents: Documents, state_of: tuple[int | None, ...], size: int, splits: int, reverse: bool) -> Tensor:
    """Token ranges whose local states :class:`TritonStatePassing` computes, int32 ``[R, 2]``: first, and end.

    Of each document of ``state_of`` all tokens; then of each boundary between splits those tokens of the split before
    it (reverse: after it) that belong to the document that crosses the boundary, if one does.
    """
    bounds = documents.bounds
    ranges = [(0, 0) if n is None else (bounds[n], bounds[n + 1]) for n in state_of]
    ends = tile_ends(documents, size).tolist()
    begins = [0, *ends]
    boundaries = [ends[-1] * split // splits for split in range(1, splits)]
    crossing = [bisect_right(ends, tile) for tile in boundaries]
    tokens = [bounds[n] + (tile - begins[n]) * size for n, tile in zip(crossing, boundaries, strict=True)]
    neighbours = [0, *tokens, bounds[-1]]
    for n, token, before, after in zip(crossing, tokens, neighbours, neighbours[2:], strict=False):
        if reverse:
            ranges.append((token, min(after, bounds[n + 1]) if bounds[n] < token else token))
        else:
            ranges.append((max(before, bounds[n]), token))
    return to_device(torch.tensor(ranges, dtype=torch.int32), documents.device)


class _Call(NamedTuple):
    """What all kernels of one call share. States of documents are of ``state_of``, in that order, where *mapped*."""

    slopes_H: Tensor
    documents: Documents
    tile: TileShape
    splits: int
    per_split: int
    table: _Table
    hopper: bool
    state_of: tuple[int, ...] | None
    state_rows: Tensor

    @classmethod
    def plan(
        cls, x_THK: Tensor, V: int, slopes_H: Tensor, documents: Documents, state_of: tuple[int, ...] | None
    ) -> _Call:
        H, K = x_THK.shape[1:]
        tile = choose_tile(x_THK.dtype, K, V)
        table = documents.derive(("lightning table", tile.tokens), lambda d: _table(d, tile.tokens))
        # No fewer than these tiles, whatever the documents: every sub-split has one, and writes its local state.
        least = _ceil_div(documents.num_tokens, tile.tokens)
        splits, per_split = choose_splits(least, H * _ceil_div(max(K, V), tile.values), x_THK.device)
        splits = min(splits, least)
        per_split = min(per_split, least // splits)
        hopper = max(K, V) <= 128 and choose_hopper(x_THK)
        state_rows = table.document_ids  # any pointer: not followed unless states are mapped
        if state_of is not None:
            state_rows = documents.derive(("lightning state rows", state_of), lambda d: _state_rows(d, state_of))
        return cls(slopes_H, documents, tile, splits, per_split, table, hopper, state_of, state_rows)

    @property
    def _counts(self) -> tuple[Tensor, int, int]:
        """Tiles, sub-splits, and sub-splits per split."""
        return self.table.count, self.splits * self.per_split, self.per_split

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        table = self.table
        return (self.slopes_H, table.starts, table.infos, table.document_ids, self.state_rows)

    def _portable(self, K: int, V: int, dtype: torch.dtype) -> dict:
        C, width, warps, stages = self.tile
        return {
            "K": K,
            "V": V,
            "C": C,
            "BK": max(16, _power_of_two(K)),
            "BV": min(width, max(16, _power_of_two(V))),
            "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
            "num_warps": warps,
            "num_stages": stages,
        }

    def _tma_takes(self, *tensors: Tensor) -> bool:
        """Whether the Hopper kernels can read these: TMA wants everything aligned to 16 bytes."""
        return self.hopper and all(
            x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
            for x in tensors
        )

    def _hopper(self, K: int, V: int) -> tuple:
        # Gluon is imported only where it can run.
        from minimax_train.kernels.lightning import hopper_kernels

        BK, BV = (max(64, _power_of_two(size)) for size in (K, V))
        return hopper_kernels, {"K": K, "V": V, "C": self.tile.tokens, "BK": BK, "BV": BV}

    def _states(self, *states: Tensor | None, initial_mapped: bool) -> tuple[list[int], dict]:
        """Strides of the initial, final and local states, and the flags that say which there are."""
        strides = [stride for x in states for stride in (x.stride() if x is not None else [0] * 4)]
        initial, final, local = (x is not None for x in states)
        flags = {"HAS_INITIAL": initial, "HAS_FINAL": final, "HAS_LOCAL": local, "INITIAL_MAPPED": initial_mapped}
        return strides, flags | {"SUBSPLITS": _power_of_two(self.splits * self.per_split)}

    def subsplit_states(self, y_THK: Tensor, z_THV: Tensor, *, reverse: bool) -> Tensor | None:
        """Local states of the sub-splits of all splits but one, float32 ``[F', H, K, V]``; None of a single split."""
        if self.splits == 1:
            return None
        (_, H, K), V = y_THK.shape, z_THV.shape[-1]
        num_states = (self.splits - 1) * self.per_split
        local_FHKV = torch.empty(num_states, H, K, V, dtype=torch.float32, device=y_THK.device)
        table = self.table
        where = (local_FHKV, self.slopes_H, table.starts, table.document_ids, self.documents.cu_seqlens)
        if self._tma_takes(y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            hopper.subsplit_states[H, num_states](
                *hopper.descriptors((y_THK, shape["C"], shape["BK"]), (z_THV, shape["C"], shape["BV"])),
                *where, *self._counts, H=H, REVERSE=reverse, STAGES=hopper.STAGES_LOCAL, num_warps=8, **shape,
            )  # fmt: skip
            return local_FHKV
        shape = self._portable(K, V, y_THK.dtype)
        triton_kernels.subsplit_states[_ceil_div(V, shape["BV"]), H, num_states](
            y_THK, z_THV, *where, *y_THK.stride()[:2], *z_THV.stride()[:2], *self._counts, H=H, REVERSE=reverse, **shape
        )
        return local_FHKV

    def local_states(self, y_THK: Tensor, z_THV: Tensor, ranges_R2: Tensor, *, reverse: bool) -> Tensor:
        """Local states of token ranges, float32 ``[R, H, K, V]``; zero of an empty range."""
        (_, H, K), V, num_pairs = y_THK.shape, z_THV.shape[-1], len(ranges_R2) * y_THK.shape[1]
        block_table = torch.empty(num_pairs + 2, dtype=torch.int32, device=y_THK.device)
        flags = {"H": H, "PAIRS": _power_of_two(num_pairs)}
        triton_kernels.plan_blocks[(1,)](
            block_table, self.slopes_H, ranges_R2, num_pairs, C=self.tile.tokens, BLOCKS=BLOCKS, **flags
        )
        blocks_PKV = torch.empty(BLOCKS + num_pairs, K, V, dtype=torch.float32, device=y_THK.device)
        where = (blocks_PKV, block_table, self.slopes_H, ranges_R2, num_pairs)
        if self._tma_takes(y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            hopper.block_states[(len(blocks_PKV),)](
                *hopper.descriptors((y_THK, shape["C"], shape["BK"]), (z_THV, shape["C"], shape["BV"])),
                *where, REVERSE=reverse, STAGES=hopper.STAGES_LOCAL, num_warps=8, **shape, **flags,
            )  # fmt: skip
        else:
            shape = self._portable(K, V, y_THK.dtype)
            triton_kernels.block_states[_ceil_div(V, shape["BV"]), len(blocks_PKV)](
                y_THK, z_THV, *where, *y_THK.stride()[:2], *z_THV.stride()[:2], REVERSE=reverse, **shape, **flags
            )
        out_RHKV = torch.empty(len(ranges_R2), H, K, V, dtype=torch.float32, device=y_THK.device)
        triton_kernels.sum_blocks[_ceil_div(K * V, 1024), num_pairs](
            blocks_PKV, out_RHKV, block_table, KV=K * V, B=1024
        )
        return out_RHKV

    def attend(
        self,
        x_THK: Tensor,
        y_THK: Tensor,
        z_THV: Tensor,
        initial_NHKV: Tensor | None,
        local_FHKV: Tensor | None,
        *,
        reverse: bool,
        final_NHKV: Tensor | None = None,
        initial_mapped: bool = False,
        final_mapped: bool = False,
    ) -> Tensor:
        """``A(x, y, z)``, or A' in reverse, ``[T, H, V]``; fills ``final_NHKV`` if given."""
        (T, H, K), V = x_THK.shape, z_THV.shape[-1]
        out_THV = torch.empty(T, H, V, dtype=z_THV.dtype, device=z_THV.device)
        states = (initial_NHKV, final_NHKV, local_FHKV)
        strides, flags = self._states(*states, initial_mapped=initial_mapped)
        flags |= {"REVERSE": reverse, "FINAL_MAPPED": final_mapped}
        where = (*self._tables, self.documents.cu_seqlens)
        if self._tma_takes(x_THK, y_THK, z_THV):
            hopper, shape = self._hopper(K, V)
            C, BK, BV = shape["C"], shape["BK"], shape["BV"]
            hopper.attend[H, self.splits](
                *hopper.descriptors((x_THK, C, BK), (y_THK, C, BK), (z_THV, C, BV // 2), (out_THV, C, BV // 2)),
                out_THV, *self._pointers(*states), *where, *out_THV.stride()[:2], *strides, T, *self._counts,
                STAGES=hopper.STAGES, num_warps=4, **shape, **flags,
            )  # fmt: skip
            return out_THV
        shape = self._portable(K, V, x_THK.dtype)
        triton_kernels.attend[_ceil_div(V, shape["BV"]), H, self.splits](
            x_THK, y_THK, z_THV, out_THV, *states, *where,
            *x_THK.stride()[:2], *y_THK.stride()[:2], *z_THV.stride()[:2], *out_THV.stride()[:2], *strides,
            *self._counts, H=H, **shape, **flags,
        )  # fmt: skip
        return out_THV

    def _pointers(self, *states: Tensor | None) -> tuple[Tensor, ...]:
        """The Hopper kernels take no None: a state that is not there is any pointer, which they do not follow."""
        return tuple(self.slopes_H if x is None else x for x in states)

    def dk_dv(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THV: Tensor,
        do_THV: Tensor,
        d_final_NHKV: Tensor | None,
        d_local_FHKV: Tensor | None,
        d_initial_NHKV: Tensor | None = None,
        *,
        mapped: bool,
    ) -> tuple[Tensor, Tensor]:
        """``A'(v, do, q)`` and ``A'(k, q, do)``, in one pass where the kernel for it runs; fills ``d_initial_NHKV``."""
        if not self._tma_takes(q_THK, k_THK, v_THV, do_THV):
            how = {"reverse": True, "initial_mapped": mapped}
            dk = self.attend(v_THV, do_THV, q_THK, _transposed(d_final_NHKV), _transposed(d_local_FHKV), **how)
            dv = self.attend(k_THK, q_THK, do_THV, d_final_NHKV, d_local_FHKV, final_NHKV=d_initial_NHKV, **how)
            return dk, dv
        (T, H, K), V = q_THK.shape, v_THV.shape[-1]
        dk_THK = torch.empty(T, H, K, dtype=k_THK.dtype, device=k_THK.device)
        dv_THV = torch.empty(T, H, V, dtype=v_THV.dtype, device=v_THV.device)
        hopper, shape = self._hopper(K, V)
        C, BK, BV = shape["C"], shape["BK"], shape["BV"]
        keys, values = [(x, C, BK) for x in (q_THK, k_THK)], [(x, C, BV) for x in (v_THV, do_THV)]
        states = (d_final_NHKV, d_initial_NHKV, d_local_FHKV)
        strides, flags = self._states(*states, initial_mapped=mapped)
        runs = self.table.infos  # any pointer: not followed unless there are states
        if d_final_NHKV is not None:
            runs = self.documents.derive(("lightning runs", C, self.state_of), lambda d: _runs(d, C, self.state_of))
        hopper.attend_dk_dv[H, self.splits](
            *hopper.descriptors(*keys, *values, (dk_THK, C, BK), (dv_THV, C, BV)), dk_THK, dv_THV,
            *self._pointers(*states), *self._tables, runs, self.documents.cu_seqlens,
            *dk_THK.stride()[:2], *dv_THV.stride()[:2], *strides, T, *self._counts,
            STAGES=hopper.STAGES_BACKWARD, num_warps=4, **shape, **flags,
        )  # fmt: skip
        return dk_THK, dv_THV


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


class _TritonLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, documents, initial_NHKV, final_state_of):
        q_THK, k_THK, v_THV = _rows_contiguous(q_THK, k_THK, v_THV)
        (_, H, K), V = q_THK.shape, v_THV.shape[-1]
        # Final states of all documents need no map.
        mapped = final_state_of not in (None, tuple(range(len(documents))))
        call = _Call.plan(q_THK, V, slopes_H, documents, final_state_of if mapped else None)
        final_NHKV = None
        if final_state_of is not None:
            final_NHKV = torch.empty(len(final_state_of), H, K, V, dtype=torch.float32, device=q_THK.device)
        states = (initial_NHKV, call.subsplit_states(k_THK, v_THV, reverse=False))
        out_THV = call.attend(q_THK, k_THK, v_THV, *states, reverse=False, final_NHKV=final_NHKV, final_mapped=mapped)
        ctx.save_for_backward(q_THK, k_THK, v_THV, *states)
        ctx.call, ctx.mapped = call, mapped
        ctx.set_materialize_grads(False)
        return out_THV, final_NHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, do_THV, d_final_NHKV):
        q_THK, k_THK, v_THV, initial_NHKV, local_FHKV = ctx.saved_tensors
        call: _Call = ctx.call
        (do_THV,) = _rows_contiguous(torch.zeros_like(v_THV) if do_THV is None else do_THV)
        d_initial_NHKV = None
        if ctx.needs_input_grad[5]:
            d_initial_NHKV = torch.empty(initial_NHKV.shape, dtype=torch.float32, device=q_THK.device)
        dq = call.attend(do_THV, v_THV, k_THK, _transposed(initial_NHKV), _transposed(local_FHKV), reverse=False)
        states = (d_final_NHKV, call.subsplit_states(q_THK, do_THV, reverse=True), d_initial_NHKV)
        dk, dv = call.dk_dv(q_THK, k_THK, v_THV, do_THV, *states, mapped=ctx.mapped)
        if d_initial_NHKV is not None:
            d_initial_NHKV = d_initial_NHKV.to(initial_NHKV.dtype)
        return dq, dk, dv, None, None, d_initial_NHKV, None


class TritonStatePassing(StatePassing):
    """The kernels without autograd; ``local_states`` computes those of whole splits too, so there are no sub-splits."""

    def local_states(self, y_THK, z_THV, slopes_H, documents, state_of, *, reverse):
        y_THK, z_THV = _rows_contiguous(y_THK, z_THV)
        call = _Call.plan(y_THK, z_THV.shape[-1], slopes_H, documents, None)
        key = (state_of, call.tile.tokens, call.splits, reverse)
        ranges_R2 = documents.derive(("lightning ranges", *key), lambda d: _ranges(d, *key))
        states_RHKV = call.local_states(y_THK, z_THV, ranges_R2, reverse=reverse)
        return states_RHKV[: len(state_of)], states_RHKV[len(state_of) :] if call.splits > 1 else None

    def forward(self, q_THK, k_THK, v_THV, slopes_H, documents, initial_MHKV, state_of, split_states):
        q_THK, k_THK, v_THV = _rows_contiguous(q_THK, k_THK, v_THV)
        call = _Call.plan(q_THK, v_THV.shape[-1], slopes_H, documents, state_of)._replace(per_split=1)
        return call.attend(q_THK, k_THK, v_THV, initial_MHKV, split_states, reverse=False, initial_mapped=True)

    def backward_kv(
        self, grad_THV, q_THK, k_THK, v_THV, slopes_H, documents, grad_final_MHKV, state_of, grad_split_states
    ):
        inputs = _rows_contiguous(q_THK, k_THK, v_THV, grad_THV)
        call = _Call.plan(inputs[0], v_THV.shape[-1], slopes_H, documents, state_of)._replace(per_split=1)
        return call.dk_dv(*inputs, d_final_NHKV=grad_final_MHKV, d_local_FHKV=grad_split_states, mapped=True)


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
        ValueError: for a dtype the kernels do not take, q, k and v of different dtypes, or states of documents whose
            lengths only the device knows.
    """
    if isinstance(documents, DeviceDocuments) and (initial_state_NHKV is not None or final_state_of is not None):
        raise ValueError("kernels.lightning='triton' has no states of DeviceDocuments: one that is empty has no tile")
    dtypes = {q_THK.dtype, k_THK.dtype, v_THV.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"kernels.lightning='triton' takes q, k, v of one of bfloat16, float16, float32, got {dtypes}")
    return _TritonLightning.apply(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV, final_state_of)
