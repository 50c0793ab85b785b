"""The flat AdamW against torch.optim.AdamW in float64, and what its scalars promise."""

import math

import pytest
import torch

from minimax_train.kernels.adamw import adamw_, squared_norm
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
IMPLEMENTATIONS = ["torch", "triton"]
OPTIONS = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
FLOAT32 = torch.float32


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def _scalar(value, dtype=FLOAT32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


class _Flat:
    """Flat tensors at the start of training, and their updates."""

    def __init__(self, size, *, master=FLOAT32, grad=FLOAT32, moments=FLOAT32, weight=None):
        torch.manual_seed(size)
        self.master = torch.randn(size, dtype=torch.float64, device=DEVICE).float().to(master)
        self.moments = [torch.zeros(size, dtype=moments, device=DEVICE) for _ in range(2)]
        self.weight = None if weight is None else torch.zeros(size, dtype=weight, device=DEVICE)
        self.grad, self.not_finite = grad, _scalar(0.0)

    def update(self, grad, t, *, rate=1e-2, scale=1.0, frozen=0.0, implementation, **options):
        adamw_(
            self.master, grad.to(self.grad), *self.moments, self.weight, step=_scalar(float(t)),
            learning_rate=_scalar(rate), grad_scale=_scalar(scale), frozen=_scalar(frozen),
            not_finite=self.not_finite, implementation=implementation, **(OPTIONS | options),
        )  # fmt: skip
        return self

    @property
    def tensors(self):
        return [self.master, *self.moments, *([] if self.weight is None else [self.weight])]


def _gradients(size, steps):
    """Of very different sizes, and exact in bfloat16."""
    torch.manual_seed(1)
    sizes = 10.0 ** torch.randint(-6, 3, (size,), device=DEVICE)
    return [(torch.randn(size, device=DEVICE) * sizes).bfloat16() for _ in range(steps)]


def _peer(weights, gradients, rates, **options):
    """Weights and moments after the same steps of torch.optim.AdamW in float64."""
    parameter = torch.nn.Parameter(weights.clone())
    betas = options.pop("beta1"), options.pop("beta2")
    # Not fused: on the CPU that multiplies by betas rounded to float32.
    optimizer = torch.optim.AdamW([parameter], betas=betas, fused=False, **options)
    for grad, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"], parameter.grad = rate, grad.double()
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def _check(implementation, size, tolerance, *, master=FLOAT32, grad=FLOAT32, **options):
    flat, gradients, options = (
        _Flat(size, master=master, grad=grad, moments=master),
        _gradients(size, 3),
        OPTIONS | options,
    )
    rates = (2**-7, 2**-8, 2**-9)
    begin = flat.master.double().clone()
    right = _peer(begin, gradients, rates, **options)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        flat.update(g, t, rate=rate, implementation=implementation, **options)
    # The step, not the weight: it is a hundredth of that.
    assert relative_error(flat.master - begin, right[0] - begin) < tolerance * 100
    (exp_avg, exp_avg_sq), size = flat.moments, (right[2] / (1 - options["beta2"])).sqrt()  # signs may cancel
    torch.testing.assert_close(exp_avg / size, right[1] / size, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exp_avg_sq.double(), right[2], rtol=tolerance, atol=0)
    assert flat.not_finite == 0


@pytest.mark.parametrize("options", [{}, {"beta1": 0.0}, {"beta2": 0.99999, "weight_decay": 0.0, "eps": 1e-3}])
def test_torch_equals_pytorchs_adamw(options):
    _check("torch", 1001, 1e-13, master=torch.float64, grad=torch.float64, **options)


@pytest.mark.parametrize("size", [1, 2048, 5003])
@pytest.mark.parametrize("grad", [FLOAT32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.0}, {"beta2": 0.99999, "weight_decay": 0.0, "eps": 1e-3}])
def test_float32_equals_pytorchs_adamw(implementation, size, grad, options):
    _check(implementation, size, 1e-6, grad=grad, **options)


@pytest.mark.parametrize("t", [1, 2, 100, 100_000])
def test_bias_corrections_are_precise(implementation, t):
    """With a gradient that never changed, the step is the learning rate whatever the number of the update."""
    flat, beta1, beta2, g = _Flat(5), 0.999, 0.999999, torch.full((5,), 0.25, device=DEVICE)
    flat.master.zero_()
    for moment, beta, value in zip(flat.moments, (beta1, beta2), (0.25, 0.25**2), strict=True):
        moment.fill_(value * -math.expm1((t - 1) * math.log(beta)))
    flat.update(g, t, rate=1.0, implementation=implementation, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=1e-20)
    torch.testing.assert_close(flat.master, torch.full_like(flat.master, -1.0), rtol=2e-5, atol=0)


def test_gradients_are_scaled(implementation):
    (g,) = _gradients(3001, 1)
    scaled, plain = _Flat(3001), _Flat(3001)
    scaled.update(g, 1, scale=0.125, implementation=implementation)
    plain.update(g * 0.125, 1, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(scaled.tensors, plain.tensors, strict=True))


