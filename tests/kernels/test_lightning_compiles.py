"""The Hopper kernels have no interpreter: what a machine without a GPU can see is that they compile and fit."""

import os
import subprocess
import sys

import pytest

SHARED_MEMORY = 227 * 1024

# In its own process: here, triton may already be in interpreter mode.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from minimax_train.kernels.lightning import hopper_kernels as hopper

C, BK, BV = 64, int(sys.argv[1]), int(sys.argv[2])
MAPPED = bool(int(sys.argv[3]))
STATES = {"HAS_INITIAL": True, "HAS_FINAL": True, "HAS_LOCAL": True, "INITIAL_MAPPED": MAPPED, "SUBSPLITS": 16}
TILES = {"K": BK, "V": BV, "C": C, "BK": BK, "BV": BV}
KERNELS = {
    "subsplit_states": (8, TILES | {"H": 8, "REVERSE": True, "STAGES": hopper.STAGES_LOCAL}, {"y": BK, "z": BV}),
    "block_states": (8, TILES | {"H": 8, "PAIRS": 16, "REVERSE": MAPPED, "STAGES": hopper.STAGES_LOCAL},
                     {"y": BK, "z": BV}),
    "attend": (4, TILES | STATES | {"REVERSE": True, "FINAL_MAPPED": MAPPED, "STAGES": hopper.STAGES},
               {"x": BK, "y": BK, "z": BV // 2, "out": BV // 2}),
    "attend_dk_dv": (4, TILES | STATES | {"STAGES": hopper.STAGES_BACKWARD},
                     {"q": BK, "k": BK, "v": BV, "do": BV, "dk": BK, "dv": BV}),
}
POINTERS = {"out": "*bf16", "dk": "*bf16", "dv": "*bf16"}
POINTERS |= dict.fromkeys(("initial", "final", "local", "slopes"), "*fp32")
POINTERS |= dict.fromkeys(("starts", "infos", "document_ids", "tile_count", "rows", "runs"), "*i32")
POINTERS |= dict.fromkeys(("cu_seqlens", "ranges", "block_table"), "*i32")

for name, (warps, constants, widths) in KERNELS.items():
    kernel = getattr(hopper, name)
    signature, values = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(i,)] = constants[argument]
        elif argument.endswith("_desc"):
            block = [1, C, widths[argument.removesuffix("_desc")]]
            layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
            signature[argument] = f"tensordesc<bf16{block},{layout!r}>"
        else:
            signature[argument] = POINTERS.get(argument, "i32")
    if name == "block_states":
        signature["out"] = "*fp32"
    source = GluonASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(name, compiled.metadata.shared)
"""


@pytest.mark.parametrize("K, V, mapped", [(128, 128, 0), (64, 128, 0), (128, 128, 1)])
def test_hopper_kernels_compile(tmp_path, K, V, mapped):
    pytest.importorskip("triton.experimental.gluon", exc_type=ImportError)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(K), str(V), str(mapped)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}
    assert set(shared) == {"subsplit_states", "block_states", "attend", "attend_dk_dv"}
    assert max(shared.values()) <= SHARED_MEMORY
