"""The picture of a profiler trace, of one written by hand."""

import gzip
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.traces import Trace, draw_trace, kind_of, merge

# As an H100 reports them, cut short.
OF_LIBRARIES = {
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at": "softmax attention",
    "kernel_cutlass_kernel_quackgemm_default_epiGemmDefaultSm90_object_at__TiledMMA": "expert GEMMs",
    "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT": "dense GEMMs",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasLt::cublasSplitKParams": "dense GEMMs",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add": "norms, elementwise, sums",
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float": "norms, elementwise, sums",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<": "optimizer, norms of parameters",
    "Memcpy HtoD (Pinned -> Device)": "others",
    "void at_cuda_detail::cub::detail::radix_sort::DeviceRadixSortOnesweepKernel<": "others",
}
OF_FOLDERS = {
    "adamw": {"optimizer, norms of parameters"},
    "cross_entropy": {"loss"},
    "experts": {"routing, permutation", "norms, elementwise, sums"},
    "lightning": {"lightning attention"},
    "norm": {"norms, elementwise, sums"},
    "rope": {"softmax attention"},
    "silu": {"norms, elementwise, sums"},
}


def _event(category, name, start, end, **more):
    return {"ph": "X", "cat": category, "name": name, "ts": 5000 + 1000 * start, "dur": 1000 * (end - start), **more}


EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python3"}},
    {"ph": "i", "name": "Record Window End", "ts": 99_000},
    _event("overhead", "Activity Buffer Request", -3, -1),
    _event("user_annotation", "data", 0, 1),
    _event("user_annotation", "nccl:all_reduce", 1, 1.5),
    _event("user_annotation", "graph", 1, 2),
    _event("gpu_user_annotation", "graph", 2, 9),
    _event("cuda_runtime", "cudaGraphLaunch", 1, 2),
    _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0.5, 1),
    _event("kernel", "nvjet_sm90_tst_320x128", 2, 4),
    _event("kernel", "nvjet_sm90_tst_320x128", 6, 7),
    _event("kernel", "kernel_cutlass_kernel_flash_attn", 3, 5),  # beside the first GEMM
    _event("kernel", "adamw", 8, 10),
]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "step-00000001-rank-0.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    return Trace.read(path)


def test_kinds_of_library_kernels():
    assert {name: kind_of(name) for name in OF_LIBRARIES} == OF_LIBRARIES


def test_every_kernel_of_this_project_has_a_kind():
    kernels = Path(__file__).parents[2] / "kernels"
    found = {}
    for file in kernels.glob("*/*_kernels.py"):
        for name in re.findall(r"^@(?:triton|gluon)\.jit.*\ndef ([a-z]\w*)\(", file.read_text(), re.MULTILINE):
            found.setdefault(file.parent.name, set()).add(kind_of(name))
    assert found == OF_FOLDERS


def test_merged_spans():
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 1.5), (2.0, 3.0), (3.1, 4.0)]
    assert merge(spans) == [(0.0, 3.0), (3.1, 4.0), (5.0, 6.0)]
    assert merge(spans, 0.2) == [(0.0, 4.0), (5.0, 6.0)]
    assert merge([]) == []


def test_what_is_read(trace):
    assert trace.host == {"data": [(0, 1)], "graph": [(1, 2)]}
    assert trace.device == {"graph": [(2, 9)]}
    assert trace.end == 10
    assert trace.kernels == {
        "others": [(0.5, 1)],
        "dense GEMMs": [(2, 4), (6, 7)],
        "softmax attention": [(3, 5)],
        "optimizer, norms of parameters": [(8, 10)],
    }
    shares = {kind: share for kind, share in trace.shares().items() if share}
    expected = {"others": 0.05, "dense GEMMs": 0.3, "softmax attention": 0.2, "optimizer, norms of parameters": 0.2}
    assert shares == pytest.approx({**expected, "idle": 0.35})


def test_bars_lie_where_the_kernels_do(trace, tmp_path):
    draw_trace(trace, tmp_path / "trace.svg")
    svg = ElementTree.parse(tmp_path / "trace.svg")
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"graph", "dense GEMMs  30.0%", "softmax attention  20.0%"} <= set(texts)
    outlines = [path for path in svg.iter("{http://www.w3.org/2000/svg}path") if "#009e73" in path.get("style", "")]
    whole, zoomed = (list(map(float, re.findall(r"[ML] (\S+) ", path.get("d")))) for path in outlines)
    scale = (max(whole) - min(whole)) / 5  # from 2 to 7 ms
    edges = sorted({round((x - min(whole)) / scale + 2, 3) for x in whole})
    assert edges == [2, 4, 6, 7]
    assert len(set(zoomed)) == 2  # from 0 to 6 ms, which the second GEMM begins after
