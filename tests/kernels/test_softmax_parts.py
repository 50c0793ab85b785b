"""What a ring computes with: attention of queries to parts of their keys, merged, and its backward pass.

The reference is autograd through a softmax over an explicit list of visible pairs, written here and nowhere else.
"""

from itertools import pairwise

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import (
    attention_backward,
    attention_forward,
    blocked,
    choose_implementation,
    flash4,
    softmax_attention,
)
from minimax_train.kernels.softmax.merge import merge_
from support.compare import relative_error

SCALE = 0.3
ON_CPU = ["naive", "blocked"]
ON_GPU = ["flash", "flash4", "blocked"]

# Query and key lengths of each document.
CAUSAL = [([1], [1]), ([7], [7]), ([3, 1, 5], [9, 1, 6]), ([1, 1], [4, 70]), ([40, 33], [90, 33])]
DENSE = [([1], [1]), ([6], [2]), ([2, 9, 1], [8, 1, 5]), ([40], [77])]
CASES = [(*case, True) for case in CAUSAL] + [(*case, False) for case in DENSE]


def _inputs(query_lengths, key_lengths, heads, seed=0):
    H, G, K, V = heads
    generator = torch.Generator().manual_seed(seed)
    Q, S = sum(query_lengths), sum(key_lengths)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in [(Q, H, K), (S, G, K), (S, G, V), (Q, H, V)]
    ]


