"""Measurements of the claims of natgrad's relatives: at a size that takes no time."""

from __future__ import annotations

import importlib
import math
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad.experiments.claims import immer, korbit, koroko, li_chen_huang, lin, wu
from natgrad.experiments.claims.claim import Claim, Setting
from natgrad.experiments.claims.side_by_side import Run, Task, mlp
from natgrad.fisher import ImprovedFisher

#: Module → its sizes here.
TINY: dict[str, dict[str, Any]] = {
    "karakida_akaho_amari": {
        "DRAWS": 2, "WIDTHS": (8, 16, 32), "SAMPLES": 5, "COUNTS": (3, 6), "DEPTHS": (2, 3),
        "STEPS": 3,
    },
    "wu": {
        "DRAWS": 2, "BATCHES": 1, "BATCH_SIZE": 8, "EPOCHS": (1,), "DAMPINGS": (1e-6, 1.0),
        "STEPS": 2, "HIDDEN": (4,),
    },
    "donatella": {
        "DRAWS": 2, "BATCH_SIZE": 5, "HIDDEN": 2, "STEPS": 1, "CONDITION": 3.0,
        "TIMES": (0.0, 3.0, 300.0),
    },
    "immer": {
        "DRAWS": 2, "SAMPLES": 20, "EPOCHS": 5, "WEIGHT_SAMPLES": 2, "PRECISIONS": (1.0, 10.0),
    },
    "koroko": {
        "DRAWS": 2, "HIDDEN": (2,), "SAMPLES": 4, "STAGES": (0, 2), "STEPS": 4, "BATCH_SIZE": 5,
        "MEASUREMENTS": 2, "DAMPINGS": (1e-1,),
    },
    "korbit": {
        "DRAWS": 2, "HIDDEN": (2,), "BATCH_SIZE": 60, "STEPS": 4, "EVERY": 2, "DAMPINGS": (1.0,),
    },
    "lin": {
        "DRAWS": 2, "HIDDEN": (3,), "BATCH_SIZE": 8, "STEPS": 3, "DAMPINGS": (1.0,), "WIDE": (64,),
    },
    "li_chen_huang": {"DRAWS": 2, "HIDDEN": (3,), "POINTS": 8, "EVALUATIONS": 10},
    "chen": {"DRAWS": 2, "WIDTH": 2, "STEPS": 2, "BATCH_SIZE": 4},
}  # fmt: skip

MEASURED = [
    pytest.param(module, claim, id=claim.name)
    for module in TINY
    for claim in importlib.import_module(f"natgrad.experiments.claims.{module}").SOURCE.claims
]


@pytest.mark.parametrize(("module", "claim"), MEASURED)
def test_a_measurement_finds_every_figure_of_its_rule(
    module: str, claim: Claim, monkeypatch: pytest.MonkeyPatch
):
    for name, size in TINY[module].items():
        monkeypatch.setattr(f"natgrad.experiments.claims.{module}.{name}", size)
    shares: list[float] = []
    figures = claim.measure(Setting(progress=shares.append))
    judged = {claim.expectation(name) for name in figures}
    assert judged - {None} == set(claim.expects)
    for name, draws in figures.items():
        if claim.expectation(name) is not None:
            values = draws if isinstance(draws, list) else [draws]
            assert not any(math.isnan(value) for value in values), name
    assert shares == sorted(shares) and shares[-1] == 1.0


# Training side by side.


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    x = torch.randn(10, 3, dtype=torch.float64)
    return Task(x, x @ torch.ones(3, 1, dtype=torch.float64), functional.mse_loss, 4)


def test_batches_are_epochs_in_random_order_and_the_same_for_a_seed(task: Task):
    first = list(islice(task.batches(1), 4))
    assert [len(x) for x, _ in first] == [4] * 4
    one_epoch = torch.cat([x for x, _ in first[:2]])
    assert len(torch.unique(one_epoch, dim=0)) == 8
    for (x, y), (again, _) in zip(first, task.batches(1), strict=False):
        assert torch.equal(x, again) and torch.allclose(y, x.sum(1, keepdim=True))
    large = Task(task.x, task.y, task.loss, 100)
    assert torch.equal(next(large.batches(1))[0], task.x)


