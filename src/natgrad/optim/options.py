"""Options of optimizers, grouped by what they concern. They are frozen and checked."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from typing_extensions import Self

from natgrad.arguments import check_choice, check_integer, check_range, is_number
from natgrad.curvature.sharing import Sharing
from natgrad.optim.step.line_search import LineSearch
from natgrad.optim.step.measured_length import MeasuredLength

Graft = Literal["sgd", "adam"]
MomentumOn = Literal["natural_gradient", "gradient"]
WeightDecayMode = Literal["decoupled", "model"]


@dataclass(frozen=True)
class MethodOptions:
    """A group of options, of which those that are not given are the method's."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note which options are given."""
        group = super().__new__(cls)
        names = [field.name for field in fields(cls)]
        object.__setattr__(group, "_given", frozenset((*names[: len(args)], *kwargs)))
        return group

    def gives(self, name: str) -> bool:
        """Return whether an option is given."""
        given: frozenset[str] = getattr(self, "_given")  # noqa: B009, no field
        return name in given

    def over(self, defaults: Self) -> Self:
        """Return other options with those given here in their places; all count as given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{name: x for name, x in given.items() if self.gives(name)})

    def __repr__(self) -> str:
        """Show the options that are given."""
        shown = [f.name for f in fields(self) if self.gives(f.name)]
        listed = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__name__}({listed})"


@dataclass(frozen=True, repr=False)
class Refresh(MethodOptions):
    """When the curvature is updated, averaged and inverted.

    Options that are not given are those of the optimizer: ``KFAC(model,
    refresh=Refresh(inverses=50))`` is K-FAC as it is but for the interval of its inverses. The
    defaults below hold where a method has none of its own.

    Attributes:
        factors: Steps between updates of the curvature.
        inverses: Steps between factorisations.
        decay: Decay of the moving average over updates; 0 keeps the last batch alone.
        early: Update and factorise also at steps 1, 2, 4, 8, … of the first interval, while the
            network changes fastest and the average holds little.
        stagger: Spread factorisations evenly over the steps of ``inverses``, so that no single step
            takes much longer than the others; for structures made of independent layers.
        warmup: Steps at the start that update curvature, every time, and move no preconditioned
            parameter; the fallback trains as usual. The intervals count from the first step after
            them.
        sharing: What processes that train together share of K-FAC, its relatives by eigenvalues and
            trace, and KPSVD. ``"inverses"``: each makes some of the factorisations and sends the
            inverses to all. ``"memory"``: each keeps factors and inverses of some layers and sends
            their natural gradients, at every step; ``state_dict`` must then be called in all.
            A number in (0, 1] lies between the two: the fraction of the processes that keeps each
            layer, 1/N as ``"memory"`` and 1 as ``"inverses"``. ``"auto"`` is ``"inverses"`` with up
            to 8 processes, and with more the fraction that has as many as divide N, 8 at most.
            ``"nothing"``: each makes all of them, and natural gradients are averaged at every step,
            as with other structures.

    Raises:
        ValueError: If an option is out of range.
    """

    factors: int = 1
    inverses: int = 1
    decay: float = 0.0
    early: bool = False
    stagger: bool = False
    warmup: int = 0
    sharing: Sharing | float = "inverses"

    def __post_init__(self) -> None:
        """Check the options."""
        check_integer("factors", self.factors)
        check_integer("inverses", self.inverses)
        check_range("decay", self.decay, below=1.0)
        if isinstance(self.sharing, str):
            known = self.sharing in get_args(Sharing)
        else:
            known = is_number(self.sharing) and 0 < self.sharing <= 1
        if not known:
            raise ValueError(
                "sharing must be 'inverses', 'auto', 'memory', 'nothing' or a fraction of the "
                f"processes in (0, 1], got {self.sharing!r}"
            )
        forgets = self.warmup > 0 and self.decay == 0 and self.gives("decay")
        if self.warmup < 0 or forgets:
            raise ValueError(
                "warmup must be 0, or positive with decay > 0 (without an average curvature "
                f"forgets the warm-up), got {self.warmup} with decay={self.decay:g}"
            )

    @property
    def every_step(self) -> bool:
        """Whether the curvature is that of the present batch alone, at every step."""
        return self.factors == self.inverses == 1 and self.decay == 0

    def is_turn(self, step: int, interval: int) -> bool:
        """Return whether something done at an interval is due at a step, counted from 0."""
        early = self.early and step < interval
        return step % interval == 0 or (early and step & (step - 1) == 0)


@dataclass(frozen=True, repr=False)
class StepRule(MethodOptions):
    """How a natural gradient becomes a step, for all parameters together.

    Options that are not given are those of the optimizer: ``KFAC(model,
    step_rule=StepRule(norm_clip=1.0))`` measures its lengths as K-FAC does. The defaults below hold
    where a method has none of its own.

    Attributes:
        length: ``"lr"``, the learning rate; a :class:`natgrad.MeasuredLength`: a factor on it that
            is measured now and then and checked at every step; ``"quadratic_model"``: the step is η
            times ``δ = −αΔ + μδ₀``, with δ₀ the step before, where α, and with ``momentum > 0``
            also μ, minimise the quadratic model of the loss with damping and the Fisher matrix of
            the present batch, by ``fisher``. The minimiser itself needs ``lr=1`` and
            ``kl_clip=None``; the clips bound all of ηδ. It costs the rows of every batch and one
            product with them, and the loss must be a mean over samples (Martens & Grosse 2015,
            sections 6.4 and 7).
            A :class:`natgrad.LineSearch`: the step is ``−tm``, along the direction m (momentum and
            clips included) that ``"lr"`` would take, with t searched from ``lr`` on; groups with
            different ``lr`` are shortened by one factor. ``step`` needs a closure. Momentum that
            would not descend is forgotten, and so it is where no length lowers the loss: then
            nothing moves (the fallback's parameters apart), and adaptive damping rises. Decoupled
            weight decay takes the rate found and no part in the search.
        nesterov: Whether momentum looks ahead, as in :class:`torch.optim.SGD`; without effect
            where there is none, or where the quadratic model chooses it.
        momentum_on: ``"natural_gradient"``, or ``"gradient"``: the sum of past gradients is what
            is preconditioned.
        averaged_momentum: Whether momentum is a bias-corrected average,
            ``m ← μm + (1 − μ)Δ``, rather than a sum.
        weight_decay_mode: ``"decoupled"``, ``θ ← (1 − ηw)θ``, or ``"model"``: the loss gains
            ``½w‖θ‖²``, so its gradient ``wθ`` and its curvature ``F + wI``. Losses must be means
            over samples.
        norm_clip: Bound on the Euclidean norm of ηΔ over all preconditioned parameters together,
            after ``kl_clip``. None for no bound.
        graft: Optimizer whose length each parameter tensor's direction takes: ``"sgd"`` (the norm
            of the gradient, or of the sum of gradients with ``momentum_on="gradient"``),
            ``"adam"``, or None for the natural gradient's own.
        graft_betas: Decays of Adam's moments for ``graft="adam"``.

    Raises:
        ValueError: If an option is out of range or two exclude each other.
    """

    length: Literal["lr", "quadratic_model"] | MeasuredLength | LineSearch = "lr"
    nesterov: bool = False
    momentum_on: MomentumOn = "natural_gradient"
    averaged_momentum: bool = False
    weight_decay_mode: WeightDecayMode = "decoupled"
    norm_clip: float | None = None
    graft: Graft | None = None
    graft_betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        """Check the options."""
        rules = (LineSearch, MeasuredLength)
        if not isinstance(self.length, rules) and self.length not in ("lr", "quadratic_model"):
            raise ValueError(
                "length must be 'lr', 'quadratic_model', a natgrad.MeasuredLength or a "
                "natgrad.LineSearch, got "
                f"{self.length!r}"
            )
        if self.norm_clip is not None:
            check_range("norm_clip", self.norm_clip)
        check_choice("momentum_on", self.momentum_on, "natural_gradient", "gradient")
        check_choice("weight_decay_mode", self.weight_decay_mode, "decoupled", "model")
        if self.graft is not None:
            check_choice("graft", self.graft, "sgd", "adam")
        for index, beta in enumerate(self.graft_betas):
            check_range(f"graft_betas[{index}]", beta, below=1.0)
        if self.uses_model and self.momentum_on == "gradient":
            raise ValueError(
                "length='quadratic_model' chooses the momentum of steps itself, so it does not "
                "take momentum_on='gradient'"
            )
        if self.measured is not None:
            self._check_measured()

    def _check_measured(self) -> None:
        """Raise a ValueError if an option chooses what a measured length decides."""
        chosen = {
            "nesterov=True": self.nesterov,
            "averaged_momentum=True": self.averaged_momentum,
            "momentum_on='gradient'": self.momentum_on == "gradient",
            f"graft={self.graft!r}": self.graft is not None,
        }
        for option in (name for name, given in chosen.items() if given):
            raise ValueError(
                f"a MeasuredLength has a momentum and a length of its own, so it does not take "
                f"{option}: leave that out, or choose length='lr'"
            )

    @cached_property
    def measured(self) -> MeasuredLength | None:
        """How lengths are measured, if they are."""
        return self.length if isinstance(self.length, MeasuredLength) else None

    @cached_property
    def keeps_steps(self) -> bool:
        """Whether the last step is kept, rather than a sum of directions."""
        return self.uses_model or self.measured is not None

    @cached_property
    def uses_model(self) -> bool:
        """Whether the quadratic model chooses the step."""
        return self.length == "quadratic_model"

    @cached_property
    def search(self) -> LineSearch | None:
        """The line search, if the loss itself chooses the length of the step."""
        return self.length if isinstance(self.length, LineSearch) else None

    @cached_property
    def decays_in_model(self) -> bool:
        """Whether weight decay is part of the loss."""
        return self.weight_decay_mode == "model"

    def check_isotropic(self) -> None:
        """Raise a ValueError if the learning rate cannot be ``"isotropic"``."""
        if self.keeps_steps or self.graft is not None:
            raise ValueError(
                "lr='isotropic' is the length of natural gradients by theory, so it takes "
                "length='lr' or a line search, and no graft: choose these, or give lr as a number"
            )

    def check_fused(self) -> None:
        """Raise a ValueError if the plain gradient is needed, which fused layers never form."""
        plain = {
            "length='quadratic_model'": self.uses_model,
            "a line search": self.search is not None,
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


@dataclass(frozen=True)
class Fallback:
    """The first-order optimizer of parameters that are not preconditioned.

    Attributes:
        name: ``"adamw"``, or ``"sgd"`` (momentum 0.9).
        lr: Its learning rate; 1e-3 for AdamW and 1e-2 for SGD by default. Without one AdamW trains
            parameters of which it turns out that they have no rows, or not those of their gradient,
            at 3e-3, and at 1e-2 if they have one dimension or none: vectors of wide layers bear the
            rates that those of narrow ones do (Yang & Hu 2021).

    Raises:
        ValueError: If the name is unknown or the rate out of range.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("fallback", self.name, "adamw", "sgd")
        if self.lr is not None:
            check_range("the fallback's lr", self.lr)


def check_options(optimizer: str, given: Collection[str], defaults: dict[str, Any]) -> None:
    """Raise a TypeError for an option that an optimizer, or one of its options, does not have."""
    length = "step_rule=natgrad.StepRule(length=natgrad.MeasuredLength({}))"
    places: list[tuple[object, str]] = [(MeasuredLength(), length)]
    for option, default in {**defaults, "fallback": Fallback()}.items():
        module = "natgrad.curvature" if option == "structure" else "natgrad"
        places.append((default, f"{option}={module}.{type(default).__name__}({{}})"))
    for name in given:
        if name in defaults:
            continue
        hint = f"; its options are {', '.join(defaults)}"
        for near in difflib.get_close_matches(name, defaults, n=1):
            hint = f": did you mean {near!r}?"
        for group, place in places:
            if is_dataclass(group) and name in {field.name for field in fields(group)}:
                hint = f": give it as {place.format(name + '=...')}"
        raise TypeError(f"{optimizer} got an unexpected keyword argument {name!r}{hint}")
