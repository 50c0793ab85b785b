"""Experts spread over ranks against all experts on one rank, one token and one assignment at a time."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from minimax_train.kernels.deferral import deferred
from minimax_train.kernels.deferral import run as run_deferred
from minimax_train.kernels.experts import expert_mlp_naive
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.experts import ExpertParallel
from minimax_train.parallel.experts.buckets import ExpertBuckets, locate, make_groups
from minimax_train.parallel.experts.overlap import split_groups
from support.compare import relative_error
from support.distributed import run_ranks

GRIDS = [(2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (2, 4), (8, 1)]
EXPERTS, RESIDUAL = 8, 1.75
ROUTINGS = ["uneven", "drops", "one expert", "nothing", "one rank idle"]


def _routing(kind, ranks, tokens, generator):
    """Assignments of all ranks, ``[ranks, tokens, 2]``."""
    first = torch.multinomial(torch.arange(1.0, EXPERTS + 1) ** 2, ranks * tokens, True, generator=generator)
    second = (first + torch.randint(1, EXPERTS, first.shape, generator=generator)) % EXPERTS
    experts = torch.stack([first, second], -1).view(ranks, tokens, 2)
    if kind == "drops":
        experts[torch.rand(experts.shape, generator=generator) < 0.4] = -1
    elif kind == "one expert":
        experts[..., 0], experts[..., 1] = 5, -1
    elif kind == "nothing":
        experts[:] = -1
    elif kind == "one rank idle":
        experts[0], experts[experts == 2] = -1, -1
    return experts


def _case(ranks, kind, dtype, tokens=7, D=8, F=12):
    """Everything of all ranks, the same wherever it is made."""
    g = torch.Generator().manual_seed(ROUTINGS.index(kind))
    shapes = [(ranks, tokens, D), (ranks, tokens, 2), (EXPERTS, 2 * F, D), (EXPERTS, D, F), (ranks, tokens, D)]
    x, weights, gate_up, down, dy = (torch.randn(s, dtype=torch.float64, generator=g).to(dtype) for s in shapes)
    return x, weights, _routing(kind, ranks, tokens, g), gate_up, down, dy


def _reference(case):
    """Output and gradients of x, weights and both experts' weights by autograd, in float64."""
    x, weights, experts, gate_up, down, dy = (t.double() if t.is_floating_point() else t for t in case)
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    y = expert_mlp_naive(*(t.flatten(0, 1) for t in (x, weights, experts)), gate_up, down)
    y = y + RESIDUAL * x.flatten(0, 1)
    gradients = torch.autograd.grad(y, leaves, dy.flatten(0, 1), allow_unused=True, materialize_grads=True)
    return [y.detach().view_as(x), *gradients]


def _slices(gate_up, down, ep, etp):
    """What rank (i, j) holds of the experts."""
    e, f = EXPERTS // ep.size, down.shape[2] // etp.size
    mine, columns = slice(ep.rank * e, (ep.rank + 1) * e), slice(etp.rank * f, (etp.rank + 1) * f)
    gate_up = gate_up[mine].unflatten(1, (2, -1))[:, :, columns].flatten(1, 2)
    return gate_up.contiguous(), down[mine, :, columns].contiguous()


def _run(layer, case, device, **how):
    """This rank's output, dx, d weights, d gate_up, d down."""
    ep, etp = layer.ep.communicator, layer.etp.communicator
    rank = ep.rank * etp.size + etp.rank
    x, weights, experts, gate_up, down, dy = case
    leaves = [x[rank], weights[rank], *_slices(gate_up, down, ep, etp)]
    leaves = [t.to(device, copy=True).requires_grad_() for t in leaves]
    y = layer(leaves[0], leaves[1], experts[rank].to(device), *leaves[2:], residual=RESIDUAL, **how)
    return [y, *torch.autograd.grad(y, leaves, dy[rank].to(device))]


def _worst_errors(communicators, dtype=torch.float64, groups=(1, 2, 3, 7), device="cpu", **sizes):
    """The worst relative error of all results, or of their size where there should be none, per case."""
    ep, etp = communicators
    ranks, rank = ep.size * etp.size, ep.rank * etp.size + etp.rank
    errors = {}
    for kind in ROUTINGS:
        case = _case(ranks, kind, dtype, **sizes)
        y, dx, d_weights, d_gate_up, d_down = _reference(case)
        expected = [y[rank], dx[rank], d_weights[rank], *_slices(d_gate_up, d_down, ep, etp)]
        for token_groups in groups:
            layer = ExpertParallel(ep, etp, num_experts=EXPERTS, token_groups=token_groups)
            pairs = zip(_run(layer, case, device), expected, strict=True)
            errors[kind, token_groups] = max(
                relative_error(a.cpu(), e) if e.norm() else float(a.detach().norm()) for a, e in pairs
            )
    return errors


