"""The methods that can be compared: one registry, one entry per method.

To add a method, add one entry to `METHODS`. The entry holds all that distinguishes the method in a
comparison: its optimizer, where its learning rate comes from, its options, and how it is described.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import natgrad
from natgrad.curvature import Full
from natgrad.ntk.coefficients import ISOTROPIC_STRUCTURES, isotropic_constant
from natgrad.solvers import Thermodynamic

LearningRateRule = Literal["search", "theory", "measured", "default"]

WIDE_OPTIONS: dict[str, dict[str, Any]] = {
    "mse": {"damping": 1e-6, "momentum": 0.0, "kl_clip": None},
    "cross_entropy": {"damping": 1e-5, "momentum": 0.0, "kl_clip": 0.1},
}
"""Options of every natural method on the MLP with full batches, by loss. In wide networks the
squared error is nearly quadratic; cross-entropy is not, and its steps are bounded."""

BATCH_OPTIONS: dict[str, Any] = {"damping": 1e-3}
"""Options of every natural method on the MLP with mini-batches, whose Fisher matrix is small."""


@dataclass(frozen=True)
class Setting:
    """What learning rates and options depend on.

    `model` is None for a user's, of which no more is known than `epoch` (steps in which every
    sample is seen once), `damping`, `fisher` and `seed` (of sampled labels). None stands for each
    method's own damping and Fisher type, which is "exact" where `is_wide`. `depth` is the number of
    weight layers, `samples` those per step.
    """

    model: str | None = None
    loss: str = ""
    depth: int = 0
    width: int = 0
    input_dim: int = 0
    outputs: int = 0
    samples: int = 0
    full_batch: bool = False
    epoch: int = 1
    damping: float | None = None
    fisher: str | None = None
    seed: int = 0

    @property
    def is_wide(self) -> bool:
        """Whether the theory of wide networks applies: the MLP with full batches."""
        return self.model == "mlp" and self.full_batch


@dataclass(frozen=True)
class Method:
    """One entry of the comparison.

    On the MLP with full batches, where the theory of wide networks holds, a natural method runs
    with `WIDE_OPTIONS` and its own `options`, and its learning rate follows `rule`. On the MLP with
    mini-batches it runs with `BATCH_OPTIONS` and its own `batch_options`, and otherwise, as on
    other networks, with the defaults of its optimizer. On a user's model it runs with these
    defaults alone.

    Attributes:
        title: The name to print.
        optimizer: Its class, or what makes the optimizer likewise.
        description: What it does, in one sentence.
        rule: Where the learning rate comes from: a "search" on a grid, "theory" (1/α), the
            "measured" minimum of the quadratic model along the first direction, or the "default" of
            the optimizer.
        structure: For a natural method, the structure of its Fisher matrix, by default that of its
            optimizer; None for a first-order method.
        options: Options of the optimizer, of a natural one on top of `WIDE_OPTIONS`.
        cross_entropy_options: Further ones for the cross-entropy loss.
        batch_options: Options of the optimizer with mini-batches, on top of `BATCH_OPTIONS`.
        alone: Whether it takes on every built-in network its own `options` alone, and no Fisher
            type.
        epoch_option: Option that is given the number of steps of an epoch.
        takes_closure: Whether its steps take a closure that returns the loss.
        scale: Factor on the measured learning rate.
        grid: For "search", the exponents of ten between which the search begins.
    """

    title: str
    optimizer: Callable[..., torch.optim.Optimizer]
    description: str
    rule: LearningRateRule
    structure: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    cross_entropy_options: Mapping[str, Any] = field(default_factory=dict)
    batch_options: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    epoch_option: str | None = None
    takes_closure: bool = False
    scale: float = 1.0
    grid: tuple[int, int] = (-3, 1)

    def __post_init__(self) -> None:
        own = getattr(self.optimizer, "method", None)
        if self.structure is None and own is not None:
            object.__setattr__(self, "structure", own.structure.name)

    @property
    def is_natural(self) -> bool:
        """Whether the method preconditions with a Fisher matrix."""
        return self.structure is not None

    def build(
        self, model: nn.Module, lr: float, likelihood: str | natgrad.Likelihood, setting: Setting
    ) -> torch.optim.Optimizer:
        """Build the optimizer of a model, of a likelihood or its name, in a setting."""
        if not self.is_natural:
            return self.optimizer(model.parameters(), lr=lr, **self.options)
        options = {"seed": setting.seed, **self._options(setting)}
        if setting.damping is not None:
            own, options["damping"] = self._default("damping"), setting.damping
            if isinstance(own, natgrad.LevenbergMarquardt):  # A rule, which begins there.
                options["damping"] = dataclasses.replace(own, initial=setting.damping)
        if setting.fisher is not None and not self.alone:
            options["fisher"] = setting.fisher
        if self.epoch_option is not None:
            options[self.epoch_option] = setting.epoch
        return self.optimizer(model, likelihood, lr=lr, **options)

    def damping(self, setting: Setting) -> float | None:
        """Return the damping that the method runs with; None for a first-order method.

        It is λ, at the start if it adapts; of relative damping the share of the mean eigenvalue.
        """
        if not self.is_natural:
            return None
        if setting.damping is not None:
            return setting.damping
        damping = self._options(setting).get("damping", self._default("damping"))
        if isinstance(damping, natgrad.RelativeDamping):
            return damping.share
        initial: float = getattr(damping, "initial", damping)
        return initial

    def learning_rate_rule(self, setting: Setting) -> LearningRateRule:
        """Return where the learning rate comes from in a setting."""
        if setting.model is None and self.is_natural:
            return "default"
        return self.rule if self.rule in ("search", "default") or setting.is_wide else "default"

    def default_rate(self) -> float:
        """Return the learning rate that the optimizer of a natural method has by default."""
        rate: float = self._default("lr")
        return rate

    def theoretical_rate(self, setting: Setting) -> float | None:
        """Return 1/α of the isotropic condition without damping; None where there is none."""
        if not setting.is_wide or self.structure not in ISOTROPIC_STRUCTURES:
            return None
        assert self.structure is not None
        sizes = {name: getattr(setting, name) for name in ("outputs", "input_dim", "width")}
        return 1 / isotropic_constant(self.structure, setting.depth, setting.samples, **sizes)

    def _options(self, setting: Setting) -> dict[str, Any]:
        if setting.model is None:
            return {}
        if self.alone:
            return dict(self.options)
        if setting.model != "mlp":
            return {}
        if not setting.full_batch:
            return {**BATCH_OPTIONS, **self.batch_options}
        options = {**WIDE_OPTIONS[setting.loss], **self.options, "fisher": "exact"}
        return options if setting.loss == "mse" else {**options, **self.cross_entropy_options}

    def _default(self, option: str) -> Any:
        return inspect.signature(self.optimizer).parameters[option].default


# Curvature is that of the step's own batch.
_EVERY_STEP = {"refresh": natgrad.Refresh(factors=1, inverses=1, decay=0.0)}
_PLAIN_STEP = natgrad.StepRule(length="lr")

_searched = functools.partial(Method, rule="search")
_by_theory = functools.partial(Method, rule="theory")
_measured = functools.partial(Method, rule="measured")
_kronecker = functools.partial(
    _measured,
    options={**_EVERY_STEP, "momentum": 0.5, "step_rule": _PLAIN_STEP},
    batch_options={"damping": natgrad.RelativeDamping()},
)
"""A method with Kronecker factors: on wide networks it takes plain steps, as in the theory."""

METHODS: dict[str, Method] = {
    "sgd": _searched(
        "SGD", torch.optim.SGD, "Gradient descent with momentum 0.9.", options={"momentum": 0.9}
    ),
    "adamw": _searched(
        "AdamW",
        torch.optim.AdamW,
        "Adam with its default moments and no weight decay.",
        options={"weight_decay": 0.0},
        grid=(-4, 0),
    ),
    "exact": _by_theory(
        "Exact NGD", natgrad.ExactNGD, "The full Fisher matrix, inverted in sample space."
    ),
    "block-diagonal": _by_theory(
        "Block-diagonal NGD",
        natgrad.BlockDiagonalNGD,
        "One exact Fisher block per layer; no coupling between layers.",
    ),
    "block-tridiagonal": _by_theory(
        "Block-tridiagonal NGD",
        natgrad.BlockTridiagonalNGD,
        "Exact Fisher blocks of each layer and of neighbouring layers.",
        cross_entropy_options={"damping": 1e-2},  # less is singular: the matrix is indefinite
    ),
    "kfac": _kronecker(
        "K-FAC",
        natgrad.KFAC,
        "One Kronecker product per layer: covariance of inputs times that of output gradients.",
    ),
    "unit-wise": _measured(
        "Unit-wise NGD",
        natgrad.UnitWiseNGD,
        "One exact Fisher block per output unit of each layer.",
        options={**_EVERY_STEP, "momentum": 0.5},
        cross_entropy_options={"damping": 1e-4, "kl_clip": 1e-2},
    ),
    "diagonal": _measured(
        "Diagonal NGD",
        natgrad.DiagonalNGD,
        "Only the diagonal of the Fisher matrix.",
        options={**_EVERY_STEP, "damping": 1e-3, "momentum": 0.9},
        scale=0.5,
    ),
    "ekfac": _kronecker(
        "EKFAC", natgrad.EKFAC, "Second moments measured in the eigenbases of K-FAC's factors."
    ),
    "tkfac": _kronecker(
        "TKFAC",
        natgrad.TKFAC,
        "One Kronecker product per layer that keeps the trace of the layer's exact block.",
    ),
    "tekfac": _kronecker(
        "TEKFAC", natgrad.TEKFAC, "Second moments measured in the eigenbases of TKFAC's factors."
    ),
    "kpsvd": _kronecker(
        "KPSVD", natgrad.KPSVD, "The Kronecker product nearest to each layer's exact block."
    ),
    "two-level": _kronecker(
        "Two-level K-FAC",
        natgrad.TwoLevelKFAC,
        "K-FAC with a correction between layers on a coarse space.",
    ),
    "singd": _searched(
        "SINGD",
        natgrad.SINGD,
        "Kronecker factors of the inverse, kept up to date by products alone.",
        options={
            "refresh": natgrad.Refresh(factors=1, inverses=1),
            "damping": 1e-4,
            "momentum": 0.9,
            "kl_clip": 3e-5,
            "step_rule": natgrad.StepRule(length="lr", nesterov=True),
        },
        alone=True,
    ),
    "fngd": _searched(
        "FNGD",
        natgrad.FNGD,
        "Samples weighed by coefficients of the first epoch, at the cost of SGD.",
        structure="shared_coefficients",
        alone=True,
        epoch_option="coefficient_steps",
    ),
    "egn": Method(
        "EGN",
        natgrad.EGN,
        "Exact Gauss-Newton steps with line search and adaptive damping.",
        "default",
        options={"damping": natgrad.LevenbergMarquardt(0.1, interval=1, decay=0.5)},
        alone=True,
        takes_closure=True,
    ),
    "improved": _measured(
        "Improved empirical NGD",
        natgrad.ImprovedEmpiricalNGD,
        "The improved empirical Fisher matrix, inverted in sample space.",
        options={"damping": 1e-6, "kl_clip": None},
        alone=True,
    ),
    "conjugate-gradient": _measured(
        "Conjugate-gradient NGD",
        natgrad.ConjugateGradientNGD,
        "The full Fisher matrix by products alone, solved by conjugate gradients.",
    ),
    "thermodynamic": _measured(
        "Thermodynamic NGD",
        natgrad.ThermodynamicNGD,
        "The full Fisher matrix by products alone, solved by a simulated thermal equilibrium.",
        options={"structure": Full(solver=Thermodynamic(time=100.0))},
    ),
    "padam": _searched(
        "Padam", natgrad.Padam, "Adam with a power of its second moments between SGD's and its own."
    ),
}
"""Every method by name. Learning rates and options of natural methods are tuned here."""

DEFAULT_METHODS = (*"sgd adamw exact block-diagonal block-tridiagonal kfac unit-wise".split(),)
"""The methods of a comparison that names none."""

OWN_METHODS = ("sgd", "adamw", "kfac")
"""The methods of a comparison on a user's model that names none."""


def method_name(text: str) -> str:
    """Return the name of a method from itself or from that of its optimizer, in any case.

    What is neither is returned as it is.
    """
    names = {method.optimizer.__name__.lower(): name for name, method in METHODS.items()}
    plain = text.strip().lower().replace("_", "-")
    return names.get(plain, plain if plain in METHODS else text.strip())
