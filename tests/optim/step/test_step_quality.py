"""How far optimizers go: every option against a dense computation of its own, in float64."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.optim.step.quadratic_model import QuadraticModel
from tests import dense, pairwise, processes
from tests.cases import CASES, normal
from tests.optim.test_optimizers import (
    AVERAGING,
    OPTIMIZERS,
    Reference,
    batches_of,
    compare,
    make,
    train,
)
from tests.state import check_resumes, flat, same

STRUCTURES = ["full", "block_diagonal", "diagonal", "kfac"]
MODEL_STEP: dict[str, Any] = {"length": "quadratic_model", "lr": 1.0}


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def move(model: nn.Module, step: Tensor) -> None:
    moved = flat(model.parameters()) + step
    torch.nn.utils.vector_to_parameters(moved, list(model.parameters()))


def closure_of(optimizer, model: nn.Module, x: Tensor, y: Tensor):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


# -- the quadratic model ---------------------------------------------------------------------------


@pairwise.parametrize(
    {"structure": STRUCTURES, "momentum": [0.0, 0.9], "kind": ["exact", "empirical"]}
)
def test_steps_minimise_the_dense_quadratic_model(structure, momentum, kind):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    intervals = {"factors": 3, "inverses": 3} if structure in AVERAGING else {}
    options = {"damping": 0.02, **MODEL_STEP, "lr": 0.8, "momentum": momentum, **intervals}
    optimizer = make(structure, model, fisher=kind, **options)
    reference = Reference(
        case, structure, kind, dense.categorical(), damping=0.02, **intervals
    )  # fmt: skip
    previous: Tensor | None = None
    for x, y in batches_of(case, "categorical", 4):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        gradient = gradient_of(reference.model, functional.cross_entropy(reference.model(x), y))
        fisher = dense.fisher(reference.model, x, y, dense.categorical(), kind)
        columns = [reference.natural_gradient(gradient, [(x, y)])]
        if previous is not None and momentum:
            columns.append(previous)
        v = torch.stack(columns, 1)
        damped = fisher + 0.02 * torch.eye(len(fisher), dtype=torch.float64)
        previous = -0.8 * v @ torch.linalg.solve(v.T @ damped @ v, v.T @ gradient)
        move(reference.model, previous)
        compare(case.model, model, reference)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac"])
def test_one_step_minimises_a_quadratic_loss(structure):
    """A linear network and squared error: the model is the loss, its minimum that of the loss."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = normal(10, 3), normal(10, 2, seed=1)
    optimizer = make(
        structure, model, nn.MSELoss(), fisher="exact", damping=1e-14, momentum=0.9, **MODEL_STEP
    )
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(10, 1, dtype=x.dtype)], 1), y).solution
    train(optimizer, [lambda: functional.mse_loss(model(x), y)])
    found = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).T
    dense.assert_same(found.detach(), solution, 1e-6)


@pairwise.parametrize(
    {
        "structure": list(OPTIMIZERS),
        "name": ["conv2d", "tokens", "layer_norm", "tied_embedding"],
        "kind": ["exact", "empirical"],
    }
)
def test_steps_are_stationary_on_other_models(structure, name, kind):
    """Whatever the structure, no longer or shorter step δ is better: ⟨g, δ⟩ + δᵀ(F + λI)δ = 0."""
    case = CASES[name]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher=kind, damping=0.1, momentum=0.9, **MODEL_STEP)
    y = case.target("categorical")
    loss = case.loss("categorical")
    for _ in range(2):
        before = copy.deepcopy(model)
        gradient = gradient_of(before, loss.total(before(case.x), y) / loss.count(case.z, y))

        def mean_loss() -> Tensor:
            return functional.cross_entropy(model(case.x).movedim(case.class_dim, 1), y)

        train(optimizer, [mean_loss])
        step = flat(model.parameters()) - flat(before.parameters())
        damped = dense.fisher(before, case.x, y, loss, kind) @ step + 0.1 * step
        assert float(step @ gradient) < 0
        assert float(step @ damped) == pytest.approx(-float(step @ gradient), rel=1e-8)