def _on_gloo(grid, sizes, **how):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("ep", "etp"))
    return _worst_errors([GroupCommunicator(mesh.get_group(axis)) for axis in ("ep", "etp")], **how)


@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_equals_one_rank_in_float64(sizes):
    for errors in run_ranks(_on_gloo, sizes[0] * sizes[1], sizes):
        assert max(errors.values()) < 1e-10, errors


def _alone(**how):
    """This rank's group of itself."""
    return GroupCommunicator(dist.new_group([dist.get_rank()], use_local_synchronization=True, **how))


def _uneven(grid, tokens_of_ranks, groups):
    """Of ranks on the ep axis, each with its own number of tokens: the worst error."""
    ep = GroupCommunicator(grid.group("dp"))
    etp = _alone()
    x, weights, experts, gate_up, down, dy = _case(len(tokens_of_ranks), "uneven", torch.float64)
    kept = torch.arange(x.shape[1]) < torch.tensor(tokens_of_ranks)[:, None]
    case = (x, weights, experts.where(kept[..., None], -1), gate_up, down, dy)
    y, dx, d_weights, d_gate_up, d_down = _reference(case)
    mine = slice(tokens_of_ranks[ep.rank])
    case = [t[:, mine] if t.shape[:2] == kept.shape else t for t in case]
    expected = [t[ep.rank, mine] for t in (y, dx, d_weights)] + list(_slices(d_gate_up, d_down, ep, etp))
    results = _run(ExpertParallel(ep, etp, num_experts=EXPERTS, token_groups=groups), case, "cpu")
    return max(float((a - e).abs().max()) if e.numel() else 0.0 for a, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_ranks_with_different_numbers_of_tokens(groups):
    assert max(run_ranks(_uneven, 2, [5, 0], groups)) < 1e-10
    assert max(run_ranks(_uneven, 4, [0, 7, 1, 0], groups)) < 1e-10


def _gradients_of_leaves(grid, axis, how):
    """With the gradients of the experts' weights deferred, or after all is computed again: the worst error."""
    every, alone = GroupCommunicator(grid.group("dp")), _alone()
    ep, etp = (every, alone) if axis == "ep" else (alone, every)
    case = _case(every.size, "drops", torch.float64)
    _, dx, d_weights, *d_experts = _reference(case)
    expected = [dx[every.rank], d_weights[every.rank], *_slices(*d_experts, ep, etp)]
    x, weights, experts, gate_up, down, dy = case
    leaves = [x[every.rank], weights[every.rank], *_slices(gate_up, down, ep, etp)]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    worst = 0.0
    for groups in (1, 2):
        layer = ExpertParallel(ep, etp, num_experts=EXPERTS, token_groups=groups)

        def run_layer(x, weights, *of_experts, layer=layer):
            return layer(x, weights, experts[every.rank], *of_experts, residual=RESIDUAL)

        for leaf in leaves:
            leaf.grad = None
        if how == "deferred":
            with deferred() as pending:
                run_layer(*leaves).backward(dy[every.rank])
            assert leaves[2].grad is leaves[3].grad is None
            run_deferred(pending)
        else:
            checkpoint(run_layer, *leaves, use_reentrant=False).backward(dy[every.rank])
        pairs = zip(leaves, expected, strict=True)
        worst = max(worst, *(relative_error(leaf.grad, e) if e.norm() else 0.0 for leaf, e in pairs))
    return worst


@pytest.mark.parametrize("how", ["deferred", "computed again"])
@pytest.mark.parametrize("axis", ["ep", "etp"])
def test_weight_gradients_later_and_recomputation(axis, how):
    assert max(run_ranks(_gradients_of_leaves, 2, axis, how)) < 1e-10


def _columns_first(grid):
    """Tokens as a transposed view."""
    etp = GroupCommunicator(grid.group("dp"))
    ep = _alone()
    x, weights, experts, gate_up, down, _ = _case(2, "drops", torch.float64)
    layer = ExpertParallel(ep, etp, num_experts=EXPERTS, token_groups=2)
    mine = x[etp.rank].T.contiguous().T
    y = layer(mine, weights[etp.rank], experts[etp.rank], *_slices(gate_up, down, ep, etp))
    reference = expert_mlp_naive(x[etp.rank], weights[etp.rank], experts[etp.rank], gate_up, down)
    return relative_error(y, reference)


def test_tokens_of_any_strides():
    assert max(run_ranks(_columns_first, 2)) < 1e-12


def test_one_rank_sends_nothing():
    class Alone:
        rank, size = 0, 1

    case = _case(1, "drops", torch.float64)
    layer = ExpertParallel(Alone(), Alone(), num_experts=EXPERTS, token_groups=2)
    for actual, expected in zip(_run(layer, case, "cpu"), _reference(case), strict=True):
        assert relative_error(actual, expected.view_as(actual)) < 1e-12


@pytest.mark.parametrize(("size", "groups"), [(16384, 4), (8, 3), (7, 2), (5, 1), (3, 8)])
def test_first_and_last_group_are_half_as_large(size, groups):
    ranges = split_groups(size, groups)
    assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])] and ranges[-1].stop == size
    weights = [1, *[2] * (groups - 2), 1][:groups]
    assert all(abs((r.stop - r.start) - size * w / sum(weights)) <= 1 for r, w in zip(ranges, weights, strict=True))