@pytest.mark.parametrize("moments", [FLOAT32, torch.bfloat16])
def test_stored_values_are_rounded_to_nearest(implementation, moments):
    (g,), size = _gradients(4099, 1), 4099
    if implementation == "triton" and not HAS_GPU:
        pytest.skip("Triton's interpreter truncates")
    flat, exact = _Flat(size, moments=moments, weight=torch.bfloat16), _Flat(size)
    flat.update(g, 1, implementation=implementation)
    exact.update(g, 1, implementation=implementation)
    assert torch.equal(flat.master, exact.master)
    assert torch.equal(flat.weight, exact.master.bfloat16())
    assert all(torch.equal(a, b.to(moments)) for a, b in zip(flat.moments, exact.moments, strict=True))


def test_bfloat16_is_stored_within_its_precision(implementation):
    (g,) = _gradients(4099, 1)
    flat, exact = (_Flat(4099, moments=kind, weight=kind) for kind in (torch.bfloat16, FLOAT32))
    for ours, right in zip(
        flat.update(g, 1, implementation=implementation).tensors,
        exact.update(g, 1, implementation=implementation).tensors,
        strict=True,
    ):
        torch.testing.assert_close(ours.float(), right, rtol=2**-7, atol=0)


def test_frozen_changes_nothing(implementation):
    (g,) = _gradients(2500, 1)
    g[17] = math.nan
    flat = _Flat(2500, moments=torch.bfloat16, weight=torch.bfloat16)
    flat.weight[:3] = torch.tensor([math.nan, -0.0, math.inf])
    before = [x.clone() for x in flat.tensors]
    flat.update(g, 1, frozen=1.0, implementation=implementation)
    bits = {2: torch.int16, 4: torch.int32}
    for ours, old in zip(flat.tensors, before, strict=True):
        assert torch.equal(ours.view(bits[ours.itemsize]), old.view(bits[old.itemsize]))
    assert flat.not_finite == 0


@pytest.mark.parametrize("place", [0, 2047, 2048, 4998])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_weights_that_are_not_finite_are_told(implementation, place, value):
    flat, (g,) = _Flat(4999), _gradients(4999, 1)
    flat.master[place] = value
    assert flat.update(g, 1, implementation=implementation).not_finite == 1
    flat.master[place] = 0
    assert flat.update(g, 2, implementation=implementation).not_finite == 1  # left as it is


def test_no_parameters(implementation):
    flat = _Flat(0, weight=torch.bfloat16).update(torch.zeros(0, device=DEVICE), 1, implementation=implementation)
    assert flat.not_finite == 0
    assert squared_norm(flat.master, implementation=implementation) == 0


@pytest.mark.parametrize("size", [1, 16384, 40_001])
@pytest.mark.parametrize("dtype", [FLOAT32, torch.bfloat16])
def test_squared_norm(implementation, size, dtype, poisoned_empty):
    torch.manual_seed(0)
    x = torch.randn(size, device=DEVICE).to(dtype)
    found = squared_norm(x, implementation=implementation)
    assert found.dtype == torch.float64 and found.shape == ()
    torch.testing.assert_close(found, x.double().square().sum(), rtol=1e-6, atol=0)
    assert torch.equal(found, squared_norm(x, implementation=implementation))
    x[-1] = math.nan
    assert squared_norm(x, implementation=implementation).isnan()


def test_triton_refuses_float64():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"kernels.adamw='triton'"):
        _Flat(3, master=torch.float64).update(torch.zeros(3, device=DEVICE), 1, implementation="triton")
    with pytest.raises(ValueError, match=r"kernels.adamw='triton'"):
        squared_norm(torch.zeros(3, dtype=torch.float64, device=DEVICE), implementation="triton")


@pytest.mark.gpu
def test_a_captured_update_follows_its_scalars():
    flat, peer, gradients = _Flat(100_003), _Flat(100_003), _gradients(100_003, 3)
    grad = torch.empty(100_003, device=DEVICE)
    step, rate, scale, frozen = (_scalar(x) for x in (1.0, 1e-2, 1.0, 1.0))
    scalars = dict(step=step, learning_rate=rate, grad_scale=scale, frozen=frozen, not_finite=flat.not_finite)

    def update():
        adamw_(flat.master, grad.float(), *flat.moments, **scalars, **OPTIONS)

    update()  # compiles; frozen
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    for t, (g, r, s) in enumerate(zip(gradients, (1e-2, 3e-3, 1e-3), (1.0, 0.5, 0.25), strict=True), 1):
        for scalar, value in zip((step, rate, scale, frozen), (t, r, s, 0.0), strict=True):
            scalar.fill_(value)
        grad.copy_(g)
        graph.replay()
        peer.update(g, t, rate=r, scale=s, implementation="triton")
    assert all(torch.equal(a, b) for a, b in zip(flat.tensors, peer.tensors, strict=True))


@pytest.mark.gpu
def test_beyond_32_bits():
    size = 2**31 + 4099
    flat = _Flat(0, weight=torch.bfloat16)
    flat.master = torch.ones(size, device=DEVICE)
    flat.moments = [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    flat.weight = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    grad = torch.full((size,), 2.0, dtype=torch.bfloat16, device=DEVICE)
    flat.grad = torch.bfloat16
    flat.update(grad, 1, rate=0.25, implementation="triton", weight_decay=0.0)
    assert flat.master.min() == flat.master.max() and flat.weight.min() == flat.weight.max() == 0.75
    assert squared_norm(grad) == 4 * size
