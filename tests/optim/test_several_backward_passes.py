"""Every loss of an output may have a backward pass of its own: the step is that of their sum."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import pairwise
from tests.cases import normal

Losses = Callable[[nn.Module, Tensor], list[Tensor]]
Way = Callable[[list[Tensor], list[Tensor]], None]

METHODS = {
    "kfac": natgrad.KFAC,
    "kfac_exact": functools.partial(natgrad.KFAC, fisher="exact"),
    "kfac_empirical": functools.partial(natgrad.KFAC, fisher="empirical"),
    "isotropic": functools.partial(natgrad.KFAC, lr="isotropic"),
    "ekfac": natgrad.EKFAC,
    "exact_ngd": natgrad.ExactNGD,
    "singd": natgrad.SINGD,
    "improved": natgrad.ImprovedEmpiricalNGD,
    "fngd": natgrad.FNGD,
}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.label, self.size = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.label(h), self.size(h)


def heads(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the losses of two heads."""
    label, size = model(x)
    y = torch.arange(len(x)) % 3
    return [functional.cross_entropy(label, y), functional.mse_loss(size, x[:, :2].sin())]


def halves(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the losses of two halves of a batch."""
    out = model(x)
    y, middle = torch.arange(len(x)) % 3, len(x) // 2
    parts = (slice(None, middle), slice(middle, None))
    return [functional.cross_entropy(out[part], y[part]) / 2 for part in parts]


def together(losses: list[Tensor], parameters: list[Tensor]) -> None:
    sum(losses[1:], losses[0]).backward()


def one_by_one(losses: list[Tensor], parameters: list[Tensor]) -> None:
    for loss in losses:
        loss.backward(retain_graph=True)


def asked_for(losses: list[Tensor], parameters: list[Tensor]) -> None:
    """Compare the gradients of the losses, and put together what becomes ``.grad``."""
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def looked_at_before(losses: list[Tensor], parameters: list[Tensor]) -> None:
    for loss in losses:
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    together(losses, parameters)


def looked_at_after(losses: list[Tensor], parameters: list[Tensor]) -> None:
    sum(losses[1:], losses[0]).backward(retain_graph=True)
    torch.autograd.grad(losses[0], parameters, allow_unused=True)


def trained(name: str, losses: Losses, way: Way, passes: int) -> Tensor:
    """Return the weights after three steps."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = (TwoHeads() if losses is heads else plain).double()
    likelihood = {0: "categorical", 1: nn.MSELoss()} if losses is heads else "categorical"
    optimizer = METHODS[name](model, likelihood)
    for step in range(3):
        optimizer.zero_grad()
        for number in range(passes):
            x = normal(12, 4, seed=10 * step + number)
            way(losses(model, x), list(model.parameters()))
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@functools.cache
def trained_together(name: str, losses: Losses, passes: int) -> Tensor:
    return trained(name, losses, together, passes)


@pytest.mark.filterwarnings("ignore:the coefficients of")
@pairwise.parametrize(
    {
        "name": METHODS,
        "losses": [heads, halves],
        "way": [one_by_one, asked_for, looked_at_before, looked_at_after],
        "passes": [1, 2],
    }
)
def test_the_step_is_that_of_the_sum(name, losses, way, passes):
    found = trained(name, losses, way, passes)
    torch.testing.assert_close(found, trained_together(name, losses, passes))


Look = Callable[[nn.Module, str], None]


def trained_with(name: str, look: Look, resets_first: bool = True) -> tuple[Tensor, list[str]]:
    """Return parameters after three steps, and warnings, with looks at ``"start"`` and at steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = METHODS[name](model, "categorical")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        look(model, "start")
        for step in range(3):
            if resets_first:
                optimizer.zero_grad()
            look(model, "before")
            one_by_one(halves(model, normal(12, 4, seed=step)), [])
            look(model, "after")
            optimizer.step()
            if not resets_first:
                optimizer.zero_grad()
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    return parameters, [str(one.message) for one in told]


def no_look(model: nn.Module, when: str) -> None:
    """Train alone."""


def gradients_of_samples(model: nn.Module, when: str) -> None:
    """Look at the gradients of some samples, or at a product with the Hessian."""
    if when == "start":
        return
    parameters = list(model.parameters())
    loss = functional.cross_entropy(model(normal(5, 4, seed=9)), torch.arange(5) % 3)
    found = torch.autograd.grad(loss, parameters, create_graph=when == "after")
    if when == "after":
        torch.autograd.grad(sum(g.square().sum() for g in found), parameters)


def derivatives_of_output(model: nn.Module, when: str) -> None:
    """Look at what is the gradient of no loss before training."""
    if when == "start":
        torch.autograd.grad(model(normal(5, 4, seed=9)).sum(), list(model.parameters()))


@pytest.mark.parametrize("resets_first", [False, True])
@pytest.mark.parametrize("look", [gradients_of_samples, derivatives_of_output])
@pytest.mark.parametrize("name", list(METHODS))
def test_gradients_of_other_passes_that_are_only_looked_at_are_no_part(name, look, resets_first):
    plain = trained_with(name, no_look, resets_first)
    looked = trained_with(name, look, resets_first)
    assert torch.equal(plain[0], looked[0])
    assert looked[1] == plain[1]


@pytest.mark.parametrize("when", ["before", "inside", "after"])
@pytest.mark.parametrize("name", list(METHODS))
def test_gradients_at_inputs_by_the_pass_that_trains_are_no_part(name, when):
    """As saliency maps are, and implicit derivatives in a hook of the backward pass itself."""

    def train(looks: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = METHODS[name](model, "categorical")
        hidden: list[Tensor] = []
        model[1].register_forward_hook(lambda module, given, made: hidden.insert(0, made))
        for step in range(3):
            optimizer.zero_grad()
            x = normal(12, 4, seed=step).requires_grad_()
            out = model(x)
            loss = functional.cross_entropy(out, torch.arange(12) % 3)

            squares, looking = out.square().sum(), [not looks]

            def look(_: Tensor | None = None) -> None:
                if not any(looking):  # noqa: B023
                    looking.append(True)  # noqa: B023
                    torch.autograd.grad(squares, x, retain_graph=True)  # noqa: B023

            if when == "before":
                look()
            elif when == "inside":
                hidden[0].register_hook(look)
            loss.backward(retain_graph=True)
            if when == "after":
                look()
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    assert torch.equal(train(True), train(False))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("name", ["kfac", "kfac_exact", "ekfac", "exact_ngd", "singd"])
def test_second_derivatives_of_the_loss_are_no_gradient_of_it(name, way):
    """As those by which curvature is drawn, from a gradient whose graph was kept."""

    def train(looks: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer, parameters = METHODS[name](model, "categorical"), list(model.parameters())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*(natgrad|trains these)")
            for step in range(3):
                optimizer.zero_grad()
                x = normal(12, 4, seed=step)
                loss = functional.cross_entropy(model(x), torch.arange(12) % 3)
                if way == "backward":
                    loss.backward(create_graph=looks)
                    found = [one.grad for one in parameters]
                else:
                    found = torch.autograd.grad(loss, parameters, create_graph=looks)
                if looks:
                    torch.autograd.grad(found, parameters, [torch.ones_like(p) for p in parameters])
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient.detach()
                optimizer.step()
        return nn.utils.parameters_to_vector(parameters).detach()

    torch.testing.assert_close(train(True), train(False))


class Refined(nn.Module):
    """Classes given the probabilities that the last pass gave, as a rollout does with states."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        hidden = self.norm(self.body(torch.cat([x, before.softmax(1)], 1)))
        return self.head(torch.tanh(hidden))


def rolled_out(model: nn.Module, x: Tensor, losses: str) -> tuple[Tensor, Tensor]:
    """Return the logits that the loss is of, and the loss, after three passes in a row."""
    logits = [torch.zeros(len(x), 3, dtype=x.dtype)]
    for _ in range(3):
        logits.append(model(x, logits[-1]))
    z = torch.cat(logits[1:] if losses == "all" else logits[-1:])
    return z, functional.cross_entropy(z, torch.arange(len(z)) % 3)


@pytest.mark.parametrize("losses", ["all", "last"])
def test_outputs_that_are_inputs_of_later_passes_count_as_the_loss_sees_them(losses):
    """What later passes bring to an output is a part of their rows, and no loss of its own."""
    torch.manual_seed(0)
    model = Refined().double().eval()  # Batch statistics are constants in rows.
    optimizer = natgrad.ExactNGD(
        model, "categorical", fisher="exact", lr=1.0, damping=0.1, momentum=0.0, kl_clip=None
    )
    for step in range(2):
        x, twin = normal(4, 4, seed=step), copy.deepcopy(model)
        z, loss = rolled_out(twin, x, losses)
        own = list(twin.parameters())

        def flat(value: Tensor) -> Tensor:
            found = torch.autograd.grad(value, own, retain_graph=True)  # noqa: B023
            return torch.cat([one.flatten() for one in found])

        jacobian = torch.stack([flat(entry) for entry in z.flatten()]).unflatten(0, z.shape)
        p = z.detach().softmax(1)
        curvature = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        fisher = torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(z)
        damped = fisher + 0.1 * torch.eye(len(fisher), dtype=z.dtype)
        expected = nn.utils.parameters_to_vector(own) - torch.linalg.solve(damped, flat(loss))
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*(no loss of|does not come through)")
            rolled_out(model, x, losses)[1].backward()
            optimizer.step()
        torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), expected)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "singd", "fngd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_are_seen_in_a_rollout(name, dtype):
    torch.manual_seed(0)
    model = Refined().to(dtype)  # Batch statistics are differentiated in gradients.
    optimizer, x = METHODS[name](model), normal(12, 4).to(dtype)
    for _ in range(3):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*(no loss of|does not come through)")
            loss = rolled_out(model, x, "all")[1]
            loss.backward()
            optimizer.step()
    assert isinstance(optimizer.preconditioner.observer.likelihood, natgrad.Categorical)


def test_a_loss_whose_gradients_are_only_asked_for_is_told_of():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer, parameters = natgrad.KFAC(model, "categorical"), list(model.parameters())
    found = torch.autograd.grad(model(normal(5, 4, seed=9)).sum(), parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    with pytest.warns(UserWarning, match="does not sum to zero over the classes"):
        optimizer.step()


def test_a_backward_pass_that_comes_too_late_is_named():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = natgrad.KFAC(model)
    first, second = (halves(model, normal(12, 4, seed=seed)) for seed in (0, 1))
    one_by_one([first[0], second[0], second[1]], [])
    with pytest.warns(UserWarning, match="backpropagate all losses of a pass before the next"):
        first[1].backward()
    optimizer.step()