def test_training_takes_the_steps_of_the_optimizer_and_leaves_the_network(task: Task):
    model = mlp((3, 1), 0, dtype=torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    run = task.train(model, lambda m: torch.optim.SGD(m.parameters(), 0.1), 3, every=1, seed=1)
    copy = mlp((3, 1), 0, dtype=torch.float64)
    losses = [task.value(copy)]
    for x, y in islice(task.batches(1), 3):
        gradients = torch.autograd.grad(task.loss(copy(x), y), list(copy.parameters()))
        with torch.no_grad():
            for p, gradient in zip(copy.parameters(), gradients, strict=True):
                p -= 0.1 * gradient
        losses.append(task.value(copy))
    assert run.losses == pytest.approx(losses, rel=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert run.seconds == sorted(run.seconds) and run.seconds[0] == 0.0


def test_a_diverging_run_ends_at_infinity_and_the_best_rate_is_another(task: Task):
    model = mlp((3, 1), 0, dtype=torch.float64)

    def make(m: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr)

    run = task.train(model, lambda m: make(m, 1e200), 6, every=1)
    assert len(run.losses) == 7 and run.losses[-1] == math.inf
    methods = {"SGD": (make, (1e200, 0.1, 1e-6))}
    tuned = task.compare(methods, lambda seed: mlp((3, 1), seed, dtype=torch.float64), 2, 6)["SGD"]
    assert tuned.rate == 0.1
    again = task.train(mlp((3, 1), 1, dtype=torch.float64), lambda m: make(m, 0.1), 6, seed=1)
    assert tuned.ends[1] == again.losses[-1] != tuned.ends[0]


def test_the_first_measurement_that_reaches_a_loss_is_found():
    run = Run([3.0, 2.0, 1.0, 2.0], [0.0, 0.5, 1.0, 1.5], 10, nn.Identity())
    assert run.reaching(2.0) == (10.0, 0.5)
    assert run.reaching(0.5) == (math.inf, math.inf)


def test_rates_fall_linearly_where_asked(task: Task):
    model, rates = mlp((3, 1), 0, dtype=torch.float64), []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    falling = Task(task.x, task.y, task.loss, decays=True)
    falling.train(model, lambda m: Watched(m.parameters(), 1.0), 4)
    assert rates == pytest.approx([1 - 0.99 * k / 4 for k in range(4)], rel=1e-12)


# Definitions.


def test_the_quality_of_an_update_is_that_of_its_definition():
    torch.manual_seed(0)
    model, x = mlp((3, 4, 3), 0, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1, 0])
    parameters = list(model.parameters())
    losses = functional.cross_entropy(model(x), y, reduction="none")
    rows = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(one, parameters, retain_graph=True)])
        for one in losses
    ])  # fmt: skip
    errors = model(x).softmax(1).detach() - functional.one_hot(y, 3)
    squares, gram = errors.square().sum(1), rows @ rows.T
    exact = natgrad.fisher_matrix(model, (x, y), "categorical", "full").to_dense()

    def gamma(update: torch.Tensor) -> float:
        return float((update @ exact @ update).sqrt() / (update @ rows.mean(0)).abs())

    # λ is on the mean of ggᵀ, that is Nλ on the Gram matrix: a share of its mean eigenvalue.
    share = 0.1
    damped = gram + share * gram.trace() / 5 * torch.eye(5, dtype=torch.float64)
    for fisher, weights in ((ImprovedFisher("gram"), squares), ("empirical", torch.ones(5))):
        update = rows.T @ torch.linalg.solve(damped, weights.double())
        found = wu.quality(model, x, y, fisher, share)
        assert found == pytest.approx(gamma(update) / gamma(rows.mean(0)), rel=1e-9)


