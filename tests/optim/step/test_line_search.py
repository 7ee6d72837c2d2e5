"""Line search for every structure, against an independent step-by-step search in float64."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.optim.step.line_search import LineSearch
from tests import dense, pairwise, processes
from tests.cases import CASES, generator, normal
from tests.optim.test_optimizers import OPTIMIZERS, Reference, batches_of, make
from tests.state import check_resumes, flat

STRUCTURES = ["full", "block_diagonal", "kfac", "diagonal"]
SEARCH: dict[str, Any] = {"length": natgrad.LineSearch(), "fisher": "exact", "lr": 4.0}


def closure_of(
    optimizer, model: nn.Module, x: Tensor, y: Tensor, backward: bool = True,
    losses: list[float] | None = None,
) -> Callable[[], Any]:  # fmt: skip
    """The closure torch describes, or one that leaves the backward pass to the optimizer."""

    def closure() -> Tensor:
        if backward:
            optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        if backward:
            loss.backward()
        if losses is not None:
            losses.append(float(loss.detach()))
        return loss

    return closure


def at(model: nn.Module, theta: Tensor, loss: Callable[[nn.Module], Tensor]) -> float:
    """The loss at other parameters."""
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(theta, there.parameters())
    return float(loss(there).detach())


def first_sufficient(loss: Callable[[float], float], slope: float, lr: float, c: float = 1e-4):
    for power in range(10):
        t = lr * 0.5**power
        if loss(t) <= loss(0.0) - c * t * slope:
            return t
    return 0.0


def least_before_rise(loss: Callable[[float], float], slope: float, lr: float):
    found = 0.0
    for power in range(10):
        t = lr * 0.5**power
        if loss(t) < loss(found):
            found = t
        elif found:
            break
    return found


SEARCHES = {"armijo": first_sufficient, "best": least_before_rise}


class Searched:
    """Natural gradient descent with dense matrices, momentum and a search of its own."""

    def __init__(self, case, structure: str, *, lr=4.0, momentum=0.0, nesterov=False, rule="armijo",
                 before=False, decay=0.0, penalty=0.0, damping=0.05) -> None:  # fmt: skip
        self.reference = Reference(
            case, structure, "exact", dense.categorical(), damping=damping + penalty
        )
        self.model, self.structure = self.reference.model, structure
        self.lr, self.momentum, self.nesterov, self.rule = lr, momentum, nesterov, rule
        self.before, self.decay, self.penalty = before, decay, penalty
        self.buffer: Tensor | None = None
        self.forgotten = 0

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        square = sum(p.square().sum() for p in model.parameters())
        return functional.cross_entropy(model(x), y) + 0.5 * self.penalty * square

    def summed(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The next buffer and what it is used for."""
        if self.momentum == 0:
            return value, value
        buffer = value if self.buffer is None else self.momentum * self.buffer + value
        return buffer, value + self.momentum * buffer if self.nesterov else buffer

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take a step and return its length."""
        theta = flat(self.model.parameters())
        gradient = flat(
            torch.autograd.grad(self.loss(self.model, x, y), list(self.model.parameters()))
        )
        if self.before:
            buffer, looked_at = self.summed(gradient)
            direction = self.reference.natural_gradient(looked_at, [(x, y)])
        else:
            natural = self.reference.natural_gradient(gradient, [(x, y)])
            buffer, direction = self.summed(natural)
            if float(direction @ gradient) <= 0:
                self.forgotten += 1
                self.buffer = None
                buffer, direction = self.summed(natural)
        slope, length = float(direction @ gradient), 0.0
        if slope > 0:
            length = SEARCHES[self.rule](
                lambda t: at(self.model, theta - t * direction, lambda m: self.loss(m, x, y)),
                slope,
                self.lr,
            )
        self.buffer = buffer if length else None
        moved = theta * (1 - length * self.decay) - length * direction
        nn.utils.vector_to_parameters(moved, self.model.parameters())
        return length


def compare_runs(case, structure: str, steps: int = 6, scale: float = 1.0, **options: Any) -> list:
    """Train both ways and return the lengths."""
    model = copy.deepcopy(case.model)
    given = SEARCH | {"length": LineSearch(options.get("rule", "armijo"))}
    for name in ("lr", "momentum", "nesterov"):
        if name in options:
            given[name] = options[name]
    if options.get("before"):
        given["momentum_on"] = "gradient"
    if options.get("decay") or options.get("penalty"):
        mode = "decoupled" if options.get("decay") else "model"
        given |= {"weight_decay": options.get("decay") or options["penalty"]}
        given |= {"weight_decay_mode": mode}
    optimizer = make(structure, model, **given)
    reference = Searched(case, structure, **options)
    lengths = []
    for x, y in batches_of(case, "categorical", steps):
        optimizer.step(closure_of(optimizer, model, scale * x, y))
        lengths.append(reference.step(scale * x, y))
        assert optimizer.searched_share == lengths[-1] / given["lr"]
        dense.assert_same(flat(model.parameters()), flat(reference.model.parameters()), 1e-7)
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in model.parameters()]
        assert all((b is None) == (reference.buffer is None) for b in buffers) or not options.get(
            "momentum"
        )
    return lengths


# -- the step --------------------------------------------------------------------------------------


@pairwise.parametrize(
    {"structure": list(OPTIMIZERS), "rule": ["armijo", "best"], "momentum": [0.0, 0.8]}
)
def test_steps_are_those_of_a_dense_search(structure, rule, momentum):
    lengths = compare_runs(
        CASES["mlp"](), structure, rule=rule, momentum=momentum, lr=16.0, scale=2.0
    )
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nesterov_and_decays(structure):
    case = CASES["mlp"]()
    for options in (
        {"momentum": 0.9, "nesterov": True},
        {"decay": 0.1, "momentum": 0.5},
        {"penalty": 0.1, "momentum": 0.5},
        {"penalty": 0.2, "rule": "best"},
    ):
        assert any(compare_runs(case, structure, lr=8.0, **options))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_momentum_before_preconditioning(structure, nesterov):
    options = {"lr": 1.0, "momentum": 0.95, "nesterov": nesterov}
    assert any(compare_runs(CASES["mlp"](), structure, steps=8, before=True, **options))


@pytest.mark.parametrize("before", [False, True])
def test_momentum_that_would_ascend_is_forgotten(before):
    """The labels turn round, so that the sum of past steps leads uphill."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    on = "gradient" if before else "natural_gradient"
    options = {**SEARCH, "lr": 0.1, "momentum": 0.99, "momentum_on": on}
    optimizer = make("full", model, **options)
    reference = Searched(case, "full", lr=0.1, momentum=0.99, before=before)
    x, targets = case.x, [torch.zeros(4, dtype=torch.long)] * 3 + [torch.ones(4, dtype=torch.long)]
    for y in targets[: len(targets)]:
        y = y.repeat(len(x))[: len(x)]
        optimizer.step(closure_of(optimizer, model, x, y))
        length = reference.step(x, y)
        assert optimizer.searched_share == length / 0.1
        dense.assert_same(flat(model.parameters()), flat(reference.model.parameters()), 1e-7)
    if before:  # The direction itself is the sum's, so the step waits for the next gradient.
        assert length == 0.0 and reference.buffer is None
        optimizer.step(closure_of(optimizer, model, x, y))
        reference.step(x, y)
        dense.assert_same(flat(model.parameters()), flat(reference.model.parameters()), 1e-7)
    else:
        assert length > 0.0 and reference.forgotten == 1
    assert optimizer.searched_share > 0