def _reference(q, k, v, query_lengths, key_lengths, causal, scale=SCALE):
    """Output and log-sum-exp, one document and one head at a time."""
    outs, lses = [], []
    group = q.shape[1] // k.shape[1]
    parts = zip(q.split(query_lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    for q_part, k_part, v_part in parts:
        out, lse = [], []
        for head in range(q.shape[1]):
            scores = q_part[:, head] @ k_part[:, head // group].T * scale
            if causal:
                left_of_query = torch.arange(len(q_part)).flip(0)
                left_of_key = torch.arange(len(k_part)).flip(0)
                scores = scores.masked_fill(left_of_key < left_of_query[:, None], -torch.inf)
            out.append(scores.softmax(-1) @ v_part[:, head // group])
            lse.append(scores.logsumexp(-1))
        outs.append(torch.stack(out, 1))
        lses.append(torch.stack(lse, 1))
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("query_lengths", "key_lengths", "causal"), CASES)
@pytest.mark.parametrize("heads", [(6, 2, 5, 7), (3, 3, 4, 4), (4, 1, 8, 3)])
@pytest.mark.parametrize("block", [16, 512])
def test_equals_autograd(implementation, query_lengths, key_lengths, causal, heads, block, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", block)
    q, k, v, grad = _inputs(query_lengths, key_lengths, heads)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse = _reference(*inputs, query_lengths, key_lengths, causal)
    queries, keys = Documents.from_lengths(query_lengths), Documents.from_lengths(key_lengths)
    how = {"causal": causal, "scale": SCALE, "implementation": implementation}
    out, lse = attention_forward(q, k, v, queries, keys, **how)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    gradients = attention_backward(grad, q, k, v, out, lse, queries, keys, **how)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-11)


def _in_parts(q, k, v, grad, cuts, num_queries, device, dtype, implementation, scale=SCALE):
    """One document's last queries: causal among themselves, dense on earlier keys cut in parts, merged."""
    q, k, v, grad = (x.detach().to(device, dtype) for x in (q, k, v, grad))
    edges = [0, *cuts, len(k) - num_queries]
    how = {"scale": scale, "implementation": implementation}
    queries = Documents.from_lengths([num_queries], device)
    # As in the ring: keys and values arrive side by side and are read as strided views.
    packed, dims = torch.cat([k, v], -1), [k.shape[-1], v.shape[-1]]
    parts = [(*packed[-num_queries:].split(dims, -1), queries, True)]
    for first, last in pairwise(edges):
        parts.append((*packed[first:last].split(dims, -1), Documents.from_lengths([last - first], device), False))

    results = [attention_forward(q, *part[:2], queries, part[2], causal=part[3], **how) for part in parts]
    out, lse = results[0][0].to(results[0][1].dtype), results[0][1].contiguous()
    for part in results[1:]:
        merge_(out, lse, *part)

    final = out.to(dtype)
    grad_q, grads_k, grads_v = torch.zeros_like(out[..., :1]), [], []
    for k_part, v_part, keys, causal in parts:
        dq, dk, dv = attention_backward(grad, q, k_part, v_part, final, lse, queries, keys, causal=causal, **how)
        grad_q = grad_q + dq
        grads_k.append(dk)
        grads_v.append(dv)
    return final, lse, grad_q, torch.cat([*grads_k[1:], grads_k[0]]), torch.cat([*grads_v[1:], grads_v[0]])


def _whole(q, k, v, grad, num_queries, scale=SCALE):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = _reference(*inputs, [num_queries], [len(k)], True, scale)
    return out, lse, *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("num_queries", "keys", "cuts"), [(5, 9, []), (1, 40, [1, 2, 38]), (17, 60, [10, 30])])
def test_parts_merge_to_the_whole(implementation, num_queries, keys, cuts):
    """Backward from the merged output and log-sum-exp, part by part, is the gradient of the whole softmax."""
    inputs = _inputs([num_queries], [keys], (6, 2, 5, 7), seed=keys)
    actual = _in_parts(*inputs, cuts, num_queries, "cpu", torch.float64, implementation)
    for value, right in zip(actual, _whole(*inputs, num_queries), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-11, atol=1e-11)


def test_merging_far_apart_scores_neither_overflows_nor_loses_the_larger():
    """Log-sum-exps of 3000 and -3000: their exponentials do not exist in float32."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 3, 8, generator=generator)
    for high, low in ((3000.0, -3000.0), (-3000.0, 3000.0)):
        out, lse = first.clone(), torch.full((4, 3), high)
        merge_(out, lse, second, torch.full((4, 3), low))
        assert torch.equal(out, first if high > low else second)
        assert torch.equal(lse, torch.full((4, 3), 3000.0))


def test_merge_takes_parts_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, 3, 8, generator=generator)
    lse, part_lse = torch.randn(2, 40, 3, generator=generator)
    weights = torch.stack([lse, part_lse]).double().softmax(0)
    half = second.bfloat16()
    expected = weights[0, ..., None] * first.double() + weights[1, ..., None] * half.double()
    total = torch.stack([lse, part_lse]).double().logsumexp(0)
    merge_(first, lse, half, part_lse)
    assert relative_error(first, expected) < 1e-6
    assert relative_error(lse, total) < 1e-6


def test_choice_and_refusals():
    q, k, v, _ = _inputs([4], [6], (2, 1, 8, 8))
    assert choose_implementation(q, v) is blocked
    assert choose_implementation(q, v, "flash4") is flash4  # by name, installed or not
    four, six = Documents.from_lengths([4]), Documents.from_lengths([6])
    with pytest.raises(ValueError, match=r"kernels.softmax='fast'.*auto, naive, blocked, flash, flash4"):
        attention_forward(q, k, v, four, six, causal=True, scale=1.0, implementation="fast")
    with pytest.raises(ValueError, match="2 documents of 4 tokens for queries, 1 documents of 6"):
        attention_forward(q, k, v, Documents.from_lengths([1, 3]), six, causal=True, scale=1.0)
    with pytest.raises(ValueError, match=r"v \(5, 1, 8\)"):
        attention_forward(q, k, v[:5], four, six, causal=True, scale=1.0)
    if not flash4.is_installed():
        with pytest.raises(ModuleNotFoundError, match=r"minimax-train\[cuda\]"):
            attention_forward(q, k, v, four, six, causal=True, scale=1.0, implementation="flash4")


# ---------------------------------------------------------------------------------------------- on a GPU


def _skip_if_missing(implementation):
    if implementation == "flash4" and not flash4.is_installed():
        pytest.skip("FlashAttention-4 is not installed")


LONG_CASES = [
    ([513], [513], True),
    ([1, 1, 1], [1, 1, 1], True),
    ([1, 700, 64, 259], [1, 700, 64, 259], True),
    ([130, 1, 300], [1000, 77, 300], True),
    ([300], [1111], False),
    ([1000, 1, 129], [64, 800, 3], False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ON_GPU)
@pytest.mark.parametrize(
    ("heads", "query_lengths", "key_lengths", "causal"),
    [((8, 1, 128, 128), *case) for case in LONG_CASES] + [((8, 2, 64, 64), *case) for case in LONG_CASES[-3:-1]],
)
def test_gpu_equals_reference(implementation, heads, query_lengths, key_lengths, causal):
    _skip_if_missing(implementation)
    scale = heads[2] ** -0.5
    rounded = [x.bfloat16().double() for x in _inputs(query_lengths, key_lengths, heads)]
    inputs, grad = [x.requires_grad_() for x in rounded[:3]], rounded[3]
    expected, expected_lse = _reference(*inputs, query_lengths, key_lengths, causal, scale)
    queries, keys = (Documents.from_lengths(lengths, "cuda") for lengths in (query_lengths, key_lengths))
    q, k, v, half_grad = (x.detach().bfloat16().cuda() for x in rounded)
    how = {"causal": causal, "scale": scale, "implementation": implementation}
    out, lse = attention_forward(q, k, v, queries, keys, **how)
    assert lse.dtype == torch.float32
    assert relative_error(out.cpu(), expected) < 5e-3
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-4, atol=1e-4)
    gradients = attention_backward(half_grad, q, k, v, out, lse, queries, keys, **how)
    for gradient, right in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        error = (gradient.cpu().double() - right).norm() / right.norm().clamp(min=1)  # of one key: exactly zero
        assert error < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ON_GPU)
@pytest.mark.parametrize(("num_queries", "keys", "cuts"), [(257, 1100, [100, 413]), (64, 129, [1])])
def test_gpu_parts_merge_to_the_whole(implementation, num_queries, keys, cuts):
    _skip_if_missing(implementation)
    inputs = [x.bfloat16().double() for x in _inputs([num_queries], [keys], (8, 2, 128, 128))]
    actual = _in_parts(*inputs, cuts, num_queries, "cuda", torch.bfloat16, implementation, scale=128**-0.5)
    for value, right in zip(actual, _whole(*inputs, num_queries, scale=128**-0.5), strict=True):
        assert relative_error(value.cpu(), right) < 1e-2


@pytest.mark.gpu
def test_gpu_compiles_nothing_for_short_pieces():
    """FlashAttention-4 has kernels for pieces of one tile, of queries and of keys, which a ring has by chance."""
    _skip_if_missing("flash4")

    def step(queries, keys, causal):
        documents = [Documents.from_lengths(lengths, "cuda") for lengths in (queries, keys)]
        q, k, v, d_out = (x.cuda().bfloat16() for x in _inputs(queries, keys, (10, 2, 128, 128)))
        options = {"causal": causal, "scale": SCALE, "implementation": "flash4"}
        out, lse = attention_forward(q, k, v, *documents, **options)
        attention_backward(d_out, q, k, v, out, lse, *documents, **options)

    interface = flash4._interface()
    caches = [function.compile_cache.cache for function in (interface._flash_attn_fwd, interface._flash_attn_bwd)]
    for causal in (False, True):
        step([700, 900], [700, 900], causal)
        compiled = [set(cache) for cache in caches]
        for queries, keys in [([9], [900]), ([900], [1000]), ([9, 3], [9, 5]), ([40], [9 + 40]), ([200], [300])]:
            step(queries, keys, causal)
        assert [set(cache) for cache in caches] == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["flash", "flash4"])
def test_gpu_never_waits_for_the_device(implementation):
    _skip_if_missing(implementation)
    documents = Documents.from_lengths([300, 1, 212], "cuda")
    q, k, v = (torch.randn(513, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out, _ = softmax_attention(*inputs, documents, scale=0.125, implementation=implementation)
        out.backward(torch.ones_like(out))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