def test_momentum_of_the_model_solves_two_dimensional_subspaces():
    """With α and μ of the model a diagonal preconditioner is conjugate gradients."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    x, y = normal(9, 4), normal(9, 1, seed=1)
    optimizer = make(
        "diagonal", model, nn.MSELoss(), fisher="exact", damping=0.0, momentum=0.5, **MODEL_STEP
    )
    solution = torch.linalg.lstsq(x, y).solution.T
    errors = []
    for _ in range(4):
        train(optimizer, [lambda: functional.mse_loss(model(x), y)])
        errors.append(float((model.weight - solution).detach().norm()))
    assert errors[2] > 1e-4 and errors[3] < 1e-9


def test_the_model_has_the_rows_of_the_batch_however_it_comes():
    """Accumulated passes, explicit updates of the curvature and sampled labels."""
    case = CASES["mlp"]()
    x, y = normal(6, 3, seed=3), torch.tensor([0, 1, 2, 2, 1, 0])
    whole, parts, told = (copy.deepcopy(case.model) for _ in range(3))
    options = {"fisher": "exact", "momentum": 0.9, **MODEL_STEP}
    optimizers = [make("kfac", model, **options) for model in (whole, parts, told)]
    for _ in range(3):
        train(optimizers[0], [lambda: functional.cross_entropy(whole(x), y)])
        optimizers[1].zero_grad()
        for start, stop in ((0, 2), (2, 6)):
            loss = functional.cross_entropy(parts(x[start:stop]), y[start:stop])
            (loss * (stop - start) / 6).backward()
        optimizers[1].step()
        optimizers[2].zero_grad()
        optimizers[2].loss(functional.cross_entropy, told(x), y).backward()
        optimizers[2].step()
        dense.assert_same(flat(parts.parameters()), flat(whole.parameters()), 1e-8)
        dense.assert_same(flat(told.parameters()), flat(whole.parameters()), 1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_model_of_many_draws_is_the_exact_one(structure):
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    lengths = []
    for options in ({"fisher": "exact"}, {"fisher": natgrad.MonteCarloFisher(4000)}):
        model = copy.deepcopy(case.model)
        optimizer = make(structure, model, **options, **MODEL_STEP)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        lengths.append(float((flat(model.parameters()) - flat(case.model.parameters())).norm()))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)


@pytest.mark.parametrize("clip", ["kl_clip", "norm_clip"])
def test_clips_bound_the_whole_step_of_the_model(clip):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, fisher="exact", momentum=0.9, **MODEL_STEP, **{clip: 1e-3})
    for x, y in batches_of(case, "categorical"):
        before = copy.deepcopy(model)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        step = flat(model.parameters()) - flat(before.parameters())
        fisher = dense.fisher(before, x, y, dense.categorical())
        found = step @ fisher @ step if clip == "kl_clip" else step.norm()
        assert float(found) == pytest.approx(1e-3, rel=1e-9)


matrices = st.lists(st.floats(-3, 3), min_size=10, max_size=10)


@given(matrices, st.floats(-3, 3), st.floats(-3, 3))
def test_no_coefficients_beat_the_minimiser(numbers, first, second):
    root = torch.tensor(numbers[:8], dtype=torch.float64).reshape(4, 2)
    fisher = root.T @ root + 1e-3 * torch.eye(2, dtype=torch.float64)
    model = QuadraticModel(fisher.tolist(), [[0.1, 0.0], [0.0, 0.1]], numbers[8:])
    found = model.minimiser()
    if found is None:
        assert numbers[8:] == [0.0, 0.0] or max(map(abs, numbers[8:])) < 1e-100
        return
    assert model.value(found) < 0
    assert model.value(found) <= model.value([first, second]) + 1e-9


def test_parallel_directions_count_once():
    model = QuadraticModel([[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], [3.0, 6.0])
    assert model.minimiser() == [-3.0, 0.0]
    assert QuadraticModel([[0.0]], [[0.0]], [1.0]).minimiser() is None
    assert QuadraticModel([[1.0]], [[0.0]], [0.0]).minimiser() is None
    assert QuadraticModel([[1.0]], [[0.0]], [math.nan]).minimiser() is None


@pytest.mark.parametrize("empty", [False, True])
def test_a_step_without_decrease_is_skipped(empty):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **MODEL_STEP)
    before = copy.deepcopy(optimizer.state_dict())
    loss = functional.cross_entropy(model(case.x), case.target("categorical"))
    (loss * 0.0 if empty else loss).backward()
    for parameter in model.parameters():
        parameter.grad.zero_()
    with pytest.warns(UserWarning, match="no sample" if empty else "no decrease"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))
    assert same(optimizer.state_dict(), before)


# -- Levenberg and Marquardt -----------------------------------------------------------------------


@pairwise.parametrize(
    {"structure": ["full", "kfac"], "interval": [1, 2], "decay_mode": ["decoupled", "model"]}
)
def test_damping_follows_the_reduction_ratio(structure, interval, decay_mode):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    rule = natgrad.LevenbergMarquardt(0.02, interval=interval, decay=0.7, minimum=0.015)
    decay = {"weight_decay": 0.1, "weight_decay_mode": decay_mode}
    lr = 0.9 if decay_mode == "decoupled" else 1.5
    optimizer = make(structure, model, fisher="exact", damping=rule, lr=lr, momentum=0.5, **decay)
    reference = Reference(case, structure, "exact", dense.categorical())
    twin, damping, buffer, ratios = reference.model, 0.02, 0.0, []
    batches = batches_of(case, "categorical", 6)
    batches = [*batches, *[(6.0 * x, y) for x, y in batches]]
    in_model = 0.1 if decay_mode == "model" else 0.0

    def objective(x: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in twin.parameters())
        return functional.cross_entropy(twin(x), y) + 0.5 * in_model * penalty

    for step, (x, y) in enumerate(batches):
        optimizer.step(closure_of(optimizer, model, x, y))
        loss = objective(x, y)
        gradient = gradient_of(twin, loss)
        fisher = dense.fisher(twin, x, y, dense.categorical())
        reference.damping = damping + in_model
        natural = reference.natural_gradient(gradient, [(x, y)])
        buffer = 0.5 * buffer + natural
        change = -lr * buffer
        if decay_mode == "decoupled":
            change = change - lr * 0.1 * flat(twin.parameters())
        move(twin, change)
        compare(case.model, model, reference)
        if (step + 1) % interval == 0:
            curvature = fisher + (damping + in_model) * torch.eye(len(fisher), dtype=x.dtype)
            predicted = 0.5 * change @ curvature @ change + gradient @ change
            ratio = (objective(x, y) - loss).detach() / predicted
            ratios.append(float(ratio) if predicted < 0 else -math.inf)
            factor = 0.7**interval
            damping *= factor if ratios[-1] > 0.75 else 1 / factor if ratios[-1] < 0.25 else 1.0
            damping = max(damping, 0.015)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-9)
    assert max(ratios) > 0.75 and min(ratios) < 0.25


def test_a_quadratic_loss_without_damping_has_ratio_one():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = normal(10, 3), normal(10, 2, seed=1)
    rule = natgrad.LevenbergMarquardt(1e-3, interval=1, decay=0.5)
    optimizer = make("full", model, nn.MSELoss(), damping=rule, lr=0.5)
    for step in range(4):
        assert optimizer.param_groups[0]["damping"] == 1e-3 * 0.5**step

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def test_adaptation_scales_all_groups_and_leaves_no_trace():
    """Dropout sees the same masks twice; buffers, gradients and the random state stay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.3)
    ).double()
    x, y = normal(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    rule = natgrad.LevenbergMarquardt(0.1, interval=1)
    optimizer = make(
        "kfac", model, damping=rule, lr=1e-6, params=[{"params": "3.*", "damping": 0.2}]
    )
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    optimizer.step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    functional.cross_entropy(twin(x), y).backward()
    assert torch.equal(after, torch.get_rng_state())
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[1] < losses[0]
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        dense.assert_same(mine.grad, other.grad, 1e-12)
    dampings = [group["damping"] for group in optimizer.param_groups]
    assert sorted(dampings) == pytest.approx([0.095, 0.19])
    assert (
        optimizer.preconditioner.observer.steps == 1 and not optimizer.preconditioner.capture.passes
    )


@given(
    st.floats(1e-6, 1e2), st.floats(-10, 10), st.floats(-10, 10), st.floats(0.1, 0.99),
    st.integers(1, 20),
)  # fmt: skip
def test_adapted_damping_stays_in_range(damping, actual, predicted, decay, interval):
    rule = natgrad.LevenbergMarquardt(1.0, interval, decay, minimum=1e-6, maximum=1e2)
    found = rule.adapted(damping, actual, predicted)
    assert 1e-6 <= found <= 1e2
    if predicted < 0 and actual > 0:
        assert found >= damping
    if predicted < 0 and actual < 0.76 * predicted:
        assert found <= damping
    assert rule.adapted(damping, math.nan, -1.0) >= damping


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bad_steps_are_rejected(structure, interval):
    """Rejected steps leave parameters and momentum as they were; others are not touched."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    rule = natgrad.LevenbergMarquardt(0.02, interval=interval, decay=0.7, reject=True)
    optimizer = make(structure, model, fisher="exact", damping=rule, lr=1.5, momentum=0.5)
    reference = Reference(case, structure, "exact", dense.categorical())
    twin, damping, buffer, rejected = reference.model, 0.02, torch.zeros(()), []
    for step, (x, y) in enumerate(batches_of(case, "categorical", 10)):
        optimizer.step(closure_of(optimizer, model, x, y))
        loss = functional.cross_entropy(twin(x), y)
        gradient, fisher = gradient_of(twin, loss), dense.fisher(twin, x, y, dense.categorical())
        reference.damping = damping
        old, theta = buffer, flat(twin.parameters())
        buffer = 0.5 * buffer + reference.natural_gradient(gradient, [(x, y)])
        change = -1.5 * buffer
        move(twin, change)
        if (step + 1) % interval == 0:
            curvature = fisher + damping * torch.eye(len(fisher), dtype=x.dtype)
            predicted = 0.5 * change @ curvature @ change + gradient @ change
            actual = (functional.cross_entropy(twin(x), y) - loss).detach()
            ratio = float(actual / predicted) if predicted < 0 else -math.inf
            rejected.append(bool(predicted < 0 and actual >= 0))
            if rejected[-1]:
                buffer = old
                torch.nn.utils.vector_to_parameters(theta, list(twin.parameters()))
            factor = 0.7**interval
            damping *= factor if ratio > 0.75 else 1 / factor if ratio < 0.25 else 1.0
        compare(case.model, model, reference)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-9)
    assert interval == 2 or 0 < sum(rejected) < 10


@pytest.mark.parametrize("bad", [1e3, math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("name", ["plain", "model", "gradient", "adam", "decay"])
def test_a_rejected_step_changes_only_the_damping(name, bad):
    """The fallback's parameters step as usual; ``None`` stands for a step that is accepted."""
    options: dict[str, Any] = {
        "plain": {"momentum": 0.9, "nesterov": True},
        "model": {**MODEL_STEP, "momentum": 0.9},
        "gradient": {"momentum": 0.9, "momentum_on": "gradient"},
        "adam": {"graft": "adam", "lr": 1e-3},
        "decay": {"weight_decay": 0.1, "momentum": 0.9},
    }[name]
    case = CASES["mlp"]()
    rule = natgrad.LevenbergMarquardt(0.2, interval=1, decay=0.5, reject=True)
    model = copy.deepcopy(case.model)
    groups = [{"params": "0.*", "preconditioned": False}]
    optimizer = make("kfac", model, **({"lr": 0.01, "damping": rule, "params": groups} | options))
    data = batches_of(case, "categorical", 5)
    for step, (x, y) in enumerate([data[0], data[0], data[1]]):
        optimizer.step(closure_of(optimizer, model, x, y))
        if step == 1:
            optimizer.param_groups[0]["damping"] = 0.2
            before = copy.deepcopy((model, optimizer))
            losses: list[Tensor] = []
            plain = closure_of(optimizer, model, *data[2])

            def closure() -> Any:
                losses.append(plain())  # noqa: B023
                shift = 0.0 if len(losses) == 1 or bad is None else bad  # noqa: B023
                return losses[-1] + shift  # noqa: B023

            optimizer.step(closure)
            assert len(losses) == 2
            twin, other = before
            moved = not torch.equal(flat(model[2:].parameters()), flat(twin[2:].parameters()))
            assert moved == (bad is None)
            assert not torch.equal(flat(model[0].parameters()), flat(twin[0].parameters()))
            if bad is not None:
                assert optimizer.param_groups[0]["damping"] == 0.4
                for mine, its in zip(model[2:].parameters(), twin[2:].parameters(), strict=True):
                    assert same(optimizer.state[mine], other.state[its])


def test_steps_that_were_not_promised_are_kept():
    """Where the model itself predicts a rise, as with momentum, a rise is no reason to go back."""
    rule = natgrad.LevenbergMarquardt(reject=True)
    assert rule.rejects(0.1, -0.1) and rule.rejects(0.0, -0.1) and not rule.rejects(-0.1, -0.1)
    assert not rule.rejects(0.1, 0.1) and not rule.rejects(0.1, 0.0)
    assert rule.rejects(math.nan, 0.1) and rule.rejects(-math.inf, -0.1)
    assert not natgrad.LevenbergMarquardt().rejects(math.nan, -0.1)


# -- clips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_norm_clip_bounds_all_parameters_together(structure):
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    groups = [{"params": "0.*", "lr": 0.05}]
    steps = []
    for clip in (None, 1e-3, 1e3):
        model = copy.deepcopy(case.model)
        optimizer = make(structure, model, params=groups, norm_clip=clip, fisher="exact")
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        steps.append(flat(model.parameters()) - flat(case.model.parameters()))
    free, clipped, wide = steps
    assert torch.equal(free, wide) and free.norm() > 1e-3
    dense.assert_same(clipped, free * (1e-3 / free.norm()), 1e-9)


def test_the_norm_is_clipped_after_the_divergence():
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    lengths = {}
    for clips in ((1e-4, None), (None, 1e-2), (1e-4, 1e-2), (1e-4, 1e-5)):
        model = copy.deepcopy(case.model)
        optimizer = make("full", model, kl_clip=clips[0], norm_clip=clips[1], fisher="exact")
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        lengths[clips] = float((flat(model.parameters()) - flat(case.model.parameters())).norm())
    first, second = lengths[(1e-4, None)], lengths[(None, 1e-2)]
    assert lengths[(1e-4, 1e-2)] == pytest.approx(min(first, second), rel=1e-9)
    assert lengths[(1e-4, 1e-5)] == pytest.approx(1e-5, rel=1e-9)


# -- momentum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nesterov_is_that_of_sgd_on_natural_gradients(structure):
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = make(structure, model, momentum=0.8, nesterov=True, lr=0.1, fisher="exact")
    preconditioner = natgrad.Preconditioner(twin, structure=structure, fisher="exact", damping=0.05)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.8, nesterov=True)
    for x, y in batches_of(case, "categorical", 5):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        sgd.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        preconditioner.step()
        sgd.step()
        dense.assert_same(flat(model.parameters()), flat(twin.parameters()), 1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_momentum_before_preconditioning(structure, nesterov):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(
        structure, model, fisher="exact", momentum=0.7, momentum_on="gradient", nesterov=nesterov
    )
    reference = Reference(case, structure, "exact", dense.categorical())
    buffer: Tensor | float = 0.0
    for x, y in batches_of(case, "categorical", 4):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        gradient = gradient_of(reference.model, functional.cross_entropy(reference.model(x), y))
        buffer = 0.7 * buffer + gradient
        looked_at = gradient + 0.7 * buffer if nesterov else buffer
        move(reference.model, -0.3 * reference.natural_gradient(looked_at, [(x, y)]))
        compare(case.model, model, reference)


# -- weight decay ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, MODEL_STEP | {"momentum": 0.9}])
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_weight_decay_in_the_model_is_a_penalty_and_damping(structure, options):
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    options = {"fisher": "exact", **options}
    decayed = make(structure, model, weight_decay=0.1, weight_decay_mode="model", **options)
    penalised = make(structure, twin, damping=0.05 + 0.1, **options)

    def penalty() -> Tensor:
        return 0.05 * sum(p.square().sum() for p in twin.parameters())

    for x, y in batches_of(case, "categorical"):
        train(decayed, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        train(penalised, [lambda: functional.cross_entropy(twin(x), y) + penalty()])  # noqa: B023
        moved = flat(twin.parameters()) - flat(case.model.parameters())
        dense.assert_same(flat(model.parameters()) - flat(case.model.parameters()), moved, 1e-7)


def test_weight_decay_by_group():
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    decayed = make(
        "block_diagonal", models[0], weight_decay_mode="model",
        params=[{"params": "0.*", "weight_decay": 0.2}],
    )  # fmt: skip
    penalised = make("block_diagonal", models[1], params=[{"params": "0.*", "damping": 0.25}])
    train(decayed, [lambda: functional.cross_entropy(models[0](x), y)])
    penalty = [0.1 * p.square().sum() for p in models[1][0].parameters()]
    train(penalised, [lambda: functional.cross_entropy(models[1](x), y) + sum(penalty)])
    dense.assert_same(flat(models[0].parameters()), flat(models[1].parameters()), 1e-9)


# -- grafting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("graft", ["sgd", "adam"])
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_grafted_steps_have_the_other_length(structure, graft):
    """Tensor by tensor: the direction of the natural gradient, the length of SGD or Adam."""
    case = CASES["mlp"]()
    model, other, plain = (copy.deepcopy(case.model) for _ in range(3))
    optimizer = make(structure, model, graft=graft, lr=0.1, fisher="exact")
    makers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    lengths = makers[graft](other.parameters(), lr=0.1)
    natural = make(structure, plain, lr=0.1, fisher="exact")
    for x, y in batches_of(case, "categorical", 4):
        before = [p.detach().clone() for p in model.parameters()]
        for twin in (other, plain):
            twin.load_state_dict(model.state_dict())
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        train(lengths, [lambda: functional.cross_entropy(other(x), y)])  # noqa: B023
        train(natural, [lambda: functional.cross_entropy(plain(x), y)])  # noqa: B023
        parameters = zip(
            before, model.parameters(), other.parameters(), plain.parameters(), strict=True
        )
        for start, mine, theirs, free in parameters:
            direction, length = free - start, (theirs - start).norm()
            expected = direction * length / direction.norm()
            dense.assert_same((mine - start).detach(), expected.detach(), 1e-7)


def test_kl_clip_measures_the_grafted_step():
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    model = copy.deepcopy(case.model)
    optimizer = make("full", model, graft="sgd", kl_clip=1e-5, fisher="exact")
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
    step = flat(model.parameters()) - flat(case.model.parameters())
    fisher = dense.fisher(case.model, x, y, dense.categorical())
    assert float(step @ fisher @ step) == pytest.approx(1e-5, rel=1e-9)


def test_grafting_keeps_zero_directions():
    case = CASES["mlp"]()
    model, y = copy.deepcopy(case.model), case.target("categorical")
    optimizer = make("kfac", model, graft="adam")
    train(optimizer, [lambda: 0.0 * functional.cross_entropy(model(case.x), y)])
    assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))