def test_groups_are_shortened_by_one_factor():
    case = CASES["mlp"]()
    x, y = 3.0 * case.x, case.target("categorical")
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    groups = [{"params": "0.*", "lr": 30.0, "weight_decay": 0.01}]
    options: dict[str, Any] = {"fisher": "exact", "lr": 5.0, "params": groups}
    optimizer = make("block_diagonal", model, length=natgrad.LineSearch(), **options)
    optimizer.step(closure_of(optimizer, model, x, y))
    share = optimizer.searched_share
    assert 0 < share < 1
    groups[0]["lr"] *= share
    other = make("block_diagonal", plain, **(options | {"lr": 5.0 * share}))
    other.step(closure_of(other, plain, x, y))
    dense.assert_same(flat(model.parameters()), flat(plain.parameters()), 1e-12)
    # The length before was too long for this loss.
    theta, decayed = flat(case.model.parameters()), flat(plain.parameters())
    twin = copy.deepcopy(case.model)
    for p, q in zip(twin[0].parameters(), case.model[0].parameters(), strict=True):
        p.data = q.data * (1 - 30.0 * share * 0.01)
    step = decayed - flat(twin.parameters())
    before = at(model, theta, lambda m: functional.cross_entropy(m(x), y))
    losses = [
        at(model, theta + factor * step, lambda m: functional.cross_entropy(m(x), y))
        for factor in (1.0, 2.0)
    ]
    assert losses[0] < before and not losses[1] < before