@pytest.mark.parametrize(
    ("experts", "ep", "groups"), [(32, 2, 4), (6, 2, 2), (8, 8, 3), (8, 4, 4), (12, 4, 6), (15, 3, 4), (14, 2, 1)]
)
def test_groups_share_the_tokens_for_every_rank(experts, ep, groups):
    buckets, tokens = ExpertBuckets(experts, ep, groups), 420
    ids = buckets.assign(torch.arange(-1, experts).expand(tokens, -1))
    assert (ids[:, 0] == -1).all()
    assert ids[:, 1:].unique().tolist() == list(range(buckets.count))
    # Group of each assignment, found by its bucket: group by group, in each the same number for every rank.
    of_id = [g for g, r in enumerate(buckets.ranges) for _ in range(ep * (r.stop - r.start))]
    group = torch.tensor(of_id)[ids[:, 1:]].view(tokens, ep, -1)
    shares = torch.stack([(group == g).sum((0, 2)) for g in range(groups)], 1)
    assert (shares == shares[0]).all() and shares.sum() == tokens * experts
    # First and last half as large as the others, as nearly as whole buckets allow: no more than the smallest share.
    weights = torch.tensor([1] if groups == 1 else [1, *[2] * (groups - 2), 1])
    ideal = weights * shares[0].sum() / weights.sum()
    assert (shares[0] > 0).all() and ((shares[0] - ideal).abs() <= min(tokens, ideal.min())).all()
    # On a rank no expert comes after one of a higher number, in a higher group.
    assert (group[..., 1:] >= group[..., :-1]).all()