# -- warm-up and averages --------------------------------------------------------------------------


@pytest.mark.parametrize("structure", AVERAGING)
def test_warm_up_fills_the_averages_and_moves_nothing(structure):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    intervals = {"factors": 2, "inverses": 4, "decay": 0.8}
    optimizer = make(structure, model, fisher="exact", warmup=3, momentum=0.9, **intervals)
    batches = batches_of(case, "categorical", 9)
    reference = Reference(
        case, structure, "exact", dense.categorical(), momentum=0.9, **intervals
    )  # fmt: skip
    for x, y in batches[:3]:
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))
        for item in reference.history:
            item[0] *= 0.8
        reference.history.append([float(len(x)), reference._contribution(x, y)])
    for x, y in batches[3:]:
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


def test_the_fallback_trains_during_the_warm_up():
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = make(
        "kfac", model, warmup=2, decay=0.9, fallback=natgrad.Fallback("adamw", 0.01),
        params=[{"params": "0.*", "preconditioned": False}],
    )  # fmt: skip
    adamw = torch.optim.AdamW(twin[0].parameters(), lr=0.01)
    for x, y in batches_of(case, "categorical", 2):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        adamw.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        adamw.step()
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    with pytest.warns(UserWarning, match="skipped"):
        train(optimizer, [lambda: functional.cross_entropy(model(case.x * math.nan), y)])


