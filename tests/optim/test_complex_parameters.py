"""Complex parameters, as of Fourier neural operators, beside real ones that are preconditioned."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.capture import Capture
from tests import dense, processes
from tests.cases import normal

pytestmark = pytest.mark.filterwarnings("ignore:.*trains these parameters by")

X = normal(16, 1, 12)
Y = torch.roll(X[:, 0], 2, 1)


class Spectral(nn.Module):
    """A convolution by products of the lowest frequencies, with a real bias."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        weights = torch.randn(channels, channels, modes, dtype=torch.complex128)
        self.weights = nn.Parameter(weights / channels)
        self.bias = nn.Parameter(0.1 * torch.randn(channels, 1).double())
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bix,iox->box", spectrum[..., : self.modes], self.weights)
        missing = spectrum.shape[-1] - self.modes
        return torch.fft.irfft(functional.pad(low, (0, missing)), n=x.shape[-1]) + self.bias


class FourierOperator(nn.Module):
    """A Fourier neural operator, ``(N, 1, points)`` to ``(N, points)``."""

    def __init__(self, channels: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv1d(1, channels, 1), nn.Conv1d(channels, 1, 1)
        self.spectral = nn.ModuleList(Spectral(channels, modes) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, skip in zip(self.spectral, self.skip, strict=True):
            x = functional.gelu(spectral(x) + skip(x))
        return self.head(x).squeeze(1)


class ModulusReLU(nn.Module):
    """A real bias between complex inputs and outputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.3 * torch.randn(features).double())

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z.abs() + self.bias) * z / z.abs()


class Scaled(nn.Module):
    """A real factor on complex entries."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features).double())

    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight


class ComplexLayers(nn.Module):
    """Real layers before, inside and after complex ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5).double(), nn.Linear(3, 2).double()
        self.up, self.down = (nn.Linear(*d, dtype=torch.complex128) for d in ((5, 4), (4, 3)))
        self.inner, self.norm = inner, nn.LayerNorm(3).double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(self.inner(self.up(self.first(x).to(torch.complex128))))
        return self.last(self.norm(torch.view_as_real(z).prod(-1)))


class Widened(nn.Module):
    """A linear layer whose output is complex, of its own or by a hook."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.mix = layer, nn.Linear(4, 2, dtype=torch.complex128)
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda module, args, out: out.to(torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer(x)).abs()


class ComplexMatrix(nn.Module):
    """A real matrix, and complex outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6).double())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).to(torch.complex128)


class RealProduct(nn.Module):
    """A real matrix that complex entries are multiplied by."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.first, self.by = nn.Linear(6, 4).double(), by
        shape = (4, 4, 2) if by == "view" else (4, 4)
        self.matrix = nn.Parameter(torch.randn(shape).double())
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z, matrix = torch.fft.fft(self.first(x)), self.matrix
        given = torch.view_as_complex(matrix) if self.by == "view" else matrix.to(z.dtype)
        if self.by == "linear":
            z = functional.linear(z, given)
        else:
            z = torch.einsum("bi,io->bo", z, given) if self.by == "einsum" else z @ given
        return torch.tanh(z @ self.mix).real


MODELS: dict[str, Any] = {
    "operator": (FourierOperator, X[:5, :, :8]),
    "modulus": (lambda: ComplexLayers(ModulusReLU(4)), normal(5, 6)),
    "scaled": (lambda: ComplexLayers(Scaled(4)), normal(5, 6)),
    "hooked": (lambda: Widened(nn.Linear(6, 4).double()), normal(5, 6)),
    "widened": (lambda: Widened(ComplexMatrix()), normal(5, 6)),
    **{
        by: (lambda by=by: RealProduct(by), normal(5, 6))
        for by in ("product", "linear", "einsum", "view")
    },
}


@pytest.mark.filterwarnings("ignore:natgrad. .* rows are taken from the gradient")
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_real_parameters_are_those_of_single_samples(name: str):
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make()
    named = dict(model.named_parameters())
    with Capture(model, leaves_complex=True) as capture:
        output = model(x)
        outputs = output[0].numel()
        vectors = torch.eye(outputs).double().reshape(outputs, 1, *output.shape[1:])
        rows = capture.pull_back(output, vectors.expand(-1, *output.shape))
    covered = {n for block in capture.blocks.values() for n in block.layout.names}
    assert covered == {n for n, p in named.items() if not p.is_complex()}
    assert set(capture.uncovered) == set(named) - covered
    for block in rows:
        own = [named[n] for n in rows[block].layout.names]
        expected = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(z, own, retain_graph=True)])
                for one in x
                for z in model(one[None]).flatten()
            ]
        )
        found = rows[block].layout.flat(rows[block].per_sample_gradients())
        assert not found.is_complex()
        dense.assert_same(found.flatten(0, 1), expected, 1e-12)


def loss(model: nn.Module) -> Tensor:
    return functional.mse_loss(model(X), Y)


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    optimizer.zero_grad()
    value = loss(model)
    value.backward()
    optimizer.step()
    return float(value.detach())


def trained(steps: int = 0, **options: Any) -> tuple[natgrad.KFAC, nn.Module]:
    torch.manual_seed(0)
    model = FourierOperator()
    optimizer = natgrad.KFAC(model, nn.MSELoss(), **options)
    for _ in range(steps):
        step(optimizer, model)
    return optimizer, model


