"""Every optimizer of the library, made and stepped in the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import natgrad
from tests.cases import generator
from tests.methods import make_optimizer


@dataclass(frozen=True)
class Kind:
    """A class of optimizers, with options.

    Attributes:
        cls: The class.
        options: Its options, those of groups by their own names.
        takes: What it is made from: a ``"model"``, its ``"parameters"`` or ``"residuals"``.
        needs_closure: Whether ``step()`` refuses to go without one.
    """

    cls: type[torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    takes: str = "model"
    needs_closure: bool = False

    def make(self, model: nn.Module, **changes: Any) -> Any:
        """Return an optimizer of :func:`loss`."""
        options = {**self.options, **changes}
        if self.takes == "model":
            return make_optimizer(self.cls, model, "gaussian", **options)
        if self.takes == "residuals":
            points, target = (values.to(next(iter(model.parameters()))) for values in (X, Y))
            residual = natgrad.Residual(lambda u, x, y: u(x) - y, points, target)
            return self.cls(model, residual, **options)  # type: ignore[call-arg]
        return self.cls(model.parameters(), **options)

    def step(self, optimizer: Any, model: nn.Module, by_closure: bool | None = None) -> Any:
        """Take one step on the whole data."""
        if self.takes == "residuals":
            return optimizer.step()

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        if self.needs_closure if by_closure is None else by_closure:
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    @property
    def is_natural(self) -> bool:
        """Whether it is a composition of a structure and a step rule."""
        return issubclass(self.cls, natgrad.NaturalGradient)


NATURAL = [
    natgrad.NaturalGradient, natgrad.KFAC, natgrad.EKFAC, natgrad.TKFAC, natgrad.TEKFAC,
    natgrad.KPSVD, natgrad.TwoLevelKFAC, natgrad.SINGD, natgrad.ExactNGD, natgrad.BlockDiagonalNGD,
    natgrad.BlockTridiagonalNGD, natgrad.UnitWiseNGD, natgrad.DiagonalNGD,
    natgrad.ConjugateGradientNGD, natgrad.ThermodynamicNGD, natgrad.ImprovedEmpiricalNGD,
]  # fmt: skip

#: A length that is the learning rate, bounded.
PLAIN: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "damping": 1e-4, "kl_clip": 5e-5}

KINDS: dict[str, Kind] = {
    **{cls.__name__: Kind(cls) for cls in NATURAL},
    "EGN": Kind(natgrad.EGN, needs_closure=True),
    "FNGD": Kind(natgrad.FNGD, {"coefficient_steps": 3}),
    "KFAC, plain": Kind(natgrad.KFAC, {**PLAIN, "nesterov": True}),
    "KFAC, graft": Kind(natgrad.KFAC, {**PLAIN, "graft": "adam", "nesterov": True}),
    "KFAC, quadratic model": Kind(natgrad.KFAC, {**PLAIN, "length": "quadratic_model"}),
    "KFAC, adaptive damping": Kind(
        natgrad.KFAC, {"damping": natgrad.LevenbergMarquardt(interval=2)}, needs_closure=True
    ),
    "KFAC, fused": Kind(natgrad.KFAC, {"fused": True}),
    "SINGD, bfloat16": Kind(natgrad.SINGD, {"factor_dtype": torch.bfloat16}),
    "SINGD, diagonal": Kind(natgrad.SINGD, {"factor_structures": "diagonal"}),
    "ExactNGD, line search": Kind(
        natgrad.ExactNGD, {"length": natgrad.LineSearch()}, needs_closure=True
    ),
    "ExactNGD, adaptive damping": Kind(
        natgrad.ExactNGD, {"damping": natgrad.LevenbergMarquardt(interval=1)}, needs_closure=True
    ),
    "Padam": Kind(natgrad.Padam, takes="parameters"),
    "ImplicitSGD": Kind(natgrad.ImplicitSGD, {"lr": 0.1}, takes="parameters", needs_closure=True),
    "ResidualNGD": Kind(natgrad.ResidualNGD, {"momentum": 0.3}, takes="residuals"),
}

#: One of each way to take a step; structures alone make no other.
STEPS = [
    "KFAC", "KFAC, plain", "KFAC, quadratic model", "KFAC, adaptive damping", "KFAC, fused",
    "SINGD", "ExactNGD", "ExactNGD, line search", "EGN", "FNGD", "Padam", "ImplicitSGD",
    "ResidualNGD",
]  # fmt: skip

X = torch.randn(12, 5, generator=generator(0)).double()
Y = torch.randn(12, 3, generator=generator(1)).double()


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Return a network, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def loss(model: nn.Module) -> Tensor:
    """Return the loss of a model on all data."""
    first = next(iter(model.parameters()))
    x, y = X.to(first), Y.to(first)
    return 0.5 * (model(x) - y).square().sum(1).mean()


def weights(model: nn.Module) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
