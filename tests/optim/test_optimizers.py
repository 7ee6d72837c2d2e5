"""Every optimizer against a dense computation of its own, and its manners in a training loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense, pairwise
from tests.cases import CASES, Case, generator, normal, rows
from tests.methods import make_optimizer
from tests.state import check_resumes, flat, same

OPTIMIZERS = {
    "full": natgrad.ExactNGD,
    "block_diagonal": natgrad.BlockDiagonalNGD,
    "block_tridiagonal": natgrad.BlockTridiagonalNGD,
    "unit_wise": natgrad.UnitWiseNGD,
    "diagonal": natgrad.DiagonalNGD,
    "kfac": natgrad.KFAC,
}
AVERAGING = ["unit_wise", "diagonal", "kfac"]
KINDS = ["exact", "empirical"]


def make(structure: str, model: nn.Module, likelihood: Any = "categorical", **options: Any):
    """Make an optimizer that updates its curvature at every step and clips nothing."""
    defaults: dict[str, Any] = {"lr": 0.3, "damping": 0.05, "kl_clip": None, "momentum": 0.0}
    if structure in AVERAGING:
        defaults |= {"factors": 1, "inverses": 1, "decay": 0.0}
    if structure == "kfac":
        defaults |= {"nesterov": False, "early": False, "rows_per_unit": None}
    return make_optimizer(OPTIMIZERS[structure], model, likelihood, **(defaults | options))


class Reference:
    """Natural gradient descent with dense matrices on a copy of a model.

    Attributes:
        model: The copy, trained by :meth:`step`.
    """

    def __init__(
        self, case: Case, structure: str, kind: str, loss: dense.Loss, *, lr: float = 0.3,
        damping: float = 0.05, momentum: float = 0.0, weight_decay: float = 0.0,
        decay: float = 0.0, factors: int = 1, inverses: int = 1,
        factored_damping: bool = True, sharing: str = "split",
    ) -> None:  # fmt: skip
        self.case, self.model = case, copy.deepcopy(case.model)
        self.structure, self.kind, self.loss = structure, kind, loss
        self.lr, self.damping, self.momentum = lr, damping, momentum
        self.weight_decay, self.decay = weight_decay, decay
        self.intervals = factors, inverses
        self.factored, self.sharing = factored_damping, sharing
        self.history: list[list[Any]] = []  # [weight, what a batch contributes]
        self.steps = 0
        self.buffer: Tensor | None = None
        self.inverse: Tensor | None = None

    def _contribution(self, x: Any, y: Tensor) -> Any:
        if self.structure == "kfac":
            return dense.kfac_pairs(
                self.model, x, y, self.loss, self.case.blocks, self.kind, sharing=self.sharing
            )
        f = dense.fisher(self.model, x, y, self.loss, self.kind)
        return dense.structured(f, self.structure, self.model, self.case.blocks)

    def _average(self) -> Any:
        total = sum(weight for weight, _ in self.history)
        weights = [weight / total for weight, _ in self.history]
        if self.structure != "kfac":
            return sum(w * f for w, (_, f) in zip(weights, self.history, strict=True))
        first = self.history[0][1]
        result = []
        for block, (where, groups) in enumerate(first):
            pairs = []
            for g in range(len(groups)):
                both = [item[block][1][g] for _, item in self.history]
                pairs.append(
                    tuple(
                        sum(w * pair[i] for w, pair in zip(weights, both, strict=True))
                        for i in range(2)
                    )
                )
            result.append((where, pairs))
        return result

    def curvature(self) -> Tensor:
        """The averaged matrix, dense."""
        average = self._average()
        if self.structure != "kfac":
            return average
        size = sum(p.numel() for p in self.model.parameters())
        return sum(dense.kron(size, where, pairs) for where, pairs in average)

    def natural_gradient(self, gradient: Tensor, batches: list[tuple[Any, Tensor]]) -> Tensor:
        """Update curvature from the batches of one step and precondition."""
        if self.steps % self.intervals[0] == 0:
            for item in self.history:
                item[0] *= self.decay
            self.history = [item for item in self.history if item[0] > 0]
            for x, y in batches:
                z = dense.call(self.model, x).detach()
                self.history.append([self.loss.count(z, y), self._contribution(x, y)])
        if self.steps % self.intervals[1] == 0:
            size = len(gradient)
            if self.structure == "kfac" and self.factored:
                self.inverse = dense.pi_damped_inverse(size, self._average(), self.damping)
            else:
                eye = torch.eye(size, dtype=torch.float64)
                self.inverse = torch.linalg.inv(self.curvature() + self.damping * eye)
        self.steps += 1
        return self.inverse @ gradient

    def step(
        self, batches: list[tuple[Any, Tensor]], user_loss: Callable[[nn.Module], Tensor]
    ) -> None:
        """Take one step."""
        leaves = list(dense.parameters(self.model).values())
        gradient = flat(torch.autograd.grad(user_loss(self.model), leaves))
        direction = self.natural_gradient(gradient, batches)
        if self.momentum:
            old = 0 if self.buffer is None else self.momentum * self.buffer
            self.buffer = direction = old + direction
        with torch.no_grad():
            moved = flat(leaves) * (1 - self.lr * self.weight_decay) - self.lr * direction
            torch.nn.utils.vector_to_parameters(moved, leaves)


def train(optimizer, losses) -> None:
    """The usual loop over closures that return the loss."""
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def compare(start: nn.Module, model: nn.Module, reference: Reference, tolerance=1e-7) -> None:
    """Compare how far both have moved from the start."""
    origin = flat(start.parameters())
    dense.assert_same(
        flat(model.parameters()) - origin, flat(reference.model.parameters()) - origin, tolerance
    )


# -- the first three steps -------------------------------------------------------------------------

CRITERIA: dict[str, tuple[Any, Callable[[], nn.Module], dense.Loss, str]] = {
    "cross-entropy": ("categorical", nn.CrossEntropyLoss, dense.categorical(), "categorical"),
    "summed cross-entropy": (
        nn.CrossEntropyLoss(reduction="sum"),
        lambda: nn.CrossEntropyLoss(reduction="sum"),
        dense.categorical(),
        "categorical",
    ),
    "weighted cross-entropy": (
        nn.CrossEntropyLoss(torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)),
        lambda: nn.CrossEntropyLoss(torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)),
        dense.categorical(weight=torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)),
        "categorical",
    ),
    "smoothed cross-entropy": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
        dense.categorical(label_smoothing=0.2),
        "categorical",
    ),
    "mse": (nn.MSELoss(), nn.MSELoss, dense.mse(), "gaussian"),
    "summed mse": (
        nn.MSELoss(reduction="sum"),
        lambda: nn.MSELoss(reduction="sum"),
        dense.gaussian(0.5),
        "gaussian",
    ),  # fmt: skip
    "summed bce": (
        nn.BCEWithLogitsLoss(reduction="sum"),
        lambda: nn.BCEWithLogitsLoss(reduction="sum"),
        dense.bernoulli(),
        "bernoulli",
    ),
    "summed poisson": (
        nn.PoissonNLLLoss(reduction="sum"),
        lambda: nn.PoissonNLLLoss(reduction="sum"),
        dense.poisson(),
        "poisson",
    ),
}


def batches_of(case: Case, kind: str, count: int = 3, samples: int | None = None):
    """Draw batches like the case's input, with targets."""
    result = []
    for seed in range(count):
        n = samples or len(case.x)
        x = normal(n, *case.x.shape[1:], seed=40 + seed)
        z = dense.call(case.model, x).detach()
        y = Case(case.model, x, case.blocks).target(kind, seed=60 + seed)
        assert len(y) == len(z)
        result.append((x, y))
    return result


