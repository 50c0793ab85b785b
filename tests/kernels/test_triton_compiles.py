"""What the interpreter lets pass and the compiler refuses: every kernel around the attentions, compiled for Hopper."""

import os
import subprocess
import sys

import pytest

# In its own process: here, triton may already be in interpreter mode.
PROGRAM = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minimax_train.kernels.adamw import triton_kernels as adamw
from minimax_train.kernels.cross_entropy import triton_kernels as loss
from minimax_train.kernels.experts import triton_kernels as experts
from minimax_train.kernels.lightning import triton_kernels as lightning
from minimax_train.kernels.norm import triton_kernels as norm
from minimax_train.kernels.rope import triton_kernels as rope
from minimax_train.kernels.silu import triton_kernels as silu

bf16, f32, i64, i32 = "*bf16", "*fp32", "*i64", "*i32"
E, D, F, K, BE = 32, 6144, 9216, 2, 64
MOVED = dict.fromkeys(("x", "out", "y", "d_out", "d_y", "gate_up", "act", "d_act", "d_gate_up", "second"), bf16)
MOVED |= dict.fromkeys(("d_x", "d_second", "weight", "logits", "d_q", "d_k", "d_v"), bf16) | {"size": "i64"}
MOVED |= dict.fromkeys(("weights", "d_weights", "scale", "cos", "sin", "losses", "log_sum", "d_scale"), f32)
MOVED |= dict.fromkeys(("experts", "routed_of", "assignment_of", "labels", "spans", "counts"), i64)
MOVED |= dict.fromkeys(("histogram", "starts", "offsets"), i32) | {"alpha": "fp32", "eps": "fp32"}
ROUTER = MOVED | dict.fromkeys(("logits", "probabilities", "d_sums", "d_logits"), f32)
ROUTER |= {"sums": i64, "entropy": i64}
MOVE = {"D": D, "E": E, "K": K, "BT": 4, "BD": 1024}
ACTIVATE = {"E": E, "F": F, "BF": 1024}
ROUTE = {"E": E, "K": K, "BT": 64, "BE": 32}
ROUTED = {"D": D, "BT": 64, "BD": 128, "FACTOR": tl.bfloat16}
PLAN = {"E": E, "BE": BE}
LAUNCHES = [
    (experts.route, ROUTER, ROUTE | {"BK": 2}, 4),
    (experts.route_backward, ROUTER, ROUTE | {"HAS_SUMS": True, "HAS_WEIGHTS": True}, 4),
    (experts.add_router_gradient, MOVED | {"d_logits": bf16}, ROUTED | {"E": E, "BE": 32}, 4),
    (experts.add_router_gradient, MOVED | {"d_logits": bf16}, ROUTED | {"E": 64, "BE": 64}, 4),
    (experts.count, MOVED, PLAN | {"BR": 256}, 8),
    (experts.scan, MOVED, PLAN | {"STEP": 64}, 8),
    (experts.rank, MOVED, PLAN | {"BR": 256}, 8),
    (experts.permute, MOVED, MOVE, 4),
    (experts.unpermute, MOVED | {"scale": "fp32", "weights_out": f32}, MOVE, 4),
    (experts.unpermute, MOVED, MOVE | dict.fromkeys(("x", "weights", "weights_out")) | {"scale": 0.0}, 4),
    (experts.swiglu, MOVED, ACTIVATE | {"BR": 4}, 4),
    (experts.swiglu_backward, MOVED, ACTIVATE | {"BR": 2}, 4),
    (rope.rotate, MOVED, dict(H=64, K=128, R=32, BT=1, BH=64, BR=32, BREST=0, INVERSE=False), 4),
    (rope.rotate, MOVED, dict(H=8, K=128, R=32, BT=8, BH=8, BR=32, BREST=64, INVERSE=True), 4),
    (silu.forward, MOVED, {"B": 2048}, 4),
    (silu.backward, MOVED, dict(H=64, K=128, BR=16, BK=128, q_k=1, k_k=1, v_k=1), 4),
    (silu.backward, MOVED | {"q_t": "i64"}, dict(H=8, K=96, BR=16, BK=128, d_k=None, v_k=1), 4),
    (loss.softmax_gradient, MOVED, dict(V=200_064, R=4, W=8192, NEEDS_GRADIENT=True), 32),
    (loss.log_sums, MOVED | {"out": f32}, dict(V=100_032, R=4, W=8192), 32),
    (loss.gradients, MOVED, dict(V=100_032, R=4, W=8192), 32),
]
# All float32 without a copy of the weights; 16-bit gradients and moments with one.
STATES = dict.fromkeys(("master", "grad", "exp_avg", "exp_avg_sq"), f32) | {"size": "i64"}
STATES |= dict.fromkeys(("step", "learning_rate", "grad_scale", "frozen", "not_finite"), f32)
STATES |= dict.fromkeys(("log_beta1", "log_beta2", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2"), "fp32")
STATES |= {"eps": "fp32", "weight_decay": "fp32", "x": f32, "partial": "*fp64"}
LAUNCHES += [
    (adamw.adamw, STATES, {"B": 2048, "weight": None}, 8),
    (adamw.adamw, STATES | dict.fromkeys(("grad", "exp_avg", "exp_avg_sq", "weight"), bf16), {"B": 2048}, 8),
    (adamw.sum_squares, STATES, {"B": 4096, "BLOCKS": 4}, 8),
]
# Local states: of two token ranges of 64 heads, slopes as the model has them; and of one range of one head.
SUMMED = dict.fromkeys(("y", "z"), bf16) | dict.fromkeys(("out", "blocks"), f32) | {"slopes": "*fp64"}
SUMMED |= dict.fromkeys(("ranges", "block_table"), i32)
TILES = dict.fromkeys(("cu_seqlens", "starts", "infos", "document_ids", "tile_count"), i32)
STATES = dict(K=128, V=128, C=64, BK=128, BV=128, PRECISION="tf32")
for pairs in (dict(H=64, PAIRS=128), dict(H=1, PAIRS=1, num_pairs=1)):
    LAUNCHES += [
        (lightning.plan_blocks, SUMMED, pairs | {"C": 64, "BLOCKS": 264}, 4),
        (lightning.block_states, SUMMED, STATES | pairs | {"REVERSE": pairs["H"] == 1}, 8),
    ]
LAUNCHES += [(lightning.sum_blocks, SUMMED, {"KV": 128 * 128, "B": 1024}, 4)]
LAUNCHES += [(lightning.cut_tiles, TILES, {"C": 64}, 4)]
for kind in range(3):
    tile = {"D": 8192, "BT": 1, "BD": 8192, "KIND": kind, "GIVEN": False}
    LAUNCHES += [(norm.forward, MOVED, tile, 8), (norm.backward, MOVED, tile | {"d_again": None}, 16)]
LAUNCHES += [(norm.backward, MOVED | {"d_again": bf16}, tile | {"KIND": norm.ALONE.value}, 16)]
tile = {"D": 4096, "BT": 1, "BD": 4096, "KIND": norm.GATE.value, "GIVEN": True}
LAUNCHES += [(norm.forward, MOVED, tile, 4), (norm.backward, MOVED, tile | {"d_again": None}, 8)]

for kernel, types, constants, warps in LAUNCHES:
    signature, values, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(i,)] = constants[argument]
        else:
            signature[argument] = types.get(argument, "i32")
            if signature[argument].startswith("*"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, compiled.metadata.shared)
"""


def test_kernels_compile(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 38 and max(shared) <= 100 * 1024  # two programs on a multiprocessor