@pytest.mark.parametrize("graft", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [{}, {"kl_clip": 1e-3}, {"norm_clip": 1e-2}])
def test_a_step_that_lowers_the_loss_at_once_is_that_of_the_learning_rate(graft, clip):
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    options = {"lr": 0.01, "momentum": 0.9, "graft": graft, "weight_decay": 0.1, **clip}
    searched = make("kfac", models[0], length=natgrad.LineSearch(), **options)
    plain = make("kfac", models[1], **options)
    x, y = case.x, case.target("categorical")
    for _ in range(4):
        searched.step(closure_of(searched, models[0], x, y))
        plain.step(closure_of(plain, models[1], x, y))
        assert searched.searched_share == 1.0
        assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


def test_the_isotropic_rate_is_the_first_length():
    case = CASES["mlp"]()
    model, other = copy.deepcopy(case.model), copy.deepcopy(case.model)
    x, y = case.x, case.target("categorical")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The network is narrow.
        searched = make("full", model, **(SEARCH | {"lr": "isotropic"}))
        searched.step(closure_of(searched, model, x, y))
        plain = make("full", other, lr="isotropic", fisher="exact")
        plain.step(closure_of(plain, other, x, y))
    step = flat(other.parameters()) - flat(case.model.parameters())
    moved = flat(model.parameters()) - flat(case.model.parameters())
    assert searched.searched_share > 0
    dense.assert_same(moved, searched.searched_share * step, 1e-9)


def test_warm_up_and_fallback():
    """During the warm-up nothing is searched; the fallback steps with its own gradient."""
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizer = make(
        "kfac", model, **SEARCH, warmup=2, decay=0.9, fallback=natgrad.Fallback("adamw", 0.01),
        params=[{"params": "0.*", "preconditioned": False}],
    )  # fmt: skip
    adamw = torch.optim.AdamW(twin[0].parameters(), lr=0.01)
    losses: list[float] = []
    for step, (x, y) in enumerate(batches_of(case, "categorical", 4)):
        twin[2:].load_state_dict(model[2:].state_dict())
        before = flat(model[2:].parameters())
        optimizer.step(closure_of(optimizer, model, x, y, step % 2 == 0, losses))
        adamw.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        adamw.step()
        dense.assert_same(flat(model[0].parameters()), flat(twin[0].parameters()), 1e-12)
        if step < 2:
            assert torch.equal(flat(model[2:].parameters()), before)
            assert optimizer.searched_share is None and len(losses) == step + 1
    assert optimizer.searched_share > 0 and len(losses) > 4


# -- when trials fail ------------------------------------------------------------------------------


@pairwise.parametrize(
    {"structure": STRUCTURES, "rule": ["armijo", "best"], "bad": [math.nan, math.inf, -math.inf]}
)
def test_losses_that_are_not_finite_are_passed_over(structure, rule, bad):
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    x, y = case.x, case.target("categorical")
    optimizer = make(structure, model, **(SEARCH | {"lr": 0.4}), rule=rule)
    losses: list[float] = []
    plain = closure_of(optimizer, model, x, y, losses=losses)

    def closure() -> Any:
        loss = plain()
        return bad if len(losses) in (2, 3) else loss

    optimizer.step(closure)
    shorter = make(structure, twin, **(SEARCH | {"lr": 0.1}), rule=rule)
    shorter.step(closure_of(shorter, twin, x, y))
    assert optimizer.searched_share == 0.25 * shorter.searched_share > 0
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pairwise.parametrize(
    {"structure": STRUCTURES, "rule": ["armijo", "best"], "adaptive": [False, True]}
)
def test_without_a_decrease_nothing_moves(structure, rule, adaptive):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    rule_of = natgrad.LevenbergMarquardt(0.05, interval=4, decay=0.9)
    optimizer = make(
        structure, model, **(SEARCH | {"lr": 0.1}), momentum=0.9, weight_decay=0.3,
        damping=rule_of if adaptive else 0.05,
        rule=rule, max_trials=3,
    )  # fmt: skip
    data = batches_of(case, "categorical", 3)
    optimizer.step(closure_of(optimizer, model, *data[0]))
    assert "momentum_buffer" in optimizer.state[model[0].weight]
    losses: list[float] = []
    plain = closure_of(optimizer, model, *data[1], losses=losses)
    before = [p.detach().clone() for p in model.parameters()]
    gradients: list[Tensor] = []

    def closure() -> Any:
        loss = plain()
        if len(losses) == 1:
            gradients.extend(p.grad.clone() for p in model.parameters())
        return loss + (0.0 if len(losses) == 1 else 1.0)

    optimizer.step(closure)
    assert len(losses) == 4 and optimizer.searched_share == 0.0
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert torch.equal(p.view(torch.int64), old.view(torch.int64))  # signs of zeros, too
        assert torch.equal(p.grad, gradient)
        assert "momentum_buffer" not in optimizer.state[p]
    damping = optimizer.param_groups[0]["damping"]
    assert damping == pytest.approx(0.05 / 0.9**4 if adaptive else 0.05)
    optimizer.step(closure_of(optimizer, model, *data[2]))
    assert optimizer.searched_share > 0


