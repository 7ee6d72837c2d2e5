"""The improved empirical Fisher matrix against its dense definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad
from natgrad import fisher_matrix
from natgrad.fisher import ImprovedFisher
from natgrad.likelihoods import Categorical, Gaussian
from tests import dense
from tests.cases import CASES, generator, normal
from tests.methods import make_optimizer

ONE_EVENT = ["mlp", "mlp_without_bias", "conv2d", "layer_norm", "pooled_tokens", "tied_linear"]
STRUCTURES = ["full", "block_diagonal", "block_tridiagonal", "unit_wise", "diagonal"]


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def per_sample(model, x, y) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss gradients by parameters (N, P), and squared norms at the output, by autograd alone."""
    rows, squares = [], []
    for xi, yi in zip(x, y, strict=True):
        z = model(xi.unsqueeze(0))
        loss = functional.cross_entropy(z, yi.unsqueeze(0))
        (at_output,) = torch.autograd.grad(loss, z, retain_graph=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
        squares.append(at_output.square().sum())
    return torch.stack(rows), torch.stack(squares)


@pytest.mark.parametrize("name", ONE_EVENT)
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_every_structure_is_that_of_the_scaled_gradients(name, likelihood):
    case = CASES[name]()
    y = case.target(likelihood)
    z, jac = case.jacobian
    gradient = dense.output_gradient(case.loss(likelihood), z, y)
    shape = (len(z), *[1] * (z.dim() - 1))
    scaled = (gradient / gradient.flatten(1).norm(dim=1).view(shape)).unsqueeze(0)
    pulled = dense.rows(jac, scaled).flatten(0, 1)
    expected = pulled.T @ pulled / len(z)
    for structure in STRUCTURES:
        found = fisher_matrix(case.model, (case.x, y), likelihood, structure, "improved")
        wanted = dense.structured(expected, structure, case.model, case.blocks)
        dense.assert_same(found.to_dense(), wanted, 1e-8)


def test_kfac_keeps_the_input_factor_and_scales_the_output_factor():
    model, x, y = classifier(), normal(7, 4), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    found = fisher_matrix(model, (x, y), "categorical", "kfac", "improved")
    empirical = fisher_matrix(model, (x, y), "categorical", "kfac", "empirical")
    z = model(x).detach()
    delta = (torch.softmax(z, 1) - functional.one_hot(y, 3)) / 1.0
    delta = delta / delta.norm(dim=1, keepdim=True)
    a, b = found.parts["2"].factors
    dense.assert_same(a, empirical.parts["2"].factors[0])
    dense.assert_same(b[0], delta.T @ delta / 7, 1e-8)


def test_with_one_output_it_is_the_exact_fisher_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = normal(6, 4), normal(6, 1, seed=1)
    for structure in ("full", "kfac"):
        exact = fisher_matrix(model, (x, y), "gaussian", structure, "exact").to_dense()
        found = fisher_matrix(model, (x, y), "gaussian", structure, "improved").to_dense()
        dense.assert_same(found, exact, 1e-8)


@pytest.mark.parametrize("damping", [1e-2, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_step_is_the_dense_one(damping, scale):
    """The plain loop, where gradients are read at the output; the loss scale drops out of F."""
    model, x, y = classifier(), normal(5, 4), torch.tensor([0, 1, 2, 1, 0])
    rows, squares = per_sample(model, x, y)
    n = len(x)
    fisher = rows.T @ (rows / squares.unsqueeze(1)) / n
    step = torch.linalg.solve(
        fisher + damping * torch.eye(fisher.shape[0]).double(), scale * rows.mean(0)
    )
    gram = rows @ rows.T + n * damping * torch.diag(squares)
    dense.assert_same(step, scale * (rows.T @ torch.linalg.solve(gram, squares)), 1e-8)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = natgrad.ImprovedEmpiricalNGD(model, lr=1.0, damping=damping, kl_clip=None)
    (scale * functional.cross_entropy(model(x), y)).backward()
    optimizer.step()
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    dense.assert_same(before - after, step, 1e-8)


def test_without_damping_every_loss_falls_by_its_own_gradient_norm():
    """G Δ = s, as under Gauss-Newton, and not the same for all samples."""
    model, x, y = classifier(), normal(5, 4), torch.tensor([0, 1, 2, 1, 0])
    rows, squares = per_sample(model, x, y)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = natgrad.ImprovedEmpiricalNGD(model, lr=1.0, damping=0.0, kl_clip=None)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    step = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    dense.assert_same(rows @ step, squares, 1e-6)
    assert squares.max() > 1.5 * squares.min()


def test_class_weights_and_ignored_targets_weigh_samples():
    model, x = classifier(), normal(6, 4)
    y = torch.tensor([0, 1, -100, 2, 1, -100])
    weights = torch.tensor([0.5, 2.0, 1.0]).double()
    likelihood = Categorical(class_weights=weights)
    kept = y >= 0
    rows, squares = per_sample(model, x[kept], y[kept])
    w = weights[y[kept]]
    expected = rows.T @ (rows * (w / squares).unsqueeze(1)) / w.sum()
    found = fisher_matrix(model, (x, y), likelihood, "full", "improved")
    dense.assert_same(found.to_dense(), expected, 1e-8)


def test_tokens_are_normalised_one_by_one_without_cross_terms_on_average():
    case = CASES["tokens"]()
    y = case.target("gaussian")
    z, jac = case.jacobian
    gradient = dense.output_gradient(case.loss("gaussian"), z, y)
    events = Gaussian().split_events(gradient)
    if events.shape[1] == 1:
        likelihood, y = Categorical(class_dim=-1), case.target("categorical")
    else:
        likelihood = Gaussian()
    gradient = likelihood.gradient(z, y)
    events = likelihood.split_events(gradient)
    assert events.shape[1] > 1
    unit = events / events.norm(dim=-1, keepdim=True)
    expected = torch.zeros(jac.shape[-1], jac.shape[-1]).double()
    for event in range(events.shape[1]):
        only = torch.zeros_like(unit)
        only[:, event] = unit[:, event]
        pulled = dense.rows(jac, likelihood.merge_events(only, z).unsqueeze(0)).flatten(0, 1)
        expected += pulled.T @ pulled
    expected /= float(likelihood.count(z, y))
    draws = [
        fisher_matrix(case.model, (case.x, y), likelihood, "full", "improved", seed=s).to_dense()
        for s in range(200)
    ]
    stacked = torch.stack(draws)
    error = stacked.std(0) / len(draws) ** 0.5
    assert ((stacked.mean(0) - expected).abs() <= 5 * error + 1e-10).all()


def test_fitted_samples_stay_finite():
    model, x = classifier(), normal(4, 4)
    y = model(x).detach()
    y[1:] += normal(3, 3, seed=2)  # the first sample is fitted exactly
    optimizer = natgrad.ImprovedEmpiricalNGD(model, "gaussian", damping=1e-3, kl_clip=None)
    (0.5 * (model(x) - y).square().sum() / 4).backward()
    optimizer.step()
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()


def test_it_needs_targets():
    model, x = classifier(), normal(4, 4)
    with pytest.raises(ValueError, match="true targets"):
        fisher_matrix(model, (x, None), "categorical", "full", "improved")


@pytest.mark.parametrize("optimizer", [natgrad.KFAC, natgrad.ExactNGD, natgrad.UnitWiseNGD])
def test_optimizers_train_with_it(optimizer):
    model = classifier()
    x = normal(60, 4)
    y = torch.randint(0, 3, (60,), generator=generator(1))
    trained = optimizer(model, fisher="improved", damping=1e-2)
    start = None
    for _ in range(50):
        trained.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        trained.step()
        start = float(loss) if start is None else start
    assert float(loss) < 0.9 * start
    other = optimizer(copy.deepcopy(model), fisher=ImprovedFisher(), damping=1e-2)
    other.load_state_dict(trained.state_dict())


# -- damping on the Gram matrix of the gradients, the rule of the source ---------------------------


def gram_rule(rows, squares, weights, damping) -> torch.Tensor:
    """Return Gᵀ(GGᵀ + count·λI)⁻¹ D√w for weighted samples, written out."""
    g = rows * weights.sqrt().unsqueeze(1)
    matrix = g @ g.T + weights.sum() * damping * torch.eye(len(g)).double()
    return g.T @ torch.linalg.solve(matrix, weights.sqrt() * squares)


def step_of(model, loss, likelihood="categorical", **options) -> torch.Tensor:
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    options = {
        "lr": 1.0,
        "kl_clip": None,
        "fisher": natgrad.ImprovedFisher(damping_on="gram"),
    } | options
    optimizer = make_optimizer(natgrad.ImprovedEmpiricalNGD, model, likelihood, **options)
    loss(model).backward()
    optimizer.step()
    return before - nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("samples", [5, 70])
def test_gram_rule_is_that_of_the_source(damping, scale, samples):
    """For fewer and for more samples than parameters; a scaled loss scales the step alone."""
    model, x = classifier(), normal(samples, 4)
    y = torch.randint(0, 3, (samples,), generator=generator(1))
    rows, squares = per_sample(model, x, y)
    expected = gram_rule(rows, squares, torch.ones(samples).double(), damping)
    # The same in parameter space: the empirical Fisher matrix on gradients weighted by s.
    empirical = rows.T @ rows / samples + damping * torch.eye(rows.shape[1]).double()
    dense.assert_same(torch.linalg.solve(empirical, rows.T @ squares / samples), expected, 1e-7)
    found = step_of(model, lambda m: scale * functional.cross_entropy(m(x), y), damping=damping)
    dense.assert_same(found, scale * expected, 1e-7)


@pytest.mark.parametrize("known_target", [False, True])
def test_gram_rule_takes_weights_as_repetitions(known_target):
    model, x = classifier(), normal(6, 4)
    y = torch.tensor([0, 1, -100, 2, 1, -100])
    weights = torch.tensor([1.0, 3.0, 2.0]).double()
    kept = y >= 0
    rows, squares = per_sample(model, x[kept], y[kept])
    repeats = weights[y[kept]].long()
    whole = [value.repeat_interleave(repeats, 0) for value in (rows, squares)]
    expected = gram_rule(*whole, torch.ones(len(whole[0])).double(), 0.05)
    dense.assert_same(gram_rule(rows, squares, weights[y[kept]], 0.05), expected, 1e-9)
    criterion = nn.CrossEntropyLoss(weights)
    if not known_target:
        found = step_of(model, lambda m: criterion(m(x), y), criterion, damping=0.05)
    else:
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = natgrad.ImprovedEmpiricalNGD(
            model,
            criterion,
            damping=0.05,
            fisher=natgrad.ImprovedFisher(damping_on="gram"),
            kl_clip=None,
        )
        optimizer.loss(criterion, model(x), y).backward()
        optimizer.step()
        found = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    dense.assert_same(found, expected, 1e-8)


def test_rules_agree_without_damping_and_where_all_gradients_are_units():
    model, x, y = classifier(), normal(5, 4), torch.tensor([0, 1, 2, 1, 0])
    rows, squares = per_sample(model, x, y)

    def loss(m: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(m(x), y)

    steps = {
        (rule, damping): step_of(
            copy.deepcopy(model), loss, damping=damping, fisher=natgrad.ImprovedFisher(rule)
        )
        for rule in ("fisher", "gram")
        for damping in (0.0, 1e-9, 0.1)
    }
    dense.assert_same(steps["gram", 0.0], steps["fisher", 0.0], 1e-9)
    dense.assert_same(steps["gram", 1e-9], steps["fisher", 0.0], 1e-5)
    dense.assert_same(rows @ steps["gram", 1e-9], squares, 1e-5)
    difference = steps["gram", 0.1] - steps["fisher", 0.1]
    assert difference.norm() > 0.05 * steps["fisher", 0.1].norm()
    # Gradients at the output of norm 1: residuals of a squared loss.
    z = model(x).detach()
    target = z + functional.normalize(normal(5, 3, seed=3), dim=1)
    both = [
        step_of(
            copy.deepcopy(model),
            lambda m: 0.5 * (m(x) - target).square().sum() / 5,
            "gaussian",
            damping=0.1,
            fisher=natgrad.ImprovedFisher(rule),
        )
        for rule in ("fisher", "gram")
    ]
    dense.assert_same(both[1], both[0], 1e-8)


@pytest.mark.parametrize("rule", ["fisher", "gram"])
def test_with_one_output_the_undamped_step_is_the_exact_natural_gradient(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, y = normal(6, 4), normal(6, 1, seed=1)
    z, jacobian = dense.jacobian(model, x)
    exact = torch.linalg.pinv(jacobian.flatten(0, 1)) @ (z - y)[:, 0]  # F⁺∇L = J⁺(f − y)
    found = step_of(
        model, lambda m: 0.5 * (m(x) - y).square().sum() / 6, "gaussian", damping=0.0,
        fisher=natgrad.ImprovedFisher(rule),
    )  # fmt: skip
    dense.assert_same(found, exact, 1e-7)


def test_gram_rule_damps_well_fitted_samples_more():
    """The share of its undamped fall that a sample's loss keeps rises with s for orthogonal g."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    x = torch.eye(4).double()
    y = model(x).detach() - torch.tensor([0.1, 0.5, 1.0, 3.0]).double().unsqueeze(1)
    squares = 2 * torch.tensor([0.1, 0.5, 1.0, 3.0]).double().square()
    damping = 0.2

    def loss(m: nn.Module) -> torch.Tensor:
        return 0.5 * (m(x) - y).square().sum() / 4

    for rule, share in (
        ("gram", squares / (squares + 4 * damping)),  # ‖g_n‖² = s_n here
        ("fisher", torch.ones(4).double() / (1 + 4 * damping)),
    ):
        twin = copy.deepcopy(model)
        step = step_of(twin, loss, "gaussian", damping=damping, fisher=natgrad.ImprovedFisher(rule))
        gradients = (model(x) - y).detach().unsqueeze(2) * x.unsqueeze(1)  # (N, 2, 4)
        dense.assert_same(gradients.flatten(1) @ step, share * squares, 1e-9)


def test_gram_rule_on_accumulated_clipped_and_penalised_gradients():
    model, x = classifier(), normal(6, 4)
    y = torch.tensor([0, 1, 2, 1, 0, 2])
    rows, squares = per_sample(model, x, y)
    whole = gram_rule(rows, squares, torch.ones(6).double(), 0.05)

    def halves(m: nn.Module) -> torch.Tensor:
        (functional.cross_entropy(m(x[:3]), y[:3]) / 2).backward()
        return functional.cross_entropy(m(x[3:]), y[3:]) / 2

    dense.assert_same(step_of(copy.deepcopy(model), halves, damping=0.05), whole, 1e-8)
    # A penalty: the empirical Fisher matrix with damping inverts it, times the mean of s.
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    empirical = rows.T @ rows / 6 + 0.05 * torch.eye(len(theta)).double()
    gradient, known = rows.mean(0) + 0.3 * theta, rows.mean(0)
    share = (gradient @ known) / (known @ known)
    rest = torch.linalg.solve(empirical, squares.mean() * (gradient - share * known))

    def penalised(m: nn.Module) -> torch.Tensor:
        penalty = sum(p.square().sum() for p in m.parameters())
        return functional.cross_entropy(m(x), y) + 0.15 * penalty

    found = step_of(copy.deepcopy(model), penalised, damping=0.05)
    dense.assert_same(found, share * whole + rest, 1e-7)


def test_gram_rule_stays_finite_for_fitted_samples_and_resumes():
    model, x = classifier(), normal(4, 4)
    y = model(x).detach() + 1e-12  # A residual of exactly zero would be a mask.
    y[1:] += normal(3, 3, seed=2)
    rows = []
    for xi, yi in zip(x, y, strict=True):
        loss = 0.5 * (model(xi) - yi).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    squares = (model(x).detach() - y).square().sum(1)
    expected = gram_rule(torch.stack(rows), squares, torch.ones(4).double(), 1e-3)

    def loss_of(m: nn.Module) -> torch.Tensor:
        return 0.5 * (m(x) - y).square().sum() / 4

    dense.assert_same(step_of(copy.deepcopy(model), loss_of, "gaussian", damping=1e-3), expected)
    options = {
        "fisher": natgrad.ImprovedFisher(damping_on="gram"),
        "damping": 0.1,
        "momentum": 0.9,
        "lr": 0.1,
    }
    optimizer = make_optimizer(natgrad.ImprovedEmpiricalNGD, model, "gaussian", **options)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    other, second = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, second)):
        o.zero_grad()
        loss_of(m).backward()
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": natgrad.LevenbergMarquardt()},
        {"lr": "isotropic"},
        {"length": "quadratic_model"},
        {"weight_decay_mode": "model"},
        {"momentum_on": "gradient"},
    ],
)
def test_gram_rule_refuses_what_it_has_no_meaning_for(options):
    with pytest.raises(ValueError, match="damping_on"):
        make_optimizer(
            natgrad.ImprovedEmpiricalNGD,
            classifier(),
            **({"fisher": natgrad.ImprovedFisher(damping_on="gram")} | options),
        )


def test_gram_rule_refuses_tokens():
    model = nn.Linear(4, 3).double()
    optimizer = natgrad.ImprovedEmpiricalNGD(
        model, Categorical(class_dim=-1), fisher=natgrad.ImprovedFisher(damping_on="gram")
    )
    z = model(normal(2, 5, 4))
    y = torch.randint(0, 3, (2, 5), generator=generator())
    with pytest.raises(ValueError, match="one event per sample"):
        optimizer.loss(lambda z, y: functional.cross_entropy(z.flatten(0, 1), y.flatten()), z, y)
