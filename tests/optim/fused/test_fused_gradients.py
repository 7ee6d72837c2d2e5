"""Backward passes that make the natural gradient, against plain ones preconditioned afterwards."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import as_structure
from natgrad.optim.fused import kronecker_gradients
from tests.cases import normal
from tests.methods import make_optimizer

BATCH, UNITS = 6, (12, 20, 15, 4)
OPTIONS = {
    "lr": 0.1,
    "damping": 1e-2,
    "momentum": 0.9,
    "kl_clip": None,
    "factors": 1,
    "early": False,
}


def make_model(activation: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in zip(UNITS, UNITS[1:], strict=False):
        layers += [nn.Linear(d_in, d_out, bias=bias), copy.deepcopy(activation) or nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def batch(seed: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    return normal(size, UNITS[0], seed=seed), torch.arange(size) % UNITS[-1]


def backward(model: nn.Module, seed: int, size: int = BATCH) -> None:
    x, y = batch(seed, size)
    functional.cross_entropy(model(x), y).backward()


def pair(activation: nn.Module | None = None, bias: bool = True, **options):
    """Return a fused and a plain run that have taken the same first step."""
    options = {**OPTIONS, "inverses": 1000, **options}
    runs = []
    for fused in (True, False):
        model = make_model(activation, bias)
        optimizer = make_optimizer(natgrad.KFAC, model, fused=fused, **options)
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        runs.append((model, optimizer))
    return runs


def assert_equal_models(left: nn.Module, right: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def active(optimizer: natgrad.KFAC) -> list[bool | None]:
    return [fused.active for fused in optimizer.preconditioner.own_backward.values()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(inplace=True)])
def test_steps_equal_plain_ones(activation: nn.Module, bias: bool) -> None:
    (model, optimizer), (plain, other) = pair(activation, bias)
    for seed in range(1, 4):
        backward(model, seed)
        backward(plain, seed)
        assert active(optimizer)[:2] == [True, True]
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
        assert_equal_models(model, plain)


def test_gradient_is_the_natural_gradient() -> None:
    (model, optimizer), (plain, _) = pair()
    backward(model, 1)
    backward(plain, 1)
    inverse = optimizer.preconditioner.curvature.estimates["0"].inverse
    inverse_a, inverse_b = (matrix[0] for matrix in inverse.factors)
    gradient = torch.cat([plain[0].weight.grad, plain[0].bias.grad[:, None]], 1)
    natural = inverse_b @ gradient @ inverse_a
    torch.testing.assert_close(model[0].weight.grad, natural[:, :-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[0].bias.grad, natural[:, -1], rtol=1e-10, atol=1e-12)


def test_curvature_is_that_of_plain_runs() -> None:
    (model, optimizer), (plain, other) = pair()
    for seed in (1, 2):
        for run, stepper in ((model, optimizer), (plain, other)):
            backward(run, seed)
            stepper.step()
            stepper.zero_grad()
    matrices = [one.preconditioner.curvature.matrix() for one in (optimizer, other)]
    for name, part in matrices[1].parts.items():
        for found, expected in zip(matrices[0].parts[name].factors, part.factors, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_accumulation_over_micro_batches() -> None:
    (model, optimizer), (plain, other) = pair()
    for run, stepper in ((model, optimizer), (plain, other)):
        for seed, size in ((1, BATCH), (2, 3), (3, 40)):
            # The last has more rows than units, but .grad holds natural gradients by now.
            backward(run, seed, size)
        stepper.step()
    assert_equal_models(model, plain)


def test_many_rows_stay_plain() -> None:
    (model, optimizer), (plain, _) = pair()
    backward(model, 1, 400)
    backward(plain, 1, 400)
    assert not any(active(optimizer))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_first_step_is_plain() -> None:
    model = make_model()
    optimizer = make_optimizer(natgrad.KFAC, model, fused=True, **OPTIONS)
    backward(model, 0)
    assert active(optimizer) == [False] * len(active(optimizer))


def test_three_dimensional_inputs_and_frozen_bias() -> None:
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 24)).double()
        model[2].bias.requires_grad_(False)
        optimizer = make_optimizer(
            natgrad.KFAC, model, fused=fused, **{**OPTIONS, "inverses": 1000}
        )
        for seed in range(3):
            optimizer.zero_grad()
            output = model(normal(2, 3, 8, seed=seed)).mean(1)
            functional.cross_entropy(output, torch.tensor([1, 2])).backward()
            optimizer.step()
        if fused:
            expected = copy.deepcopy(model)
    assert_equal_models(expected, model)


def test_estimated_slope_converges(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = 20_000
    monkeypatch.setattr(kronecker_gradients, "PROBES", probes)
    (model, optimizer), (plain, _) = pair()
    backward(model, 1)
    backward(plain, 1)
    for name, fused in optimizer.preconditioner.own_backward.items():
        if not fused.active:
            continue
        module = plain.get_submodule(name)
        mine = model.get_submodule(name)
        product = torch.cat([mine.weight.grad, mine.bias.grad[:, None]], 1).T @ torch.cat(
            [module.weight.grad, module.bias.grad[:, None]], 1
        )
        natural = {f"{name}.weight": mine.weight.grad, f"{name}.bias": mine.bias.grad}
        # The estimate's variance over random signs is at most 2‖ΔᵀG‖²_F per probe.
        error = (2 / probes) ** 0.5 * product.norm()
        assert abs(fused.inner_product(natural) - product.trace()) < 5 * error
        assert product.trace() > 5 * error  # The test can tell it from zero.


def test_kl_bound_is_kept_about() -> None:
    (model, optimizer), (plain, other) = pair(kl_clip=1e-4, lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for run, stepper in ((model, optimizer), (plain, other)):
        backward(run, 1)
        stepper.step()
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]
    ).norm()
    expected = torch.cat(
        [(p - q).flatten() for p, q in zip(plain.parameters(), before, strict=True)]
    ).norm()
    assert 0.7 < moved / expected < 1.4


@pytest.mark.parametrize("way", ["clipping", "scaler"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kl_bound_knows_what_was_done_to_the_gradient(way: str, bias: bool) -> None:
    """A step as long as the bound allows has its length whatever factor is on the gradient."""
    (model, optimizer), (twin, other) = (
        pair(kl_clip=1e-6, lr=1.0, momentum=0.0, bias=bias)[0] for _ in range(2)
    )
    for seed in range(1, 4):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for run, stepper in ((model, optimizer), (twin, other)):
            x, y = batch(seed)
            loss = functional.cross_entropy(run(x), y)
            if run is model and way == "scaler":
                scaler.scale(loss).backward()
                scaler.unscale_(stepper)
            else:
                loss.backward()
            if run is model and way == "clipping":
                assert nn.utils.clip_grad_norm_(run.parameters(), 0.1) > 0.2
            assert active(stepper)[:2] == [True, True]
            stepper.step()
            stepper.zero_grad()
        assert_equal_models(model, twin)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    (model, optimizer), _ = pair()
    before = copy.deepcopy(model.state_dict())
    x, y = batch(1)
    x[0, 0] = float("inf")
    functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="skipped a step"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_abandoned_backward_pass_leaves_nothing() -> None:
    (model, optimizer), (plain, _) = pair(kl_clip=1e-3)
    backward(model, 7)
    optimizer.zero_grad()
    assert active(optimizer) == [None] * len(active(optimizer))
    for run in (model, plain):
        backward(run, 1)
    fused = next(iter(optimizer.preconditioner.own_backward.values()))
    scores = torch.cat([plain[0].weight.grad, plain[0].bias.grad[:, None]], 1) @ fused._probes
    torch.testing.assert_close(fused._products, scores, rtol=1e-10, atol=1e-12)


def test_first_order_groups_keep_plain_gradients() -> None:
    model = make_model()
    optimizer = make_optimizer(
        natgrad.KFAC,
        model,
        fused=True,
        params=[{"modules": [model[0]], "preconditioned": False}],
        **OPTIONS,
    )
    plain = make_model()
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    plain.load_state_dict(model.state_dict())
    backward(model, 1)
    backward(plain, 1)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    assert "0" not in optimizer.preconditioner.own_backward


@pytest.mark.parametrize("seed", range(4))
def test_autocast_and_low_precision_products(seed) -> None:
    """One step: later ones are of units that are switched on in one of both runs alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48))
    plain, x = copy.deepcopy(model), normal(8, 32, seed=seed).float()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    steps = []
    for run, options in (
        (model, {"fused": True, "product_dtype": torch.bfloat16}),
        (plain, {}),
    ):
        optimizer = make_optimizer(natgrad.KFAC, run, **OPTIONS, **options)
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(run(x), torch.arange(8))
        loss.backward()
        optimizer.step()
        steps.append(nn.utils.parameters_to_vector(run.parameters()).detach() - start)
    # bfloat16 keeps 8 bits: relative errors of about 2⁻⁸ in every direction.
    assert (steps[0] - steps[1]).norm() < 0.015 * steps[1].norm()
    assert model[0].weight.dtype == torch.float32


