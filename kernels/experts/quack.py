"""The experts' GEMMs on Hopper by quack-kernels (CuTe DSL), with SwiGLU in their epilogues.

The GEMM that makes gate and up also stores the activation; the GEMM for the gradient of the activation reads gate and
up and stores their gradients, the activation again and its part of the gradient of the weights. A pair of gate and up
must lie in one tile for that, so ``hidden`` holds them as neighbouring columns, gate first. Weights and their gradients
keep gate over up: quack lets TMA read and write their rows interleaved ("concat layout").

Tiles were chosen by measurement on one H200 (``docs/results.md``). Each is compiled once, in two to six seconds.

Shape legend: R routed tokens sorted by expert, K assignments per token, E experts, D hidden, F expert hidden; M, N
columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cutlass.cute as cute
import torch
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.math import pack, unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce
from quack.gemm import gemm, run_gemm_plan
from quack.gemm_runtime.host import run_gemm_epi_plan
from torch import Tensor

from minimax_train.kernels.experts.gemms import SeparateGemms

# --- epilogues --------------------------------------------------------------------------------------------------------
# Written with cutlass and quack.epilogue alone: quack fingerprints whatever an epilogue refers to, and cannot do that
# for the functions of quack.activation where quack is installed outside a site-packages directory.


def _sigmoid(x):
    return cute.arch.rcp_approx(1.0 + cute.math.exp2(x * -math.log2(math.e), fastmath=True))


def _swiglu_gradients(gate, up, d_act):
    """Gradients of gate and up, and the activation."""
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return d_act * up * (sigmoid + silu * (1.0 - sigmoid)), d_act * silu, silu * up


@gemm_epilogue()
def _identity(acc):
    return {"D": acc}


@gemm_epilogue(outputs=("act",), ops={"weight": ColVecLoad("weight")}, mode="acc_pair")
def _swiglu(acc, weight):
    gate, up = unpack(acc)
    return {"act": gate * _sigmoid(gate) * up * weight}


@gemm_epilogue(
    outputs=("act",),
    ops={"weight": ColVecLoad("weight")},
    reduces={"d_weight": ColVecReduce("d_weight", scaled=True)},
    mode="packed_cd_b16x2",
)
def _swiglu_backward(acc, c, weight):
    gate, up = unpack(c)
    d_gate, d_up, act = _swiglu_gradients(gate, up, acc * weight)
    return {"D": pack(d_gate, d_up), "act": act * weight, "d_weight": (act, acc)}


# --- GEMMs ------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows and columns of a tile, and of a cluster in tiles.

    With ``pingpong`` two warp groups work on a tile each, and one's epilogue runs under the other's main loop; without,
    they share one tile, which may then be twice as large.
    """

    m: int
    n: int
    pingpong: bool = False
    cluster_m: int = 2
    cluster_n: int = 1

    @property
    def arguments(self) -> dict:
        return {
            "tile_M": self.m,
            "tile_N": self.n,
            "cluster_M": self.cluster_m,
            "cluster_N": self.cluster_n,
            "pingpong": self.pingpong,
            # A program takes the next tile when it is done with one. Dealt out beforehand, those of programs that start
            # late, because a transfer holds their SMs, would end late by as much.
            "is_dynamic_persistent": True,
        }


WIDE, PINGPONG = Tile(128, 256), Tile(128, 128, pingpong=True)
FEW = 1024  # tokens of an expert, on average, below which two tiles of rows in a cluster waste more than they share
LONG = 2048  # terms of a sum from which the main loop of a tile outlasts the epilogue of SwiGLU

# What a launch needs beyond its tensors. quack keeps its own by shape, rows included, which under expert parallelism
# differ in every call; only columns matter.
_plans: dict[tuple, NamedTuple] = {}