@pytest.mark.parametrize("structure", ["unit_wise", "diagonal"])
def test_moving_averages_are_bias_corrected(structure):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher="exact", decay=0.9, lr=0.0)
    total, weight = 0.0, 0.0
    for x, y in batches_of(case, "categorical", 4):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        fisher = dense.fisher(model, x, y, dense.categorical())
        block = dense.structured(fisher, structure, model, case.blocks)
        total, weight = 0.9 * total + block, 0.9 * weight + 1.0
        dense.assert_same(
            optimizer.preconditioner.curvature.matrix().to_dense(), total / weight, 1e-9
        )


# -- state -----------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "model": {**MODEL_STEP, "momentum": 0.9, "damping": natgrad.LevenbergMarquardt(0.1, 2)},
    "damping": {"damping": natgrad.LevenbergMarquardt(0.1, 3), "momentum": 0.5, "norm_clip": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "graft": "adam", "kl_clip": 1e-3},
    "gradient": {
        "momentum": 0.9, "momentum_on": "gradient", "weight_decay": 0.1,
        "weight_decay_mode": "model",
    },
    "search": {
        "length": natgrad.LineSearch("best"), "momentum": 0.9, "weight_decay": 0.1,
        "damping": natgrad.LevenbergMarquardt(0.1, 2),
    },
    "reject": {
        "damping": natgrad.LevenbergMarquardt(0.1, 1, reject=True), "momentum": 0.9, "lr": 2.0,
    },
    "warm-up": {"warmup": 3, "momentum": 0.9, "decay": 0.9},
}  # fmt: skip