@pairwise.parametrize({"structure": OPTIMIZERS, "kind": KINDS, "criterion": CRITERIA})
def test_three_steps(structure, kind, criterion):
    case = CASES["mlp"]()
    likelihood, module, loss, target = CRITERIA[criterion]
    criterion_module = module()
    # Summed losses have gradients and steps N times as large.
    lr = 0.3 if "summed" not in criterion else 0.05
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, likelihood, fisher=kind, **options)
    reference = Reference(case, structure, kind, loss, **options)
    for x, y in batches_of(case, target):
        train(optimizer, [lambda: criterion_module(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: criterion_module(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_three_steps_on_convolutions(structure, kind):
    case = CASES["conv2d"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher=kind)
    reference = Reference(case, structure, kind, dense.categorical())
    for x, y in batches_of(case, "categorical"):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_three_steps_on_masked_tokens(structure, kind):
    """Ignored tokens leave the curvature and the count, as they leave the loss."""
    case = CASES["tokens"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher=kind)
    loss = dense.categorical(2)
    reference = Reference(case, structure, kind, loss)
    reference._contribution = lambda x, y: (  # K-FAC leaves ignored tokens out of A
        dense.kfac_pairs(
            reference.model,
            x,
            y,
            loss,
            case.blocks,
            kind,
            sharing="split",
            partial=(y == -100).any(1),
        )
        if structure == "kfac"
        else Reference._contribution(reference, x, y)
    )
    for x, y in batches_of(case, "categorical"):
        y = y.clone()
        y[0, 1:] = y[2, 0] = -100

        def criterion(m: nn.Module, x=x, y=y) -> Tensor:
            return functional.cross_entropy(m(x).flatten(0, 1), y.flatten())

        train(optimizer, [lambda: criterion(model)])  # noqa: B023
        reference.step([(x, y)], criterion)
        compare(case.model, model, reference)


@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce", "split"])
def test_kfac_options(rule, sharing):
    case = CASES["conv2d"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, fisher="exact", factored_damping=rule, weight_sharing=sharing)
    reference = Reference(
        case, "kfac", "exact", dense.categorical(), factored_damping=rule, sharing=sharing
    )
    for x, y in batches_of(case, "categorical"):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


@pytest.mark.parametrize("structure", AVERAGING)
@pytest.mark.parametrize("intervals", [(1, 1), (2, 4), (3, 2)])
def test_moving_averages_and_intervals(structure, intervals):
    """Batches of different sizes weigh as much as their counts, older ones less."""
    case = CASES["mlp"]()
    options = {
        "decay": 0.8, "factors": intervals[0], "inverses": intervals[1],
        "momentum": 0.5,
    }  # fmt: skip
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher="exact", **options)
    reference = Reference(case, structure, "exact", dense.categorical(), **options)
    for step, samples in enumerate((4, 7, 2, 5, 1, 3)):
        ((x, y),) = batches_of(case, "categorical", 1, samples)
        x = x + step
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["full", "block_diagonal", "unit_wise"])
def test_zero_damping_steps(structure, kind):
    """The pseudo-inverse: for squared error one step of size 1 fits a wide enough net's tangent."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, nn.MSELoss(), fisher=kind, damping=0.0, lr=0.1)
    x, y = case.x, case.target("gaussian")
    leaves = list(model.parameters())
    gradient = flat(torch.autograd.grad(functional.mse_loss(model(x), y), leaves))
    f = dense.structured(
        dense.fisher(model, x, y, dense.mse(), kind), structure, model, case.blocks
    )
    values, vectors = torch.linalg.eigh(f)
    keep = values > 1e-10 * values.max()
    expected = (vectors[:, keep] / values[keep]) @ (vectors[:, keep].T @ gradient)
    before = flat(leaves)
    train(optimizer, [lambda: functional.mse_loss(model(x), y)])
    dense.assert_same((before - flat(leaves)) / 0.1, expected, 1e-6)


def test_exact_step_solves_linear_least_squares():
    """For a linear model and squared error, one undamped step of size 1 is the solution."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = normal(10, 3), normal(10, 2, seed=1)
    optimizer = make("full", model, nn.MSELoss(), damping=0.0, lr=1.0)
    train(optimizer, [lambda: functional.mse_loss(model(x), y)])
    augmented = torch.cat([x, torch.ones(10, 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(augmented, y).solution
    dense.assert_same(torch.cat([model.weight, model.bias.unsqueeze(1)], 1).T, solution, 1e-8)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "kfac"])
def test_monte_carlo_steps_approach_exact_ones(structure):
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    moved = {}
    for kind, samples in (("exact", 1), ("mc", 4000)):
        model = copy.deepcopy(case.model)
        fisher = natgrad.MonteCarloFisher(samples) if kind == "mc" else kind
        optimizer = make(structure, model, fisher=fisher)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        moved[kind] = flat(model.parameters()) - flat(case.model.parameters())
    error = (moved["mc"] - moved["exact"]).norm() / moved["exact"].norm()
    assert 1e-6 < error < 0.05


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_kl_clip_bounds_the_predicted_change(structure):
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    free, clipped = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for model, clip in ((free, None), (clipped, 1e-4)):
        optimizer = make(structure, model, fisher="exact", kl_clip=clip)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
    origin = flat(case.model.parameters())
    long, short = flat(free.parameters()) - origin, flat(clipped.parameters()) - origin
    torch.testing.assert_close(
        torch.cosine_similarity(long, short, dim=0), torch.tensor(1.0, dtype=torch.float64)
    )
    expected = torch.tensor(1e-4, dtype=torch.float64)
    f = dense.fisher(case.model, x, y, dense.categorical())
    if structure in ("full", "block_diagonal", "block_tridiagonal"):
        # These hold the rows of the batch, so they measure the change exactly.
        torch.testing.assert_close(short @ f @ short, expected)
        return
    # The step is −ηsΔ with Δ the natural gradient, and η²s² ΔᵀF̂Δ ≤ η²s² ⟨Δ, ∇L⟩ = κ.
    leaves = list(case.model.parameters())
    gradient = flat(torch.autograd.grad(functional.cross_entropy(case.model(x), y), leaves))
    torch.testing.assert_close(-0.3 * short.norm() / long.norm() * short @ gradient, expected)
    reference = Reference(case, structure, "exact", dense.categorical())
    reference.natural_gradient(gradient, [(x, y)])
    assert short @ reference.curvature() @ short <= 1e-4


def test_kl_clip_is_exact_with_more_rows_than_parameters():
    """Samples that do not count make rows, of which some number is handled as their sum."""
    x, y = normal(24, 4, seed=0), torch.arange(24) % 3
    counts = torch.rand(24, generator=generator(1)) < 0.5
    kept, ignored = (x[counts], y[counts]), (x, torch.where(counts, y, -100))
    steps = []
    for inputs, targets in (kept, ignored):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        assert (3 * len(inputs) > flat(model.parameters()).numel()) is (inputs is x)
        origin = copy.deepcopy(model)
        optimizer = natgrad.ExactNGD(model, fisher="exact", kl_clip=1e-3)
        train(optimizer, [lambda: functional.cross_entropy(model(inputs), targets)])  # noqa: B023
        steps.append(flat(model.parameters()) - flat(origin.parameters()))
    f = dense.fisher(origin, *kept, dense.categorical())
    for step in steps:
        torch.testing.assert_close(step @ f @ step, torch.tensor(1e-3, dtype=torch.float64))
    torch.testing.assert_close(*steps)


def test_kl_clip_bounds_steps_where_curvature_vanishes():
    """A saturated softmax has a gradient and no curvature: all but one weight stay in reach."""
    x, y = normal(8, 4, seed=0), torch.zeros(8, dtype=torch.long)
    for clip in (0.1, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
        with torch.no_grad():
            model[3].bias[1] = 60.0
        origin = copy.deepcopy(model)
        optimizer = natgrad.ExactNGD(model, fisher="exact", kl_clip=clip)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        pairs = zip(model.parameters(), origin.parameters(), strict=True)
        changes = sorted(
            ((p - q).norm() / max(q.norm(), (len(q) / 3) ** 0.5)).item()
            for p, q in pairs
            if q.dim() > 1
        )
        assert changes[-2] == pytest.approx(1.0) if clip else changes[-2] > 3.0


# -- the gradient may come about in many ways ------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_accumulation_is_one_large_batch(structure, kind):
    case = CASES["mlp"]()
    x, y = normal(6, 3, seed=3), torch.randint(0, 3, (6,), generator=generator(4))
    whole, parts = copy.deepcopy(case.model), copy.deepcopy(case.model)
    together, accumulated = make(structure, whole, fisher=kind), make(structure, parts, fisher=kind)
    for _ in range(3):
        train(together, [lambda: functional.cross_entropy(whole(x), y)])
        accumulated.zero_grad()
        for start, stop in ((0, 2), (2, 6)):
            loss = functional.cross_entropy(parts(x[start:stop]), y[start:stop])
            (loss * (stop - start) / 6).backward()
        accumulated.step()
        moved = flat(whole.parameters()) - flat(case.model.parameters())
        dense.assert_same(flat(parts.parameters()) - flat(case.model.parameters()), moved, 1e-8)


WAYS = ["penalty", "clipping", "scaled loss", "noise", "replaced", "scaler", "extra passes"]


def manipulated(structure: str, kind: str, change: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Return natgrad's and the dense step for a gradient changed in some way."""
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher=kind)
    change(model, optimizer, x, y)
    gradient = flat(p.grad for p in model.parameters())
    optimizer.step()
    moved = flat(case.model.parameters()) - flat(model.parameters())
    reference = Reference(case, structure, kind, dense.categorical())
    return moved / 0.3, reference.natural_gradient(gradient, [(x, y)])


@pairwise.parametrize({"structure": OPTIMIZERS, "kind": KINDS, "way": WAYS})
def test_any_gradient_is_preconditioned(structure, kind, way):
    def change(model, optimizer, x, y):
        optimizer.zero_grad()
        if way == "penalty":
            penalty = sum(p.square().sum() for p in model.parameters())
            (functional.cross_entropy(model(x), y) + 0.3 * penalty).backward()
        elif way == "scaled loss":
            (17.0 * functional.cross_entropy(model(x), y)).backward()
        elif way == "scaler":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
        else:
            if way == "extra passes":
                model(x + 1.0)
                with torch.no_grad():
                    model(x + 2.0)
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()  # some loops clear gradients only here
            loss.backward()
            if way == "extra passes":
                with torch.no_grad():
                    model(x + 3.0)
                model(x + 4.0)
        if way == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        elif way == "noise":
            for p in model.parameters():
                p.grad.add_(normal(*p.shape, seed=9))
        elif way == "replaced":
            for p in model.parameters():
                p.grad = normal(*p.shape, seed=9)

    actual, expected = manipulated(structure, kind, change)
    dense.assert_same(actual, expected, 1e-7)


@pairwise.parametrize({"structure": OPTIMIZERS, "kind": KINDS, "route": ["loss", "update_fisher"]})
def test_the_other_routes_are_equal(structure, kind, route):
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    plain, routed = (make(structure, model, fisher=kind) for model in models)
    for x, y in batches_of(case, "categorical"):
        train(plain, [lambda: functional.cross_entropy(models[0](x), y)])  # noqa: B023
        routed.zero_grad()
        out = models[1](x)
        if route == "loss":
            routed.loss(functional.cross_entropy, out, y).backward()
        else:
            routed.update_fisher(out, y)
            functional.cross_entropy(out, y).backward()
        routed.step()
        difference = flat(models[0].parameters()) - flat(models[1].parameters())
        assert difference.norm() <= 1e-9 * flat(models[0].parameters()).norm()


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_preconditioner_with_another_optimizer(structure):
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    own = make(structure, models[0], fisher="exact", momentum=0.9)
    preconditioner = natgrad.Preconditioner(
        models[1], "categorical", structure=structure, fisher="exact", damping=0.05
    )
    other = torch.optim.SGD(models[1].parameters(), lr=0.3, momentum=0.9)
    for x, y in batches_of(case, "categorical"):
        train(own, [lambda: functional.cross_entropy(models[0](x), y)])  # noqa: B023
        other.zero_grad()
        functional.cross_entropy(models[1](x), y).backward()
        preconditioner.step()
        other.step()
        dense.assert_same(flat(models[1].parameters()), flat(models[0].parameters()), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_weights_with_smoothing_need_the_target(structure, kind):
    """Both together cannot be read off a gradient; ``optimizer.loss`` tells the target."""
    case = CASES["mlp"]()
    weights = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weights, label_smoothing=0.2)
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, criterion, fisher=kind)
    loss = dense.categorical(weight=weights, label_smoothing=0.2)
    reference = Reference(case, structure, kind, loss)
    for x, y in batches_of(case, "categorical"):
        train(optimizer, [lambda: optimizer.loss(criterion, model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: criterion(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


def test_physics_informed_losses_only_see_their_own_backward():
    """``create_graph=True`` passes through the output are not training passes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    twin = copy.deepcopy(model)
    x = normal(5, 1).requires_grad_()

    def gradients(m: nn.Module) -> Tensor:
        out = m(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return (slope - out).square().mean()

    optimizer = make("full", model, "gaussian")
    optimizer.preconditioner.observer.audit.begin = lambda: None  # It would leave layers out.
    optimizer.zero_grad()
    gradients(model).backward()
    gradients(twin).backward()
    torch.testing.assert_close(
        flat(p.grad for p in model.parameters()), flat(p.grad for p in twin.parameters())
    )
    gradient = flat(p.grad for p in model.parameters())
    before = flat(model.parameters())
    optimizer.step()
    f = dense.fisher(twin, x.detach(), torch.zeros(5, 1).double(), dense.gaussian())
    expected = torch.linalg.solve(f + 0.05 * torch.eye(len(f)).double(), gradient)
    dense.assert_same((before - flat(model.parameters())) / 0.3, expected, 1e-7)


# -- manners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_gradients_and_random_state_are_left_alone(structure, kind):
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher=kind)
    x, y = case.x, case.target("categorical")
    random = torch.get_rng_state()
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    functional.cross_entropy(twin(x), y).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_closures(structure):
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    plain, closed = (make(structure, model) for model in models)
    for x, y in batches_of(case, "categorical"):

        def closure(x=x, y=y) -> Tensor:
            closed.zero_grad()
            loss = functional.cross_entropy(models[1](x), y)
            loss.backward()
            return loss

        expected = functional.cross_entropy(models[0](x), y)
        train(plain, [lambda: functional.cross_entropy(models[0](x), y)])  # noqa: B023
        returned = closed.step(closure)
        torch.testing.assert_close(torch.as_tensor(returned), expected.detach())
        assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_learning_rate_schedulers(structure):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, lr=0.4, fisher="exact")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    reference = Reference(case, structure, "exact", dense.categorical(), lr=0.4)
    for x, y in batches_of(case, "categorical"):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)
        schedule.step()
        reference.lr /= 2
    assert optimizer.param_groups[0]["lr"] == 0.05
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    optimizer.param_groups[0]["damping"] = 10.0
    reference.damping, reference.lr = 10.0, optimizer.param_groups[0]["lr"]
    x, y = case.x, case.target("categorical")
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
    optimizer.zero_grad()


@pytest.mark.parametrize("structure", ["block_diagonal", "unit_wise", "diagonal", "kfac"])
def test_parameter_groups(structure):
    """Groups by module and by pattern have their own rates, damping and momentum."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    groups = [
        {"modules": [model[0]], "lr": 0.1, "damping": 1.0},
        {"params": "4.*", "lr": 0.2, "momentum": 0.5, "weight_decay": 0.3},
    ]
    optimizer = make(structure, model, fisher="exact", params=groups)
    assert isinstance(optimizer, torch.optim.Optimizer)
    sizes = sorted(sum(p.numel() for p in g["params"]) for g in optimizer.param_groups)
    assert sizes == [15, 20, 24]
    index = [i for i in dense.block_indices(model, case.blocks)]
    plain = {
        damping: Reference(case, structure, "exact", dense.categorical(), damping=damping)
        for damping in (0.05, 1.0)
    }
    buffer = torch.zeros(15, dtype=torch.float64)
    current = flat(model.parameters())
    for x, y in batches_of(case, "categorical"):
        leaves = list(dense.parameters(model).values())
        gradient = flat(torch.autograd.grad(functional.cross_entropy(model(x), y), leaves))
        natural = {}
        for damping, reference in plain.items():
            reference.model = copy.deepcopy(model)
            natural[damping] = reference.natural_gradient(gradient, [(x, y)])
        buffer = 0.5 * buffer + natural[0.05][index[2]]
        current[index[0]] -= 0.1 * natural[1.0][index[0]]
        current[index[1]] -= 0.3 * natural[0.05][index[1]]
        current[index[2]] = (1 - 0.06) * current[index[2]] - 0.2 * buffer
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        dense.assert_same(flat(model.parameters()), current, 1e-9)


def test_groups_can_leave_the_curvature():
    """``preconditioned=False`` and uncovered parameters go to AdamW or SGD, exactly."""
    case = CASES["mlp"]()
    for fallback, expected in (
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    ):
        model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
        optimizer = make(
            "block_diagonal", model, fallback=natgrad.Fallback(fallback, 0.01),
            params=[{"params": "0.*", "preconditioned": False}],
        )  # fmt: skip
        other = expected(twin[0].parameters())
        for x, y in batches_of(case, "categorical"):
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            functional.cross_entropy(twin(x), y).backward()
            other.step()
            train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
            dense.assert_same(flat(model[0].parameters()), flat(twin[0].parameters()), 1e-12)
            assert not torch.equal(model[2].weight, twin[2].weight)


class ByFrequency(nn.Module):
    """Gradients of a table that are divided by token frequency are no sums of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, scale_grad_by_freq=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_uncovered_parameters_are_reported_once_and_trained():
    torch.manual_seed(0)
    model = ByFrequency().double()
    with pytest.warns(UserWarning, match="table.weight") as record:
        optimizer = make("kfac", model)
    assert len(record) == 1 and "frequency" in str(record[0].message)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = torch.arange(6) % 4, torch.randint(0, 3, (6,), generator=generator(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)] * 2)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert "table" in str(optimizer.summary())


def test_a_reason_is_told_once_for_all_its_parameters():
    model = nn.Sequential(ByFrequency(), nn.Identity(), ByFrequency()).double()
    with pytest.warns(UserWarning, match="table.weight") as record:
        make("kfac", model)
    said = str(record[0].message)
    assert len(record) == 1 and said.count("frequency") == 1
    assert "0.table.weight, 2.table.weight (" in said


@pytest.mark.parametrize(
    ("structure", "kind"),
    [*((name, "mc") for name in OPTIMIZERS), ("kfac", "exact"), ("kfac", "empirical")],
)
def test_checkpoints_resume_bit_exactly(structure, kind):
    case = CASES["conv2d"]()
    options: dict[str, Any] = {"fisher": kind, "momentum": 0.9}
    if structure in AVERAGING:
        options |= {"decay": 0.9, "factors": 2, "inverses": 3}
    data = batches_of(case, "categorical", 7)

    def fresh(seed: int) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(case.model)
        return model, make(structure, model, seed=seed, **options)

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        x, y = data[number]
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])

    check_resumes(fresh, step, 7, (1, 2, 3, 4) if structure in AVERAGING else (2,))


@pairwise.parametrize(  # Others meet faults in test_reliability.py.
    {
        "structure": ["full", "block_tridiagonal", "kfac"],
        "kind": ["exact", "mc", "empirical"],
        "poison": ["input", "loss", "gradient", "closure"],
    }
)
def test_a_step_with_nan_is_skipped_and_changes_nothing(structure, kind, poison):
    case = CASES["mlp"]()
    options: dict[str, Any] = {"fisher": kind, "momentum": 0.9, "weight_decay": 0.1}
    if structure in AVERAGING:
        options["decay"] = 0.9
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer, undisturbed = make(structure, model, **options), make(structure, twin, **options)
    for step, (x, y) in enumerate(batches_of(case, "categorical", 3)):
        if step == 1:
            before = copy.deepcopy(optimizer.state_dict())
            parameters = flat(model.parameters())
            with pytest.warns(UserWarning, match="skipped"):
                bad_step(optimizer, model, x, y, poison)
            assert torch.equal(flat(model.parameters()), parameters)
            assert same(optimizer.state_dict(), before)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        train(undisturbed, [lambda: functional.cross_entropy(twin(x), y)])  # noqa: B023
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def bad_step(optimizer, model: nn.Module, x: Tensor, y: Tensor, poison: str) -> None:
    optimizer.zero_grad()
    if poison == "input":
        x = x.clone()
        x[0, 0] = float("nan")
    loss = functional.cross_entropy(model(x), y)
    if poison == "loss":
        loss = loss * float("inf")
    if poison == "closure":

        def closure() -> Tensor:
            loss.backward()
            return loss * float("nan")

        optimizer.step(closure)
        return
    loss.backward()
    if poison == "gradient":
        model[2].bias.grad[0] = float("inf")
    optimizer.step()


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_missing_gradients(structure):
    """Parameters without a gradient stay where they are; the others move."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, weight_decay=0.1, momentum=0.9)
    x, y = case.x, case.target("categorical")
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
    model[2].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("2."), name


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_a_last_smaller_batch_and_a_batch_of_one(structure):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make(structure, model, fisher="exact")
    reference = Reference(case, structure, "exact", dense.categorical())
    for samples in (5, 5, 2, 1, 30, 5):
        ((x, y),) = batches_of(case, "categorical", 1, samples)
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
        reference.step([(x, y)], lambda m: functional.cross_entropy(m(x), y))  # noqa: B023
        compare(case.model, model, reference)


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_layers_that_a_pass_does_not_reach(structure):
    """A model that changes from step to step, as with stochastic depth."""

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.skip = False

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            return self.c(x if self.skip else torch.tanh(self.b(x)))

    torch.manual_seed(0)
    model = Skipping().double()
    optimizer = make(structure, model, fisher="exact")
    x, y = normal(4, 3), torch.tensor([0, 1, 2, 0])
    for skip in (True, False, True):
        model.skip = skip
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (not (skip and name.startswith("b."))), name
            assert parameter.isfinite().all()


def test_curvature_seen_by_nobody_is_said_once():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model)
    x, y = case.x, case.target("categorical")

    def partial() -> Tensor:  # the parts are called, not the model
        h = x
        for layer in model:
            h = layer(h)
        return functional.cross_entropy(h, y)

    with pytest.warns(UserWarning, match="update_fisher"):
        train(optimizer, [partial])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, [partial])


def test_nothing_is_said_of_a_step_without_gradients():
    case = CASES["mlp"]()
    optimizer = make("kfac", copy.deepcopy(case.model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        y = case.target("categorical")
        train(optimizer, [lambda: functional.cross_entropy(optimizer.model(case.x), y)])


def test_the_first_step_with_rows_updates_whatever_the_interval():
    """A step without gradients, or with an empty batch, may come before."""
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    results = []
    for empty in (0, 1):
        model = copy.deepcopy(case.model)
        optimizer = natgrad.KFAC(
            model,
            refresh=natgrad.Refresh(factors=5, inverses=5, early=False),
            step_rule=natgrad.StepRule(length="lr"),
            lr=0.1,
        )
        for number in [0] * empty + [len(x)] * 2:
            optimizer.zero_grad()
            functional.cross_entropy(model(x[:number]), y[:number], reduction="sum").backward()
            optimizer.step()
        results.append(flat(model))
    assert not torch.equal(results[0], flat(case.model))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.ExactNGD, natgrad.FNGD])
def test_the_fallback_trains_while_no_curvature_is_known(kind):
    """What is trained so can be saved, and ends with the first pass that is seen."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer, twin = kind(model, "categorical"), copy.deepcopy(model)
    adamw = natgrad.optim.parameter_groups.make_fallback(
        natgrad.Fallback(), [{"params": list(twin.parameters())}]
    )
    x, y = case.x, case.target("categorical")

    def partial(model: nn.Sequential) -> Tensor:
        return functional.cross_entropy(nn.Sequential(*model)(x), y)

    with pytest.warns(UserWarning, match="adamw trains all parameters until"):
        train(optimizer, [lambda: partial(model)])
    resumed = copy.deepcopy(model)
    other = kind(resumed, "categorical")
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, [lambda: partial(model)])
    train(adamw, [lambda: partial(twin)] * 2)
    with pytest.warns(UserWarning, match="adamw trains all parameters until"):
        train(other, [lambda: partial(resumed)])
    assert torch.equal(flat(model), flat(twin))
    assert torch.equal(flat(model), flat(resumed))
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
    train(adamw, [lambda: functional.cross_entropy(twin(x), y)])
    assert not torch.equal(flat(model), flat(twin))
    assert not optimizer._left_out
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Once it has been seen one pass without is nothing special.
        train(optimizer, [lambda: partial(model)])
    assert not optimizer._left_out


@pytest.mark.parametrize("depth", [1, 2])
def test_losses_of_derivatives_alone_are_trained_by_the_fallback(depth):
    """Their backward pass frees the graph of the output, which it does not go through."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(2, 2), nn.SiLU())]
    model = nn.Sequential(*layers, nn.Linear(2, 1)).double()
    optimizer = natgrad.KFAC(model, "gaussian")
    before = flat(model)

    def loss() -> Tensor:
        x = normal(8, 2).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope + x).square().mean()

    with pytest.warns(UserWarning, match=r"trains all parameters .*ResidualNGD"):
        train(optimizer, [loss])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, [loss] * 3)
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["batch_norm_train", "checkpointed", "tied_embedding", "lstm"])
def test_other_models_train(structure, name):
    case = CASES[name]()
    model = copy.deepcopy(case.model)
    model.train(case.model.training)
    y = case.target("categorical")
    optimizer = make(structure, model, lr=0.1, damping=0.1)

    def loss() -> Tensor:
        out = model(case.x)
        return functional.cross_entropy(out.flatten(0, -2), y.flatten())

    first = loss().item()
    train(optimizer, [loss] * 12)
    # The block tri-diagonal matrix is indefinite, so its steps need not all go downhill.
    assert loss().item() < (0.95 if structure == "block_tridiagonal" else 0.8) * first


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_defaults_train(structure):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] * x[:, 2] > 0.3).long()
    optimizer = OPTIMIZERS[structure](model)
    first = functional.cross_entropy(model(x), y).item()
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)] * 40)
    assert functional.cross_entropy(model(x), y).item() < 0.75 * first


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_bfloat16_models(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.bfloat16)
    x, y = torch.randn(32, 4, dtype=torch.bfloat16), torch.randint(0, 3, (32,))
    optimizer = make(structure, model, lr=0.1, momentum=0.5)
    first = functional.cross_entropy(model(x), y).item()
    train(optimizer, [lambda: functional.cross_entropy(model(x), y)] * 15)
    assert functional.cross_entropy(model(x), y).item() < first
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("structure", list(OPTIMIZERS))
def test_summary_names_every_layer(structure):
    case = CASES["conv2d"]()
    text = str(make(structure, copy.deepcopy(case.model)).summary())
    for spec in case.blocks:
        assert spec.layer in text
    assert structure in text or OPTIMIZERS[structure].__name__ in text


