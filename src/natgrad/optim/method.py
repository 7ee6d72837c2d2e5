"""What a natural-gradient method is made of, and the defaults that its optimizer shows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from natgrad.arguments import check_kind
from natgrad.curvature import Structure, as_structure
from natgrad.fisher import FisherType
from natgrad.optim.options import Refresh, StepRule, check_options
from natgrad.optim.step.damping import LevenbergMarquardt, RelativeDamping


class Default:
    """Stands for what an optimizer's method says."""

    def __repr__(self) -> str:
        return "<default of the method>"


DEFAULT: Any = Default()


@dataclass(frozen=True)
class Method:
    """What a natural-gradient method is made of, and the defaults of its optimizer.

    Attributes:
        structure: Which entries of the Fisher matrix are kept, and how they are inverted.
        lr: Learning rate.
        damping: λ, or the rule that adapts it.
        momentum: μ.
        weight_decay: w.
        fisher: Which vectors are pulled back.
        kl_clip: Bound on the predicted change of the output distribution per step.
        refresh: When curvature is updated, averaged and inverted.
        step_rule: How a natural gradient becomes a step.
    """

    structure: str | Structure = "kfac"
    lr: float | Tensor | Literal["isotropic"] = 0.1
    damping: float | RelativeDamping | LevenbergMarquardt = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    fisher: str | FisherType = "exact"
    kl_clip: float | None = None
    refresh: Refresh = Refresh()  # noqa: RUF009, frozen
    step_rule: StepRule = StepRule()  # noqa: RUF009, frozen

    def __post_init__(self) -> None:
        """Check that groups of options are groups of options."""
        check_kind("refresh", self.refresh, Refresh)
        check_kind("step_rule", self.step_rule, StepRule)

    def with_options(self, optimizer: str, any_structure: bool, given: dict[str, Any]) -> Method:
        """Return the method with what was given in place of its defaults.

        Args:
            optimizer: Name of the optimizer, for messages.
            any_structure: Whether it takes structures of another kind than the method's.
            given: Field → value or :data:`DEFAULT`.

        Raises:
            TypeError: If the structure is of another kind.
            ValueError: If lengths are no longer measured, and no learning rate is given.
        """
        changes = {name: value for name, value in given.items() if value is not DEFAULT}
        for name, kind in (("refresh", Refresh), ("step_rule", StepRule)):
            if name in changes:
                check_kind(name, changes[name], kind)
                changes[name] = changes[name].over(getattr(self, name))
        own = as_structure(self.structure, training=True)
        chosen = changes.get("structure", own)
        if any_structure:
            chosen = as_structure(chosen, training=True)
        elif chosen == own.name:
            chosen = own
        elif not isinstance(chosen, type(own)):
            raise TypeError(
                f"the structure of {optimizer} must be {own.name!r} or a {type(own).__name__}, got "
                f"{chosen!r}: NaturalGradient takes any"
            )
        made = dataclasses.replace(self, **{**changes, "structure": chosen})
        if self.step_rule.measured and made.step_rule.length == "lr" and "lr" not in changes:
            raise ValueError(
                f"{optimizer}'s lr of {self.lr} is a factor on measured lengths, and length='lr' "
                "takes lr as the length itself: give lr=, for example 0.1"
            )
        return made


class ShowsMethod:
    """Mixin of optimizers that are made of a method: its values are their defaults."""

    method: ClassVar[Method]
    __signature__: ClassVar[inspect.Signature]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Tell where an option belongs that is none of the optimizer's."""
        defaults: dict[str, Any] = {}
        own = cls.__mro__[: cls.__mro__.index(ShowsMethod)]
        for made in (vars(one)["__init__"] for one in own if "__init__" in vars(one)):
            for parameter in list(inspect.signature(made).parameters.values())[1:]:
                if parameter.kind is not parameter.VAR_KEYWORD:
                    default = getattr(cls.method, parameter.name, parameter.default)
                    defaults.setdefault(parameter.name, default)
        check_options(cls.__name__, kwargs, defaults)
        return super().__new__(cls, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the method's defaults in the signature."""
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__ and "__init__" not in cls.__dict__:
            cls.__signature__ = _signature_with(cls.method, cls.__init__)


def _signature_with(method: Method, function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a bound ``__init__`` with a method's defaults."""
    signature = inspect.signature(function)
    found = [
        one.replace(default=getattr(method, one.name)) if one.default is DEFAULT else one
        for one in list(signature.parameters.values())[1:]
    ]
    return signature.replace(parameters=found)
