"""Options that say how a natural gradient becomes a step, for all parameters together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from natgrad.curvature.base import check_choice
from natgrad.optim.grafting import Graft
from natgrad.optim.line_search import LineSearch, LineSearchRule
from natgrad.optim.ranges import check_range

__all__ = ["MomentumOn", "StepOptions", "StepRule", "WeightDecayMode"]

StepRule = Literal["lr", "quadratic_model", "line_search"]
MomentumOn = Literal["natural_gradient", "gradient"]
WeightDecayMode = Literal["decoupled", "model"]


@dataclass(frozen=True)
class StepOptions:
    """Options as :class:`natgrad.NaturalGradient` describes them, checked.

    Raises:
        ValueError: If one is out of range or two exclude each other.
    """

    norm_clip: float | None = None
    step_rule: StepRule = "lr"
    nesterov: bool = False
    momentum_on: MomentumOn = "natural_gradient"
    weight_decay_mode: WeightDecayMode = "decoupled"
    graft: Graft | None = None
    graft_betas: tuple[float, float] = (0.9, 0.999)
    line_search: LineSearchRule | LineSearch = "armijo"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.norm_clip is not None:
            check_range("norm_clip", self.norm_clip)
        check_choice("step_rule", self.step_rule, "lr", "quadratic_model", "line_search")
        check_choice("momentum_on", self.momentum_on, "natural_gradient", "gradient")
        check_choice("weight_decay_mode", self.weight_decay_mode, "decoupled", "model")
        if self.graft is not None:
            check_choice("graft", self.graft, "sgd", "adam")
        for index, beta in enumerate(self.graft_betas):
            check_range(f"graft_betas[{index}]", beta, below=1.0)
        if self.uses_model and self.momentum_on == "gradient":
            raise ValueError(
                "step_rule='quadratic_model' chooses the momentum of steps itself, so it does not "
                "take momentum_on='gradient'"
            )
        if self.search != LineSearch() and not self.searches:
            raise ValueError(
                f"line_search={self.line_search!r} says how step_rule='line_search' searches, and "
                f"step_rule is {self.step_rule!r}"
            )

    @property
    def uses_model(self) -> bool:
        """Whether the quadratic model chooses the step."""
        return self.step_rule == "quadratic_model"

    @property
    def searches(self) -> bool:
        """Whether the loss itself chooses the length of the step."""
        return self.step_rule == "line_search"

    @property
    def search(self) -> LineSearch:
        """The line search."""
        given = self.line_search
        return given if isinstance(given, LineSearch) else LineSearch(given)

    @property
    def decays_in_model(self) -> bool:
        """Whether weight decay is part of the loss."""
        return self.weight_decay_mode == "model"

    def check_isotropic(self) -> None:
        """Raise a ValueError if the learning rate cannot be ``"isotropic"``."""
        if self.uses_model or self.graft is not None:
            raise ValueError(
                "lr='isotropic' is the length of natural gradients by theory, so it takes neither "
                "step_rule='quadratic_model' nor graft: give lr as a number"
            )

    def check_fused(self) -> None:
        """Raise a ValueError if the plain gradient is needed, which fused layers never form."""
        plain = {
            f"step_rule={self.step_rule!r}": self.uses_model or self.searches,
            "momentum_on='gradient'": self.momentum_on == "gradient",
            "weight_decay_mode='model'": self.decays_in_model,
            f"graft={self.graft!r}": self.graft is not None,
        }
        for option, chosen in plain.items():
            if chosen:
                raise ValueError(
                    f"fused=True never forms the plain gradient, which {option} needs: leave out "
                    "one of the two"
                )