def test_copies_of_the_model_train_by_themselves():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model)
    average = torch.optim.swa_utils.AveragedModel(model)
    x, y = case.x, case.target("categorical")
    for _ in range(3):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])
        average.update_parameters(model)
    functional.cross_entropy(average(x), y).backward()
    assert flat(average.module.parameters()).isfinite().all()
    second = make("kfac", copy.deepcopy(model))
    train(second, [lambda: functional.cross_entropy(second.model(x), y)])


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_clear():
    model = copy.deepcopy(CASES["mlp"]().model)
    for options, kind, words in (
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping": float("inf")}, ValueError, "damping"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"kl_clip": -1.0}, ValueError, "kl_clip"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"factors": 0}, ValueError, "factors"),
        ({"fisher": "true"}, ValueError, "empirical"),
        ({"fallback": "adam"}, ValueError, "adamw"),
        ({"weight_sharing": "none"}, ValueError, "reduce"),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"params": [{"params": "encoder.*"}]}, ValueError, "encoder"),
        ({"params": [{"params": "0.*", "rate": 1.0}]}, ValueError, "rate"),
        ({"params": [{"lr": 1.0}]}, ValueError, "modules"),
        ({"params": [{"params": "0.*", "modules": [model[0]]}]}, ValueError, "modules"),
    ):
        with pytest.raises(kind, match=words):
            make("kfac", model, **options)
    for options in ({"refresh": 10}, {"refresh": {"factors": 1}}, {"step_rule": "lr"}):
        with pytest.raises(TypeError, match="must be a natgrad"):
            natgrad.KFAC(model, **options)
    with pytest.raises(TypeError, match="must be a natgrad.Refresh"):
        natgrad.Preconditioner(model, refresh=10)
    with pytest.raises(TypeError, match="model"):
        natgrad.KFAC(model.parameters())
    with pytest.raises(ValueError, match="categorical"):
        natgrad.KFAC(model, "softmax")
    with pytest.raises(ValueError, match="decay=0"):
        make("full", model, decay=0.9)
    with pytest.raises(ValueError, match="trainable"):
        make("kfac", copy.deepcopy(model).requires_grad_(False))
    exact, kfac = make("full", model), make("kfac", model)
    with pytest.raises(ValueError, match="structure"):
        kfac.load_state_dict(exact.state_dict())
    with pytest.raises(ValueError, match="natgrad"):
        kfac.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    other = make("kfac", nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).double())
    with pytest.raises(ValueError):
        kfac.load_state_dict(other.state_dict())