def test_an_error_in_a_trial_leaves_the_parameters():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **SEARCH)
    losses: list[float] = []
    plain = closure_of(optimizer, model, case.x, case.target("categorical"), losses=losses)

    def closure() -> Any:
        loss = plain()
        if len(losses) == 3:
            raise KeyboardInterrupt
        return loss + 1.0 if len(losses) == 2 else loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))
    optimizer.step(closure)
    assert not torch.equal(flat(model.parameters()), flat(case.model.parameters()))


def test_a_failed_search_does_not_stop_the_fallback():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **SEARCH, params=[{"params": "0.*", "preconditioned": False}])
    losses: list[float] = []
    plain = closure_of(optimizer, model, case.x, case.target("categorical"), losses=losses)
    optimizer.step(lambda: plain() if not losses else plain() + 1.0)
    assert torch.equal(flat(model[2:].parameters()), flat(case.model[2:].parameters()))
    assert not torch.equal(flat(model[0].parameters()), flat(case.model[0].parameters()))


def test_a_loss_at_its_minimum_is_left_alone():
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **SEARCH)

    def closure() -> Tensor:
        return 0.0 * functional.cross_entropy(model(case.x), case.target("categorical"))

    for _ in range(2):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))


# -- evaluations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("trials", [1, 3, 6])
def test_the_closure_is_evaluated_once_per_length(trials, backward):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    optimizer = make("kfac", model, **(SEARCH | {"lr": 0.1}))
    passes: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: passes.append(1))
    losses: list[float] = []
    plain = closure_of(optimizer, model, case.x, case.target("categorical"), backward, losses)
    optimizer.step(lambda: plain() + (0.0 if len(losses) in (1, 1 + trials) else 9.0))
    assert len(losses) == 1 + trials
    assert optimizer.searched_share == 0.5 ** (trials - 1)
    # A closure that leaves the backward pass to the optimizer is not backpropagated in trials.
    assert len(passes) == (1 + trials if backward else 1)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_who_calls_backward_makes_no_difference(structure):
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    options = {**SEARCH, "momentum": 0.9, "fisher": "mc", "seed": 3}
    optimizers = [make(structure, model, **options) for model in models]
    for x, y in batches_of(case, "categorical", 4):
        losses = [
            optimizer.step(closure_of(optimizer, model, x, y, backward))
            for optimizer, model, backward in zip(optimizers, models, (True, False), strict=True)
        ]
        assert losses[0].item() == losses[1].item() and not losses[1].requires_grad
        assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