def test_copies_go_on_alike() -> None:
    (model, optimizer), _ = pair()
    twin, stepper = copy.deepcopy((model, optimizer))
    for run, chosen in ((model, optimizer), (twin, stepper)):
        backward(run, 3)
        assert any(active(chosen))
        chosen.step()
    assert_equal_models(model, twin, 0.0)


def test_second_derivatives_are_refused() -> None:
    (model, _), _ = pair()
    x, y = batch(1)
    x.requires_grad_()
    loss = functional.cross_entropy(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


@pytest.mark.parametrize(
    ("structure", "options", "error"),
    [
        ("ekfac", {}, TypeError),
        ("diagonal", {}, TypeError),
        ("kfac", {"factored_damping": False}, ValueError),
    ],
)
def test_structures_without_factored_inverse_are_refused(structure, options, error) -> None:
    with pytest.raises(error, match="fused"):
        as_structure(structure, fused=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"length": "quadratic_model"},
        {"lr": 0.1, "momentum_on": "gradient"},
        {"weight_decay_mode": "model"},
        {"lr": 0.1, "graft": "adam"},
    ],
)
def test_options_that_need_the_plain_gradient_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="never forms the plain gradient"):
        make_optimizer(natgrad.KFAC, make_model(), fused=True, **options)


@pytest.mark.parametrize("method", ["fused", "coefficients"])
def test_hooks_go_with_the_optimizer(method: str) -> None:
    """Whoever exports the model afterwards finds it as it was."""
    model = make_model()
    if method == "fused":
        optimizer = make_optimizer(natgrad.KFAC, model, fused=True, **OPTIONS)
    else:
        optimizer = natgrad.FNGD(model, coefficient_steps=1)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert any(module._forward_hooks for module in model.modules())
    del optimizer
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.jit.script(model)