def configured(structure: str, model: nn.Module, name: str, **options: Any):
    averages = {"factors": 2, "inverses": 3, "decay": 0.9}
    chosen = CONFIGURATIONS[name] | options
    return make(structure, model, **((averages if structure in AVERAGING else {}) | chosen))


@pytest.mark.parametrize(
    ("structure", "name", "kind"),
    [
        ("kfac" if name == "warm-up" else structure, name, kind)
        for structure, name, kind in pairwise.pairwise(
            ["full", "kfac"], CONFIGURATIONS, ["exact", "mc", "empirical"]
        )
    ],
)
def test_checkpoints_resume_exactly(structure, kind, name):
    case = CASES["mlp"]()
    data = batches_of(case, "categorical", 7)

    def fresh(seed: int) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(case.model)
        return model, configured(structure, model, name, fisher=kind, seed=seed)

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        optimizer.step(closure_of(optimizer, model, *data[number]))

    check_resumes(fresh, step, 7, (0, 3) if kind == "exact" else (2, 4))


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_a_bad_step_changes_nothing(kind, name):
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer, undisturbed = (configured("kfac", m, name, fisher=kind) for m in (model, twin))
    for step, (x, y) in enumerate(batches_of(case, "categorical", 8)):
        if step in (1, 5):
            before, parameters = copy.deepcopy(optimizer.state_dict()), flat(model.parameters())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(closure_of(optimizer, model, x * math.nan, y))
            assert torch.equal(flat(model.parameters()), parameters)
            assert same(optimizer.state_dict(), before)
        optimizer.step(closure_of(optimizer, model, x, y))
        undisturbed.step(closure_of(undisturbed, twin, x, y))
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_low_precision_and_missing_gradients(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.bfloat16)
    x, y = torch.randn(32, 4, dtype=torch.bfloat16), torch.randint(0, 3, (32,))
    optimizer = configured("kfac", model, name)
    first = functional.cross_entropy(model(x), y).item()
    for step in range(15):
        model[0].requires_grad_(step != 10)
        before = flat(model[0].parameters())
        optimizer.step(closure_of(optimizer, model, x, y))
        assert step != 10 or torch.equal(flat(model[0].parameters()), before)
    assert functional.cross_entropy(model(x), y).item() < first