def test_closures_may_differentiate_with_respect_to_inputs():
    """Trials keep gradients switched on, as losses of differential equations need them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = make("kfac", model, nn.MSELoss(), **SEARCH)
    x = normal(20, 1).requires_grad_()

    def closure() -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope - 1.0).square().mean() + u.square().mean()

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("backward", [True, False])
def test_trials_leave_no_trace(backward):
    """Dropout draws the same masks; buffers, gradients and the random state are as after one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.Dropout(0.3)
    ).double()
    x, y = normal(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    optimizer = make("kfac", model, **(SEARCH | {"lr": 1e-7}))
    losses: list[float] = []
    plain = closure_of(optimizer, model, x, y, backward, losses)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    # All lengths fail, and the shortest are nearly none: with the same masks, the same loss.
    optimizer.step(lambda: plain() + (0.0 if len(losses) == 1 else 1.0))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    functional.cross_entropy(twin(x), y).backward()
    assert torch.equal(after, torch.get_rng_state())
    assert len(losses) == 11 and max(losses) - min(losses) < 1e-5
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        dense.assert_same(mine.grad, other.grad, 1e-12)
    assert (
        optimizer.preconditioner.observer.steps == 1 and not optimizer.preconditioner.capture.passes
    )


def test_gradients_from_before_the_step_are_dropped():
    """The slope is that of the loss the trials see."""
    case = CASES["mlp"]()
    models = [copy.deepcopy(case.model) for _ in range(2)]
    optimizers = [make("kfac", model, **SEARCH) for model in models]
    for step, (x, y) in enumerate(batches_of(case, "categorical", 3)):
        if step:
            functional.cross_entropy(models[0](-x), y).backward()
        for optimizer, model in zip(optimizers, models, strict=True):
            optimizer.step(closure_of(optimizer, model, x, y, backward=False))
        assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


# -- adaptive damping ------------------------------------------------------------------------------


@pairwise.parametrize(
    {"structure": ["full", "kfac"], "interval": [1, 2], "decay_mode": ["decoupled", "model"]}
)
def test_damping_follows_the_step_that_was_found(structure, interval, decay_mode):
    """The loss after the step is that of the search: no further evaluation."""
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model)
    rule = natgrad.LevenbergMarquardt(0.02, interval=interval, decay=0.7)
    penalty = 0.1 if decay_mode == "model" else 0.0
    decay = {"weight_decay": 0.1, "weight_decay_mode": decay_mode}
    optimizer = make(structure, model, **(SEARCH | {"lr": 6.0}), damping=rule, **decay)
    reference = Searched(
        case, structure, lr=6.0, penalty=penalty, decay=0.1 - penalty, damping=0.02
    )
    damping, ratios = 0.02, []
    for step, (x, y) in enumerate(batches_of(case, "categorical", 8)):
        losses: list[float] = []
        twin = copy.deepcopy(reference.model)
        theta = flat(twin.parameters())
        loss = reference.loss(twin, x, y)
        gradient = flat(torch.autograd.grad(loss, list(twin.parameters())))
        fisher = dense.fisher(twin, x, y, dense.categorical())
        reference.reference.damping = damping + penalty
        length = reference.step(x, y)
        optimizer.step(closure_of(optimizer, model, x, y, losses=losses))
        assert optimizer.searched_share == length / 6.0 > 0
        assert len(losses) == 2 + round(math.log2(6.0 / length))
        dense.assert_same(flat(model.parameters()), flat(reference.model.parameters()), 1e-6)
        if (step + 1) % interval == 0:
            kept = 1.0 - length * reference.decay
            change = flat(reference.model.parameters()) - kept * theta
            curvature = fisher + (damping + penalty) * torch.eye(len(fisher), dtype=x.dtype)
            predicted = float(0.5 * change @ curvature @ change + gradient @ change)
            actual = at(twin, theta + change, lambda m: reference.loss(m, x, y)) - loss.item()  # noqa: B023
            ratios.append(actual / predicted if predicted < 0 else -math.inf)
            factor = 0.7**interval
            damping *= factor if ratios[-1] > 0.75 else 1 / factor if ratios[-1] < 0.25 else 1.0
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-6)
    assert max(ratios) > 0.75 or min(ratios) < 0.25


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_checkpoints_resume_exactly(structure, kind):
    case = CASES["mlp"]()
    data = batches_of(case, "categorical", 5)
    options = SEARCH | {
        "fisher": kind, "momentum": 0.9, "graft": "adam", "length": natgrad.LineSearch("best"),
        "damping": natgrad.LevenbergMarquardt(0.1, 2),
    }  # fmt: skip

    def fresh(seed: int) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(case.model)
        return model, make(structure, model, **options, seed=seed)

    def step(model: nn.Module, optimizer: Any, number: int) -> None:
        optimizer.step(closure_of(optimizer, model, *data[number]))

    whole = check_resumes(fresh, step, 5, (0, 3) if kind == "exact" else (1, 2))
    twin = copy.deepcopy(whole)
    for pair in (whole, twin):
        step(*pair, 0)
    assert torch.equal(flat(twin[0]), flat(whole[0]))


def test_a_bad_batch_is_skipped():
    case = CASES["mlp"]()
    model, twin = copy.deepcopy(case.model), copy.deepcopy(case.model)
    optimizers = [make("kfac", m, **SEARCH, momentum=0.9) for m in (model, twin)]
    for step, (x, y) in enumerate(batches_of(case, "categorical", 4)):
        if step == 2:
            losses: list[float] = []
            with pytest.warns(UserWarning, match="skipped"):
                optimizers[0].step(closure_of(optimizers[0], model, x * math.nan, y, losses=losses))
            assert len(losses) == 1
        for optimizer, m in zip(optimizers, (model, twin), strict=True):
            optimizer.step(closure_of(optimizer, m, x, y))
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