def _starts_and_zero(offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """Where each expert's tokens start, and where the last end; and a zero, from which a launch counts its tiles."""
    padded = torch.nn.functional.pad(offsets_E, (1, 1))
    return padded[:-1], padded[-1:]


def _tokens(
    epilogue: EpiMod,
    tile: Tile,
    a_RM: Tensor,
    weight_ENM: Tensor,
    out_RN: Tensor,
    offsets_E: Tensor,
    *,
    hidden_R2N: Tensor | None = None,
    interleave: bool = False,
    **values: Tensor,
) -> Tensor:
    """Each expert's tokens times its weight, through the epilogue."""
    if not len(a_RM):
        return out_RN
    if len(a_RM) < FEW * len(weight_ENM):
        tile = tile._replace(cluster_m=1)  # an expert's tokens are rounded up to whole clusters
    key = (epilogue, tile, weight_ENM.shape, weight_ENM.stride(), interleave)
    starts, taken = _starts_and_zero(offsets_E)
    rows = {"cu_seqlens_m": starts, "tile_count_semaphore": taken}
    if key in _plans:
        run_gemm_epi_plan(_plans[key], a_RM, weight_ENM, out_RN, hidden_R2N, values, **rows)
    else:
        _plans[key] = epilogue.gemm(
            a_RM, weight_ENM, out_RN, hidden_R2N, epi_args=values, **rows, **tile.arguments,
            concat_layout=("B",) if interleave else None,
        )  # fmt: skip
    return out_RN


def _weights(
    tile: Tile, a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor, out_EMN: Tensor | None, adds: bool,
    *, interleave: bool = False,
) -> Tensor:  # fmt: skip
    """``[E, M, N]``, the sum over each expert's tokens of ``a^T b``; rows of the result un-interleaved if asked."""
    if out_EMN is None:
        out_EMN = torch.empty(len(offsets_E), a_RM.shape[1], b_RN.shape[1], dtype=a_RM.dtype, device=a_RM.device)
    if not len(a_RM):
        return out_EMN if adds else out_EMN.zero_()
    key = (tile, out_EMN.shape, out_EMN.dtype, adds, interleave)
    starts, taken = _starts_and_zero(offsets_E)
    rows = {"cu_seqlens_k": starts, "tile_count_semaphore": taken}
    if key in _plans:
        run_gemm_plan(_plans[key], a_RM.T, b_RN.T, out_EMN, None, **rows)
    else:
        _plans[key] = gemm(
            a_RM.T, b_RN.T, out_EMN, None, **rows, **tile.arguments,
            concat_layout=("out",) if interleave else None, add_to_output=adds,
        )  # fmt: skip
    return out_EMN


class QuackGemms(SeparateGemms):
    """As the base class; ``hidden`` is interleaved."""

    def __init__(self, x: Tensor) -> None:
        if not (x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == 9):
            raise ValueError(
                f"kernels.experts='quack' takes bfloat16 on compute capability 9.0, not {x.dtype} on {x.device}"
            )

    def up(self, x_RD, gate_up_E2FD, offsets_E, weights_R):
        R, F2, D = len(x_RD), *gate_up_E2FD.shape[1:]
        hidden_R2F, act_RF = x_RD.new_empty(R, F2), x_RD.new_empty(R, F2 // 2)
        _tokens(
            _swiglu, WIDE if D >= LONG else PINGPONG, x_RD, gate_up_E2FD, hidden_R2F, offsets_E,
            interleave=True, act=act_RF, weight=weights_R.float(),
        )  # fmt: skip
        return hidden_R2F, act_RF

    def down(self, act_RF, down_EDF, offsets_E):
        return _tokens(_identity, WIDE, act_RF, down_EDF, act_RF.new_empty(len(act_RF), down_EDF.shape[1]), offsets_E)

    def d_hidden(self, dy_RD, hidden_R2F, down_EDF, offsets_E, weights_R, out=None):
        R, F = len(dy_RD), down_EDF.shape[2]
        d_hidden_R2F, act_RF = out or (torch.empty_like(hidden_R2F), dy_RD.new_empty(R, F))
        sums_RB = torch.zeros(R, -(-F // PINGPONG.n), dtype=torch.float32, device=dy_RD.device)  # of tiles of columns
        _tokens(
            _swiglu_backward, PINGPONG, dy_RD, down_EDF.mT, d_hidden_R2F, offsets_E,
            hidden_R2N=hidden_R2F, act=act_RF, weight=weights_R.float(), d_weight=sums_RB,
        )  # fmt: skip
        return d_hidden_R2F, act_RF, sums_RB.sum(1).to(weights_R.dtype)

    def dx(self, d_hidden_R2F, gate_up_E2FD, offsets_E):
        out_RD = d_hidden_R2F.new_empty(len(d_hidden_R2F), gate_up_E2FD.shape[2])
        return _tokens(_identity, WIDE, d_hidden_R2F, gate_up_E2FD.mT, out_RD, offsets_E, interleave=True)

    def d_gate_up(self, d_hidden_R2F, x_RD, offsets_E, out=None, adds=False):
        return _weights(WIDE, d_hidden_R2F, x_RD, offsets_E, out, adds, interleave=True)

    def d_down(self, dy_RD, act_RF, offsets_E, out=None, adds=False):
        return _weights(WIDE, dy_RD, act_RF, offsets_E, out, adds)