def weights(model: nn.Module) -> Tensor:
    parts = [p.detach() for p in model.parameters()]
    return torch.cat([(torch.view_as_real(p) if p.is_complex() else p).flatten() for p in parts])


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
def test_steps_are_those_of_two_optimizers(fallback: str):
    """One on the complex weights, and K-FAC on the others, which takes those for constants."""
    options = {"lr": 0.3, "step_rule": natgrad.StepRule(length="lr"), "kl_clip": None}
    optimizer, model = trained(fallback=fallback, **options)
    apart = copy.deepcopy(trained()[1])
    own = [p.requires_grad_(False) for p in apart.parameters() if p.is_complex()]
    first_order = torch.optim.AdamW(own)
    if fallback == "sgd":
        first_order = torch.optim.SGD(own, lr=1e-2, momentum=0.9)
    natural = natgrad.KFAC(apart, nn.MSELoss(), **options)
    start = float(loss(model).detach())
    for _ in range(20):
        twin = copy.deepcopy(model)
        loss(twin).backward()
        natural.zero_grad()
        loss(apart).backward()
        gradients = [p.grad for p in twin.parameters() if p.is_complex()]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        natural.step()
        first_order.step()
        step(optimizer, model)
        dense.assert_same(weights(model), weights(apart), 1e-12)
    assert float(loss(model).detach()) < 0.9 * start


def test_they_are_named_once_unless_they_were_excluded():
    with pytest.warns(UserWarning, match="trains these parameters by adamw") as told:
        optimizer, _ = trained(3)
    said = [str(one.message) for one in told if "spectral" in str(one.message)]
    assert len(said) == 1 and "spectral.0.weights, spectral.1.weights (complex: " in said[0]
    rows = {row.name: row.treatment for row in optimizer.summary().layers}
    assert rows["spectral.0.weights"] == "complex: only real parameters are preconditioned"
    assert rows["spectral.0"] == rows["skip.1"] == "kfac"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, _ = trained(1, params=[{"params": "*.weights", "preconditioned": False}])
    assert {row.treatment for row in optimizer.summary().layers} == {"kfac", "adamw"}


def test_a_complex_gradient_that_is_not_finite_skips_the_step():
    for options in ({}, {"refresh": natgrad.Refresh(warmup=3)}):
        optimizer, model = trained(2, **options)
        before = weights(model)
        optimizer.zero_grad()
        loss(model).backward()
        model.spectral[0].weights.grad[0, 0, 0] = complex(1.0, float("nan"))
        with pytest.warns(UserWarning, match="skipped a step"):
            optimizer.step()
        assert torch.equal(before, weights(model))
        step(optimizer, model)
        assert bool(weights(model).isfinite().all())


def test_clipping_averages_copies_and_checkpoints():
    optimizer, model = trained()
    average, total = natgrad.WeightAverage(optimizer, start=0), torch.zeros(())
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert size.dtype == torch.float64 and bool(size > 0.1)
        optimizer.step()
        total = total + weights(model) / 3
    with average.applied():
        dense.assert_same(weights(model), total, 1e-12)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, restored = trained()
    restored.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    twin, copied = copy.deepcopy((optimizer, model))
    for _ in range(3):
        step(optimizer, model), step(other, restored), step(twin, copied)
        assert torch.equal(weights(model), weights(restored))
        assert torch.equal(weights(model), weights(copied))


def test_they_may_be_frozen_and_trained_again():
    optimizer, model = trained(1)
    model.spectral[1].weights.requires_grad_(False)
    held = model.spectral[1].weights.detach().clone()
    step(optimizer, model)
    assert torch.equal(held, model.spectral[1].weights)
    model.spectral[1].weights.requires_grad_(True)
    step(optimizer, model)
    assert not torch.equal(held, model.spectral[1].weights)
    model.extra = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.warns(UserWarning, match=r"adamw: extra .complex: only real"):
        optimizer.add_param_group({"params": [model.extra]})
    assert bool(torch.isfinite(torch.tensor(step(optimizer, model))))


def test_a_preconditioner_leaves_their_gradients():
    torch.manual_seed(0)
    model = FourierOperator()
    preconditioner = natgrad.Preconditioner(model, nn.MSELoss())
    loss(model).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter.grad) == parameter.is_complex()


def test_a_complex_output_is_refused():
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 2, dtype=torch.complex128))
    model[0].register_forward_hook(lambda module, args, output: output.to(torch.complex128))
    optimizer = natgrad.KFAC(model, "gaussian")
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"the output .* is torch\.complex128, .*view_as_real"):
        model(normal(5, 3))


class Filtering(nn.Module):
    """Its first parameter is complex."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.scale, n=x.shape[-1])


def make_filtering() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (Filtering(1), nn.Conv1d(1, 4, 1), Filtering(), nn.GELU(), nn.Conv1d(4, 1, 1))
    return nn.Sequential(*layers, nn.Flatten()).double()


def train_share(rank: int, way: str) -> Tensor:
    """Train on a share of the data, or on all of it."""
    trained: nn.Module = make_filtering()
    model = trained
    if way == "replicas":
        trained = nn.parallel.DistributedDataParallel(model)
    elif way == "shards":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for module in [m for m in model.modules() if isinstance(m, Filtering)] + [model]:
            fully_shard(module, mesh=mesh)
    optimizer = natgrad.KFAC(trained, nn.MSELoss(), fisher="exact")
    own = slice(None) if way == "alone" else slice(8 * rank, 8 * rank + 8)
    for _ in range(3):
        optimizer.zero_grad()
        functional.mse_loss(trained(X[own]), Y[own]).backward()
        optimizer.step()
    held = [p.full_tensor() if way == "shards" else p for p in model.parameters()]
    parts = [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in held]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(
    "way", ["replicas", pytest.param("shards", marks=processes.shards_on_cpus)]
)
def test_processes_take_the_steps_of_one(way: str):
    expected = train_share(0, "alone")
    for found in processes.run(train_share, way):
        dense.assert_same(found, expected, 1e-10)