def test_sampled_weights_predict_by_the_mean_of_the_networks_they_make():
    torch.manual_seed(0)
    model, x = mlp((3, 4, 3), 0, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    posterior = natgrad.Laplace(model, (x, torch.arange(8) % 3), "categorical", "kfac")
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    found = immer.sampled_predictive(posterior, x, 3, 7)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    draws = posterior.sample(3, torch.Generator().manual_seed(7))
    copy = mlp((3, 4, 3), 1, dtype=torch.float64)
    expected = []
    for one in draws:
        nn.utils.vector_to_parameters(one, copy.parameters())
        expected.append(copy(x).softmax(1).detach())
    torch.testing.assert_close(found, sum(expected) / 3, rtol=1e-9, atol=1e-12)


def test_block_errors_are_those_of_dense_blocks():
    torch.manual_seed(0)
    model, x = mlp((3, 4, 2), 0, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    exact = natgrad.fisher_matrix(model, (x, None), "gaussian", "full").to_dense()
    found = natgrad.fisher_matrix(model, (x, None), "gaussian", "diagonal").to_dense()
    first = 4 * 3 + 4
    layers = torch.zeros_like(exact)
    layers[:first, :first], layers[first:, first:] = exact[:first, :first], exact[first:, first:]
    expected = float((found - layers).norm() / layers.norm())
    assert koroko.block_error(model, x, "diagonal") == pytest.approx(expected, rel=1e-9)
    assert koroko.block_error(model, x, "block_diagonal") == pytest.approx(0.0, abs=1e-12)


def test_runs_are_compared_at_the_lowest_loss_that_both_reach():
    fast = Run([4.0, 2.0, 1.0], [0.0, 1.0, 2.0], 5, nn.Identity())
    slow = Run([4.0, 3.0, 2.0], [0.0, 3.0, 6.0], 5, nn.Identity())
    assert korbit.to_the_same_loss(fast, slow) == (0.5, 1 / 6)
    assert korbit.to_the_same_loss(slow, fast) == (2.0, 6.0)
    stuck = Run([4.0, 5.0, 6.0], [0.0, 1.0, 2.0], 5, nn.Identity())
    assert all(math.isnan(ratio) for ratio in korbit.to_the_same_loss(fast, stuck))


def test_the_average_that_the_recursion_follows_is_that_of_its_definition():
    torch.manual_seed(0)
    model, x = mlp((3, 2), 0, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1])
    errors = model(x).softmax(1).detach() - functional.one_hot(y, 2)
    inputs = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], 1)
    a, b = inputs.T @ inputs / 5, errors.T @ errors / 5
    eye = [torch.eye(len(factor), dtype=torch.float64) for factor in (a, b)]
    a, b = (0.7 * i + 0.3 * (f + lin.DAMPING * i) for f, i in zip((a, b), eye, strict=True))
    natural = torch.linalg.inv(b) @ (errors.T @ inputs / 5) @ torch.linalg.inv(a)
    expected = torch.cat([natural[:, :-1].flatten(), natural[:, -1]])
    torch.testing.assert_close(
        lin.inverse_of_average(model, x, y, 0.3), expected, rtol=1e-9, atol=1e-12
    )


def test_rounded_factors_hold_nothing_that_bfloat16_cannot():
    model, x = mlp((3, 4, 2), 0), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    optimizer = natgrad.KFAC(model, "categorical", structure=lin.RoundedFactors())
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    tensors = [
        t
        for estimate in optimizer.preconditioner.curvature.estimates.values()
        for t in (estimate.average.inputs, estimate.average.outputs)
    ]
    assert len(tensors) == 4
    for tensor in tensors:
        assert torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))


def test_the_numbers_that_an_optimizer_keeps_are_counted():
    model, x, y = mlp((3, 4, 2), 0), torch.zeros(2, 3), torch.tensor([0, 1])
    count = sum(p.numel() for p in model.parameters())
    found = lin.state_entries(model, lambda m: torch.optim.AdamW(m.parameters()), x, y)
    assert found == 2 * count
    plain = lin.state_entries(model, lambda m: torch.optim.SGD(m.parameters(), 0.1), x, y)
    assert plain == 0


def test_the_stiff_equation_has_the_solution_it_says():
    problem = li_chen_huang.StiffPoisson(20, 3)
    x = problem.x.requires_grad_()
    (slope,) = torch.autograd.grad(problem.solution(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(-curvature, problem.source(x).detach(), rtol=1e-9, atol=1e-9)

    class Solution(nn.Module):
        def forward(self, x):
            return problem.solution(x) / (x * (1 - x)).clamp(min=1e-30)

    assert problem.loss(Solution()).item() < 1e-18
    assert problem.error(Solution()) == pytest.approx(0.0, abs=1e-9)
    zero = nn.Linear(1, 1, dtype=torch.float64)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    assert problem.loss(zero).item() == pytest.approx(1.0) == problem.error(zero)


def test_the_largest_curvature_is_that_of_the_dense_hessian():
    problem, model = li_chen_huang.StiffPoisson(6, 1), mlp((1, 3, 1), 0, dtype=torch.float64)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        values = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return problem.loss(lambda x: torch.func.functional_call(model, values, (x,)))

    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start)).abs()
    found = li_chen_huang.largest_curvature(problem, model, 300)
    assert found == pytest.approx(values.max().item(), rel=1e-6)