@pytest.mark.parametrize(("experts", "ep", "etp"), [(2, 2, 2), (3, 3, 1), (6, 2, 2), (12, 3, 1), (10, 2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [0, 3, 40])
def test_every_token_meets_its_expert_and_comes_back(experts, ep, etp, groups, most):
    _meet(experts, ep, etp, groups, most, [None] * ep)


@pytest.mark.parametrize(("experts", "ep"), [(2, 2), (3, 3), (12, 3), (10, 2), (20, 5)])
@pytest.mark.parametrize("most", [0, 3, 40])
def test_every_token_meets_its_expert_where_those_that_stay_are_a_group(experts, ep, most):
    _meet(experts, ep, 1, 1, most, range(ep))


def _meet(experts, ep, etp, groups, most, own):
    """Ranks with different numbers of tokens, some with none; a token is its expert's number and one of its own."""
    buckets_of, g = [ExpertBuckets(experts, ep, groups, own[i]) for i in range(ep)], torch.Generator().manual_seed(most)
    buckets = buckets_of[0]
    ranks = [(i, j) for i in range(ep) for j in range(etp)]
    sources, counts = {}, torch.zeros(etp, ep, buckets.count, dtype=torch.int64)
    for number, (i, j) in enumerate(ranks):
        assigned = torch.randint(-1, experts, (int(torch.randint(most + 1, (), generator=g)), 2), generator=g)
        places = buckets_of[i].assign(assigned)
        order = places.flatten().sort(stable=True).indices[int((places < 0).sum()) :]
        sources[i, j] = torch.stack([assigned.flatten()[order], 1000 * number + order], 1)
        counts[j, i] = buckets_of[i].by_id(torch.bincount(places[places >= 0], minlength=buckets.count))
    plans = {(i, j): make_groups(buckets_of[i], counts.tolist(), i, j) for i, j in ranks}
    ends_of_all = {rank: locate(buckets_of[rank[0]], plan, torch.device("cpu")) for rank, plan in plans.items()}
    back = {rank: torch.zeros_like(tokens) for rank, tokens in sources.items()}
    local = experts // ep
    if own[0] is not None:
        for (i, _), plan in plans.items():
            group, here = plan[0], sources[i, 0][plan[0].source]
            assert (here[:, 0] // local == i).all() and group.routed == slice(len(here))
            ends = group.offsets_E.tolist()
            for expert, (start, end) in enumerate(pairwise([0, *ends]), i * local):
                assert start <= end and (here[start:end, 0] == expert).all()
            assert ends[-1] == len(here)
            back[i, 0][group.source] = here
    for index in range(groups):
        of = {rank: plan[index - groups] for rank, plan in plans.items()}
        # What each rank has for each other one, as the all-to-all takes it.
        outgoing = {rank: sources[rank][of[rank].source].split(of[rank].input_splits) for rank in ranks}
        received = {(i, j): torch.cat([outgoing[a, j][i] for a in range(ep)]) for i, j in ranks}
        for i, j in ranks:
            group = of[i, j]
            arrived = torch.cat([_padded(received[i, b], of[i, b].padded) for b in range(etp)])
            routed = arrived if group.by_expert else arrived[group.source_R]
            ends = group.offsets_E.tolist()
            for expert, (start, end) in enumerate(pairwise([0, *ends]), i * local + group.experts.start):
                assert start <= end and (routed[start:end, 0] == expert).all()
            assert ends[-1] == len(routed) == group.routed.stop - group.routed.start
            # One GEMM over all groups' tokens: they lie in order of experts over all groups, too.
            if (ends := ends_of_all[i, j]) is not None:
                here = torch.arange(group.routed.start, group.routed.stop)
                assert (torch.bucketize(here, ends, right=True) + i * local == routed[:, 0]).all()
            returned = routed if group.by_expert or not len(routed) else routed[group.place_N]
            mine = returned[j * group.padded :][: sum(group.output_splits)] if len(routed) else returned
            for a, tokens in enumerate(mine.split(group.output_splits)):
                start = of[a, j].source.start + sum(of[a, j].input_splits[:i])
                back[a, j][start : start + len(tokens)] = tokens
    assert all(torch.equal(back[rank], sources[rank]) for rank in ranks)


def _padded(tokens, size):
    return torch.cat([tokens, tokens.new_full((size - len(tokens), 2), -1)])


def test_refusals():
    class Two:
        rank, size = 0, 2

    with pytest.raises(ValueError, match=r"parallel.ep=2: must divide the number of experts, 7"):
        ExpertParallel(Two(), Two(), num_experts=7)
    with pytest.raises(ValueError, match=r"parallel.token_groups=0: must be positive"):
        ExpertParallel(Two(), Two(), num_experts=8, token_groups=0)
    layer = ExpertParallel(Two(), Two(), num_experts=8)
    with pytest.raises(ValueError, match=r"weights of 8 experts: this rank holds 4"):
        layer(None, None, None, torch.empty(8, 4, 4), torch.empty(8, 4, 2))


# ---------------------------------------------------------------------------------------------- on GPUs

WIDE = {"tokens": 300, "D": 64, "F": 256}
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4, 1), (2, 2), (1, 4)], ids=lambda s: f"ep{s[0]}-etp{s[1]}")
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_four_processes_on_one_gpu(sizes, dtype, tolerance):
    """Transfers go through gloo and the host; streams and kernels are those of a real run."""
    for errors in run_ranks(_on_one_gpu, 4, sizes, dtype, start="spawn"):
        assert max(errors.values()) < tolerance, errors


def _on_one_gpu(grid, sizes, dtype):
    return _on_gloo(grid, sizes, dtype=dtype, groups=(1, 2, 4), device="cuda", **WIDE)


def _on_nccl(grid, axis, dtype):
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    both = GroupCommunicator(dist.new_group(backend="nccl"))
    alone = _alone(backend="nccl")
    communicators = [both, alone] if axis == "ep" else [alone, both]
    return _worst_errors(communicators, dtype, groups=(1, 2, 4), device="cuda", **WIDE)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("axis", ["ep", "etp"])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_two_gpus(axis, dtype, tolerance):
    for errors in run_ranks(_on_nccl, 2, axis, dtype, start="spawn"):
        assert max(errors.values()) < tolerance, errors