def replica(rank: int) -> dict[str, Any]:
    """Train with every configuration on batches of one's own."""
    result = {}
    for name in CONFIGURATIONS:
        case = CASES["mlp"]()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
        optimizer = configured("kfac", model, name)
        for x, y in batches_of(case, "categorical", 8)[rank::2]:
            optimizer.step(closure_of(optimizer, model, x, y))
        result[name] = flat(model.parameters()), optimizer.param_groups[0]["damping"]
    return result


@pytest.mark.slow
def test_replicas_stay_equal():
    first, second = processes.run(replica)
    start = flat(CASES["mlp"]().model.parameters())
    for name in CONFIGURATIONS:
        assert torch.equal(first[name][0], second[name][0]) and first[name][1] == second[name][1]
        assert first[name][0].isfinite().all() and not torch.equal(first[name][0], start)


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_clear():
    model = copy.deepcopy(CASES["mlp"]().model)
    rule = natgrad.LevenbergMarquardt
    for options, words in (
        ({"norm_clip": -1.0}, "norm_clip"),
        ({"length": "model"}, "quadratic_model"),
        ({"momentum_on": "loss"}, "gradient"),
        ({"weight_decay_mode": "l2"}, "decoupled"),
        ({"graft": "adamw"}, "adam"),
        ({"graft": "adam", "graft_betas": (0.9, 1.0)}, r"graft_betas\[1\]"),
        ({**MODEL_STEP, "momentum_on": "gradient"}, "momentum_on"),
        ({**MODEL_STEP, "lr": "isotropic"}, "isotropic"),
        ({"graft": "sgd", "lr": "isotropic"}, "isotropic"),
        ({"warmup": 3}, "decay > 0"),
        ({"warmup": -1, "decay": 0.9}, "warmup"),
        ({"params": [{"params": "0.*", "damping": rule()}]}, "all groups"),
    ):
        with pytest.raises(ValueError, match=words):
            make("kfac", model, **options)
    for values, words in (
        ({"initial": 0.0}, "initial"),
        ({"initial": 1.0, "minimum": 2.0}, "minimum"),
        ({"initial": math.inf}, "maximum"),
        ({"interval": 0}, "interval"),
        ({"decay": 1.0}, "decay"),
    ):
        with pytest.raises(ValueError, match=words):
            rule(**values)
    with pytest.raises(ValueError, match="closure"):
        train(make("kfac", model, damping=rule()), [lambda: model(normal(4, 3)).square().mean()])


def test_the_quadratic_model_needs_to_see_the_output():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **MODEL_STEP)

    def partial() -> Tensor:  # the parts are called, not the model
        h = case.x
        for layer in model:
            h = layer(h)
        return functional.cross_entropy(h, torch.arange(4) % 3)

    with pytest.warns(UserWarning), pytest.raises(ValueError, match="call the model itself"):
        train(optimizer, [partial])