# -- replicas --------------------------------------------------------------------------------------


def replica_batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    seed = 10 * step + rank
    return 3.0 * normal(4, 3, seed=seed), torch.randint(0, 3, (4,), generator=generator(seed))


def replica(rank: int) -> dict[str, Any]:
    """Search on batches of one's own, with either kind of closure."""
    result, case = {}, CASES["mlp"]()
    for backward in (True, False):
        for views in (True, False):
            model = nn.parallel.DistributedDataParallel(
                copy.deepcopy(case.model), gradient_as_bucket_view=views
            )
            optimizer = make("kfac", model, **(SEARCH | {"lr": 30.0}), momentum=0.5)
            shares = []
            for step in range(4):
                x, y = replica_batch(rank, step)
                optimizer.step(closure_of(optimizer, model, x, y, backward))
                shares.append(optimizer.searched_share)
            result[f"{backward}{views}"] = (flat(model.parameters()), shares)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(case.model))
    egn = natgrad.EGN(model, lr=4.0, damping=1e-3)
    losses = [
        egn.step(closure_of(egn, model, *replica_batch(rank, step), backward=False))
        for step in range(4)
    ]
    result["egn"] = (flat(model.parameters()), [egn.param_groups[0]["damping"]])
    assert all(map(math.isfinite, losses))
    return result


@pytest.mark.slow
def test_replicas_take_the_same_length():
    first, second = processes.run(replica)
    for name, (parameters, shares) in first.items():
        assert torch.equal(parameters, second[name][0]) and shares == second[name][1]
        if name != "egn":
            dense.assert_same(parameters, first["TrueFalse"][0], 1e-9)
            assert any(0 < share < 1 for share in shares)


# -- the search itself -----------------------------------------------------------------------------


def searched(search: LineSearch, loss: Callable[[float], float], slope: float, length: float):
    """The result, the lengths moved to, and the lengths evaluated."""
    moved: list[float] = []
    tried: list[float] = []

    def evaluate() -> float:
        tried.append(moved[-1])
        return loss(moved[-1])

    found = search.search(moved.append, evaluate, loss(0.0), slope, length)
    assert moved[-1] == found[0]
    return found, tried


def test_lengths_of_the_search():
    def bowl(t: float) -> float:
        return (t - 1.0) ** 2

    found, tried = searched(LineSearch("armijo"), bowl, 2.0, 16.0)
    assert tried == [16.0, 8.0, 4.0, 2.0, 1.0] and found == (1.0, 0.0)
    found, tried = searched(LineSearch("armijo", armijo=0.6), bowl, 2.0, 2.0)
    assert tried == [2.0, 1.0, 0.5] and found[0] == 0.5
    found, tried = searched(LineSearch("best", backtracking=0.8), bowl, 2.0, 1.9)
    assert len(tried) == 5 and found[0] == pytest.approx(1.9 * 0.8**3)
    found, tried = searched(LineSearch("best", max_trials=2), bowl, 2.0, 16.0)
    assert tried == [16.0, 8.0] and found == (0.0, 1.0)
    for rule in ("armijo", "best"):
        for bad in (math.nan, math.inf, -math.inf):
            found, tried = searched(LineSearch(rule), lambda t: bad if t else 1.0, 1.0, 1.0)  # noqa: B023
            assert found == (0.0, 1.0) and len(tried) == 10


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_clear():
    case = CASES["mlp"]()
    model, y = copy.deepcopy(case.model), case.target("categorical")
    for options, words in (
        ({"length": "search"}, "natgrad.LineSearch"),
        ({**SEARCH, "length": True}, "quadratic_model"),
        ({"fused": True, "length": natgrad.LineSearch()}, "a line search"),
    ):
        with pytest.raises(ValueError, match=words):
            make("kfac", model, **options)
    for wrong in ({"backtracking": 1.0}, {"armijo": 1.0}, {"max_trials": 0}, {"rule": "wolfe"}):
        with pytest.raises(ValueError):
            LineSearch(**wrong)
    optimizer = make("kfac", model, **SEARCH)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with torch.no_grad(), pytest.raises(ValueError, match="neither"):
        optimizer.step(lambda: float(model(case.x).detach().sum()))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(functional.cross_entropy(model(case.x), y)).backward()
    with pytest.raises(ValueError, match="GradScaler"):
        scaler.step(optimizer)
    assert torch.equal(flat(model.parameters()), flat(case.model.parameters()))