def test_a_wrong_class_dim_is_found_in_training():
    model = nn.Conv1d(3, 4, 1).double()  # output (N, C, T): classes along dimension 1
    optimizer = make("kfac", model, fisher="exact")
    x, y = normal(2, 3, 5), torch.randint(0, 4, (2, 5), generator=generator(0))
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert optimizer.preconditioner.observer.likelihood.class_dim == 1


@pytest.mark.parametrize("depth", [2, 5])
def test_tridiagonal_depth_is_an_error_without_damping(depth):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(depth)]
    model = nn.Sequential(*layers).double()
    optimizer = make("block_tridiagonal", model, "gaussian", damping=0.0)
    with pytest.raises((ValueError, RuntimeError), match=rf"\b{depth}\b.*damping"):
        train(optimizer, [lambda: model(normal(2, 4)).square().mean()])


def test_single_layer_models_have_names():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = make("kfac", model)
    case = Case(model, normal(4, 3), (rows("", "weight", "bias"),))
    train(optimizer, [lambda: functional.cross_entropy(model(case.x), torch.tensor([0, 1, 1, 0]))])
    assert "Linear" in str(optimizer.summary())


def test_a_backward_pass_without_a_step_leaves_no_trace():
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    optimizers = [make("kfac", model, fisher="mc", momentum=0.9) for model in models]
    abandoned = optimizers[1]
    functional.cross_entropy(models[1](3 * x), y).backward()
    abandoned.zero_grad()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(optimizer, [lambda: functional.cross_entropy(model(x), y)])  # noqa: B023
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


def test_gradients_may_be_reset_between_forward_and_backward():
    case = CASES["mlp"]()
    x, y = case.x, case.target("categorical")
    models = [copy.deepcopy(case.model) for _ in range(2)]
    for early, model in enumerate(models):
        optimizer = make("kfac", model, fisher="exact")
        if early:
            optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        if not early:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))
